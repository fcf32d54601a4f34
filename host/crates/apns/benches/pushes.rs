//! What a push costs: pushes per second without latency and at 30 ms, and the client's CPU for each. The push service runs on a thread of
//! its own, so that its CPU time is not the client's; both share the machine. What a server makes of it, with its database and its API, is
//! the row `pushes` of `cargo bench -p wasmdm --bench devices`.
//!
//! `cargo bench -p wasmdm-apns` (`-- --pushes 50000 --at-once 600 --runs 3` are the defaults).

#![expect(clippy::print_stdout, clippy::expect_used, reason = "a program for people, which ends at the first thing that is wrong")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use uuid::Uuid;
use wasmdm_apns::{Apns, ApnsOptions, ClientCertificate, Endpoint, Notification, Roots};
use wasmdm_protocol::time::Timestamp;
use wasmdm_simulator::FakeApns;
use wasmdm_simulator::apns::{FakeApnsOptions, PushCertificateRequest};
use wasmdm_simulator::measure::{Latencies, own_cpu};

const TOPIC: &str = "com.apple.mgmt.External.11111111-2222-3333-4444-555555555555";
const NOW: Timestamp = Timestamp::from_millis(1_800_000_000_000);

fn main() {
    let number = |flag: &str, default: u64| {
        let mut arguments = std::env::args().skip_while(|argument| argument != flag);
        arguments.nth(1).and_then(|text| text.parse().ok()).unwrap_or(default)
    };
    let (pushes, at_once, runs) = (number("--pushes", 50_000), number("--at-once", 600), number("--runs", 3));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    println!("{pushes} pushes, {at_once} at once, one topic, RSA-2048 push certificate, TLS 1.3; client and service on the same machine");
    println!(
        "\n{:<28} {:>10} {:>12} {:>12} {:>9} {:>9} {:>12} {:>10}",
        "", "pushes/s", "client µs", "service µs", "p50 ms", "p99 ms", "connections", "cores used"
    );
    for (latency, theirs, target) in [(0, 8_000.0, 8_000.0), (30, 157.0, 10_000.0)] {
        let mut rates = Vec::new();
        for run in 1..=runs {
            rates.push(runtime.block_on(measure(&format!("{latency} ms latency, run {run}"), Duration::from_millis(latency), pushes, at_once)));
        }
        rates.sort_by(f64::total_cmp);
        let median = rates.get(rates.len() / 2).copied().unwrap_or_default();
        let met = if median >= target { "met" } else { "not met" };
        println!("  target: pushes/s ≥ {target:.0}: {met} ({median:.0}; NanoMDM {theirs:.0}, {:.0} times as many)", median / theirs);
    }
}

/// Answers the pushes a second.
async fn measure(name: &str, latency: Duration, pushes: u64, at_once: u64) -> f64 {
    let fake = FakeApns::start_with(FakeApnsOptions { latency, remembered: 0, ..FakeApnsOptions::default() }).expect("a push service");
    let issued = fake.authority().issue_as(&PushCertificateRequest { rsa: true, ..PushCertificateRequest::new(TOPIC) }).expect("a certificate");
    let certificate = ClientCertificate::new(&issued.certificate_pem, &issued.private_key_pem, 1).expect("a certificate");
    let endpoint = Endpoint::parse(&fake.endpoint()).expect("an endpoint");
    let options = ApnsOptions { endpoint, roots: Roots::Pem(fake.root_pem()), ..ApnsOptions::new(Arc::new(|| 0.5)) };
    let apns = Apns::new(options).expect("a client");
    // The handshake is not what is measured.
    assert!(apns.push(&certificate, &notification(0)).await.is_accepted());

    let (fake_before, own_before, begin) = (fake.cpu().unwrap_or_default(), own_cpu(), Instant::now());
    let next = Arc::new(AtomicU64::new(1));
    let mut workers = JoinSet::new();
    for _ in 0..at_once {
        let (apns, certificate, next) = (apns.clone(), certificate.clone(), Arc::clone(&next));
        workers.spawn(async move {
            let mut latencies = Latencies::default();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number > pushes {
                    return latencies;
                }
                let begin = Instant::now();
                let outcome = apns.push(&certificate, &notification(number)).await;
                assert!(outcome.is_accepted(), "{outcome}");
                latencies.record(begin.elapsed());
            }
        });
    }
    let mut latencies = Latencies::default();
    while let Some(finished) = workers.join_next().await {
        latencies.merge(&finished.expect("a worker"));
    }
    let elapsed = begin.elapsed();
    let service = fake.cpu().unwrap_or_default().saturating_sub(fake_before);
    let client = own_cpu().saturating_sub(own_before).saturating_sub(service);
    #[expect(clippy::cast_precision_loss, reason = "counts stay below 2^52")]
    let count = pushes as f64;
    let per_push = |cpu: Duration| cpu.as_secs_f64() * 1e6 / count;
    let millis = |per_mille| latencies.quantile(per_mille).as_secs_f64() * 1e3;
    let rate = count / elapsed.as_secs_f64();
    println!(
        "{name:<28} {rate:>10.0} {:>12.1} {:>12.1} {:>9.2} {:>9.2} {:>12} {:>10.2}",
        per_push(client),
        per_push(service),
        millis(500),
        millis(990),
        fake.counters().connections,
        (client + service).as_secs_f64() / elapsed.as_secs_f64(),
    );
    rate
}

fn notification(number: u64) -> Notification {
    let token: Vec<u8> = number.to_be_bytes().into_iter().cycle().take(32).collect();
    Notification::new(token.into(), format!("{}", Uuid::from_u128(u128::from(number))), Uuid::from_u128(u128::from(number)), NOW)
}
