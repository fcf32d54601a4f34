//! `kill -9` at random moments: nothing that was answered 200 is ever missing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio_util::task::TaskTracker;

use wasmdm::bundled::{ENROLLMENT_BASELINE, SERIAL_ALLOW_LIST};
use wasmdm_simulator::fleet::FleetOptions;
use wasmdm_simulator::journal::read_journal;
use wasmdm_simulator::{ApiClient, Authority, Behaviour, Fleet, JournalWriter, Target};

use crate::plugins::{is_active, until};
use crate::process::{API_KEY, Home, install};

const KILLS: u64 = 20;
const DEVICES: u64 = 40;

/// A generator that is good enough to choose moments, and whose seed can be given again (`KILL_SEED`).
struct Moments(u64);

impl Moments {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

/// Edge case 10.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_kills_lose_nothing_that_was_confirmed() {
    let seed = std::env::var("KILL_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(|| u64::from(std::process::id()) | 1 << 40);
    println!("KILL_SEED={seed}");
    let mut moments = Moments(seed);
    let authority = Authority::new(71).unwrap();
    let home = Home::new(&authority.root_pem());
    let serials: Vec<String> = (0..5000).map(|number| format!("KILL{number:07}")).collect();
    // Patient limits: a decision that a loaded machine makes late is a 503, which is right, and not what this is about.
    let limits = "[limits]\ndecision = \"10s\"\ncpu = \"2s\"\n";
    let grant = format!("enabled = true\n{limits}[config]\nserial_numbers = {serials:?}\n");
    std::fs::write(home.grants().join("serial-allow-list.toml"), grant).unwrap();
    std::fs::write(home.grants().join("enrollment-baseline.toml"), "enabled = true\n[grants]\nkv = { bytes = \"16MiB\" }\nenrollments = [\"read\"]\ntimers = true\ncommands = [\"enqueue:DeviceInformation\", \"enqueue:DeviceConfigured\"]\n").unwrap();
    for plugin in [SERIAL_ALLOW_LIST, ENROLLMENT_BASELINE] {
        install(&home.plugins(), plugin.name, plugin.manifest, plugin.component);
    }
    let mut server = home.start();
    for plugin in [SERIAL_ALLOW_LIST, ENROLLMENT_BASELINE] {
        until(&server, plugin.name, is_active).await;
    }
    let home = home.at(server.address);
    let journal_path = home.directory.path().join("journal");
    let journal = Arc::new(JournalWriter::open(&journal_path, || 0).unwrap());

    // Fleets enroll and work one after the other for as long as there are kills to come.
    let over = Arc::new(AtomicBool::new(false));
    let finished = Arc::new(AtomicU64::new(0));
    let fleets = {
        let (over, finished, url, journal) = (Arc::clone(&over), Arc::clone(&finished), server.url(), Arc::clone(&journal));
        TaskTracker::new().spawn(async move {
            let mut first = 1;
            while !over.load(Ordering::Relaxed) {
                let options = FleetOptions {
                    devices: DEVICES,
                    first,
                    connections: 16,
                    run: first,
                    serial_prefix: Some("KILL".to_owned()),
                    escrow: true,
                    behaviour: Behaviour { not_now_first: 1, ..Behaviour::default() },
                    patience: Duration::from_secs(120),
                    journal: Some(Arc::clone(&journal)),
                    ..FleetOptions::default()
                };
                first += DEVICES;
                let mut fleet = Fleet::new(&authority, Target::parse(&url).unwrap(), options).unwrap();
                fleet.enroll().await.unwrap();
                let mut api = ApiClient::new(&url, API_KEY).unwrap();
                let queued = fleet.enqueue(&mut api, 5, false).await.unwrap();
                fleet.work_off(&queued).await.unwrap();
                // Transport errors are what is asked for here; anything else is a problem.
                assert!(fleet.report.is_success(), "{}", fleet.report.to_text());
                finished.fetch_add(1, Ordering::Relaxed);
            }
        })
    };

    let mut with_unanswered = 0;
    for kill in 0..KILLS {
        tokio::time::sleep(Duration::from_millis(50 + moments.next(700))).await;
        if fleets.is_finished() {
            break;
        }
        server.kill();
        let unanswered = read_journal(&journal_path).unwrap().unanswered;
        let already = with_unanswered;
        with_unanswered += u64::from(unanswered > 0);
        println!("kill {kill}: {unanswered} requests without an answer so far{}", if with_unanswered > already { "" } else { " (none in flight)" });
        server = home.start();
    }
    over.store(true, Ordering::Relaxed);
    fleets.await.unwrap();
    assert!(with_unanswered >= 15, "only {with_unanswered} kills met unanswered requests");
    println!("{} fleets of {DEVICES} devices finished", finished.load(Ordering::Relaxed));
    println!("{}", home.check(&["--journal", &journal_path.to_string_lossy()]));
    // Also the server itself finds nothing wrong when it goes on.
    server.kill();
    drop(home.start());
    println!("{}", home.check(&[]));
}
