//! Check-in messages: what a device says of its enrollment.

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;

use crate::declarative_management::status_without_secrets;
use crate::enrollment::{DeviceFacts, Enrollment};
use crate::fields::{FieldError, Fields, MAX_TEXT};
use crate::plist::{self, Dictionary, PlistError, Value};

/// APNs tokens are 32 bytes today; Apple asks not to rely on it.
const MAX_PUSH_TOKEN: usize = 1024;
/// Unlock and bootstrap tokens have a few hundred bytes.
const MAX_TOKEN: usize = 64 * 1024;
/// `declaration/{kind}/{identifier}`, of which the identifier is the operator's.
const MAX_ENDPOINT: usize = 1024;
/// `DigestResponse` is an HTTP header's value.
const MAX_DIGEST: usize = 4096;

/// Why a check-in was refused. No value of the message is repeated but the unknown `MessageType`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckInError {
    /// It cannot be read.
    #[error(transparent)]
    Plist(#[from] PlistError),
    /// It is none of the nine kinds. Never to be taken for a command's report.
    #[error("MessageType `{0}` is unknown")]
    UnknownMessageType(String),
    /// A key is missing or wrong.
    #[error("{key}: {problem}")]
    Invalid {
        /// The key.
        key: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

impl From<FieldError> for CheckInError {
    fn from(error: FieldError) -> Self {
        Self::Invalid { key: error.key, problem: error.problem }
    }
}

/// A check-in, and who it says it is from. That the certificate agrees is for the service to check.
#[derive(Clone)]
pub struct CheckInMessage {
    /// The channel it is from.
    pub enrollment: Enrollment,
    /// What it says about the device.
    pub facts: DeviceFacts,
    /// What it says.
    pub check_in: CheckIn,
    /// The whole message. Can hold secrets.
    pub document: Value,
    /// Secrets were taken out of `document` that are still in `raw`: those of a status report, whose JSON nobody looks into later.
    pub is_cleaned: bool,
    /// The bytes as received. Can hold secrets.
    pub raw: Bytes,
}

impl fmt::Debug for CheckInMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CheckInMessage")
            .field("enrollment", &self.enrollment)
            .field("check_in", &self.check_in)
            .field("length", &self.raw.len())
            .finish_non_exhaustive()
    }
}

/// The nine kinds of check-in.
#[derive(Debug, Clone)]
pub enum CheckIn {
    /// A device wants to enroll; it is not enrolled before its first `TokenUpdate`.
    Authenticate(Authenticate),
    /// How to reach the channel from now on.
    TokenUpdate(TokenUpdate),
    /// The enrollment profile was removed.
    CheckOut,
    /// A user of a Mac wants a channel of their own.
    UserAuthenticate(UserAuthenticate),
    /// The device hands its bootstrap token over.
    SetBootstrapToken(SetBootstrapToken),
    /// The device wants its bootstrap token back.
    GetBootstrapToken,
    /// A request of declarative management.
    DeclarativeManagement(DeclarativeManagement),
    /// The device wants a token for a service.
    GetToken(GetToken),
    /// A device that is about to erase itself asks how to return to service (OS 26).
    ReturnToService,
}

impl CheckIn {
    /// The `MessageType`.
    pub fn message_type(&self) -> &'static str {
        match self {
            Self::Authenticate(_) => "Authenticate",
            Self::TokenUpdate(_) => "TokenUpdate",
            Self::CheckOut => "CheckOut",
            Self::UserAuthenticate(_) => "UserAuthenticate",
            Self::SetBootstrapToken(_) => "SetBootstrapToken",
            Self::GetBootstrapToken => "GetBootstrapToken",
            Self::DeclarativeManagement(_) => "DeclarativeManagement",
            Self::GetToken(_) => "GetToken",
            Self::ReturnToService => "ReturnToService",
        }
    }
}

/// Apple's schema also requires `DeviceName`, `Model` and `ModelName`; they decide nothing, so a device without them is not turned away.
#[derive(Debug, Clone)]
pub struct Authenticate {
    /// The push topic.
    pub topic: String,
}

/// Topic, token and magic are replaced together; all three may have changed, or none.
#[derive(Clone)]
pub struct TokenUpdate {
    /// The push topic.
    pub topic: String,
    /// Goes into every push. A secret.
    pub push_magic: String,
    /// The APNs token, of any length. A secret.
    pub token: Bytes,
    /// Never empty; absent means that the old one stays. A secret.
    pub unlock_token: Option<Bytes>,
    /// Absent is not false: it says nothing.
    pub awaiting_configuration: Option<bool>,
}

impl fmt::Debug for TokenUpdate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenUpdate")
            .field("topic", &self.topic)
            .field("unlock_token", &self.unlock_token.is_some())
            .field("awaiting_configuration", &self.awaiting_configuration)
            .finish_non_exhaustive()
    }
}

/// The first message has no response, the second answers the challenge.
#[derive(Clone)]
pub struct UserAuthenticate {
    /// Never empty. A secret.
    pub digest_response: Option<String>,
}

impl fmt::Debug for UserAuthenticate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UserAuthenticate").field("digest_response", &self.digest_response.is_some()).finish()
    }
}

/// The bootstrap token to keep.
#[derive(Clone)]
pub struct SetBootstrapToken {
    /// `None` deletes it (missing or empty). A secret.
    pub bootstrap_token: Option<Bytes>,
    /// Absent is not false: it says nothing.
    pub awaiting_configuration: Option<bool>,
}

impl fmt::Debug for SetBootstrapToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SetBootstrapToken")
            .field("bootstrap_token", &self.bootstrap_token.is_some())
            .field("awaiting_configuration", &self.awaiting_configuration)
            .finish()
    }
}

/// A request of declarative management.
#[derive(Debug, Clone)]
pub struct DeclarativeManagement {
    /// `tokens`, `declaration-items`, `status` or `declaration/…`; the device's words, to be checked before they become a path.
    pub endpoint: String,
    /// The JSON of a status report.
    pub data: Option<Bytes>,
}

/// A request for a service's token.
#[derive(Clone)]
pub struct GetToken {
    /// `TokenServiceType`.
    pub service_type: String,
    /// `TokenParameters`, a dictionary. Holds secrets.
    pub parameters: Option<Value>,
}

impl fmt::Debug for GetToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GetToken").field("service_type", &self.service_type).finish_non_exhaustive()
    }
}

impl CheckInMessage {
    /// Reads a check-in, XML or binary.
    ///
    /// ```
    /// use wasmdm_protocol::checkin::{CheckIn, CheckInMessage};
    /// let raw = b"<dict><key>MessageType</key><string>CheckOut</string><key>UDID</key><string>U1</string></dict>";
    /// let message = CheckInMessage::parse(raw.as_slice().into())?;
    /// assert_eq!(message.enrollment.id.as_str(), "U1");
    /// assert!(matches!(message.check_in, CheckIn::CheckOut));
    /// # Ok::<(), wasmdm_protocol::checkin::CheckInError>(())
    /// ```
    pub fn parse(raw: Bytes) -> Result<Self, CheckInError> {
        let mut document = plist::parse(&raw)?;
        let fields = Fields::of(&document).ok_or_else(|| PlistError::Malformed("it is not a dictionary".into()))?;
        let check_in = read(fields)?;
        let enrollment = fields.identifiers()?.resolve().map_err(FieldError::from)?;
        let facts = fields.facts();
        // JSON within the property list: who looks for secrets in the document would not find them there.
        let mut is_cleaned = false;
        if let (CheckIn::DeclarativeManagement(asked), Value::Dictionary(entries)) = (&check_in, &mut document)
            && let Some(data) = &asked.data
            && let Cow::Owned(cleaned) = status_without_secrets(data)
        {
            is_cleaned = true;
            entries.insert("Data".into(), Value::Data(cleaned));
        }
        Ok(Self { enrollment, facts, check_in, document, is_cleaned, raw })
    }
}

fn read(fields: Fields<'_>) -> Result<CheckIn, CheckInError> {
    let topic = || fields.name("Topic", MAX_TEXT).map(str::to_owned);
    Ok(match fields.name("MessageType", MAX_TEXT)? {
        "Authenticate" => CheckIn::Authenticate(Authenticate { topic: topic()? }),
        "TokenUpdate" => CheckIn::TokenUpdate(TokenUpdate {
            topic: topic()?,
            push_magic: fields.name("PushMagic", MAX_TEXT)?.to_owned(),
            token: fields.required_data("Token", MAX_PUSH_TOKEN)?,
            unlock_token: fields.data("UnlockToken", MAX_TOKEN)?.filter(|token| !token.is_empty()),
            awaiting_configuration: fields.boolean("AwaitingConfiguration")?,
        }),
        "CheckOut" => CheckIn::CheckOut,
        "UserAuthenticate" => CheckIn::UserAuthenticate(UserAuthenticate {
            digest_response: fields.string("DigestResponse", MAX_DIGEST)?.filter(|response| !response.is_empty()).map(str::to_owned),
        }),
        "SetBootstrapToken" => CheckIn::SetBootstrapToken(SetBootstrapToken {
            bootstrap_token: fields.data("BootstrapToken", MAX_TOKEN)?.filter(|token| !token.is_empty()),
            awaiting_configuration: fields.boolean("AwaitingConfiguration")?,
        }),
        "GetBootstrapToken" => CheckIn::GetBootstrapToken,
        "DeclarativeManagement" => CheckIn::DeclarativeManagement(DeclarativeManagement {
            endpoint: fields.name("Endpoint", MAX_ENDPOINT)?.to_owned(),
            // A check-in's size is limited before it gets here.
            data: fields.data("Data", usize::MAX)?,
        }),
        "GetToken" => CheckIn::GetToken(GetToken {
            service_type: fields.name("TokenServiceType", MAX_TEXT)?.to_owned(),
            parameters: match fields.value("TokenParameters") {
                None => None,
                Some(parameters @ Value::Dictionary(_)) => Some(parameters.clone()),
                Some(_) => return Err(FieldError::new("TokenParameters", "is not a dictionary").into()),
            },
        }),
        "ReturnToService" => CheckIn::ReturnToService,
        other => return Err(CheckInError::UnknownMessageType(other.chars().take(60).collect())),
    })
}

/// The answer to the first `UserAuthenticate`; an empty challenge asks for no proof.
pub fn digest_challenge_document(challenge: &str) -> Bytes {
    let mut answer = Dictionary::new();
    answer.insert("DigestChallenge".into(), Value::String(challenge.to_owned()));
    plist::to_xml(&Value::Dictionary(answer))
}

/// The answer to `GetBootstrapToken`. Without a token the answer is an empty body instead.
///
/// ```
/// let answer = wasmdm_protocol::plist::parse(&wasmdm_protocol::checkin::bootstrap_token_document(b"token"))?;
/// assert_eq!(answer.as_dictionary().and_then(|answer| answer.get("BootstrapToken")).and_then(|token| token.as_data()), Some(&b"token"[..]));
/// # Ok::<(), wasmdm_protocol::plist::PlistError>(())
/// ```
pub fn bootstrap_token_document(token: &[u8]) -> Bytes {
    let mut answer = Dictionary::new();
    answer.insert("BootstrapToken".into(), Value::Data(token.to_vec()));
    plist::to_xml(&Value::Dictionary(answer))
}

/// The answer to a `GetToken`.
///
/// ```
/// let answer = wasmdm_protocol::plist::parse(&wasmdm_protocol::checkin::token_document(b"token"))?;
/// assert_eq!(answer.as_dictionary().and_then(|answer| answer.get("TokenData")).and_then(|token| token.as_data()), Some(&b"token"[..]));
/// # Ok::<(), wasmdm_protocol::plist::PlistError>(())
/// ```
pub fn token_document(token: &[u8]) -> Bytes {
    let mut answer = Dictionary::new();
    answer.insert("TokenData".into(), Value::Data(token.to_vec()));
    plist::to_xml(&Value::Dictionary(answer))
}

/// The answer to a `ReturnToService`.
pub fn return_to_service_document(configuration: Dictionary) -> Bytes {
    let mut answer = Dictionary::new();
    answer.insert("ReturnToService".into(), Value::Dictionary(configuration));
    plist::to_xml(&Value::Dictionary(answer))
}

/// The answer to the second `UserAuthenticate`; an empty token says that the digest is wrong.
pub fn auth_token_document(token: &str) -> Bytes {
    let mut answer = Dictionary::new();
    answer.insert("AuthToken".into(), Value::String(token.to_owned()));
    plist::to_xml(&Value::Dictionary(answer))
}
