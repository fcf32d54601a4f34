//! `/healthz`, `/readyz`, `/metrics`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::Mutex;
use wasmdm_protocol::time::Timestamp;

use super::{App, problem};
use crate::config::DevicePaths;

/// For so long one look at the database does for everybody who asks.
const SNAPSHOT_AGE: Duration = Duration::from_secs(1);

/// What `/metrics` shows.
#[derive(Debug)]
pub struct Metrics {
    handle: PrometheusHandle,
    /// The last answer, and when it was made. Held while the next one is made: those who ask meanwhile wait for it and make none of their own.
    snapshot: Mutex<Option<(Timestamp, Bytes)>>,
    /// The reasons of failed pushes that were shown: one that is over must be seen to be.
    push_failures: parking_lot::Mutex<BTreeSet<String>>,
}

impl Metrics {
    /// Of everything that is counted in this process.
    pub fn new(handle: PrometheusHandle) -> Self {
        Self { handle, snapshot: Mutex::default(), push_failures: parking_lot::Mutex::default() }
    }

    fn tell_push_failures(&self, counts: Vec<(String, u32)>) {
        let mut codes = self.push_failures.lock();
        let counts: BTreeMap<String, u32> = counts.into_iter().collect();
        for code in codes.iter().filter(|code| !counts.contains_key(*code)) {
            metrics::gauge!("wasmdm_push_failing", "code" => code.clone()).set(0.0);
        }
        for (code, count) in &counts {
            metrics::gauge!("wasmdm_push_failing", "code" => code.clone()).set(f64::from(*count));
        }
        codes.extend(counts.into_keys());
    }
}

/// The process lives.
pub async fn alive() -> Response {
    problem::plain(StatusCode::OK, "ok")
}

/// Whether devices can be served; each reason against it on a line of its own.
pub async fn ready(State(app): State<Arc<App>>) -> Response {
    let mut reasons = Vec::new();
    if app.identity.is_none() && app.device_paths != DevicePaths::Off {
        reasons.push("no authority for device identities is configured: start with --ca FILE".to_owned());
    }
    if let Err(error) = app.storage.ping().await {
        reasons.push(error.to_string());
    }
    if let Err(plugins) = app.plugins.ready() {
        reasons.extend(plugins);
    }
    if reasons.is_empty() { problem::plain(StatusCode::OK, "ready") } else { problem::plain(StatusCode::SERVICE_UNAVAILABLE, &reasons.join("\n")) }
}

/// Prometheus' text format.
pub async fn metrics(State(app): State<Arc<App>>) -> Response {
    let now = app.clock.now();
    let mut snapshot = app.metrics.snapshot.lock().await;
    let fresh = snapshot.as_ref().filter(|(made, _)| now >= *made && now.since(*made) < SNAPSHOT_AGE);
    let text = match fresh {
        Some((_, text)) => text.clone(),
        None => {
            let text = Bytes::from(look(&app, now).await);
            *snapshot = Some((now, text.clone()));
            text
        }
    };
    ([(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"))], text).into_response()
}

/// Adds what stands in the database to what is counted here.
async fn look(app: &App, now: Timestamp) -> String {
    if let Ok((waiting, oldest)) = app.storage.outbox_lag(now).await {
        #[expect(clippy::cast_precision_loss, reason = "a gauge is a float; nobody waits 2^53 deliveries")]
        metrics::gauge!("wasmdm_outbox_waiting").set(waiting as f64);
        metrics::gauge!("wasmdm_outbox_oldest_seconds").set(oldest.as_secs_f64());
    }
    if let Ok(counts) = app.storage.count_enrollments().await {
        for (state, count) in counts {
            #[expect(clippy::cast_precision_loss, reason = "a gauge is a float; no fleet has 2^53 devices")]
            metrics::gauge!("wasmdm_enrollments", "state" => state).set(count as f64);
        }
    }
    if let Ok(counts) = app.storage.count_failing_pushes().await {
        app.metrics.tell_push_failures(counts);
    }
    if let Ok(ends) = app.storage.push_certificate_ends().await {
        for (topic, not_after) in ends {
            // Below zero when it is over.
            #[expect(clippy::cast_precision_loss, reason = "a gauge is a float; no certificate lives for 2^53 milliseconds")]
            let left = not_after.as_millis().saturating_sub(now.as_millis()) as f64 / 1000.0;
            metrics::gauge!("wasmdm_push_certificate_expires_seconds", "topic" => topic).set(left);
        }
    }
    app.metrics.handle.run_upkeep();
    app.metrics.handle.render()
}
