//! `/api/v1/plugins`: what is active, what was rejected and why, and reloading.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;

use super::{App, problem};

/// All plugins.
pub async fn list(State(app): State<Arc<App>>) -> Response {
    Json(serde_json::json!({ "plugins": app.plugins.status() })).into_response()
}

/// One plugin.
pub async fn show(State(app): State<Arc<App>>, Path(name): Path<String>) -> Response {
    match app.plugins.plugin_status(&name) {
        Some(status) => Json(status).into_response(),
        None => unknown(&name),
    }
}

/// `?force=true` lets an older version replace a newer one.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReloadOptions {
    #[serde(default)]
    force: bool,
}

/// Looks at the whole plugin directory now, and answers with what came of it.
pub async fn reload_all(State(app): State<Arc<App>>, Query(options): Query<ReloadOptions>) -> Response {
    Json(serde_json::json!({ "outcomes": app.plugins.reload(None, options.force).await })).into_response()
}

/// Looks at one plugin now.
pub async fn reload(State(app): State<Arc<App>>, Path(name): Path<String>, Query(options): Query<ReloadOptions>) -> Response {
    let outcomes = app.plugins.reload(Some(&name), options.force).await;
    if outcomes.is_empty() { unknown(&name) } else { Json(serde_json::json!({ "outcomes": outcomes })).into_response() }
}

fn unknown(name: &str) -> Response {
    problem::document(StatusCode::NOT_FOUND, "Not Found", &format!("there is no plugin `{}`", name.escape_default()), Some("name"))
}
