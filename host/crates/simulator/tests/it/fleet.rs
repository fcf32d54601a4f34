//! Whole runs, as the command line makes them.

use std::time::Duration;

use clap::Parser;
use indicatif::ProgressBar;
use wasmdm_simulator::cli::{SimulateArguments, simulate, simulate_with};
use wasmdm_simulator::fleet::Polling;
use wasmdm_simulator::journal::read_journal;
use wasmdm_simulator::{Authority, Fleet, FleetOptions, Report, Target};

use crate::server::Server;

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    arguments: SimulateArguments,
}

fn arguments(server: &Server, more: &[&str]) -> SimulateArguments {
    let url = server.url();
    let mut line = vec!["simulate", "--url", &url, "--key-type", "p256"];
    line.extend_from_slice(more);
    Line::try_parse_from(line).unwrap().arguments
}

async fn run(server: &Server, more: &[&str]) -> Report {
    simulate_with(&arguments(server, more), ProgressBar::hidden()).await.unwrap()
}

#[tokio::test]
async fn a_fleet_enrolls_and_works_off_its_commands() {
    let server = Server::start().await;
    let directory = tempfile::tempdir().unwrap();
    let journal = directory.path().join("journal");
    let report = run(
        &server,
        &[
            "--devices",
            "12",
            "--connections",
            "3",
            "--commands",
            "10",
            "--not-now",
            "2",
            "--errors",
            "20",
            "--api-key",
            "key",
            "--journal",
            journal.to_str().unwrap(),
            "--check-out",
        ],
    )
    .await;
    assert!(report.is_success(), "{:?}", report.problems);
    assert_eq!((report.enrolled, report.denied, report.commands_enqueued), (12, 0, 120));
    assert_eq!(report.reports["NotNow"], 24);
    assert_eq!(report.reports["Acknowledged"] + report.reports["Error"], 120);
    assert!(report.reports["Error"] > 0);
    assert_eq!(report.redelivered, 0);
    // A third of the devices are Macs, which escrow a token.
    assert_eq!(report.phase("enroll").unwrap().requests, 12 * 2 + 4);

    let journal = read_journal(&journal).unwrap();
    assert_eq!(journal.checked_out().count(), 12);
    assert_eq!(journal.confirmed_results().count(), 120);
    assert_eq!(journal.enqueued.values().map(Vec::len).sum::<usize>(), 120);
    assert!(journal.deliveries_after_confirmed_result().is_empty());
}

#[tokio::test]
async fn a_measured_run_reports_rates_latencies_and_the_ceiling() {
    let server = Server::start().await;
    let own_pid = std::process::id().to_string();
    let report = run(
        &server,
        &["--devices", "5", "--connections", "2", "--commands", "2", "--api-key", "key", "--measure", "--polls", "20", "--server-pid", &own_pid],
    )
    .await;
    assert!(report.is_success(), "{:?}", report.problems);
    let polls = report.phase("polls").unwrap();
    assert_eq!(polls.requests, 100);
    assert_eq!(polls.answers[&200], 100);
    assert!(polls.requests_per_second > 0.0 && polls.own_cpu_us > 0.0);
    assert!(polls.server_cpu_us.is_some());
    assert!(polls.latency_ms.p50 <= polls.latency_ms.p99 && polls.latency_ms.p99 <= polls.latency_ms.max);
    let ceiling = report.ceiling.as_ref().unwrap();
    assert!(ceiling.requests > 100);
    // The server that does nothing is not the server that is measured.
    assert!(server.seen().iter().all(|seen| seen.path != "/null"));
    let text = report.to_text();
    assert!(text.contains("polls") && text.contains("ceiling"), "{text}");
}

#[tokio::test]
async fn denied_devices_are_counted_and_leave_the_others_alone() {
    let server = Server::start().await;
    server.deny("SIM0000002");
    let report = run(&server, &["--devices", "3", "--polls", "1"]).await;
    assert_eq!((report.enrolled, report.denied), (2, 1));
    assert_eq!(report.problem_count, 1);
    assert_eq!(report.phase("polls").unwrap().requests, 2);
}

#[tokio::test]
async fn a_denial_that_was_expected_is_no_problem_and_an_enrollment_is() {
    let server = Server::start().await;
    for number in 1..=3 {
        server.deny(&format!("SIM000000{number}"));
    }
    let report = run(&server, &["--devices", "3", "--expect-deny"]).await;
    assert!(report.is_success(), "{:?}", report.problems);
    assert_eq!(report.denied, 3);
    let report = run(&server, &["--devices", "4", "--expect-deny"]).await;
    assert_eq!(report.problem_count, 1);
}

#[tokio::test]
async fn lost_answers_are_counted_apart() {
    let server = Server::start().await;
    server.drop_next(3);
    let report = run(&server, &["--devices", "4", "--connections", "2", "--patience", "30"]).await;
    assert!(report.is_success(), "{:?}", report.problems);
    assert_eq!(report.phase("enroll").unwrap().transport_errors, 3);
}

#[tokio::test]
async fn a_rate_is_kept() {
    let server = Server::start().await;
    let authority = Authority::new(1).unwrap();
    let target = Target::parse(&server.url()).unwrap();
    let options = FleetOptions { devices: 2, connections: 2, ..FleetOptions::default() };
    let mut fleet = Fleet::new(&authority, target, options).unwrap();
    fleet.poll(Polling::For(Duration::from_millis(500)), Some(40)).await.unwrap();
    // 40 a second for half a second: 20 are due, however slow the machine is.
    assert_eq!(fleet.report.phase("polls").unwrap().requests, 20);
}

/// Edge case 32.
#[tokio::test]
async fn every_kind_of_enrollment_runs() {
    let server = Server::start().await;
    for kind in ["device", "user", "user-enrollment-device", "user-enrollment", "shared-ipad"] {
        let report = run(&server, &["--devices", "2", "--kind", kind, "--polls", "1"]).await;
        assert!(report.is_success(), "{kind}: {:?}", report.problems);
    }
}

#[tokio::test]
async fn wrong_arguments_are_named() {
    let server = Server::start().await;
    for (more, name) in [(&["--url", "https://127.0.0.1/"][..], "url"), (&["--commands", "1"], "api-key"), (&["--cert-header", "a b"], "cert-header")]
    {
        let mut line = vec!["simulate"];
        let url = server.url();
        if name != "url" {
            line.extend_from_slice(&["--url", &url]);
        }
        line.extend_from_slice(more);
        let arguments = Line::try_parse_from(line).unwrap().arguments;
        let error = simulate(arguments).await.unwrap_err().to_string();
        assert!(error.starts_with(name), "{error}");
    }
}
