//! How errors look.
//!
//! Devices get plain text as NanoMDM sends it. There is no function here that answers a device 401, nor 403 with an error code.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use wasmdm_service::reply::Refusal;

/// `text/plain`, one line.
pub fn plain(status: StatusCode, text: &str) -> Response {
    let mut response = (status, format!("{text}\n")).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// 503 with `Retry-After`.
pub fn unavailable(reason: &str, retry_after: Duration) -> Response {
    let mut response = plain(StatusCode::SERVICE_UNAVAILABLE, &format!("Service Unavailable: {reason}"));
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(retry_after.as_secs().max(1)));
    response
}

/// A device's refusal. Details are for the log; what a device shows to a person is the policy's reason.
pub fn refusal(refusal: &Refusal) -> Response {
    match refusal {
        Refusal::BadRequest { .. } => plain(StatusCode::BAD_REQUEST, "Bad Request"),
        Refusal::Denied { reason } => plain(StatusCode::FORBIDDEN, &single_line(reason)),
        Refusal::NotFound { .. } => plain(StatusCode::NOT_FOUND, "Not Found"),
        Refusal::Declined => plain(StatusCode::GONE, "Gone"),
        Refusal::Unavailable { retry_after, .. } => unavailable("try again later", *retry_after),
    }
}

/// NanoMDM's answer to an unknown path.
pub async fn not_found() -> Response {
    plain(StatusCode::NOT_FOUND, "404 page not found")
}

/// A problem document (RFC 9457) of `/api/v1`.
pub fn document(status: StatusCode, title: &str, detail: &str, field: Option<&str>) -> Response {
    let mut body = serde_json::json!({ "type": "about:blank", "title": title, "status": status.as_u16(), "detail": detail });
    if let (Some(field), Some(object)) = (field, body.as_object_mut()) {
        object.insert("field".to_owned(), field.into());
    }
    let mut response = (status, Json(body)).into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    response
}

/// A plugin's text must not forge a second line, in a log or in a terminal, nor the one word that makes a device remove its management.
fn single_line(text: &str) -> String {
    text.replace("com.apple.unrecognized.device", "unrecognized device").chars().map(|c| if c.is_control() { ' ' } else { c }).take(500).collect()
}
