//! Where the metrics are, and what a look at them costs.

use std::time::Duration;

use http::{Method, StatusCode};
use wasmdm::config::ServeOptions;
use wasmdm_simulator::{Authority, Connection, Device};

use crate::api::{call_at, text};
use crate::in_process::Server;

/// They stood open where the devices come, and each request counted all enrollments.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_can_have_an_address_of_their_own_and_one_look_does_for_a_second() {
    let authority = Authority::new(151).unwrap();
    let options = ServeOptions { metrics_listen: Some("127.0.0.1:0".to_owned()), ..ServeOptions::default() };
    let server = Server::start_with(&authority, &[], options).await;
    let elsewhere = format!("http://{}", server.running.metrics_address.unwrap());
    for (url, path, status) in [
        (&server.url(), "/metrics", StatusCode::NOT_FOUND),
        (&server.url(), "/version", StatusCode::OK),
        (&elsewhere, "/metrics", StatusCode::OK),
        (&elsewhere, "/version", StatusCode::NOT_FOUND),
        (&elsewhere, "/mdm", StatusCode::NOT_FOUND),
    ] {
        assert_eq!(call_at(url, Method::GET, path, "").await.status, status, "{url}{path}");
    }
    let metrics = async || text(&call_at(&elsewhere, Method::GET, "/metrics", "").await);
    let before = metrics().await;
    assert!(before.contains("wasmdm_enrollments{state=\"enrolled\"}"), "{before}");
    let mut connection = Connection::to(&server.url()).unwrap();
    Device::new(&authority, 1).unwrap().enroll(&mut connection).await.unwrap();
    assert_eq!(metrics().await, before, "nothing was looked up");
    server.clock.advance(Duration::from_secs(1));
    assert_ne!(metrics().await, before);
    server.stop().await;
}
