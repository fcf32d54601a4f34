//! Secrets that are known again wherever they turn up.
//!
//! Every secret of a simulated device holds the same [`MARK`], so that a test can look for all of them at once: in a server's log, metrics,
//! errors, in what it hands to others, in its files. [`found`] looks for a text in every form in which a program would write it out.

use std::fmt::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE};
use memchr::memmem;

/// Stands in every secret. Nothing else that is sent to a server may hold it.
pub const MARK: &str = "kanarienvogel";

/// A secret of bytes; the rest of it still tells it from others.
pub(crate) fn marked(mut secret: [u8; 32]) -> Vec<u8> {
    for (byte, of_mark) in secret.iter_mut().zip(MARK.bytes()) {
        *byte = of_mark;
    }
    secret.to_vec()
}

/// The form in which the secret stands there, with what is around it; `None`: it does not.
pub fn found(secret: &str, content: &[u8]) -> Option<String> {
    for (form, written) in forms(secret) {
        if let Some(at) = memmem::find(content, written.as_bytes()) {
            let around = content.get(at.saturating_sub(100)..(at + written.len() + 60).min(content.len())).unwrap_or_default();
            return Some(format!("{form}: …{}…", String::from_utf8_lossy(around)));
        }
    }
    None
}

/// [`found`] for what simulated devices keep secret.
pub fn found_in(content: &[u8]) -> Option<String> {
    found(MARK, content)
}

fn forms(secret: &str) -> Vec<(&'static str, String)> {
    let bytes = secret.as_bytes();
    let joined = |format: &dyn Fn(u8) -> String, between: &str| bytes.iter().map(|byte| format(*byte)).collect::<Vec<_>>().join(between);
    let mut forms = vec![
        ("as it is", secret.to_owned()),
        ("in hex", joined(&|byte| format!("{byte:02x}"), "")),
        ("in hex", joined(&|byte| format!("{byte:02X}"), "")),
        ("as numbers", joined(&|byte| byte.to_string(), ", ")),
        ("as numbers", joined(&|byte| byte.to_string(), ",")),
        ("percent-encoded", escaped(secret, |text, byte| write!(text, "%{byte:02X}"))),
        ("in JSON", escaped(secret, |text, byte| write!(text, "\\u{byte:04x}"))),
        ("in JSON", secret.replace('/', "\\/")),
    ];
    // In base64 it looks different by its place among the bytes around it, which also say what its first and last letter are.
    for before in 0..3 {
        let mut placed = vec![0; before];
        placed.extend_from_slice(bytes);
        for engine in [STANDARD, URL_SAFE] {
            let encoded = engine.encode(&placed);
            let whole: String = encoded.chars().take(placed.len() * 8 / 6).skip((before * 8).div_ceil(6)).collect();
            forms.push(("in base64", whole));
        }
    }
    forms
}

/// What is no letter or digit is written otherwise.
fn escaped(secret: &str, write: impl Fn(&mut String, u8) -> std::fmt::Result) -> String {
    let mut text = String::new();
    for byte in secret.bytes() {
        if byte.is_ascii_alphanumeric() {
            text.push(char::from(byte));
        } else {
            // Writing to a string does not fail.
            let _ = write(&mut text, byte);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_found_in_every_form() {
        let device = marked([7; 32]);
        assert!(device.ends_with(&[7; 19]));
        for secret in [MARK.as_bytes(), &device] {
            let hex = secret.iter().fold(String::new(), |hex, byte| format!("{hex}{byte:02x}"));
            for written in [
                String::from_utf8_lossy(secret).into_owned(),
                format!("{:?}", bytes::Bytes::copy_from_slice(secret)),
                format!("{secret:?}"),
                serde_json::to_string(secret).unwrap(),
                hex.clone(),
                hex.to_uppercase(),
                STANDARD.encode(secret),
                URL_SAFE.encode([b"?", secret, b"?"].concat()),
                STANDARD.encode([b"<data>", secret, b"\x00</data>"].concat()),
                STANDARD.encode([b"before ", secret].concat()),
            ] {
                assert!(found_in(format!("a line, {written}, and more").as_bytes()).is_some(), "{written}");
            }
        }
        assert_eq!(found_in(b"nothing of that kind, only kanarien and vogel"), None);
    }

    #[test]
    fn a_secret_with_other_letters_is_found_escaped() {
        let secret = "a/b+c=d e";
        for written in ["a%2Fb%2Bc%3Dd%20e", "a\\/b+c=d e", "a\\u002fb\\u002bc\\u003dd\\u0020e", &STANDARD.encode(secret)] {
            assert!(found(secret, written.as_bytes()).is_some(), "{written}");
        }
    }
}
