//! `/mdm` and `/checkin`: where devices talk.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use tracing::{debug, info};
use wasmdm_protocol::checkin::CheckInMessage;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_protocol::report::Report;
use wasmdm_service::message::{DeviceRequest, Message};
use wasmdm_service::reply::{Refusal, Reply};

use super::body::{self, CHECK_IN_LIMIT, REPORT_LIMIT};
use super::identity::{Identity, Presented};
use super::{App, problem};
use crate::config::DevicePaths;
use crate::dump::Line;

/// Bodies beyond this are verified and parsed off the threads that serve connections.
pub(super) const LARGE: usize = 256 << 10;
/// Query parameters that are kept, and the length of each.
const URL_PARAMS: usize = 32;
const URL_PARAM_LENGTH: usize = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    CheckIn,
    Report,
}

/// Both kinds of message arrive at the ServerURL when there is no CheckInURL: the content type tells (edge case 1). Where the operator says
/// that there is one, everything here is a report, as in NanoMDM.
pub async fn mdm(State(app): State<Arc<App>>, ConnectInfo(peer): ConnectInfo<SocketAddr>, request: Request) -> Response {
    let is_check_in = app.device_paths != DevicePaths::Split
        && request
            .headers()
            .get(header::CONTENT_TYPE)
            .is_some_and(|value| value.as_bytes().to_ascii_lowercase().starts_with(b"application/x-apple-aspen-mdm-checkin"));
    serve(&app, peer, request, if is_check_in { Kind::CheckIn } else { Kind::Report }).await
}

/// A separate CheckInURL takes only check-ins, whatever the content type says.
pub async fn check_in(State(app): State<Arc<App>>, ConnectInfo(peer): ConnectInfo<SocketAddr>, request: Request) -> Response {
    serve(&app, peer, request, Kind::CheckIn).await
}

async fn serve(app: &Arc<App>, peer: SocketAddr, request: Request, kind: Kind) -> Response {
    if !matches!(*request.method(), Method::PUT | Method::POST) {
        let mut response = problem::plain(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed");
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("PUT, POST"));
        return response;
    }
    let id = request_id();
    let path = if app.dump.is_some() { request.uri().path().to_owned() } else { String::new() };
    let line = Line { request_id: &id, peer: peer.ip(), path: &path, at: app.clock.now() };
    let mut enrollment = None;
    let outcome = answer(app, line, request, kind, &mut enrollment).await;
    let line = Line { at: app.clock.now(), ..line };
    let (label, response) = match outcome {
        Ok(reply) => {
            debug!(request.id = id, "Device answered");
            if let Some(dump) = &app.dump {
                dump.reply(line, enrollment.as_ref(), &reply);
            }
            ("ok", reply_response(reply))
        }
        Err(Answer::Refused(refusal)) => {
            let response = problem::refusal(&refusal);
            if let Some(dump) = &app.dump {
                dump.refusal(line, enrollment.as_ref(), response.status().as_u16(), &refusal);
            }
            info!(request.id = id, peer = %peer.ip(), status = response.status().as_u16(), "A device was refused: {refusal}");
            (refusal_label(&refusal), response)
        }
        Err(Answer::Body(error)) => {
            let response = error.response();
            if let Some(dump) = &app.dump {
                dump.refusal(line, enrollment.as_ref(), response.status().as_u16(), &error);
            }
            info!(request.id = id, peer = %peer.ip(), status = response.status().as_u16(), "A device was refused: {error}");
            ("body", response)
        }
    };
    let kind = if kind == Kind::CheckIn { "check-in" } else { "report" };
    metrics::counter!("wasmdm_device_requests_total", "kind" => kind, "outcome" => label).increment(1);
    response
}

enum Answer {
    Refused(Refusal),
    Body(body::BodyError),
}

impl From<Refusal> for Answer {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// Also says whose message it is, once that is known and somebody wants to see it.
async fn answer(app: &Arc<App>, line: Line<'_>, request: Request, kind: Kind, enrollment: &mut Option<EnrollmentId>) -> Result<Reply, Answer> {
    let (head, request_body) = request.into_parts();
    let limit = if kind == Kind::CheckIn { CHECK_IN_LIMIT } else { REPORT_LIMIT };
    let presented = match presented(app, &head.headers, line.peer) {
        Ok(presented) => presented,
        Err(refusal) => {
            body::discard(&app.budget, &head.headers, request_body, limit).await.map_err(Answer::Body)?;
            return Err(refusal.into());
        }
    };
    let certificate = presented.certificate().sha256;
    let held = match body::read_of(&app.budget, &certificate, &head.headers, request_body, limit).await {
        Ok(held) => held,
        Err(mut refused) => {
            if kind == Kind::Report && matches!(refused.error, body::BodyError::TooLarge { .. }) {
                oversized(app, line.request_id, presented, &mut refused).await;
            }
            return Err(Answer::Body(refused.drain(&app.budget)));
        }
    };
    let parsed = if held.bytes.len() > LARGE {
        let bytes = held.bytes.clone();
        tokio::task::spawn_blocking(move || verify_and_parse(presented, bytes, kind))
            .await
            .map_err(|_| Refusal::unavailable("a large message could not be parsed"))?
    } else {
        verify_and_parse(presented, held.bytes.clone(), kind)
    };
    if let Some(dump) = &app.dump {
        match &parsed {
            Ok((_, message)) => {
                *enrollment = message.enrollment().cloned();
                dump.request(line, message);
            }
            Err(refusal) => dump.unreadable(line, &held.bytes, refusal),
        }
    }
    let (certificate, message) = parsed?;
    let device_request = DeviceRequest {
        id: line.request_id.to_owned(),
        certificate,
        url_params: url_params(head.uri.query().unwrap_or_default())?,
        tenant: TenantId::default(),
    };
    Ok(app.service.handle(device_request, message).await?)
}

/// A report that is too large is answered so whoever sends it, but it is held against its command only if it is really the device's.
async fn oversized(app: &App, request_id: &str, presented: Presented, refused: &mut body::Refused) {
    let Some(certificate) = presented.identify_refused(refused).await else {
        info!(request.id = request_id, "A report is too large, and it is not known of whom it is: it did not come to its end, or is not signed so");
        return;
    };
    let request = DeviceRequest { id: request_id.to_owned(), certificate, url_params: BTreeMap::new(), tenant: TenantId::default() };
    if let Err(refusal) = app.service.handle(request, Message::Oversized(None)).await {
        info!(request.id = request_id, "A report is too large, and nobody's: {refusal}");
    }
}

pub(super) fn presented(app: &App, headers: &HeaderMap, peer: IpAddr) -> Result<Presented, Refusal> {
    let identity = app.identity.as_ref().ok_or_else(|| Refusal::unavailable("no authority for device identities is configured (--ca)"))?;
    identity.present(headers, peer, app.clock.now())
}

fn verify_and_parse(presented: Presented, body: Bytes, kind: Kind) -> Result<(wasmdm_protocol::certificate::Certificate, Message), Refusal> {
    let certificate = Identity::identify(presented, &body)?;
    let message = match kind {
        Kind::CheckIn => Message::CheckIn(Box::new(CheckInMessage::parse(body).map_err(|error| Refusal::bad_request(error.to_string()))?)),
        Kind::Report => match Report::parse(body) {
            Ok(report) => Message::Report(Box::new(report)),
            Err(malformed) => Message::Malformed(malformed),
        },
    };
    Ok((certificate, message))
}

/// The first value of each key, as NanoMDM keeps them.
fn url_params(query: &str) -> Result<BTreeMap<String, String>, Refusal> {
    let mut params = BTreeMap::new();
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        if key.len() > URL_PARAM_LENGTH || value.len() > URL_PARAM_LENGTH || params.len() >= URL_PARAMS {
            return Err(Refusal::bad_request(format!("query: at most {URL_PARAMS} parameters of {URL_PARAM_LENGTH} bytes")));
        }
        params.entry(key.into_owned()).or_insert_with(|| value.into_owned());
    }
    Ok(params)
}

fn reply_response(reply: Reply) -> Response {
    let body = match reply {
        Reply::Empty => return StatusCode::OK.into_response(),
        Reply::NoContent => return StatusCode::NO_CONTENT.into_response(),
        Reply::Json(body) => return ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], body).into_response(),
        Reply::Plist(body) | Reply::Command { body, .. } => body,
    };
    // A command goes out as it was queued; a binary one is not XML.
    let content_type = if body.starts_with(b"bplist") { "application/octet-stream" } else { "text/xml; charset=utf-8" };
    ([(header::CONTENT_TYPE, HeaderValue::from_static(content_type))], body).into_response()
}

pub(super) fn refusal_label(refusal: &Refusal) -> &'static str {
    match refusal {
        Refusal::BadRequest { .. } => "bad-request",
        Refusal::Denied { .. } => "denied",
        Refusal::NotFound { .. } => "not-found",
        Refusal::Declined => "declined",
        Refusal::Unavailable { .. } => "unavailable",
    }
}

pub(super) fn request_id() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}
