//! A reader of BER, the looser parent of DER that devices' signatures are written in: lengths may be indefinite, strings may be in pieces.
//!
//! Tags are one byte here: certificates and signatures have no others.

use std::borrow::Cow;

pub(crate) const INTEGER: u8 = 0x02;
pub(crate) const OCTET_STRING: u8 = 0x04;
pub(crate) const OID: u8 = 0x06;
pub(crate) const SEQUENCE: u8 = 0x30;
pub(crate) const SET: u8 = 0x31;

/// Says of a tag that elements lie within.
pub(crate) const CONSTRUCTED: u8 = 0x20;

/// How deep elements of indefinite length, or pieces of strings, may lie in each other.
const MAX_DEPTH: usize = 16;

/// One element.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Element<'a> {
    pub(crate) tag: u8,
    /// Without the mark at the end of an indefinite length.
    pub(crate) content: &'a [u8],
    /// With tag, length and that mark.
    pub(crate) whole: &'a [u8],
}

impl<'a> Element<'a> {
    pub(crate) fn reader(self) -> Reader<'a> {
        Reader { rest: self.content }
    }

    /// The bytes of a string that may be in pieces. The first tag is the caller's to check.
    pub(crate) fn octets(self) -> Option<Cow<'a, [u8]>> {
        if self.tag & CONSTRUCTED == 0 {
            return Some(Cow::Borrowed(self.content));
        }
        let mut whole = Vec::new();
        collect(self, &mut whole, 0)?;
        Some(Cow::Owned(whole))
    }
}

fn collect(element: Element<'_>, whole: &mut Vec<u8>, depth: usize) -> Option<()> {
    if depth > MAX_DEPTH {
        return None;
    }
    let mut pieces = element.reader();
    while !pieces.is_empty() {
        let piece = pieces.next()?;
        match piece.tag {
            OCTET_STRING => whole.extend_from_slice(piece.content),
            tag if tag == OCTET_STRING | CONSTRUCTED => collect(piece, whole, depth + 1)?,
            _ => return None,
        }
    }
    Some(())
}

/// Elements one after the other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// `None` at the end and where no element can be read.
    pub(crate) fn next(&mut self) -> Option<Element<'a>> {
        let element = read(self.rest, 0)?;
        self.rest = self.rest.get(element.whole.len()..)?;
        Some(element)
    }

    /// The next element, which has to have that tag.
    pub(crate) fn expect(&mut self, tag: u8) -> Option<Element<'a>> {
        self.next().filter(|element| element.tag == tag)
    }

    /// The next element if it has that tag; stays where it is otherwise.
    pub(crate) fn optional(&mut self, tag: u8) -> Option<Element<'a>> {
        if self.rest.first() == Some(&tag) { self.next() } else { None }
    }
}

/// The element at the start of `bytes`.
fn read(bytes: &[u8], depth: usize) -> Option<Element<'_>> {
    let (&tag, rest) = bytes.split_first()?;
    // Tags of more than one byte.
    if tag & 0x1f == 0x1f || tag == 0 {
        return None;
    }
    let (&first, rest) = rest.split_first()?;
    let (length, header) = match first {
        0..=0x7f => (usize::from(first), 2),
        0x80 => return read_indefinite(bytes, tag, depth),
        // Four bytes hold every length that gets here.
        0x81..=0x84 => {
            let count = usize::from(first & 0x7f);
            (rest.get(..count)?.iter().fold(0, |length, byte| (length << 8) | usize::from(*byte)), 2 + count)
        }
        _ => return None,
    };
    let end = header.checked_add(length)?;
    Some(Element { tag, content: bytes.get(header..end)?, whole: bytes.get(..end)? })
}

/// Its end is a mark, so everything within has to be walked.
fn read_indefinite(bytes: &[u8], tag: u8, depth: usize) -> Option<Element<'_>> {
    if tag & CONSTRUCTED == 0 || depth >= MAX_DEPTH {
        return None;
    }
    let mut end = 2;
    loop {
        let rest = bytes.get(end..)?;
        if rest.starts_with(&[0, 0]) {
            return Some(Element { tag, content: bytes.get(2..end)?, whole: bytes.get(..end + 2)? });
        }
        end += read(rest, depth + 1)?.whole.len();
    }
}

/// Tag and length of DER before `content`.
pub(crate) fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut whole = Vec::with_capacity(content.len() + 6);
    whole.push(tag);
    let length = content.len().to_be_bytes();
    let significant = length.iter().skip_while(|byte| **byte == 0);
    if content.len() < 0x80 {
        whole.extend(significant.chain(&[0]).take(1));
    } else {
        let count = significant.clone().count();
        whole.push(0x80 | u8::try_from(count).unwrap_or_default());
        whole.extend(significant);
    }
    whole.extend_from_slice(content);
    whole
}
