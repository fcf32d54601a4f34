//! `/migration`: check-ins of devices of another server, one a call, as NanoMDM's `nano2nano` sends them.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use tracing::warn;
use wasmdm_protocol::checkin::CheckInMessage;
use wasmdm_service::migration::migrate;
use wasmdm_service::reply::Refusal;

use super::authorization::Caller;
use super::body::{self, CHECK_IN_LIMIT};
use super::{App, problem};

/// 200 without a body, also for what was here already; else a sentence that says what to do.
pub async fn store(State(app): State<Arc<App>>, Extension(caller): Extension<Caller>, request: Request) -> Response {
    let (head, request_body) = request.into_parts();
    let held = match body::read(&app.budget, &head.headers, request_body, CHECK_IN_LIMIT).await {
        Ok(held) => held,
        Err(error) => return error.response(),
    };
    let outcome = match CheckInMessage::parse(held.bytes.clone()) {
        Ok(message) => migrate(&app.storage, message, &format!("api:{}", caller.0), app.clock.now()).await,
        Err(error) => Err(Refusal::bad_request(error.to_string())),
    };
    match outcome {
        Ok(()) => StatusCode::OK.into_response(),
        Err(refusal) => {
            warn!("A message was not migrated: {refusal}");
            match refusal {
                Refusal::Unavailable { retry_after, .. } => problem::unavailable("try again later", retry_after),
                other => problem::plain(StatusCode::BAD_REQUEST, &other.to_string()),
            }
        }
    }
}
