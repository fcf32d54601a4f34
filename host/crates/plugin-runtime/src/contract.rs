//! The contract's records from and to the server's own types. The JSON in them follows `docs/contract.md`.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde_json::{Map, Value, json};
use wasmdm_protocol::enrollment::DeviceFacts;
use wasmdm_protocol::time::Timestamp;
use wasmdm_protocol::{json as plist_json, plist};
use wasmdm_service::asker::Asker;
use wasmdm_service::enrollment_policy::Candidate;
use wasmdm_service::return_to_service::Configuration;
use wasmdm_service::token_source::ServiceToken;
use wasmdm_service::user_authentication::UserVerdict;
use wasmdm_storage::commands::CommandStatus;
use wasmdm_storage::events::{EnrollmentRecord, Event};
use wasmdm_storage::push_failures::FailingPush;

use crate::bindings::wasmdm::plugin::types as wit;
use crate::call::{Decision, Failure};

/// Bytes of a reason, as it goes to devices, log and audit.
const MAX_REASON: usize = 1_000;
/// Bytes of a challenge and of a user's token: the device sends the token with each message of the user's channel.
const MAX_CHALLENGE: usize = 4 << 10;
/// Tags of one enrollment that a decision or a call may set, and bytes of one.
pub(crate) const MAX_TAGS: usize = 32;
pub(crate) const MAX_TAG: usize = 128;

/// Milliseconds; nothing before 1970.
pub(crate) fn timestamp(at: Timestamp) -> u64 {
    u64::try_from(at.as_millis()).unwrap_or(0)
}

/// Whatever a guest calls a time; beyond the range it is the end of time.
pub(crate) fn timestamp_in(at: u64) -> Timestamp {
    Timestamp::from_millis(i64::try_from(at).unwrap_or(i64::MAX))
}

/// A device that asks to enroll, with what its message and its certificate say.
pub(crate) fn candidate(candidate: &Candidate) -> wit::Enrollment {
    let certificate = &candidate.certificate;
    let facts = CandidateFacts {
        facts: &candidate.facts,
        tags: [],
        url_params: &candidate.url_params,
        certificate: CertificateFacts {
            sha256: certificate.fingerprint(),
            subject: &certificate.subject,
            issuer: &certificate.issuer,
            not_before: certificate.not_before.to_string(),
            not_after: certificate.not_after.to_string(),
        },
    };
    wit::Enrollment {
        id: candidate.enrollment.id.as_str().to_owned(),
        parent_id: candidate.enrollment.parent.as_ref().map(|id| id.as_str().to_owned()),
        kind: candidate.enrollment.kind.as_str().to_owned(),
        topic: candidate.topic.clone(),
        facts: json_text(&facts),
    }
}

/// Written straight into text: an enrollment waits for it.
#[derive(Serialize)]
struct CandidateFacts<'a> {
    #[serde(flatten)]
    facts: &'a DeviceFacts,
    /// Nobody has tagged it yet.
    tags: [&'a str; 0],
    url_params: &'a BTreeMap<String, String>,
    certificate: CertificateFacts<'a>,
}

#[derive(Serialize)]
struct CertificateFacts<'a> {
    sha256: String,
    subject: &'a str,
    issuer: &'a str,
    not_before: String,
    not_after: String,
}

/// JSON of what cannot fail to become some: keys are texts.
fn json_text(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|_| String::from("{}"))
}

/// A message for a guest, without its secrets.
pub(crate) fn message(document: &plist::Value, limit: usize) -> wit::Input {
    let body = json_text(&plist_json::AsJson::redacted(document));
    if body.len() <= limit {
        return wit::Input { body, truncated: false };
    }
    input(&plist_json::to_redacted_json(document), limit)
}

/// An enrollment as it is stored.
pub(crate) fn enrollment(record: &EnrollmentRecord) -> wit::Enrollment {
    wit::Enrollment {
        id: record.id.as_str().to_owned(),
        parent_id: record.parent.as_ref().map(|id| id.as_str().to_owned()),
        kind: record.kind.as_str().to_owned(),
        topic: record.topic.clone(),
        facts: record.facts.to_string(),
    }
}

/// Why a channel cannot be woken: a fact of its enrollment.
pub(crate) fn push_failure(failing: &FailingPush) -> Value {
    json!({
        "code": failing.code,
        "detail": failing.detail,
        "token_is_dead": failing.token_is_dead,
        "failures": failing.failures,
        "first_at": failing.first_at.to_string(),
        "last_at": failing.last_at.to_string(),
    })
}

/// Who waits for an answer.
pub(crate) fn asker(asker: &Asker) -> wit::Enrollment {
    wit::Enrollment {
        id: asker.enrollment.id.as_str().to_owned(),
        parent_id: asker.enrollment.parent.as_ref().map(|id| id.as_str().to_owned()),
        kind: asker.enrollment.kind.as_str().to_owned(),
        topic: asker.topic.clone(),
        facts: asker.facts.to_string(),
    }
}

/// An event, its data bounded.
pub(crate) fn event(event: &Event, attempt: u32, limit: usize) -> wit::Event {
    wit::Event {
        id: event.id.clone(),
        topic: event.topic.clone(),
        at: timestamp(event.at),
        attempt,
        who: event.who.as_ref().map(enrollment),
        data: input(&event.data, limit),
    }
}

/// What `schedule` gets of an event `schedule.tick`.
pub(crate) struct Tick {
    pub(crate) name: String,
    pub(crate) scheduled_for: u64,
    pub(crate) who: Option<String>,
    pub(crate) data: Vec<u8>,
}

impl Tick {
    pub(crate) fn of(event: &Event) -> Self {
        let text = |key: &str| event.data.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let scheduled_for = event.data.get("scheduled_for");
        // Milliseconds or, as everywhere else in the contract's JSON, RFC 3339.
        let scheduled_for = scheduled_for
            .and_then(Value::as_u64)
            .or_else(|| scheduled_for?.as_str()?.parse::<jiff::Timestamp>().ok()?.as_millisecond().try_into().ok())
            .unwrap_or_else(|| timestamp(event.at));
        let data = event.data.get("data").and_then(|data| data.get("$data")).and_then(Value::as_str).unwrap_or_default();
        Self {
            name: text("name"),
            scheduled_for,
            who: event.who.as_ref().map(|who| who.id.as_str().to_owned()).or_else(|| Some(text("who")).filter(|who| !who.is_empty())),
            data: STANDARD.decode(data).unwrap_or_default(),
        }
    }
}

/// A document for a guest. Above the limit only its heads are left: short values stay, long ones go.
pub(crate) fn input(document: &Value, limit: usize) -> wit::Input {
    let body = document.to_string();
    if body.len() <= limit {
        return wit::Input { body, truncated: false };
    }
    // Half of the limit, so that separators and keys of the outer level fit as well.
    let mut left = limit / 2;
    let heads = heads(document, &mut left, 0);
    wit::Input { body: heads.to_string(), truncated: true }
}

/// Two levels of dictionaries with the values that are short.
fn heads(document: &Value, left: &mut usize, depth: usize) -> Value {
    const SHORT: usize = 1 << 10;
    let Value::Object(entries) = document else { return json!({}) };
    let mut kept = Map::new();
    for (key, value) in entries {
        let nested = value.is_object() && depth < 2;
        let size = if nested { 0 } else { size_up_to(value, SHORT) }.saturating_add(key.len()).saturating_add(8);
        if size > SHORT || size > *left {
            continue;
        }
        *left = left.saturating_sub(size);
        let value = if nested { heads(value, left, depth.saturating_add(1)) } else { value.clone() };
        kept.insert(key.clone(), value);
    }
    Value::Object(kept)
}

/// Bytes of the JSON text, or something above `limit` if it is longer.
fn size_up_to(value: &Value, limit: usize) -> usize {
    struct Counter(usize, usize);
    impl std::io::Write for Counter {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 = self.0.saturating_add(bytes.len());
            if self.0 > self.1 { Err(std::io::ErrorKind::FileTooLarge.into()) } else { Ok(bytes.len()) }
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut counter = Counter(0, limit);
    let _ = serde_json::to_writer(&mut counter, value);
    counter.0
}

/// A command on its way, with its report without secrets.
pub(crate) fn command_status(status: &CommandStatus) -> wit::CommandStatus {
    let report = status.report.as_ref().and_then(|raw| plist::parse(raw).ok()).map(|report| plist_json::to_redacted_json(&report).to_string());
    wit::CommandStatus {
        uuid: status.uuid.clone(),
        request_type: status.request_type.clone(),
        state: status.state.clone(),
        updated_at: timestamp(status.updated_at),
        report,
        facts: json!({ "origin": status.origin, "deliveries": status.deliveries, "created_at": status.created_at.to_string() }).to_string(),
    }
}

/// What a policy decided. A verdict that this server does not know is a failure: it must not pass for an abstention.
pub(crate) fn decision_in(decision: wit::Decision) -> Result<Decision, Failure> {
    let reason = decision.reason.map(|reason| printable(&reason, MAX_REASON)).filter(|reason| !reason.is_empty());
    match decision.verdict.as_str() {
        "abstain" => Ok(Decision::Abstain),
        "allow" => Ok(Decision::Allow { tags: tags(decision.detail.as_deref())?, reason }),
        "quarantine" => Ok(Decision::Quarantine { tags: tags(decision.detail.as_deref())?, reason }),
        "deny" => Ok(Decision::Deny { reason }),
        other => Err(invalid(format!("unknown verdict `{}`", printable(other, 64)))),
    }
}

/// What is said of a user. A verdict that does not answer the message is a failure: a device could do nothing with it.
pub(crate) fn user_verdict_in(decision: &wit::Decision, first: bool) -> Result<UserVerdict, Failure> {
    match (decision.verdict.as_str(), first) {
        ("abstain", _) => Ok(UserVerdict::Abstain),
        ("decline", _) => Ok(UserVerdict::Decline),
        ("no-challenge", true) => Ok(UserVerdict::NoChallenge),
        ("challenge", true) => Ok(UserVerdict::Challenge(text_of(decision.detail.as_deref(), "DigestChallenge")?)),
        ("auth-token", false) => Ok(UserVerdict::AuthToken(text_of(decision.detail.as_deref(), "AuthToken")?)),
        ("reject", false) => Ok(UserVerdict::Reject),
        (verdict @ ("no-challenge" | "challenge"), false) => {
            Err(invalid(format!("`{verdict}` answers a message without a digest, and this one has it")))
        }
        (verdict @ ("auth-token" | "reject"), true) => Err(invalid(format!("`{verdict}` answers a digest, and this message has none"))),
        (other, _) => Err(invalid(format!("unknown verdict `{}`", printable(other, 64)))),
    }
}

/// The one string in a decision's detail. Never repeated in a failure: it may be a secret.
fn text_of(detail: Option<&str>, key: &str) -> Result<String, Failure> {
    let detail: Option<Value> = detail.and_then(|detail| serde_json::from_str(detail).ok());
    let text = detail.as_ref().and_then(|detail| detail.get(key)).and_then(Value::as_str);
    match text {
        Some(text) if !text.is_empty() && text.len() <= MAX_CHALLENGE && !text.chars().any(char::is_control) => Ok(text.to_owned()),
        Some(_) => Err(invalid(format!("detail.{key}: 1 to {MAX_CHALLENGE} bytes, no control characters"))),
        None => Err(invalid(format!("detail.{key}: is missing, or is no string"))),
    }
}

pub(crate) fn token_in(token: Vec<u8>) -> Result<ServiceToken, Failure> {
    ServiceToken::new(token.into()).map_err(|problem| invalid(problem.to_owned()))
}

pub(crate) fn configuration_in(document: &str) -> Result<Configuration, Failure> {
    let document: Value = serde_json::from_str(document).map_err(|_| invalid(String::from("the configuration is no JSON")))?;
    match plist_json::from_json(&document) {
        Ok(plist::Value::Dictionary(keys)) => Configuration::new(keys).map_err(invalid),
        Ok(_) => Err(invalid(String::from("the configuration is not a dictionary"))),
        Err(error) => Err(invalid(format!("the configuration is no property list: {error}"))),
    }
}

/// `{"tags": […]}` of a decision's detail.
fn tags(detail: Option<&str>) -> Result<Vec<String>, Failure> {
    let Some(detail) = detail else { return Ok(Vec::new()) };
    let detail: Value = serde_json::from_str(detail).map_err(|error| invalid(format!("detail is no JSON: {error}")))?;
    let Some(tags) = detail.get("tags") else { return Ok(Vec::new()) };
    let tags: Vec<String> = serde_json::from_value(tags.clone()).map_err(|error| invalid(format!("detail.tags: {error}")))?;
    check_tags(&tags).map_err(invalid)?;
    Ok(tags)
}

/// Why these cannot be tags, if they cannot.
pub(crate) fn check_tags(tags: &[String]) -> Result<(), String> {
    if tags.len() > MAX_TAGS {
        return Err(format!("more than {MAX_TAGS} tags at once"));
    }
    match tags.iter().find(|tag| tag.is_empty() || tag.len() > MAX_TAG || tag.chars().any(char::is_control)) {
        Some(tag) => Err(format!("`{}` is no tag: 1 to {MAX_TAG} bytes, no control characters", printable(tag, 64))),
        None => Ok(()),
    }
}

fn invalid(message: String) -> Failure {
    Failure { code: String::from("invalid"), message, retryable: false, retry_after: None }
}

/// A guest's failure, fit for log and audit.
pub(crate) fn failure_in(failure: &wit::Failure, limit: usize) -> Failure {
    Failure {
        code: printable(&failure.code, 64),
        message: printable(&failure.message, limit),
        retryable: failure.retryable,
        retry_after: failure.retry_after_ms.map(|millis| Duration::from_millis(u64::from(millis))),
    }
}

/// Text of a guest, cut and with its control characters escaped: it cannot forge lines in a log or in a reason.
pub(crate) fn printable(text: &str, limit: usize) -> String {
    let mut printed = String::with_capacity(text.len().min(limit));
    for character in text.chars() {
        let before = printed.len();
        // Bidirectional controls and the line separators are no controls to Unicode, but they are to a reader.
        if character.is_control() || matches!(character, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}') {
            printed.extend(character.escape_default());
        } else {
            printed.push(character);
        }
        if printed.len() > limit {
            printed.truncate(before);
            break;
        }
    }
    printed
}

pub(crate) fn size_of_decision(decision: &wit::Decision) -> usize {
    let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
    decision.verdict.len().saturating_add(text(&decision.reason)).saturating_add(text(&decision.detail))
}

pub(crate) fn size_of_commands(commands: &[wit::NewCommand]) -> usize {
    commands.iter().map(size_of_command).fold(0, usize::saturating_add)
}

fn size_of_command(command: &wit::NewCommand) -> usize {
    let body = match &command.body {
        wit::CommandBody::AsJson(json) => json.len(),
        wit::CommandBody::AsPlist(plist) => plist.len(),
    };
    let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
    let options = &command.options;
    [text(&options.idempotency_key), text(&options.collapse_key), text(&options.extra), 64].into_iter().fold(body, usize::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_above_the_limit_keeps_its_heads() {
        let document = json!({ "message": { "UDID": "D", "Big": "x".repeat(5_000), "List": vec![1; 2_000] }, "short": 1 });
        let whole = input(&document, 1 << 20);
        assert!(!whole.truncated);
        let cut = input(&document, 4_000);
        assert!(cut.truncated);
        assert_eq!(cut.body, r#"{"message":{"UDID":"D"},"short":1}"#);
    }

    #[test]
    fn text_of_guests_cannot_forge_a_line() {
        assert_eq!(printable("a\nb\u{1b}[31m\u{202e}c", 100), "a\\nb\\u{1b}[31m\\u{202e}c");
        assert_eq!(printable("äöü", 4), "äö");
        assert_eq!(printable("ab\n", 3), "ab");
    }

    #[test]
    fn an_unknown_verdict_is_a_failure() {
        let decision = |verdict: &str, detail: Option<&str>| {
            decision_in(wit::Decision { verdict: verdict.to_owned(), reason: Some(String::from("why")), detail: detail.map(str::to_owned) })
        };
        assert_eq!(decision("abstain", None), Ok(Decision::Abstain));
        assert_eq!(decision("deny", None), Ok(Decision::Deny { reason: Some(String::from("why")) }));
        let tags = vec![String::from("a")];
        assert_eq!(decision("quarantine", Some(r#"{"tags":["a"]}"#)), Ok(Decision::Quarantine { tags, reason: Some(String::from("why")) }));
        assert!(decision("Allow", None).is_err());
        assert!(decision("allow", Some(r#"{"tags":[1]}"#)).is_err());
    }
}
