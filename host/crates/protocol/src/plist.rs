//! Property lists behind a guard.
pub use ::plist::{Dictionary, Value};
use bytes::Bytes;
/// Why a property list was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlistError {
    #[error("{0}")]
    Malformed(String),
}
/// Reads an XML or binary property list.
pub fn parse(_document: &[u8]) -> Result<Value, PlistError> {
    todo!()
}
/// Writes an XML property list.
pub fn to_xml(_value: &Value) -> Bytes {
    todo!()
}
