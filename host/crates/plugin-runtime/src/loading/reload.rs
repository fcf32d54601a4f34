//! Which plugins are there, which are active, and what to do when a file changes. One task owns all of this.
//!
//! Whatever happens (a file notification, the rescan every 10 s, SIGHUP, the API) leads to the same look at both directories; a plugin whose
//! files differ from what was last read gets a job, at most one at a time. Jobs run apart; the swap is made here.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use parking_lot::RwLock;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};
use wasmdm_protocol::time::Timestamp;
use wasmdm_service::clock::Clock;

use crate::effective::{Mode, OnFailure};
use crate::hook::Hook;
use crate::registry::{CurrentRegistry, Entry, Missing, Registry};

use super::candidate::{Discovery, Found, GrantFile, Look, Rejection, Stage, discover, look};
use super::compile::blocking;
use super::kept::KeptState;
use super::loader::{Finished, Job, KeptLoad, Loader, Report, Version};
use super::status::{CandidateState, CandidateStatus, PluginStatus, ReloadOutcome, ReloadResult, Source, State, grants_of, limits_of};

/// Notifications are silent on network file systems and when a link is swapped.
const RESCAN: Duration = Duration::from_secs(10);
/// A directory that is replaced by removing and making it anew is not a removed one.
const GRACE: Duration = Duration::from_secs(2);
/// Looks are at least this far apart, however many notifications come.
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);
/// Looks that nobody asked for are at least this far apart.
const BETWEEN_WAKES: Duration = Duration::from_millis(200);
/// First and longest pause before a candidate that failed through no fault of its own is tried again.
const RETRY: (Duration, Duration) = (Duration::from_secs(5), Duration::from_mins(10));
/// How long a removed plugin's subscription keeps its events.
const KEEP_SUBSCRIPTION: Duration = Duration::from_hours(72);
/// Requests to reload that may wait.
pub(super) const WAITING_RELOADS: usize = 64;

/// A request to reload.
#[derive(Debug)]
pub(super) struct Reload {
    /// `None`: all.
    pub(super) name: Option<String>,
    pub(super) force: bool,
    /// Gets one receiver for each plugin concerned.
    pub(super) reply: oneshot::Sender<Vec<oneshot::Receiver<ReloadOutcome>>>,
}

/// What everybody may read.
#[derive(Debug)]
pub(super) struct Shown {
    pub(super) registry: CurrentRegistry,
    pub(super) statuses: RwLock<BTreeMap<String, PluginStatus>>,
    /// Goes up with every change of a status.
    pub(super) changed: watch::Sender<u64>,
    /// The first look is over, and everything that it found was tried.
    pub(super) settled: watch::Sender<bool>,
}

/// The one owner of what is loaded.
#[derive(Debug)]
pub(super) struct Coordinator {
    loader: Arc<Loader>,
    shown: Arc<Shown>,
    clock: Arc<dyn Clock>,
    tracker: TaskTracker,
    slots: BTreeMap<String, Slot>,
    /// Entries of the directory that can be no plugin, since when, and why.
    refused: BTreeMap<String, (Timestamp, String)>,
    reports: (mpsc::Sender<Report>, mpsc::Receiver<Report>),
    last_look: Option<Instant>,
    /// A notification came right after a look: look again then.
    look_at: Option<Instant>,
    /// The plugin directory could not be read at the last look.
    unreadable: Option<String>,
    /// Kept versions that are still being loaded.
    kept_loads: JoinSet<KeptLoaded>,
}

/// A kept version, and what came of loading it.
#[derive(Debug)]
struct KeptLoaded {
    name: String,
    version: String,
    digest: String,
    outcome: Result<KeptLoad, Rejection>,
}

/// One name.
#[derive(Debug)]
struct Slot {
    found: Option<Found>,
    look: Option<Look>,
    active: Option<Version>,
    source: Source,
    grant: GrantState,
    /// Hooks of the candidate, as far as they are known.
    hooks: Option<BTreeSet<Hook>>,
    /// The service types of its `token-source`, of the candidate and of what was active; `None`: unknown.
    token_services: Option<BTreeSet<String>>,
    /// It was active in this data directory and not removed since, with these hooks.
    kept_hooks: Option<BTreeSet<Hook>>,
    candidate: Option<CandidateStatus>,
    rejected: Option<[u8; 32]>,
    retry: Option<Retry>,
    absent_since: Option<Instant>,
    running: Option<Running>,
    /// To start when the running job ends.
    next: Option<Running>,
    state: State,
    since: Timestamp,
}

/// What is known of the grant file.
#[derive(Debug)]
enum GrantState {
    /// Not read yet; `true`: there is a file.
    Unread(bool),
    Read(Box<GrantFile>),
    Unreadable,
}

#[derive(Debug, Clone, Copy)]
struct Retry {
    at: Instant,
    pause: Duration,
}

/// A job, under way or wanted.
#[derive(Debug, Default)]
struct Running {
    immediate: bool,
    force: bool,
    waiting: Vec<Waiting>,
    /// Ends the wait until the files are stable.
    hurry: CancellationToken,
}

/// Somebody who asked for a reload.
#[derive(Debug)]
struct Waiting {
    reply: oneshot::Sender<ReloadOutcome>,
    /// Active when it was asked.
    generation: Option<u64>,
}

impl Slot {
    fn new(now: Timestamp) -> Self {
        Self {
            found: None,
            look: None,
            active: None,
            source: Source::Directory,
            grant: GrantState::Unread(false),
            hooks: None,
            token_services: None,
            kept_hooks: None,
            candidate: None,
            rejected: None,
            retry: None,
            absent_since: None,
            running: None,
            next: None,
            state: State::Pending,
            since: now,
        }
    }

    fn disabled(&self) -> bool {
        matches!(&self.grant, GrantState::Read(file) if !file.grant.is_active())
    }

    /// Hooks that would refuse, or not, while the plugin is not there.
    fn guarded(&self) -> BTreeMap<Hook, OnFailure> {
        // Of a plugin of which nothing is known it must be assumed that it guards a door.
        let known = self.hooks.clone().or_else(|| self.kept_hooks.clone());
        let assumed = known.is_none();
        let mut hooks = known.unwrap_or_else(Hook::guards);
        hooks.extend(self.kept_hooks.iter().flatten());
        let grant = if let GrantState::Read(file) = &self.grant { Some(&file.grant) } else { None };
        let enforced =
            grant.is_none_or(|grant| grant.mode == Mode::Enforce || grant.overlays.values().any(|overlay| overlay.mode == Some(Mode::Enforce)));
        let policy = |hook: Hook| grant.and_then(|grant| grant.on_failure.get(&hook)).copied().unwrap_or(hook.default_on_failure());
        // An answer is given in every mode; but where the operator lets devices in without the plugin, nothing is assumed of it.
        let open = !enforced || policy(Hook::EnrollmentPolicy) == OnFailure::Open;
        let guards = |hook: &Hook| if hook.is_answer() { !(assumed && open) } else { hook.is_decision() && enforced };
        hooks.into_iter().filter(guards).map(|hook| (hook, policy(hook))).collect()
    }

    fn guards(&self) -> bool {
        self.guarded().values().any(|policy| *policy == OnFailure::Closed)
    }

    /// Whether it must be active.
    fn required(&self) -> bool {
        match &self.grant {
            GrantState::Read(file) if file.text.is_some() => file.grant.is_active() && (file.grant.required || self.guards()),
            // What the operator wrote is not known, or cannot be read: assume that the plugin is wanted.
            GrantState::Unreadable | GrantState::Unread(true) => self.guards(),
            GrantState::Read(_) | GrantState::Unread(false) => self.kept_hooks.is_some() && self.guards(),
        }
    }

    fn state(&self) -> State {
        if self.disabled() {
            State::Disabled
        } else if self.active.is_some() {
            State::Active
        } else if self.required() {
            State::RequiredMissing
        } else if self.candidate.as_ref().is_some_and(|candidate| candidate.state == CandidateState::Rejected) {
            State::Rejected
        } else {
            State::Pending
        }
    }

    fn secrets(&self) -> BTreeSet<PathBuf> {
        match &self.grant {
            GrantState::Read(file) => file.grant.secret_files().into_iter().map(Path::to_owned).collect(),
            _ => BTreeSet::new(),
        }
    }

    fn missing(&self, name: &str) -> Missing {
        let reason = match &self.candidate {
            Some(CandidateStatus { reason: Some(reason), .. }) => format!("plugin `{name}` is required and not active: {reason}"),
            _ => format!("plugin `{name}` is required and not active yet"),
        };
        let grant = if let GrantState::Read(file) = &self.grant { Some(&file.grant) } else { None };
        Missing {
            name: name.to_owned(),
            order: grant.map_or(100, |grant| grant.order),
            hooks: self.guarded(),
            token_services: self.token_services.clone(),
            tenants: grant.and_then(|grant| grant.tenants.clone()),
            reason,
        }
    }

    fn warnings(&self) -> Vec<String> {
        self.active.as_ref().map(|version| version.warnings.clone()).unwrap_or_default()
    }
}

impl Coordinator {
    pub(super) fn new(loader: Arc<Loader>, shown: Arc<Shown>, clock: Arc<dyn Clock>, tracker: TaskTracker) -> Self {
        Self {
            loader,
            shown,
            clock,
            tracker,
            slots: BTreeMap::new(),
            refused: BTreeMap::new(),
            reports: mpsc::channel(64),
            last_look: None,
            look_at: None,
            unreadable: None,
            kept_loads: JoinSet::new(),
        }
    }

    /// Before the first request: what was active and what is granted is known, and closed. Then the kept versions are loaded, for at most
    /// `within`; a later one becomes active when it is there, if its plugin was not activated, disabled or removed meanwhile.
    ///
    /// An error if it cannot be known what was active or what is granted: a server that started all the same would leave doors open.
    pub(super) async fn load_kept(&mut self, within: Duration) -> io::Result<()> {
        let now = self.clock.now();
        let kept = self.loader.kept.load()?;
        for name in discover(None, &self.loader.grants_dir)?.granted {
            self.slots.entry(name).or_insert_with(|| Slot::new(now)).grant = GrantState::Unread(true);
        }
        for (name, state) in kept {
            match state {
                KeptState::Removed { hooks, token_services } => {
                    // What it guarded is still known, should its grant file be there.
                    if let Some(slot) = self.slots.get_mut(&name) {
                        (slot.hooks, slot.token_services) = (Some(hooks), token_services);
                    }
                }
                KeptState::Lost { hooks, token_services, reason } => {
                    let slot = self.slots.entry(name).or_insert_with(|| Slot::new(now));
                    (slot.kept_hooks, slot.token_services) = (Some(hooks), token_services);
                    slot.candidate = Some(rejected_candidate(&Rejection::new(Stage::Found, reason), None, None, now));
                }
                KeptState::Whole(version) => {
                    let slot = self.slots.entry(name.clone()).or_insert_with(|| Slot::new(now));
                    slot.kept_hooks = Some(version.hooks.clone());
                    slot.token_services = Some(version.manifest.hooks.token_services());
                    self.loader.claim_kept(&name, &version);
                    self.loader.generation.fetch_max(version.generation, Ordering::Relaxed);
                    self.loader.awaited.lock().await.insert(name.clone());
                    let loader = Arc::clone(&self.loader);
                    self.kept_loads.spawn(async move {
                        let outcome = Box::pin(loader.load_kept(&name, &version)).await;
                        KeptLoaded { name, version: version.manifest.version.to_string(), digest: version.digest.clone(), outcome }
                    });
                }
            }
        }
        self.publish();
        let until = Instant::now() + within;
        while let Ok(Some(loaded)) = tokio::time::timeout_at(until, self.kept_loads.join_next()).await {
            self.take_kept(loaded.ok()).await;
        }
        if !self.kept_loads.is_empty() {
            warn!("Not all kept versions of plugins were loaded within {within:?}: closed hooks refuse until they are");
        }
        Ok(())
    }

    async fn take_kept(&mut self, loaded: Option<KeptLoaded>) {
        let now = self.clock.now();
        let Some(KeptLoaded { name, version, digest, outcome }) = loaded else { return };
        // Meanwhile the directory may have given another one, or the operator may have removed it or switched it off.
        if !self.loader.awaited.lock().await.remove(&name) {
            return;
        }
        let Some(slot) = self.slots.get_mut(&name) else { return };
        match outcome {
            Ok(KeptLoad::Active(version)) => {
                info!(plugin = %name, digest = version.digest(), "Plugin {name} {} is active, as it was kept", version.manifest.version);
                slot.grant = GrantState::Read(Box::new(version.grant.clone()));
                slot.source = Source::Kept;
                slot.active = Some(*version);
                // Whatever was read meanwhile was judged without it: its grants may have changed since it read them.
                slot.look = None;
                if slot.running.is_some() {
                    slot.next.get_or_insert_default();
                }
                if self.last_look.is_some() {
                    self.look_at = Some(Instant::now());
                }
            }
            Ok(KeptLoad::Disabled(grant)) => slot.grant = GrantState::Read(grant),
            Err(rejection) => {
                warn!(plugin = %name, stage = rejection.stage.as_str(), "Plugin {name}: its kept version is not loaded: {rejection}");
                slot.candidate = Some(rejected_candidate(&rejection, Some(version), Some(digest), now));
            }
        }
        self.publish();
    }

    /// Looks, loads and swaps until shutdown.
    pub(super) async fn run(mut self, look_now: Arc<Notify>, mut reloads: mpsc::Receiver<Reload>, shutdown: CancellationToken) {
        let mut watcher = FileWatcher::new(Arc::clone(&look_now));
        let mut rescan = tokio::time::interval(RESCAN);
        rescan.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let wake = self.next_wake();
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = rescan.tick() => {
                    watcher.watch(self.loader.plugins_dir.as_deref());
                    watcher.watch(Some(&self.loader.grants_dir));
                    self.scan().await;
                    self.end_old_subscriptions().await;
                }
                () = look_now.notified() => {
                    match self.last_look.map(|last| last + BETWEEN_LOOKS).filter(|at| *at > Instant::now()) {
                        Some(later) => self.look_at = Some(later),
                        None => self.scan().await,
                    }
                }
                () = tokio::time::sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => self.scan().await,
                Some(reload) = reloads.recv() => self.reload(reload).await,
                Some(report) = self.reports.1.recv() => self.finish(report).await,
                Some(loaded) = self.kept_loads.join_next(), if !self.kept_loads.is_empty() => self.take_kept(loaded.ok()).await,
            }
            let busy = !self.kept_loads.is_empty() || self.slots.values().any(|slot| slot.running.is_some());
            if !*self.shown.settled.borrow() && self.last_look.is_some() && !busy {
                self.shown.settled.send_replace(true);
            }
        }
    }

    /// When something is due without a notification.
    fn next_wake(&self) -> Option<Instant> {
        let removals = self.slots.values().filter_map(|slot| slot.absent_since.map(|since| since + GRACE));
        let retries = self.slots.values().filter(|slot| slot.running.is_none()).filter_map(|slot| slot.retry.map(|retry| retry.at));
        // However overdue it is: a directory that cannot be read must not be looked at without end.
        let earliest = self.last_look.map(|last| last + BETWEEN_WAKES);
        let due = removals.chain(retries).min().map(|wake| earliest.map_or(wake, |earliest| wake.max(earliest)));
        due.into_iter().chain(self.look_at).min()
    }

    /// Looks at both directories, and starts a job for every plugin that is not as it was last read.
    async fn scan(&mut self) {
        let (plugins_dir, grants_dir) = (self.loader.plugins_dir.clone(), self.loader.grants_dir.clone());
        let secrets: BTreeMap<_, _> = self.slots.iter().map(|(name, slot)| (name.clone(), slot.secrets())).collect();
        let looked = blocking(move || looks(plugins_dir.as_deref(), &grants_dir, &secrets)).await;
        (self.last_look, self.look_at) = (Some(Instant::now()), None);
        let (discovery, mut looks) = match looked.and_then(|looked| looked.map_err(|error| error.to_string())) {
            Ok(looked) => {
                self.unreadable = None;
                looked
            }
            Err(problem) => {
                // Not the same as an empty directory: whatever is active stays.
                if self.unreadable.as_ref() != Some(&problem) {
                    warn!("The plugin directory cannot be read, so nothing changes: {problem}");
                    self.unreadable = Some(problem);
                }
                return;
            }
        };
        let now = self.clock.now();
        self.note_refused(&discovery, now);
        let names: BTreeSet<String> = discovery.plugins.keys().chain(&discovery.granted).chain(self.slots.keys()).cloned().collect();
        for name in names {
            let look = looks.remove(&name).unwrap_or_default();
            self.consider(&name, discovery.plugins.get(&name), discovery.granted.contains(&name), look, now).await;
        }
        self.publish();
    }

    fn note_refused(&mut self, discovery: &Discovery, now: Timestamp) {
        self.refused.retain(|name, _| discovery.refused.contains_key(name));
        for (name, reason) in &discovery.refused {
            self.refused.entry(name.clone()).or_insert_with(|| {
                warn!(plugin = %name, stage = "found", "{name} is not loaded: {reason}");
                count(name, Stage::Found, ReloadResult::Rejected);
                (now, reason.clone())
            });
        }
    }

    async fn consider(&mut self, name: &str, found: Option<&Found>, granted: bool, look: Look, now: Timestamp) {
        let slot = self.slots.entry(name.to_owned()).or_insert_with(|| Slot::new(now));
        if let GrantState::Unread(there) = &mut slot.grant {
            *there = granted;
        }
        let was_there = slot.found.is_some() || slot.active.is_some() || slot.kept_hooks.is_some();
        if found.is_none() && was_there {
            let since = *slot.absent_since.get_or_insert_with(Instant::now);
            if since.elapsed() < GRACE {
                return;
            }
            self.remove(name).await;
        }
        let Some(slot) = self.slots.get_mut(name) else { return };
        slot.absent_since = None;
        if found.is_none() && !granted {
            if slot.running.is_none() {
                self.slots.remove(name);
            }
            return;
        }
        let changed = slot.found.as_ref() != found || slot.look.as_ref() != Some(&look);
        let due = slot.retry.is_some_and(|retry| retry.at <= Instant::now());
        slot.found = found.cloned();
        if (changed || due) && slot.running.is_none() {
            self.start(name, Running::default());
        }
    }

    /// A plugin whose directory is gone.
    async fn remove(&mut self, name: &str) {
        let hooks = self.slots.get(name).and_then(|slot| slot.kept_hooks.clone().or_else(|| slot.hooks.clone())).unwrap_or_default();
        let token_services = self.slots.get(name).and_then(|slot| slot.token_services.clone());
        self.loader.remove(name, hooks.clone(), token_services).await;
        self.retry_soon();
        let Some(slot) = self.slots.get_mut(name) else { return };
        if slot.active.take().is_some() {
            info!(plugin = %name, "Plugin {name} was removed and is no longer asked; its events are kept for {} h", KEEP_SUBSCRIPTION.as_secs() / 3600);
        }
        (slot.found, slot.look, slot.kept_hooks, slot.candidate, slot.rejected, slot.retry) = (None, None, None, None, None, None);
        // Should its grant file stay, it is known what is missing.
        slot.hooks = Some(hooks).filter(|hooks| !hooks.is_empty());
    }

    /// If a plugin gave up what only one can have: what could not be loaded because of it may be now.
    fn retry_soon(&mut self) {
        if !self.loader.released.swap(false, Ordering::Relaxed) {
            return;
        }
        for slot in self.slots.values_mut() {
            if let Some(retry) = &mut slot.retry {
                retry.at = retry.at.min(Instant::now());
            }
        }
    }

    fn start(&mut self, name: &str, running: Running) {
        let now = self.clock.now();
        let Some(slot) = self.slots.get_mut(name) else { return };
        let job = Job {
            name: name.to_owned(),
            found: slot.found.clone(),
            active: slot.active.clone(),
            rejected: slot.rejected,
            secrets: slot.secrets(),
            immediate: running.immediate,
            hurry: running.hurry.clone(),
            force: running.force,
        };
        if slot.active.is_none() && slot.candidate.is_none() {
            slot.candidate =
                Some(CandidateStatus { state: CandidateState::Loading, stage: None, reason: None, version: None, digest: None, since: now });
        }
        slot.running = Some(running);
        let (loader, reports) = (Arc::clone(&self.loader), self.reports.0.clone());
        self.tracker.spawn(async move {
            let report = Box::pin(loader.run(job)).await;
            // Nobody reads it when the server stops.
            drop(reports.send(report).await);
        });
    }

    async fn reload(&mut self, reload: Reload) {
        self.scan().await;
        let mut outcomes = Vec::new();
        let names: Vec<String> = match &reload.name {
            Some(name) => self.slots.keys().filter(|slot| *slot == name).cloned().collect(),
            None => self.slots.keys().cloned().collect(),
        };
        for name in names {
            let Some(slot) = self.slots.get_mut(&name) else { continue };
            let (sender, receiver) = oneshot::channel();
            outcomes.push(receiver);
            let mut wanted = slot.next.take().unwrap_or_default();
            wanted.immediate = true;
            wanted.force |= reload.force;
            let generation = slot.active.as_ref().map(|version| version.plugin.identity().generation);
            wanted.waiting.push(Waiting { reply: sender, generation });
            if let Some(running) = &slot.running {
                running.hurry.cancel();
                slot.next = Some(wanted);
            } else {
                self.start(&name, wanted);
            }
        }
        // The caller may have gone.
        drop(reload.reply.send(outcomes));
    }

    /// A job has ended: the swap, if there is one, and whatever was wanted meanwhile.
    async fn finish(&mut self, report: Report) {
        let name = report.name.clone();
        let now = self.clock.now();
        let Some(slot) = self.slots.get_mut(&name) else { return };
        let running = slot.running.take().unwrap_or_default();
        let stopped = matches!(report.finished, Finished::Stopped(_));
        let (result, rejection) = slot.take_in(report, now);
        let stage = rejection.as_ref().map_or(Stage::Active, |rejection| rejection.stage);
        let identity = slot.active.as_ref().map(|version| version.plugin.identity().clone());
        let outcome = ReloadOutcome {
            name: name.clone(),
            result,
            stage: rejection.as_ref().map(|rejection| rejection.stage),
            reason: rejection.as_ref().map(|rejection| rejection.reason.clone()),
            version: identity.as_ref().map(|identity| identity.version.clone()),
            digest: identity.as_ref().map(|identity| identity.digest.clone()),
            generation: identity.map(|identity| identity.generation),
        };
        let next = slot.next.take();
        self.retry_soon();
        self.publish();
        match (&result, &rejection) {
            (ReloadResult::Activated, _) => {
                count(&name, stage, result);
                let [version, digest] = [&outcome.version, &outcome.digest].map(|text| text.as_deref().unwrap_or_default());
                info!(plugin = %name, version, digest, generation = outcome.generation, "Plugin {name} {version} is active");
                let (loader, name) = (Arc::clone(&self.loader), name.clone());
                self.tracker.spawn(async move { loader.wake(&name).await });
            }
            (_, Some(rejection)) if stopped => {
                count(&name, stage, result);
                warn!(plugin = %name, stage = rejection.stage.as_str(), "Plugin {name} is stopped and no longer asked, because it is not trusted any more: {rejection}");
            }
            (_, Some(rejection)) => {
                count(&name, stage, result);
                warn!(plugin = %name, stage = rejection.stage.as_str(), "Plugin {name}: the new version is not loaded, at stage {}: {rejection}", rejection.stage.as_str());
            }
            (ReloadResult::Disabled, None) => count(&name, stage, result),
            _ => {}
        }
        match next {
            Some(next) => self.start(&name, next),
            // It may have changed while it was read.
            None => self.scan().await,
        }
        for Waiting { reply, generation } in running.waiting {
            let mut outcome = outcome.clone();
            // A notification was quicker than the request: what it activated is what was asked for.
            if outcome.result == ReloadResult::Unchanged && outcome.generation != generation {
                outcome.result = ReloadResult::Activated;
            }
            drop(reply.send(outcome));
        }
    }

    /// Swaps the registry and shows what is.
    fn publish(&mut self) {
        let now = self.clock.now();
        let mut entries = Vec::new();
        let mut statuses = BTreeMap::new();
        for (name, slot) in &mut self.slots {
            let state = slot.state();
            if state != slot.state {
                (slot.state, slot.since) = (state, now);
            }
            match (&slot.active, state) {
                (_, State::Disabled) => {}
                (Some(version), _) => entries.push(Entry::Active(Arc::clone(&version.plugin))),
                (None, State::RequiredMissing) => entries.push(Entry::Missing(slot.missing(name))),
                (None, _) => {}
            }
            metrics::gauge!("wasmdm_plugin_active", "plugin" => name.clone()).set(if state == State::Active { 1.0 } else { 0.0 });
            statuses.insert(name.clone(), status_of(name, slot));
        }
        for (name, (since, reason)) in &self.refused {
            statuses.entry(name.clone()).or_insert_with(|| refused_status(name, *since, reason));
        }
        self.shown.registry.swap(Registry::new(entries));
        *self.shown.statuses.write() = statuses;
        self.shown.changed.send_modify(|change| *change += 1);
    }

    /// Subscriptions of plugins that were removed long ago end: nobody will come for their events.
    async fn end_old_subscriptions(&self) {
        let kept = self.loader.kept.clone();
        // One that comes back just now is written before this, and not found, or after it.
        let _writing = self.loader.awaited.lock().await;
        let Ok(Ok(all)) = blocking(move || kept.load_removed()).await else { return };
        for (name, at) in all {
            if self.clock.now().since(at) < KEEP_SUBSCRIPTION || self.slots.get(&name).is_some_and(|slot| slot.active.is_some()) {
                continue;
            }
            if self.loader.unsubscribe(&name).await.is_ok() {
                info!(plugin = %name, "The events of plugin {name}, which was removed, are no longer kept");
                drop(self.loader.kept.forget(&name));
            }
        }
    }
}

impl Slot {
    /// Takes over what a job found. Answers the result, and the rejection if there is one that was not known.
    fn take_in(&mut self, report: Report, now: Timestamp) -> (ReloadResult, Option<Rejection>) {
        let Report { look, grant, version, digest, fingerprint, hooks, token_services, finished, name: _ } = report;
        self.look = Some(look);
        if let Some(services) = token_services {
            match &finished {
                Finished::Ready(_) => self.token_services = Some(services),
                // Until it is clear what becomes of it, it has what it had.
                _ => self.token_services.get_or_insert_default().extend(services),
            }
        }
        self.hooks = hooks.or_else(|| self.hooks.take());
        self.grant = match grant {
            Some(grant) => GrantState::Read(Box::new(grant)),
            None => GrantState::Unreadable,
        };
        match finished {
            Finished::Unchanged => {
                (self.candidate, self.rejected, self.retry, self.source) = (None, None, None, Source::Directory);
                (ReloadResult::Unchanged, None)
            }
            Finished::StillRejected => (ReloadResult::Rejected, None),
            Finished::Disabled => {
                (self.active, self.candidate, self.rejected, self.retry) = (None, None, None, None);
                (ReloadResult::Disabled, None)
            }
            Finished::Ready(version) => {
                self.kept_hooks = Some(version.plugin.hooks().clone());
                self.active = Some(*version);
                (self.candidate, self.rejected, self.retry, self.source) = (None, None, None, Source::Directory);
                (ReloadResult::Activated, None)
            }
            Finished::Regranted(active, rejection) => {
                self.active = Some(*active);
                self.reject(&rejection, version, digest, fingerprint, now);
                (ReloadResult::Rejected, Some(rejection))
            }
            Finished::Stopped(rejection) => {
                self.active = None;
                self.reject(&rejection, version, digest, fingerprint, now);
                (ReloadResult::Rejected, Some(rejection))
            }
            Finished::Rejected(rejection) => {
                self.reject(&rejection, version, digest, fingerprint, now);
                let absent = self.found.is_none() && self.active.is_none();
                (if absent { ReloadResult::Absent } else { ReloadResult::Rejected }, Some(rejection))
            }
        }
    }

    fn reject(&mut self, rejection: &Rejection, version: Option<String>, digest: Option<String>, fingerprint: Option<[u8; 32]>, now: Timestamp) {
        self.candidate = Some(rejected_candidate(rejection, version, digest, now));
        if rejection.transient {
            let pause = self.retry.map_or(RETRY.0, |retry| (retry.pause * 2).min(RETRY.1));
            self.retry = Some(Retry { at: Instant::now() + pause, pause });
            self.rejected = None;
        } else {
            (self.rejected, self.retry) = (fingerprint, None);
        }
    }
}

fn looks(
    plugins_dir: Option<&Path>,
    grants_dir: &Path,
    secrets: &BTreeMap<String, BTreeSet<PathBuf>>,
) -> io::Result<(Discovery, BTreeMap<String, Look>)> {
    let discovery = discover(plugins_dir, grants_dir)?;
    let names: BTreeSet<&String> = discovery.plugins.keys().chain(&discovery.granted).chain(secrets.keys()).collect();
    let none = BTreeSet::new();
    let looks = names
        .into_iter()
        .map(|name| (name.clone(), look(name, discovery.plugins.get(name), grants_dir, secrets.get(name).unwrap_or(&none))))
        .collect();
    Ok((discovery, looks))
}

fn rejected_candidate(rejection: &Rejection, version: Option<String>, digest: Option<String>, now: Timestamp) -> CandidateStatus {
    CandidateStatus {
        state: CandidateState::Rejected,
        stage: Some(rejection.stage),
        reason: Some(rejection.reason.clone()),
        version,
        digest,
        since: now,
    }
}

fn count(plugin: &str, stage: Stage, result: ReloadResult) {
    metrics::counter!("wasmdm_plugin_reloads_total", "plugin" => plugin.to_owned(), "stage" => stage.as_str(), "result" => result.as_str())
        .increment(1);
}

fn status_of(name: &str, slot: &Slot) -> PluginStatus {
    let identity = slot.active.as_ref().map(|version| version.plugin.identity());
    let effective = slot.active.as_ref().map(|version| version.plugin.effective());
    let hooks = match &slot.active {
        Some(version) => Some(version.plugin.hooks()),
        None => slot.hooks.as_ref().or(slot.kept_hooks.as_ref()),
    };
    let grant = if let GrantState::Read(file) = &slot.grant { Some(&file.grant) } else { None };
    let on_failure: BTreeMap<&str, &str> = match effective {
        Some(effective) => {
            hooks.into_iter().flatten().filter(|hook| hook.is_sync()).map(|hook| (hook.as_str(), effective.on_failure(*hook).as_str())).collect()
        }
        None => slot.guarded().into_iter().map(|(hook, policy)| (hook.as_str(), policy.as_str())).collect(),
    };
    PluginStatus {
        name: name.to_owned(),
        state: slot.state,
        required: slot.required(),
        version: identity.map(|identity| identity.version.clone()),
        digest: identity.map(|identity| identity.digest.clone()),
        generation: identity.map(|identity| identity.generation),
        since: slot.since,
        source: identity.map(|_| slot.source),
        mode: effective.map(|effective| effective.settings.mode.as_str()).or(grant.map(|grant| grant.mode.as_str())),
        order: effective.map(|effective| effective.order).or(grant.map(|grant| grant.order)),
        hooks: hooks.into_iter().flatten().map(|hook| hook.as_str()).collect(),
        token_services: effective.map(|effective| effective.token_services.clone()).or_else(|| slot.token_services.clone()).unwrap_or_default(),
        on_failure,
        grants: effective.map(grants_of),
        limits: effective.map(|effective| limits_of(&effective.settings.limits)),
        warnings: slot.warnings(),
        candidate: slot.candidate.clone(),
    }
}

fn refused_status(name: &str, since: Timestamp, reason: &str) -> PluginStatus {
    let rejection = Rejection::new(Stage::Found, reason);
    PluginStatus {
        name: name.to_owned(),
        state: State::Rejected,
        required: false,
        version: None,
        digest: None,
        generation: None,
        since,
        source: None,
        mode: None,
        order: None,
        hooks: Vec::new(),
        token_services: BTreeSet::new(),
        on_failure: BTreeMap::new(),
        grants: None,
        limits: None,
        warnings: Vec::new(),
        candidate: Some(rejected_candidate(&rejection, None, None, since)),
    }
}

/// File notifications that ask for a look.
struct FileWatcher {
    watcher: Option<RecommendedWatcher>,
    /// Watched directories with the inode that they had: one that was replaced is watched anew.
    watched: BTreeMap<PathBuf, super::files::FileStamp>,
}

impl FileWatcher {
    fn new(look_now: Arc<Notify>) -> Self {
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // An error may mean that notifications were lost: look.
            if event.map_or(true, |event| event.need_rescan() || asks_for_a_look(event.kind)) {
                look_now.notify_one();
            }
        });
        let watcher = watcher.inspect_err(|error| warn!("No file notifications, so plugins are looked for every {RESCAN:?}: {error}")).ok();
        Self { watcher, watched: BTreeMap::new() }
    }

    fn watch(&mut self, directory: Option<&Path>) {
        let (Some(watcher), Some(directory)) = (&mut self.watcher, directory) else { return };
        let Some(stamp) = super::files::stamp(directory) else { return };
        if self.watched.get(directory).is_some_and(|watched| watched.same_file(&stamp)) {
            return;
        }
        // Of a directory that is gone there is nothing to stop watching.
        drop(watcher.unwatch(directory));
        match watcher.watch(directory, RecursiveMode::Recursive) {
            Ok(()) => {
                self.watched.insert(directory.to_owned(), stamp);
            }
            Err(error) => warn!("No file notifications for {}, so it is looked at every {RESCAN:?}: {error}", directory.display()),
        }
    }
}

/// The server's own reads are notified too: looking because of them would never end.
fn asks_for_a_look(kind: EventKind) -> bool {
    !matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write))
}

#[cfg(test)]
mod tests {
    use super::*;
    use notify::event::{CreateKind, DataChange, ModifyKind, RenameMode};

    #[test]
    fn the_hosts_own_reads_ask_for_nothing() {
        for kind in [
            EventKind::Access(AccessKind::Open(AccessMode::Any)),
            EventKind::Access(AccessKind::Read),
            EventKind::Access(AccessKind::Close(AccessMode::Read)),
        ] {
            assert!(!asks_for_a_look(kind), "{kind:?}");
        }
        for kind in [
            EventKind::Access(AccessKind::Close(AccessMode::Write)),
            EventKind::Modify(ModifyKind::Data(DataChange::Any)),
            EventKind::Modify(ModifyKind::Name(RenameMode::To)),
            EventKind::Create(CreateKind::File),
        ] {
            assert!(asks_for_a_look(kind), "{kind:?}");
        }
    }
}
