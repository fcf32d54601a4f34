//! One push, as Apple wants it written.

use std::fmt;
use std::time::Duration;

use a2::request::payload::PayloadLike;
use a2::{NotificationOptions, PushType};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Uri, Version};
use serde::Serialize;
use uuid::Uuid;
use wasmdm_protocol::time::Timestamp;

pub use a2::Priority;

/// How long Apple keeps a push for a device that is away: the longest it allows.
const EXPIRATION: Duration = Duration::from_hours(30 * 24);
/// The longest device token; Apple's have 32 bytes, and may become longer.
const LONGEST_TOKEN: usize = 100;
/// Apple's limit of a payload.
const LONGEST_PAYLOAD: usize = 4096;

const APNS_PUSH_TYPE: HeaderName = HeaderName::from_static("apns-push-type");
const APNS_TOPIC: HeaderName = HeaderName::from_static("apns-topic");
const APNS_EXPIRATION: HeaderName = HeaderName::from_static("apns-expiration");
const APNS_PRIORITY: HeaderName = HeaderName::from_static("apns-priority");
const APNS_ID: HeaderName = HeaderName::from_static("apns-id");

/// Whom to wake, and how urgently.
#[derive(Clone)]
pub struct Notification {
    /// The device's address at Apple, from its last `TokenUpdate`.
    pub token: Bytes,
    /// What the device expects to hear, from the same.
    pub push_magic: String,
    /// Names this push. The same when it is tried again, so that Apple's answers can be told apart.
    pub apns_id: Uuid,
    /// Until when Apple keeps it for a device that is away. Whole seconds; zero or earlier: not at all.
    pub expiration: Timestamp,
    /// `High` wakes at once, `Normal` when it suits the device's battery.
    pub priority: Priority,
}

/// Why a push cannot be sent at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct Unsendable {
    /// Which part of the notification.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: String,
}

impl Notification {
    /// An urgent push that Apple keeps for 30 days.
    pub fn new(token: Bytes, push_magic: String, apns_id: Uuid, now: Timestamp) -> Self {
        Self { token, push_magic, apns_id, expiration: now.plus(EXPIRATION), priority: Priority::High }
    }

    /// The request and its body.
    pub(crate) fn request(&self, authority: &str, topic: &str) -> Result<(Request<()>, Bytes), Unsendable> {
        if self.token.is_empty() || self.token.len() > LONGEST_TOKEN {
            return Err(Unsendable { field: "token", problem: format!("it has {} bytes; 1 to {LONGEST_TOKEN} are possible", self.token.len()) });
        }
        let token = hex(&self.token);
        let id = self.apns_id.hyphenated().to_string();
        let payload = MdmPayload {
            mdm: &self.push_magic,
            token: &token,
            options: NotificationOptions {
                apns_id: Some(&id),
                apns_push_type: Some(PushType::Mdm),
                apns_expiration: Some(u64::try_from(self.expiration.as_millis() / 1000).unwrap_or(0)),
                apns_priority: Some(self.priority.clone()),
                apns_topic: Some(topic),
                apns_collapse_id: None,
            },
        };
        let wrong = |field, problem: &dyn fmt::Display| Unsendable { field, problem: problem.to_string() };
        let body = payload.to_json_string().map_err(|error| wrong("push_magic", &error))?;
        if body.len() > LONGEST_PAYLOAD {
            return Err(wrong("push_magic", &format_args!("the payload would have {} bytes; Apple takes {LONGEST_PAYLOAD}", body.len())));
        }
        Ok((head(authority, &payload)?, body.into()))
    }
}

/// Without token and magic: with both, anyone with the certificate wakes the device.
impl fmt::Debug for Notification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Notification").field("apns_id", &self.apns_id).field("expiration", &self.expiration).finish_non_exhaustive()
    }
}

/// `{"mdm":"…"}`, and nothing beside it: a device ignores a push with an `aps` key.
#[derive(Debug, Serialize)]
struct MdmPayload<'a> {
    mdm: &'a str,
    #[serde(skip)]
    token: &'a str,
    #[serde(skip)]
    options: NotificationOptions<'a>,
}

impl PayloadLike for MdmPayload<'_> {
    fn get_device_token(&self) -> &str {
        self.token
    }

    fn get_options(&self) -> &NotificationOptions<'_> {
        &self.options
    }
}

fn head(authority: &str, payload: &MdmPayload<'_>) -> Result<Request<()>, Unsendable> {
    let options = payload.get_options();
    let uri = Uri::builder()
        .scheme("https")
        .authority(authority)
        .path_and_query(format!("/3/device/{}", payload.get_device_token()))
        .build()
        .map_err(|error| Unsendable { field: "token", problem: error.to_string() })?;
    let mut request = Request::post(uri).version(Version::HTTP_2);
    let headers = [
        (APNS_PUSH_TYPE, options.apns_push_type.map(|push_type| push_type.to_string())),
        (APNS_TOPIC, options.apns_topic.map(str::to_owned)),
        (APNS_EXPIRATION, options.apns_expiration.map(|seconds| seconds.to_string())),
        (APNS_PRIORITY, options.apns_priority.as_ref().map(ToString::to_string)),
        (APNS_ID, options.apns_id.map(str::to_owned)),
    ];
    for (name, value) in headers {
        if let Some(value) = value {
            let mut value = HeaderValue::try_from(value).map_err(|error| Unsendable { field: "topic", problem: error.to_string() })?;
            // Other for each push: in the connection's table of headers it would only drive out those that repeat.
            value.set_sensitive(name == APNS_ID);
            request = request.header(name, value);
        }
    }
    request.body(()).map_err(|error| Unsendable { field: "topic", problem: error.to_string() })
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |value: u8| DIGITS.get(usize::from(value)).copied().map_or('0', char::from);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}
