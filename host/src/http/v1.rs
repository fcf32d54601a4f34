//! `/v1` and `/version`: what clients of NanoMDM use. Paths, JSON and its indentation are theirs; where an answer of theirs is wrong,
//! docs/nanomdm.md says what is corrected.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use percent_encoding::percent_decode_str;
use serde::Serialize;
use tracing::{info, warn};
use wasmdm_apns::push_certificate::{FileForm, PushCertificateError, PushCertificatePair};
use wasmdm_protocol::command::Command;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_protocol::time::Timestamp;
use wasmdm_service::pusher::wake;
use wasmdm_storage::StorageError;
use wasmdm_storage::commands::{CommandOptions, Enqueue, EnqueueOutcome};
use wasmdm_storage::mass_pushes::Targets;
use wasmdm_storage::push_certificates::{StoreOutcome, StorePushCertificate, TopicUse};

use super::authorization::Caller;
use super::body::{self, COMMAND_LIMIT};
use super::pushes::{self, Begun, IDS};
use super::{App, problem};

/// From more on a push goes on in the background: nobody waits for it.
const AT_ONCE: usize = 1000;
/// As the pusher says it.
const NOT_ENROLLED: &str = "push data missing for id: it is not enrolled";
/// A certificate and a key.
const PUSH_CERTIFICATE_LIMIT: usize = 64 << 10;

/// The answer of `enqueue` and `push`; the order of the members is NanoMDM's.
#[derive(Debug, Default, Serialize)]
struct ApiResult {
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    status: BTreeMap<String, IdResult>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    no_push: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    push_error: Option<String>,
    /// Not in NanoMDM: the push goes on, and `/api/v1/pushes/{push_id}` tells how far it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    push_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    command_error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    command_uuid: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    request_type: Option<String>,
}

#[derive(Debug, Default, Serialize)]
struct IdResult {
    #[serde(skip_serializing_if = "Option::is_none")]
    push_error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    push_result: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    command_error: Option<String>,
}

/// A parameter of the query; of one that stands there twice the first, as Go takes it.
fn parameter<'a>(uri: &'a Uri, name: &str) -> Option<Cow<'a, str>> {
    form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes()).find(|(key, _)| key == name).map(|(_, value)| value)
}

/// NanoMDM takes any text for yes, `0` too; here no means no.
fn is_yes(uri: &Uri, name: &str) -> bool {
    parameter(uri, name).is_some_and(|text| !matches!(text.to_ascii_lowercase().as_str(), "" | "0" | "false" | "no" | "off"))
}

/// Queues a command for each id, and wakes them. An empty body just wakes them. `?nopush=…` does not wake; `?renews_identity=…` is not in
/// NanoMDM: the command makes the device enroll anew with another certificate, and what follows is no new enrollment.
pub async fn enqueue(State(app): State<Arc<App>>, Extension(caller): Extension<Caller>, request: Request) -> Response {
    let (head, request_body) = request.into_parts();
    let ids = match targets(&head.uri) {
        Ok(ids) => ids,
        Err(problem) => return json(StatusCode::BAD_REQUEST, &ApiResult { command_error: Some(problem), ..ApiResult::default() }),
    };
    let held = match body::read(&app.budget, &head.headers, request_body, COMMAND_LIMIT).await {
        Ok(held) => held,
        Err(error) => return error.response(),
    };
    let no_push = is_yes(&head.uri, "nopush");
    if held.bytes.is_empty() {
        if no_push {
            let problem = "the body is empty and nopush is set: there is nothing to do".to_owned();
            return json(StatusCode::BAD_REQUEST, &ApiResult { no_push, command_error: Some(problem), ..ApiResult::default() });
        }
        return push_to(&app, caller, ids).await;
    }
    let command = match Command::parse(held.bytes.clone()) {
        Ok(command) => command,
        Err(error) => return json(StatusCode::BAD_REQUEST, &ApiResult { no_push, command_error: Some(error.to_string()), ..ApiResult::default() }),
    };
    let mut result =
        ApiResult { no_push, command_uuid: Some(command.uuid.clone()), request_type: Some(command.request_type.clone()), ..ApiResult::default() };
    let queued = app
        .storage
        .enqueue(Enqueue {
            tenant: TenantId::default(),
            targets: ids.clone(),
            command: command.clone(),
            options: CommandOptions { push: !no_push, renews_identity: is_yes(&head.uri, "renews_identity"), ..CommandOptions::default() },
            origin: format!("api:{}", caller.0),
            now: app.clock.now(),
        })
        .await;
    let outcomes = match queued {
        Ok(outcomes) => outcomes,
        Err(error) => {
            result.command_error = Some(error.to_string());
            return json(storage_status(&error), &result);
        }
    };
    if outcomes.contains(&EnqueueOutcome::UuidReused) {
        result.command_error = Some(format!("CommandUUID: `{}` was used before with another command", command.uuid.escape_default()));
        return json(StatusCode::CONFLICT, &result);
    }
    let mut reachable = Vec::with_capacity(ids.len());
    for (id, outcome) in ids.iter().zip(&outcomes) {
        match outcome {
            EnqueueOutcome::Queued { .. } | EnqueueOutcome::AlreadyQueued { .. } => reachable.push(id.clone()),
            EnqueueOutcome::NotAgain(why) => {
                let problem = format!("{why}: nothing is delivered under its CommandUUID any more, so give the command another");
                result.status.entry(id.to_string()).or_default().command_error = Some(problem);
            }
            EnqueueOutcome::UnknownEnrollment | EnqueueOutcome::UuidReused => {
                result.status.entry(id.to_string()).or_default().command_error = Some("no enrollment of this id".to_owned());
            }
        }
    }
    info!(command.uuid = command.uuid, command.request_type = command.request_type, targets = reachable.len(), "Command {} queued", command.uuid);
    let mut push_failed = false;
    if !no_push && !reachable.is_empty() {
        push_failed = push_into(&app, caller, &reachable, &mut result).await > 0 || result.push_error.is_some();
    }
    let status = if reachable.is_empty() {
        StatusCode::INTERNAL_SERVER_ERROR
    } else if reachable.len() < ids.len() || push_failed {
        StatusCode::MULTI_STATUS
    } else {
        StatusCode::OK
    };
    json(status, &result)
}

/// Wakes each id.
pub async fn push(State(app): State<Arc<App>>, Extension(caller): Extension<Caller>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    app.budget.drain(body);
    match targets(&head.uri) {
        Ok(ids) => push_to(&app, caller, ids).await,
        Err(problem) => json(StatusCode::BAD_REQUEST, &ApiResult { push_error: Some(problem), ..ApiResult::default() }),
    }
}

async fn push_to(app: &App, caller: Caller, ids: Vec<EnrollmentId>) -> Response {
    let mut result = ApiResult::default();
    let failed = push_into(app, caller, &ids, &mut result).await;
    let status = match failed {
        _ if result.push_error.is_some() => StatusCode::SERVICE_UNAVAILABLE,
        0 => StatusCode::OK,
        failed if failed == ids.len() => StatusCode::INTERNAL_SERVER_ERROR,
        _ => StatusCode::MULTI_STATUS,
    };
    match &result.push_id {
        Some(push_id) if result.push_error.is_none() && failed < ids.len() => pushes::accepted(push_id, json(StatusCode::ACCEPTED, &result)),
        _ => json(status, &result),
    }
}

/// Writes each id's result, or by which id they can be asked after; answers how many failed.
async fn push_into(app: &App, caller: Caller, ids: &[EnrollmentId], result: &mut ApiResult) -> usize {
    if ids.len() > AT_ONCE {
        return match pushes::begin(app, caller, Targets::These(ids.to_vec())).await {
            Ok(Begun { id, not_enrolled, broke_off }) => {
                result.push_id = Some(id);
                result.push_error = broke_off.map(|error| format!("not all are pushed to: {error}"));
                for id in &not_enrolled {
                    result.status.entry(id.to_string()).or_default().push_error = Some(NOT_ENROLLED.to_owned());
                }
                not_enrolled.len()
            }
            Err(error) => {
                result.push_error = Some(error.to_string());
                ids.len()
            }
        };
    }
    let (storage, clock, pusher, targets) = (app.storage.clone(), Arc::clone(&app.clock), Arc::clone(&app.pusher), ids.to_vec());
    // A caller that goes away in the middle does not take the pushes of the others with it.
    let waking = app.tracker.spawn(async move { wake(&storage, &*clock, &*pusher, &TenantId::default(), &targets).await });
    let results = match waking.await {
        Ok(results) => results,
        Err(error) => {
            result.push_error = Some(error.to_string());
            return ids.len();
        }
    };
    let status = &mut result.status;
    let mut failed = 0;
    for (id, result) in ids.iter().zip(results) {
        let entry = status.entry(id.to_string()).or_default();
        match result {
            Ok(apns_id) => entry.push_result = Some(apns_id),
            Err(error) => {
                failed += 1;
                entry.push_error = Some(error.to_string());
            }
        }
    }
    failed
}

/// Neither `enqueue` nor `push` without an id.
pub async fn no_ids(request: Request) -> Response {
    let problem = Some("no enrollment id in the path: add one, or several with commas between".to_owned());
    let result = if request.uri().path().starts_with("/v1/push") {
        ApiResult { push_error: problem, ..ApiResult::default() }
    } else {
        ApiResult { command_error: problem, ..ApiResult::default() }
    };
    json(StatusCode::BAD_REQUEST, &result)
}

/// The ids between commas behind `/v1/enqueue/` and `/v1/push/`, each once: the same id again would be the same command again. Commas may be
/// encoded, as clients do that escape a whole path segment; no id has one in itself.
fn targets(uri: &Uri) -> Result<Vec<EnrollmentId>, String> {
    let ids = uri.path().splitn(4, '/').nth(3).unwrap_or_default();
    let ids = percent_decode_str(ids).decode_utf8().map_err(|_| "the path is no UTF-8".to_owned())?;
    let mut seen = BTreeSet::new();
    let mut targets = Vec::new();
    for id in ids.split(',').filter(|id| !id.is_empty()) {
        if seen.insert(id) {
            targets.push(EnrollmentId::new(id));
        }
        if targets.len() > IDS {
            return Err(format!("at most {IDS} ids in a call"));
        }
    }
    if targets.is_empty() { Err("no enrollment id in the path".to_owned()) } else { Ok(targets) }
}

#[derive(Debug, Serialize)]
struct PushCertificateResult {
    not_after: String,
    topic: String,
}

/// When the certificate of `?topic=…` ends.
pub async fn push_certificate(State(app): State<Arc<App>>, uri: Uri) -> Response {
    let Some(topic) = parameter(&uri, "topic").filter(|topic| !topic.is_empty()) else {
        return error(StatusCode::BAD_REQUEST, "topic: the query parameter is missing");
    };
    let topic = topic.into_owned();
    match app.storage.push_certificate(&TenantId::default(), &topic).await {
        Ok(Some(certificate)) => json(StatusCode::OK, &PushCertificateResult { not_after: seconds(certificate.not_after), topic }),
        Ok(None) => error(StatusCode::NOT_FOUND, &format!("topic: no push certificate for `{}`", topic.escape_default())),
        Err(problem) => error(storage_status(&problem), &problem.to_string()),
    }
}

/// Stores a push certificate with its key, both PEM in one body. Not in NanoMDM: `?topic=…` says which topic it must have, and
/// `?new_topic=…` that it may be one that no device uses, although devices use others.
pub async fn store_push_certificate(State(app): State<Arc<App>>, Extension(caller): Extension<Caller>, request: Request) -> Response {
    let (head, request_body) = request.into_parts();
    let held = match body::read(&app.budget, &head.headers, request_body, PUSH_CERTIFICATE_LIMIT).await {
        Ok(held) => held,
        Err(error) => return error.response(),
    };
    let now = app.clock.now();
    let pair = match checked_push_certificate(&held.bytes, parameter(&head.uri, "topic").as_deref(), now) {
        Ok(pair) => pair,
        Err(problem) => return error(StatusCode::BAD_REQUEST, &problem),
    };
    let (topic, not_after) = (pair.topic, pair.not_after);
    let store = StorePushCertificate {
        tenant: TenantId::default(),
        topic: topic.clone(),
        certificate_pem: pair.certificate_pem,
        private_key_pem: pair.private_key_pem,
        not_after,
        may_be_new: is_yes(&head.uri, "new_topic"),
        actor: format!("api:{}", caller.0),
        now,
    };
    match app.storage.store_push_certificate(store).await {
        Ok(StoreOutcome::Stored) => {
            info!(topic = topic, serial = pair.serial, "Push certificate of topic {topic} stored; it ends at {not_after}");
            json(StatusCode::OK, &PushCertificateResult { not_after: seconds(not_after), topic })
        }
        Ok(StoreOutcome::OtherTopicsInUse(used)) => {
            let problem = other_topics_in_use(&topic, &used);
            warn!(topic = topic, "A push certificate was not stored: {problem}");
            error(StatusCode::CONFLICT, &problem)
        }
        Err(problem) => error(storage_status(&problem), &problem.to_string()),
    }
}

fn checked_push_certificate(upload: &[u8], topic: Option<&str>, now: Timestamp) -> Result<PushCertificatePair, String> {
    const IMPORT: &str = "use `wasmdm push-certificate import`, which opens it";
    match FileForm::of(upload) {
        FileForm::Text => {}
        FileForm::DerCertificate => return Err(format!("this is a certificate in DER without its key, and PEM of both is taken here: {IMPORT}")),
        FileForm::Pkcs12 => return Err(format!("this is a PKCS#12 or another binary file, and PEM is taken here: {IMPORT}")),
    }
    let pair = match PushCertificatePair::from_pem(upload, None) {
        Ok(pair) => pair,
        Err(PushCertificateError::PasswordNeeded) => {
            return Err(format!("private key: it is encrypted, and no passwords are taken here: {IMPORT}"));
        }
        Err(problem) => return Err(problem.to_string()),
    };
    pair.check_validity(now).and_then(|()| topic.map_or(Ok(()), |topic| pair.check_topic(topic))).map_err(|problem| problem.to_string())?;
    Ok(pair)
}

/// Most likely the certificate was made anew, or with another Apple account, where the old one should have been renewed.
fn other_topics_in_use(topic: &str, used: &[TopicUse]) -> String {
    let mut topics = used.iter().take(3).map(|used| format!("`{}` ({} channels)", used.topic, used.channels)).collect::<Vec<_>>();
    if used.len() > topics.len() {
        topics.push(format!("{} more", used.len() - topics.len()));
    }
    format!(
        "certificate: its topic is `{topic}`, which no device here uses, and devices are enrolled under {}: renew their certificate with the Apple account \
         that it was made with, or add `?new_topic=1` if this is a further topic",
        topics.join(", ")
    )
}

/// The version, for anyone.
pub async fn version() -> Response {
    let body = format!("{{\"version\":\"{}\"}}", crate::VERSION);
    ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], body).into_response()
}

/// As NanoMDM's `pushcert` answers other methods.
pub async fn method_not_allowed() -> Response {
    problem::plain(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed")
}

pub(super) fn storage_status(error: &StorageError) -> StatusCode {
    match error {
        StorageError::Invalid { .. } => StatusCode::BAD_REQUEST,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

pub(super) fn error(status: StatusCode, problem: &str) -> Response {
    json(status, &serde_json::json!({ "error": problem }))
}

/// Indented by tabs, with a newline at the end, as Go's encoder writes it.
fn json(status: StatusCode, value: &impl Serialize) -> Response {
    let mut body = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut body, serde_json::ser::PrettyFormatter::with_indent(b"\t"));
    if value.serialize(&mut serializer).is_err() {
        return problem::unavailable("the answer could not be written", wasmdm_service::reply::RETRY_AFTER);
    }
    body.push(b'\n');
    (status, [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], Bytes::from(body)).into_response()
}

/// RFC 3339 without fractions, as NanoMDM writes it.
pub(super) fn seconds(time: Timestamp) -> String {
    jiff::Timestamp::from_millisecond(time.as_millis()).map_or_else(|_| time.to_string(), |time| format!("{time:.0}"))
}
