//! Apple's checks of a push, in Apple's words.

use http::{HeaderMap, Method, request};

use super::rules::Answer;

/// Apple's limit of a payload.
pub(super) const LARGEST_PAYLOAD: usize = 4096;
const LONGEST_TOKEN: usize = 100;
const PUSH_TYPES: [&str; 12] =
    ["alert", "background", "controls", "location", "voip", "complication", "fileprovider", "mdm", "liveactivity", "pushtotalk", "widgets", "safari"];

/// Who asks.
#[derive(Debug, Clone, Default)]
pub(super) struct Client {
    /// Whether there is a certificate at all.
    pub(super) is_certified: bool,
    /// The certificate's topic.
    pub(super) topic: Option<String>,
    /// The certificate's serial number.
    pub(super) serial: String,
}

/// A push that Apple would take.
#[derive(Debug)]
pub(super) struct Push {
    pub(super) token: Vec<u8>,
    pub(super) topic: String,
    pub(super) magic: Option<String>,
    /// Whether it is kept for a device that is away.
    pub(super) is_kept: bool,
    /// What a careful server would have done otherwise.
    pub(super) complaints: Vec<&'static str>,
}

/// Checks a push like Apple does.
pub(super) fn check(client: &Client, head: &request::Parts, body: &[u8]) -> Result<Push, Answer> {
    let refused = |status, reason| Err(Answer::new(status, reason));
    if head.method != Method::POST {
        return refused(405, "MethodNotAllowed");
    }
    let Some(token) = head.uri.path().strip_prefix("/3/device/") else {
        return refused(404, "BadPath");
    };
    if token.is_empty() {
        return refused(400, "MissingDeviceToken");
    }
    if !client.is_certified {
        return refused(403, "MissingProviderToken");
    }
    let Some(certified_topic) = &client.topic else {
        return refused(403, "BadCertificate");
    };
    let headers = &head.headers;
    if headers.keys().any(|name| name.as_str().starts_with("apns-") && headers.get_all(name).iter().count() > 1) {
        return refused(400, "DuplicateHeaders");
    }
    if text(headers, "apns-id").is_some_and(|id| id.len() != 36 || uuid::Uuid::try_parse(id).is_err()) {
        return refused(400, "BadMessageId");
    }
    let expiration = match text(headers, "apns-expiration").map(str::parse::<u64>) {
        None => 0,
        Some(Ok(seconds)) => seconds,
        Some(Err(_)) => return refused(400, "BadExpirationDate"),
    };
    let priority = text(headers, "apns-priority");
    if !matches!(priority, None | Some("10" | "5" | "1")) {
        return refused(400, "BadPriority");
    }
    let push_type = text(headers, "apns-push-type");
    if push_type.is_some_and(|push_type| !PUSH_TYPES.contains(&push_type)) {
        return refused(400, "InvalidPushType");
    }
    if text(headers, "apns-collapse-id").is_some_and(|id| id.len() > 64) {
        return refused(400, "BadCollapseId");
    }
    // A certificate of one topic needs no header.
    let topic = text(headers, "apns-topic").unwrap_or(certified_topic);
    if topic.is_empty() {
        return refused(400, "BadTopic");
    }
    if topic != certified_topic {
        return refused(400, "TopicDisallowed");
    }
    let Some(token_bytes) = unhex(token).filter(|bytes| bytes.len() <= LONGEST_TOKEN) else {
        return refused(400, "BadDeviceToken");
    };
    if body.is_empty() {
        return refused(400, "PayloadEmpty");
    }
    if body.len() > LARGEST_PAYLOAD {
        return refused(413, "PayloadTooLarge");
    }

    let mut complaints = Vec::new();
    let magic = magic(body);
    if magic.is_none() {
        complaints.push("the body is not exactly {\"mdm\":\"…\"}");
    }
    if push_type != Some("mdm") {
        complaints.push("apns-push-type is not mdm");
    }
    if !headers.contains_key("apns-topic") {
        complaints.push("apns-topic is missing");
    }
    if !headers.contains_key("apns-id") {
        complaints.push("apns-id is missing");
    }
    if priority.is_none() {
        complaints.push("apns-priority is missing");
    }
    if expiration == 0 {
        complaints.push("apns-expiration is missing or 0: a device that is away never hears of the push");
    }
    if token.bytes().any(|byte| byte.is_ascii_uppercase()) {
        complaints.push("the token is in upper case");
    }
    Ok(Push { token: token_bytes, topic: topic.to_owned(), magic, is_kept: expiration > 0, complaints })
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).map(|value| value.to_str().unwrap_or("\u{FFFD}"))
}

/// The magic of a body that is as devices want it.
fn magic(body: &[u8]) -> Option<String> {
    let value: serde_json::Value = serde_json::from_slice(body).ok()?;
    let object = value.as_object().filter(|object| object.len() == 1)?;
    let magic = object.get("mdm")?.as_str()?.to_owned();
    // Without blanks and without escapes that need not be.
    (serde_json::to_vec(&value).ok()? == body).then_some(magic)
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    rest.is_empty().then(|| pairs.iter().map(|[high, low]| Some((digit(*high)? << 4) | digit(*low)?)).collect())?
}
