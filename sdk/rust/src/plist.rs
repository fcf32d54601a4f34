//! Property lists to and from the contract's JSON, so that no plugin needs a library for them. Always granted.

use serde_json::Value;

use crate::{Failure, host};

/// XML or binary to JSON.
pub fn to_json(document: &[u8]) -> Result<Value, Failure> {
    Ok(serde_json::from_str(&host::plist::to_json(document)?)?)
}

/// JSON to XML.
pub fn from_json(document: &Value) -> Result<Vec<u8>, Failure> {
    host::plist::from_json(&document.to_string())
}
