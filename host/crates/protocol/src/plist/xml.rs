//! XML property lists. Only what property lists need of XML is understood; the rest is refused rather than guessed.

use std::borrow::Cow;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use memchr::{memchr, memchr2, memmem};
use plist::{Integer, Value};

use super::{Collection, MAX_DEPTH, MAX_VALUES, PlistError, date};

/// Apple's reader does not insist on padding either.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_allow_trailing_bits(true).with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

pub(super) fn parse(document: &[u8]) -> Result<Value, PlistError> {
    let text = decode(document)?;
    let mut scanner = Scanner { text, at: 0, root_seen: false };
    scanner.declaration()?;
    let mut wrapped = false;
    let mut root = None;
    let mut open: Vec<Collection> = Vec::new();
    let mut values = 0_usize;
    while let Some(markup) = scanner.next_markup()? {
        if root.is_some() {
            // Only the end of <plist> may still come.
            match markup {
                Markup::End("plist") if wrapped => wrapped = false,
                _ => return Err(scanner.error("something follows the value")),
            }
            continue;
        }
        let value = match markup {
            Markup::Start { name: "plist", empty: false } if !wrapped && open.is_empty() => {
                wrapped = true;
                continue;
            }
            Markup::Start { name: "key", empty } => {
                let key = scanner.text("key", empty)?.into_owned();
                open.last_mut().ok_or_else(|| scanner.error("a key stands outside of a dictionary"))?.add_key(key)?;
                continue;
            }
            Markup::Start { name: "dict", empty: false } => {
                push(&mut open, Collection::dictionary())?;
                continue;
            }
            Markup::Start { name: "array", empty: false } => {
                push(&mut open, Collection::Array(Vec::new()))?;
                continue;
            }
            // One with nothing in it is a level as well: in binary it is read like any other.
            Markup::Start { name: "dict" | "array", empty: true } if open.len() >= MAX_DEPTH => return Err(PlistError::TOO_DEEP),
            Markup::Start { name, empty } => scanner.scalar(name, empty)?,
            Markup::End(name) => {
                let collection = open.pop().ok_or_else(|| scanner.error(format!("`</{}>` closes nothing", shorten(name))))?;
                if name != if matches!(collection, Collection::Array(_)) { "array" } else { "dict" } {
                    return Err(scanner.error(format!("`</{}>` closes another element", shorten(name))));
                }
                collection.close()?
            }
        };
        values += 1;
        if values > MAX_VALUES {
            return Err(PlistError::TOO_MANY);
        }
        match open.last_mut() {
            Some(collection) => collection.add(value)?,
            None => root = Some(value),
        }
    }
    if wrapped {
        return Err(PlistError::Truncated);
    }
    root.ok_or(PlistError::Truncated)
}

fn push(open: &mut Vec<Collection>, collection: Collection) -> Result<(), PlistError> {
    if open.len() >= MAX_DEPTH {
        return Err(PlistError::TOO_DEEP);
    }
    open.push(collection);
    Ok(())
}

/// The document as text without a byte order mark, if it is UTF-8 without control characters.
fn decode(document: &[u8]) -> Result<&str, PlistError> {
    if document.starts_with(&[0xfe, 0xff]) || document.starts_with(&[0xff, 0xfe]) || document.iter().take(4).any(|byte| *byte == 0) {
        return Err(PlistError::malformed("its encoding is not UTF-8"));
    }
    let document = document.strip_prefix(b"\xef\xbb\xbf").unwrap_or(document);
    let text = std::str::from_utf8(document).map_err(|error| match error.error_len() {
        None => PlistError::Truncated,
        Some(_) => PlistError::malformed(format!("it is not UTF-8 at byte {}", error.valid_up_to())),
    })?;
    // XML 1.0 has no way to write these. One pass over all bytes is cheaper than a look at each text.
    if document.iter().fold(false, |found, byte| found | (*byte < 0x20 && !matches!(byte, b'\t' | b'\n' | b'\r'))) {
        return Err(PlistError::malformed("it has a control character"));
    }
    Ok(text)
}

enum Markup<'a> {
    Start { name: &'a str, empty: bool },
    End(&'a str),
}

struct Scanner<'a> {
    text: &'a str,
    /// Always at a character's start.
    at: usize,
    root_seen: bool,
}

impl<'a> Scanner<'a> {
    fn error(&self, problem: impl Into<String>) -> PlistError {
        PlistError::Malformed(format!("{} (near byte {})", problem.into(), self.at))
    }

    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn skip_space(&mut self) {
        let rest = self.rest().as_bytes();
        self.at += rest.iter().position(|byte| !is_space(*byte)).unwrap_or(rest.len());
    }

    /// Moves behind the next `end`.
    fn skip_past(&mut self, end: &str) -> Result<&'a str, PlistError> {
        let rest = self.rest();
        let length = memmem::find(rest.as_bytes(), end.as_bytes()).ok_or(PlistError::Truncated)?;
        self.at += length + end.len();
        Ok(rest.get(..length).unwrap_or_default())
    }

    /// `<?xml …?>`, if it is there.
    fn declaration(&mut self) -> Result<(), PlistError> {
        self.skip_space();
        if !self.rest().starts_with("<?xml") {
            return Ok(());
        }
        let declaration = self.skip_past("?>")?;
        let Some((_, value)) = declaration.split_once("encoding") else { return Ok(()) };
        let value = value.trim_start().trim_start_matches('=').trim_start();
        let encoding = value.get(1..).unwrap_or_default().split(['"', '\'']).next().unwrap_or_default();
        if ["utf-8", "utf8", "us-ascii"].iter().any(|known| known.eq_ignore_ascii_case(encoding)) {
            return Ok(());
        }
        Err(self.error("its encoding is not UTF-8"))
    }

    /// The next tag; only space, comments and instructions may lie before it. `None` at the end.
    fn next_markup(&mut self) -> Result<Option<Markup<'a>>, PlistError> {
        loop {
            self.skip_space();
            let rest = self.rest();
            let mut bytes = rest.bytes();
            match bytes.next() {
                None => return Ok(None),
                Some(b'<') => {}
                Some(_) => return Err(self.error("text stands outside of an element, or this is no XML property list")),
            }
            match bytes.next() {
                None => return Err(PlistError::Truncated),
                Some(b'?') => {
                    self.skip_past("?>")?;
                }
                Some(b'!') => self.declaration_or_comment(rest)?,
                Some(b'/') => {
                    self.at += 2;
                    let name = self.name();
                    self.skip_space();
                    self.expect_end_of_tag()?;
                    return Ok(Some(Markup::End(name)));
                }
                Some(_) => {
                    self.at += 1;
                    let name = self.name();
                    let empty = self.attributes()?;
                    self.root_seen = true;
                    return Ok(Some(Markup::Start { name, empty }));
                }
            }
        }
    }

    fn declaration_or_comment(&mut self, rest: &str) -> Result<(), PlistError> {
        if rest.starts_with("<!--") {
            self.at += 4;
            self.skip_past("-->")?;
            return Ok(());
        }
        if !rest.starts_with("<!DOCTYPE") || self.root_seen {
            return Err(self.error("CDATA, a document type or an entity stands between elements"));
        }
        let declaration = self.skip_past(">")?;
        // An internal subset could define entities.
        if memchr2(b'[', b'<', declaration.as_bytes().get(1..).unwrap_or_default()).is_some() {
            return Err(self.error("its document type has a subset of its own"));
        }
        Ok(())
    }

    /// The name at which a tag begins.
    fn name(&mut self) -> &'a str {
        let rest = self.rest();
        let length = rest.bytes().position(|byte| is_space(byte) || matches!(byte, b'>' | b'/' | b'<')).unwrap_or(rest.len());
        self.at += length;
        rest.get(..length).unwrap_or_default()
    }

    fn expect_end_of_tag(&mut self) -> Result<(), PlistError> {
        match self.rest().bytes().next() {
            Some(b'>') => {
                self.at += 1;
                Ok(())
            }
            Some(_) => Err(self.error("a tag does not end")),
            None => Err(PlistError::Truncated),
        }
    }

    /// Skips attributes and the end of a start tag; whether the element ends with it.
    fn attributes(&mut self) -> Result<bool, PlistError> {
        let mut quote = None;
        let mut slash = false;
        for (index, byte) in self.rest().bytes().enumerate() {
            match (quote, byte) {
                (Some(open), _) if open == byte => quote = None,
                (None, b'"' | b'\'') => quote = Some(byte),
                (None, b'>') => {
                    self.at += index + 1;
                    return Ok(slash);
                }
                (None, b'<') => return Err(self.error("a tag does not end")),
                _ => {}
            }
            slash = quote.is_none() && byte == b'/';
        }
        Err(PlistError::Truncated)
    }

    fn scalar(&mut self, name: &str, empty: bool) -> Result<Value, PlistError> {
        Ok(match name {
            "string" => Value::String(self.text(name, empty)?.into_owned()),
            "integer" => Value::Integer(integer(self.text(name, empty)?.trim()).ok_or_else(|| self.error("an integer is none of 64 bits"))?),
            "true" | "false" => {
                if !self.text(name, empty)?.trim().is_empty() {
                    return Err(self.error("a boolean holds text"));
                }
                Value::Boolean(name == "true")
            }
            "data" => {
                let mut encoded: Vec<u8> = Vec::new();
                let text = self.text(name, empty)?;
                encoded.extend(text.bytes().filter(|byte| !is_space(*byte)));
                Value::Data(BASE64.decode(&encoded).map_err(|_| self.error("data is not base64"))?)
            }
            "date" => Value::Date(date::from_text(self.text(name, empty)?.trim()).ok_or_else(|| self.error("a date cannot be read"))?),
            "real" => Value::Real(self.text(name, empty)?.trim().parse().map_err(|_| self.error("a real number cannot be read"))?),
            // With content they are opened by the caller.
            "dict" => Value::Dictionary(plist::Dictionary::new()),
            "array" => Value::Array(Vec::new()),
            other => return Err(self.error(format!("`<{}>` is no element of property lists", shorten(other)))),
        })
    }

    /// The text of an element and its end tag.
    fn text(&mut self, element: &str, empty: bool) -> Result<Cow<'a, str>, PlistError> {
        if empty {
            return Ok(Cow::Borrowed(""));
        }
        let mut whole = Cow::Borrowed("");
        loop {
            let rest = self.rest();
            let length = memchr2(b'<', b'&', rest.as_bytes()).ok_or(PlistError::Truncated)?;
            append(&mut whole, lines(rest.get(..length).unwrap_or_default()));
            self.at += length;
            let rest = rest.get(length..).unwrap_or_default();
            if rest.starts_with("</") {
                self.at += 2;
                if self.name() != element {
                    return Err(self.error(format!("`<{element}>` is closed by another element")));
                }
                self.skip_space();
                self.expect_end_of_tag()?;
                return Ok(whole);
            } else if rest.starts_with('&') {
                let character = self.reference(rest)?;
                whole.to_mut().push(character);
            } else if rest.starts_with("<![CDATA[") {
                self.at += 9;
                let literal = self.skip_past("]]>")?;
                append(&mut whole, lines(literal));
            } else if rest.starts_with("<!--") {
                self.at += 4;
                self.skip_past("-->")?;
            } else if rest.starts_with("<?") {
                self.skip_past("?>")?;
            } else {
                return Err(self.error(format!("`<{element}>` holds another element")));
            }
        }
    }

    /// `&…;`: XML's five and characters by number. Others would have to be defined in the document.
    fn reference(&mut self, rest: &str) -> Result<char, PlistError> {
        let window = rest.as_bytes().get(1..rest.len().min(12)).unwrap_or_default();
        let Some(length) = memchr(b';', window) else { return Err(self.error("an entity is unknown or does not end")) };
        let name = rest.get(1..=length).unwrap_or_default();
        let character = match name {
            "lt" => '<',
            "gt" => '>',
            "amp" => '&',
            "quot" => '"',
            "apos" => '\'',
            _ => {
                let number = match name.strip_prefix("#x").or_else(|| name.strip_prefix("#X")) {
                    Some(digits) => u32::from_str_radix(digits, 16).ok(),
                    None => name.strip_prefix('#').and_then(|digits| digits.parse().ok()),
                };
                number
                    .and_then(char::from_u32)
                    .filter(|character| !super::write::is_unwritable(*character))
                    .ok_or_else(|| self.error("an entity is unknown or no character"))?
            }
        };
        self.at += length + 2;
        Ok(character)
    }
}

fn append<'a>(whole: &mut Cow<'a, str>, part: Cow<'a, str>) {
    if whole.is_empty() {
        *whole = part;
    } else if !part.is_empty() {
        whole.to_mut().push_str(&part);
    }
}

/// XML reads every line end as `\n`.
fn lines(text: &str) -> Cow<'_, str> {
    if memchr(b'\r', text.as_bytes()).is_none() { Cow::Borrowed(text) } else { Cow::Owned(text.replace("\r\n", "\n").replace('\r', "\n")) }
}

const fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r')
}

fn integer(text: &str) -> Option<Integer> {
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(digits, 16).ok().map(Integer::from);
    }
    text.parse::<i64>().map(Integer::from).or_else(|_| text.parse::<u64>().map(Integer::from)).ok()
}

fn shorten(name: &str) -> String {
    name.chars().take(30).collect::<String>().escape_debug().to_string()
}
