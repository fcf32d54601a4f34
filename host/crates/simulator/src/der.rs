//! Writing DER and BER, and finding two fields of a certificate. Only what a signature over a message needs.

/// `SEQUENCE`
pub(crate) const SEQUENCE: u8 = 0x30;
/// `SET`
pub(crate) const SET: u8 = 0x31;
/// `INTEGER`
pub(crate) const INTEGER: u8 = 0x02;
/// `OCTET STRING`
pub(crate) const OCTET_STRING: u8 = 0x04;
/// `OBJECT IDENTIFIER`
pub(crate) const OBJECT_IDENTIFIER: u8 = 0x06;
/// `UTCTime`
pub(crate) const UTC_TIME: u8 = 0x17;
/// `[0]`, constructed
pub(crate) const CONTEXT_0: u8 = 0xA0;
/// `NULL`, whole
pub(crate) const NULL: &[u8] = &[0x05, 0x00];

/// One element with a definite length.
pub(crate) fn element(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let mut out = Vec::with_capacity(length + 6);
    out.push(tag);
    push_length(&mut out, length);
    for part in parts {
        out.extend_from_slice(part);
    }
    out
}

/// One constructed element with an indefinite length, as BER allows and devices write it.
pub(crate) fn indefinite(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let mut out = Vec::with_capacity(length + 4);
    out.extend_from_slice(&[tag, 0x80]);
    for part in parts {
        out.extend_from_slice(part);
    }
    out.extend_from_slice(&[0, 0]);
    out
}

fn push_length(out: &mut Vec<u8>, length: usize) {
    if let Ok(short) = u8::try_from(length)
        && short < 0x80
    {
        out.push(short);
        return;
    }
    let bytes = length.to_be_bytes();
    let significant: Vec<u8> = bytes.into_iter().skip_while(|byte| *byte == 0).collect();
    out.push(0x80 | u8::try_from(significant.len()).unwrap_or(8));
    out.extend_from_slice(&significant);
}

/// Serial number and issuer of a certificate, as whole elements: how a signer is named.
pub(crate) struct IssuerAndSerial<'a> {
    pub(crate) issuer: &'a [u8],
    pub(crate) serial: &'a [u8],
}

/// Finds both in a DER certificate.
pub(crate) fn issuer_and_serial(certificate: &[u8]) -> Option<IssuerAndSerial<'_>> {
    let (outer, _) = split(certificate)?;
    let (tbs, _) = split(outer.content)?;
    let (first, after_first) = split(tbs.content)?;
    // The version is left out of version 1 certificates.
    let (serial, rest) = if first.tag == CONTEXT_0 { split(after_first)? } else { (first, after_first) };
    let (_algorithm, rest) = split(rest)?;
    let (issuer, _) = split(rest)?;
    (serial.tag == INTEGER && issuer.tag == SEQUENCE).then_some(IssuerAndSerial { issuer: issuer.whole, serial: serial.whole })
}

struct Element<'a> {
    tag: u8,
    content: &'a [u8],
    whole: &'a [u8],
}

fn split(input: &[u8]) -> Option<(Element<'_>, &[u8])> {
    let (&tag, after_tag) = input.split_first()?;
    let (&first, after_first) = after_tag.split_first()?;
    let (length, content) = if first < 0x80 {
        (usize::from(first), after_first)
    } else {
        let (length, rest) = after_first.split_at_checked(usize::from(first & 0x7F))?;
        if length.is_empty() || length.len() > 4 {
            return None;
        }
        let length = length.iter().fold(0usize, |sum, byte| (sum << 8) | usize::from(*byte));
        (length, rest)
    };
    let (content, rest) = content.split_at_checked(length)?;
    let whole = input.get(..input.len() - rest.len())?;
    Some((Element { tag, content, whole }, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_take_the_shortest_form() {
        assert_eq!(element(OCTET_STRING, &[&[7; 127]])[..2], [4, 127]);
        assert_eq!(element(OCTET_STRING, &[&[7; 128]])[..3], [4, 0x81, 128]);
        assert_eq!(element(OCTET_STRING, &[&[7; 300]])[..4], [4, 0x82, 1, 44]);
    }

    #[test]
    fn an_indefinite_element_ends_with_two_zeros() {
        assert_eq!(indefinite(SEQUENCE, &[NULL]), [0x30, 0x80, 0x05, 0x00, 0x00, 0x00]);
    }

    #[test]
    fn a_truncated_certificate_has_no_issuer() {
        assert!(issuer_and_serial(&[0x30, 0x82, 0x01]).is_none());
    }
}
