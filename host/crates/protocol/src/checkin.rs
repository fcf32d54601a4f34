//! Check-in messages.
use crate::enrollment::{DeviceFacts, Enrollment};
use crate::plist::{PlistError, Value};
use bytes::Bytes;
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckInError {
    #[error(transparent)]
    Plist(#[from] PlistError),
    #[error("MessageType `{0}` is unknown")]
    UnknownMessageType(String),
    #[error("{key}: {problem}")]
    Invalid { key: &'static str, problem: String },
}
#[derive(Debug, Clone)]
pub struct CheckInMessage {
    pub enrollment: Enrollment,
    pub facts: DeviceFacts,
    pub check_in: CheckIn,
    pub document: Value,
    pub raw: Bytes,
}
#[derive(Debug, Clone)]
pub enum CheckIn {
    Authenticate(Authenticate),
    TokenUpdate(TokenUpdate),
    CheckOut,
    UserAuthenticate(UserAuthenticate),
    SetBootstrapToken(SetBootstrapToken),
    GetBootstrapToken,
    DeclarativeManagement(DeclarativeManagement),
    GetToken(GetToken),
    ReturnToService,
}
impl CheckIn {
    /// The `MessageType`.
    pub fn message_type(&self) -> &'static str {
        todo!()
    }
}
#[derive(Debug, Clone)]
pub struct Authenticate {
    pub topic: String,
}
#[derive(Debug, Clone)]
pub struct TokenUpdate {
    pub topic: String,
    pub push_magic: String,
    pub token: Bytes,
    /// never empty
    pub unlock_token: Option<Bytes>,
    pub awaiting_configuration: Option<bool>,
}
#[derive(Debug, Clone)]
pub struct UserAuthenticate {
    pub digest_response: Option<String>,
}
#[derive(Debug, Clone)]
pub struct SetBootstrapToken {
    /// `None` deletes it (missing or empty).
    pub bootstrap_token: Option<Bytes>,
    pub awaiting_configuration: Option<bool>,
}
#[derive(Debug, Clone)]
pub struct DeclarativeManagement {
    pub endpoint: String,
    pub data: Option<Bytes>,
}
#[derive(Debug, Clone)]
pub struct GetToken {
    pub service_type: String,
    pub parameters: Option<Value>,
}
impl CheckInMessage {
    pub fn parse(_raw: Bytes) -> Result<Self, CheckInError> {
        todo!()
    }
}
/// The answer to GetBootstrapToken.
pub fn bootstrap_token_document(_token: &[u8]) -> Bytes {
    todo!()
}
