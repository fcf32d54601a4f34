//! `/api/v1/push-certificates`: which topics there are, when their certificates end, and how many devices depend on them. Storing one is
//! `PUT /v1/pushcert`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_protocol::time::Timestamp;
use wasmdm_service::reply::RETRY_AFTER;
use wasmdm_storage::push_certificate_expiry::days_left;
use wasmdm_storage::push_certificates::TopicSummary;

use super::v1::seconds;
use super::{App, problem};

/// By topic; also topics of enrolled channels that have no certificate.
pub async fn list(State(app): State<Arc<App>>) -> Response {
    match app.storage.push_topics(&TenantId::default()).await {
        Ok(topics) => {
            let now = app.clock.now();
            Json(serde_json::json!({ "push_certificates": topics.iter().map(|topic| line(topic, now)).collect::<Vec<_>>() })).into_response()
        }
        Err(error) => {
            tracing::warn!("Push certificates could not be listed: {error}");
            problem::unavailable("the database", RETRY_AFTER)
        }
    }
}

/// Without a certificate its members are null.
fn line(topic: &TopicSummary, now: Timestamp) -> serde_json::Value {
    let certificate = topic.certificate.as_ref();
    serde_json::json!({
        "topic": topic.topic,
        "not_after": certificate.map(|certificate| seconds(certificate.not_after)),
        "days_left": certificate.map(|certificate| days_left(certificate.not_after, now)),
        "version": certificate.map(|certificate| certificate.version),
        "stored_at": certificate.map(|certificate| seconds(certificate.stored_at)),
        "channels": topic.channels,
    })
}
