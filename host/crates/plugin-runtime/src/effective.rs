//! What the host really enforces for a plugin: its manifest's requests met with the operator's grants.
//!
//! Nothing here is parsed and nothing here is asked of the plugin: whoever reads manifests and grants fills it in, and every call obeys it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use wasmdm_protocol::enrollment::TenantId;

use crate::egress::EgressPolicy;
use crate::hook::Hook;

/// Everything that the host enforces for one generation of a plugin.
#[derive(Debug, Clone)]
pub struct Effective {
    /// Lower is asked first; equal ones go by name.
    pub order: i32,
    /// What a failure of a hook means, where it differs from [`Hook::default_on_failure`]. Only decision hooks have a choice.
    pub on_failure: BTreeMap<Hook, OnFailure>,
    /// The service types that its `token-source` answers.
    pub token_services: BTreeSet<String>,
    /// The tenants that the plugin serves; `None`: all.
    pub tenants: Option<BTreeSet<TenantId>>,
    /// Of every tenant that has no overlay.
    pub settings: Settings,
    /// Whole settings of single tenants, already merged over `settings`.
    pub overlays: BTreeMap<TenantId, Settings>,
}

impl Default for Effective {
    fn default() -> Self {
        Self {
            order: 100,
            on_failure: BTreeMap::new(),
            token_services: BTreeSet::new(),
            tenants: None,
            settings: Settings::default(),
            overlays: BTreeMap::new(),
        }
    }
}

impl Effective {
    /// The settings for a tenant; `None`: the plugin does not serve it, or is disabled there.
    pub fn for_tenant(&self, tenant: &TenantId) -> Option<&Settings> {
        if self.tenants.as_ref().is_some_and(|tenants| !tenants.contains(tenant)) {
            return None;
        }
        let settings = self.overlays.get(tenant).unwrap_or(&self.settings);
        (settings.mode != Mode::Disabled).then_some(settings)
    }

    /// What a failure of the hook means.
    pub fn on_failure(&self, hook: Hook) -> OnFailure {
        self.on_failure.get(&hook).copied().unwrap_or(hook.default_on_failure())
    }
}

/// What one tenant's calls of the plugin get.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    pub mode: Mode,
    /// The operator's configuration. Shared by all calls.
    pub config: Arc<Configuration>,
    pub capabilities: Capabilities,
    pub limits: Limits,
}

/// A configuration: a JSON object. Its values are also kept as the text that calls get: a list of a thousand entries would otherwise be written
/// out in each call, which costs more than the call.
#[derive(Debug, Clone, Default)]
pub struct Configuration {
    object: serde_json::Map<String, serde_json::Value>,
    texts: HashMap<String, String>,
}

impl Configuration {
    /// The JSON of a value.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        self.texts.get(key).map(String::as_str)
    }
}

impl From<serde_json::Map<String, serde_json::Value>> for Configuration {
    fn from(object: serde_json::Map<String, serde_json::Value>) -> Self {
        let texts = object.iter().map(|(key, value)| (key.clone(), value.to_string())).collect();
        Self { object, texts }
    }
}

impl Deref for Configuration {
    type Target = serde_json::Map<String, serde_json::Value>;

    fn deref(&self) -> &Self::Target {
        &self.object
    }
}

/// Whether decisions count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    #[default]
    Enforce,
    /// Decision hooks are asked, recorded and counted, and change nothing; what they write goes to a name space apart.
    Monitor,
    Disabled,
}

impl Mode {
    /// The name in the grant file and the API.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Enforce => "enforce",
            Self::Monitor => "monitor",
            Self::Disabled => "disabled",
        }
    }
}

/// What a decision hook that could not decide means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnFailure {
    /// As if the plugin had abstained.
    Open,
    /// Nobody passes: 503.
    Closed,
}

impl OnFailure {
    /// The name in the grant file and the API.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Closed => "closed",
        }
    }
}

/// Which imports answer, beyond `runtime`, `log`, `config`, `plist` and `crypto`, which always do.
#[derive(Debug, Clone, Default)]
pub struct Capabilities {
    pub kv: Option<KvGrant>,
    pub http: Option<HttpGrant>,
    pub enrollments: EnrollmentsGrant,
    pub commands: CommandsGrant,
    pub push: bool,
    pub timers: bool,
}

/// Key-values: how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvGrant {
    /// Keys and values together, per tenant.
    pub bytes: u64,
    /// Per tenant.
    pub keys: u64,
    /// Of one value.
    pub value_bytes: usize,
}

impl Default for KvGrant {
    fn default() -> Self {
        Self { bytes: 16 << 20, keys: 100_000, value_bytes: 64 << 10 }
    }
}

/// Outbound requests: where to, with which secrets.
#[derive(Debug, Clone)]
pub struct HttpGrant {
    pub policy: Arc<EgressPolicy>,
    /// Also in hooks that a device waits for (`http-sync`).
    pub sync_hooks: bool,
}

/// What a plugin may do with enrollments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EnrollmentsGrant {
    pub read: bool,
    pub tag: bool,
    pub release: bool,
}

/// What a plugin may do with commands.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CommandsGrant {
    pub enqueue: EnqueueGrant,
    pub read: bool,
    pub cancel: bool,
}

/// Which commands a plugin may queue, as effect of `event-commands` too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EnqueueGrant {
    /// `enqueue:*`.
    All,
    /// `enqueue:TYPE`, one entry each.
    Types(BTreeSet<String>),
}

impl Default for EnqueueGrant {
    fn default() -> Self {
        Self::Types(BTreeSet::new())
    }
}

impl EnqueueGrant {
    /// Whether commands of that `RequestType` may be queued.
    pub fn permits(&self, request_type: &str) -> bool {
        match self {
            Self::All => true,
            Self::Types(types) => types.contains(request_type),
        }
    }
}

/// The bounds of a call. The defaults are the documented ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all linear memories of a call together.
    pub memory: usize,
    /// CPU time of a hook that a device waits for.
    pub cpu_sync: Duration,
    /// CPU time of the other hooks.
    pub cpu_async: Duration,
    pub wall: WallLimits,
    /// Calls of imports of `wasmdm:plugin`.
    pub host_calls: u32,
    /// Bytes of JSON handed to a hook; above it only heads arrive, marked `truncated`.
    pub input: usize,
    /// Bytes of strings and lists that a hook returns.
    pub output: usize,
    pub log_lines: u32,
    /// Bytes of one line; longer ones are cut.
    pub log_line: usize,
    /// Bytes of log of one call.
    pub log_bytes: usize,
    /// Lines of log of the whole plugin in one second.
    pub log_lines_per_second: u32,
    pub http_calls: u32,
    /// Of one outbound request.
    pub http_timeout: Duration,
    pub commands: usize,
    pub timers: usize,
    pub table_elements: usize,
    pub core_instances: usize,
    pub memories: usize,
    /// Calls of the plugin that run at once, over all tenants.
    pub concurrent: usize,
    /// Calls that may wait for one that runs.
    pub waiting: usize,
    /// Places among the waiting that no other tenant can take.
    pub waiting_per_tenant: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory: 64 << 20,
            cpu_sync: Duration::from_millis(50),
            cpu_async: Duration::from_secs(1),
            wall: WallLimits::default(),
            host_calls: 1_000,
            input: 2 << 20,
            output: 1 << 20,
            log_lines: 64,
            log_line: 1 << 10,
            log_bytes: 16 << 10,
            log_lines_per_second: 100,
            http_calls: 4,
            http_timeout: Duration::from_secs(5),
            commands: 100,
            timers: 10,
            table_elements: 100_000,
            core_instances: 64,
            memories: 8,
            concurrent: 32,
            waiting: 128,
            waiting_per_tenant: 8,
        }
    }
}

/// How long a call may take from being asked to its answer, by the class of its hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WallLimits {
    /// `enrollment-policy`.
    pub decision: Duration,
    /// `user-authentication`, `token-source` and `return-to-service`.
    pub answer: Duration,
    /// `event-commands` and `event-sink`.
    pub event: Duration,
    pub schedule: Duration,
    pub lifecycle: Duration,
}

impl Default for WallLimits {
    fn default() -> Self {
        Self {
            decision: Duration::from_millis(250),
            answer: Duration::from_millis(500),
            event: Duration::from_secs(30),
            schedule: Duration::from_mins(1),
            lifecycle: Duration::from_secs(1),
        }
    }
}

/// What an operator can raise a limit to.
#[derive(Debug, Clone, Copy)]
pub struct Ceilings {
    pub memory: usize,
    pub cpu_sync: Duration,
    pub cpu_async: Duration,
    pub wall: Duration,
}

impl Default for Ceilings {
    fn default() -> Self {
        Self { memory: MAX_MEMORY, cpu_sync: Duration::from_secs(2), cpu_async: Duration::from_secs(10), wall: Duration::from_mins(1) }
    }
}

/// The largest linear memory that the engine has room for.
pub const MAX_MEMORY: usize = 512 << 20;

impl Limits {
    /// The CPU time of a call of the hook.
    pub const fn cpu(&self, hook: Hook) -> Duration {
        if hook.is_sync() { self.cpu_sync } else { self.cpu_async }
    }

    /// The wall time of a call of the hook.
    pub const fn wall(&self, hook: Hook) -> Duration {
        match hook {
            Hook::Lifecycle => self.wall.lifecycle,
            Hook::EnrollmentPolicy => self.wall.decision,
            Hook::UserAuthentication | Hook::TokenSource | Hook::ReturnToService => self.wall.answer,
            Hook::EventCommands | Hook::EventSink => self.wall.event,
            Hook::Schedule => self.wall.schedule,
        }
    }
}
