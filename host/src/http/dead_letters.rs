//! `/api/v1/dead-letters`: events that could not be delivered, and another try for them.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_service::reply::RETRY_AFTER;
use wasmdm_storage::StorageError;
use wasmdm_storage::outbox::DeadLetter;

use super::{App, problem};

/// Letters in one answer, and in one replay.
const MOST: usize = 1000;

/// How many, and from where on: `before` is the sequence of the last one of the page before.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListOptions {
    limit: Option<u32>,
    before: Option<i64>,
}

/// The newest first. What the events say is not shown: it may be a whole report.
pub async fn list(State(app): State<Arc<App>>, options: Result<Query<ListOptions>, QueryRejection>) -> Response {
    let (limit, before) = match options {
        Ok(Query(options)) => (options.limit.unwrap_or(100), options.before),
        Err(error) => return bad_request(&error.body_text(), "limit"),
    };
    if limit == 0 || usize::try_from(limit).is_ok_and(|limit| limit > MOST) {
        return bad_request(&format!("from 1 to {MOST}"), "limit");
    }
    match app.storage.dead_letters(&TenantId::default(), before, limit).await {
        Ok(letters) => Json(serde_json::json!({ "dead_letters": letters.iter().map(line).collect::<Vec<_>>() })).into_response(),
        Err(error) => unavailable(&error),
    }
}

/// Which letters are to be delivered again.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replay {
    sequences: Vec<i64>,
}

/// Puts letters back at the end of their device's events.
pub async fn replay(State(app): State<Arc<App>>, wanted: Result<Json<Replay>, JsonRejection>) -> Response {
    let sequences = match wanted {
        Ok(Json(wanted)) => wanted.sequences,
        Err(error) => return bad_request(&error.body_text(), "sequences"),
    };
    if sequences.is_empty() || sequences.len() > MOST {
        return bad_request(&format!("from 1 to {MOST} numbers, as `GET /api/v1/dead-letters` lists them"), "sequences");
    }
    match app.storage.replay_dead_letters(&TenantId::default(), &sequences, app.clock.now()).await {
        Ok(replayed) => Json(serde_json::json!({ "replayed": replayed })).into_response(),
        Err(error) => unavailable(&error),
    }
}

/// As the API and `wasmdm db dead-letters` show it.
pub fn line(letter: &DeadLetter) -> serde_json::Value {
    serde_json::json!({
        "sequence": letter.sequence,
        "subscriber": letter.subscriber,
        "interface": letter.interface,
        "event": letter.event_id,
        "topic": letter.topic,
        "occurred_at": letter.occurred_at.to_string(),
        "enrollment": letter.enrollment,
        "attempts": letter.attempts,
        "error": letter.error,
        "at": letter.at.to_string(),
    })
}

fn bad_request(detail: &str, field: &str) -> Response {
    problem::document(StatusCode::BAD_REQUEST, "Bad Request", &format!("{field}: {detail}"), Some(field))
}

fn unavailable(error: &StorageError) -> Response {
    tracing::warn!("Dead letters could not be served: {error}");
    problem::unavailable("the database", RETRY_AFTER)
}
