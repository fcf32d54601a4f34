//! Every route on one page.

pub mod auth_proxy;
pub mod authorization;
pub mod body;
pub mod dead_letters;
pub mod device;
pub mod escrow_key;
pub mod health;
pub mod identity;
pub mod listener;
pub mod migration;
pub mod plugins;
pub mod problem;
pub mod push_certificates;
pub mod pushes;
pub mod v1;

use std::num::NonZeroU32;
use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{any, get, post};
use tokio_util::task::TaskTracker;
use wasmdm_plugin_runtime::loading::PluginHost;
use wasmdm_service::Service;
use wasmdm_service::clock::Clock;
use wasmdm_service::pusher::Pusher;
use wasmdm_storage::Storage;

use crate::auth_proxy::AuthProxy;
use crate::config::DevicePaths;
use crate::dump::Dump;
use crate::escrow_key::EscrowKeyUnlock;
use crate::http::authorization::ApiKey;
use crate::http::body::BodyBudget;
use crate::http::identity::Identity;

/// What handlers share.
#[derive(Debug)]
pub struct App {
    pub service: Arc<dyn Service>,
    pub storage: Storage,
    pub clock: Arc<dyn Clock>,
    pub pusher: Arc<dyn Pusher>,
    /// Devices that are woken in a second, by what goes on in the background.
    pub push_rate: NonZeroU32,
    /// For what must come to its end although whoever asked for it has gone.
    pub tracker: TaskTracker,
    pub plugins: Arc<PluginHost>,
    pub device_paths: DevicePaths,
    /// `None`: no authority is configured, devices are answered 503.
    pub identity: Option<Identity>,
    /// `None`: there is no server for devices to be handed to.
    pub auth_proxy: Option<AuthProxy>,
    /// `None`: messages are not shown to anybody.
    pub dump: Option<Dump>,
    pub escrow_key: EscrowKeyUnlock,
    pub api_key: ApiKey,
    /// Whether `/migration` is there.
    pub takes_migrations: bool,
    pub budget: BodyBudget,
    pub metrics: health::Metrics,
    /// Whether `/metrics` has an address of its own, and is not there where devices come.
    pub metrics_elsewhere: bool,
}

/// The whole server as a router.
pub fn router(app: Arc<App>) -> Router {
    let mut devices = Router::new();
    if app.device_paths != DevicePaths::Off {
        devices = devices.route("/mdm", any(device::mdm)).route("/checkin", any(device::check_in));
        if app.auth_proxy.is_some() {
            devices = devices.route("/authproxy/", any(auth_proxy::forward)).route("/authproxy/{*path}", any(auth_proxy::forward));
        }
    }
    // NanoMDM's and MicroMDM's paths, Basic authorization.
    let mut v1 = Router::new()
        .route("/v1/enqueue/", any(v1::no_ids))
        .route("/v1/enqueue/{*ids}", any(v1::enqueue))
        .route("/v1/push/", any(v1::no_ids))
        .route("/v1/push/{*ids}", any(v1::push))
        .route("/v1/pushcert", get(v1::push_certificate).put(v1::store_push_certificate).fallback(v1::method_not_allowed))
        .route("/v1/escrowkeyunlock", any(escrow_key::unlock));
    if app.takes_migrations {
        v1 = v1.route("/migration", any(migration::store));
    }
    let v1 = v1.route_layer(middleware::from_fn_with_state(Arc::clone(&app), authorization::basic));
    // Our own, Bearer or Basic authorization.
    let api = Router::new()
        .route("/api/v1/dead-letters", get(dead_letters::list))
        .route("/api/v1/dead-letters/replay", post(dead_letters::replay))
        .route("/api/v1/plugins", get(plugins::list))
        .route("/api/v1/plugins/reload", post(plugins::reload_all))
        .route("/api/v1/plugins/{name}", get(plugins::show))
        .route("/api/v1/plugins/{name}/reload", post(plugins::reload))
        .route("/api/v1/push-certificates", get(push_certificates::list))
        .route("/api/v1/pushes", get(pushes::list).post(pushes::create))
        .route("/api/v1/pushes/{id}", get(pushes::show))
        .route_layer(middleware::from_fn_with_state(Arc::clone(&app), authorization::bearer_or_basic));
    let mut open = Router::new().route("/version", any(v1::version)).route("/healthz", get(health::alive)).route("/readyz", get(health::ready));
    if !app.metrics_elsewhere {
        open = open.route("/metrics", get(health::metrics));
    }
    Router::new().merge(devices).merge(v1).merge(api).merge(open).fallback(problem::not_found).layer(middleware::from_fn(catch_panic)).with_state(app)
}

/// What stands at the address of `--metrics-listen`.
pub fn metrics_router(app: Arc<App>) -> Router {
    Router::new().route("/metrics", get(health::metrics)).fallback(problem::not_found).layer(middleware::from_fn(catch_panic)).with_state(app)
}

/// A panic is a defect, but neither an outage nor an answer that a device could misunderstand.
async fn catch_panic(request: Request, next: Next) -> Response {
    use futures_util::FutureExt as _;
    let path = request.uri().path().to_owned();
    match std::panic::AssertUnwindSafe(next.run(request)).catch_unwind().await {
        Ok(response) => response,
        Err(_) => {
            metrics::counter!("wasmdm_panics_total").increment(1);
            tracing::error!(path = path, "A request panicked; please report this");
            problem::unavailable("an internal error", wasmdm_service::reply::RETRY_AFTER)
        }
    }
}
