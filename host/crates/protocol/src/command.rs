//! Commands as they are queued and sent.

use bytes::Bytes;

use crate::fields::{FieldError, Fields, MAX_TEXT, check_name};
use crate::json;
use crate::plist::{self, Dictionary, Value};

/// `RequestType` fits a column of this size; Apple's longest has 32.
const MAX_REQUEST_TYPE: usize = 127;

/// A command document. `raw` is what the device gets, to the byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// `CommandUUID`, at most 255 bytes without control characters.
    pub uuid: String,
    /// `Command.RequestType`, at most 127 bytes without control characters.
    pub request_type: String,
    /// The whole document, XML or binary.
    pub raw: Bytes,
}

/// Why a command document was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct CommandError {
    /// The key, such as `Command.RequestType`; `.` is the whole document.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
}

impl CommandError {
    fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }
}

impl From<FieldError> for CommandError {
    fn from(error: FieldError) -> Self {
        Self::new(error.key, error.problem)
    }
}

impl Command {
    /// Reads a whole command document, XML or binary: needs `CommandUUID` and `Command.RequestType`.
    ///
    /// ```
    /// use wasmdm_protocol::command::Command;
    /// let raw = b"<dict><key>Command</key><dict><key>RequestType</key><string>ProfileList</string></dict></dict>";
    /// assert_eq!(Command::parse(raw.as_slice().into()).unwrap_err().field, "CommandUUID");
    /// ```
    pub fn parse(raw: Bytes) -> Result<Self, CommandError> {
        let document = read(&raw)?;
        let fields = Fields::of(&document).ok_or_else(|| CommandError::new(".", "is not a dictionary"))?;
        let uuid = fields.name("CommandUUID", MAX_TEXT)?.to_owned();
        let request_type = request_type(fields.value("Command"))?;
        Ok(Self { uuid, request_type, raw })
    }

    /// From the inner `Command` dictionary in the contract's JSON.
    ///
    /// ```
    /// use wasmdm_protocol::command::Command;
    /// let command = Command::from_json("0001".into(), &serde_json::json!({ "RequestType": "ProfileList" }))?;
    /// assert_eq!(Command::parse(command.raw.clone())?, command);
    /// # Ok::<(), wasmdm_protocol::command::CommandError>(())
    /// ```
    pub fn from_json(uuid: String, command: &serde_json::Value) -> Result<Self, CommandError> {
        let command = json::from_json(command).map_err(|error| {
            let field = if error.path == "." { "Command".to_owned() } else { format!("Command.{}", error.path) };
            CommandError::new(field, error.problem)
        })?;
        let mut document = Dictionary::new();
        document.insert("Command".into(), command);
        Self::assemble(document, uuid)
    }

    /// The same document (XML) under another `CommandUUID`; a missing one is added.
    pub fn parse_with_uuid(raw: &[u8], uuid: String) -> Result<Self, CommandError> {
        let document = read(raw)?.into_dictionary().ok_or_else(|| CommandError::new(".", "is not a dictionary"))?;
        Self::assemble(document, uuid)
    }

    fn assemble(mut document: Dictionary, uuid: String) -> Result<Self, CommandError> {
        check_name(&uuid, MAX_TEXT).map_err(|problem| CommandError::new("CommandUUID", problem))?;
        let request_type = request_type(document.get("Command"))?;
        document.insert("CommandUUID".into(), uuid.as_str().into());
        Ok(Self { uuid, request_type, raw: plist::to_xml(&Value::Dictionary(document)) })
    }
}

fn read(raw: &[u8]) -> Result<Value, CommandError> {
    plist::parse(raw).map_err(|error| CommandError::new(".", error.to_string()))
}

fn request_type(command: Option<&Value>) -> Result<String, CommandError> {
    let command = command.ok_or_else(|| CommandError::new("Command", "is missing"))?;
    let fields = Fields::of(command).ok_or_else(|| CommandError::new("Command", "is not a dictionary"))?;
    let request_type = fields.name("RequestType", MAX_REQUEST_TYPE).map_err(|error| CommandError::new("Command.RequestType", error.problem))?;
    Ok(request_type.to_owned())
}
