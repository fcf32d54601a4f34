//! A component, linked: what it exports is known, its imports are there, and it can be called.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use parking_lot::Mutex;
use wasmdm_protocol::enrollment::TenantId;
use wasmtime::component::types::ComponentItem;
use wasmtime::component::{Component, InstancePre};

use crate::bindings::exports::wasmdm::plugin as exports;
use crate::call::{Observations, Outcome, Request, Sandbox};
use crate::call_metrics::{CallMetrics, HookMetrics};
use crate::circuit_breaker::CircuitBreakers;
use crate::effective::{Effective, Settings};
use crate::hook::{CONTRACT_VERSION, Hook, Owned, PACKAGE};
use crate::runtime::{Runtime, Services};
use crate::saturation::Places;

/// Which plugin, and which build of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginIdentity {
    /// `NAME` for a shared one, `TENANT/NAME` for a tenant's own.
    pub name: String,
    pub version: String,
    /// SHA-256 of the component, lower-case hex.
    pub digest: String,
    /// Goes up with every swap of the registry.
    pub generation: u64,
}

/// Why a component cannot be called. The text is for the operator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    #[error("{0}")]
    Refused(String),
    /// It could be linked, but a first instance failed.
    #[error("the plugin does not start: {0}")]
    Start(String),
    /// The plugin refuses its configuration.
    #[error("the plugin refuses its configuration: {0}")]
    Configuration(String),
}

/// One generation of a plugin, ready to be called.
pub struct LinkedPlugin {
    pub(crate) shared: Arc<Shared>,
    pub(crate) pre: InstancePre<Sandbox>,
    pub(crate) indices: Indices,
    hooks: BTreeSet<Hook>,
}

/// What calls need to know of their plugin.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) identity: PluginIdentity,
    pub(crate) effective: Effective,
    settings: Arc<Settings>,
    overlays: BTreeMap<TenantId, Arc<Settings>>,
    pub(crate) has_schedule: bool,
    pub(crate) services: Services,
    pub(crate) places: Places,
    pub(crate) breakers: CircuitBreakers,
    pub(crate) log_rate: crate::capabilities::log::Rate,
    pub(crate) observations: Mutex<Observations>,
    pub(crate) metrics: CallMetrics,
}

impl Shared {
    /// A start without a tenant.
    pub(crate) fn settings_for_probe(&self) -> Arc<Settings> {
        Arc::clone(&self.settings)
    }

    /// The settings for a tenant; `None`: not served.
    pub(crate) fn settings(&self, tenant: &TenantId) -> Option<Arc<Settings>> {
        self.effective.for_tenant(tenant)?;
        Some(Arc::clone(self.overlays.get(tenant).unwrap_or(&self.settings)))
    }
}

/// Where the exports of each hook are.
#[derive(Clone, Default)]
pub(crate) struct Indices {
    pub(crate) lifecycle: Option<exports::lifecycle::GuestIndices>,
    pub(crate) enrollment_policy: Option<exports::enrollment_policy::GuestIndices>,
    pub(crate) user_authentication: Option<exports::user_authentication::GuestIndices>,
    pub(crate) token_source: Option<exports::token_source::GuestIndices>,
    pub(crate) return_to_service: Option<exports::return_to_service::GuestIndices>,
    pub(crate) event_commands: Option<exports::event_commands::GuestIndices>,
    pub(crate) event_sink: Option<exports::event_sink::GuestIndices>,
    pub(crate) schedule: Option<exports::schedule::GuestIndices>,
}

/// Links a component. Whatever it exports or imports of the contract must be what this server has; a component without hooks is refused.
pub fn link(runtime: &Runtime, component: &Component, identity: PluginIdentity, effective: Effective) -> Result<LinkedPlugin, LinkError> {
    let version = &runtime.services.server_version;
    let hooks = inspect(runtime, component)?;
    let pre = runtime
        .linker
        .instantiate_pre(component)
        .map_err(|error| LinkError::Refused(format!("an import is not what this server has ({}): {error:#}", server(version))))?;
    let indices = Indices::find(&hooks, &pre)
        .map_err(|error| LinkError::Refused(format!("an export is not what this server calls ({}): {error:#}", server(version))))?;
    let shared = Shared {
        settings: Arc::new(effective.settings.clone()),
        overlays: effective.overlays.iter().map(|(tenant, settings)| (tenant.clone(), Arc::new(settings.clone()))).collect(),
        has_schedule: hooks.contains(&Hook::Schedule),
        services: runtime.services.clone(),
        places: Places::new(effective.settings.limits.concurrent),
        breakers: CircuitBreakers::default(),
        log_rate: crate::capabilities::log::Rate::default(),
        observations: Mutex::default(),
        metrics: CallMetrics::default(),
        identity,
        effective,
    };
    Ok(LinkedPlugin { shared: Arc::new(shared), pre, indices, hooks })
}

/// The hooks that a component exports, if all that it exports and imports of the contract is known to this server.
pub fn inspect(runtime: &Runtime, component: &Component) -> Result<BTreeSet<Hook>, LinkError> {
    let engine = runtime.engines.engine();
    let version = &runtime.services.server_version;
    let declared = component.component_type();
    for (name, _) in declared.imports(engine) {
        if let Some(interface) = Interface::parse(name) {
            interface.check("imports", &IMPORTS, version)?;
        }
    }
    let mut hooks = BTreeSet::new();
    for (name, item) in declared.exports(engine) {
        let Some(interface) = Interface::parse(name) else { continue };
        // Some toolchains export the interface of the shared types as well, which holds nothing to call.
        if interface.name == "types" {
            continue;
        }
        interface.check("exports", &Hook::ALL.map(Hook::as_str), version)?;
        if !matches!(item.ty, ComponentItem::ComponentInstance(_)) {
            return Err(LinkError::Refused(format!("it exports `{name}`, which is no interface")));
        }
        hooks.extend(Hook::from_name(interface.name));
    }
    if hooks.is_empty() {
        let others: Vec<_> = declared.exports(engine).map(|(name, _)| format!("`{name}`")).take(5).collect();
        let exports = if others.is_empty() { String::from("nothing") } else { format!("only {}", others.join(", ")) };
        return Err(LinkError::Refused(format!(
            "it exports {exports}, and no hook that this server calls: is the export macro missing (in Rust `wasmdm_plugin::export!`)?"
        )));
    }
    Ok(hooks)
}

/// A compiler's message in words that help an author.
pub fn explain_compile_error(message: &str) -> String {
    let lower = message.to_ascii_lowercase();
    if lower.contains("async feature") || lower.contains("component model async") || lower.contains("component-model-async") {
        return format!(
            "the component needs asynchronous components (WASI 0.3), which this server does not run: build it without \
             (for QuickJS with `--backend-qjs-disable-async`): {message}"
        );
    }
    if lower.contains("threads") && lower.contains("not enabled") || lower.contains("shared memor") {
        return format!("the component needs threads, which this server does not run: {message}");
    }
    if lower.contains("core wasm module") || lower.contains("expected a webassembly component") || lower.contains("not a component") {
        return format!(
            "this is a core module and no component: build it for `wasm32-wasip2`, or wrap it with `wasm-tools component new`: {message}"
        );
    }
    message.to_owned()
}

/// The interfaces that a plugin may import.
const IMPORTS: [&str; 12] = ["types", "runtime", "log", "config", "kv", "http", "enrollments", "commands", "push", "plist", "crypto", "timers"];

fn server(version: &str) -> String {
    format!("wasmdm {version}, contract {PACKAGE}@{CONTRACT_VERSION}")
}

/// `wasmdm:plugin/NAME@VERSION`.
struct Interface<'a> {
    full: &'a str,
    name: &'a str,
    version: &'a str,
}

impl<'a> Interface<'a> {
    fn parse(full: &'a str) -> Option<Self> {
        let rest = full.strip_prefix(PACKAGE)?.strip_prefix('/')?;
        let (name, version) = rest.split_once('@').unwrap_or((rest, ""));
        Some(Self { full, name, version })
    }

    fn check(&self, verb: &str, offered: &[&str], server_version: &str) -> Result<(), LinkError> {
        let full = self.full;
        if !offered.contains(&self.name) {
            let server = server(server_version);
            return Err(LinkError::Refused(format!("it {verb} `{full}`, which this server ({server}) does not have")));
        }
        // Before 1.0 a minor version may change types; a patch only adds, and what it adds is looked for when linking.
        if !same_minor(self.version, CONTRACT_VERSION) {
            let server = server(server_version);
            return Err(LinkError::Refused(format!("it {verb} `{full}`, and this server ({server}) speaks version {CONTRACT_VERSION}")));
        }
        Ok(())
    }
}

fn same_minor(one: &str, other: &str) -> bool {
    let minor = |version: &str| version.rsplit_once('.').map(|(minor, _)| minor.to_owned());
    minor(one).is_some() && minor(one) == minor(other)
}

impl Indices {
    fn find(hooks: &BTreeSet<Hook>, pre: &InstancePre<Sandbox>) -> wasmtime::Result<Self> {
        let mut indices = Self::default();
        for hook in hooks {
            match hook {
                Hook::Lifecycle => indices.lifecycle = Some(exports::lifecycle::GuestIndices::new(pre)?),
                Hook::EnrollmentPolicy => indices.enrollment_policy = Some(exports::enrollment_policy::GuestIndices::new(pre)?),
                Hook::UserAuthentication => indices.user_authentication = Some(exports::user_authentication::GuestIndices::new(pre)?),
                Hook::TokenSource => indices.token_source = Some(exports::token_source::GuestIndices::new(pre)?),
                Hook::ReturnToService => indices.return_to_service = Some(exports::return_to_service::GuestIndices::new(pre)?),
                Hook::EventCommands => indices.event_commands = Some(exports::event_commands::GuestIndices::new(pre)?),
                Hook::EventSink => indices.event_sink = Some(exports::event_sink::GuestIndices::new(pre)?),
                Hook::Schedule => indices.schedule = Some(exports::schedule::GuestIndices::new(pre)?),
            }
        }
        Ok(indices)
    }
}

impl LinkedPlugin {
    /// Which plugin this is.
    pub fn identity(&self) -> &PluginIdentity {
        &self.shared.identity
    }

    /// What is enforced.
    pub fn effective(&self) -> &Effective {
        &self.shared.effective
    }

    /// The hooks that it exports.
    pub const fn hooks(&self) -> &BTreeSet<Hook> {
        &self.hooks
    }

    /// Whether it has the hook and serves the tenant.
    pub fn answers(&self, tenant: &TenantId, hook: Hook) -> bool {
        self.hooks.contains(&hook) && self.shared.effective.for_tenant(tenant).is_some()
    }

    /// Whether it has this for the tenant.
    pub fn owns(&self, tenant: &TenantId, owned: &Owned) -> bool {
        let has = match owned {
            Owned::UserAuthentication | Owned::ReturnToService => true,
            Owned::Token(service) => self.effective().token_services.contains(service),
        };
        has && self.answers(tenant, owned.hook())
    }

    /// What is counted of the hook.
    pub(crate) fn metrics(&self, hook: Hook) -> &HookMetrics {
        self.shared.metrics.of(&self.shared.identity.name, hook)
    }

    /// Its circuit breakers.
    pub fn breakers(&self) -> &CircuitBreakers {
        &self.shared.breakers
    }

    /// What was seen of it so far.
    pub fn observations(&self) -> Observations {
        self.shared.observations.lock().clone()
    }

    /// Makes an instance and checks the types of every hook's functions, within the limits of `lifecycle`.
    pub async fn probe(&self) -> Result<(), LinkError> {
        // Nothing of a tenant is read: the instance is only started.
        let tenant = self.shared.effective.tenants.iter().flatten().next().cloned().unwrap_or_default();
        match self.call(&tenant, Request::Probe).await.outcome {
            Outcome::Answered(_) => Ok(()),
            outcome => Err(LinkError::Start(outcome.to_string())),
        }
    }

    /// Asks the plugin's `lifecycle` about a configuration, if it has one. A tenant that it does not serve has nothing to refuse.
    pub async fn validate_config(&self, document: &str, tenant: &TenantId) -> Result<(), LinkError> {
        if !self.answers(tenant, Hook::Lifecycle) {
            return Ok(());
        }
        match self.call(tenant, Request::ValidateConfig { document }).await.outcome {
            Outcome::Answered(_) => Ok(()),
            Outcome::Failure(failure) => Err(LinkError::Configuration(failure.message)),
            outcome => Err(LinkError::Configuration(format!("its check ended with {outcome}"))),
        }
    }
}

impl std::fmt::Debug for LinkedPlugin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LinkedPlugin").field("identity", &self.shared.identity).field("hooks", &self.hooks).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_of_the_contract_are_checked_by_name_and_version() {
        let check = |full: &str| {
            Interface::parse(full).map(|interface| interface.check("exports", &["event-sink"], "0.1.0").map_err(|error| error.to_string()))
        };
        assert_eq!(check("wasi:cli/run@0.2.0"), None);
        assert_eq!(check("wasmdm:plugin/event-sink@0.1.0"), Some(Ok(())));
        assert_eq!(check("wasmdm:plugin/event-sink@0.1.7"), Some(Ok(())), "it may use nothing of what is new");
        let newer = check("wasmdm:plugin/event-sink@0.2.0").unwrap().unwrap_err();
        assert!(newer.contains("event-sink@0.2.0") && newer.contains("wasmdm 0.1.0"), "{newer}");
        let unknown = check("wasmdm:plugin/command-policy@0.1.0").unwrap().unwrap_err();
        assert!(unknown.contains("command-policy@0.1.0") && unknown.contains("does not have"), "{unknown}");
    }
}
