//! `/authproxy/…`: what devices fetch from another server with their MDM identity.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{ConnectInfo, Request, State};
use axum::http::{Method, StatusCode};
use axum::response::Response;
use tracing::{debug, info};
use wasmdm_protocol::relative_path::RelativePath;
use wasmdm_service::auth_proxy::enrollment_of;
use wasmdm_service::reply::{RETRY_AFTER, Refusal};

use super::body::{self, REPORT_LIMIT};
use super::identity::Identity;
use super::{App, device, problem};
use crate::auth_proxy::{Asked, AuthProxy, Unanswered};

/// The prefix that is taken off.
pub const PREFIX: &str = "/authproxy/";

enum Answer {
    Refused(Refusal),
    Body(body::BodyError),
    Unanswered(Unanswered),
}

impl From<Refusal> for Answer {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// Identity and chain as at `/mdm`, then the certificate's enrollment, then the other server.
pub async fn forward(State(app): State<Arc<App>>, ConnectInfo(peer): ConnectInfo<SocketAddr>, request: Request) -> Response {
    let Some(proxy) = &app.auth_proxy else { return problem::not_found().await };
    if matches!(*request.method(), Method::CONNECT | Method::TRACE) {
        return problem::plain(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed");
    }
    let id = device::request_id();
    let answer = answer(&app, proxy, &id, peer, request).await;
    let refused = |label, response: Response, why: &dyn std::fmt::Display| {
        info!(request.id = id, peer = %peer.ip(), status = response.status().as_u16(), "A request to the authentication proxy was refused: {why}");
        (label, response)
    };
    let (label, response) = match answer {
        Ok(response) => {
            debug!(request.id = id, status = response.status().as_u16(), "A request was handed on by the authentication proxy");
            ("ok", response)
        }
        Err(Answer::Refused(refusal)) => refused(device::refusal_label(&refusal), problem::refusal(&refusal), &refusal),
        Err(Answer::Body(error)) => refused("body", error.response(), &error),
        Err(Answer::Unanswered(error @ Unanswered::Busy)) => refused("unavailable", problem::unavailable("try again later", RETRY_AFTER), &error),
        Err(Answer::Unanswered(error @ Unanswered::Failed(_))) => refused("failed", problem::plain(StatusCode::BAD_GATEWAY, "Bad Gateway"), &error),
    };
    metrics::counter!("wasmdm_auth_proxy_requests_total", "outcome" => label).increment(1);
    response
}

async fn answer(app: &App, proxy: &AuthProxy, id: &str, peer: SocketAddr, request: Request) -> Result<Response, Answer> {
    let (head, request_body) = request.into_parts();
    let presented = match device::presented(app, &head.headers, peer.ip()) {
        Ok(presented) => presented,
        Err(refusal) => {
            body::discard(&app.budget, &head.headers, request_body, REPORT_LIMIT).await.map_err(Answer::Body)?;
            return Err(refusal.into());
        }
    };
    // Held, not streamed: a signature covers all of it, and nothing goes on before it is verified.
    let held = body::read_of(&app.budget, &presented.certificate().sha256, &head.headers, request_body, REPORT_LIMIT)
        .await
        .map_err(|refused| Answer::Body(refused.drain(&app.budget)))?;
    let bytes = held.bytes.clone();
    let certificate = if bytes.len() > device::LARGE {
        tokio::task::spawn_blocking(move || Identity::identify(presented, &bytes))
            .await
            .map_err(|_| Refusal::unavailable("a large body could not be verified"))??
    } else {
        Identity::identify(presented, &bytes)?
    };
    let record = enrollment_of(&app.storage, &certificate, app.clock.now()).await?;
    let rest = head.uri.path().strip_prefix(PREFIX).unwrap_or_default();
    let path = RelativePath::parse(rest).map_err(|error| Refusal::bad_request(error.to_string()))?;
    app.storage.touch(&record.id, app.clock.now());
    let asked = Asked {
        method: head.method,
        path,
        query: head.uri.query().map(str::to_owned),
        headers: head.headers,
        body: held.bytes.clone(),
        peer: peer.ip(),
        enrollment: record.id,
        request_id: id.to_owned(),
    };
    proxy.forward(asked).await.map_err(Answer::Unanswered)
}
