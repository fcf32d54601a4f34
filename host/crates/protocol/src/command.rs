//! Commands as they are queued and sent.
use bytes::Bytes;
/// A command document. `raw` is what the device gets, to the byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    pub uuid: String,
    pub request_type: String,
    pub raw: Bytes,
}
/// Why a command document was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct CommandError {
    pub field: String,
    pub problem: String,
}
impl Command {
    /// Reads a whole command document, XML or binary: needs `CommandUUID` and `Command.RequestType`.
    pub fn parse(_raw: Bytes) -> Result<Self, CommandError> {
        todo!()
    }
    /// From the inner `Command` dictionary in the contract's JSON.
    pub fn from_json(_uuid: String, _command: &serde_json::Value) -> Result<Self, CommandError> {
        todo!()
    }
    /// The same document (XML) under another CommandUUID; a missing CommandUUID is added.
    pub fn parse_with_uuid(_raw: &[u8], _uuid: String) -> Result<Self, CommandError> {
        todo!()
    }
}
