//! `Mdm-Signature`: nobody but the simulator's devices signed anything, and they signed only the corpus's bodies.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use wasmdm_protocol::mdm_signature::verify;

use crate::cost::{Bound, bounded};
use crate::kind_of;
use crate::mutation::ber::Node;

/// Between CMS and body.
pub(crate) const SEPARATOR: &[u8] = b"\0body\0";

const BOUND: Bound = Bound { bytes: 1 << 20, bytes_per_byte: 64 };

/// All that a simulated device ever signed for the corpus.
pub(crate) const SHORT_BODY: &[u8] = b"<plist><dict><key>Status</key><string>Idle</string><key>UDID</key><string>U1</string></dict></plist>";
/// Longer than a block of any digest.
pub(crate) const LONG_BODY: &[u8] = &[b' '; 300];

pub(crate) fn check(input: &[u8]) -> String {
    let (cms, body) = match input.windows(SEPARATOR.len()).rposition(|window| window == SEPARATOR) {
        Some(at) => (input.get(..at).unwrap_or_default(), input.get(at + SEPARATOR.len()..).unwrap_or_default()),
        None => (input, &[][..]),
    };
    // Headers come in any form; the reader has to bear one that is not base64 as well.
    let _ = bounded(BOUND, cms.len(), || verify(cms, body));
    let header = STANDARD.encode(cms);
    let signer = match bounded(BOUND, header.len() + body.len(), || verify(header.as_bytes(), body)) {
        Err(error) => return kind_of(&error),
        Ok(signer) => signer,
    };
    assert!([SHORT_BODY, LONG_BODY].contains(&body), "nobody signed this body");
    assert_eq!(verify(header.as_bytes(), body).as_ref(), Ok(&signer), "asked again, another signed it");
    let refused = |cms: &[u8], body: &[u8], what: &str| {
        assert!(verify(STANDARD.encode(cms).as_bytes(), body).is_err(), "it still holds after a change of {what}");
    };
    refused(cms, &[body, b"\n"].concat(), "the body's end");
    refused(cms, body.get(1..).unwrap_or(b"x"), "the body's start");
    for at in places(body.len()) {
        refused(cms, &flipped(body, at), "the body");
    }
    let value = signature_value(cms).unwrap_or_else(|| panic!("the signature's value cannot be found"));
    for at in places(value.len()) {
        let mut changed = Node::read_all(cms).unwrap_or_default();
        let Some(bytes) = changed.first_mut().and_then(|whole| value_of(whole)) else { continue };
        *bytes = flipped(bytes, at);
        refused(&Node::write_all(&changed), body, "the signature");
    }
    "verified".into()
}

/// Some places in that many bytes: both ends, and between.
fn places(length: usize) -> impl Iterator<Item = usize> {
    [0, length / 3, length / 2, length.saturating_sub(1)].into_iter().filter(move |at| *at < length)
}

fn flipped(bytes: &[u8], at: usize) -> Vec<u8> {
    bytes.iter().enumerate().map(|(index, byte)| if index == at { byte ^ 0x10 } else { *byte }).collect()
}

fn signature_value(cms: &[u8]) -> Option<Vec<u8>> {
    let mut whole = Node::read_all(cms)?;
    value_of(whole.first_mut()?).cloned()
}

/// Where the only signer's value lies: the string behind the two algorithms. Of one in pieces it is the first piece with anything in it.
fn value_of(content_info: &mut Node) -> Option<&mut Vec<u8>> {
    let signed_data = content_info.children()?.get_mut(1)?.children()?.first_mut()?;
    let signer = signed_data.children()?.iter_mut().rfind(|field| field.tag == 0x31)?.children()?.first_mut()?;
    let value = signer.children()?.iter_mut().skip(3).find(|field| matches!(field.tag, 0x04 | 0x24))?;
    first_piece(value)
}

fn first_piece(string: &mut Node) -> Option<&mut Vec<u8>> {
    if string.tag == 0x04 {
        return string.bytes().filter(|bytes| !bytes.is_empty());
    }
    string.children()?.iter_mut().find_map(first_piece)
}
