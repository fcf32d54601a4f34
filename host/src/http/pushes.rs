//! `/api/v1/pushes`: pushes to many channels, which go on after the answer, and how far they are.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::{Extension, Json};
use serde::Deserialize;
use tracing::{info, warn};
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_service::reply::RETRY_AFTER;
use wasmdm_storage::StorageError;
use wasmdm_storage::mass_pushes::{BegunMassPush, MassPush, MassPushFailure, NewMassPush, Targets};

use super::authorization::Caller;
use super::{App, body, problem};

/// Ids of one call.
pub const IDS: usize = 100_000;
const BODY_LIMIT: usize = 16 << 20;
/// Pushes in a listing.
const RECENT: u32 = 50;

/// Whom to wake: these, or everyone.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    #[serde(default)]
    ids: Vec<String>,
    #[serde(default)]
    all: bool,
}

/// Wakes `{"ids": […]}`, or everyone who is enrolled with `{"all": true}`, in the background.
pub async fn create(State(app): State<Arc<App>>, Extension(caller): Extension<Caller>, headers: HeaderMap, request_body: Body) -> Response {
    let held = match body::read(&app.budget, &headers, request_body, BODY_LIMIT).await {
        Ok(held) => held,
        Err(error) => return error.response(),
    };
    let wanted: Wanted = match serde_json::from_slice(&held.bytes) {
        Ok(wanted) => wanted,
        Err(error) => return bad_request(&format!("the body is no {{\"ids\": [\"…\"]}} nor {{\"all\": true}}: {error}"), "ids"),
    };
    drop(held);
    let targets = match targets(wanted) {
        Ok(targets) => targets,
        Err(response) => return *response,
    };
    match begin(&app, caller, targets).await {
        Ok(Begun { id, not_enrolled, broke_off: None }) => {
            let body = serde_json::json!({ "id": id, "not_enrolled": not_enrolled });
            accepted(&id, Json(body).into_response())
        }
        Ok(Begun { id, not_enrolled, broke_off: Some(error) }) => {
            warn!(push.id = id, "Push {id} could be stored in part only: {error}");
            broken_off(&id, &not_enrolled)
        }
        Err(error) => unavailable(&error),
    }
}

fn targets(wanted: Wanted) -> Result<Targets, Box<Response>> {
    let refused = |detail: &str| Err(Box::new(bad_request(detail, "ids")));
    if wanted.all {
        if !wanted.ids.is_empty() {
            return refused("either `ids` or `all`, not both");
        }
        return Ok(Targets::Everyone);
    }
    // Each once: a device that is named twice is woken once.
    let ids: BTreeSet<String> = wanted.ids.into_iter().filter(|id| !id.is_empty()).collect();
    match ids.len() {
        0 => refused("name at least one enrollment, or say `\"all\": true`"),
        count if count > IDS => refused(&format!("at most {IDS} in a call")),
        _ => Ok(Targets::These(ids.into_iter().map(EnrollmentId::new).collect())),
    }
}

/// How far a push is, and who could not be woken for which reason.
pub async fn show(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response {
    match app.storage.mass_push(&TenantId::default(), &id).await {
        Ok(Some(push)) => {
            let mut document = document(&push);
            let failure = |failure: &MassPushFailure| serde_json::json!({ "reason": failure.reason, "count": failure.count, "ids": failure.ids });
            if let Some(document) = document.as_object_mut() {
                document.insert("failures".to_owned(), push.failures.iter().map(failure).collect());
            }
            Json(document).into_response()
        }
        Ok(None) => {
            let detail = "There is no push of this id; they are kept for a week.";
            problem::document(StatusCode::NOT_FOUND, "Not Found", detail, Some("id"))
        }
        Err(error) => unavailable(&error),
    }
}

/// The newest ones, without their failures.
pub async fn list(State(app): State<Arc<App>>) -> Response {
    match app.storage.recent_mass_pushes(&TenantId::default(), RECENT).await {
        Ok(pushes) => Json(serde_json::json!({ "pushes": pushes.iter().map(document).collect::<Vec<_>>() })).into_response(),
        Err(error) => unavailable(&error),
    }
}

/// A push that goes on.
pub(super) struct Begun {
    pub(super) id: String,
    pub(super) not_enrolled: Vec<EnrollmentId>,
    /// Why only a part of it does.
    pub(super) broke_off: Option<StorageError>,
}

/// Promises to wake all of them.
pub(super) async fn begin(app: &App, caller: Caller, targets: Targets) -> Result<Begun, StorageError> {
    let id = uuid::Uuid::new_v4().to_string();
    let push = NewMassPush {
        id: id.clone(),
        tenant: TenantId::default(),
        origin: format!("api:{}", caller.0),
        targets,
        per_second: app.push_rate.get(),
        now: app.clock.now(),
    };
    let storage = app.storage.clone();
    // A caller that goes away in the middle does not leave a part of the devices out.
    let storing = app.tracker.spawn(async move { storage.begin_mass_push(push).await });
    let BegunMassPush { nobody, broke_off } = storing.await.unwrap_or_else(|error| Err(StorageError::Unavailable { reason: error.to_string() }))?;
    info!(push.id = id, not_enrolled = nobody.len(), "Push {id} begins");
    Ok(Begun { id, not_enrolled: nobody, broke_off })
}

/// 202, and where to look.
pub(super) fn accepted(id: &str, mut response: Response) -> Response {
    *response.status_mut() = StatusCode::ACCEPTED;
    if let Ok(location) = HeaderValue::try_from(format!("/api/v1/pushes/{id}")) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    response
}

fn document(push: &MassPush) -> serde_json::Value {
    serde_json::json!({
        "id": push.id,
        "origin": push.origin,
        "created_at": push.created_at.to_string(),
        "done": push.is_complete && push.waiting == 0,
        "targets": push.waiting + push.pushed + push.failed + push.unneeded,
        "waiting": push.waiting,
        "pushed": push.pushed,
        "unneeded": push.unneeded,
        "failed": push.failed,
        "updated_at": push.updated_at.map(|at| at.to_string()),
    })
}

/// A part of it goes on; under its id it can be asked after.
fn broken_off(id: &str, not_enrolled: &[EnrollmentId]) -> Response {
    let status = StatusCode::SERVICE_UNAVAILABLE;
    let detail = "The database became unavailable in the middle: the push goes on for those that were stored, and leaves out the others.";
    let body = serde_json::json!({
        "type": "about:blank", "title": "Service Unavailable", "status": status.as_u16(), "detail": detail, "id": id, "not_enrolled": not_enrolled
    });
    let mut response = accepted(id, Json(body).into_response());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    response
}

fn bad_request(detail: &str, field: &str) -> Response {
    problem::document(StatusCode::BAD_REQUEST, "Bad Request", detail, Some(field))
}

fn unavailable(error: &StorageError) -> Response {
    warn!("Pushes could not be served: {error}");
    problem::unavailable("the database", RETRY_AFTER)
}
