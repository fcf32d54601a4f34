//! The configuration: flags before environment variables before the file before defaults, all under the same names.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use axum::http::HeaderName;
use clap::builder::BoolishValueParser;
use clap::{Args, ValueEnum};
use ipnet::IpNet;
use reqwest::Url;
use serde::Deserialize;
use wasmdm_apns::{Endpoint, Proxy, Roots};
use wasmdm_service::certificate_binding::BindingRules;
use wasmdm_service::core::ReEnroll;
use wasmdm_storage::keyring::Keyring;

use crate::apns_proxy;
use crate::apple_push::PushLimits;
use crate::declarative_proxy::DeclarativeProxyOptions;
use crate::dump::DumpTarget;
use crate::escrow_key;
use crate::logging::LogFormat;
use crate::webhook::{self, WebhookOptions};

/// What `wasmdm serve` can be told. Every value can also stand in the file of `--config`, under the name of its flag.
#[derive(Debug, Clone, Default, Args, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct ServeOptions {
    /// Address to listen on, for instance 127.0.0.1:9000; without a host, all addresses [default: :9000]
    #[arg(long, env = "WASMDM_LISTEN", value_name = "ADDRESS")]
    pub listen: Option<String>,

    /// Serve /metrics at this address, for instance 127.0.0.1:9001, and not where the devices come; without it, everybody who reaches --listen reads them
    #[arg(long, env = "WASMDM_METRICS_LISTEN", value_name = "ADDRESS")]
    pub metrics_listen: Option<String>,

    /// Database: `sqlite`, or `sqlite://PATH` [default: sqlite in the data directory]
    #[arg(long, env = "WASMDM_DATABASE", value_name = "URL")]
    pub database: Option<String>,

    /// Directory of everything that the server keeps [default: data]
    #[arg(long, env = "WASMDM_DATA", value_name = "DIR")]
    pub data: Option<PathBuf>,

    /// File of keys (`wasmdm db new-key`): what can hold a secret is sealed in the database with the first of them; without it, it stands there in plain
    #[arg(long, env = "WASMDM_KEY_FILE", value_name = "FILE")]
    pub key_file: Option<PathBuf>,

    /// PEM file of the authorities that issue device identities; without it devices are answered 503
    #[arg(long, env = "WASMDM_CA", value_name = "FILE")]
    pub ca: Option<PathBuf>,

    /// PEM file of intermediate certificates between those authorities and the devices
    #[arg(long, env = "WASMDM_INTERMEDIATE", value_name = "FILE")]
    pub intermediate: Option<PathBuf>,

    /// Take the device's certificate from this header (RFC 9440, or escaped PEM) instead of Mdm-Signature; needs --trusted-proxy
    #[arg(long, env = "WASMDM_CERT_HEADER", value_name = "NAME")]
    pub cert_header: Option<String>,

    /// Address or network of a proxy: its --cert-header is believed, and its connections are not counted as those of one peer; repeatable
    #[arg(long = "trusted-proxy", env = "WASMDM_TRUSTED_PROXY", value_name = "ADDRESS|CIDR", value_delimiter = ',')]
    #[serde(rename = "trusted-proxy")]
    pub trusted_proxies: Vec<String>,

    /// API key; better --api-key-file, as a command line can be seen by others [default: made at the first start, kept in the data directory]
    #[arg(long, env = "WASMDM_API_KEY", value_name = "KEY", hide_env_values = true)]
    pub api_key: Option<String>,

    /// File that holds the API key
    #[arg(long, env = "WASMDM_API_KEY_FILE", value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,

    /// Directory of plugins [default: plugins in the data directory]
    #[arg(long, env = "WASMDM_PLUGINS", value_name = "DIR")]
    pub plugins: Option<PathBuf>,

    /// Directory of grant files [default: plugins.d in the data directory]
    #[arg(long, env = "WASMDM_GRANTS", value_name = "DIR")]
    pub grants: Option<PathBuf>,

    /// Hand declarative management to the server at this address, as NanoMDM does: endpoints are resolved against it, so end it with a slash
    #[arg(long, env = "WASMDM_DM", value_name = "URL", hide_env_values = true)]
    pub dm: Option<String>,

    /// Sign requests to --dm with an HMAC of this key (X-Hmac-Signature); better --dm-send-hmac-key-file
    #[arg(long, env = "WASMDM_DM_SEND_HMAC_KEY", value_name = "KEY", hide_env_values = true)]
    pub dm_send_hmac_key: Option<String>,

    /// File that holds that key
    #[arg(long, env = "WASMDM_DM_SEND_HMAC_KEY_FILE", value_name = "FILE")]
    pub dm_send_hmac_key_file: Option<PathBuf>,

    /// Believe only answers of --dm with an HMAC of this key; better --dm-recv-hmac-key-file
    #[arg(long, env = "WASMDM_DM_RECV_HMAC_KEY", value_name = "KEY", hide_env_values = true)]
    pub dm_recv_hmac_key: Option<String>,

    /// File that holds that key
    #[arg(long, env = "WASMDM_DM_RECV_HMAC_KEY_FILE", value_name = "FILE")]
    pub dm_recv_hmac_key_file: Option<PathBuf>,

    /// Hand what devices ask for at /authproxy/ to the server at this address, with the enrollment's id in X-Enrollment-ID
    #[arg(long, env = "WASMDM_AUTH_PROXY_URL", value_name = "URL", hide_env_values = true)]
    pub auth_proxy_url: Option<String>,

    /// Where /v1/escrowkeyunlock takes Activation Lock off [default: Apple's]
    #[arg(long, env = "WASMDM_ESCROW_KEY_UNLOCK_URL", value_name = "URL", hide_env_values = true)]
    pub escrow_key_unlock_url: Option<String>,

    /// Take check-ins at /checkin only and reports at /mdm only, whatever their content type says; without it /mdm takes both as well
    #[arg(long, env = "WASMDM_CHECKIN", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub checkin: Option<bool>,

    /// Serve no devices: /mdm, /checkin and /authproxy/ are not there
    #[arg(long, env = "WASMDM_DISABLE_MDM", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub disable_mdm: Option<bool>,

    /// Take enrollments of another server at /migration (NanoMDM's nano2nano), for the time of the move
    #[arg(long, env = "WASMDM_MIGRATION", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub migration: Option<bool>,

    /// Manage the users of Macs, with a digest challenge of no length; without it they are declined (410)
    #[arg(long, env = "WASMDM_UA_ZL_DC", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub ua_zl_dc: Option<bool>,

    /// Tell this address of every message of a device, with NanoMDM's JSON, until it answers 2xx; repeatable
    #[arg(long = "webhook-url", env = "WASMDM_WEBHOOK_URL", value_name = "URL", hide_env_values = true)]
    #[serde(rename = "webhook-url")]
    pub webhook_urls: Vec<String>,

    /// Sign what --webhook-url is told with an HMAC of this key (X-Hmac-Signature); better --webhook-hmac-key-file
    #[arg(long, env = "WASMDM_WEBHOOK_HMAC_KEY", value_name = "KEY", hide_env_values = true)]
    pub webhook_hmac_key: Option<String>,

    /// File that holds that key
    #[arg(long, env = "WASMDM_WEBHOOK_HMAC_KEY_FILE", value_name = "FILE")]
    pub webhook_hmac_key_file: Option<PathBuf>,

    /// Tell only of these topics: mdm.Authenticate, mdm.TokenUpdate, …, mdm.Connect, mdm.Connect:Acknowledged, …; repeatable [default: all]
    #[arg(long = "webhook-topic", env = "WASMDM_WEBHOOK_TOPIC", value_name = "TOPIC", value_delimiter = ',')]
    #[serde(rename = "webhook-topic")]
    pub webhook_topics: Vec<String>,

    /// Tell --webhook-url the messages to the byte, with push tokens, unlock tokens and recovery keys, as NanoMDM does
    #[arg(long, env = "WASMDM_WEBHOOK_SECRETS", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub webhook_secrets: Option<bool>,

    /// What a known device may come back with, when it enrolls again: any certificate (allow), one that names it by UDID or serial number
    /// (same-identity), or what a plugin allows by name (policy) [default: allow]
    #[arg(long, env = "WASMDM_RE_ENROLL", value_enum, value_name = "RULE")]
    pub re_enroll: Option<ReEnrollRule>,

    /// Refuse what comes with another certificate than the enrollment's (enforce), or only log and count it (warn) [default: enforce]
    #[arg(long, env = "WASMDM_CERT_BINDING", value_enum, value_name = "RULE")]
    pub cert_binding: Option<CertBindingRule>,

    /// Let an enrollment that was moved here and has no certificate yet take the first one that is nobody's
    #[arg(long, env = "WASMDM_RETRO", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub retro: Option<bool>,

    /// Days for which a device with an expired identity may still fetch a command that renews it, and do nothing else [default: 0]
    #[arg(long, env = "WASMDM_IDENTITY_GRACE", value_name = "DAYS")]
    pub identity_grace: Option<u32>,
    /// Show what devices say and are answered, without secrets, to look for a fault; `-` or no value is standard output, an
    /// empty value none
    #[arg(long, env = "WASMDM_DUMP", value_name = "FILE|-", num_args = 0..=1, default_missing_value = "-")]
    pub dump: Option<String>,

    /// Host, or HOST:PORT, of Apple's push service; 2197 is its other port [default: api.push.apple.com:443]
    #[arg(long, env = "WASMDM_APNS_ENDPOINT", value_name = "HOST[:PORT]")]
    pub apns_endpoint: Option<String>,

    /// PEM file of the authorities that the push service's certificate leads to, instead of the public ones
    #[arg(long, env = "WASMDM_APNS_ROOTS", value_name = "FILE")]
    pub apns_roots: Option<PathBuf>,

    /// HTTP proxy through which the push service is reached: http://HOST:PORT, or http://USER:PASSWORD@HOST:PORT; `none` for none whatever the
    /// environment says [default: `HTTPS_PROXY`, unless `NO_PROXY` names the service]
    #[arg(long, env = "WASMDM_APNS_PROXY", value_name = "URL", hide_env_values = true)]
    pub apns_proxy: Option<String>,

    /// Devices that are woken in a second by what goes on in the background, mass pushes for instance: all of them come [default: 1000]
    #[arg(long, env = "WASMDM_PUSH_RATE", value_name = "N")]
    pub push_rate: Option<NonZeroU32>,

    /// TOML file with any of these values
    #[arg(long, env = "WASMDM_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,

    /// Connections served at once [default: 10000]
    #[arg(long, env = "WASMDM_MAX_CONNECTIONS", value_name = "N")]
    pub max_connections: Option<usize>,

    /// How log lines are written [default: text]
    #[arg(long, env = "WASMDM_LOG_FORMAT", value_enum, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,

    /// Level, or levels by target: `info`, `debug`, `info,wasmdm_service=debug` [default: info]
    #[arg(long, env = "WASMDM_LOG_LEVEL", value_name = "FILTER")]
    pub log_level: Option<String>,

    /// Names of the flags whose value was given in NanoMDM's way, and which may be idle as there
    #[arg(skip)]
    #[serde(skip)]
    pub of_nanomdm: Vec<&'static str>,
}

/// `--re-enroll`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReEnrollRule {
    Allow,
    SameIdentity,
    Policy,
}

/// `--cert-binding`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CertBindingRule {
    Enforce,
    Warn,
}

/// A complete, checked configuration.
#[derive(Clone)]
pub struct Config {
    pub listen: SocketAddr,
    pub metrics_listen: Option<SocketAddr>,
    pub database: String,
    pub keyring: Keyring,
    pub data: PathBuf,
    pub authorities: Option<Authorities>,
    pub identity: IdentitySource,
    /// Whose connections are those of many devices.
    pub trusted_proxies: Vec<IpNet>,
    pub api_key: ApiKeySource,
    pub plugins: PathBuf,
    pub grants: PathBuf,
    pub declarative_proxy: Option<DeclarativeProxyOptions>,
    pub auth_proxy: Option<Url>,
    pub webhooks: WebhookOptions,
    pub escrow_key_unlock: Url,
    pub device_paths: DevicePaths,
    pub takes_migrations: bool,
    pub dump: Option<DumpTarget>,
    pub zero_length_digest_challenge: bool,
    pub re_enroll: ReEnroll,
    pub binding: BindingRules,
    pub apns: ApnsService,
    pub push_rate: NonZeroU32,
    pub identity_grace: Duration,
    pub max_connections: usize,
    pub log_format: LogFormat,
    pub log_level: String,
    /// What the operator should know of it, for the log.
    pub remarks: Vec<String>,
}

/// Where pushes go.
#[derive(Debug, Clone)]
pub struct ApnsService {
    pub endpoint: Endpoint,
    pub roots: Roots,
    pub proxy: Option<Proxy>,
    /// Not to be configured; tests are less patient.
    pub limits: PushLimits,
}

/// What a small server answers at once: each device that is woken asks several times.
const PUSH_RATE: NonZeroU32 = match NonZeroU32::new(1000) {
    Some(rate) => rate,
    None => NonZeroU32::MIN,
};

/// Days; an authority that issues for longer than a decade needs no grace.
const LONGEST_GRACE: u32 = 3650;

/// Contents of the PEM files.
#[derive(Debug, Clone)]
pub struct Authorities {
    pub roots: Vec<u8>,
    pub intermediates: Vec<u8>,
}

/// Where device identities come from.
#[derive(Debug, Clone)]
pub enum IdentitySource {
    Signature,
    Header { name: HeaderName, proxies: Vec<IpNet> },
}

/// Which messages are taken where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DevicePaths {
    /// No device is served.
    Off,
    /// `/mdm` takes both kinds of message, told apart by the content type; `/checkin` takes check-ins.
    Mixed,
    /// `/mdm` takes reports, `/checkin` check-ins; the content type is not looked at.
    Split,
}

/// Where the API key comes from. Not printable: it may hold the key.
#[derive(Clone)]
pub enum ApiKeySource {
    Given(String),
    /// Read it there, or make it.
    Kept(PathBuf),
}

impl ServeOptions {
    /// Adds the file's values where neither a flag nor a variable was given, and checks all.
    pub fn resolve(self) -> anyhow::Result<Config> {
        let options = match &self.config {
            Some(path) => {
                let text = read_text(path, "config")?;
                let file = toml::from_str(&text).map_err(|error| anyhow::anyhow!("config: {}: {}", path.display(), toml_problem(&text, &error)))?;
                self.over(file)
            }
            None => self,
        };
        let data = options.data.unwrap_or_else(|| PathBuf::from("data"));
        let authorities = match (&options.ca, &options.intermediate) {
            (Some(ca), intermediate) => Some(Authorities {
                roots: std::fs::read(ca).with_context(|| format!("ca: {} cannot be read", ca.display()))?,
                intermediates: match intermediate {
                    Some(path) => std::fs::read(path).with_context(|| format!("intermediate: {} cannot be read", path.display()))?,
                    None => Vec::new(),
                },
            }),
            (None, Some(_)) => bail!("intermediate: it needs ca, the authorities it leads to"),
            (None, None) => None,
        };
        let api_key = match secret("api-key", options.api_key, options.api_key_file)? {
            Some(key) => ApiKeySource::Given(key),
            None => ApiKeySource::Kept(data.join("api-key")),
        };
        let send_hmac_key = secret("dm-send-hmac-key", options.dm_send_hmac_key, options.dm_send_hmac_key_file)?;
        let receive_hmac_key = secret("dm-recv-hmac-key", options.dm_recv_hmac_key, options.dm_recv_hmac_key_file)?;
        // Start lines of NanoMDM leave keys behind that have nothing to sign; it does not mind.
        let mut remarks = Vec::new();
        let mut idle = |name: &str, address: &str| {
            let is_nanomdms = options.of_nanomdm.contains(&name);
            if is_nanomdms {
                remarks.push(format!("{name}: it is not used, as there is no {address}"));
            }
            is_nanomdms
        };
        let declarative_proxy = match &options.dm {
            Some(url) => Some(DeclarativeProxyOptions { url: http_url("dm", url)?, send_hmac_key, receive_hmac_key }),
            None => {
                for (name, key) in [("dm-send-hmac-key", &send_hmac_key), ("dm-recv-hmac-key", &receive_hmac_key)] {
                    if key.is_some() && !idle(name, "dm") {
                        bail!("dm: the keys of declarative management need its address");
                    }
                }
                None
            }
        };
        let webhooks = WebhookOptions {
            urls: options.webhook_urls.iter().map(|url| webhook_url(url)).collect::<anyhow::Result<_>>()?,
            hmac_key: secret("webhook-hmac-key", options.webhook_hmac_key, options.webhook_hmac_key_file)?,
            topics: options.webhook_topics,
            with_secrets: options.webhook_secrets.unwrap_or_default(),
        };
        if let Some(unknown) = webhooks.topics.iter().find(|topic| !webhook::is_topic(topic)) {
            bail!("webhook-topic: there is no `{unknown}`: write for instance mdm.TokenUpdate, mdm.Connect or mdm.Connect:Error");
        }
        if webhooks.urls.is_empty() {
            let has_idle_key = webhooks.hmac_key.is_some() && !idle("webhook-hmac-key", "webhook-url");
            if has_idle_key || webhooks.with_secrets || !webhooks.topics.is_empty() {
                bail!("webhook-url: the other values of the webhook need its address");
            }
        }
        let trusted_proxies = options.trusted_proxies.iter().map(|text| network(text)).collect::<anyhow::Result<Vec<_>>>()?;
        let endpoint = match &options.apns_endpoint {
            Some(text) => Endpoint::parse(text).map_err(|error| anyhow::anyhow!("apns-{error}"))?,
            None => Endpoint::default(),
        };
        Ok(Config {
            listen: listen_address("listen", options.listen.as_deref().unwrap_or(":9000"))?,
            metrics_listen: options.metrics_listen.as_deref().map(|text| listen_address("metrics-listen", text)).transpose()?,
            database: database_url(options.database.as_deref().unwrap_or("sqlite"), &data)?,
            keyring: keyring(options.key_file.as_deref())?,
            authorities,
            identity: identity_source(options.cert_header.as_deref(), &trusted_proxies)?,
            trusted_proxies,
            api_key,
            plugins: options.plugins.unwrap_or_else(|| data.join("plugins")),
            grants: options.grants.unwrap_or_else(|| data.join("plugins.d")),
            declarative_proxy,
            auth_proxy: options.auth_proxy_url.as_deref().map(|url| http_url("auth-proxy-url", url)).transpose()?,
            webhooks,
            escrow_key_unlock: http_url("escrow-key-unlock-url", options.escrow_key_unlock_url.as_deref().unwrap_or(escrow_key::DEFAULT_URL))?,
            device_paths: match (options.disable_mdm.unwrap_or_default(), options.checkin.unwrap_or_default()) {
                (true, _) => DevicePaths::Off,
                (false, true) => DevicePaths::Split,
                (false, false) => DevicePaths::Mixed,
            },
            takes_migrations: options.migration.unwrap_or_default(),
            // `--dump=` is none, whatever the file says.
            dump: options.dump.as_deref().filter(|target| !target.is_empty()).map(DumpTarget::of),
            zero_length_digest_challenge: options.ua_zl_dc.unwrap_or_default(),
            re_enroll: match options.re_enroll {
                None | Some(ReEnrollRule::Allow) => ReEnroll::Allow,
                Some(ReEnrollRule::SameIdentity) => ReEnroll::SameIdentity,
                Some(ReEnrollRule::Policy) => ReEnroll::Policy,
            },
            binding: BindingRules { only_warn: options.cert_binding == Some(CertBindingRule::Warn), retroactive: options.retro.unwrap_or_default() },
            push_rate: options.push_rate.unwrap_or(PUSH_RATE),
            apns: ApnsService {
                proxy: apns_proxy::choose(options.apns_proxy.as_deref(), &endpoint, |name| std::env::var(name).ok())?,
                limits: PushLimits::default(),
                endpoint,
                roots: match &options.apns_roots {
                    Some(path) => Roots::Pem(read_text(path, "apns-roots")?),
                    None => Roots::Mozilla,
                },
            },
            identity_grace: match options.identity_grace.unwrap_or(0) {
                days if days > LONGEST_GRACE => bail!("identity-grace: at most {LONGEST_GRACE} days"),
                days => Duration::from_hours(24 * u64::from(days)),
            },
            max_connections: match options.max_connections {
                Some(0) => bail!("max-connections: at least 1"),
                Some(connections) => connections,
                None => 10_000,
            },
            log_format: options.log_format.unwrap_or_default(),
            log_level: options.log_level.unwrap_or_else(|| "info".to_owned()),
            remarks,
            data,
        })
    }

    fn over(self, file: Self) -> Self {
        Self {
            listen: self.listen.or(file.listen),
            metrics_listen: self.metrics_listen.or(file.metrics_listen),
            database: self.database.or(file.database),
            data: self.data.or(file.data),
            key_file: self.key_file.or(file.key_file),
            ca: self.ca.or(file.ca),
            intermediate: self.intermediate.or(file.intermediate),
            cert_header: self.cert_header.or(file.cert_header),
            trusted_proxies: if self.trusted_proxies.is_empty() { file.trusted_proxies } else { self.trusted_proxies },
            api_key: or_of_two(self.api_key.as_ref(), self.api_key_file.as_ref(), file.api_key),
            api_key_file: or_of_two(self.api_key_file.as_ref(), self.api_key.as_ref(), file.api_key_file),
            plugins: self.plugins.or(file.plugins),
            grants: self.grants.or(file.grants),
            dm: self.dm.or(file.dm),
            dm_send_hmac_key: or_of_two(self.dm_send_hmac_key.as_ref(), self.dm_send_hmac_key_file.as_ref(), file.dm_send_hmac_key),
            dm_send_hmac_key_file: or_of_two(self.dm_send_hmac_key_file.as_ref(), self.dm_send_hmac_key.as_ref(), file.dm_send_hmac_key_file),
            dm_recv_hmac_key: or_of_two(self.dm_recv_hmac_key.as_ref(), self.dm_recv_hmac_key_file.as_ref(), file.dm_recv_hmac_key),
            dm_recv_hmac_key_file: or_of_two(self.dm_recv_hmac_key_file.as_ref(), self.dm_recv_hmac_key.as_ref(), file.dm_recv_hmac_key_file),
            auth_proxy_url: self.auth_proxy_url.or(file.auth_proxy_url),
            webhook_urls: if self.webhook_urls.is_empty() { file.webhook_urls } else { self.webhook_urls },
            webhook_hmac_key: or_of_two(self.webhook_hmac_key.as_ref(), self.webhook_hmac_key_file.as_ref(), file.webhook_hmac_key),
            webhook_hmac_key_file: or_of_two(self.webhook_hmac_key_file.as_ref(), self.webhook_hmac_key.as_ref(), file.webhook_hmac_key_file),
            webhook_topics: if self.webhook_topics.is_empty() { file.webhook_topics } else { self.webhook_topics },
            webhook_secrets: self.webhook_secrets.or(file.webhook_secrets),
            escrow_key_unlock_url: self.escrow_key_unlock_url.or(file.escrow_key_unlock_url),
            checkin: self.checkin.or(file.checkin),
            disable_mdm: self.disable_mdm.or(file.disable_mdm),
            migration: self.migration.or(file.migration),
            ua_zl_dc: self.ua_zl_dc.or(file.ua_zl_dc),
            re_enroll: self.re_enroll.or(file.re_enroll),
            cert_binding: self.cert_binding.or(file.cert_binding),
            retro: self.retro.or(file.retro),
            apns_endpoint: self.apns_endpoint.or(file.apns_endpoint),
            apns_roots: self.apns_roots.or(file.apns_roots),
            apns_proxy: self.apns_proxy.or(file.apns_proxy),
            push_rate: self.push_rate.or(file.push_rate),
            identity_grace: self.identity_grace.or(file.identity_grace),
            dump: self.dump.or(file.dump),
            config: self.config,
            max_connections: self.max_connections.or(file.max_connections),
            log_format: self.log_format.or(file.log_format),
            log_level: self.log_level.or(file.log_level),
            of_nanomdm: self.of_nanomdm,
        }
    }
}

/// One way of giving a secret replaces the other, or a flag could not override a file.
fn or_of_two<T: Clone, U>(given: Option<&T>, other_way: Option<&U>, file: Option<T>) -> Option<T> {
    given.cloned().or(if other_way.is_some() { None } else { file })
}

/// A secret that can be given or stand in a file.
fn secret(field: &str, given: Option<String>, path: Option<PathBuf>) -> anyhow::Result<Option<String>> {
    match (given, path) {
        (Some(_), Some(_)) => bail!("{field}: give either {field} or {field}-file"),
        (Some(secret), None) if secret.trim().is_empty() => bail!("{field}: it is empty"),
        (Some(secret), None) => Ok(Some(secret)),
        (None, Some(path)) => {
            let secret = read_text(&path, &format!("{field}-file"))?.trim().to_owned();
            if secret.is_empty() {
                bail!("{field}-file: {} is empty", path.display());
            }
            Ok(Some(secret))
        }
        (None, None) => Ok(None),
    }
}

/// What is wrong, and where, without the line itself and without the value: either may hold a secret.
fn toml_problem(text: &str, error: &toml::de::Error) -> String {
    let message = error.message();
    let kind = ["invalid type: ", "invalid value: "].iter().find_map(|kind| Some((kind, message.strip_prefix(kind)?)));
    let problem = match (kind, message.rsplit_once(", expected ")) {
        (Some((kind, rest)), Some((_, expected))) => {
            format!("{kind}{}, expected {expected}", rest.split(['"', '`']).next().unwrap_or_default().trim_end())
        }
        _ => message.to_owned(),
    };
    let Some(before) = error.span().and_then(|span| text.get(..span.start)) else { return problem };
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    format!("line {line}, column {column}: {problem}")
}

/// The text is not repeated: it may hold a password.
fn http_url(field: &str, text: &str) -> anyhow::Result<Url> {
    let url = Url::parse(text).with_context(|| format!("{field}: it is no URL"))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        bail!("{field}: write http://HOST/PATH/ or https://HOST/PATH/");
    }
    Ok(url)
}

/// One URL. Two with a comma between would be the first one with an odd path, and the second receiver would hear nothing.
fn webhook_url(text: &str) -> anyhow::Result<Url> {
    if [",http://", ",https://"].iter().any(|next| text.contains(next)) {
        bail!("webhook-url: it is one URL, and these are several with commas between: repeat --webhook-url, or list them in the file of --config");
    }
    http_url("webhook-url", text)
}

fn read_text(path: &Path, field: &str) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("{field}: {} cannot be read", path.display()))
}

/// `:9000` listens on all addresses, as it does in NanoMDM.
fn listen_address(name: &str, text: &str) -> anyhow::Result<SocketAddr> {
    let wanted = || format!("{name}: `{text}` is no address: write HOST:PORT, for instance 127.0.0.1:9000 or :9000");
    if let Some(port) = text.strip_prefix(':') {
        let port = port.parse().with_context(wanted)?;
        return Ok(SocketAddr::new(IpAddr::from([0_u16; 8]), port));
    }
    if let Some(port) = text.strip_prefix("localhost:") {
        return Ok(SocketAddr::new(IpAddr::from([127, 0, 0, 1]), port.parse().with_context(wanted)?));
    }
    text.parse().with_context(wanted)
}

/// `sqlite`, `sqlite://PATH`; others are refused by name.
pub fn database_url(text: &str, data: &Path) -> anyhow::Result<String> {
    match text {
        "sqlite" => Ok(format!("sqlite://{}", data.join("wasmdm.sqlite").display())),
        text if text.starts_with("sqlite://") && text.len() > "sqlite://".len() => Ok(text.to_owned()),
        text if text.starts_with("postgres:") || text.starts_with("postgresql:") || text.starts_with("mysql:") => {
            bail!("database: this version keeps its state in SQLite only: write sqlite://PATH")
        }
        // The text may hold a password.
        _ => bail!("database: write sqlite, or sqlite://PATH"),
    }
}

/// Of the key file; without one there is no key.
pub fn keyring(path: Option<&Path>) -> anyhow::Result<Keyring> {
    Ok(path.map(Keyring::from_file).transpose()?.unwrap_or_default())
}

fn identity_source(header: Option<&str>, proxies: &[IpNet]) -> anyhow::Result<IdentitySource> {
    match header {
        None => Ok(IdentitySource::Signature),
        Some(_) if proxies.is_empty() => {
            bail!("cert-header: it needs trusted-proxy, the proxy's address: from anyone else the header could be forged")
        }
        Some(name) => {
            let name = name.parse().with_context(|| format!("cert-header: `{name}` is no header name"))?;
            Ok(IdentitySource::Header { name, proxies: proxies.to_vec() })
        }
    }
}

fn network(text: &str) -> anyhow::Result<IpNet> {
    text.parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .with_context(|| format!("trusted-proxy: `{text}` is neither an address nor a network such as 10.0.0.0/8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &[&str]) -> ServeOptions {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            options: ServeOptions,
        }
        <Line as clap::Parser>::try_parse_from(line).unwrap().options
    }

    fn problem(options: ServeOptions) -> String {
        match options.resolve() {
            Ok(_) => panic!("it was accepted"),
            Err(error) => format!("{error:#}"),
        }
    }

    /// With the store that its documents name, and nothing else, it did not start. NanoMDM defect 13.
    #[test]
    fn with_nothing_given_it_listens_on_9000_and_keeps_all_in_data() {
        let config = ServeOptions::default().resolve().unwrap();
        assert_eq!(config.listen.port(), 9000);
        assert_eq!(config.database, "sqlite://data/wasmdm.sqlite");
        assert_eq!(config.grants, Path::new("data/plugins.d"));
        assert!(config.authorities.is_none());
    }

    #[test]
    fn a_certificate_header_without_a_trusted_proxy_is_refused() {
        let options = ServeOptions { cert_header: Some("Client-Cert".to_owned()), ..ServeOptions::default() };
        assert!(problem(options).starts_with("cert-header:"));
    }

    #[test]
    fn every_wrong_value_names_its_field() {
        let with = |change: fn(&mut ServeOptions)| {
            let mut options = ServeOptions::default();
            change(&mut options);
            problem(options)
        };
        assert!(with(|o| o.listen = Some("nine".to_owned())).starts_with("listen:"));
        assert!(with(|o| o.metrics_listen = Some("nine".to_owned())).starts_with("metrics-listen:"));
        assert!(with(|o| o.database = Some("mysql://root:secret@host/db".to_owned())).starts_with("database:"));
        assert!(!with(|o| o.database = Some("mysql://root:secret@host/db".to_owned())).contains("secret"));
        assert!(with(|o| o.trusted_proxies = vec!["somewhere".to_owned()]).starts_with("trusted-proxy:"));
        assert!(with(|o| o.key_file = Some(PathBuf::from("/nowhere/keys"))).starts_with("key-file:"));
        assert!(with(|o| o.ca = Some(PathBuf::from("/nowhere/ca.pem"))).starts_with("ca:"));
        assert!(with(|o| o.api_key = Some(" ".to_owned())).starts_with("api-key:"));
        assert!(with(|o| o.dm = Some("ftp://name:secret@host/".to_owned())).starts_with("dm:"));
        assert!(!with(|o| o.dm = Some("name:secret@host".to_owned())).contains("secret"));
        assert!(with(|o| o.dm_send_hmac_key = Some("key".to_owned())).starts_with("dm:"));
        assert!(with(|o| o.auth_proxy_url = Some("files.example/base".to_owned())).starts_with("auth-proxy-url:"));
        assert!(with(|o| o.escrow_key_unlock_url = Some("ftp://files.example/".to_owned())).starts_with("escrow-key-unlock-url:"));
        assert!(with(|o| o.webhook_urls = vec!["http:".to_owned()]).starts_with("webhook-url:"));
        assert!(with(|o| o.webhook_secrets = Some(true)).starts_with("webhook-url:"));
        let unknown_topic = |o: &mut ServeOptions| {
            o.webhook_urls = vec!["http://127.0.0.1/".to_owned()];
            o.webhook_topics = vec!["mdm.Everything".to_owned()];
        };
        assert!(with(unknown_topic).starts_with("webhook-topic:"));
        assert!(with(|o| o.apns_proxy = Some("socks5://name:secret@host".to_owned())).starts_with("apns-proxy:"));
        assert!(!with(|o| o.apns_proxy = Some("socks5://name:secret@host".to_owned())).contains("secret"));
        assert!(with(|o| o.max_connections = Some(0)).starts_with("max-connections:"));
    }

    /// The whole line stood in the error, and with it the key.
    #[test]
    fn an_error_of_the_file_names_its_place_and_shows_nothing_of_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("wasmdm.toml");
        for (text, place, expected) in [
            ("listen = \":1\"\napi-key = \"SECRET\n", "line 2, column", ""),
            ("listen = \":1\"\n  api_key = \"SECRET\"\n", "line 2, column 3:", "unknown field `api_key`"),
            ("webhook-url = \"http://u:SECRET@h/\"\n", "line 1, column 15:", "invalid type: string, expected a sequence"),
            ("webhook-url = \"SECRET, expected SECRET\"\n", "line 1, column 15:", "invalid type: string, expected a sequence"),
            ("api-key = 735131\n", "line 1, column 11:", "invalid type: integer, expected a string"),
            ("checkin = \"SECRET\"\n", "line 1, column 11:", "invalid type: string, expected a boolean"),
        ] {
            std::fs::write(&path, text).unwrap();
            let shown = problem(ServeOptions { config: Some(path.clone()), ..ServeOptions::default() });
            assert!(shown.starts_with("config: ") && shown.contains(place) && shown.contains(expected), "{shown}");
            assert!(!shown.contains("SECRET") && !shown.contains("735131"), "{shown}");
        }
    }

    /// A URL may hold a comma; it was taken for two.
    #[test]
    fn a_url_of_the_webhook_may_hold_a_comma() {
        let line = ["serve", "--webhook-url", "http://a/?x=1,2", "--webhook-url=http://b/"];
        let config = parsed(&line).resolve().unwrap();
        assert_eq!(config.webhooks.urls.iter().map(Url::as_str).collect::<Vec<_>>(), ["http://a/?x=1,2", "http://b/"]);
    }

    /// The variable held two receivers, as it once could, and the second one heard nothing.
    #[test]
    fn two_urls_of_the_webhook_with_a_comma_between_are_refused() {
        for text in ["http://a/h,http://b/h", "https://u:secret@a/h,https://b/h"] {
            let shown = problem(ServeOptions { webhook_urls: vec![text.to_owned()], ..ServeOptions::default() });
            assert!(shown.starts_with("webhook-url:") && shown.contains("repeat --webhook-url") && !shown.contains("secret"), "{shown}");
        }
    }

    /// A proxy at a public address brings all devices, and their signatures, over a few connections; naming it did not start the server.
    #[test]
    fn a_trusted_proxy_needs_no_certificate_header() {
        let options = ServeOptions { trusted_proxies: vec!["198.51.100.7".to_owned(), "2001:db8::/64".to_owned()], ..ServeOptions::default() };
        let config = options.resolve().unwrap();
        assert!(matches!(config.identity, IdentitySource::Signature));
        assert_eq!(config.trusted_proxies, ["198.51.100.7/32", "2001:db8::/64"].map(|network| network.parse::<IpNet>().unwrap()));
    }

    /// `-migration=false` left `migration = true` of the file as it was, and the operator believed that the door was closed.
    #[test]
    fn what_is_switched_off_is_off_whatever_the_file_says() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("wasmdm.toml");
        std::fs::write(&path, "migration = true\nretro = true\ndump = \"-\"\ncheckin = true\nua-zl-dc = true\n").unwrap();
        let flag = format!("--config={}", path.display());
        let config = parsed(&["serve", &flag, "--migration=false", "--retro=false", "--dump=", "--checkin"]).resolve().unwrap();
        assert!(!config.takes_migrations && !config.binding.retroactive && config.dump.is_none());
        assert!(config.device_paths == DevicePaths::Split && config.zero_length_digest_challenge);
    }

    /// NanoMDM starts with keys that have nothing to sign, and its start line did not start here.
    #[test]
    fn a_key_that_has_nothing_to_sign_is_remarked_on_where_nanomdm_ignores_it() {
        let names = ["webhook-hmac-key", "dm-send-hmac-key", "dm-recv-hmac-key"];
        let key = || Some("secret".to_owned());
        let options = || ServeOptions { webhook_hmac_key: key(), dm_send_hmac_key: key(), dm_recv_hmac_key: key(), ..ServeOptions::default() };
        let remarks = ServeOptions { of_nanomdm: names.into(), ..options() }.resolve().unwrap().remarks;
        assert_eq!(remarks.len(), 3, "{remarks:?}");
        assert!(names.iter().all(|name| remarks.iter().any(|remark| remark.starts_with(name) && !remark.contains("secret"))), "{remarks:?}");
        assert!(problem(ServeOptions { of_nanomdm: vec!["webhook-hmac-key", "dm-send-hmac-key"], ..options() }).starts_with("dm:"));
        assert!(problem(ServeOptions { webhook_hmac_key: key(), ..ServeOptions::default() }).starts_with("webhook-url:"));
    }

    #[test]
    fn the_file_fills_what_no_flag_said_and_its_unknown_keys_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("wasmdm.toml");
        std::fs::write(&path, "listen = \"127.0.0.1:1\"\ndata = \"/var/lib/wasmdm\"\n").unwrap();
        let options = ServeOptions { config: Some(path.clone()), listen: Some("127.0.0.1:2".to_owned()), ..ServeOptions::default() };
        let config = options.resolve().unwrap();
        assert_eq!((config.listen.port(), config.data.as_path()), (2, Path::new("/var/lib/wasmdm")));
        std::fs::write(&path, "listne = \":1\"\n").unwrap();
        let unknown = problem(ServeOptions { config: Some(path), ..ServeOptions::default() });
        assert!(unknown.contains("listne") && unknown.contains("line 1"), "{unknown}");
    }
}
