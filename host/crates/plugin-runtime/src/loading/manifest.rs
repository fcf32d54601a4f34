//! `plugin.toml`: what a plugin's author says about it.
//!
//! Only what this server does is accepted. A hook, a request or a topic that it does not know is an error: loading the plugin without it
//! would leave a door open that its author believes shut.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr as _;

use croner::Cron;
use semver::Version;
use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};

use crate::egress::Origin;

use super::document::{self, DocumentError, Size, Span, is_plugin_name};

/// Largest manifest or grant file, in bytes.
pub const MAX_DOCUMENT: u64 = 256 * 1024;

/// The subscription of a plugin that names no topics.
const DEFAULT_TOPIC: &str = "*";

/// A checked manifest.
#[derive(Debug, Clone)]
pub struct Manifest {
    pub name: String,
    pub version: Version,
    /// The component's file, in the directory of the manifest.
    pub wasm: String,
    /// Lower-case hexadecimal; `None`: the author named none.
    pub sha256: Option<String>,
    /// Hooks named by the manifest; what counts are the component's exports.
    pub hooks: ManifestHooks,
    pub requests: Requests,
    pub limits: LimitWishes,
    /// Where the operator's configuration says nothing.
    pub config_defaults: toml::Table,
}

/// Filters of the hooks, `None` where the manifest does not name the hook.
#[derive(Debug, Clone, Default)]
#[expect(clippy::struct_excessive_bools, reason = "one for each hook that has no filter")]
pub struct ManifestHooks {
    pub lifecycle: bool,
    pub enrollment_policy: bool,
    pub user_authentication: bool,
    pub token_source: Option<TokenServices>,
    pub return_to_service: bool,
    pub event_sink: Option<EventFilter>,
    pub event_commands: Option<EventFilter>,
    pub schedule: Option<Vec<CronLine>>,
}

impl ManifestHooks {
    /// The service types that `token-source` answers.
    pub fn token_services(&self) -> BTreeSet<String> {
        self.token_source.as_ref().map(|source| source.services.iter().map(|service| service.0.clone()).collect()).unwrap_or_default()
    }
}

/// Which services a plugin makes tokens for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenServices {
    #[serde(deserialize_with = "at_least_one")]
    pub services: BTreeSet<ServiceType>,
}

/// A `TokenServiceType`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServiceType(pub String);

/// Which events a hook is called for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct EventFilter {
    #[serde(default = "default_topics")]
    pub topics: Vec<Topic>,
    /// Also events that the plugin's own effects caused.
    #[serde(default, alias = "include_self")]
    pub include_self: bool,
}

impl Default for EventFilter {
    fn default() -> Self {
        Self { topics: default_topics(), include_self: false }
    }
}

fn default_topics() -> Vec<Topic> {
    vec![Topic(DEFAULT_TOPIC.to_owned())]
}

/// A pattern of topics that this server emits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topic(pub String);

/// One cron expression, in UTC.
#[derive(Debug, Clone)]
pub struct CronLine {
    pub name: String,
    pub cron: Cron,
}

/// What the plugin asks for. Required unless named in `optional`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, from = "RequestTable")]
pub struct Requests {
    pub kv: Option<KvWish>,
    pub http: Vec<HttpWish>,
    pub http_sync: bool,
    pub secrets: BTreeSet<String>,
    pub commands: Vec<CommandRight>,
    pub enrollments: BTreeSet<EnrollmentRight>,
    pub push: bool,
    pub timers: bool,
    /// Requests that the plugin can do without: they are refused when used, and do not keep it from loading.
    pub optional: BTreeSet<Request>,
}

/// The capabilities that can be requested.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    Kv,
    Http,
    HttpSync,
    Secrets,
    Commands,
    Enrollments,
    Push,
    Timers,
}

impl Request {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Kv => "kv",
            Self::Http => "http",
            Self::HttpSync => "http-sync",
            Self::Secrets => "secrets",
            Self::Commands => "commands",
            Self::Enrollments => "enrollments",
            Self::Push => "push",
            Self::Timers => "timers",
        }
    }
}

/// How much of the key-values; `None`: as much as the operator gives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KvWish {
    pub bytes: Option<u64>,
    pub keys: Option<u64>,
}

/// Where requests may go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HttpWish {
    /// `"*"`: wherever the operator allows. For plugins whose address is configuration.
    Anywhere,
    Origin(Origin),
}

/// What may be done with commands.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum CommandRight {
    /// `enqueue:*`
    EnqueueAny,
    /// `enqueue:DeviceLock`
    Enqueue(String),
    Read,
    Cancel,
}

/// What may be done with enrollments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EnrollmentRight {
    Read,
    Tag,
    Release,
}

/// Limits that the author wishes, or that the operator grants.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct LimitWishes {
    /// Linear memory.
    pub memory: Option<Size>,
    /// Processor time of a synchronous hook.
    pub cpu: Option<Span>,
    /// Processor time of an asynchronous hook.
    pub cpu_async: Option<Span>,
    /// Wall time of a decision.
    pub decision: Option<Span>,
    /// Wall time of an answer to a check-in.
    pub answer: Option<Span>,
    /// Wall time of `event-commands`.
    pub generation: Option<Span>,
    /// Wall time of `event-sink`.
    pub event: Option<Span>,
    /// Wall time of `schedule`.
    pub schedule: Option<Span>,
    /// Wall time of `lifecycle`.
    pub lifecycle: Option<Span>,
    pub host_calls: Option<u32>,
    /// Bytes that a hook is given.
    pub input: Option<Size>,
    /// Bytes that a hook answers.
    pub output: Option<Size>,
    /// Commands of one call.
    pub commands: Option<u32>,
    /// Timers of one call.
    pub timers: Option<u32>,
    pub http_calls: Option<u32>,
    pub http_timeout: Option<Span>,
    /// Bytes of one answer.
    pub http_response: Option<Size>,
}

impl Manifest {
    /// Parses a `plugin.toml`.
    pub fn parse(text: &str) -> Result<Self, DocumentError> {
        const FILE: &str = "plugin.toml";
        let table: ManifestTable = document::parse(FILE, text)?;
        let PluginTable { name, version, wasm, sha256 } = table.plugin;
        Ok(Self {
            name: name.0,
            version: version.0,
            wasm: wasm.0,
            sha256: sha256.map(|digest| digest.0),
            hooks: table.hooks,
            requests: table.requests,
            limits: table.limits,
            config_defaults: table.config.defaults,
        })
    }

    /// What stands for the manifest of a lone `NAME.wasm`: no requests, no filters.
    pub fn lone(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            version: Version::new(0, 0, 0),
            wasm: format!("{name}.wasm"),
            sha256: None,
            hooks: ManifestHooks::default(),
            requests: Requests::default(),
            limits: LimitWishes::default(),
            config_defaults: toml::Table::new(),
        }
    }

    /// The first hook that the manifest names and the component does not export.
    pub fn hook_without_export(&self, exported: impl Fn(&str) -> bool) -> Option<&'static str> {
        let named = [
            ("lifecycle", self.hooks.lifecycle),
            ("enrollment-policy", self.hooks.enrollment_policy),
            ("user-authentication", self.hooks.user_authentication),
            ("token-source", self.hooks.token_source.is_some()),
            ("return-to-service", self.hooks.return_to_service),
            ("event-sink", self.hooks.event_sink.is_some()),
            ("event-commands", self.hooks.event_commands.is_some()),
            ("schedule", self.hooks.schedule.is_some()),
        ];
        named.into_iter().find(|(hook, named)| *named && !exported(hook)).map(|(hook, _)| hook)
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ManifestTable {
    plugin: PluginTable,
    #[serde(default)]
    hooks: ManifestHooks,
    #[serde(default)]
    requests: Requests,
    #[serde(default)]
    limits: LimitWishes,
    #[serde(default)]
    config: ConfigTable,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PluginTable {
    name: PluginName,
    version: PluginVersion,
    #[serde(default)]
    wasm: WasmFile,
    sha256: Option<Sha256Text>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ConfigTable {
    defaults: toml::Table,
}

macro_rules! from_text {
    ($name:ident, $parse:expr) => {
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                let parse: fn(String) -> Result<Self, String> = $parse;
                parse(text).map_err(de::Error::custom)
            }
        }
    };
}

#[derive(Debug)]
struct PluginName(String);
from_text!(PluginName, |text| {
    if is_plugin_name(&text) {
        Ok(Self(text))
    } else {
        Err(format!("`{text}` is no plugin name: lower-case letters, digits, `-` and `_`, at most 64"))
    }
});

#[derive(Debug)]
struct PluginVersion(Version);
from_text!(PluginVersion, |text| Version::parse(&text).map(Self).map_err(|error| format!("`{text}` is no version such as 1.4.0: {error}")));

#[derive(Debug)]
struct WasmFile(String);
impl Default for WasmFile {
    fn default() -> Self {
        Self("plugin.wasm".to_owned())
    }
}
from_text!(WasmFile, |text| {
    let plain = !text.is_empty() && !text.contains(['/', '\\', '\0']) && !text.starts_with('.');
    if plain { Ok(Self(text)) } else { Err(format!("`{text}` is no file name in the plugin's own directory")) }
});

#[derive(Debug)]
struct Sha256Text(String);
from_text!(Sha256Text, |text| {
    let digest = text.to_ascii_lowercase();
    if is_sha256(&digest) { Ok(Self(digest)) } else { Err("a SHA-256 is 64 hexadecimal digits".to_owned()) }
});

pub(super) fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// Hooks of the contract's plan that this server does not call yet.
const LATER_HOOKS: &[&str] = &[
    "check-in-policy",
    "profile-policy",
    "certificate-policy",
    "api-policy",
    "command-policy",
    "poll-commands",
    "declaration-source",
    "http-handler",
];

/// The version in sentences about what this server lacks.
pub(super) const SERVER_VERSION: &str = env!("CARGO_PKG_VERSION");

#[derive(Debug, Clone, Copy)]
enum HookName {
    Lifecycle,
    EnrollmentPolicy,
    UserAuthentication,
    TokenSource,
    ReturnToService,
    EventSink,
    EventCommands,
    Schedule,
}
from_text!(HookName, |text| match text.as_str() {
    "lifecycle" => Ok(Self::Lifecycle),
    "enrollment-policy" => Ok(Self::EnrollmentPolicy),
    "user-authentication" => Ok(Self::UserAuthentication),
    "token-source" => Ok(Self::TokenSource),
    "return-to-service" => Ok(Self::ReturnToService),
    "event-sink" => Ok(Self::EventSink),
    "event-commands" => Ok(Self::EventCommands),
    "schedule" => Ok(Self::Schedule),
    later if LATER_HOOKS.contains(&later) => Err(format!("this server ({SERVER_VERSION}) does not call the hook `{later}`")),
    unknown => Err(format!(
        "there is no hook `{unknown}`; hooks are lifecycle, enrollment-policy, user-authentication, token-source, return-to-service, \
         event-sink, event-commands, schedule"
    )),
});

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NoFilter {}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ScheduleTable {
    #[serde(default)]
    cron: Vec<CronLine>,
}

impl<'de> Deserialize<'de> for ManifestHooks {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HooksVisitor;
        impl<'de> Visitor<'de> for HooksVisitor {
            type Value = ManifestHooks;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table of hooks")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<ManifestHooks, A::Error> {
                let mut hooks = ManifestHooks::default();
                while let Some(name) = map.next_key::<HookName>()? {
                    match name {
                        HookName::Lifecycle => {
                            map.next_value::<NoFilter>()?;
                            hooks.lifecycle = true;
                        }
                        HookName::EnrollmentPolicy => {
                            map.next_value::<NoFilter>()?;
                            hooks.enrollment_policy = true;
                        }
                        HookName::UserAuthentication => {
                            map.next_value::<NoFilter>()?;
                            hooks.user_authentication = true;
                        }
                        HookName::TokenSource => hooks.token_source = Some(map.next_value()?),
                        HookName::ReturnToService => {
                            map.next_value::<NoFilter>()?;
                            hooks.return_to_service = true;
                        }
                        HookName::EventSink => hooks.event_sink = Some(map.next_value()?),
                        HookName::EventCommands => hooks.event_commands = Some(map.next_value()?),
                        HookName::Schedule => hooks.schedule = Some(map.next_value::<ScheduleTable>()?.cron),
                    }
                }
                Ok(hooks)
            }
        }
        deserializer.deserialize_map(HooksVisitor)
    }
}

// As long as a check-in's may be. Apple's are names like com.apple.maid; what else a device could ask for is nobody's.
from_text!(ServiceType, |text| {
    if !text.is_empty() && text.len() <= 255 && text.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(Self(text))
    } else {
        Err(format!("`{}` is no service type such as com.apple.maid", text.escape_default()))
    }
});

fn at_least_one<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeSet<ServiceType>, D::Error> {
    let services = BTreeSet::deserialize(deserializer)?;
    if services.is_empty() { Err(de::Error::custom("name the service types that the plugin answers, such as com.apple.maid")) } else { Ok(services) }
}

/// Topics that this server emits, as of now.
const TOPICS: &[&str] = &[
    "enrollment.enrolling",
    "enrollment.enrolled",
    "enrollment.checked-out",
    "push-token.rotated",
    "user.enrolled",
    "configuration.awaiting",
    "configuration.released",
    "bootstrap-token.escrowed",
    "command.queued",
    "command.sent",
    "command.not-now",
    "command.acknowledged",
    "command.errored",
    "command.format-error",
    "command.expired",
    "command.cancelled",
    "checkin.Authenticate",
    "checkin.TokenUpdate",
    "checkin.CheckOut",
    "checkin.UserAuthenticate",
    "checkin.SetBootstrapToken",
    "checkin.GetBootstrapToken",
    "checkin.DeclarativeManagement",
    "checkin.GetToken",
    "checkin.ReturnToService",
];

from_text!(Topic, |text| {
    let unknown = || Err(format!("this server ({SERVER_VERSION}) emits no topic `{text}`"));
    if text == DEFAULT_TOPIC {
        return Ok(Self(text));
    }
    if let Some(prefix) = text.strip_suffix('*') {
        let known = prefix.ends_with('.') && TOPICS.iter().any(|topic| topic.starts_with(prefix));
        return if known { Ok(Self(text)) } else { unknown() };
    }
    let (topic, request_type) = match text.split_once(':') {
        Some((topic, request_type)) => (topic, Some(request_type)),
        None => (text.as_str(), None),
    };
    if !TOPICS.contains(&topic) {
        return unknown();
    }
    match request_type {
        None => Ok(Self(text)),
        Some(_) if !topic.starts_with("command.") => Err(format!("`{text}`: only topics of commands are filtered by a request type")),
        Some(request_type) if is_request_type(request_type) => Ok(Self(text)),
        Some(request_type) => Err(format!("`{request_type}` is no request type")),
    }
});

fn is_request_type(text: &str) -> bool {
    !text.is_empty() && text.len() <= 64 && text.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

impl<'de> Deserialize<'de> for CronLine {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Line {
            name: String,
            cron: String,
        }
        let Line { name, cron } = Line::deserialize(deserializer)?;
        if name.is_empty() || name.len() > 64 || name.chars().any(char::is_control) {
            return Err(de::Error::custom("the name of a schedule is 1 to 64 printable characters"));
        }
        let cron = Cron::from_str(&cron).map_err(|error| de::Error::custom(format!("schedule `{name}`: `{cron}` is no cron expression: {error}")))?;
        Ok(Self { name, cron })
    }
}

impl<'de> Deserialize<'de> for KvWish {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Quota {
            bytes: Option<Size>,
            keys: Option<u64>,
        }
        struct KvVisitor;
        impl<'de> Visitor<'de> for KvVisitor {
            type Value = KvWish;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`true`, or a table such as { bytes = \"1MiB\" }")
            }
            fn visit_bool<E: de::Error>(self, wanted: bool) -> Result<KvWish, E> {
                if wanted { Ok(KvWish::default()) } else { Err(E::custom("leave it out instead of writing false")) }
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<KvWish, A::Error> {
                let Quota { bytes, keys } = Quota::deserialize(de::value::MapAccessDeserializer::new(map))?;
                Ok(KvWish { bytes: bytes.map(|size| size.0), keys })
            }
        }
        deserializer.deserialize_any(KvVisitor)
    }
}

from_text!(HttpWish, |text| if text == "*" { Ok(Self::Anywhere) } else { Origin::parse(&text).map(Self::Origin) });
from_text!(Origin, |text| Self::parse(&text));

from_text!(CommandRight, |text| match text.as_str() {
    "read" => Ok(Self::Read),
    "cancel" => Ok(Self::Cancel),
    "enqueue:*" => Ok(Self::EnqueueAny),
    _ => match text.strip_prefix("enqueue:") {
        Some(request_type) if is_request_type(request_type) => Ok(Self::Enqueue(request_type.to_owned())),
        _ => Err(format!("`{text}` is no right over commands: write \"enqueue:REQUESTTYPE\", \"enqueue:*\", \"read\" or \"cancel\"")),
    },
});

impl fmt::Display for CommandRight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EnqueueAny => f.write_str("enqueue:*"),
            Self::Enqueue(request_type) => write!(f, "enqueue:{request_type}"),
            Self::Read => f.write_str("read"),
            Self::Cancel => f.write_str("cancel"),
        }
    }
}

impl EnrollmentRight {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Tag => "tag",
            Self::Release => "release",
        }
    }
}

impl Requests {
    /// Whether the plugin can do without the request.
    pub fn is_optional(&self, request: Request) -> bool {
        self.optional.contains(&request)
    }
}

impl From<RequestTable> for Requests {
    fn from(table: RequestTable) -> Self {
        let RequestTable { kv, http, http_sync, secrets, commands, enrollments, push, timers, optional, .. } = table;
        Self { kv, http, http_sync, secrets, commands, enrollments, push, timers, optional }
    }
}

/// Refuses a key with a sentence of its own.
macro_rules! refused_key {
    ($name:ident, $sentence:expr) => {
        #[derive(Debug)]
        struct $name;
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
                Err(de::Error::custom($sentence))
            }
        }
    };
}
refused_key!(AlwaysGranted, "it is always granted: leave it out");
refused_key!(NotOffered, format!("this server ({SERVER_VERSION}) does not offer it"));

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct RequestTable {
    kv: Option<KvWish>,
    http: Vec<HttpWish>,
    http_sync: bool,
    secrets: BTreeSet<String>,
    commands: Vec<CommandRight>,
    enrollments: BTreeSet<EnrollmentRight>,
    push: bool,
    timers: bool,
    optional: BTreeSet<Request>,
    #[serde(rename = "runtime")]
    _runtime: Option<AlwaysGranted>,
    #[serde(rename = "log")]
    _log: Option<AlwaysGranted>,
    #[serde(rename = "config")]
    _config: Option<AlwaysGranted>,
    #[serde(rename = "plist")]
    _plist: Option<AlwaysGranted>,
    #[serde(rename = "crypto")]
    _crypto: Option<AlwaysGranted>,
    #[serde(rename = "payload")]
    _payload: Option<NotOffered>,
    #[serde(rename = "sensitive")]
    _sensitive: Option<NotOffered>,
    #[serde(rename = "observe")]
    _observe: Option<NotOffered>,
    #[serde(rename = "unenroll")]
    _unenroll: Option<NotOffered>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "[plugin]\nname = \"guard\"\nversion = \"1.4.0\"\n";

    fn problem(rest: &str) -> String {
        Manifest::parse(&format!("{HEAD}{rest}")).unwrap_err().to_string()
    }

    #[test]
    fn a_full_manifest_is_understood() {
        let manifest = Manifest::parse(&format!(
            r#"{HEAD}
wasm = "guard.wasm"
sha256 = "{}"
[hooks.enrollment-policy]
[hooks.event-sink]
topics = ["command.acknowledged:EraseDevice", "enrollment.*"]
include-self = true
[hooks.schedule]
cron = [{{ name = "refresh", cron = "*/15 * * * *" }}]
[requests]
kv = {{ bytes = "1MiB" }}
http = ["https://api.acme.example", "http://[::1]:8080", "*"]
secrets = ["token"]
commands = ["enqueue:DeviceLock", "read"]
enrollments = ["read", "tag"]
timers = true
optional = ["http"]
[limits]
memory = "32MiB"
cpu = "20ms"
[config.defaults]
grace = 5
"#,
            "AB".repeat(32)
        ))
        .unwrap();
        assert_eq!(manifest.wasm, "guard.wasm");
        assert_eq!(manifest.sha256, Some("ab".repeat(32)));
        let sink = manifest.hooks.event_sink.unwrap();
        assert!(sink.include_self && sink.topics.len() == 2);
        assert_eq!(manifest.hooks.schedule.unwrap()[0].name, "refresh");
        assert_eq!(manifest.requests.kv, Some(KvWish { bytes: Some(1 << 20), keys: None }));
        assert_eq!(manifest.requests.http[1], HttpWish::Origin(Origin { scheme: "http".into(), host: "[::1]".into(), port: 8080 }));
        assert!(manifest.requests.is_optional(Request::Http) && !manifest.requests.is_optional(Request::Kv));
        assert_eq!(manifest.limits.memory, Some(Size(32 << 20)));
        assert_eq!(manifest.config_defaults["grace"].as_integer(), Some(5));
    }

    #[test]
    fn the_plugins_of_this_repository_have_manifests_that_are_accepted() {
        for name in ["serial-allow-list", "enrollment-baseline", "chat-notify"] {
            let path = format!("{}/../../../plugins/{name}/plugin.toml", env!("CARGO_MANIFEST_DIR"));
            let manifest = Manifest::parse(&std::fs::read_to_string(path).unwrap()).unwrap();
            assert_eq!(manifest.name, name);
        }
    }

    #[test]
    fn a_plugin_without_topics_gets_all_but_the_raw_ones() {
        let manifest = Manifest::parse(&format!("{HEAD}[hooks.event-sink]\n")).unwrap();
        assert_eq!(manifest.hooks.event_sink.unwrap().topics, [Topic("*".to_owned())]);
    }

    #[test]
    fn a_hook_of_a_later_server_is_refused_by_name() {
        let later = problem("[hooks.command-policy]\ncommands = [\"EraseDevice\"]\n");
        assert!(later.starts_with("plugin.toml, line 4: `hooks.command-policy`: this server (0."), "{later}");
        assert!(later.ends_with("does not call the hook `command-policy`"), "{later}");
        assert!(problem("[hooks.even-sink]\n").contains("there is no hook `even-sink`"));
    }

    #[test]
    fn every_mistake_names_line_and_key() {
        for (rest, expected) in [
            ("sha256 = \"abc\"\n", "line 4: `plugin.sha256`: a SHA-256 is 64"),
            ("wasm = \"../other.wasm\"\n", "line 4: `plugin.wasm`: `../other.wasm` is no file name"),
            ("[requests]\nkv = false\n", "line 5: `requests.kv`: leave it out"),
            ("[requests]\nsensitive = [\"UnlockToken\"]\n", "line 5: `requests.sensitive`: this server"),
            ("[requests]\nlog = true\n", "line 5: `requests.log`: it is always granted"),
            ("[requests]\nhttp = [\"https://a.example/path\"]\n", "line 5: `requests.http`: `https://a.example/path` must end after the host"),
            ("[requests]\nhttp = [\"https://me@a.example\"]\n", "line 5: `requests.http`"),
            ("[requests]\ncommands = [\"DeviceLock\"]\n", "line 5: `requests.commands`: `DeviceLock` is no right"),
            ("[requests]\nfilesystem = true\n", "line 5: `requests.filesystem`: unknown field"),
            ("[hooks.event-sink]\ntopics = [\"command.acknowleged\"]\n", "line 5: `hooks.event-sink.topics`: this server"),
            ("[hooks.event-sink]\ntopics = [\"enrollment.enrolled:X\"]\n", "line 5: `hooks.event-sink.topics`"),
            ("[hooks.token-source]\n", "line 4: `hooks.token-source`: missing field `services`"),
            ("[hooks.token-source]\nservices = []\n", "line 5: `hooks.token-source.services`: name the service types"),
            ("[hooks.token-source]\nservices = [\"a b\"]\n", "line 5: `hooks.token-source.services`: `a b` is no service type"),
            ("[hooks.return-to-service]\nservices = []\n", "line 5: `hooks.return-to-service.services`: unknown field"),
            ("[hooks.enrollment-policy]\ncommands = []\n", "line 5: `hooks.enrollment-policy.commands`: unknown field"),
            ("[hooks.schedule]\ncron = [{ name = \"x\", cron = \"never\" }]\n", "line 5: `hooks.schedule.cron`: schedule `x`: `never` is no cron"),
            ("[limits]\nmemory = \"much\"\n", "line 5: `limits.memory`: `much` is no size"),
            ("[config]\nschema = {}\n", "line 5: `config.schema`: unknown field"),
        ] {
            let problem = problem(rest);
            assert!(problem.contains(expected), "{rest}\n→ {problem}\nexpected {expected}");
        }
        let version = Manifest::parse("[plugin]\nname = \"a\"\nversion = \"one\"\n").unwrap_err().to_string();
        assert!(version.contains("line 3: `plugin.version`: `one` is no version"), "{version}");
        let name = Manifest::parse("[plugin]\nname = \"../a\"\nversion = \"1.0.0\"\n").unwrap_err().to_string();
        assert!(name.contains("line 2: `plugin.name`"), "{name}");
    }
}
