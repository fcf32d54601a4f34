//! Property lists, read from devices that may be hostile and written as Apple writes them.
//!
//! The `plist` crate's own readers recurse without end, expand shared references without end and drop CDATA silently, so they never see a
//! device's bytes. The readers here build the crate's [`Value`] in one pass, without recursion and within the limits below. Start at
//! [`parse`].

mod binary;
pub(crate) mod date;
mod salvage;
mod write;
mod xml;

pub use ::plist::{Date, Dictionary, Integer, Value};
pub(crate) use salvage::{Claim, salvage};
pub use write::to_xml;

/// How deep arrays and dictionaries may lie in each other. Apple's own messages stay under ten.
pub const MAX_DEPTH: usize = 64;
/// How many values a document may hold once shared references are written out. An `InstalledApplicationList` of 3,000 applications has 40,000.
pub const MAX_VALUES: usize = 200_000;

/// Why a property list was refused. No text of the document is repeated but names of elements and keys.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlistError {
    /// It is no property list, or one that different readers would take differently.
    #[error("the property list is malformed: {0}")]
    Malformed(String),
    /// It ends before its last element does.
    #[error("the property list is cut off")]
    Truncated,
    /// It is larger than any message of a device.
    #[error("the property list has more than {limit} {what}")]
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// How much is allowed.
        limit: usize,
    },
}

impl PlistError {
    fn malformed(problem: impl Into<String>) -> Self {
        Self::Malformed(problem.into())
    }

    const TOO_DEEP: Self = Self::TooLarge { what: "levels", limit: MAX_DEPTH };
    const TOO_MANY: Self = Self::TooLarge { what: "values", limit: MAX_VALUES };
}

/// Reads an XML (UTF-8) or binary property list.
///
/// Takes time linear in the document's length, whatever it holds. Refused are: other forms (`OpenStep` text, JSON), entities and document types
/// of one's own, duplicate keys, integers beyond 64 bits, control characters, lone surrogates, references out of bounds or in a circle,
/// and anything beyond [`MAX_DEPTH`] and [`MAX_VALUES`].
///
/// ```
/// let value = wasmdm_protocol::plist::parse(b"<plist><dict><key>Status</key><string>Idle</string></dict></plist>")?;
/// assert_eq!(value.as_dictionary().and_then(|dictionary| dictionary.get("Status")).and_then(|status| status.as_string()), Some("Idle"));
/// # Ok::<(), wasmdm_protocol::plist::PlistError>(())
/// ```
pub fn parse(document: &[u8]) -> Result<Value, PlistError> {
    if document.starts_with(binary::MAGIC) { binary::parse(document) } else { xml::parse(document) }
}

/// An array or dictionary that is being read.
enum Collection {
    Array(Vec<Value>),
    Dictionary { entries: Dictionary, key: Option<String> },
}

impl Collection {
    fn dictionary() -> Self {
        Self::Dictionary { entries: Dictionary::new(), key: None }
    }

    /// Puts a key where one is due.
    fn add_key(&mut self, key: String) -> Result<(), PlistError> {
        match self {
            Self::Array(_) => Err(PlistError::malformed("a key stands in an array")),
            Self::Dictionary { key: Some(_), .. } => Err(PlistError::malformed("a key has no value")),
            // Written as XML two such keys could be one.
            Self::Dictionary { .. } if key.contains(write::is_unwritable) => Err(PlistError::malformed("a key has a character that XML cannot hold")),
            Self::Dictionary { key: due, .. } => {
                *due = Some(key);
                Ok(())
            }
        }
    }

    /// Puts a value into the array, or under the key that waits for it.
    fn add(&mut self, value: Value) -> Result<(), PlistError> {
        match self {
            Self::Array(values) => values.push(value),
            Self::Dictionary { entries, key } => {
                let key = key.take().ok_or_else(|| PlistError::malformed("a value in a dictionary has no key"))?;
                if entries.insert(key, value).is_some() {
                    // Readers differ in which of two entries counts, so neither does.
                    return Err(PlistError::malformed("a key appears twice in a dictionary"));
                }
            }
        }
        Ok(())
    }

    /// The finished value.
    fn close(self) -> Result<Value, PlistError> {
        match self {
            Self::Array(values) => Ok(Value::Array(values)),
            Self::Dictionary { key: Some(_), .. } => Err(PlistError::malformed("a key has no value")),
            Self::Dictionary { entries, key: None } => Ok(Value::Dictionary(entries)),
        }
    }
}
