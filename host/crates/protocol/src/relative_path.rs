//! Paths that somebody else names below an address that an operator gave. They must not be able to name a place above it.

use std::fmt::Write as _;

/// Far more than any server's paths have.
const MAX_SEGMENTS: usize = 64;

/// The path of a request, to be put behind a base with a slash between: percent-encoded, without steps upwards and without empty parts.
/// A slash at its end stays.
///
/// ```
/// use wasmdm_protocol::relative_path::RelativePath;
/// assert_eq!(RelativePath::parse("assets/a%20b.plist")?.as_str(), "assets/a%20b.plist");
/// assert!(RelativePath::parse("assets/%2e%2e/admin").is_err());
/// # Ok::<(), wasmdm_protocol::relative_path::RelativePathError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelativePath(String);

/// Why a path is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("path: {0}")]
pub struct RelativePathError(&'static str);

impl RelativePath {
    /// Reads a path without its query. What is percent-encoded already stays so.
    pub fn parse(text: &str) -> Result<Self, RelativePathError> {
        let mut path = String::with_capacity(text.len());
        let mut segments = text.split('/').peekable();
        let mut place = 0;
        while let Some(segment) = segments.next() {
            if place >= MAX_SEGMENTS {
                return Err(RelativePathError("it has too many parts"));
            }
            if place > 0 {
                path.push('/');
            }
            place += 1;
            if segment.is_empty() && segments.peek().is_none() {
                break;
            }
            push_segment(&mut path, segment).map_err(RelativePathError)?;
        }
        Ok(Self(path))
    }

    /// For instance `assets/a%20b.plist`; can be empty.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Appends a part of a path, percent-encoded, unless it is empty, leads upwards or is really several parts.
pub(crate) fn push_segment(path: &mut String, segment: &str) -> Result<(), &'static str> {
    if segment.is_empty() {
        return Err("one of its parts is empty");
    }
    let mut decoded = Vec::with_capacity(segment.len());
    let mut rest = segment.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte == b'%'
            && let Some((digits, after)) = after.split_at_checked(2)
            && let Some(value) = hex_pair(digits)
        {
            rest = after;
            decoded.push(value);
            // Writing to a string does not fail.
            let _ = write!(path, "%{value:02X}");
        } else if byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,=:@".contains(&byte) {
            decoded.push(byte);
            path.push(char::from(byte));
        } else {
            decoded.push(byte);
            let _ = write!(path, "%{byte:02X}");
        }
    }
    if decoded.iter().any(|byte| byte.is_ascii_control() || matches!(byte, b'/' | b'\\')) {
        return Err("one of its parts has a slash or a control character within");
    }
    // Some servers cut off what follows a semicolon before they look for steps upwards.
    let name = decoded.split(|byte| *byte == b';').next().unwrap_or_default();
    if matches!(name, b"." | b"..") {
        return Err("it leads upwards");
    }
    Ok(())
}

fn hex_pair(digits: &[u8]) -> Option<u8> {
    let text = std::str::from_utf8(digits).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_hexdigit()))?;
    u8::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_as_they_are_and_what_they_cannot_hold_is_encoded() {
        for (given, path) in [
            ("", ""),
            ("foo/bar", "foo/bar"),
            ("folder/", "folder/"),
            ("http:elsewhere", "http:elsewhere"),
            ("a%20b/c+d;v=1", "a%20b/c+d%3Bv=1"),
            ("ü\"", "%C3%BC%22"),
        ] {
            assert_eq!(RelativePath::parse(given).unwrap().as_str(), path);
        }
    }

    #[test]
    fn no_path_leads_upwards_or_has_another_path_within() {
        let deep = "a/".repeat(MAX_SEGMENTS + 1);
        for path in [
            "/",
            "//host/x",
            "a//b",
            "..",
            "a/..",
            "../a",
            "a/../../b",
            ".",
            "%2e%2E/a",
            ".%2e/a",
            "..;a=b/c",
            "%2e%2e%3B/a",
            "a%2Fb",
            "a%5cb",
            "a\\b",
            "a%00",
            "a\nb",
            &deep,
        ] {
            assert!(RelativePath::parse(path).is_err(), "{path:?}");
        }
    }
}
