//! `POST /v1/escrowkeyunlock`: NanoMDM's form, and Apple's answer.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use tracing::{info, warn};
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_service::reply::RETRY_AFTER;
use wasmdm_storage::audit::AuditRow;

use super::authorization::Caller;
use super::{App, body, problem, v1};
use crate::escrow_key::{UnlockError, UnlockRequest};

const FORM_LIMIT: usize = 64 << 10;
const REQUIRED: [&str; 5] = ["serial", "productType", "escrowKey", "orgName", "guid"];
const KEY: &str = "escrowKey";

/// Takes Activation Lock off a device, with the key that was escrowed.
pub async fn unlock(State(app): State<Arc<App>>, Extension(caller): Extension<Caller>, request: Request) -> Response {
    if request.method() != Method::POST {
        let mut response = problem::plain(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed");
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("POST"));
        return response;
    }
    let (head, request_body) = request.into_parts();
    let held = match body::read(&app.budget, &head.headers, request_body, FORM_LIMIT).await {
        Ok(held) => held,
        Err(error) => return error.response(),
    };
    let mut fields = fields(&held.bytes, head.uri.query().unwrap_or_default());
    let missing: Vec<&str> = REQUIRED.into_iter().filter(|name| !fields.contains_key(*name)).collect();
    if !missing.is_empty() {
        return v1::error(StatusCode::BAD_REQUEST, &format!("invalid or missing parameters: {}", missing.join(", ")));
    }
    let mut field = |name: &str| fields.remove(name);
    let Some(topic) = field("topic") else { return v1::error(StatusCode::BAD_REQUEST, "empty topic") };
    let mut required = |name: &str| field(name).unwrap_or_default();
    let asked = UnlockRequest {
        serial: required("serial"),
        product_type: required("productType"),
        escrow_key: required(KEY),
        org_name: required("orgName"),
        guid: required("guid"),
        imei: field("imei"),
        imei2: field("imei2"),
        meid: field("meid"),
    };
    let certificate = match app.storage.push_certificate(&TenantId::default(), &topic).await {
        Ok(Some(certificate)) => certificate,
        Ok(None) => return v1::error(StatusCode::NOT_FOUND, &format!("topic: no push certificate for `{}`", topic.escape_default())),
        Err(error) => return v1::error(v1::storage_status(&error), &error.to_string()),
    };
    // Before Apple is asked: who took a lock off must be known even if the server ends in the middle.
    let row = AuditRow {
        tenant: TenantId::default(),
        actor: format!("api:{}", caller.0),
        action: "escrow-key.unlock".to_owned(),
        target: None,
        detail: serde_json::json!({ "serial_number": asked.serial, "topic": topic }),
        at: app.clock.now(),
    };
    if let Err(error) = app.storage.record_decision(Vec::new(), vec![row], app.clock.now()).await {
        return v1::error(v1::storage_status(&error), &error.to_string());
    }
    match app.escrow_key.unlock(&certificate, &asked).await {
        Ok(answer) => {
            let serial = asked.serial.escape_default().to_string();
            info!(topic, serial_number = serial, status = answer.status.as_u16(), "Apple was asked to take Activation Lock off {serial}");
            (answer.status, answer.headers, answer.body).into_response()
        }
        Err(UnlockError::Busy) => problem::unavailable("too many calls wait for Apple", RETRY_AFTER),
        Err(error) => {
            warn!(topic, "Activation Lock was not taken off: {error}");
            let status = if matches!(error, UnlockError::Unreached(_)) { StatusCode::BAD_GATEWAY } else { StatusCode::INTERNAL_SERVER_ERROR };
            v1::error(status, &error.to_string())
        }
    }
}

/// Fields that are not empty; those of the body before those of the URL, in which the key is not taken: URLs are written down everywhere.
fn fields(form: &[u8], query: &str) -> BTreeMap<String, String> {
    let mut fields = BTreeMap::new();
    let of_query = form_urlencoded::parse(query.as_bytes()).filter(|(name, _)| name != KEY);
    for (name, value) in form_urlencoded::parse(form).chain(of_query) {
        if !value.is_empty() {
            fields.entry(name.into_owned()).or_insert_with(|| value.into_owned());
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_come_from_the_body_then_from_the_url_and_the_key_from_the_body_only() {
        let fields = fields(b"serial=a+b&topic=&escrowKey=%2B1", "serial=c&topic=t&escrowKey=2&imei=3");
        let expected = [("escrowKey", "+1"), ("imei", "3"), ("serial", "a b"), ("topic", "t")];
        assert_eq!(fields, expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
        assert!(!super::fields(b"", "escrowKey=2").contains_key(KEY));
    }
}
