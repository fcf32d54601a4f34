//! The header in which a proxy hands a client's certificate on.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::CertificateError;

/// Certificates have two or three thousand bytes; escaping triples that.
const MAX_HEADER: usize = 64 * 1024;

/// The DER in the header.
pub(super) fn decode(value: &[u8]) -> Result<Vec<u8>, CertificateError> {
    if value.len() > MAX_HEADER {
        return Err(CertificateError::new("the header is too long"));
    }
    let value = value.trim_ascii();
    if let Some(value) = value.strip_prefix(b":") {
        let encoded = value.strip_suffix(b":").ok_or_else(|| CertificateError::new("the header does not end with a colon"))?;
        return STANDARD.decode(encoded).map_err(|_| CertificateError::new("the header is not base64"));
    }
    let unescaped = unescape(value).ok_or_else(|| CertificateError::new("the header is not URL-escaped"))?;
    let block = pem::parse(&unescaped).map_err(|_| CertificateError::new("the header is neither RFC 9440 nor PEM"))?;
    if block.tag() != "CERTIFICATE" {
        return Err(CertificateError::new("the header's first PEM block is no CERTIFICATE"));
    }
    Ok(block.into_contents())
}

fn unescape(value: &[u8]) -> Option<Vec<u8>> {
    let mut unescaped = Vec::with_capacity(value.len());
    let mut bytes = value.iter();
    while let Some(byte) = bytes.next() {
        unescaped.push(match byte {
            b'+' => b' ',
            b'%' => {
                let mut digit = || bytes.next().and_then(|digit| char::from(*digit).to_digit(16)).and_then(|digit| u8::try_from(digit).ok());
                (digit()? << 4) | digit()?
            }
            byte => *byte,
        });
    }
    Some(unescaped)
}
