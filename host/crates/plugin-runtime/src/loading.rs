//! From files to plugins that are asked: found, checked, compiled, swapped in while requests run, and kept for the next start.
//!
//! [`PluginHost`] is the face of it. What an author writes is read by [`manifest`], what an operator writes by [`grant`], and what of both
//! is enforced by [`permissions`]. A candidate that fails at any stage leaves the active version serving; nothing here ever opens a door
//! that a plugin guarded. Start reading at `reload`, the one task that decides; `loader` has the stages.

mod candidate;
mod check;
mod compile;
mod cron;
mod document;
mod files;
pub mod grant;
mod kept;
mod loader;
pub mod manifest;
pub mod permissions;
mod reload;
pub mod status;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_service::clock::Clock;
use wasmdm_service::enrollment_policy::EnrollmentPolicy;
use wasmdm_service::subscriber::Subscriber;
use wasmdm_storage::Storage;

use crate::answers::PluginAnswers;
use crate::effective::Ceilings;
use crate::egress;
use crate::engine::{EngineError, Engines};
use crate::enrollment_policy::PluginEnrollmentPolicy;
use crate::events::PluginSubscriber;
use crate::registry::CurrentRegistry;
use crate::runtime::{Runtime, Services};

pub use candidate::{MAX_COMPONENT, Rejection, Stage};
pub use check::{CheckReport, check_file};
pub use compile::{CompilerCommand, compile_child_main};
pub use cron::{Schedules, run_cron};
pub use document::DocumentError;
pub use status::{PluginStatus, ReloadOutcome, ReloadResult, State};

use compile::Compiler;
use kept::KeptVersions;
use loader::Loader;
use permissions::Surroundings;
use reload::{Coordinator, Reload, Shown, WAITING_RELOADS};

/// Why plugins cannot be hosted at all. A plugin that fails is never among the reasons.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error("{}: {source}", path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("outbound requests of plugins are not possible: {0}")]
    Egress(String),
}

/// What plugins are hosted with.
#[derive(Debug)]
pub struct PluginHostOptions {
    /// `None`: there are no plugins.
    pub plugins_dir: Option<PathBuf>,
    pub grants_dir: PathBuf,
    /// Gets `plugins-active/`, `plugin-cache/` and `plugin-cache.key`.
    pub data_dir: PathBuf,
    pub compiler: CompilerCommand,
    pub storage: Storage,
    pub clock: Arc<dyn Clock>,
    pub ceilings: Ceilings,
    pub tenants: Vec<TenantId>,
    pub server_version: String,
    /// Everything that is spawned belongs to it.
    pub tracker: TaskTracker,
    pub shutdown: CancellationToken,
    /// Where this server listens: never reached by a plugin.
    pub own_addresses: Vec<SocketAddr>,
    /// How long a start waits for kept versions that must be compiled anew. Until they are there, closed hooks refuse.
    pub kept_load: Duration,
}

impl PluginHostOptions {
    /// The usual: one tenant, the documented ceilings, `plugins/` and `plugins.d/` in the data directory.
    pub fn new(data_dir: &Path, compiler: CompilerCommand, storage: Storage, clock: Arc<dyn Clock>) -> Self {
        Self {
            plugins_dir: Some(data_dir.join("plugins")),
            grants_dir: data_dir.join("plugins.d"),
            data_dir: data_dir.to_owned(),
            compiler,
            storage,
            clock,
            ceilings: Ceilings::default(),
            tenants: vec![TenantId::default()],
            server_version: manifest::SERVER_VERSION.to_owned(),
            tracker: TaskTracker::new(),
            shutdown: CancellationToken::new(),
            own_addresses: Vec::new(),
            kept_load: Duration::from_secs(20),
        }
    }
}

/// The plugins of a server.
#[derive(Debug)]
pub struct PluginHost {
    shown: Arc<Shown>,
    loader: Arc<Loader>,
    clock: Arc<dyn Clock>,
    look_now: Arc<Notify>,
    reloads: mpsc::Sender<Reload>,
}

impl PluginHost {
    /// Loads what was active before, and begins to look at the directories.
    ///
    /// When this returns, every hook that is known to be closed is guarded: by its kept version, or by refusing. What is new in the plugin
    /// directory becomes active in the background ([`Self::settled`]).
    pub async fn start(options: PluginHostOptions) -> Result<Arc<Self>, HostError> {
        let PluginHostOptions {
            plugins_dir,
            grants_dir,
            data_dir,
            compiler,
            storage,
            clock,
            ceilings,
            tenants,
            server_version,
            tracker,
            shutdown,
            own_addresses,
            kept_load,
        } = options;
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| HostError::Directory { path, source }
        };
        std::fs::create_dir_all(&data_dir).map_err(at(&data_dir))?;
        for directory in plugins_dir.iter().chain([&grants_dir]) {
            // One elsewhere that is not there may be a volume that is not mounted: it is not for the server to make.
            if directory.starts_with(&data_dir) {
                std::fs::create_dir_all(directory).map_err(at(directory))?;
            }
        }
        let engines = Engines::new()?;
        let egress = egress::Client::new().map_err(|error| HostError::Egress(error.message))?;
        let compiler = Compiler::new(compiler, &data_dir, &engines).map_err(at(&data_dir))?;
        let kept = KeptVersions::open(&data_dir).map_err(at(&data_dir))?;
        let runtime = Runtime::new(engines, Services { storage: Some(storage.clone()), clock: Arc::clone(&clock), egress, server_version })?;
        let loader = Arc::new(Loader {
            runtime,
            compiler,
            kept,
            storage: storage.clone(),
            schedules: Schedules::default(),
            plugins_dir,
            grants_dir,
            surroundings: Surroundings { ceilings, own_addresses },
            tenants,
            generation: AtomicU64::new(0),
            published: Mutex::default(),
            owners: Mutex::default(),
            released: AtomicBool::new(false),
            awaited: tokio::sync::Mutex::default(),
        });
        let shown = Arc::new(Shown {
            registry: CurrentRegistry::default(),
            statuses: RwLock::new(BTreeMap::new()),
            changed: watch::Sender::new(0),
            settled: watch::Sender::new(false),
        });
        let mut coordinator = Coordinator::new(Arc::clone(&loader), Arc::clone(&shown), Arc::clone(&clock), tracker.clone());
        coordinator.load_kept(kept_load).await.map_err(at(&data_dir))?;
        let look_now = Arc::new(Notify::new());
        let (reloads, waiting) = mpsc::channel(WAITING_RELOADS);
        tracker.spawn(coordinator.run(Arc::clone(&look_now), waiting, shutdown.clone()));
        tracker.spawn(run_cron(storage, Arc::clone(&clock), loader.schedules.clone(), shutdown));
        Ok(Arc::new(Self { shown, loader, clock, look_now, reloads }))
    }

    /// Asks for a look at the directories, and does not wait for it.
    pub fn rescan(&self) {
        self.look_now.notify_one();
    }

    /// Looks now, without waiting until files are stable, and answers what came of each plugin; `name`: of one. Empty: there is no such
    /// plugin, or the server stops. With `force` a lower version may replace a higher one.
    pub async fn reload(&self, name: Option<&str>, force: bool) -> Vec<ReloadOutcome> {
        let (reply, outcomes) = oneshot::channel();
        let reload = Reload { name: name.map(str::to_owned), force, reply };
        if self.reloads.send(reload).await.is_err() {
            return Vec::new();
        }
        let mut all = Vec::new();
        for outcome in outcomes.await.unwrap_or_default() {
            all.extend(outcome.await);
        }
        all
    }

    /// All plugins, by name.
    pub fn status(&self) -> Vec<PluginStatus> {
        self.shown.statuses.read().values().cloned().collect()
    }

    /// One plugin.
    pub fn plugin_status(&self, name: &str) -> Option<PluginStatus> {
        self.shown.statuses.read().get(name).cloned()
    }

    /// Whether every plugin that must be active is; otherwise a sentence about each that is not.
    pub fn ready(&self) -> Result<(), Vec<String>> {
        let missing: Vec<_> = self.shown.registry.snapshot().missing().map(|missing| missing.reason.clone()).collect();
        if missing.is_empty() { Ok(()) } else { Err(missing) }
    }

    /// Returns once the status of some plugin has changed after `seen`, with the number of the change: begin with 0. For those who wait for
    /// something to become active.
    pub async fn changed(&self, seen: u64) -> u64 {
        let mut changed = self.shown.changed.subscribe();
        // The sender lives as long as this host.
        changed.wait_for(|change| *change > seen).await.map_or(seen, |change| *change)
    }

    /// Returns once everything that lay in the directories at the start was tried, and every version that was kept.
    pub async fn settled(&self) {
        let mut settled = self.shown.settled.subscribe();
        drop(settled.wait_for(|settled| *settled).await);
    }

    /// Who decides about enrollments.
    pub fn policy(&self) -> Arc<dyn EnrollmentPolicy> {
        Arc::new(PluginEnrollmentPolicy::new(self.shown.registry.clone(), Arc::clone(&self.clock)))
    }

    /// Who answers the check-ins of which one plugin has the answer.
    pub fn answers(&self) -> Arc<PluginAnswers> {
        Arc::new(PluginAnswers::new(self.shown.registry.clone(), self.loader.storage.clone(), Arc::clone(&self.clock)))
    }

    /// Who gets the events of subscribers named `plugin:…`.
    pub fn subscriber(&self) -> Arc<dyn Subscriber> {
        Arc::new(PluginSubscriber::new(self.shown.registry.clone(), Arc::clone(&self.clock)))
    }

    /// The snapshot of the moment.
    pub fn registry(&self) -> &CurrentRegistry {
        &self.shown.registry
    }

    /// How many compiling processes were started since the start.
    pub fn compilations(&self) -> u64 {
        self.loader.compiler.started()
    }
}
