//! `plugins.d/NAME.toml`: what the operator allows a plugin.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{self, Deserializer};
use wasmdm_protocol::enrollment::TenantId;

use crate::effective::{Mode, OnFailure};
use crate::egress::Origin;
use crate::hook::Hook;

use super::document::{self, DocumentError};
use super::manifest::{CommandRight, EnrollmentRight, KvWish, LimitWishes, is_sha256};

/// Largest secret, in bytes.
const MAX_SECRET: u64 = 64 * 1024;

/// A checked grant file. The default is what holds without one: enabled, with no capability.
#[derive(Debug, Clone)]
pub struct Grant {
    pub enabled: bool,
    pub mode: Mode,
    /// Lower is asked first.
    pub order: i32,
    /// The server is not ready, and the plugin's hooks answer by their failure policy, until it is active.
    pub required: bool,
    /// SHA-256 of the only component that may be loaded.
    pub pin: Option<String>,
    /// `None`: all.
    pub tenants: Option<BTreeSet<TenantId>>,
    pub grants: Grants,
    pub limits: LimitWishes,
    /// What a failure of a decision hook means.
    pub on_failure: BTreeMap<Hook, OnFailure>,
    pub config: toml::Table,
    pub overlays: BTreeMap<TenantId, Overlay>,
}

impl Default for Grant {
    fn default() -> Self {
        Self {
            enabled: true,
            mode: Mode::Enforce,
            order: 100,
            required: false,
            pin: None,
            tenants: None,
            grants: Grants::default(),
            limits: LimitWishes::default(),
            on_failure: BTreeMap::new(),
            config: toml::Table::new(),
            overlays: BTreeMap::new(),
        }
    }
}

/// Capabilities.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Grants {
    pub kv: Option<KvWish>,
    pub http: Vec<Origin>,
    pub http_sync: bool,
    pub secrets: BTreeMap<String, SecretSource>,
    pub commands: Vec<CommandRight>,
    pub enrollments: BTreeSet<EnrollmentRight>,
    pub push: bool,
    pub timers: bool,
}

/// Where a secret stands and what it may be used for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecretSource {
    /// Relative to the directory of the grant files.
    pub file: PathBuf,
    /// The only host that it is sent to.
    pub host: String,
    #[serde(rename = "use")]
    pub usage: SecretUse,
}

/// How a secret may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecretUse {
    /// In header values and addresses of outbound requests, filled in outside of the guest.
    Http,
}

impl<'de> Deserialize<'de> for SecretUse {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match String::deserialize(deserializer)?.as_str() {
            "http" => Ok(Self::Http),
            other => Err(de::Error::custom(format!(
                "a secret's use is \"http\"; this server ({}) knows no use `{other}`",
                super::manifest::SERVER_VERSION
            ))),
        }
    }
}

/// What differs for one tenant.
#[derive(Debug, Clone, Default)]
pub struct Overlay {
    pub mode: Option<Mode>,
    pub limits: LimitWishes,
    pub config: toml::Table,
    pub secrets: BTreeMap<String, SecretSource>,
}

impl Grant {
    /// Parses a grant file; `file` is its name in errors.
    pub fn parse(file: &str, text: &str) -> Result<Self, DocumentError> {
        let table: GrantTable = document::parse(file, text)?;
        Ok(Self {
            enabled: table.enabled,
            mode: table.mode.0,
            order: table.order,
            required: table.required,
            pin: table.pin.map(|pin| pin.0),
            tenants: table.tenants.map(|tenants| tenants.iter().map(|tenant| TenantId::new(tenant.as_str())).collect()),
            grants: table.grants,
            limits: table.limits,
            on_failure: table.on_failure.0,
            config: table.config,
            overlays: table
                .tenant
                .into_iter()
                .map(|(tenant, overlay)| {
                    let OverlayTable { mode, limits, config, secrets } = overlay;
                    (TenantId::new(tenant.as_str()), Overlay { mode: mode.map(|mode| mode.0), limits, config, secrets })
                })
                .collect(),
        })
    }

    /// Whether the operator wants the plugin to run.
    pub fn is_active(&self) -> bool {
        self.enabled && (self.mode != Mode::Disabled || self.overlays.values().any(|overlay| overlay.mode.is_some_and(|mode| mode != Mode::Disabled)))
    }

    /// Files of secrets, of all tenants.
    pub fn secret_files(&self) -> BTreeSet<&Path> {
        let overlaid = self.overlays.values().flat_map(|overlay| overlay.secrets.values());
        self.grants.secrets.values().chain(overlaid).map(|secret| secret.file.as_path()).collect()
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct GrantTable {
    #[serde(default = "yes")]
    enabled: bool,
    #[serde(default)]
    mode: ModeText,
    #[serde(default = "usual_order")]
    order: i32,
    #[serde(default)]
    required: bool,
    pin: Option<Pin>,
    tenants: Option<Vec<String>>,
    #[serde(default)]
    grants: Grants,
    #[serde(default)]
    limits: LimitWishes,
    #[serde(default)]
    on_failure: FailureTable,
    #[serde(default)]
    config: toml::Table,
    #[serde(default)]
    tenant: BTreeMap<String, OverlayTable>,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[derive(Default)]
struct OverlayTable {
    mode: Option<ModeText>,
    limits: LimitWishes,
    config: toml::Table,
    secrets: BTreeMap<String, SecretSource>,
}

const fn yes() -> bool {
    true
}

const fn usual_order() -> i32 {
    100
}

#[derive(Debug, Default)]
struct ModeText(Mode);

impl<'de> Deserialize<'de> for ModeText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match String::deserialize(deserializer)?.as_str() {
            "enforce" => Ok(Self(Mode::Enforce)),
            "monitor" => Ok(Self(Mode::Monitor)),
            "disabled" => Ok(Self(Mode::Disabled)),
            other => Err(de::Error::custom(format!("`{other}` is no mode: write \"enforce\", \"monitor\" or \"disabled\""))),
        }
    }
}

#[derive(Debug)]
struct Pin(String);

impl<'de> Deserialize<'de> for Pin {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?.to_ascii_lowercase();
        let digest = text.strip_prefix("sha256:").unwrap_or(&text);
        if is_sha256(digest) { Ok(Self(digest.to_owned())) } else { Err(de::Error::custom("a pin is \"sha256:\" and 64 hexadecimal digits")) }
    }
}

/// `on-failure = "open"` for all decision hooks, or a table by hook.
#[derive(Debug, Default)]
struct FailureTable(BTreeMap<Hook, OnFailure>);

impl<'de> Deserialize<'de> for FailureTable {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        fn policy<E: de::Error>(text: &str) -> Result<OnFailure, E> {
            match text {
                "open" => Ok(OnFailure::Open),
                "closed" => Ok(OnFailure::Closed),
                other => Err(E::custom(format!("`{other}` is no failure policy: write \"open\" or \"closed\""))),
            }
        }
        struct FailureVisitor;
        impl<'de> de::Visitor<'de> for FailureVisitor {
            type Value = FailureTable;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"open\", \"closed\", or a table of hooks")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<FailureTable, E> {
                let policy = policy(text)?;
                Ok(FailureTable(Hook::ALL.into_iter().filter(|hook| hook.is_decision()).map(|hook| (hook, policy)).collect()))
            }
            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<FailureTable, A::Error> {
                let mut table = BTreeMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    let hook = Hook::from_name(&name)
                        .filter(|hook| hook.is_decision())
                        .ok_or_else(|| de::Error::custom(format!("`{name}` is no hook with a failure policy; only enrollment-policy is")))?;
                    table.insert(hook, policy(&map.next_value::<String>()?)?);
                }
                Ok(FailureTable(table))
            }
        }
        deserializer.deserialize_any(FailureVisitor)
    }
}

/// A secret's text. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// The texts of a grant's secrets, by file as the grant names it.
pub type Secrets = BTreeMap<PathBuf, Secret>;

/// Reads the files of the secrets; also answers warnings about files that anybody can read.
pub fn read_secrets(grants_dir: &Path, grant: &Grant) -> Result<(Secrets, Vec<String>), String> {
    let mut secrets = Secrets::new();
    let mut warnings = Vec::new();
    for file in grant.secret_files() {
        let path = grants_dir.join(file);
        let name = file.display();
        let content = super::files::read_bounded(&path, MAX_SECRET).map_err(|problem| format!("secret file `{name}`: {problem}"))?;
        if content.readable_by_all {
            warnings.push(format!("secret file `{name}` can be read by every user of the machine: chmod 600"));
        }
        let text = String::from_utf8(content.bytes).map_err(|_| format!("secret file `{name}`: it is not UTF-8"))?;
        let text = text.trim_end_matches(['\r', '\n']);
        if text.is_empty() {
            return Err(format!("secret file `{name}`: it is empty"));
        }
        secrets.insert(file.to_owned(), Secret(text.to_owned()));
    }
    Ok((secrets, warnings))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "plugins.d/guard.toml";

    #[test]
    fn a_full_grant_is_understood() {
        let grant = Grant::parse(
            FILE,
            r#"
enabled = true
mode = "monitor"
order = -5
required = true
pin = "sha256:abababababababababababababababababababababababababababababababab"
tenants = ["default", "acme"]
on-failure = { enrollment-policy = "open" }
[grants]
kv = { bytes = "16MiB" }
http = ["https://hooks.example", "http://127.0.0.1:9999"]
commands = ["enqueue:DeviceLock"]
secrets = { token = { file = "acme-token", host = "hooks.example", use = "http" } }
enrollments = ["read"]
timers = true
[limits]
cpu = "20ms"
[config]
approvers = ["security@acme.example"]
[tenant.acme]
mode = "disabled"
config = { approvers = [] }
"#,
        )
        .unwrap();
        assert!(grant.is_active() && grant.required);
        assert_eq!((grant.mode, grant.order), (Mode::Monitor, -5));
        assert_eq!(grant.on_failure, BTreeMap::from([(Hook::EnrollmentPolicy, OnFailure::Open)]));
        assert_eq!(grant.grants.http.len(), 2);
        assert_eq!(grant.overlays[&TenantId::new("acme")].mode, Some(Mode::Disabled));
        assert_eq!(grant.secret_files().into_iter().collect::<Vec<_>>(), [Path::new("acme-token")]);
    }

    #[test]
    fn every_mistake_names_line_and_key() {
        for (text, expected) in [
            ("enabld = true\n", "plugins.d/guard.toml, line 1: `enabld`: unknown field"),
            ("mode = \"on\"\n", "line 1: `mode`: `on` is no mode"),
            ("on-failure = { event-sink = \"open\" }\n", "line 1: `on-failure`: `event-sink` is no hook with a failure policy"),
            ("on-failure = \"shut\"\n", "line 1: `on-failure`: `shut` is no failure policy"),
            ("pin = \"1\"\n", "line 1: `pin`: a pin is"),
            ("[grants]\nhttp = [\"*\"]\n", "line 2: `grants.http`: `*` is no URL"),
            ("[grants.secrets]\nt = { file = \"t\", host = \"h\", use = \"read\" }\n", "line 2: `grants.secrets.t`: a secret's use is \"http\""),
            ("[tenant.acme]\norder = 1\n", "line 2: `tenant.acme.order`: unknown field"),
        ] {
            let problem = Grant::parse(FILE, text).unwrap_err().to_string();
            assert!(problem.contains(expected), "{text}\n→ {problem}\nexpected {expected}");
        }
    }

    #[test]
    fn secrets_are_read_from_beside_the_grant_and_never_printed() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("token");
        std::fs::write(&file, "s3cret\n").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        let grant = Grant::parse(FILE, "[grants.secrets]\nt = { file = \"token\", host = \"h\", use = \"http\" }\n").unwrap();
        let (secrets, warnings) = read_secrets(directory.path(), &grant).unwrap();
        assert_eq!(secrets[Path::new("token")].expose(), "s3cret");
        assert!(!format!("{secrets:?}").contains("s3cret"));
        assert!(warnings[0].contains("`token` can be read by every user"));
        std::fs::remove_file(&file).unwrap();
        assert!(read_secrets(directory.path(), &grant).unwrap_err().contains("secret file `token`"));
    }
}
