//! `wasmdm simulate`: simulated devices against any server, from the command line.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use http::HeaderName;
use indicatif::{ProgressBar, ProgressStyle};
use wasmdm_protocol::enrollment::EnrollmentKind;

use crate::api::ApiClient;
use crate::apns::{FakeApns, FakeApnsOptions, PushAuthority};
use crate::authority::{Authority, KeyType};
use crate::behaviour::Behaviour;
use crate::connection::Target;
use crate::device::Proof;
use crate::error::SimulatorError;
use crate::fleet::{Fleet, FleetOptions, Polling};
use crate::journal::JournalWriter;
use crate::living::{LifeRate, LifeRates, LivingFleet, LivingOptions};
use crate::report::Report;
use crate::signer::{Attributes, DigestAlgorithm, Encoding, SignatureForm};

/// The kinds of enrollment, for the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KindArgument {
    /// A device's own channel.
    Device,
    /// A user of a Mac.
    User,
    /// The device channel of a User Enrollment.
    UserEnrollmentDevice,
    /// The user channel of a User Enrollment.
    UserEnrollment,
    /// A user of a Shared iPad.
    SharedIpad,
}

impl From<KindArgument> for EnrollmentKind {
    fn from(kind: KindArgument) -> Self {
        match kind {
            KindArgument::Device => Self::Device,
            KindArgument::User => Self::User,
            KindArgument::UserEnrollmentDevice => Self::UserEnrollmentDevice,
            KindArgument::UserEnrollment => Self::UserEnrollment,
            KindArgument::SharedIpad => Self::SharedIpad,
        }
    }
}

/// How devices sign, for the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SignatureArgument {
    /// SHA-1, no signed attributes, indefinite lengths: what devices do.
    Apple,
    /// SHA-1 with signed attributes.
    Sha1Attributes,
    /// SHA-256 with signed attributes, definite lengths.
    Sha256,
}

impl From<SignatureArgument> for SignatureForm {
    fn from(argument: SignatureArgument) -> Self {
        match argument {
            SignatureArgument::Apple => Self::APPLE,
            SignatureArgument::Sha1Attributes => {
                Self { digest: DigestAlgorithm::Sha1, attributes: Attributes::Signed { signing_time: None }, encoding: Encoding::Der }
            }
            SignatureArgument::Sha256 => Self::MODERN,
        }
    }
}

/// The options of `simulate`.
#[derive(Debug, Clone, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
#[expect(clippy::doc_markdown, reason = "these comments are the help that a terminal shows")]
pub struct SimulateArguments {
    /// Where devices send their messages, such as http://127.0.0.1:9000/mdm
    #[arg(long, default_value = "http://127.0.0.1:9000/mdm")]
    pub url: String,
    /// Path of check-ins, for servers that divide the two kinds of message
    #[arg(long, value_name = "PATH")]
    pub check_in_path: Option<String>,
    /// How many devices
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub devices: u64,
    /// Number of the first device; other numbers are other devices
    #[arg(long, default_value_t = 1)]
    pub first: u64,
    /// Connections that the devices share
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    pub connections: u16,
    /// Size of the pool of keys; each device has a certificate of its own
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..))]
    pub keys: u16,
    /// Type of the keys
    #[arg(long, value_enum, default_value_t)]
    pub key_type: KeyType,
    /// Directory of the test authority: read, or made; start the server with --ca DIR/root.pem
    #[arg(long, value_name = "DIR")]
    pub ca_dir: Option<PathBuf>,
    /// Send the certificate in this header (RFC 9440) instead of signing, as a proxy does
    #[arg(long, value_name = "NAME")]
    pub cert_header: Option<String>,
    /// Form of the signature
    #[arg(long, value_enum, default_value = "apple", conflicts_with = "cert_header")]
    pub signature: SignatureArgument,
    /// Server whose /v1 queues commands [default: host and port of --url]
    #[arg(long, value_name = "URL")]
    pub api_url: Option<String>,
    /// Key of the API; it shows in the list of processes
    #[arg(long, env = "WASMDM_API_KEY", hide_env_values = true, conflicts_with = "api_key_file")]
    pub api_key: Option<String>,
    /// File with the key of the API
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Commands to queue for each device and work off
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub commands: u64,
    /// Run a push service, store a certificate of it at the server, and let devices come only when they are woken; the server is to be
    /// started with --apns-endpoint localhost:2197 --apns-roots DIR/push-root.pem, which --make-ca makes
    #[arg(long, requires = "ca_dir")]
    pub push: bool,
    /// Where the push service listens
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:2197", requires = "push")]
    pub push_listen: SocketAddr,
    /// How often each device answers its first command NotNow
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub not_now: u32,
    /// How many of a hundred commands fail
    #[arg(long, default_value_t = 0, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    pub errors: u8,
    /// Polls of each device at the end
    #[arg(long, value_name = "N", conflicts_with = "duration")]
    pub polls: Option<u64>,
    /// Seconds of polling at the end
    #[arg(long, value_name = "SECONDS")]
    pub duration: Option<u64>,
    /// Polls a second of all devices together [default: as fast as they are answered]
    #[arg(long, value_name = "PER_SECOND", value_parser = clap::value_parser!(u32).range(1..))]
    pub rate: Option<u32>,
    /// Seconds for which devices of every kind live: they and their users enroll, answer, fail, defer, lose answers, take other tokens and
    /// certificates, are wiped, leave and come back; what they must see and do not see is a problem
    #[arg(long, value_name = "SECONDS", conflicts_with_all = ["commands", "push", "polls", "duration", "rate", "measure", "no_bootstrap_token", "skip_enroll", "check_out", "expect_deny", "kind", "awaiting_configuration", "not_now", "errors"])]
    pub live: Option<u64>,
    /// How often something happens in a minute of a living device: session, commands, push-token, bootstrap-token, user, re-enrollment,
    /// wipe, check-out, renewal, rotation or stranger; 0 is never (repeatable)
    #[arg(long, value_name = "EVENT=PER_MINUTE", requires = "live")]
    pub life: Vec<LifeRate>,
    /// How many of a hundred requests of living devices lose their answer
    #[arg(long, value_name = "PERCENT", requires = "live", default_value_t = 2, value_parser = clap::value_parser!(u8).range(0..=50))]
    pub lost_answers: u8,
    /// How many of a hundred reports of living devices are sent again
    #[arg(long, value_name = "PERCENT", requires = "live", default_value_t = 3, value_parser = clap::value_parser!(u8).range(0..=50))]
    pub repeated_reports: u8,
    /// Sign before the clock starts, and measure what a server that does nothing would allow
    #[arg(long)]
    pub measure: bool,
    /// Process id of the server on this machine, to report its CPU time
    #[arg(long, value_name = "PID")]
    pub server_pid: Option<u32>,
    /// Write each request before it is sent and each answer after it was read
    #[arg(long, value_name = "FILE")]
    pub journal: Option<PathBuf>,
    /// Everything random follows from it
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Kind of the enrollments [default: device channels of Macs, iPhones and iPads in turn]
    #[arg(long, value_enum)]
    pub kind: Option<KindArgument>,
    /// Beginning of the serial numbers
    #[arg(long, value_name = "TEXT", default_value = "SIM")]
    pub serial_prefix: String,
    /// Devices say that they wait in the Setup Assistant
    #[arg(long)]
    pub awaiting_configuration: bool,
    /// Macs do not escrow a bootstrap token
    #[arg(long)]
    pub no_bootstrap_token: bool,
    /// The devices are enrolled already: same seed, directory and numbers as before
    #[arg(long)]
    pub skip_enroll: bool,
    /// All devices leave at the end
    #[arg(long)]
    pub check_out: bool,
    /// Every device is to be answered 403
    #[arg(long)]
    pub expect_deny: bool,
    /// Seconds for which a device tries again when no answer comes
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub patience: u64,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
}

impl SimulateArguments {
    fn proof(&self) -> Result<Proof, SimulatorError> {
        match &self.cert_header {
            Some(name) => name
                .parse::<HeaderName>()
                .map(Proof::CertificateHeader)
                .map_err(|error| SimulatorError::Argument { name: "cert-header", problem: format!("`{name}`: {error}") }),
            None => Ok(Proof::Signature(self.signature.into())),
        }
    }

    fn api(&self) -> Result<ApiClient, SimulatorError> {
        let key = match (&self.api_key, &self.api_key_file) {
            (Some(key), _) => key.clone(),
            (None, Some(path)) => read_key(path)?,
            (None, None) => {
                return Err(SimulatorError::Argument { name: "api-key", problem: "--commands and --live need --api-key or --api-key-file".into() });
            }
        };
        ApiClient::new(self.api_url.as_deref().unwrap_or(&self.url), &key)
    }

    fn target(&self) -> Result<Target, SimulatorError> {
        let target = Target::parse(&self.url)?;
        match &self.check_in_path {
            Some(path) => target.with_check_in_path(path),
            None => Ok(target),
        }
    }

    /// The report as it was asked for.
    pub fn present(&self, report: &Report) -> String {
        if self.json {
            let mut json = report.to_json();
            json.push('\n');
            json
        } else {
            report.to_text()
        }
    }
}

/// Runs what the arguments say. Problems of devices are in the report; an error means that the run could not go on.
pub async fn simulate(arguments: SimulateArguments) -> Result<Report, SimulatorError> {
    let progress = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{msg:20} {wide_bar} {pos}/{len} {per_sec} {elapsed}") {
        progress.set_style(style);
    }
    let outcome = simulate_with(&arguments, progress.clone()).await;
    progress.finish_and_clear();
    outcome
}

/// The same, showing how far it is on the caller's bar.
pub async fn simulate_with(arguments: &SimulateArguments, progress: ProgressBar) -> Result<Report, SimulatorError> {
    if arguments.push && arguments.commands == 0 {
        return Err(SimulatorError::Argument { name: "push", problem: "devices are woken for commands: add --commands".into() });
    }
    let target = arguments.target()?;
    let proof = arguments.proof()?;
    let mut api = if arguments.commands > 0 || arguments.live.is_some() { Some(arguments.api()?) } else { None };
    progress.set_message("making keys");
    let keys = usize::from(arguments.keys);
    let authority = match &arguments.ca_dir {
        Some(directory) => Authority::load_or_create(directory, arguments.seed, arguments.key_type, keys)?,
        None => Authority::with_keys(arguments.seed, arguments.key_type, keys)?,
    };
    let journal = match &arguments.journal {
        Some(path) => Some(Arc::new(JournalWriter::open(path, milliseconds)?)),
        None => None,
    };
    if let Some(seconds) = arguments.live
        && let Some(api) = api.take()
    {
        return live(arguments, seconds, authority, &target, api, proof, journal, progress).await;
    }
    let push = match (&arguments.ca_dir, &mut api) {
        (Some(directory), Some(api)) if arguments.push => Some(push_service(arguments, directory, &authority, api).await?),
        _ => None,
    };
    let mut fleet = Fleet::new(
        &authority,
        target,
        FleetOptions {
            devices: arguments.devices,
            first: arguments.first,
            connections: usize::from(arguments.connections),
            kind: arguments.kind.map(Into::into),
            proof,
            behaviour: Behaviour { not_now_first: arguments.not_now, error_percent: arguments.errors, seed: arguments.seed, ..Behaviour::default() },
            serial_prefix: Some(arguments.serial_prefix.clone()),
            awaiting_configuration: arguments.awaiting_configuration.then_some(true),
            run: milliseconds().unsigned_abs(),
            escrow: !arguments.no_bootstrap_token && !arguments.measure,
            measure: arguments.measure,
            patience: Duration::from_secs(arguments.patience),
            expect_deny: arguments.expect_deny,
            journal,
            server_pid: arguments.server_pid,
            push,
            progress,
        },
    )?;

    if !arguments.skip_enroll {
        fleet.enroll().await?;
    }
    if let Some(api) = &mut api {
        let queued = fleet.enqueue(api, arguments.commands, arguments.push).await?;
        fleet.work_off(&queued).await?;
    }
    let polling = match (arguments.polls, arguments.duration) {
        (Some(times), _) => Some(Polling::Times(times)),
        (None, Some(seconds)) => Some(Polling::For(Duration::from_secs(seconds))),
        (None, None) => None,
    };
    if let Some(polling) = polling.filter(|polling| *polling != Polling::Times(0)) {
        fleet.poll(polling, arguments.rate).await?;
    }
    if arguments.check_out {
        fleet.check_out().await?;
    }
    if arguments.measure {
        fleet.measure_ceiling(Duration::from_secs(1)).await?;
    }
    Ok(fleet.report)
}

/// A push service that the server believes, with a certificate that it believes.
async fn push_service(
    arguments: &SimulateArguments,
    directory: &Path,
    authority: &Authority,
    api: &mut ApiClient,
) -> Result<Arc<FakeApns>, SimulatorError> {
    let push_authority = Arc::new(PushAuthority::load_or_create(directory)?);
    let options =
        FakeApnsOptions { address: arguments.push_listen, authority: Some(Arc::clone(&push_authority)), remembered: 0, ..FakeApnsOptions::default() };
    let push = FakeApns::start_with(options)?;
    let certificate = push_authority.issue(authority.topic())?;
    api.store_push_certificate(format!("{}{}", certificate.certificate_pem, certificate.private_key_pem)).await?;
    Ok(Arc::new(push))
}

#[expect(clippy::too_many_arguments, reason = "what the command line has made already")]
async fn live(
    arguments: &SimulateArguments,
    seconds: u64,
    authority: Authority,
    target: &Target,
    api: ApiClient,
    proof: Proof,
    journal: Option<Arc<JournalWriter>>,
    progress: ProgressBar,
) -> Result<Report, SimulatorError> {
    if let Ok(style) = ProgressStyle::with_template("{msg:20} {pos} events {per_sec} {elapsed}") {
        progress.set_style(style);
    }
    let rates = arguments.life.iter().fold(LifeRates::default(), |rates, rate| rates.with(rate.event, rate.per_minute));
    let options = LivingOptions {
        devices: arguments.devices,
        first: arguments.first,
        proof,
        serial_prefix: Some(arguments.serial_prefix.clone()),
        rates,
        lost_percent: arguments.lost_answers,
        repeated_percent: arguments.repeated_reports,
        patience: Duration::from_secs(arguments.patience),
        run: milliseconds().unsigned_abs(),
        journal,
        server_pid: arguments.server_pid,
        progress,
        ..LivingOptions::default()
    };
    LivingFleet::new(&Arc::new(authority), target, api, options)?.live_for(Duration::from_secs(seconds)).await
}

fn read_key(path: &Path) -> Result<String, SimulatorError> {
    let text = std::fs::read_to_string(path).map_err(|error| SimulatorError::io(path, error))?;
    Ok(text.trim().to_owned())
}

/// Milliseconds since 1970.
fn milliseconds() -> i64 {
    #[expect(clippy::disallowed_methods, reason = "the command line is where the clock comes from")]
    let now = std::time::SystemTime::now();
    now.duration_since(std::time::UNIX_EPOCH).ok().and_then(|elapsed| i64::try_from(elapsed.as_millis()).ok()).unwrap_or_default()
}
