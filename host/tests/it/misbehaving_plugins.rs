//! Plugins that loop, trap or eat memory, in a running server over which other devices poll.

use std::time::{Duration, Instant};

use http::StatusCode;
use wasmdm_simulator::{Authority, Connection, Device};
use wasmdm_testkit::guests;

use crate::plugins::{Pollers, enroll, is_active, until};
use crate::process::{Home, install};

const NAME: &str = "misbehaving";

fn manifest() -> String {
    format!("[plugin]\nname = \"{NAME}\"\nversion = \"1.0.0\"\nwasm = \"plugin.wasm\"\n")
}

fn behave(home: &Home, behaviour: &str) {
    let path = home.grants().join(format!("{NAME}.toml"));
    std::fs::write(path.with_extension("new"), format!("enabled = true\n[config]\nbehave = \"{behaviour}\"\n")).unwrap();
    std::fs::rename(path.with_extension("new"), path).unwrap();
}

/// The 99th of 100 polls.
fn p99(sorted: &[Duration]) -> Duration {
    assert!(sorted.len() > 100, "{} polls are too few", sorted.len());
    sorted[sorted.len() * 99 / 100]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_that_loops_allocates_or_traps_is_a_503_in_time_and_nobody_elses_problem() {
    const DEADLINE: Duration = Duration::from_millis(250);
    const BOUND: Duration = Duration::from_millis(250 + 100);
    // An unoptimised host on a machine that also runs other tests may be kept waiting by these at any single try: what the server can do
    // shows in the best of some, and on a loaded machine of more. One device fails only once in the eyes of the circuit breaker, so the
    // plugin is not suspended, and each try really asks it.
    const TRIES: u32 = 4;
    const MOST_TRIES: u32 = 20;
    // Below this, it is the machine's other work that is measured, and twice of it says nothing.
    const FLOOR: Duration = Duration::from_millis(50);
    let authority = Authority::new(91).unwrap();
    let home = Home::new(&authority.root_pem());
    behave(&home, "abstain");
    install(&home.plugins(), NAME, &manifest(), &guests::build(NAME));
    let server = home.start();
    let mut status = until(&server, NAME, is_active).await;
    let mut others: Vec<Device> = (100..150).map(|number| Device::new(&authority, number).unwrap()).collect();
    enroll(&server, &mut others).await;
    let pollers = Pollers::start(&server, others);
    let mut device = Device::new(&authority, 1).unwrap();
    let mut connection = Connection::to(&server.url()).unwrap();
    let (mut calm, mut troubled) = (Vec::new(), Vec::new());
    // In turns, so that what else the machine does falls on both.
    for behaviour in ["loop", "alloc", "trap", "recurse", "sleep"] {
        for (behaviour, expected) in [("allow", StatusCode::OK), (behaviour, StatusCode::SERVICE_UNAVAILABLE)] {
            behave(&home, behaviour);
            let generation = status["generation"].clone();
            status = until(&server, NAME, |now| now["generation"] != generation).await;
            pollers.lap();
            let mut best = Duration::MAX;
            let begin = Instant::now();
            for number in 0..MOST_TRIES {
                if number >= TRIES && best < BOUND {
                    break;
                }
                let message = device.authenticate().unwrap();
                let prepared = device.prepare(message).unwrap();
                let begin = Instant::now();
                let answer = device.transmit(&mut connection, &prepared).await.unwrap();
                best = best.min(begin.elapsed());
                assert_eq!(answer.status, expected, "{behaviour}");
                assert_eq!(answer.headers.contains_key("retry-after"), expected == StatusCode::SERVICE_UNAVAILABLE, "{behaviour}");
            }
            assert!(best < BOUND, "{behaviour}: {best:?}");
            assert!(behaviour != "sleep" || best >= DEADLINE, "it was not asked: {best:?}");
            // Enough polls for a percentile, and as many seconds of either.
            tokio::time::sleep(Duration::from_secs(1).saturating_sub(begin.elapsed())).await;
            (if expected == StatusCode::OK { &mut calm } else { &mut troubled }).extend(pollers.lap());
        }
    }
    // The last good behaviour is back at once.
    behave(&home, "allow");
    let generation = status["generation"].clone();
    until(&server, NAME, |now| now["generation"] != generation).await;
    device.enroll(&mut connection).await.unwrap();
    let (_, failures) = pollers.stop().await;
    assert_eq!(failures, 0);
    calm.sort_unstable();
    troubled.sort_unstable();
    let (usual, beside) = (p99(&calm), p99(&troubled));
    assert!(
        beside <= (usual * 2).max(FLOOR),
        "p99 of {} polls is {usual:?}, beside misbehaving plugins {beside:?} of {}",
        calm.len(),
        troubled.len()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_a_file_and_garbage_leave_the_last_good_version_serving() {
    let authority = Authority::new(92).unwrap();
    let home = Home::new(&authority.root_pem());
    behave(&home, "allow");
    let component = guests::build(NAME);
    install(&home.plugins(), NAME, &manifest(), &component);
    let server = home.start();
    let good = until(&server, NAME, is_active).await;
    let mut connection = Connection::to(&server.url()).unwrap();
    let written = [component.get(..component.len() / 2).unwrap().to_vec(), b"no component at all".to_vec(), Vec::new()];
    for (number, bad) in written.into_iter().enumerate() {
        // In place, as a careless copy would do it.
        std::fs::write(home.plugins().join(NAME).join("plugin.wasm"), &bad).unwrap();
        let shown = until(&server, NAME, |now| now["candidate"]["state"] == "rejected").await;
        assert!(shown["candidate"]["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{shown:#}");
        assert_eq!((&shown["state"], &shown["digest"]), (&good["state"], &good["digest"]));
        let mut device = Device::new(&authority, number as u64).unwrap();
        device.enroll(&mut connection).await.unwrap();
        install(&home.plugins(), NAME, &manifest(), &component);
        until(&server, NAME, |now| now["candidate"].is_null()).await;
    }
}
