//! A fleet of every kind of enrollment lives beside plugins and a receiver of the webhook: every device sees what it must see, the receiver
//! hears of everything in the order in which it happened, and the database is sound.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{Response, StatusCode};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use wasmdm::bundled::{ENROLLMENT_BASELINE, SERIAL_ALLOW_LIST};
use wasmdm_simulator::journal::{EntryKind, Journal, read_journal};
use wasmdm_simulator::{ApiClient, Authority, JournalWriter, LifeEvent, LifeRates, LivingFleet, LivingOptions, Report, Target};

use crate::plugins::{is_active, until};
use crate::process::{API_KEY, Home, install};

const DEVICES: u64 = 36;
/// A short life must have some of everything in it.
const PACE: f64 = 4.0;

/// Grants for the policy and the baseline, whose devices have these serial numbers. The limits are patient: a decision that a loaded
/// machine makes late is a 503, which is right, and not what these tests are about.
pub(crate) fn install_plugins(home: &Home, prefix: &str, devices: u64) {
    let serials: Vec<String> = (0..=devices).map(|number| format!("{prefix}{number:07}")).collect();
    let limits = "[limits]\ndecision = \"10s\"\ncpu = \"2s\"\n";
    let allow = format!("enabled = true\n{limits}[config]\nserial_numbers = {serials:?}\nwithout_serial = \"allow\"\n");
    let baseline = "enabled = true\n[grants]\nkv = { bytes = \"16MiB\" }\nenrollments = [\"read\"]\ntimers = true\n\
         commands = [\"enqueue:DeviceInformation\", \"enqueue:DeviceConfigured\"]\n";
    std::fs::write(home.grants().join("serial-allow-list.toml"), allow).unwrap();
    std::fs::write(home.grants().join("enrollment-baseline.toml"), baseline).unwrap();
    for plugin in [SERIAL_ALLOW_LIST, ENROLLMENT_BASELINE] {
        install(&home.plugins(), plugin.name, plugin.manifest, plugin.component);
    }
}

/// What a receiver was told of one message of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Told {
    event: String,
    device: String,
    message: Said,
}

/// What tells a message of a device from its neighbours.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Said {
    CheckIn(String),
    Report { status: String, command: String },
}

/// A receiver on the loopback interface, which believes everything.
#[derive(Clone, Default)]
struct Receiver(Arc<Mutex<Vec<Told>>>);

async fn hear(State(receiver): State<Receiver>, request: Request) -> Response<Body> {
    let body = axum::body::to_bytes(request.into_body(), usize::MAX).await.unwrap();
    let event: Value = serde_json::from_slice(&body).unwrap();
    if let Some(told) = told(&event) {
        receiver.0.lock().unwrap().push(told);
    }
    Response::builder().status(StatusCode::OK).body(Body::empty()).unwrap()
}

/// Of an Idle poll nothing: it is told once, from memory, and in no order.
fn told(event: &Value) -> Option<Told> {
    let check_in = event.get("checkin_event").filter(|part| part.is_object());
    let part = check_in.unwrap_or(&event["acknowledge_event"]);
    let raw = STANDARD.decode(part["raw_payload"].as_str().unwrap()).unwrap();
    let document = plist::Value::from_reader(std::io::Cursor::new(raw)).unwrap().into_dictionary().unwrap();
    let text = |key: &str| document.get(key).and_then(plist::Value::as_string).map(str::to_owned);
    let device = text("UDID").or_else(|| text("EnrollmentID")).unwrap();
    let user = match text("UserID").or_else(|| text("EnrollmentUserID")) {
        Some(user) if user.starts_with("FFFFFFFF") => text("UserShortName"),
        user => user,
    };
    let message = match check_in {
        Some(_) => Said::CheckIn(text("MessageType").unwrap()),
        None => Said::Report { status: text("Status").filter(|status| status != "Idle")?, command: text("CommandUUID").unwrap() },
    };
    let device = user.map_or_else(|| device.clone(), |user| format!("{device}:{user}"));
    Some(Told { event: event["event_id"].as_str().unwrap().to_owned(), device, message })
}

impl Receiver {
    async fn start() -> (String, Self) {
        let receiver = Self::default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/hook", listener.local_addr().unwrap());
        let router = Router::new().fallback(hear).with_state(receiver.clone());
        tokio_util::task::TaskTracker::new().spawn(async move { axum::serve(listener, router).await });
        (url, receiver)
    }

    /// What it was told of each enrollment; an event that came twice counts once.
    fn told(&self) -> BTreeMap<String, Vec<Said>> {
        let mut seen = BTreeSet::new();
        let mut told: BTreeMap<String, Vec<Said>> = BTreeMap::new();
        for one in self.0.lock().unwrap().iter().filter(|one| seen.insert(one.event.clone())) {
            told.entry(one.device.clone()).or_default().push(one.message.clone());
        }
        told
    }
}

/// Of each enrollment what it has said, and whether the server has confirmed it.
fn said(journal: &Journal) -> BTreeMap<String, Vec<(Said, bool)>> {
    let answers: BTreeMap<u64, u16> = journal.entries.iter().filter_map(|entry| Some((entry.request?, entry.http_status?))).collect();
    let mut said: BTreeMap<String, Vec<(Said, bool)>> = BTreeMap::new();
    for entry in journal.entries.iter().filter(|entry| entry.kind == EntryKind::Request) {
        let message = match (&entry.message_type, &entry.status, &entry.command_uuid) {
            (Some(message_type), _, _) => Said::CheckIn(message_type.clone()),
            (None, Some(status), Some(command)) => Said::Report { status: status.clone(), command: command.clone() },
            _ => continue,
        };
        match answers.get(&entry.n) {
            Some(200) => said.entry(entry.device.clone()).or_default().push((message, true)),
            // Not told, or not believed.
            Some(_) => {}
            None => said.entry(entry.device.clone()).or_default().push((message, false)),
        }
    }
    said
}

/// Whether what was told is what was said, in order: all that was confirmed, and of the rest some.
fn is_in_order(said: &[(Said, bool)], told: &[Said]) -> bool {
    // How much of what was told may be accounted for after each message.
    let mut places = BTreeSet::from([0]);
    for (message, confirmed) in said {
        let next = places.iter().filter(|place| told.get(**place) == Some(message)).map(|place| place + 1);
        let stay = places.iter().copied().filter(|_| !confirmed);
        places = next.chain(stay).collect();
    }
    places.contains(&told.len())
}

/// Once everything was delivered.
pub(crate) async fn outbox_is_empty(home: &Home) {
    let url = format!("sqlite://{}", home.data().join("wasmdm.sqlite").display());
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let storage = wasmdm_storage::Storage::open_read_only(&url).await.unwrap();
        let (waiting, oldest) = storage.outbox_lag(wasmdm_protocol::time::Timestamp::from_millis(0)).await.unwrap();
        storage.close().await.unwrap();
        if waiting == 0 {
            return;
        }
        assert!(Instant::now() < deadline, "{waiting} deliveries wait, the oldest for {oldest:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

pub(crate) fn living(prefix: &str, devices: u64, journal: Option<Arc<JournalWriter>>) -> LivingOptions {
    LivingOptions {
        devices,
        serial_prefix: Some(prefix.to_owned()),
        patience: Duration::from_secs(120),
        journal,
        rates: LifeRates::default().times(PACE),
        ..LivingOptions::default()
    }
}

/// Edge cases 19 and 20.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_of_every_kind_lives_and_everything_is_as_the_devices_saw_it() {
    let seconds = std::env::var("FLEET_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(25);
    let seed = std::env::var("FLEET_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(|| u64::from(std::process::id()) | 1 << 40);
    println!("FLEET_SECONDS={seconds} FLEET_SEED={seed}");
    let authority = Arc::new(Authority::new(seed).unwrap());
    let (hook, receiver) = Receiver::start().await;
    let home = Home::new(&authority.root_pem()).with(&["--webhook-url", &hook]);
    install_plugins(&home, "LIFE", DEVICES);
    let server = home.start();
    for plugin in [SERIAL_ALLOW_LIST, ENROLLMENT_BASELINE] {
        until(&server, plugin.name, is_active).await;
    }
    let journal_path = home.directory.path().join("journal");
    let journal = Arc::new(JournalWriter::open(&journal_path, || 0).unwrap());
    let options = living("LIFE", DEVICES, Some(journal));
    let expected: Vec<LifeEvent> = LifeEvent::ALL.into_iter().filter(|event| options.rates.of(*event) > 0.0).collect();
    let api = ApiClient::new(&server.url(), API_KEY).unwrap();
    let fleet = LivingFleet::new(&authority, &Target::parse(&server.url()).unwrap(), api, options).unwrap();
    let report = fleet.live_for(Duration::from_secs(seconds)).await.unwrap();
    println!("{}", report.to_text());
    assert!(report.is_success(), "{}", report.to_text());
    assert_all_happened(&report, &expected);
    assert_eq!(report.enrolled, DEVICES);

    outbox_is_empty(&home).await;
    let (said, told) = (said(&read_journal(&journal_path).unwrap()), receiver.told());
    for (device, said) in &said {
        let told = told.get(device).map(Vec::as_slice).unwrap_or_default();
        assert!(is_in_order(said, told), "{device} said {said:#?}, the receiver heard {told:#?}");
    }
    println!("the receiver heard of {} messages of {} enrollments, in order", told.values().map(Vec::len).sum::<usize>(), told.len());
    println!("{}", home.check(&["--journal", &journal_path.to_string_lossy()]));
    drop(server);
    println!("{}", home.check(&[]));
}

fn assert_all_happened(report: &Report, expected: &[LifeEvent]) {
    for event in expected {
        assert!(report.life.contains_key(event.name()), "{} never happened: {}", event.name(), report.to_text());
    }
    // What happens by chance alone does so only if enough happens: not on a machine that has no time.
    if report.phases[0].requests < 1000 {
        return;
    }
    for name in ["lost answer", "repeated report", "silence"] {
        assert!(report.life.contains_key(name), "{name} never happened: {}", report.to_text());
    }
    for status in ["Acknowledged", "Error", "CommandFormatError", "NotNow"] {
        assert!(report.reports.contains_key(status), "{status} was never reported: {}", report.to_text());
    }
}

#[test]
fn an_order_that_was_told_wrongly_is_seen() {
    let one = |name: &str| Said::CheckIn(name.to_owned());
    let said = [(one("A"), true), (one("B"), false), (one("B"), true), (one("C"), true)];
    for (told, is_right) in [(vec!["A", "B", "C"], true), (vec!["A", "B", "B", "C"], true), (vec!["B", "A", "C"], false), (vec!["A", "B"], false)] {
        let told: Vec<Said> = told.into_iter().map(one).collect();
        assert_eq!(is_in_order(&said, &told), is_right, "{told:?}");
    }
}
