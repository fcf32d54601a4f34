//! From a candidate's bytes to a version that can be asked: verified, inspected, compiled, linked, probed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_protocol::time::Timestamp;
use wasmdm_storage::audit::AuditRow;
use wasmdm_storage::outbox::Subscription;
use wasmdm_storage::{Storage, StorageError};
use wasmtime::component::Component;

use crate::effective::Effective;
use crate::hook::{Hook, Owned};
use crate::plugin::{LinkError, LinkedPlugin, PluginIdentity, link};
use crate::runtime::Runtime;

use super::candidate::{
    Candidate, Found, GrantFile, Look, PluginFiles, Rejection, Stage, fingerprint, grant_fingerprint, look, read_grant, signatures_required, verify,
};
use super::compile::{Compiler, blocking};
use super::cron;
use super::grant::{Grant, Secrets, read_secrets};
use super::kept::{Keep, Kept, KeptVersions};
use super::manifest::{EventFilter, Manifest};
use super::permissions::{Surroundings, effective, intersection};

/// Two looks this far apart must show the same.
const STABLE: Duration = Duration::from_millis(250);

/// Makes versions. Shared by all jobs.
#[derive(Debug)]
pub(super) struct Loader {
    pub(super) runtime: Arc<Runtime>,
    pub(super) compiler: Compiler,
    pub(super) kept: KeptVersions,
    pub(super) storage: Storage,
    pub(super) schedules: cron::Schedules,
    pub(super) plugins_dir: Option<PathBuf>,
    pub(super) grants_dir: PathBuf,
    pub(super) surroundings: Surroundings,
    pub(super) tenants: Vec<TenantId>,
    /// The last generation given to a version.
    pub(super) generation: AtomicU64,
    /// What is in the database already, by tenant and plugin.
    pub(super) published: Mutex<BTreeMap<(TenantId, String), Published>>,
    /// What only one plugin of a tenant can have, by plugin: it keeps it until it is removed or disabled.
    pub(super) owners: Mutex<BTreeMap<String, Claims>>,
    /// A plugin has given something of that up since the coordinator last looked.
    pub(super) released: AtomicBool,
    /// Plugins whose kept version is being loaded and may still become active. Who activates, removes or disables a plugin takes its name
    /// away, and the kept version comes too late. Locked while anything of a version is written, so that the last one to write is the one
    /// that counts.
    pub(super) awaited: tokio::sync::Mutex<BTreeSet<String>>,
}

/// Subscriptions and cron expressions.
type Published = (Vec<Subscription>, BTreeMap<String, String>);

type Claims = BTreeSet<(TenantId, Owned)>;

/// A version that can be asked.
#[derive(Debug, Clone)]
pub(super) struct Version {
    pub(super) plugin: Arc<LinkedPlugin>,
    pub(super) component: Component,
    pub(super) manifest: Manifest,
    pub(super) manifest_text: Option<String>,
    pub(super) grant: GrantFile,
    pub(super) fingerprint: [u8; 32],
    /// What the operator should know.
    pub(super) warnings: Vec<String>,
}

impl Version {
    pub(super) fn digest(&self) -> &str {
        &self.plugin.identity().digest
    }
}

/// What a job is to do.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) name: String,
    /// `None`: there is only a grant file.
    pub(super) found: Option<Found>,
    pub(super) active: Option<Version>,
    /// Of the candidate that was rejected last.
    pub(super) rejected: Option<[u8; 32]>,
    pub(super) secrets: BTreeSet<PathBuf>,
    /// Asked for by an operator: no waiting until it is stable, and rejected candidates are tried again.
    pub(super) immediate: bool,
    /// Makes it immediate while it waits.
    pub(super) hurry: CancellationToken,
    /// A lower version may replace a higher one.
    pub(super) force: bool,
}

/// What a job found.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) name: String,
    pub(super) look: Look,
    /// `None`: it cannot be read.
    pub(super) grant: Option<GrantFile>,
    /// Version and digest of the candidate, as far as they are known.
    pub(super) version: Option<String>,
    pub(super) digest: Option<String>,
    pub(super) fingerprint: Option<[u8; 32]>,
    /// Hooks that the plugin has, or says that it has; `None`: unknown.
    pub(super) hooks: Option<BTreeSet<Hook>>,
    /// The service types of its `token-source`; `None`: unknown.
    pub(super) token_services: Option<BTreeSet<String>>,
    pub(super) finished: Finished,
}

#[derive(Debug)]
pub(super) enum Finished {
    /// It is the active version.
    Unchanged,
    /// It is what was rejected before.
    StillRejected,
    Disabled,
    /// To be made active. Subscriptions, cron entries and the kept version are written.
    Ready(Box<Version>),
    /// The candidate was rejected, and the active version gets what the changed grants leave it.
    Regranted(Box<Version>, Rejection),
    /// The candidate was rejected, and the operator no longer trusts the active version: it must not be asked again.
    Stopped(Rejection),
    Rejected(Rejection),
}

impl Loader {
    /// Reads, checks and prepares; everything but the swap.
    pub(super) async fn run(self: &Arc<Self>, job: Job) -> Report {
        let mut report = Report {
            name: job.name.clone(),
            look: Look::new(),
            grant: None,
            version: None,
            digest: None,
            fingerprint: None,
            hooks: None,
            token_services: None,
            finished: Finished::Unchanged,
        };
        let candidate = self.read(&job, &mut report).await;
        if report.grant.as_ref().is_some_and(|file| !file.grant.is_active()) {
            report.finished = match self.disable(&job.name).await {
                Ok(()) => Finished::Disabled,
                Err(error) => Finished::Rejected(Rejection::transient(Stage::Active, error.to_string())),
            };
            return report;
        }
        let distrusted = distrusted(&job, report.grant.as_ref());
        report.finished = match (self.finish(&job, candidate, &mut report).await, distrusted) {
            (Ok(finished @ Finished::Ready(_)), _) | (Ok(finished), None) => finished,
            (Ok(_), Some(distrusted)) => Finished::Stopped(distrusted),
            (Err(rejection), Some(distrusted)) => Finished::Stopped(stopped(rejection, &distrusted)),
            (Err(rejection), None) => self.regrant(&job, &report, rejection).await,
        };
        report
    }

    /// Waits until the files are no longer written, and reads them.
    async fn read(self: &Arc<Self>, job: &Job, report: &mut Report) -> Result<Candidate, Rejection> {
        loop {
            let before = self.look(job).await?;
            if !job.immediate && job.hurry.run_until_cancelled(tokio::time::sleep(STABLE)).await.is_some() && self.look(job).await? != before {
                continue;
            }
            let (loader, name, found) = (Arc::clone(self), job.name.clone(), job.found.clone());
            let (candidate, declared, grant) = blocking(move || {
                let mut declared = None;
                let candidate = loader.read_files(&name, found.as_ref(), &mut declared);
                (candidate, declared, read_grant(&name, &loader.grants_dir))
            })
            .await
            .map_err(|problem| Rejection::transient(Stage::Found, problem))?;
            let after = self.look(job).await?;
            if !job.immediate && !job.hurry.is_cancelled() && after != before {
                continue;
            }
            report.look = after;
            report.hooks = declared.as_ref().and_then(declared_hooks);
            report.token_services = declared.as_ref().map(|manifest| manifest.hooks.token_services());
            report.version = declared.map(|manifest| manifest.version.to_string());
            report.digest = candidate.as_ref().ok().map(|candidate| candidate.digest.clone());
            let grant = report.grant.insert(grant?);
            let candidate = candidate?;
            report.fingerprint = Some(fingerprint(&candidate, grant));
            return Ok(candidate);
        }
    }

    async fn look(&self, job: &Job) -> Result<Look, Rejection> {
        let (name, found, grants_dir, secrets) = (job.name.clone(), job.found.clone(), self.grants_dir.clone(), job.secrets.clone());
        blocking(move || look(&name, found.as_ref(), &grants_dir, &secrets)).await.map_err(|problem| Rejection::transient(Stage::Found, problem))
    }

    fn read_files(&self, name: &str, found: Option<&Found>, declared: &mut Option<Manifest>) -> Result<Candidate, Rejection> {
        match (found, &self.plugins_dir) {
            (Some(found), Some(plugins_dir)) => PluginFiles { plugins_dir }.read(name, found, declared),
            _ => Err(Rejection::new(Stage::Found, format!("there is a grant file, but no plugin `{name}` in the plugin directory"))),
        }
    }

    async fn finish(&self, job: &Job, candidate: Result<Candidate, Rejection>, report: &mut Report) -> Result<Finished, Rejection> {
        let candidate = candidate?;
        let Some(grant) = report.grant.clone() else { return Err(Rejection::transient(Stage::Inspected, "its grant file was not read")) };
        let print = fingerprint(&candidate, &grant);
        if let Some(active) = &job.active
            && active.fingerprint == print
        {
            return Ok(Finished::Unchanged);
        }
        if job.rejected == Some(print) && !job.immediate {
            return Ok(Finished::StillRejected);
        }
        verify(&job.name, &candidate.digest, &grant)?;
        let downgrade = downgrade(job, &candidate, &grant.grant)?;
        let effective = effective(&candidate.manifest, &grant.grant, &grant.secrets, &self.surroundings)
            .map_err(|missing| Rejection::new(Stage::Inspected, missing.to_string()))?;
        let component = match &job.active {
            // Only grants or filters changed.
            Some(active) if active.digest() == candidate.digest => active.component.clone(),
            _ => self.compiler.component(self.runtime.engines(), &candidate.digest, &candidate.wasm).await?,
        };
        let plugin = self.link(&candidate.manifest, &candidate.digest, &component, effective)?;
        report.hooks = Some(plugin.hooks().clone());
        report.token_services = Some(plugin.effective().token_services.clone());
        check_named_hooks(&candidate.manifest, plugin.hooks())?;
        self.probe(&plugin).await?;
        let Candidate { manifest, manifest_text, wasm, .. } = candidate;
        let warnings = grant.warnings.clone();
        let version = Version { plugin: Arc::new(plugin), component, manifest, manifest_text, grant, fingerprint: print, warnings };
        if let Some(downgrade) = downgrade {
            self.audit_downgrade(&version, &downgrade).await.map_err(|error| Rejection::transient(Stage::Active, error.to_string()))?;
        }
        self.publish(&version, Some(wasm)).await?;
        Ok(Finished::Ready(Box::new(version)))
    }

    /// After a rejection: a grant that was narrowed takes effect on the active version all the same.
    async fn regrant(&self, job: &Job, report: &Report, rejection: Rejection) -> Finished {
        let (Some(active), Some(grant)) = (&job.active, &report.grant) else { return Finished::Rejected(rejection) };
        if grant_fingerprint(grant) == grant_fingerprint(&active.grant) {
            return Finished::Rejected(rejection);
        }
        for grant in [grant.clone(), with_config_of(grant, &active.grant)] {
            let effective = intersection(&active.manifest, &grant.grant, &grant.secrets, &self.surroundings);
            let Ok(plugin) = self.link(&active.manifest, active.digest(), &active.component, effective) else { continue };
            if self.probe(&plugin).await.is_err() {
                continue;
            }
            // The next look compares with what was read, not with what was made of it.
            let version = Version { plugin: Arc::new(plugin), grant, ..active.clone() };
            if self.publish(&version, None).await.is_ok() {
                return Finished::Regranted(Box::new(version), rejection);
            }
        }
        Finished::Rejected(rejection)
    }

    /// Loads a kept version at start, with the present grants where they can be read, else with those of then.
    pub(super) async fn load_kept(self: &Arc<Self>, name: &str, kept: &Kept) -> Result<KeptLoad, Rejection> {
        let component = match self.kept_grants(name, kept).await? {
            KeptGrants::Disabled(file) => return Ok(KeptLoad::Disabled(file)),
            KeptGrants::Attempts(_) => self.compiler.component(self.runtime.engines(), &kept.digest, &kept.wasm).await?,
        };
        // Compiling can take minutes: what counts is what the operator grants now.
        let attempts = match self.kept_grants(name, kept).await? {
            KeptGrants::Disabled(file) => return Ok(KeptLoad::Disabled(file)),
            KeptGrants::Attempts(attempts) => attempts,
        };
        let mut rejection = Rejection::transient(Stage::Found, "it was not tried");
        for grant in attempts {
            match self.kept_version(kept, grant, &component).await {
                Ok(version) => return Ok(KeptLoad::Active(Box::new(version))),
                Err(problem) => rejection = problem,
            }
        }
        Err(rejection)
    }

    /// What a kept version may be loaded with. An error if the operator does not trust it any more.
    async fn kept_grants(&self, name: &str, kept: &Kept) -> Result<KeptGrants, Rejection> {
        let (grants_dir, owned) = (self.grants_dir.clone(), name.to_owned());
        let then = GrantFile { text: kept.grant_text.clone(), grant: kept.grant(), ..GrantFile::default() };
        let then = self.with_secrets(then).await?;
        let read = move || (read_grant(&owned, &grants_dir), signatures_required(&grants_dir));
        let (now, signatures_required) = blocking(read).await.map_err(|problem| Rejection::transient(Stage::Found, problem))?;
        let attempts = match now {
            Ok(now) if !now.grant.is_active() => return Ok(KeptGrants::Disabled(Box::new(now))),
            Ok(now) => vec![now.clone(), with_config_of(&now, &then)],
            Err(_) => vec![GrantFile { signatures_required, ..then }],
        };
        for file in &attempts {
            verify(name, &kept.digest, file)?;
        }
        Ok(KeptGrants::Attempts(attempts))
    }

    async fn kept_version(&self, kept: &Kept, grant: GrantFile, component: &Component) -> Result<Version, Rejection> {
        let effective = intersection(&kept.manifest, &grant.grant, &grant.secrets, &self.surroundings);
        let plugin = self.link(&kept.manifest, &kept.digest, component, effective)?;
        self.probe(&plugin).await?;
        let candidate =
            Candidate { manifest: kept.manifest.clone(), manifest_text: kept.manifest_text.clone(), wasm: Bytes::new(), digest: kept.digest.clone() };
        let version = Version {
            plugin: Arc::new(plugin),
            component: component.clone(),
            fingerprint: fingerprint(&candidate, &grant),
            manifest: candidate.manifest,
            manifest_text: candidate.manifest_text,
            warnings: grant.warnings.clone(),
            grant,
        };
        let awaited = self.awaited.lock().await;
        if !awaited.contains(&version.manifest.name) {
            return Err(Rejection::new(Stage::Active, "another version became active meanwhile, or it was removed"));
        }
        self.claim_and_write(&version, None).await?;
        Ok(version)
    }

    async fn with_secrets(&self, file: GrantFile) -> Result<GrantFile, Rejection> {
        let grants_dir = self.grants_dir.clone();
        blocking(move || {
            let (secrets, warnings) = read_secrets(&grants_dir, &file.grant).unwrap_or_else(|problem| (Secrets::new(), vec![problem]));
            GrantFile { secrets, warnings, ..file }
        })
        .await
        .map_err(|problem| Rejection::transient(Stage::Found, problem))
    }

    fn link(&self, manifest: &Manifest, digest: &str, component: &Component, effective: Effective) -> Result<LinkedPlugin, Rejection> {
        let identity = PluginIdentity {
            name: manifest.name.clone(),
            version: manifest.version.to_string(),
            digest: digest.to_owned(),
            generation: self.generation.fetch_add(1, Ordering::Relaxed) + 1,
        };
        link(&self.runtime, component, identity, effective).map_err(|error| Rejection::new(Stage::Linked, error.to_string()))
    }

    async fn probe(&self, plugin: &LinkedPlugin) -> Result<(), Rejection> {
        let refused = |error: LinkError| match error {
            // It may have been the machine that was too slow.
            LinkError::Start(_) => Rejection::transient(Stage::Probed, error.to_string()),
            LinkError::Configuration(_) | LinkError::Refused(_) => Rejection::new(Stage::Probed, error.to_string()),
        };
        plugin.probe().await.map_err(refused)?;
        for tenant in &self.tenants {
            if let Some(settings) = plugin.effective().for_tenant(tenant) {
                let document = Value::Object((**settings.config).clone()).to_string();
                plugin.validate_config(&document, tenant).await.map_err(refused)?;
            }
        }
        Ok(())
    }

    /// Writes what must be there before the swap.
    async fn publish(&self, version: &Version, wasm: Option<Bytes>) -> Result<(), Rejection> {
        let mut awaited = self.awaited.lock().await;
        self.claim_and_write(version, wasm).await?;
        awaited.remove(&version.manifest.name);
        Ok(())
    }

    async fn claim_and_write(&self, version: &Version, wasm: Option<Bytes>) -> Result<(), Rejection> {
        let name = &version.manifest.name;
        let before = self.claim(name, version.plugin.hooks(), version.plugin.effective())?;
        let written = self.write(version, wasm).await;
        if written.is_err() {
            // The version before stays, with what it has.
            let mut owners = self.owners.lock();
            match before {
                Some(before) => owners.insert(name.clone(), before),
                None => owners.remove(name),
            };
        }
        written
    }

    /// Takes what only one plugin of a tenant can have, and answers what the plugin had before. An error if another plugin has it.
    fn claim(&self, name: &str, hooks: &BTreeSet<Hook>, effective: &Effective) -> Result<Option<Claims>, Rejection> {
        let wanted = self.claims(hooks, effective);
        let mut owners = self.owners.lock();
        for (other, has) in owners.iter().filter(|(other, _)| *other != name) {
            let both: BTreeSet<String> = wanted.intersection(has).map(|(_, owned)| owned.to_string()).collect();
            if !both.is_empty() {
                let both = both.into_iter().collect::<Vec<_>>().join(", ");
                let reason = format!(
                    "the plugin `{other}` has {both} already, and only one of a tenant can: remove or disable one of the two, or let them serve \
                     different tenants"
                );
                // The other one may go.
                return Err(Rejection::transient(Stage::Active, reason));
            }
        }
        let before = owners.insert(name.to_owned(), wanted.clone());
        if before.as_ref().is_some_and(|before| !before.is_subset(&wanted)) {
            self.released.store(true, Ordering::Relaxed);
        }
        Ok(before)
    }

    /// Gives up all that the plugin has.
    fn release(&self, name: &str) {
        if self.owners.lock().remove(name).is_some_and(|had| !had.is_empty()) {
            self.released.store(true, Ordering::Relaxed);
        }
    }

    /// Of a plugin that was active when the server stopped: nobody takes its place while it is being loaded.
    pub(super) fn claim_kept(&self, name: &str, kept: &Kept) {
        let effective = intersection(&kept.manifest, &kept.grant(), &Secrets::new(), &self.surroundings);
        let claims = self.claims(&kept.hooks, &effective);
        self.owners.lock().insert(name.to_owned(), claims);
    }

    fn claims(&self, hooks: &BTreeSet<Hook>, effective: &Effective) -> Claims {
        let all = Owned::all(hooks, &effective.token_services);
        let served = self.tenants.iter().filter(|tenant| effective.for_tenant(tenant).is_some());
        served.flat_map(|tenant| all.iter().map(|owned| (tenant.clone(), owned.clone()))).collect()
    }

    /// In this order: subscriptions, so that no event after it is missed (until then they wait, or are handled by the version before); cron
    /// entries; the kept version.
    async fn write(&self, version: &Version, wasm: Option<Bytes>) -> Result<(), Rejection> {
        let failed = |problem: String| Rejection::transient(Stage::Active, problem);
        self.subscribe(version).await.map_err(|error| failed(error.to_string()))?;
        let kept = self.kept.clone();
        let version = version.clone();
        blocking(move || {
            let identity = version.plugin.identity();
            kept.store(&Keep {
                name: &identity.name,
                digest: &identity.digest,
                generation: identity.generation,
                hooks: version.plugin.hooks(),
                manifest_text: version.manifest_text.as_deref(),
                // The next start must find a configuration that the plugin accepts.
                grant_text: version.grant.configured_by.as_deref().or(version.grant.text.as_deref()),
                wasm: wasm.as_deref(),
            })
        })
        .await
        .and_then(|stored| stored.map_err(|error| error.to_string()))
        .map_err(|problem| failed(format!("it cannot be kept in the data directory: {problem}")))
    }

    fn now(&self) -> Timestamp {
        self.runtime.services.clock.now()
    }

    async fn subscribe(&self, version: &Version) -> Result<(), StorageError> {
        let now = self.now();
        let plugin = &version.plugin;
        let name = &plugin.identity().name;
        let schedules: BTreeMap<_, _> = version.manifest.hooks.schedule.iter().flatten().map(|line| (line.name.clone(), line.cron.clone())).collect();
        for tenant in &self.tenants {
            let serves = plugin.effective().for_tenant(tenant).is_some();
            let subscriptions = if serves { subscriptions(&version.manifest, plugin.hooks()) } else { Vec::new() };
            let lines: BTreeMap<_, _> = schedules.iter().filter(|_| serves).map(|(name, cron)| (name.clone(), cron.as_str().to_owned())).collect();
            let key = (tenant.clone(), name.clone());
            let published = (subscriptions.clone(), lines);
            // Most versions subscribe to what the one before did: nothing to write.
            if self.published.lock().get(&key) == Some(&published) {
                continue;
            }
            self.storage.set_subscriptions(tenant, &subscriber(name), subscriptions, now).await?;
            let entries = if serves { cron::entries(tenant, name, &schedules, now) } else { Vec::new() };
            self.storage.set_cron(tenant, name, entries).await?;
            self.published.lock().insert(key, published);
        }
        self.schedules.set(name, schedules);
        Ok(())
    }

    /// An operator went back to a lower version: that is on record before it happens.
    async fn audit_downgrade(&self, version: &Version, downgrade: &Downgrade) -> Result<(), StorageError> {
        let identity = version.plugin.identity();
        let row = |tenant: &TenantId| AuditRow {
            tenant: tenant.clone(),
            actor: downgrade.actor.clone(),
            action: "plugin.downgrade".to_owned(),
            target: None,
            detail: json!({ "plugin": identity.name, "from": downgrade.from, "to": identity.version, "digest": identity.digest, "generation": identity.generation }),
            at: self.now(),
        };
        self.storage.record_decision(Vec::new(), self.tenants.iter().map(row).collect(), self.now()).await.map(drop)
    }

    /// Its operator has switched the plugin off.
    async fn disable(&self, name: &str) -> Result<(), StorageError> {
        let mut awaited = self.awaited.lock().await;
        awaited.remove(name);
        self.release(name);
        self.unsubscribe(name).await
    }

    /// The plugin's directory is gone: forgets its kept version, but not its hooks, and ends its cron entries. Its subscriptions stay.
    pub(super) async fn remove(&self, name: &str, hooks: BTreeSet<Hook>, token_services: Option<BTreeSet<String>>) {
        let mut awaited = self.awaited.lock().await;
        awaited.remove(name);
        self.release(name);
        let (kept, owned, now) = (self.kept.clone(), name.to_owned(), self.now());
        let removed = blocking(move || kept.remove(&owned, &hooks, token_services.as_ref(), now))
            .await
            .and_then(|removed| removed.map_err(|error| error.to_string()));
        if let Err(problem) = removed {
            warn!(plugin = %name, "The kept version of plugin {name} cannot be removed: {problem}");
        }
        if let Err(error) = self.end_schedules(name).await {
            warn!(plugin = %name, "The schedules of plugin {name} cannot be ended: {error}");
        }
    }

    /// Ends the plugin's subscriptions and cron entries.
    pub(super) async fn unsubscribe(&self, name: &str) -> Result<(), StorageError> {
        for tenant in &self.tenants {
            self.published.lock().remove(&(tenant.clone(), name.to_owned()));
            self.storage.set_subscriptions(tenant, &subscriber(name), Vec::new(), self.now()).await?;
        }
        self.end_schedules(name).await
    }

    /// Ends the plugin's cron entries.
    async fn end_schedules(&self, name: &str) -> Result<(), StorageError> {
        self.schedules.set(name, BTreeMap::new());
        for tenant in &self.tenants {
            self.published.lock().remove(&(tenant.clone(), name.to_owned()));
            self.storage.set_cron(tenant, name, Vec::new()).await?;
        }
        Ok(())
    }

    /// Tells the outbox that the plugin may be asked again.
    pub(super) async fn wake(&self, name: &str) {
        for tenant in &self.tenants {
            // A wake-up that is lost is made up for by the next retry.
            drop(self.storage.wake_subscriber(tenant, &subscriber(name), self.now()).await);
        }
    }
}

/// What came of a kept version.
#[derive(Debug)]
pub(super) enum KeptLoad {
    Active(Box<Version>),
    Disabled(Box<GrantFile>),
}

/// What a kept version may be loaded with.
enum KeptGrants {
    /// Grants to try, best first.
    Attempts(Vec<GrantFile>),
    Disabled(Box<GrantFile>),
}

/// Why the operator no longer trusts the active version, if so: its pin names another digest, or signatures are asked for.
fn distrusted(job: &Job, grant: Option<&GrantFile>) -> Option<Rejection> {
    verify(&job.name, job.active.as_ref()?.digest(), grant?).err()
}

/// Why neither the candidate nor the active version is asked.
fn stopped(candidate: Rejection, active: &Rejection) -> Rejection {
    if candidate.reason == active.reason {
        return candidate;
    }
    Rejection { reason: format!("{candidate}; and the version that ran is stopped: {active}"), ..candidate }
}

/// The plugin as the outbox knows it.
fn subscriber(name: &str) -> String {
    format!("plugin:{name}")
}

fn subscriptions(manifest: &Manifest, hooks: &BTreeSet<Hook>) -> Vec<Subscription> {
    let filters = [(Hook::EventSink, &manifest.hooks.event_sink), (Hook::EventCommands, &manifest.hooks.event_commands)];
    let exported = filters.into_iter().filter(|(hook, _)| hooks.contains(hook));
    exported
        .map(|(hook, filter)| {
            let EventFilter { topics, include_self } = filter.clone().unwrap_or_default();
            Subscription { interface: hook.as_str().to_owned(), topics: topics.into_iter().map(|topic| topic.0).collect(), include_self }
        })
        .collect()
}

/// The hooks that a manifest names; `None`: it names none, so that only the component can tell.
pub(super) fn declared_hooks(manifest: &Manifest) -> Option<BTreeSet<Hook>> {
    let named = &manifest.hooks;
    let hooks = [
        (Hook::Lifecycle, named.lifecycle),
        (Hook::EnrollmentPolicy, named.enrollment_policy),
        (Hook::UserAuthentication, named.user_authentication),
        (Hook::TokenSource, named.token_source.is_some()),
        (Hook::ReturnToService, named.return_to_service),
        (Hook::EventSink, named.event_sink.is_some()),
        (Hook::EventCommands, named.event_commands.is_some()),
        (Hook::Schedule, named.schedule.is_some()),
    ];
    let hooks: BTreeSet<_> = hooks.into_iter().filter(|(_, named)| *named).map(|(hook, _)| hook).collect();
    (!hooks.is_empty()).then_some(hooks)
}

/// A manifest names no hook, or all: which door a plugin guards must be known even when its component cannot be loaded.
pub(super) fn check_named_hooks(manifest: &Manifest, exported: &BTreeSet<Hook>) -> Result<(), Rejection> {
    let refused = |reason: String| Err(Rejection::new(Stage::Linked, reason));
    if exported.contains(&Hook::TokenSource) && manifest.hooks.token_source.is_none() {
        let reason = "the component exports the hook `token-source`, and no plugin.toml says for which service types: \
            add [hooks.token-source] with services = [\"…\"]";
        return refused(reason.to_owned());
    }
    let Some(named) = declared_hooks(manifest) else { return Ok(()) };
    if let Some(hook) = named.difference(exported).next() {
        return refused(format!("plugin.toml names the hook `{hook}`, which the component does not export"));
    }
    match exported.difference(&named).find(|hook| **hook != Hook::Lifecycle) {
        Some(hook) => refused(format!("the component exports the hook `{hook}`, which plugin.toml does not name: add [hooks.{hook}]")),
        None => Ok(()),
    }
}

/// A lower version is to replace a higher one.
struct Downgrade {
    from: String,
    /// Who insists.
    actor: String,
}

/// Whether the candidate would replace a higher version; refused unless an operator insists.
fn downgrade(job: &Job, candidate: &Candidate, grant: &Grant) -> Result<Option<Downgrade>, Rejection> {
    let Some(active) = &job.active else { return Ok(None) };
    // A lone component has no version.
    let comparable = active.manifest_text.is_some() && candidate.manifest_text.is_some();
    let (older, newer) = (&candidate.manifest.version, &active.manifest.version);
    if !comparable || older >= newer {
        return Ok(None);
    }
    let insists = |actor: String| Ok(Some(Downgrade { from: newer.to_string(), actor }));
    if job.force {
        return insists("api".to_owned());
    }
    // Whoever pins this very component wants it, and the active one is not to run any more.
    if grant.pin.as_ref().is_some_and(|pin| *pin == candidate.digest && *pin != active.digest()) {
        return insists(format!("plugins.d/{}.toml", job.name));
    }
    let reason = format!("version {older} is lower than the active {newer}: reload it through the API with force=true to go back");
    Err(Rejection::new(Stage::Verified, reason))
}

/// The rights of one grant with the configuration of another.
fn with_config_of(rights: &GrantFile, configured: &GrantFile) -> GrantFile {
    let mut overlays = rights.grant.overlays.clone();
    for (tenant, overlay) in &mut overlays {
        overlay.config = configured.grant.overlays.get(tenant).map(|overlay| overlay.config.clone()).unwrap_or_default();
    }
    let grant = Grant { config: configured.grant.config.clone(), overlays, ..rights.grant.clone() };
    GrantFile { grant, configured_by: configured.configured_by.clone().or_else(|| configured.text.clone()), ..rights.clone() }
}
