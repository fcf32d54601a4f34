//! What a device request costs: enrollments, command cycles and idle polls, over `Mdm-Signature` and over a certificate header, with
//! and without plugins. The server runs as a process of its own, so that its CPU time is its own; the same run measures a server that
//! does nothing, because machines differ and are shared.
//!
//! `cargo bench -p wasmdm` (`-- --devices 2000 --seconds 5` are the defaults).

#![expect(
    clippy::print_stdout,
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a program for people, which ends at the first thing that is wrong"
)]

#[path = "../tests/it/process.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
mod process;

use std::time::Duration;

use process::{API_KEY, Home, ServerProcess};
use wasmdm::bundled::{CHAT_NOTIFY, ENROLLMENT_BASELINE, SERIAL_ALLOW_LIST};
use wasmdm_simulator::fleet::{FleetOptions, Polling};
use wasmdm_simulator::{ApiClient, Authority, Fleet, KeyType, Proof, Report, Target};

const CONNECTIONS: usize = 32;

fn main() {
    let number = |flag: &str, default: u64| {
        let mut arguments = std::env::args().skip_while(|argument| argument != flag);
        arguments.nth(1).and_then(|text| text.parse().ok()).unwrap_or(default)
    };
    let (devices, seconds) = (number("--devices", 2000), number("--seconds", 5));
    let authority = Authority::with_keys(1, KeyType::Rsa2048, 4).expect("keys");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    println!("{devices} devices, {CONNECTIONS} connections, RSA-2048, SQLite with synchronous=FULL; requests signed beforehand");
    println!("\n{:<34} {:>12} {:>12} {:>12} {:>10} {:>10} {:>10}", "", "requests/s", "server µs", "client µs", "p50 ms", "p99 ms", "not 200");
    for plugins in [false, true] {
        for header in [false, true] {
            let name = format!("{}, {} plugins", if header { "header" } else { "signature" }, if plugins { "three" } else { "no" });
            let report = runtime.block_on(measure(&authority, devices, seconds, plugins, header));
            for phase in &report.phases {
                println!(
                    "{:<34} {:>12.0} {:>12.1} {:>12.1} {:>10.2} {:>10.2} {:>10}",
                    format!("{name}: {}", phase.name),
                    phase.requests_per_second,
                    phase.server_cpu_us.unwrap_or_default(),
                    phase.own_cpu_us,
                    phase.latency_ms.p50,
                    phase.latency_ms.p99,
                    phase.refused()
                );
            }
            if let Some(ceiling) = &report.ceiling {
                println!(
                    "{:<34} {:>12.0} {:>12.1} {:>12.1}",
                    "  a server that does nothing",
                    ceiling.requests_per_second,
                    ceiling.server_cpu_us.unwrap_or_default(),
                    ceiling.own_cpu_us
                );
            }
            for problem in &report.problems {
                println!("  problem: {problem}");
            }
        }
    }
}

async fn measure(authority: &Authority, devices: u64, seconds: u64, plugins: bool, header: bool) -> Report {
    let mut home = Home::new(&authority.root_pem());
    if header {
        home = home.with(&["--cert-header", "Client-Cert", "--trusted-proxy", "127.0.0.1"]);
    }
    if plugins {
        install_plugins(&home, devices);
    }
    let server = home.start();
    if plugins {
        wait_for_plugins(&server).await;
    }
    let options = FleetOptions {
        devices,
        connections: CONNECTIONS,
        proof: if header { Proof::CertificateHeader("client-cert".parse().expect("a header name")) } else { Proof::default() },
        serial_prefix: Some("BENCH".to_owned()),
        measure: true,
        server_pid: Some(server.pid()),
        ..FleetOptions::default()
    };
    let mut fleet = Fleet::new(authority, Target::parse(&server.url()).expect("a URL"), options).expect("devices");
    fleet.enroll().await.expect("enrolled");
    let mut api = ApiClient::new(&server.url(), API_KEY).expect("a client");
    let queued = fleet.enqueue(&mut api, 1, false).await.expect("queued");
    fleet.work_off(&queued).await.expect("answered");
    fleet.poll(Polling::For(Duration::from_secs(seconds)), None).await.expect("polled");
    fleet.measure_ceiling(Duration::from_secs(1)).await.expect("a ceiling");
    fleet.report
}

fn install_plugins(home: &Home, devices: u64) {
    let serials = (0..=devices).map(|n| format!("\"BENCH{n:07}\"")).collect::<Vec<_>>().join(",");
    let grants = [
        ("serial-allow-list", format!("enabled = true\n[config]\nserial_numbers = [{serials}]\n")),
        ("enrollment-baseline", "enabled = true\n[grants]\nkv = { bytes = \"16MiB\" }\ncommands = [\"enqueue:DeviceInformation\", \"enqueue:DeviceConfigured\"]\nenrollments = [\"read\"]\ntimers = true\n".to_owned()),
        ("chat-notify", "enabled = false\n".to_owned()),
    ];
    for (name, grant) in grants {
        std::fs::write(home.grants().join(format!("{name}.toml")), grant).expect("a grant file");
    }
    for plugin in [SERIAL_ALLOW_LIST, ENROLLMENT_BASELINE, CHAT_NOTIFY] {
        process::install(&home.plugins(), plugin.name, plugin.manifest, plugin.component);
    }
}

async fn wait_for_plugins(server: &ServerProcess) {
    for _ in 0..600 {
        let answer = wasmdm_simulator::Connection::to(&server.url())
            .expect("a URL")
            .request(http::Method::GET, "/readyz".parse().expect("a path"), http::HeaderMap::new(), bytes::Bytes::new())
            .await;
        if answer.is_ok_and(|answer| answer.status == http::StatusCode::OK) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("the plugins did not become active: {:#?}", server.log());
}
