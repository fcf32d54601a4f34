//! From what the author asks for and what the operator grants to what the host enforces: the intersection, and of limits the least.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::effective::{Capabilities, Ceilings, CommandsGrant, Effective, EnqueueGrant, EnrollmentsGrant, HttpGrant, KvGrant, Limits, Settings};
use crate::egress::{EgressPolicy, Origin, SecretBinding};

use super::document::{Size, Span};
use super::grant::{Grant, Grants, Overlay, Secrets};
use super::manifest::{CommandRight, EnrollmentRight, HttpWish, LimitWishes, Manifest, Request, Requests};

/// Requests that were not granted, as lines to paste into the grant file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MissingGrants {
    pub plugin: String,
    /// `kv = true`, and so on.
    pub lines: Vec<String>,
}

impl fmt::Display for MissingGrants {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "it requires what is not granted; add to plugins.d/{}.toml:\n[grants]\n{}", self.plugin, self.lines.join("\n"))
    }
}

impl std::error::Error for MissingGrants {}

/// What does not depend on plugin and operator.
#[derive(Debug, Clone, Default)]
pub struct Surroundings {
    pub ceilings: Ceilings,
    /// Never reached by an outbound request: this server's own listeners.
    pub own_addresses: Vec<std::net::SocketAddr>,
}

/// What the host enforces: requests met with grants. An error if something required was not granted.
pub fn effective(manifest: &Manifest, grant: &Grant, secrets: &Secrets, surroundings: &Surroundings) -> Result<Effective, MissingGrants> {
    let lines = missing(manifest, &grant.grants);
    if lines.is_empty() {
        Ok(intersection(manifest, grant, secrets, surroundings))
    } else {
        Err(MissingGrants { plugin: manifest.name.clone(), lines })
    }
}

/// The intersection alone, required or not: what is left to a version that is active already when a grant is withdrawn.
pub fn intersection(manifest: &Manifest, grant: &Grant, secrets: &Secrets, surroundings: &Surroundings) -> Effective {
    let none = Overlay::default();
    let settings = |overlay: &Overlay| settings(manifest, grant, overlay, secrets, surroundings);
    Effective {
        order: grant.order,
        on_failure: grant.on_failure.clone(),
        token_services: manifest.hooks.token_services(),
        tenants: grant.tenants.clone(),
        settings: settings(&none),
        overlays: grant.overlays.iter().map(|(tenant, overlay)| (tenant.clone(), settings(overlay))).collect(),
    }
}

fn settings(manifest: &Manifest, grant: &Grant, overlay: &Overlay, secrets: &Secrets, surroundings: &Surroundings) -> Settings {
    let limits = limits(&manifest.limits, &grant.limits, &overlay.limits, &surroundings.ceilings);
    let mut config = Map::new();
    for table in [&manifest.config_defaults, &grant.config, &overlay.config] {
        merge(&mut config, table);
    }
    Settings {
        mode: overlay.mode.unwrap_or(grant.mode),
        config: Arc::new(config.into()),
        capabilities: capabilities(&manifest.requests, &grant.grants, overlay, secrets, &limits, surroundings, &wishes(manifest, grant, overlay)),
        limits,
    }
}

/// The least of what wish and grants say about the fields that `Limits` has no place for.
struct HttpLimits {
    response: usize,
}

fn wishes(manifest: &Manifest, grant: &Grant, overlay: &Overlay) -> HttpLimits {
    const USUAL: usize = 1 << 20;
    const CEILING: usize = 8 << 20;
    let granted = overlay.limits.http_response.or(grant.limits.http_response).map_or(USUAL, |size| bytes(size.0));
    HttpLimits { response: manifest.limits.http_response.map_or(usize::MAX, |size| bytes(size.0)).min(granted).min(CEILING) }
}

fn bytes(size: u64) -> usize {
    usize::try_from(size).unwrap_or(usize::MAX)
}

fn capabilities(
    requests: &Requests,
    grants: &Grants,
    overlay: &Overlay,
    secrets: &Secrets,
    limits: &Limits,
    surroundings: &Surroundings,
    http_limits: &HttpLimits,
) -> Capabilities {
    let kv = requests.kv.zip(grants.kv).map(|(wish, granted)| {
        let usual = KvGrant::default();
        KvGrant {
            bytes: wish.bytes.unwrap_or(u64::MAX).min(granted.bytes.unwrap_or(usual.bytes)),
            keys: wish.keys.unwrap_or(u64::MAX).min(granted.keys.unwrap_or(usual.keys)),
            ..usual
        }
    });
    let origins = allowed_origins(requests, grants);
    let http = (!origins.is_empty()).then(|| HttpGrant {
        policy: Arc::new(egress_policy(requests, grants, overlay, secrets, origins, limits, surroundings, http_limits)),
        sync_hooks: requests.http_sync && grants.http_sync,
    });
    let enrollment = |right| requests.enrollments.contains(&right) && grants.enrollments.contains(&right);
    let command = |right| requests.commands.contains(&right) && grants.commands.contains(&right);
    Capabilities {
        kv,
        http,
        enrollments: EnrollmentsGrant {
            read: enrollment(EnrollmentRight::Read),
            tag: enrollment(EnrollmentRight::Tag),
            release: enrollment(EnrollmentRight::Release),
        },
        commands: CommandsGrant { enqueue: enqueue(requests, grants), read: command(CommandRight::Read), cancel: command(CommandRight::Cancel) },
        push: requests.push && grants.push,
        timers: requests.timers && grants.timers,
    }
}

fn enqueue(requests: &Requests, grants: &Grants) -> EnqueueGrant {
    let types = |rights: &[CommandRight]| -> EnqueueGrant {
        if rights.contains(&CommandRight::EnqueueAny) {
            return EnqueueGrant::All;
        }
        let types = rights.iter().filter_map(|right| if let CommandRight::Enqueue(request_type) = right { Some(request_type.clone()) } else { None });
        EnqueueGrant::Types(types.collect())
    };
    match (types(&requests.commands), types(&grants.commands)) {
        (EnqueueGrant::All, granted) => granted,
        (wished, EnqueueGrant::All) => wished,
        (EnqueueGrant::Types(wished), EnqueueGrant::Types(granted)) => EnqueueGrant::Types(wished.intersection(&granted).cloned().collect()),
    }
}

fn allowed_origins(requests: &Requests, grants: &Grants) -> BTreeSet<Origin> {
    let wished = |origin: &Origin| requests.http.iter().any(|wish| matches!(wish, HttpWish::Anywhere) || *wish == HttpWish::Origin(origin.clone()));
    grants.http.iter().filter(|origin| wished(origin)).cloned().collect()
}

#[expect(clippy::too_many_arguments, reason = "one call; a struct would only repeat the names")]
fn egress_policy(
    requests: &Requests,
    grants: &Grants,
    overlay: &Overlay,
    secrets: &Secrets,
    origins: BTreeSet<Origin>,
    limits: &Limits,
    surroundings: &Surroundings,
    http_limits: &HttpLimits,
) -> EgressPolicy {
    let sources = requests.secrets.iter().filter_map(|name| Some((name, overlay.secrets.get(name).or_else(|| grants.secrets.get(name))?)));
    let bindings = sources.filter_map(|(name, source)| {
        let secret = secrets.get(&source.file)?;
        Some((name.clone(), SecretBinding { host: source.host.to_ascii_lowercase(), value: secret.expose().to_owned() }))
    });
    EgressPolicy {
        allowed: origins.into_iter().collect(),
        secrets: bindings.collect(),
        max_response_bytes: http_limits.response,
        timeout: limits.http_timeout,
        refused: surroundings.own_addresses.clone(),
        max_calls: limits.http_calls,
        ..EgressPolicy::default()
    }
}

fn limits(wish: &LimitWishes, grant: &LimitWishes, overlay: &LimitWishes, ceilings: &Ceilings) -> Limits {
    let usual = Limits::default();
    let span = |field: fn(&LimitWishes) -> Option<Span>, usual: Duration, ceiling: Duration| {
        let granted = field(overlay).or(field(grant)).map_or(usual, |span| span.0);
        field(wish).map_or(Duration::MAX, |span| span.0).min(granted).min(ceiling)
    };
    let size = |field: fn(&LimitWishes) -> Option<Size>, usual: usize, ceiling: usize| {
        let granted = field(overlay).or(field(grant)).map_or(usual, |size| bytes(size.0));
        field(wish).map_or(usize::MAX, |size| bytes(size.0)).min(granted).min(ceiling)
    };
    let count = |field: fn(&LimitWishes) -> Option<u32>, usual: u32, ceiling: u32| {
        let granted = field(overlay).or(field(grant)).unwrap_or(usual);
        field(wish).unwrap_or(u32::MAX).min(granted).min(ceiling)
    };
    let count_of = |field: fn(&LimitWishes) -> Option<u32>, usual: usize, ceiling: u32| {
        usize::try_from(count(field, u32::try_from(usual).unwrap_or(u32::MAX), ceiling)).unwrap_or(usual)
    };
    let mut limits = usual;
    limits.memory = size(|l| l.memory, usual.memory, ceilings.memory);
    limits.cpu_sync = span(|l| l.cpu, usual.cpu_sync, ceilings.cpu_sync);
    limits.cpu_async = span(|l| l.cpu_async, usual.cpu_async, ceilings.cpu_async);
    limits.wall.decision = span(|l| l.decision, usual.wall.decision, ceilings.wall);
    limits.wall.answer = span(|l| l.answer, usual.wall.answer, ceilings.wall);
    limits.wall.event = span(|l| l.event, usual.wall.event, ceilings.wall);
    limits.wall.schedule = span(|l| l.schedule, usual.wall.schedule, ceilings.wall);
    limits.wall.lifecycle = span(|l| l.lifecycle, usual.wall.lifecycle, ceilings.wall);
    limits.host_calls = count(|l| l.host_calls, usual.host_calls, 1_000_000);
    limits.input = size(|l| l.input, usual.input, 32 << 20);
    limits.output = size(|l| l.output, usual.output, 16 << 20);
    limits.commands = count_of(|l| l.commands, usual.commands, 1_000);
    limits.timers = count_of(|l| l.timers, usual.timers, 1_000);
    limits.http_calls = count(|l| l.http_calls, usual.http_calls, 64);
    limits.http_timeout = span(|l| l.http_timeout, usual.http_timeout, ceilings.wall);
    limits
}

/// Lays a table over a document: tables meet key by key, everything else is replaced.
fn merge(document: &mut Map<String, Value>, table: &toml::Table) {
    for (key, value) in table {
        match (document.get_mut(key), value) {
            (Some(Value::Object(below)), toml::Value::Table(above)) => merge(below, above),
            _ => {
                document.insert(key.clone(), json_of(value));
            }
        }
    }
}

/// TOML as the contract's JSON: a time is `{"$date": …}`.
fn json_of(value: &toml::Value) -> Value {
    match value {
        toml::Value::String(text) => json!(text),
        toml::Value::Integer(number) => json!(number),
        toml::Value::Float(number) => json!(number),
        toml::Value::Boolean(flag) => json!(flag),
        toml::Value::Datetime(time) => json!({ "$date": time.to_string() }),
        toml::Value::Array(items) => Value::Array(items.iter().map(json_of).collect()),
        toml::Value::Table(table) => Value::Object(table.iter().map(|(key, value)| (key.clone(), json_of(value))).collect()),
    }
}

/// One line for each required request that is not granted in full.
fn missing(manifest: &Manifest, grants: &Grants) -> Vec<String> {
    let requests = &manifest.requests;
    let required = |request| !requests.is_optional(request);
    let mut lines = Vec::new();
    if requests.kv.is_some() && grants.kv.is_none() && required(Request::Kv) {
        lines.push(match requests.kv.and_then(|wish| wish.bytes) {
            Some(bytes) => format!("kv = {{ bytes = {bytes} }}"),
            None => "kv = true".to_owned(),
        });
    }
    if !requests.http.is_empty() && required(Request::Http) {
        let granted: BTreeSet<_> = grants.http.iter().collect();
        let named: Vec<_> = requests.http.iter().filter_map(|wish| if let HttpWish::Origin(origin) = wish { Some(origin) } else { None }).collect();
        let anywhere = requests.http.contains(&HttpWish::Anywhere);
        if named.iter().any(|origin| !granted.contains(origin)) {
            let all: BTreeSet<_> = named.into_iter().chain(granted).map(|origin| format!("\"{origin}\"")).collect();
            lines.push(format!("http = [{}]", all.into_iter().collect::<Vec<_>>().join(", ")));
        } else if anywhere && granted.is_empty() {
            lines.push("http = [\"https://HOST\"]  # the host that your configuration names".to_owned());
        }
    }
    if requests.http_sync && !grants.http_sync && required(Request::HttpSync) {
        lines.push("http-sync = true".to_owned());
    }
    if required(Request::Secrets) {
        for name in requests.secrets.iter().filter(|name| !grants.secrets.contains_key(*name)) {
            lines.push(format!("secrets.{name} = {{ file = \"{name}\", host = \"HOST\", use = \"http\" }}  # the file stands beside the grant file"));
        }
    }
    if required(Request::Commands) && !grants.commands.contains(&CommandRight::EnqueueAny) {
        let absent = requests.commands.iter().any(|right| !grants.commands.contains(right));
        if absent {
            lines.push(format!("commands = [{}]", quoted(requests.commands.iter().map(ToString::to_string))));
        }
    } else if required(Request::Commands) {
        let absent = requests.commands.iter().any(|right| !matches!(right, CommandRight::Enqueue(_)) && !grants.commands.contains(right));
        if absent {
            lines.push(format!("commands = [{}]", quoted(requests.commands.iter().map(ToString::to_string))));
        }
    }
    if required(Request::Enrollments) && !requests.enrollments.is_subset(&grants.enrollments) {
        lines.push(format!("enrollments = [{}]", quoted(requests.enrollments.iter().map(|right| right.as_str().to_owned()))));
    }
    if requests.push && !grants.push && required(Request::Push) {
        lines.push("push = true".to_owned());
    }
    if requests.timers && !grants.timers && required(Request::Timers) {
        lines.push("timers = true".to_owned());
    }
    lines
}

fn quoted(items: impl Iterator<Item = String>) -> String {
    items.map(|item| format!("\"{item}\"")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use wasmdm_protocol::enrollment::TenantId;

    fn manifest(rest: &str) -> Manifest {
        Manifest::parse(&format!("[plugin]\nname = \"guard\"\nversion = \"1.0.0\"\n{rest}")).unwrap()
    }

    fn grant(text: &str) -> Grant {
        Grant::parse("plugins.d/guard.toml", text).unwrap()
    }

    fn meet(manifest: &Manifest, grant: &Grant) -> Effective {
        effective(manifest, grant, &Secrets::new(), &Surroundings::default()).unwrap()
    }

    #[test]
    fn what_was_not_requested_is_not_there_however_much_is_granted() {
        let generous = grant(
            "[grants]\nkv = true\nhttp = [\"https://a.example\"]\ncommands = [\"enqueue:*\", \"read\"]\nenrollments = [\"read\", \"release\"]\ntimers = true\n",
        );
        let capabilities = meet(&manifest(""), &generous).settings.capabilities;
        assert!(capabilities.kv.is_none() && capabilities.http.is_none() && !capabilities.timers);
        assert_eq!(capabilities.enrollments, EnrollmentsGrant::default());
        assert_eq!(capabilities.commands, CommandsGrant::default());
    }

    #[test]
    fn a_missing_required_grant_is_answered_with_the_lines_to_paste() {
        let manifest = manifest(
            "[requests]\nkv = { bytes = \"1MiB\" }\nhttp = [\"https://api.acme.example\"]\nsecrets = [\"token\"]\ncommands = [\"enqueue:DeviceLock\"]\nenrollments = [\"read\"]\ntimers = true\n",
        );
        let error = effective(&manifest, &Grant::default(), &Secrets::new(), &Surroundings::default()).unwrap_err();
        let text = error.to_string();
        let (_, pasted) = text.split_once("plugins.d/guard.toml:\n").unwrap();
        // The lines are a grant file that lets it load.
        assert!(effective(&manifest, &grant(pasted), &Secrets::new(), &Surroundings::default()).is_ok(), "{pasted}");
        assert_eq!(error.lines.len(), 6);
    }

    #[test]
    fn an_optional_request_does_not_keep_a_plugin_from_loading() {
        let manifest = manifest("[requests]\nkv = true\ntimers = true\noptional = [\"timers\"]\n");
        let capabilities = meet(&manifest, &grant("[grants]\nkv = true\n")).settings.capabilities;
        assert!(capabilities.kv.is_some() && !capabilities.timers);
    }

    #[test]
    fn limits_are_the_least_of_wish_grant_and_ceiling() {
        let manifest = manifest("[requests]\nkv = { bytes = \"1MiB\" }\n[limits]\nmemory = \"128MiB\"\ncpu = \"20ms\"\n");
        let usual = meet(&manifest, &grant("[grants]\nkv = true\n")).settings;
        assert_eq!((usual.limits.memory, usual.limits.cpu_sync), (64 << 20, Duration::from_millis(20)));
        assert_eq!(usual.capabilities.kv.unwrap().bytes, 1 << 20);
        let raised = meet(&manifest, &grant("[grants]\nkv = true\n[limits]\nmemory = \"4GiB\"\ncpu-async = \"1min\"\n")).settings;
        assert_eq!(raised.limits.memory, 128 << 20);
        assert_eq!(raised.limits.cpu_async, Duration::from_secs(10));
    }

    #[test]
    fn a_command_may_be_queued_if_both_name_it() {
        let cases = [("\"enqueue:A\", \"enqueue:B\"", "\"enqueue:*\"", &["A", "B"][..]), ("\"enqueue:*\"", "\"enqueue:B\"", &["B"])];
        for (wished, granted, expected) in cases {
            let manifest = manifest(&format!("[requests]\ncommands = [{wished}]\noptional = [\"commands\"]\n"));
            let commands = meet(&manifest, &grant(&format!("[grants]\ncommands = [{granted}]\n"))).settings.capabilities.commands;
            for request_type in ["A", "B", "C"] {
                assert_eq!(commands.enqueue.permits(request_type), expected.contains(&request_type), "{wished} {granted} {request_type}");
            }
        }
    }

    #[test]
    fn only_origins_that_both_name_are_allowed_unless_the_plugin_goes_where_it_is_told() {
        let granted = grant("[grants]\nhttp = [\"https://a.example\", \"http://127.0.0.1:9999\"]\n");
        let origins = |wish: &str| allowed_origins(&manifest(&format!("[requests]\nhttp = [{wish}]\n")).requests, &granted.grants).len();
        assert_eq!(origins("\"https://a.example\""), 1);
        assert_eq!(origins("\"https://a.example:444\""), 0);
        assert_eq!(origins("\"*\""), 2);
    }

    #[test]
    fn configuration_is_defaults_then_grant_then_tenant() {
        let manifest = manifest("[config.defaults]\na = 1\nb = { x = 1, y = 1 }\nat = 2026-01-02T03:04:05Z\n");
        let grant = grant("[config]\nb = { y = 2 }\nlist = [1]\n[tenant.acme]\nmode = \"monitor\"\nconfig = { list = [2] }\n");
        let effective = meet(&manifest, &grant);
        let acme = effective.for_tenant(&TenantId::new("acme")).unwrap();
        let expected = json!({ "a": 1, "b": { "x": 1, "y": 2 }, "at": { "$date": "2026-01-02T03:04:05Z" }, "list": [2] });
        assert_eq!(Value::Object((**acme.config).clone()), expected);
        assert_eq!(acme.mode, crate::effective::Mode::Monitor);
        assert_eq!(effective.settings.config["list"], json!([1]));
    }
}
