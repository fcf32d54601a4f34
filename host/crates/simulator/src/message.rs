//! What devices write: check-in messages and command reports as XML property lists, and the commands they read.

use bytes::Bytes;
pub use plist::Dictionary;
use plist::Value;

use crate::error::SimulatorError;

/// The content type of check-ins. Reports carry none.
pub const CHECK_IN_CONTENT_TYPE: &str = "application/x-apple-aspen-mdm-checkin";

/// What a message is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MessageKind {
    /// A check-in, by its `MessageType`.
    CheckIn {
        /// `Authenticate`, `TokenUpdate`, …
        message_type: String,
    },
    /// A command report or an Idle poll, by its `Status`.
    Report {
        /// `Idle`, `Acknowledged`, …
        status: String,
        /// The command that is reported on.
        command_uuid: Option<String>,
    },
}

/// One message, ready to be signed and sent.
#[derive(Debug, Clone)]
pub struct Message {
    /// What it is.
    pub kind: MessageKind,
    /// Whether it speaks for the device's own channel although it is a user's channel that sends it.
    pub on_device_channel: bool,
    /// Whether it is the Authenticate with which a device renews its identity because the server asked it to: its enrollment goes on.
    pub renews_identity: bool,
    /// The body, to the byte.
    pub body: Bytes,
}

impl Message {
    const fn new(kind: MessageKind, body: Bytes) -> Self {
        Self { kind, on_device_channel: false, renews_identity: false, body }
    }

    /// The same message, told to be on the device's own channel.
    #[must_use]
    pub fn for_device_channel(mut self) -> Self {
        self.on_device_channel = true;
        self
    }

    /// The same message, told to renew the identity of an enrollment that goes on.
    #[must_use]
    pub fn as_renewal(mut self) -> Self {
        self.renews_identity = true;
        self
    }

    /// A check-in of that type; the keys are written in their order, as devices do.
    pub fn check_in(message_type: &str, mut keys: Dictionary) -> Result<Self, SimulatorError> {
        keys.insert("MessageType".into(), message_type.into());
        Ok(Self::new(MessageKind::CheckIn { message_type: message_type.into() }, to_xml(keys)?))
    }

    /// A report with that status.
    pub fn report(status: &str, command_uuid: Option<&str>, mut keys: Dictionary) -> Result<Self, SimulatorError> {
        keys.insert("Status".into(), status.into());
        if let Some(uuid) = command_uuid {
            keys.insert("CommandUUID".into(), uuid.into());
        }
        Ok(Self::new(MessageKind::Report { status: status.into(), command_uuid: command_uuid.map(Into::into) }, to_xml(keys)?))
    }

    /// A check-in whose body is whatever is given.
    pub fn raw_check_in(body: impl Into<Bytes>) -> Self {
        Self::new(MessageKind::CheckIn { message_type: "raw".into() }, body.into())
    }

    /// A report whose body is whatever is given.
    pub fn raw_report(body: impl Into<Bytes>) -> Self {
        Self::new(MessageKind::Report { status: "raw".into(), command_uuid: None }, body.into())
    }

    /// The `MessageType` of a check-in, the `Status` of a report.
    pub fn name(&self) -> &str {
        match &self.kind {
            MessageKind::CheckIn { message_type } => message_type,
            MessageKind::Report { status, .. } => status,
        }
    }

    /// Whether this is a check-in.
    pub const fn is_check_in(&self) -> bool {
        matches!(self.kind, MessageKind::CheckIn { .. })
    }

    /// The same message as a binary property list, which devices may send too.
    pub fn into_binary(self) -> Result<Self, SimulatorError> {
        let value = Value::from_reader_xml(self.body.as_ref()).map_err(|error| SimulatorError::Plist(error.to_string()))?;
        let mut body = Vec::new();
        value.to_writer_binary(&mut body).map_err(|error| SimulatorError::Plist(error.to_string()))?;
        Ok(Self { body: body.into(), ..self })
    }
}

/// A command as a device receives it.
#[derive(Debug, Clone)]
pub struct ReceivedCommand {
    /// `CommandUUID`
    pub uuid: String,
    /// `Command.RequestType`
    pub request_type: String,
    /// The inner `Command` dictionary.
    pub command: Dictionary,
    /// The document, to the byte.
    pub raw: Bytes,
}

impl ReceivedCommand {
    /// Reads a command document; the error says what is missing.
    pub fn parse(raw: &Bytes) -> Result<Self, String> {
        let value = Value::from_reader(std::io::Cursor::new(raw)).map_err(|error| error.to_string())?;
        let mut document = value.into_dictionary().ok_or("not a dictionary")?;
        let uuid = document.get("CommandUUID").and_then(Value::as_string).ok_or("no CommandUUID")?.to_owned();
        let command = document.remove("Command").and_then(Value::into_dictionary).ok_or("no Command")?;
        let request_type = command.get("RequestType").and_then(Value::as_string).ok_or("no RequestType")?.to_owned();
        Ok(Self { uuid, request_type, command, raw: raw.clone() })
    }
}

/// A command document as an API client writes it: `keys` beside the `RequestType`.
pub fn command_document(uuid: &str, request_type: &str, mut keys: Dictionary) -> Result<Bytes, SimulatorError> {
    keys.insert("RequestType".into(), request_type.into());
    let mut document = Dictionary::new();
    document.insert("Command".into(), Value::Dictionary(keys));
    document.insert("CommandUUID".into(), uuid.into());
    to_xml(document)
}

/// XML with the declaration and the document type, keys sorted, a line feed at the end: as devices write it.
pub fn to_xml(mut document: Dictionary) -> Result<Bytes, SimulatorError> {
    document.sort_keys();
    let mut out = Vec::with_capacity(1024);
    Value::Dictionary(document).to_writer_xml(&mut out).map_err(|error| SimulatorError::Plist(error.to_string()))?;
    if out.last() != Some(&b'\n') {
        out.push(b'\n');
    }
    Ok(out.into())
}
