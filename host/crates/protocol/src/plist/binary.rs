//! Binary property lists (`bplist00`).
//!
//! Objects refer to each other by number, so a short document can stand for an endless or enormous value. Objects are read where they are
//! referred to, and what has been written out so far is counted.

use plist::{Integer, Value};

use super::salvage::Claim;
use super::{Collection, MAX_DEPTH, MAX_VALUES, PlistError, date};

pub(super) const MAGIC: &[u8] = b"bplist00";
const TRAILER: usize = 32;
/// Objects may be shared, so they can come to more than the document's length; by how much is limited.
const SHARED_BYTES: usize = 4 << 20;
/// What a collection takes in memory, whatever it holds, and for each of its members.
const COLLECTION_BYTES: usize = 256;
const MEMBER_BYTES: usize = 64;

pub(super) fn parse(bytes: &[u8]) -> Result<Value, PlistError> {
    let document = Document::new(bytes)?;
    let mut budget = Budget { values: MAX_VALUES, bytes: SHARED_BYTES.saturating_add(bytes.len().saturating_mul(2)) };
    let mut open: Vec<Level<'_>> = Vec::new();
    let mut written_out = vec![false; document.objects.len()];
    let mut due = document.root;
    loop {
        budget.take_values(1)?;
        let mut value = match document.object(due)? {
            Object::Array(references) => {
                budget.take_again(&mut written_out, document.offset(due), references.left())?;
                let items = Vec::with_capacity(budget.reserve(references.left())?);
                push(&mut open, Level { object: due, keys: None, values: references, collection: Collection::Array(items) })?;
                None
            }
            Object::Dictionary { keys, values } => {
                budget.reserve(values.left())?;
                budget.take_again(&mut written_out, document.offset(due), values.left())?;
                push(&mut open, Level { object: due, keys: Some(keys), values, collection: Collection::dictionary() })?;
                None
            }
            object => Some(object.scalar(&mut budget)?),
        };
        // Upwards as long as collections are complete, then on to the next reference.
        loop {
            if let Some(value) = value.take() {
                let Some(level) = open.last_mut() else { return Ok(value) };
                level.collection.add(value)?;
            }
            let Some(level) = open.last_mut() else { return Err(PlistError::malformed("it has no value")) };
            if let Some(reference) = level.values.next() {
                if let Some(keys) = &mut level.keys {
                    let key = keys.next().ok_or(PlistError::Truncated)?;
                    let key = document.object(key)?.text(&mut budget)?.ok_or_else(|| PlistError::malformed("a key is no string"))?;
                    level.collection.add_key(key)?;
                }
                due = reference;
                break;
            }
            value = open.pop().map(|level| level.collection.close()).transpose()?;
        }
    }
}

/// The strings under `wanted` in the top dictionary, read without looking at anything else. Of a key that appears twice the first counts.
pub(super) fn top_strings(bytes: &[u8], wanted: &[&str]) -> Option<Vec<Claim>> {
    /// More entries than any report's top dictionary has.
    const ENTRIES: usize = 1000;
    let document = Document::new(bytes).ok()?;
    let Object::Dictionary { keys, values } = document.object(document.root).ok()? else { return None };
    let mut found = vec![Claim::Absent; wanted.len()];
    let mut budget = Budget { values: 0, bytes: 1 << 20 };
    for (key, value) in keys.zip(values).take(ENTRIES) {
        let Ok(Some(key)) = document.object(key).and_then(|object| object.text(&mut budget)) else { continue };
        let Some(place) = wanted.iter().position(|name| *name == key).and_then(|index| found.get_mut(index)) else { continue };
        if *place == Claim::Absent {
            *place = Claim::new(document.object(value).and_then(|object| object.text(&mut budget)).ok().flatten());
        }
    }
    Some(found)
}

struct Budget {
    values: usize,
    bytes: usize,
}

impl Budget {
    fn take_values(&mut self, count: usize) -> Result<(), PlistError> {
        self.values = self.values.checked_sub(count).ok_or(PlistError::TOO_MANY)?;
        Ok(())
    }

    /// Refuses a collection that cannot be within the budget before anything is allocated for it.
    fn reserve(&self, count: usize) -> Result<usize, PlistError> {
        if count > self.values { Err(PlistError::TOO_MANY) } else { Ok(count) }
    }

    /// A collection is paid for by the bytes that it is written in, but only once: a dictionary of one entry takes two bytes to be referred
    /// to, and hundreds in memory.
    fn take_again(&mut self, written_out: &mut [bool], offset: Option<usize>, members: usize) -> Result<(), PlistError> {
        match offset.and_then(|offset| written_out.get_mut(offset)) {
            Some(seen) if *seen => self.take_bytes(COLLECTION_BYTES.saturating_add(members.saturating_mul(MEMBER_BYTES))),
            Some(seen) => {
                *seen = true;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn take_bytes(&mut self, count: usize) -> Result<(), PlistError> {
        self.bytes = self.bytes.checked_sub(count).ok_or(PlistError::TooLarge { what: "shared bytes", limit: SHARED_BYTES })?;
        Ok(())
    }
}

struct Level<'a> {
    object: usize,
    keys: Option<References<'a>>,
    values: References<'a>,
    collection: Collection,
}

/// The parts of a document, all within its bounds.
struct Document<'a> {
    objects: &'a [u8],
    offsets: &'a [u8],
    offset_size: usize,
    reference_size: usize,
    root: usize,
}

impl<'a> Document<'a> {
    fn new(bytes: &'a [u8]) -> Result<Self, PlistError> {
        if bytes.len() < MAGIC.len() + TRAILER {
            return Err(PlistError::Truncated);
        }
        let (body, trailer) = bytes.split_at(bytes.len() - TRAILER);
        let number = |from: usize, size: usize| unsigned(trailer.get(from..from + size).unwrap_or_default());
        let offset_size = number(6, 1).unwrap_or(0);
        let reference_size = number(7, 1).unwrap_or(0);
        if !(1..=8).contains(&offset_size) || !(1..=8).contains(&reference_size) {
            return Err(PlistError::malformed("its trailer has a size that is not between 1 and 8 bytes"));
        }
        let whole = || {
            let table = number(24, 8)?;
            let end = number(8, 8)?.checked_mul(offset_size)?.checked_add(table)?;
            let offsets = body.get(table..end).filter(|offsets| !offsets.is_empty())?;
            Some(Self { objects: body.get(..table)?, offsets, offset_size, reference_size, root: number(16, 8)? })
        };
        whole().ok_or_else(|| PlistError::malformed("its table of objects lies outside of it"))
    }

    fn object(&self, index: usize) -> Result<Object<'a>, PlistError> {
        self.read_object(index).unwrap_or_else(|| Err(PlistError::malformed("an object lies outside of it")))
    }

    /// Where the object begins, by the table.
    fn offset(&self, index: usize) -> Option<usize> {
        let entry = index.checked_mul(self.offset_size)?;
        unsigned(self.offsets.get(entry..entry.checked_add(self.offset_size)?)?)
    }

    /// `None` where the object reaches beyond the document.
    fn read_object(&self, index: usize) -> Option<Result<Object<'a>, PlistError>> {
        let offset = self.offset(index)?;
        if offset < MAGIC.len() {
            return None;
        }
        let (marker, rest) = self.objects.get(offset..)?.split_first()?;
        let size = usize::from(marker & 0x0f);
        Some(Ok(match (marker >> 4, size) {
            (0, 8) => Object::Scalar(Value::Boolean(false)),
            (0, 9) => Object::Scalar(Value::Boolean(true)),
            (1, 0..=4) => match integer(rest.get(..1 << size)?) {
                Some(integer) => Object::Scalar(Value::Integer(integer)),
                None => return Some(Err(PlistError::malformed("an integer is none of 64 bits"))),
            },
            (2, 2) => Object::Scalar(Value::Real(f32::from_be_bytes(*rest.first_chunk()?).into())),
            (2, 3) => Object::Scalar(Value::Real(f64::from_be_bytes(*rest.first_chunk()?))),
            (3, 3) => match date::from_apple_seconds(f64::from_be_bytes(*rest.first_chunk()?)) {
                Some(date) => Object::Scalar(Value::Date(date)),
                None => return Some(Err(PlistError::malformed("a date is out of range"))),
            },
            (4, _) => {
                let (length, rest) = length(size, rest)?;
                Object::Data(rest.get(..length)?)
            }
            (5, _) => {
                let (length, rest) = length(size, rest)?;
                Object::Text(rest.get(..length)?)
            }
            (6, _) => {
                let (length, rest) = length(size, rest)?;
                Object::Utf16(rest.get(..length.checked_mul(2)?)?)
            }
            (0xa, _) => {
                let (length, rest) = length(size, rest)?;
                Object::Array(self.references(rest, length)?.0)
            }
            (0xd, _) => {
                let (length, rest) = length(size, rest)?;
                let (keys, rest) = self.references(rest, length)?;
                Object::Dictionary { keys, values: self.references(rest, length)?.0 }
            }
            _ => return Some(Err(PlistError::malformed("an object is of a kind that messages do not have"))),
        }))
    }

    fn references(&self, bytes: &'a [u8], count: usize) -> Option<(References<'a>, &'a [u8])> {
        let (bytes, rest) = bytes.split_at_checked(count.checked_mul(self.reference_size)?)?;
        Some((References { bytes, size: self.reference_size }, rest))
    }
}

fn push<'a>(open: &mut Vec<Level<'a>>, level: Level<'a>) -> Result<(), PlistError> {
    if open.iter().any(|outer| outer.object == level.object) {
        return Err(PlistError::malformed("an object holds itself"));
    }
    if open.len() >= MAX_DEPTH {
        return Err(PlistError::TOO_DEEP);
    }
    open.push(level);
    Ok(())
}

/// Numbers of objects.
struct References<'a> {
    bytes: &'a [u8],
    /// 1 to 8.
    size: usize,
}

impl References<'_> {
    fn left(&self) -> usize {
        self.bytes.len().checked_div(self.size).unwrap_or(0)
    }
}

impl Iterator for References<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let (reference, rest) = self.bytes.split_at_checked(self.size)?;
        self.bytes = rest;
        // One beyond usize is beyond every table, too.
        Some(unsigned(reference).unwrap_or(usize::MAX))
    }
}

enum Object<'a> {
    Scalar(Value),
    Data(&'a [u8]),
    Text(&'a [u8]),
    Utf16(&'a [u8]),
    Array(References<'a>),
    Dictionary { keys: References<'a>, values: References<'a> },
}

impl Object<'_> {
    fn scalar(self, budget: &mut Budget) -> Result<Value, PlistError> {
        match self {
            Self::Scalar(value) => Ok(value),
            Self::Data(bytes) => {
                budget.take_bytes(bytes.len())?;
                Ok(Value::Data(bytes.to_vec()))
            }
            other => other.text(budget)?.map(Value::String).ok_or_else(|| PlistError::malformed("a collection stands where none may")),
        }
    }

    /// `None` where this is no string.
    fn text(self, budget: &mut Budget) -> Result<Option<String>, PlistError> {
        let text = match self {
            Self::Text(bytes) => {
                budget.take_bytes(bytes.len())?;
                String::from_utf8(bytes.to_vec()).map_err(|_| PlistError::malformed("a string is not ASCII"))?
            }
            Self::Utf16(bytes) => {
                budget.take_bytes(bytes.len().saturating_mul(2))?;
                let units = bytes.as_chunks().0.iter().map(|unit| u16::from_be_bytes(*unit));
                char::decode_utf16(units).collect::<Result<String, _>>().map_err(|_| PlistError::malformed("a string has a lone surrogate"))?
            }
            Self::Scalar(_) | Self::Data(_) | Self::Array(_) | Self::Dictionary { .. } => return Ok(None),
        };
        if memchr::memchr(0, text.as_bytes()).is_some() {
            return Err(PlistError::malformed("a string has a NUL"));
        }
        Ok(Some(text))
    }
}

/// A length: in the marker, or in an integer behind it.
fn length(size: usize, rest: &[u8]) -> Option<(usize, &[u8])> {
    if size != 0x0f {
        return Some((size, rest));
    }
    let (marker, rest) = rest.split_first()?;
    if !(0x10..=0x13).contains(marker) {
        return None;
    }
    let (number, rest) = rest.split_at_checked(1 << (marker & 0x0f))?;
    Some((unsigned(number)?, rest))
}

/// Big-endian, at most eight bytes.
fn unsigned(bytes: &[u8]) -> Option<usize> {
    if bytes.is_empty() || bytes.len() > 8 {
        return None;
    }
    usize::try_from(bytes.iter().fold(0_u64, |number, byte| (number << 8) | u64::from(*byte))).ok()
}

/// Up to four bytes are unsigned, eight and sixteen signed.
fn integer(bytes: &[u8]) -> Option<Integer> {
    if let Some(wide) = bytes.first_chunk::<16>() {
        let number = i128::from_be_bytes(*wide);
        return i64::try_from(number).map(Integer::from).or_else(|_| u64::try_from(number).map(Integer::from)).ok();
    }
    if let Some(wide) = bytes.first_chunk::<8>() {
        return Some(Integer::from(i64::from_be_bytes(*wide)));
    }
    unsigned(bytes).and_then(|number| u64::try_from(number).ok()).map(Integer::from)
}
