//! Two builds of a policy that answer differently take turns every second, while a fleet enrolls and works.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use wasmdm::bundled::{CHAT_NOTIFY, ENROLLMENT_BASELINE};
use wasmdm::command::demo::stamped;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_simulator::fleet::{FleetOptions, Polling};
use wasmdm_simulator::journal::read_journal;
use wasmdm_simulator::{ApiClient, Authority, Behaviour, Fleet, JournalWriter, Target};
use wasmdm_storage::Storage;
use wasmdm_testkit::guests;

use crate::plugins::{is_active, until};
use crate::process::{API_KEY, Home, install};

const DEVICES: u64 = 200;
const POLICY: &str = "misbehaving";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_devices_see_no_error_and_each_decision_and_delivery_names_its_build() {
    let authority = Authority::new(95).unwrap();
    let home = Home::new(&authority.root_pem());
    let component = guests::build(POLICY);
    let builds = [stamped(&component, "a"), stamped(&component, "b")];
    let manifest = format!("[plugin]\nname = \"{POLICY}\"\nversion = \"1.0.0\"\nwasm = \"plugin.wasm\"\n");
    let turn = |number: usize| {
        // With the build changes what it answers.
        let behaviour = ["allow", "abstain"][number % 2];
        let grant = format!("enabled = true\n[limits]\ndecision = \"5s\"\n[config]\nbehave = \"{behaviour}\"\n");
        std::fs::write(home.grants().join(format!("{POLICY}.toml")), grant).unwrap();
        install(&home.plugins(), POLICY, &manifest, &builds[number % 2]);
    };
    turn(0);
    let baseline = "enabled = true\n[grants]\nkv = { bytes = \"16MiB\" }\nenrollments = [\"read\"]\ntimers = true\ncommands = [\"enqueue:DeviceInformation\", \"enqueue:DeviceConfigured\"]\n";
    std::fs::write(home.grants().join("enrollment-baseline.toml"), baseline).unwrap();
    let room = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = room.local_addr().unwrap();
    let heard = Arc::new(std::sync::atomic::AtomicU64::new(0));
    chat_room(room, Arc::clone(&heard));
    std::fs::write(home.grants().join("chat-url"), format!("http://{address}/secret")).unwrap();
    let chat = format!(
        "enabled = true\n[grants]\nhttp = [\"http://{address}\"]\nsecrets = {{ chat_url = {{ file = \"chat-url\", host = \"127.0.0.1\", use = \"http\" }} }}\n"
    );
    std::fs::write(home.grants().join("chat-notify.toml"), chat).unwrap();
    for plugin in [ENROLLMENT_BASELINE, CHAT_NOTIFY] {
        install(&home.plugins(), plugin.name, plugin.manifest, plugin.component);
    }
    let server = home.start();
    for plugin in [POLICY, "enrollment-baseline", "chat-notify"] {
        until(&server, plugin, is_active).await;
    }

    let over = AtomicBool::new(false);
    let journal_path = home.directory.path().join("journal");
    let journal = Arc::new(JournalWriter::open(&journal_path, || 0).unwrap());
    let options = FleetOptions {
        devices: DEVICES,
        connections: 16,
        behaviour: Behaviour { not_now_first: 2, ..Behaviour::default() },
        journal: Some(journal),
        ..FleetOptions::default()
    };
    let mut fleet = Fleet::new(&authority, Target::parse(&server.url()).unwrap(), options).unwrap();
    let run = async {
        fleet.enroll().await.unwrap();
        let mut api = ApiClient::new(&server.url(), API_KEY).unwrap();
        let queued = fleet.enqueue(&mut api, 10, false).await.unwrap();
        fleet.work_off(&queued).await.unwrap();
        // Again, so that both builds decide however fast the machine is.
        fleet.enroll().await.unwrap();
        fleet.poll(Polling::For(Duration::from_secs(2)), None).await.unwrap();
        over.store(true, Ordering::Relaxed);
    };
    let swap = async {
        let mut number = 0;
        while !over.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_secs(1)).await;
            number += 1;
            turn(number);
        }
        number
    };
    let ((), swaps) = tokio::join!(run, swap);
    assert!(fleet.report.is_success(), "{}", fleet.report.to_text());
    assert_eq!(fleet.report.denied, 0);

    // Everything that follows was delivered, once.
    let storage = Storage::open_read_only(&format!("sqlite://{}", home.data().join("wasmdm.sqlite").display())).await.unwrap();
    let tenant = TenantId::default();
    let mut finished = Vec::new();
    for _ in 0..6000 {
        let (waiting, _) = storage.outbox_lag(wasmdm_protocol::time::Timestamp::from_millis(0)).await.unwrap();
        if waiting == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    loop {
        let after = finished.last().map_or(0, |delivery: &wasmdm_storage::outbox::FinishedDelivery| delivery.sequence);
        let page = storage.finished_deliveries(&tenant, after, 1000).await.unwrap();
        if page.is_empty() {
            break;
        }
        finished.extend(page);
    }
    let mut enrolled: BTreeMap<&str, u64> = BTreeMap::new();
    for delivery in finished.iter().filter(|delivery| delivery.topic == "enrollment.enrolled") {
        *enrolled.entry(delivery.subscriber.as_str()).or_default() += 1;
    }
    // Twice each device; the baseline by both of its hooks.
    assert_eq!(enrolled.get("plugin:chat-notify"), Some(&(2 * DEVICES)), "{enrolled:?}");
    assert_eq!(enrolled.get("plugin:enrollment-baseline"), Some(&(4 * DEVICES)), "{enrolled:?}");
    assert!(heard.load(Ordering::Relaxed) >= 2 * DEVICES);
    for delivery in &finished {
        assert_eq!(delivery.state, "done", "{delivery:?}");
        assert_eq!(delivery.by["digest"].as_str().map(str::len), Some(64), "{delivery:?}");
    }

    // Each decision names one build of the policy, and both occur.
    let mut digests = BTreeSet::new();
    for device in &fleet.devices {
        let record = storage.decisions(&EnrollmentId::new(device.id())).await.unwrap().unwrap();
        let of_policy: Vec<_> = record.as_array().unwrap().iter().filter(|decision| decision["plugin"] == POLICY).collect();
        assert_eq!(of_policy.len(), 1, "{record}");
        digests.insert(of_policy[0]["digest"].as_str().unwrap().to_owned());
    }
    let both: BTreeSet<String> = finished
        .iter()
        .filter(|delivery| delivery.subscriber == format!("plugin:{POLICY}"))
        .filter_map(|delivery| delivery.by["digest"].as_str().map(str::to_owned))
        .collect();
    println!("{swaps} swaps; decisions by {digests:?}, deliveries by {both:?}");
    assert_eq!(digests.union(&both).count(), 2);
    assert!(read_journal(&journal_path).unwrap().deliveries_after_confirmed_result().is_empty());
    println!("{}", home.check(&["--journal", &journal_path.to_string_lossy()]));
}

/// Answers every request 200 and counts it.
fn chat_room(listener: std::net::TcpListener, heard: Arc<std::sync::atomic::AtomicU64>) {
    use std::io::{BufRead as _, BufReader, Read as _, Write as _};
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let heard = Arc::clone(&heard);
            std::thread::spawn(move || {
                let mut reader = BufReader::new(stream);
                let (mut length, mut line) = (0, String::new());
                while reader.read_line(&mut line).is_ok_and(|read| read > 2) {
                    if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                        length = value.trim().parse().unwrap_or(0);
                    }
                    line.clear();
                }
                let mut body = vec![0; length];
                if reader.read_exact(&mut body).is_ok() {
                    heard.fetch_add(1, Ordering::Relaxed);
                    let _ = reader.get_mut().write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
                }
            });
        }
    });
}
