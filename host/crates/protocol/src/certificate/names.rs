//! Distinguished names as text, and what a certificate calls its holder.

use std::fmt::Write as _;

use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::x509::{AttributeTypeAndValue, RelativeDistinguishedName, X509Name};

use crate::ber::{self, Reader};

/// Of `PermanentIdentifier` (RFC 4043), 1.3.6.1.5.5.7.8.3: what ACME authorities write an attested device's serial number or UDID in.
const PERMANENT_IDENTIFIER: &str = "1.3.6.1.5.5.7.8.3";
/// Names that are looked at; a device's certificate has a handful.
const MAX_NAMES: usize = 64;

/// Common name, serial number and user id of the subject, and every text of the alternative names.
pub(super) fn of_holder(certificate: &X509Certificate<'_>) -> Vec<String> {
    let mut names = Vec::new();
    add_subject(&mut names, certificate.subject());
    if let Ok(Some(alternative)) = certificate.subject_alternative_name() {
        for name in &alternative.value.general_names {
            match name {
                GeneralName::RFC822Name(text) | GeneralName::DNSName(text) | GeneralName::URI(text) => names.push((*text).to_owned()),
                GeneralName::DirectoryName(name) => add_subject(&mut names, name),
                GeneralName::OtherName(oid, value) if oid.to_id_string() == PERMANENT_IDENTIFIER => names.extend(permanent_identifier(value)),
                _ => {}
            }
        }
    }
    names.truncate(MAX_NAMES);
    names
}

fn add_subject(names: &mut Vec<String>, subject: &X509Name<'_>) {
    for attribute in subject.iter_attributes() {
        // CN, serialNumber, UID
        if matches!(attribute.attr_type().to_id_string().as_str(), "2.5.4.3" | "2.5.4.5" | "0.9.2342.19200300.100.1.1")
            && let Ok(value) = attribute.as_str()
        {
            names.push(value.to_owned());
        }
    }
}

/// `[0] EXPLICIT SEQUENCE { identifierValue UTF8String OPTIONAL, assigner OBJECT IDENTIFIER OPTIONAL }`
fn permanent_identifier(value: &[u8]) -> Option<String> {
    const EXPLICIT: u8 = 0xA0;
    const UTF8_STRING: u8 = 0x0C;
    let mut outer = Reader::new(value);
    let sequence = match outer.optional(EXPLICIT) {
        Some(explicit) => explicit.reader().expect(ber::SEQUENCE)?,
        None => outer.expect(ber::SEQUENCE)?,
    };
    let text = sequence.reader().expect(UTF8_STRING)?;
    std::str::from_utf8(text.content).ok().map(str::to_owned)
}

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
