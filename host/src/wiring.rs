//! The one place that names every concrete type: from a configuration to a running server.

use std::fs;
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};
use wasmdm_apns::{Apns, ApnsOptions};
use wasmdm_plugin_runtime::loading::{CompilerCommand, PluginHost, PluginHostOptions};
use wasmdm_protocol::certificate::TrustAnchors;
use wasmdm_service::certificate_binding::CertificateBinding;
use wasmdm_service::clock::Clock;
use wasmdm_service::core::{Core, Options};
use wasmdm_service::declarative_management::DeclarativeManagement;
use wasmdm_service::outbox::Outbox;
use wasmdm_service::pusher::Pusher;
use wasmdm_service::return_to_service::ReturnToService;
use wasmdm_service::token_source::TokenSource;
use wasmdm_service::waker::Waker;
use wasmdm_storage::{OpenOptions, Storage};

use crate::apple_push::ApplePush;
use crate::auth_proxy::AuthProxy;
use crate::config::{ApiKeySource, Config, DevicePaths, IdentitySource};
use crate::declarative_proxy::DeclarativeProxy;
use crate::dump::Dump;
use crate::escrow_key::EscrowKeyUnlock;
use crate::http::authorization::ApiKey;
use crate::http::body::BodyBudget;
use crate::http::identity::{Identity, Source};
use crate::http::listener::Bounds;
use crate::http::{self, App};
use crate::observability;
use crate::push_certificate_expiry;
use crate::webhook::{self, Webhooks};

/// How long a stopping server waits for what is in flight.
const GRACE: Duration = Duration::from_secs(25);
/// Whoever looks after the server; nobody else is there.
const METRICS_CONNECTIONS: usize = 64;
/// How often expired commands are looked for.
const EXPIRY_LOOK: Duration = Duration::from_secs(5);

/// What differs between a server in production and one in a test.
#[derive(Debug)]
pub struct Surroundings {
    pub clock: Arc<dyn Clock>,
    /// Starts the process that compiles plugins.
    pub compiler: CompilerCommand,
    /// `None`: the server's own, which asks Apple's push service.
    pub pusher: Option<Arc<dyn Pusher>>,
}

/// A server that answers.
#[derive(Debug)]
pub struct RunningServer {
    /// The address it really listens on.
    pub address: SocketAddr,
    /// That of the metrics, where they have one.
    pub metrics_address: Option<SocketAddr>,
    pub plugins: Arc<PluginHost>,
    pub storage: Storage,
    apns: Apns,
    shutdown: CancellationToken,
    tracker: TaskTracker,
}

impl RunningServer {
    /// Opens everything and begins to listen.
    pub async fn start(config: Config, surroundings: Surroundings) -> anyhow::Result<Self> {
        let Surroundings { clock, compiler, pusher } = surroundings;
        fs::create_dir_all(&config.data).with_context(|| format!("data: {} cannot be made", config.data.display()))?;
        let metrics = observability::metrics_handle();
        let api_key = api_key(&config.api_key)?;
        let identity = match &config.authorities {
            None if config.device_paths == DevicePaths::Off => None,
            None => {
                warn!("No authority for device identities is configured: devices are answered 503. Start with --ca FILE.");
                None
            }
            Some(authorities) => {
                let anchors = TrustAnchors::from_pem(&authorities.roots, &authorities.intermediates).context("ca")?;
                Some(Identity::new(
                    anchors,
                    match config.identity.clone() {
                        IdentitySource::Signature => Source::Signature,
                        IdentitySource::Header { name, proxies } => Source::Header { name, proxies },
                    },
                    config.identity_grace,
                ))
            }
        };
        let options = OpenOptions { url: config.database.clone(), now: clock.now() };
        let storage = Storage::open_with_keys(options, config.keyring.clone()).await.context("database")?;
        // Bound before plugins are loaded, so that they can be kept from reaching the server through its own front door.
        let listener = TcpListener::bind(config.listen).await.with_context(|| format!("listen: {} is not to be had", config.listen))?;
        let address = listener.local_addr()?;
        let metrics_listener = match config.metrics_listen {
            Some(address) => Some(TcpListener::bind(address).await.with_context(|| format!("metrics-listen: {address} is not to be had"))?),
            None => None,
        };
        let metrics_address = metrics_listener.as_ref().map(TcpListener::local_addr).transpose()?;
        let (tracker, shutdown) = (TaskTracker::new(), CancellationToken::new());
        let plugins = PluginHost::start(PluginHostOptions {
            plugins_dir: Some(config.plugins.clone()),
            grants_dir: config.grants.clone(),
            server_version: crate::VERSION.to_owned(),
            tracker: tracker.clone(),
            shutdown: shutdown.clone(),
            own_addresses: [address].into_iter().chain(metrics_address).collect(),
            ..PluginHostOptions::new(&config.data, compiler, storage.clone(), Arc::clone(&clock))
        })
        .await
        .context("plugins")?;
        let options = ApnsOptions {
            endpoint: config.apns.endpoint.clone(),
            roots: config.apns.roots.clone(),
            proxy: config.apns.proxy.clone(),
            push_timeout: config.apns.limits.push,
            ..ApnsOptions::new(Arc::new(jitter))
        };
        let apns = Apns::new(options).context("apns")?;
        let pusher = pusher.unwrap_or_else(|| Arc::new(ApplePush::new(apns.clone(), storage.clone(), Arc::clone(&clock), config.apns.limits.call)));
        let declarative_management = match &config.declarative_proxy {
            Some(options) => Some(Arc::new(DeclarativeProxy::new(options)?) as Arc<dyn DeclarativeManagement>),
            None => None,
        };
        let certificate_header = match &config.identity {
            IdentitySource::Header { name, .. } => Some(name),
            IdentitySource::Signature => None,
        };
        let auth_proxy = config.auth_proxy.as_ref().map(|url| AuthProxy::new(url, certificate_header)).transpose()?;
        if config.takes_migrations {
            warn!("/migration is open: who has the API key can bring enrollments. Start without --migration when the move is over.");
        }
        let dump = match &config.dump {
            Some(target) => Some(Dump::start(target, &tracker, shutdown.clone()).await?),
            None => None,
        };
        let (poll_listener, polls) = Webhooks::polls(&config.webhooks);
        let answers = plugins.answers();
        let options = Options {
            declarative_management,
            poll_listener: Some(poll_listener),
            token_source: Some(Arc::clone(&answers) as Arc<dyn TokenSource>),
            return_to_service: Some(Arc::clone(&answers) as Arc<dyn ReturnToService>),
            user_authentication: Some(answers),
            zero_length_digest_challenge: config.zero_length_digest_challenge,
            re_enroll: config.re_enroll,
            certificates_may_be_shared: config.binding.only_warn,
        };
        let core = Core::new(storage.clone(), Arc::clone(&clock), plugins.policy(), options);
        let app = Arc::new(App {
            service: Arc::new(CertificateBinding::new(storage.clone(), Arc::clone(&clock), config.binding, Arc::new(core))),
            storage: storage.clone(),
            clock: Arc::clone(&clock),
            pusher: Arc::clone(&pusher),
            push_rate: config.push_rate,
            tracker: tracker.clone(),
            plugins: Arc::clone(&plugins),
            device_paths: config.device_paths,
            identity,
            auth_proxy,
            dump,
            escrow_key: EscrowKeyUnlock::new(config.escrow_key_unlock.clone()),
            api_key,
            takes_migrations: config.takes_migrations,
            budget: BodyBudget::new(tracker.clone()),
            metrics: http::health::Metrics::new(metrics.clone()),
            metrics_elsewhere: metrics_listener.is_some(),
        });
        let webhooks = Webhooks::new(&config.webhooks)?;
        webhooks.subscribe(&storage, &config.webhooks, clock.now()).await.context("webhook-url")?;
        tracker.spawn(webhooks.clone().tell_polls(polls, shutdown.clone()));
        let outbox = Outbox::new(
            storage.clone(),
            Arc::clone(&clock),
            Arc::clone(&pusher),
            vec![("plugin:", plugins.subscriber()), (webhook::PREFIX, Arc::new(webhooks))],
            format!("{}-{}", std::process::id(), uuid::Uuid::new_v4().simple()),
            Arc::new(jitter),
        );
        tracker.spawn(outbox.run(tracker.clone(), shutdown.clone()));
        let waker = Waker::new(storage.clone(), Arc::clone(&clock), pusher, config.push_rate);
        tracker.spawn(waker.run(tracker.clone(), shutdown.clone()));
        tracker.spawn(push_certificate_expiry::watch(storage.clone(), Arc::clone(&clock), shutdown.clone()));
        tracker.spawn(expire_commands(storage.clone(), clock, shutdown.clone()));
        tracker.spawn(keep_metrics_small(metrics, shutdown.clone()));
        if let (Some(listener), Some(address)) = (metrics_listener, metrics_address) {
            let bounds = Bounds::of(METRICS_CONNECTIONS, &[]);
            let router = http::metrics_router(Arc::clone(&app));
            tracker.spawn(http::listener::serve(listener, router, bounds, tracker.clone(), shutdown.clone()));
            info!(address = %address, "Metrics are at http://{address}/metrics");
        }
        let bounds = Bounds::of(config.max_connections, &config.trusted_proxies);
        tracker.spawn(http::listener::serve(listener, http::router(app), bounds, tracker.clone(), shutdown.clone()));
        info!(address = %address, version = crate::VERSION, "wasmdm listens on {address}");
        Ok(Self { address, metrics_address, plugins, storage, apns, shutdown, tracker })
    }

    /// Ends what is in flight in order, and closes the database.
    pub async fn stop(self) -> anyhow::Result<()> {
        self.shutdown.cancel();
        self.tracker.close();
        if tokio::time::timeout(GRACE, self.tracker.wait()).await.is_err() {
            warn!("Some work did not end within {GRACE:?}; it is made again after the next start");
        }
        // Nobody is left who would push.
        self.apns.close().await;
        self.storage.close().await.context("database")
    }
}

async fn expire_commands(storage: Storage, clock: Arc<dyn Clock>, shutdown: CancellationToken) {
    loop {
        if let Err(error) = storage.expire_commands(clock.now()).await {
            warn!("Expired commands could not be looked for: {error}");
        }
        tokio::select! {
            () = tokio::time::sleep(EXPIRY_LOOK) => {}
            () = shutdown.cancelled() => return,
        }
    }
}

/// Samples of histograms wait in memory until somebody asks for them, or this does.
async fn keep_metrics_small(metrics: PrometheusHandle, shutdown: CancellationToken) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(EXPIRY_LOOK) => metrics.run_upkeep(),
            () = shutdown.cancelled() => return,
        }
    }
}

fn jitter() -> f64 {
    let mut bytes = [0; 4];
    // Without randomness retries are merely less spread.
    let _ = aws_lc_rs::rand::fill(&mut bytes);
    f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX)
}

fn api_key(source: &ApiKeySource) -> anyhow::Result<ApiKey> {
    match source {
        ApiKeySource::Given(key) => Ok(ApiKey::new(key)),
        ApiKeySource::Kept(path) => kept_api_key(path).map(|key| ApiKey::new(&key)),
    }
}

/// The key in that file, made if there is none.
pub fn kept_api_key(path: &Path) -> anyhow::Result<String> {
    match fs::read_to_string(path) {
        Ok(key) if !key.trim().is_empty() => return Ok(key.trim().to_owned()),
        Ok(_) => anyhow::bail!("api-key: {} is empty: remove it, and a new key is made", path.display()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("api-key: {} cannot be read", path.display())),
    }
    let mut bytes = [0; 24];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| anyhow::anyhow!("api-key: no randomness is to be had"))?;
    let key = URL_SAFE_NO_PAD.encode(bytes);
    // Complete or not there: a half-written key would be a weak one.
    let unfinished = path.with_extension("new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
    writeln!(file, "{key}")?;
    file.sync_all()?;
    fs::rename(&unfinished, path)?;
    info!(file = %path.display(), "An API key was made; it stands in {}", path.display());
    Ok(key)
}
