//! Columns that can hold a secret. Each is a blob whose first byte says how the rest is kept, so that encryption can come later without a
//! migration of data: 0 is plain; another format is refused rather than guessed.

use crate::StorageError;
use bytes::Bytes;

/// As it is.
const PLAIN: u8 = 0;

/// The blob for a value.
pub(crate) fn seal(value: &[u8]) -> Vec<u8> {
    let mut blob = Vec::with_capacity(value.len() + 1);
    blob.push(PLAIN);
    blob.extend_from_slice(value);
    blob
}

/// The value of a blob.
pub(crate) fn open(blob: Vec<u8>) -> Result<Bytes, StorageError> {
    match blob.first() {
        Some(&PLAIN) => Ok(Bytes::from(blob).slice(1..)),
        Some(format) => Err(StorageError::corrupt(format!("a value is kept in the unknown format {format}"))),
        None => Err(StorageError::corrupt("a value has no format byte")),
    }
}

/// The text of a blob.
pub(crate) fn open_text(blob: Vec<u8>) -> Result<String, StorageError> {
    String::from_utf8(open(blob)?.into()).map_err(|_| StorageError::corrupt("a text is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_comes_back_to_the_byte() {
        assert_eq!(open(seal(b"\x00\xffsecret")).unwrap(), Bytes::from_static(b"\x00\xffsecret"));
        assert_eq!(open(seal(b"")).unwrap(), Bytes::new());
    }

    #[test]
    fn an_unknown_format_is_refused() {
        assert!(matches!(open(vec![1, 2, 3]), Err(StorageError::Corrupt { .. })));
        assert!(matches!(open(Vec::new()), Err(StorageError::Corrupt { .. })));
    }
}
