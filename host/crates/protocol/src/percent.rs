//! Percent-encoding (RFC 3986, section 2.1), where what is not well encoded must be refused: libraries take it for itself.

/// The bytes of a text in which each stands for itself or as `%XX`; `None` if a `%` is followed by anything else.
///
/// ```
/// use wasmdm_protocol::percent::decoded;
/// assert_eq!(decoded("a%20b").as_deref(), Some(b"a b".as_slice()));
/// assert_eq!(decoded("100%"), None);
/// ```
pub fn decoded(text: &str) -> Option<Vec<u8>> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let mut digit = || char::from(bytes.next()?).to_digit(16);
        let value = digit()? * 16 + digit()?;
        decoded.push(u8::try_from(value).ok()?);
    }
    Some(decoded)
}
