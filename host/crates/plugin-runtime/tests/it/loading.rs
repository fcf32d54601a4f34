//! Plugins in a directory: found, swapped, refused, kept.

#![cfg(test)]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wasmdm_plugin_runtime::loading::{CompilerCommand, PluginHost, PluginHostOptions, PluginStatus, ReloadResult, Stage, State, check_file};
use wasmdm_protocol::certificate::Certificate;
use wasmdm_protocol::enrollment::{DeviceFacts, Enrollment, EnrollmentId, EnrollmentKind, TenantId};
use wasmdm_protocol::plist;
use wasmdm_protocol::time::Timestamp;
use wasmdm_service::asker::Asker;
use wasmdm_service::clock::Clock as _;
use wasmdm_service::enrollment_policy::{Candidate, Verdict};
use wasmdm_service::owned_answer::OwnedAnswer;
use wasmdm_service::token_source::{ServiceToken, TokenRequest, TokenSource as _};
use wasmdm_storage::outbox::Claim;
use wasmdm_storage::{OpenOptions, Storage};
use wasmdm_testkit::clock::ManualClock;
use wasmdm_testkit::guests;

/// Far above what anything here takes; a test that gets there has failed.
const PATIENCE: Duration = Duration::from_mins(1);
const NOON: Timestamp = Timestamp::from_millis(1_800_000_000_000);

/// A server's plugins over a data directory that outlives it.
struct Server {
    host: Arc<PluginHost>,
    storage: Storage,
    clock: ManualClock,
    tracker: TaskTracker,
    shutdown: CancellationToken,
}

fn compiler() -> CompilerCommand {
    CompilerCommand { program: PathBuf::from(env!("CARGO_BIN_EXE_wasmdm-compile-plugin")), args: Vec::new() }
}

impl Server {
    async fn start(data: &Path) -> Self {
        Self::start_with(data, compiler()).await
    }

    async fn start_with(data: &Path, compiler: CompilerCommand) -> Self {
        Self::start_within(data, compiler, PATIENCE).await
    }

    /// `kept_load`: how long the start waits for kept versions.
    async fn start_within(data: &Path, compiler: CompilerCommand, kept_load: Duration) -> Self {
        let storage = Storage::open(OpenOptions { url: format!("sqlite://{}", data.join("db.sqlite").display()), now: NOON }).await.unwrap();
        let clock = ManualClock::new(NOON);
        let (tracker, shutdown) = (TaskTracker::new(), CancellationToken::new());
        let host = PluginHost::start(PluginHostOptions {
            tracker: tracker.clone(),
            shutdown: shutdown.clone(),
            kept_load,
            ..PluginHostOptions::new(data, compiler, storage.clone(), Arc::new(clock.clone()))
        })
        .await
        .unwrap();
        Self { host, storage, clock, tracker, shutdown }
    }

    /// After everything that lies in the directory was tried.
    async fn settled(data: &Path) -> Self {
        let server = Self::start(data).await;
        tokio::time::timeout(PATIENCE, server.host.settled()).await.unwrap();
        server
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.tracker.close();
        self.tracker.wait().await;
        self.storage.close().await.unwrap();
    }

    /// Waits until the plugin's status is as wanted.
    async fn until(&self, name: &str, wanted: impl Fn(&PluginStatus) -> bool) -> PluginStatus {
        let waiting = async {
            let mut seen = 0;
            loop {
                if let Some(status) = self.host.plugin_status(name).filter(&wanted) {
                    return status;
                }
                seen = self.host.changed(seen).await;
            }
        };
        let found = tokio::time::timeout(PATIENCE, waiting).await;
        found.unwrap_or_else(|_| panic!("{name} stays {:?}", self.host.plugin_status(name)))
    }

    async fn until_active(&self, name: &str, digest: &str) -> PluginStatus {
        self.until(name, |status| status.state == State::Active && status.digest.as_deref() == Some(digest)).await
    }

    async fn decide(&self) -> Verdict {
        self.host.policy().decide(&candidate()).await.verdict
    }

    async fn reload(&self, name: &str, force: bool) -> ReloadResult {
        let outcomes = self.host.reload(Some(name), force).await;
        assert_eq!(outcomes.len(), 1, "{outcomes:?}");
        outcomes[0].result
    }
}

/// A device that asks to enroll.
fn candidate() -> Candidate {
    let key = rcgen::KeyPair::generate().unwrap();
    let der = rcgen::CertificateParams::new(Vec::new()).unwrap().self_signed(&key).unwrap().der().to_vec();
    Candidate {
        tenant: TenantId::default(),
        enrollment: Enrollment { id: EnrollmentId::new("DEVICE"), parent: None, kind: EnrollmentKind::Device },
        topic: "com.apple.mgmt.test".to_owned(),
        facts: DeviceFacts { serial_number: Some("C02".to_owned()), ..DeviceFacts::default() },
        certificate: Certificate::from_der(der).unwrap(),
        url_params: BTreeMap::new(),
        message: plist::Value::Dictionary(plist::Dictionary::new()),
        re_enrolling: false,
        renewing: false,
        request_id: "request".to_owned(),
    }
}

/// The guest that does what its configuration says; each `mark` is another build of it.
fn guest(mark: u8) -> Vec<u8> {
    static BUILT: OnceLock<Vec<u8>> = OnceLock::new();
    let mut wasm = BUILT.get_or_init(|| guests::build("misbehaving")).clone();
    // A custom section: id 0, its length, the length of its name, its name, its content.
    wasm.extend([0, 6, 4, b'm', b'a', b'r', b'k', mark]);
    wasm
}

fn sha256(bytes: &[u8]) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    digest.as_ref().iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

const HOOKS: &str = "[hooks.enrollment-policy]\n[hooks.event-commands]\n[hooks.event-sink]\ntopics = [\"enrollment.enrolled\"]\n[hooks.schedule]\ncron = [{ name = \"refresh\", cron = \"*/15 * * * *\" }]\n";

fn manifest(version: &str, rest: &str) -> String {
    format!("[plugin]\nname = \"guard\"\nversion = \"{version}\"\n{rest}")
}

/// Puts a file in place in one step, as a careful operator does.
fn put(path: &Path, content: impl AsRef<[u8]>) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let unfinished = path.with_file_name(".unfinished");
    fs::write(&unfinished, content).unwrap();
    fs::rename(unfinished, path).unwrap();
}

fn lone(data: &TempDir) -> PathBuf {
    data.path().join("plugins/guard.wasm")
}

fn grant(data: &TempDir) -> PathBuf {
    data.path().join("plugins.d/guard.toml")
}

fn put_bundle(data: &TempDir, manifest: &str, wasm: &[u8]) {
    put(&data.path().join("plugins/guard/plugin.wasm"), wasm);
    put(&data.path().join("plugins/guard/plugin.toml"), manifest);
}

// What is tested here is not how fast a busy machine calls a plugin.
const DENY: &str = "[limits]\ndecision = \"60s\"\nlifecycle = \"60s\"\ncpu = \"2s\"\n[config]\nbehave = \"deny\"\n";
const ALLOW: &str = "[limits]\ndecision = \"60s\"\nlifecycle = \"60s\"\ncpu = \"2s\"\n[config]\nbehave = \"allow\"\n";

fn denied() -> Verdict {
    Verdict::Deny { reason: "as configured".to_owned() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lone_component_dropped_into_a_running_server_becomes_active() {
    let data = TempDir::new().unwrap();
    let server = Server::settled(data.path()).await;
    assert_eq!(server.decide().await, Verdict::Allow { tags: vec![] });
    put(&lone(&data), guest(1));
    let status = server.until_active("guard", &sha256(&guest(1))).await;
    assert_eq!(status.hooks, ["lifecycle", "enrollment-policy", "event-commands", "event-sink", "schedule"]);
    // Now that it has guarded enrollments, they are not to go on without it.
    assert_eq!((server.host.compilations(), status.required), (1, true));
    assert_eq!(server.storage.subscribers(&TenantId::default(), "plugin:").await.unwrap(), ["plugin:guard"]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_half_written_file_leaves_the_last_good_version_serving() {
    let data = TempDir::new().unwrap();
    let server = Server::settled(data.path()).await;
    put(&grant(&data), DENY);
    put(&lone(&data), guest(1));
    server.until_active("guard", &sha256(&guest(1))).await;

    let whole = guest(2);
    fs::write(lone(&data), &whole[..whole.len() / 2]).unwrap();
    let status = server.until("guard", |status| status.candidate.as_ref().is_some_and(|candidate| candidate.reason.is_some())).await;
    assert_eq!(status.candidate.unwrap().stage, Some(Stage::Compiled));
    assert_eq!((status.state, status.digest), (State::Active, Some(sha256(&guest(1)))));
    assert_eq!(server.decide().await, denied());

    fs::write(lone(&data), &whole).unwrap();
    let status = server.until_active("guard", &sha256(&whole)).await;
    assert_eq!(status.candidate, None);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_digest_of_the_manifest_tells_a_half_written_component() {
    let data = TempDir::new().unwrap();
    let server = Server::settled(data.path()).await;
    let whole = guest(1);
    put_bundle(&data, &manifest("1.0.0", &format!("sha256 = \"{}\"\n{HOOKS}", sha256(&whole))), &whole[..1000]);
    let status = server.until("guard", |status| status.candidate.as_ref().is_some_and(|candidate| candidate.reason.is_some())).await;
    assert_eq!(status.candidate.unwrap().stage, Some(Stage::Stable));
    assert_eq!(server.host.compilations(), 0);
    put(&data.path().join("plugins/guard/plugin.wasm"), &whole);
    server.until_active("guard", &sha256(&whole)).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_and_a_restart_keep_the_door_shut() {
    let data = TempDir::new().unwrap();
    let server = Server::settled(data.path()).await;
    put(&grant(&data), DENY);
    put(&lone(&data), guest(1));
    server.until_active("guard", &sha256(&guest(1))).await;
    put(&lone(&data), b"garbage, not a component");
    let status = server.until("guard", |status| status.candidate.is_some()).await;
    assert!(
        status.candidate.as_ref().is_some_and(|candidate| candidate.state == wasmdm_plugin_runtime::loading::status::CandidateState::Rejected),
        "{status:?}"
    );
    assert_eq!(server.decide().await, denied());
    server.stop().await;

    // From the first request on, before anything was looked at.
    let server = Server::start(data.path()).await;
    assert_eq!(server.decide().await, denied());
    let status = server.until("guard", |status| status.candidate.as_ref().is_some_and(|candidate| candidate.reason.is_some())).await;
    assert!(status.candidate.unwrap().reason.unwrap().contains("not WebAssembly"));
    assert_eq!((status.state, server.host.compilations()), (State::Active, 0));
    assert_eq!(server.decide().await, denied());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_version_that_is_lost_leaves_the_door_shut_and_says_why() {
    let data = TempDir::new().unwrap();
    let server = Server::settled(data.path()).await;
    // No grant file: what it guarded is known from what was kept.
    put(&lone(&data), guest(1));
    server.until_active("guard", &sha256(&guest(1))).await;
    put(&lone(&data), b"garbage, not a component");
    server.until("guard", |status| status.candidate.is_some()).await;
    server.stop().await;
    put(&data.path().join(format!("plugins-active/guard/{}.wasm", sha256(&guest(1)))), b"garbage too");

    let server = Server::start(data.path()).await;
    assert!(matches!(server.decide().await, Verdict::Unavailable { .. }));
    assert!(server.host.ready().unwrap_err()[0].contains("`guard` is required and not active"));
    put(&lone(&data), guest(1));
    server.until_active("guard", &sha256(&guest(1))).await;
    assert_eq!((server.decide().await, server.host.ready()), (Verdict::Allow { tags: vec![] }, Ok(())));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_enabled_grant_without_its_plugin_shuts_the_door_until_it_is_there() {
    let data = TempDir::new().unwrap();
    put(&grant(&data), ALLOW);
    let server = Server::start(data.path()).await;
    assert!(matches!(server.decide().await, Verdict::Unavailable { .. }));
    let status = server.until("guard", |status| status.candidate.as_ref().is_some_and(|candidate| candidate.reason.is_some())).await;
    assert_eq!((status.state, status.required), (State::RequiredMissing, true));
    assert!(server.host.ready().is_err());

    put(&lone(&data), guest(1));
    server.until_active("guard", &sha256(&guest(1))).await;
    assert_eq!(server.decide().await, Verdict::Allow { tags: vec!["allowed".to_owned()] });
    assert_eq!(server.host.ready(), Ok(()));
    server.stop().await;
}

/// A grant that denies and pins a build.
fn pinned(wasm: &[u8]) -> String {
    format!("pin = \"{}\"\n{DENY}", sha256(wasm))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_of_another_digest_stops_the_version_that_runs() {
    let data = TempDir::new().unwrap();
    put(&grant(&data), DENY);
    put(&lone(&data), guest(1));
    let server = Server::settled(data.path()).await;
    assert_eq!(server.decide().await, denied());
    put(&grant(&data), pinned(&guest(2)));
    let status = server.until("guard", |status| status.state == State::RequiredMissing).await;
    assert_eq!((status.digest, status.on_failure["enrollment-policy"]), (None, "closed"));
    let (candidate, pin) = (status.candidate.unwrap(), format!("plugins.d/guard.toml pins {}", sha256(&guest(2))));
    assert!(candidate.stage == Some(Stage::Verified) && candidate.reason.as_ref().unwrap().ends_with(&pin), "{candidate:?}");
    assert!(matches!(server.decide().await, Verdict::Unavailable { .. }));
    assert!(server.host.ready().unwrap_err()[0].ends_with(&pin));

    // What the pin names is loaded as soon as it is there, and so is the old one when the pin is taken back.
    put(&lone(&data), guest(2));
    server.until_active("guard", &sha256(&guest(2))).await;
    assert_eq!((server.decide().await, server.host.ready()), (denied(), Ok(())));
    // Also where there is nothing but garbage that it could be replaced by.
    put(&lone(&data), b"garbage, not a component");
    server.until("guard", |status| status.candidate.is_some()).await;
    assert_eq!(server.decide().await, denied());
    put(&grant(&data), pinned(&guest(1)));
    let status = server.until("guard", |status| status.state == State::RequiredMissing).await;
    let reason = status.candidate.unwrap().reason.unwrap();
    assert!(reason.contains("not WebAssembly") && reason.contains("plugins.d/guard.toml pins"), "{reason}");
    assert!(matches!(server.decide().await, Verdict::Unavailable { .. }));
    put(&lone(&data), guest(1));
    server.until_active("guard", &sha256(&guest(1))).await;
    assert_eq!(server.decide().await, denied());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_of_the_file_that_waits_swaps_to_it_even_if_its_version_is_lower() {
    let data = TempDir::new().unwrap();
    put_bundle(&data, &manifest("1.10.0", HOOKS), &guest(1));
    put(&grant(&data), pinned(&guest(1)));
    let server = Server::settled(data.path()).await;
    server.until_active("guard", &sha256(&guest(1))).await;
    put_bundle(&data, &manifest("1.9.0", HOOKS), &guest(2));
    assert_eq!(server.reload("guard", false).await, ReloadResult::Rejected);
    assert_eq!(server.decide().await, denied());
    put(&grant(&data), pinned(&guest(2)));
    assert_eq!(server.host.reload(Some("guard"), false).await.remove(0).digest, Some(sha256(&guest(2))));
    assert_eq!(server.decide().await, denied());
    let audit = server.storage.audit(&TenantId::default(), 10).await.unwrap();
    let row = audit.iter().find(|row| row.action == "plugin.downgrade").unwrap();
    assert_eq!((row.actor.as_str(), &row.detail["from"], &row.detail["to"]), ("plugins.d/guard.toml", &"1.10.0".into(), &"1.9.0".into()));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_version_that_the_pin_does_not_name_is_not_loaded() {
    let data = TempDir::new().unwrap();
    put(&grant(&data), DENY);
    put(&lone(&data), guest(1));
    Server::settled(data.path()).await.stop().await;
    put(&grant(&data), pinned(&guest(2)));

    let server = Server::start(data.path()).await;
    assert!(matches!(server.decide().await, Verdict::Unavailable { .. }));
    server.host.settled().await;
    let status = server.host.plugin_status("guard").unwrap();
    assert_eq!((status.state, status.digest), (State::RequiredMissing, None));
    assert!(status.candidate.unwrap().reason.unwrap().contains("plugins.d/guard.toml pins"));
    assert!(matches!(server.decide().await, Verdict::Unavailable { .. }));
    put(&lone(&data), guest(2));
    server.until_active("guard", &sha256(&guest(2))).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn once_signatures_are_required_an_unsigned_version_is_stopped_and_not_loaded_again() {
    let data = TempDir::new().unwrap();
    put(&grant(&data), DENY);
    put(&lone(&data), guest(1));
    let server = Server::settled(data.path()).await;
    let trust = data.path().join("plugins.d/trust.toml");
    put(&trust, "");
    let status = server.until("guard", |status| status.state == State::RequiredMissing).await;
    assert!(status.candidate.unwrap().reason.unwrap().contains("trust.toml asks for signatures"));
    assert!(matches!(server.decide().await, Verdict::Unavailable { .. }));
    server.stop().await;

    let server = Server::settled(data.path()).await;
    assert!(matches!(server.decide().await, Verdict::Unavailable { .. }));
    fs::remove_file(&trust).unwrap();
    server.until_active("guard", &sha256(&guest(1))).await;
    assert_eq!(server.decide().await, denied());
    server.stop().await;
}

/// A server whose kept version of `guard` ends in `1` and is compiled only when [`Gate::open`] says so.
struct Gate {
    pipe: PathBuf,
}

impl Gate {
    /// Makes the kept version, and forgets what was compiled of it.
    async fn shut(data: &TempDir) -> Self {
        put(&grant(data), DENY);
        put(&lone(data), guest(b'1'));
        Server::settled(data.path()).await.stop().await;
        fs::remove_dir_all(data.path().join("plugin-cache")).unwrap();
        let pipe = data.path().join("gate");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR, 0).unwrap();
        Self { pipe }
    }

    async fn start(&self, data: &TempDir) -> Server {
        let script = "in=\"$1.$$\"; cat > \"$in\"; if [ \"$(tail -c 1 \"$in\")\" = 1 ]; then read -r _ < \"$1\"; fi; exec \"$2\" < \"$in\"";
        let args = ["-c".into(), script.into(), "sh".into(), self.pipe.clone().into_os_string(), compiler().program.into_os_string()];
        let command = CompilerCommand { program: "/bin/sh".into(), args: args.into() };
        let server = Server::start_within(data.path(), command, Duration::ZERO).await;
        assert!(matches!(server.decide().await, Verdict::Unavailable { .. }), "until it is loaded, it refuses");
        server
    }

    /// Returns once the kept version was loaded, or not.
    async fn open(self, server: &Server) {
        let pipe = self.pipe;
        tokio::task::spawn_blocking(move || fs::write(pipe, "\n")).await.unwrap().unwrap();
        tokio::time::timeout(PATIENCE, server.host.settled()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_version_that_is_late_becomes_active_when_nothing_else_did() {
    let data = TempDir::new().unwrap();
    let gate = Gate::shut(&data).await;
    put(&lone(&data), b"garbage, not a component");
    let server = gate.start(&data).await;
    server.until("guard", |status| status.candidate.as_ref().is_some_and(|candidate| candidate.reason.is_some())).await;
    gate.open(&server).await;
    server.until_active("guard", &sha256(&guest(b'1'))).await;
    assert_eq!(server.decide().await, denied());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_version_that_is_late_never_replaces_a_newer_one() {
    let data = TempDir::new().unwrap();
    let gate = Gate::shut(&data).await;
    put(&lone(&data), guest(b'2'));
    let server = gate.start(&data).await;
    server.until_active("guard", &sha256(&guest(b'2'))).await;
    gate.open(&server).await;
    assert_eq!(server.host.plugin_status("guard").unwrap().digest, Some(sha256(&guest(b'2'))));
    server.stop().await;
    // Nor what is kept of it: the older one used to be written over it, and its bytes were gone.
    put(&lone(&data), b"garbage, not a component");
    let server = Server::start(data.path()).await;
    assert_eq!(server.host.plugin_status("guard").unwrap().digest, Some(sha256(&guest(b'2'))));
    assert_eq!(server.decide().await, denied());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_version_that_is_late_does_not_come_up_once_its_plugin_was_removed() {
    let data = TempDir::new().unwrap();
    let gate = Gate::shut(&data).await;
    fs::remove_file(lone(&data)).unwrap();
    let server = gate.start(&data).await;
    let kept = data.path().join("plugins-active/guard");
    let removed = async {
        let mut seen = 0;
        while !kept.join("removed.json").exists() {
            seen = server.host.changed(seen).await;
        }
    };
    tokio::time::timeout(PATIENCE, removed).await.unwrap();
    gate.open(&server).await;
    // Its grant file is still there, so the door stays shut.
    assert_eq!(server.host.plugin_status("guard").unwrap().state, State::RequiredMissing);
    assert!(matches!(server.decide().await, Verdict::Unavailable { .. }));
    assert!(!kept.join("active.json").exists(), "nothing is left for the next start");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_hook_and_a_disabled_plugin_shut_nothing() {
    for text in ["on-failure = \"open\"\n", "enabled = false\n", "mode = \"monitor\"\n"] {
        let data = TempDir::new().unwrap();
        put(&grant(&data), text);
        let server = Server::settled(data.path()).await;
        assert_eq!(server.decide().await, Verdict::Allow { tags: vec![] }, "{text}");
        assert_eq!(server.host.ready(), Ok(()), "{text}");
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_file_that_cannot_be_read_changes_nothing_and_opens_nothing() {
    let data = TempDir::new().unwrap();
    put(&grant(&data), "mode = \n");
    put(&lone(&data), guest(1));
    let server = Server::settled(data.path()).await;
    assert!(matches!(server.decide().await, Verdict::Unavailable { .. }));
    let status = server.host.plugin_status("guard").unwrap();
    assert!(status.candidate.unwrap().reason.unwrap().contains("plugins.d/guard.toml, line 1"));
    put(&grant(&data), DENY);
    server.until("guard", |status| status.state == State::Active).await;
    put(&grant(&data), "enabled = perhaps\n");
    server.until("guard", |status| status.candidate.as_ref().is_some_and(|candidate| candidate.reason.is_some())).await;
    assert_eq!(server.decide().await, denied());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_configuration_takes_effect_without_compiling() {
    let data = TempDir::new().unwrap();
    put(&grant(&data), DENY);
    put(&lone(&data), guest(1));
    let server = Server::settled(data.path()).await;
    let before = server.until("guard", |status| status.state == State::Active).await.generation;
    assert_eq!(server.decide().await, denied());
    put(&grant(&data), ALLOW);
    server.until("guard", |status| status.generation > before).await;
    assert_eq!(server.decide().await, Verdict::Allow { tags: vec!["allowed".to_owned()] });
    assert_eq!(server.host.compilations(), 1);

    put(&grant(&data), "[config]\nbehave = \"refuse-config\"\n");
    let status = server.until("guard", |status| status.candidate.as_ref().is_some_and(|candidate| candidate.reason.is_some())).await;
    let candidate = status.candidate.unwrap();
    assert_eq!(candidate.stage, Some(Stage::Probed));
    assert!(candidate.reason.unwrap().contains("behave: refused"));
    assert_eq!(server.decide().await, Verdict::Allow { tags: vec!["allowed".to_owned()] });

    put(&grant(&data), "enabled = false\n");
    server.until("guard", |status| status.state == State::Disabled).await;
    assert_eq!(server.decide().await, Verdict::Allow { tags: vec![] });
    assert!(server.storage.subscribers(&TenantId::default(), "plugin:").await.unwrap().is_empty());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_withdrawn_grant_takes_effect_even_if_the_plugin_requires_it() {
    let data = TempDir::new().unwrap();
    put_bundle(&data, &manifest("1.0.0", &format!("{HOOKS}[requests]\nkv = true\ntimers = true\n")), &guest(1));
    let server = Server::settled(data.path()).await;
    let status = server.host.plugin_status("guard").unwrap();
    assert_eq!(status.state, State::Rejected);
    assert!(status.candidate.unwrap().reason.unwrap().ends_with("[grants]\nkv = true\ntimers = true"));

    put(&grant(&data), format!("[grants]\nkv = true\ntimers = true\n{DENY}"));
    let status = server.until("guard", |status| status.state == State::Active).await;
    assert_eq!(status.grants.unwrap()["timers"], true);
    put(&grant(&data), format!("[grants]\nkv = true\n{DENY}"));
    let status = server.until("guard", |status| status.candidate.as_ref().is_some_and(|candidate| candidate.reason.is_some())).await;
    assert_eq!(status.state, State::Active);
    let grants = status.grants.unwrap();
    assert!(grants.get("timers").is_none() && grants.get("kv").is_some(), "{grants}");
    assert_eq!(server.decide().await, denied());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_touches_compile_nothing_and_swap_nothing() {
    let data = TempDir::new().unwrap();
    put(&lone(&data), guest(1));
    let server = Server::settled(data.path()).await;
    let generation = server.host.plugin_status("guard").unwrap().generation;
    let wasm = guest(1);
    for _ in 0..2_000 {
        fs::File::options().append(true).open(lone(&data)).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    }
    put(&lone(&data), &wasm);
    assert_eq!(server.reload("guard", false).await, ReloadResult::Unchanged);
    assert_eq!(server.host.plugin_status("guard").unwrap().generation, generation);
    assert_eq!(server.host.compilations(), 1);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_compiled_outlives_a_restart_and_a_tampered_entry_is_not_used() {
    let data = TempDir::new().unwrap();
    put(&lone(&data), guest(1));
    Server::settled(data.path()).await.stop().await;
    let server = Server::settled(data.path()).await;
    assert_eq!((server.host.compilations(), server.host.plugin_status("guard").unwrap().state), (0, State::Active));
    server.stop().await;

    let entry = fs::read_dir(data.path().join("plugin-cache")).unwrap().next().unwrap().unwrap().path();
    let mut bytes = fs::read(&entry).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&entry, bytes).unwrap();
    let server = Server::settled(data.path()).await;
    assert_eq!((server.host.compilations(), server.host.plugin_status("guard").unwrap().state), (1, State::Active));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_downgrade_needs_an_operator_who_insists() {
    let data = TempDir::new().unwrap();
    put_bundle(&data, &manifest("1.10.0", HOOKS), &guest(1));
    let server = Server::settled(data.path()).await;
    put_bundle(&data, &manifest("1.9.0", HOOKS), &guest(2));
    let outcome = server.host.reload(Some("guard"), false).await.remove(0);
    assert_eq!((outcome.result, outcome.stage, outcome.version.as_deref()), (ReloadResult::Rejected, Some(Stage::Verified), Some("1.10.0")));
    assert!(outcome.reason.unwrap().contains("1.9.0 is lower than the active 1.10.0"));
    assert_eq!(server.reload("guard", true).await, ReloadResult::Activated);
    assert_eq!(server.host.plugin_status("guard").unwrap().version.as_deref(), Some("1.9.0"));
    let audit = server.storage.audit(&TenantId::default(), 10).await.unwrap();
    assert_eq!((audit[0].action.as_str(), &audit[0].detail["from"], &audit[0].detail["to"]), ("plugin.downgrade", &"1.10.0".into(), &"1.9.0".into()));
    // The same version with another digest is none.
    put_bundle(&data, &manifest("1.9.0", HOOKS), &guest(3));
    assert_eq!(server.reload("guard", false).await, ReloadResult::Activated);
    assert!(server.host.reload(Some("nobody"), false).await.is_empty());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_plugin_is_no_longer_asked_and_its_subscription_stays() {
    let data = TempDir::new().unwrap();
    put(&grant(&data), DENY);
    put(&lone(&data), guest(1));
    let server = Server::settled(data.path()).await;
    fs::remove_file(lone(&data)).unwrap();
    // Its grant file is still there, so the door stays shut.
    server.until("guard", |status| status.state == State::RequiredMissing).await;
    assert!(matches!(server.decide().await, Verdict::Unavailable { .. }));
    fs::remove_file(grant(&data)).unwrap();
    server.host.reload(None, false).await;
    assert_eq!(server.host.plugin_status("guard").map(|status| status.state), None);
    assert_eq!(server.decide().await, Verdict::Allow { tags: vec![] });
    assert_eq!(server.storage.subscribers(&TenantId::default(), "plugin:").await.unwrap(), ["plugin:guard"]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_be_no_plugin_is_shown_with_its_reason() {
    let data = TempDir::new().unwrap();
    let outside = TempDir::new().unwrap();
    fs::write(outside.path().join("x.wasm"), guest(1)).unwrap();
    put(&data.path().join("plugins/native.cwasm"), b"\x7fELF");
    put(&data.path().join("plugins/core.wasm"), b"\0asm\x01\0\0\0");
    put(&data.path().join("plugins/twice.wasm"), guest(1));
    put(&data.path().join("plugins/twice/plugin.toml"), "[plugin]\nname = \"twice\"\nversion = \"1.0.0\"\n");
    put(&data.path().join("plugins/later.wasm"), guests::build("from-the-future"));
    put(&data.path().join("plugins/none.wasm"), guests::build("no-hooks"));
    put(&data.path().join("plugins/types.wasm"), guests::build("wrong-types"));
    std::os::unix::fs::symlink(outside.path().join("x.wasm"), data.path().join("plugins/linked.wasm")).unwrap();
    let server = Server::settled(data.path()).await;
    for (name, stage, words) in [
        ("native.cwasm", Stage::Found, "precompiled"),
        ("core", Stage::Inspected, "core WebAssembly module"),
        ("twice", Stage::Found, "twice"),
        ("later", Stage::Linked, "0.1.0"),
        ("none", Stage::Linked, "export macro"),
        ("types", Stage::Linked, ""),
        ("linked", Stage::Found, "leads out of the plugin directory"),
    ] {
        let status = server.host.plugin_status(name).unwrap_or_else(|| panic!("{name} is not shown"));
        assert_eq!(status.state, State::Rejected, "{name}");
        let candidate = status.candidate.unwrap();
        let reason = candidate.reason.unwrap();
        assert!(
            candidate.stage == Some(stage) || (name == "types" && candidate.stage == Some(Stage::Probed)),
            "{name}: {:?} {reason}",
            candidate.stage
        );
        assert!(reason.contains(words), "{name}: {reason}");
    }
    assert_eq!(server.decide().await, Verdict::Allow { tags: vec![] });
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compiler_that_dies_is_reported_and_the_server_goes_on() {
    let data = TempDir::new().unwrap();
    put(&lone(&data), guest(1));
    let killed = CompilerCommand { program: "/bin/sh".into(), args: vec!["-c".into(), "kill -9 $$".into()] };
    let server = Server::start_with(data.path(), killed).await;
    server.host.settled().await;
    let candidate = server.host.plugin_status("guard").unwrap().candidate.unwrap();
    assert_eq!(candidate.stage, Some(Stage::Compiled));
    assert!(candidate.reason.unwrap().contains("more than 90 s of processor time or 1536 MiB of memory"));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn under_load_swaps_lose_no_call_and_both_builds_are_seen() {
    const SWAPS: u64 = 50;
    let data = TempDir::new().unwrap();
    put(&grant(&data), ALLOW);
    put(&lone(&data), guest(0));
    let server = Server::settled(data.path()).await;
    let (stop, calls) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let callers: Vec<_> = (0..4)
        .map(|_| {
            let (policy, stop, calls) = (server.host.policy(), Arc::clone(&stop), Arc::clone(&calls));
            server.tracker.spawn(async move {
                let candidate = candidate();
                let mut digests = BTreeSet::new();
                while !stop.load(Ordering::Relaxed) {
                    let answer = policy.decide(&candidate).await;
                    assert_eq!(answer.verdict, Verdict::Allow { tags: vec!["allowed".to_owned()] });
                    let decisions = answer.decisions.as_array().unwrap();
                    assert_eq!(decisions.len(), 1, "one request sees one generation");
                    digests.insert(decisions[0]["digest"].as_str().unwrap().to_owned());
                    calls.fetch_add(1, Ordering::Relaxed);
                }
                digests
            })
        })
        .collect();
    let first = server.host.plugin_status("guard").unwrap().generation.unwrap();
    for swap in 1..=SWAPS {
        put(&lone(&data), guest(u8::from(swap % 2 == 1)));
        let outcome = server.host.reload(Some("guard"), false).await.remove(0);
        assert_eq!((outcome.result, outcome.digest), (ReloadResult::Activated, Some(sha256(&guest(u8::from(swap % 2 == 1))))));
    }
    let last = server.host.plugin_status("guard").unwrap().generation.unwrap();
    assert!(last >= first + SWAPS, "{first} → {last}");
    stop.store(true, Ordering::Relaxed);
    let mut seen = BTreeSet::new();
    for caller in callers {
        seen.extend(caller.await.unwrap());
    }
    assert_eq!(seen, BTreeSet::from([sha256(&guest(0)), sha256(&guest(1))]));
    assert_eq!(server.host.compilations(), 2);
    println!("{} calls during {SWAPS} swaps", calls.load(Ordering::Relaxed));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cron_schedule_becomes_a_delivery_and_missed_ticks_are_one() {
    let data = TempDir::new().unwrap();
    put_bundle(&data, &manifest("1.0.0", HOOKS), &guest(1));
    let server = Server::settled(data.path()).await;
    server.clock.advance(Duration::from_hours(3));
    let delivery = async {
        let changed = server.storage.outbox_changed();
        loop {
            let notified = changed.notified();
            let (owner, lease, now) = ("worker".to_owned(), Duration::from_mins(1), server.clock.now());
            let claim = Claim { owner, limit: 10, share: 10, shares: HashMap::new(), lease, now };
            let leases = server.storage.claim(claim).await.unwrap();
            if let Some(lease) = leases.into_iter().next() {
                return (server.storage.next_delivery(&lease, server.clock.now()).await.unwrap().unwrap(), lease);
            }
            notified.await;
        }
    };
    let (delivery, lease) = tokio::time::timeout(PATIENCE, delivery).await.unwrap();
    assert_eq!((lease.subscriber.as_str(), lease.interface.as_str()), ("plugin:guard", "schedule"));
    assert_eq!(delivery.event.topic, "schedule.tick");
    assert_eq!(delivery.event.data["name"], "refresh");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_says_what_a_server_would_say() {
    let data = TempDir::new().unwrap();
    put_bundle(&data, &manifest("1.2.3", &format!("{HOOKS}[requests]\nkv = true\n")), &guest(1));
    for path in [data.path().join("plugins/guard"), data.path().join("plugins/guard/plugin.wasm")] {
        let report = check_file(&path).await;
        let text = report.to_string();
        assert!(report.is_ok(), "{text}");
        for words in ["guard 1.2.3", "enrollment-policy", "kv = true", &sha256(&guest(1)), "This server would load it."] {
            assert!(text.contains(words), "{words} in {text}");
        }
    }
    let core = data.path().join("core.wasm");
    put(&core, b"\0asm\x01\0\0\0");
    let report = check_file(&core).await;
    assert!(!report.is_ok() && report.to_string().contains("not a component"), "{report}");
    let report = check_file(&data.path().join("nothing.wasm")).await;
    assert!(!report.is_ok() && report.problems[0].contains("nothing.wasm"), "{report}");
}

/// The manifest of the guest that answers check-ins.
fn owner(name: &str, services: &str) -> String {
    format!(
        "[plugin]\nname = \"{name}\"\nversion = \"1.0.0\"\n[hooks.user-authentication]\n[hooks.return-to-service]\n\
         [hooks.token-source]\nservices = [{services}]\n[limits]\n"
    )
}

fn put_owner(data: &TempDir, name: &str, services: &str) {
    put(&data.path().join(format!("plugins/{name}/plugin.wasm")), guests::build("answering"));
    put(&data.path().join(format!("plugins/{name}/plugin.toml")), owner(name, services));
}

fn put_grant(data: &TempDir, name: &str, rest: &str) {
    let patient = "[limits]\nanswer = \"60s\"\nlifecycle = \"60s\"\ncpu = \"2s\"\n";
    put(&data.path().join(format!("plugins.d/{name}.toml")), format!("{rest}\n{patient}"));
}

impl Server {
    async fn token(&self, service: &str) -> OwnedAnswer<Option<ServiceToken>> {
        let asker = Asker {
            tenant: TenantId::default(),
            enrollment: Enrollment { id: EnrollmentId::new("DEVICE"), parent: None, kind: EnrollmentKind::Device },
            topic: "com.apple.mgmt.test".to_owned(),
            facts: serde_json::json!({}),
            request_id: "request".to_owned(),
        };
        self.host.answers().token(&TokenRequest { asker, service_type: service.to_owned(), parameters: None }).await.unwrap()
    }

    async fn until_refused(&self, name: &str, words: &str) -> PluginStatus {
        let said = |status: &PluginStatus| status.candidate.as_ref().and_then(|candidate| candidate.reason.clone()).unwrap_or_default();
        self.until(name, |status| said(status).contains(words)).await
    }
}

fn is_given(answer: &OwnedAnswer<Option<ServiceToken>>) -> bool {
    matches!(answer, OwnedAnswer::Given(Some(_)))
}

/// Edge case 48.
#[tokio::test(flavor = "multi_thread")]
async fn the_second_plugin_with_the_same_answers_is_refused_until_the_first_goes() {
    let data = TempDir::new().unwrap();
    put_owner(&data, "first", "\"com.apple.maid\"");
    put_grant(&data, "first", "");
    let server = Server::settled(data.path()).await;
    assert!(is_given(&server.token("com.apple.maid").await));
    put_owner(&data, "second", "\"com.apple.maid\", \"com.apple.watch.pairing\"");
    put_grant(&data, "second", "");
    let status = server.until_refused("second", "the plugin `first` has ").await;
    let reason = status.candidate.unwrap().reason.unwrap();
    assert!(reason.contains("tokens for `com.apple.maid`") && reason.contains("the hook `return-to-service`"), "{reason}");
    assert!(!reason.contains("pairing"), "{reason}");
    assert_eq!(status.state, State::RequiredMissing);
    // What only it would have fails until it is there.
    assert!(matches!(server.token("com.apple.watch.pairing").await, OwnedAnswer::Failed { .. }));
    assert_eq!(server.token("com.apple.else").await, OwnedAnswer::Nobody);
    // For other tenants it may have the same.
    put_grant(&data, "second", "tenants = [\"elsewhere\"]");
    server.until("second", |status| status.state == State::Active).await;
    assert!(is_given(&server.token("com.apple.maid").await));
    assert_eq!(server.token("com.apple.watch.pairing").await, OwnedAnswer::Nobody);
    put_grant(&data, "second", "");
    server.until_refused("second", "the plugin `first` has ").await;
    server.stop().await;

    // The one that was active is it after a restart too, whoever is looked at first.
    put_owner(&data, "another", "\"com.apple.maid\"");
    let server = Server::settled(data.path()).await;
    server.until_refused("another", "the plugin `first` has ").await;
    assert_eq!(server.host.plugin_status("first").unwrap().state, State::Active);
    fs::remove_dir_all(data.path().join("plugins/another")).unwrap();

    put_grant(&data, "first", "enabled = false");
    server.until("second", |status| status.state == State::Active && status.candidate.is_none()).await;
    assert!(is_given(&server.token("com.apple.watch.pairing").await));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_types_of_an_owner_that_cannot_be_loaded_fail_and_others_are_nobodys() {
    let data = TempDir::new().unwrap();
    put_grant(&data, "first", "");
    let server = Server::settled(data.path()).await;
    // Nothing is known of it but that it is wanted.
    assert!(matches!(server.token("com.apple.else").await, OwnedAnswer::Failed { .. }));
    put_owner(&data, "first", "\"com.apple.maid\"");
    put(&data.path().join("plugins/first/plugin.wasm"), b"garbage, not a component");
    server.until_refused("first", "not WebAssembly").await;
    assert!(matches!(server.token("com.apple.maid").await, OwnedAnswer::Failed { .. }));
    assert_eq!(server.token("com.apple.else").await, OwnedAnswer::Nobody);
    put_owner(&data, "first", "\"com.apple.maid\"");
    server.until("first", |status| status.state == State::Active).await;
    assert!(is_given(&server.token("com.apple.maid").await));
    server.stop().await;

    // The kept version is lost: what it had is still known.
    let digest = sha256(&guests::build("answering"));
    put(&data.path().join(format!("plugins-active/first/{digest}.wasm")), b"garbage too");
    put(&data.path().join("plugins/first/plugin.wasm"), b"garbage, not a component");
    let server = Server::start(data.path()).await;
    assert!(matches!(server.token("com.apple.maid").await, OwnedAnswer::Failed { .. }));
    assert_eq!(server.token("com.apple.else").await, OwnedAnswer::Nobody);
    // Removed, but for its grant: it should be there. Removed altogether, nobody has anything.
    server.host.settled().await;
    fs::remove_dir_all(data.path().join("plugins/first")).unwrap();
    server.until_refused("first", "no plugin `first` in the plugin directory").await;
    assert!(matches!(server.token("com.apple.maid").await, OwnedAnswer::Failed { .. }));
    fs::remove_file(data.path().join("plugins.d/first.toml")).unwrap();
    let mut seen = 0;
    while server.host.plugin_status("first").is_some() {
        seen = server.host.changed(seen).await;
    }
    assert_eq!(server.token("com.apple.maid").await, OwnedAnswer::Nobody);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_source_without_service_types_is_refused() {
    let data = TempDir::new().unwrap();
    let server = Server::settled(data.path()).await;
    put(&lone(&data), guests::build("answering"));
    server.until_refused("guard", "add [hooks.token-source] with services").await;
    server.stop().await;
}
