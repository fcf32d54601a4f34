//! Devices that live find nothing wrong with a server that keeps its queues, and say what is wrong with one that does not.

use std::sync::Arc;
use std::time::Duration;

use wasmdm_simulator::{ApiClient, Authority, LifeEvent, LifeRates, LivingFleet, LivingOptions, Report, Target};

use crate::server::Server;

async fn live(server: &Server, events: &[LifeEvent]) -> Report {
    let none = LifeEvent::ALL.into_iter().fold(LifeRates::default(), |rates, event| rates.with(event, 0.0));
    let rates = events.iter().fold(none, |rates, event| rates.with(*event, 600.0));
    let options = LivingOptions {
        rates,
        lost_percent: 5,
        repeated_percent: 5,
        spread: Duration::ZERO,
        mass_enqueue_every: Duration::from_millis(100),
        ..LivingOptions::default()
    };
    let authority = Arc::new(Authority::new(9).unwrap());
    let api = ApiClient::new(&server.url(), "key").unwrap();
    let fleet = LivingFleet::new(&authority, &Target::parse(&server.url()).unwrap(), api, options).unwrap();
    fleet.live_for(Duration::from_millis(1500)).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_and_repeated_messages_are_no_problem_where_the_queue_is_kept() {
    let server = Server::start().await;
    let report = live(&server, &[LifeEvent::Session, LifeEvent::Commands, LifeEvent::PushToken]).await;
    assert!(report.is_success(), "{}", report.to_text());
    assert_eq!(report.enrolled, 12);
    for name in ["session", "commands", "push-token", "lost answer", "repeated report", "silence"] {
        assert!(report.life.contains_key(name), "{name}: {}", report.to_text());
    }
    assert!(report.reports["Acknowledged"] > 0 && report.reports["NotNow"] > 0, "{}", report.to_text());
}

/// This server forgets to empty the queue when a device enrolls again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_serves_cancelled_commands_is_found_out() {
    let server = Server::start().await;
    let report = live(&server, &[LifeEvent::Session, LifeEvent::Commands, LifeEvent::ReEnrollment]).await;
    let text = report.to_text();
    assert!(!report.is_success() && text.contains("although it was cancelled: the device has enrolled again"), "{text}");
}

/// This server believes any certificate.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_believes_strangers_is_found_out() {
    let server = Server::start().await;
    let report = live(&server, &[LifeEvent::Stranger]).await;
    assert!(report.to_text().contains("a certificate that names nobody was answered 200 instead of 400"), "{}", report.to_text());
}
