//! What can still be read of a document that [`super::parse`] refused: strings of its top dictionary, which are claims and not facts.

use memchr::{memchr, memmem};

use super::binary;

/// A value longer than this is none of those that are looked for.
const MAX_TEXT: usize = 1024;

/// What stands under a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Claim {
    /// As far as the document could be read, the key is not there.
    Absent,
    /// The key is there, and its text cannot be told.
    Unreadable,
    Text(String),
}

impl Claim {
    /// From the text under a key that is there.
    pub(crate) fn new(text: Option<String>) -> Self {
        text.map_or(Self::Unreadable, Self::Text)
    }
}

/// The strings under `wanted` in the top dictionary, in that order. Takes time linear in the document's length.
pub(crate) fn salvage(document: &[u8], wanted: &[&str]) -> Vec<Claim> {
    if document.starts_with(binary::MAGIC) {
        binary::top_strings(document, wanted).unwrap_or_else(|| vec![Claim::Absent; wanted.len()])
    } else {
        xml_top_strings(document, wanted)
    }
}

fn xml_top_strings(document: &[u8], wanted: &[&str]) -> Vec<Claim> {
    let mut found = vec![Claim::Absent; wanted.len()];
    let mut rest = document;
    let mut depth = 0_usize;
    let mut due: Option<usize> = None;
    while let Some(start) = memchr(b'<', rest) {
        let tag = rest.get(start + 1..).unwrap_or_default();
        let end = if tag.starts_with(b"!--") {
            memmem::find(tag, b"-->").map(|end| end + 3)
        } else if tag.starts_with(b"![CDATA[") {
            memmem::find(tag, b"]]>").map(|end| end + 3)
        } else if tag.starts_with(b"?") {
            memmem::find(tag, b"?>").map(|end| end + 2)
        } else if tag.starts_with(b"!") {
            memchr(b'>', tag).map(|end| end + 1)
        } else {
            end_of_tag(tag)
        };
        let Some(end) = end else { break };
        let (tag, after) = tag.split_at_checked(end).unwrap_or((tag, &[]));
        rest = after;
        let tag = tag.strip_suffix(b">").unwrap_or(tag);
        if tag.starts_with(b"?") || tag.starts_with(b"!") {
            continue;
        }
        if tag.ends_with(b"/") {
            due = None;
            continue;
        }
        let name = tag.split(u8::is_ascii_whitespace).next().unwrap_or_default();
        match name {
            b"dict" | b"array" => {
                // What lies under an array on top is in no dictionary of ours.
                if depth == 0 && name == b"array" {
                    break;
                }
                depth += 1;
                due = None;
            }
            b"/dict" | b"/array" => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    break;
                }
            }
            b"key" if depth == 1 => {
                due = text(rest, b"</key").and_then(|key| wanted.iter().position(|name| *name == key));
                if let Some(place) = due.and_then(|index| found.get_mut(index)) {
                    match place {
                        Claim::Absent => *place = Claim::Unreadable,
                        // Of a key that appears twice the first counts.
                        Claim::Unreadable | Claim::Text(_) => due = None,
                    }
                }
            }
            b"string" if depth == 1 => {
                if let Some(place) = due.take().and_then(|index| found.get_mut(index)) {
                    *place = Claim::new(text(rest, b"</string"));
                }
            }
            _ => {}
        }
    }
    found
}

/// Behind the `>` that ends a tag: one in an attribute's value ends nothing.
fn end_of_tag(tag: &[u8]) -> Option<usize> {
    let mut quote = None;
    for (index, byte) in tag.iter().enumerate() {
        match (quote, byte) {
            (Some(open), _) if open == byte => quote = None,
            (None, b'"' | b'\'') => quote = Some(byte),
            (None, b'>') => return Some(index + 1),
            _ => {}
        }
    }
    None
}

/// The plain text up to `end`.
fn text(rest: &[u8], end: &[u8]) -> Option<String> {
    let window = rest.get(..rest.len().min(MAX_TEXT + end.len())).unwrap_or_default();
    let length = memchr(b'<', window)?;
    if !window.get(length..)?.starts_with(end) {
        return None;
    }
    let text = std::str::from_utf8(window.get(..length)?).ok()?;
    let mut parts = text.split('&');
    let mut decoded = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (name, after) = part.split_once(';')?;
        decoded.push(match name {
            "lt" => '<',
            "gt" => '>',
            "amp" => '&',
            "quot" => '"',
            "apos" => '\'',
            _ => return None,
        });
        decoded.push_str(after);
    }
    Some(decoded)
}
