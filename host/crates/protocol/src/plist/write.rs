//! XML property lists as Apple writes them: tabs, sorted as given, data in lines.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use plist::{Dictionary, Value};

use super::date;

const HEAD: &str = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<!DOCTYPE plist PUBLIC \"-//Apple//DTD PLIST 1.0//EN\" \"http://www.apple.com/DTDs/PropertyList-1.0.dtd\">\n<plist version=\"1.0\">\n";
const TAIL: &str = "</plist>\n";

/// Writes an XML property list. Characters that XML cannot hold are written as U+FFFD.
///
/// ```
/// use wasmdm_protocol::plist::{Value, to_xml};
/// assert!(to_xml(&Value::from("a & b")).ends_with(b"<string>a &amp; b</string>\n</plist>\n"));
/// ```
pub fn to_xml(value: &Value) -> Bytes {
    let mut text = String::with_capacity(1024);
    text.push_str(HEAD);
    write(&mut text, value, 0);
    text.push_str(TAIL);
    text.into()
}

fn write(out: &mut String, value: &Value, depth: usize) {
    indent(out, depth);
    match value {
        Value::Array(values) if values.is_empty() => out.push_str("<array/>"),
        Value::Array(values) => {
            out.push_str("<array>\n");
            for value in values {
                write(out, value, depth + 1);
            }
            indent(out, depth);
            out.push_str("</array>");
        }
        Value::Dictionary(entries) => dictionary(out, entries, depth),
        Value::Boolean(true) => out.push_str("<true/>"),
        Value::Boolean(false) => out.push_str("<false/>"),
        Value::Data(bytes) => data(out, bytes, depth),
        Value::Date(value) => element(out, "date", &date::to_xml_text(*value)),
        Value::Real(number) => element(out, "real", &number.to_string()),
        Value::Integer(number) => element(out, "integer", &number.to_string()),
        Value::String(text) => element(out, "string", text),
        // Only archives of programs have these; the readers refuse them.
        _ => out.push_str("<string></string>"),
    }
    out.push('\n');
}

fn dictionary(out: &mut String, entries: &Dictionary, depth: usize) {
    if entries.is_empty() {
        out.push_str("<dict/>");
        return;
    }
    out.push_str("<dict>\n");
    for (key, value) in entries {
        indent(out, depth + 1);
        element(out, "key", key);
        out.push('\n');
        write(out, value, depth + 1);
    }
    indent(out, depth);
    out.push_str("</dict>");
}

/// Lines end at column 76, tabs counted as eight.
fn data(out: &mut String, bytes: &[u8], depth: usize) {
    out.push_str("<data>\n");
    let line = (76 - 8 * depth.min(8)) / 4 * 3;
    for part in bytes.chunks(line) {
        indent(out, depth);
        STANDARD.encode_string(part, out);
        out.push('\n');
    }
    indent(out, depth);
    out.push_str("</data>");
}

fn element(out: &mut String, name: &str, text: &str) {
    out.push('<');
    out.push_str(name);
    out.push('>');
    escape(out, text);
    out.push_str("</");
    out.push_str(name);
    out.push('>');
}

fn escape(out: &mut String, text: &str) {
    if !text.bytes().any(|byte| byte < 0x20 || matches!(byte, b'<' | b'>' | b'&' | 0xef)) {
        out.push_str(text);
        return;
    }
    for character in text.chars() {
        match character {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '\r' => out.push_str("&#13;"),
            character if is_unwritable(character) => out.push(char::REPLACEMENT_CHARACTER),
            character => out.push(character),
        }
    }
}

/// Whether XML 1.0 cannot hold the character, not even by its number.
pub(super) const fn is_unwritable(character: char) -> bool {
    matches!(character, '\0'..='\x08' | '\x0b' | '\x0c' | '\x0e'..='\x1f' | '\u{fffe}' | '\u{ffff}')
}

fn indent(out: &mut String, depth: usize) {
    for _ in 0..depth {
        out.push('\t');
    }
}
