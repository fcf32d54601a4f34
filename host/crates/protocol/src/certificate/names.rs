//! Distinguished names as text.

use std::fmt::Write as _;

use x509_parser::x509::{AttributeTypeAndValue, RelativeDistinguishedName, X509Name};

/// RFC 4514: the last part first, special characters escaped, so that two names never read alike.
pub(super) fn rfc4514(name: &X509Name<'_>) -> String {
    let mut text = String::new();
    let parts: Vec<_> = name.iter_rdn().collect();
    for (index, part) in parts.into_iter().rev().enumerate() {
        if index > 0 {
            text.push(',');
        }
        for (index, attribute) in part.iter().enumerate() {
            if index > 0 {
                text.push('+');
            }
            write_attribute(&mut text, attribute);
        }
    }
    text
}

/// Its parts from the first on, as text in lower case, for comparisons.
pub(super) fn parts(name: &X509Name<'_>) -> Vec<String> {
    let part = |attributes: &RelativeDistinguishedName<'_>| {
        let mut text = String::new();
        for attribute in attributes.iter() {
            write_attribute(&mut text, attribute);
            text.push('+');
        }
        text.to_lowercase()
    };
    name.iter_rdn().map(part).collect()
}

fn write_attribute(text: &mut String, attribute: &AttributeTypeAndValue<'_>) {
    let oid = attribute.attr_type().to_id_string();
    text.push_str(match oid.as_str() {
        "2.5.4.3" => "CN",
        "2.5.4.5" => "serialNumber",
        "2.5.4.6" => "C",
        "2.5.4.7" => "L",
        "2.5.4.8" => "ST",
        "2.5.4.9" => "STREET",
        "2.5.4.10" => "O",
        "2.5.4.11" => "OU",
        "0.9.2342.19200300.100.1.1" => "UID",
        "0.9.2342.19200300.100.1.25" => "DC",
        "1.2.840.113549.1.9.1" => "emailAddress",
        other => other,
    });
    text.push('=');
    if let Ok(value) = attribute.as_str() {
        escape(text, value);
        return;
    }
    text.push('#');
    for byte in attribute.as_slice() {
        let _ = write!(text, "{byte:02x}");
    }
}

fn escape(text: &mut String, value: &str) {
    let last = value.chars().count().saturating_sub(1);
    for (index, character) in value.chars().enumerate() {
        match character {
            '"' | '+' | ',' | ';' | '<' | '>' | '\\' => {
                text.push('\\');
                text.push(character);
            }
            '#' if index == 0 => text.push_str("\\#"),
            ' ' if index == 0 || index == last => text.push_str("\\ "),
            character if character.is_control() => {
                let mut bytes = [0; 4];
                for byte in character.encode_utf8(&mut bytes).bytes() {
                    let _ = write!(text, "\\{byte:02x}");
                }
            }
            character => text.push(character),
        }
    }
}
