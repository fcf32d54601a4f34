//! Property lists as JSON, as the plugin contract and `/api/v1` write them.
use crate::plist::Value;
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {problem}")]
pub struct JsonError {
    pub path: String,
    pub problem: String,
}
pub fn to_json(_value: &Value) -> serde_json::Value {
    todo!()
}
/// Secrets are `{"$redacted": true}`.
pub fn to_redacted_json(_value: &Value) -> serde_json::Value {
    todo!()
}
pub fn from_json(_json: &serde_json::Value) -> Result<Value, JsonError> {
    todo!()
}
