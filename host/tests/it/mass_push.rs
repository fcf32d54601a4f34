//! Pushes to many devices: in the background, at their pace, also over the end of the server.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use http::{Method, StatusCode};
use serde_json::{Value, json};
use wasmdm_simulator::apns::{Answer, Effect, FakeApns, FakeApnsOptions, Rule};
use wasmdm_simulator::message::command_document;
use wasmdm_simulator::{Authority, Behaviour, Fleet, FleetOptions, Target};

use crate::api::{call_at, json as parsed};
use crate::process::Home;
use crate::push::{enrolled, server, store_certificate_at};

async fn post(url: &str, body: impl ToString) -> (StatusCode, Value) {
    let answer = call_at(url, Method::POST, "/api/v1/pushes", body.to_string()).await;
    (answer.status, parsed(&answer))
}

async fn progress(url: &str, id: &str) -> Value {
    let answer = call_at(url, Method::GET, &format!("/api/v1/pushes/{id}"), "").await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.excerpt());
    parsed(&answer)
}

/// Until nobody waits any more.
async fn done(url: &str, id: &str) -> Value {
    for _ in 0..6000 {
        let progress = progress(url, id).await;
        if progress["done"] == true {
            return progress;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the push does not end: {}", progress(url, id).await);
}

/// Ids of nobody.
fn ghosts(count: usize) -> String {
    (0..count).map(|number| format!("G{number}")).collect::<Vec<_>>().join(",")
}

/// Edge case 53. The API is not blocked for minutes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_than_a_thousand_are_pushed_to_in_the_background() {
    let (authority, apns, home) = (Authority::new(96).unwrap(), FakeApns::start().unwrap(), tempfile::tempdir().unwrap());
    let server = server(&authority, &apns, home.path()).await;
    let (device, _) = enrolled(&server, &authority, 1, Behaviour::acknowledging()).await;
    let (id, url) = (device.id(), server.url());

    let answer = call_at(&url, Method::GET, &format!("/v1/push/{id},{}", ghosts(1000)), "").await;
    assert_eq!(answer.status, StatusCode::ACCEPTED, "{}", answer.excerpt());
    let body = parsed(&answer);
    let push = body["push_id"].as_str().unwrap();
    assert_eq!(answer.headers["location"], format!("/api/v1/pushes/{push}"));
    assert_eq!(body["status"]["G7"]["push_error"], "push data missing for id: it is not enrolled");
    assert!(body["status"].get(&id).is_none());
    let end = done(&url, push).await;
    assert_eq!((&end["targets"], &end["pushed"], &end["failed"]), (&json!(1001), &json!(1), &json!(1000)), "{end}");
    assert_eq!(end["failures"][0]["reason"], "it is not enrolled");
    assert_eq!(end["failures"][0]["ids"].as_array().unwrap().len(), 100);
    assert_eq!(apns.counters().requests, 1);

    let document = command_document("C1", "ProfileList", plist::Dictionary::new()).unwrap();
    let answer = call_at(&url, Method::PUT, &format!("/v1/enqueue/{id},{}", ghosts(1000)), document.clone()).await;
    assert_eq!(answer.status, StatusCode::MULTI_STATUS);
    assert!(parsed(&answer).get("push_id").is_none(), "one device only has the command");
    assert_eq!(parsed(&answer)["status"][&id]["push_result"].as_str().map(str::len), Some(36));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everyone_or_those_who_are_named_are_woken_and_the_rest_is_told_why_not() {
    let (authority, apns, home) = (Authority::new(97).unwrap(), FakeApns::start().unwrap(), tempfile::tempdir().unwrap());
    let server = server(&authority, &apns, home.path()).await;
    let (one, _) = enrolled(&server, &authority, 1, Behaviour::acknowledging()).await;
    let (two, _) = enrolled(&server, &authority, 2, Behaviour::acknowledging()).await;
    let url = server.url();
    apns.add_rule(Rule::for_token(&two.token, Effect::Answer(Answer::new(400, "BadDeviceToken"))));

    let (status, begun) = post(&url, json!({ "all": true })).await;
    assert_eq!((status, &begun["not_enrolled"]), (StatusCode::ACCEPTED, &json!([])));
    server.clock.advance(Duration::from_secs(1));
    let end = done(&url, begun["id"].as_str().unwrap()).await;
    assert_eq!((&end["pushed"], &end["failed"]), (&json!(1), &json!(1)), "{end}");
    assert_eq!(end["failures"][0]["ids"], json!([two.id()]));
    assert!(end["failures"][0]["reason"].as_str().unwrap().contains("BadDeviceToken"), "{end}");
    assert_eq!(end["origin"], "api:nanomdm");

    let (status, begun) = post(&url, json!({ "ids": [one.id(), one.id(), "NOBODY"] })).await;
    assert_eq!((status, &begun["not_enrolled"]), (StatusCode::ACCEPTED, &json!(["NOBODY"])));
    assert_eq!(done(&url, begun["id"].as_str().unwrap()).await["pushed"], 1);
    assert_eq!(apns.counters().requests, 3);
    let listed = parsed(&call_at(&url, Method::GET, "/api/v1/pushes", "").await);
    assert_eq!(listed["pushes"].as_array().unwrap().len(), 2);

    for (body, word) in [
        (json!({}), "at least one"),
        (json!({ "ids": [], "all": true, "every": 1 }), "unknown field"),
        (json!({ "ids": ["A"], "all": true }), "not both"),
        (json!({ "ids": 7 }), "ids"),
        (json!({ "ids": (0..100_001).collect::<Vec<_>>().iter().map(ToString::to_string).collect::<Vec<_>>() }), "at most 100000"),
    ] {
        let (status, problem) = post(&url, body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST);
        assert!(problem["detail"].as_str().unwrap().contains(word), "{problem}");
    }
    let unknown = call_at(&url, Method::GET, "/api/v1/pushes/nothing", "").await;
    assert_eq!(unknown.status, StatusCode::NOT_FOUND);
    server.stop().await;
}

/// A burst of commands for a device is a push that is under way, and one more for all that came meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pushes_of_a_device_are_coalesced_and_each_caller_has_its_answer() {
    let options = FakeApnsOptions { latency: Duration::from_millis(400), ..FakeApnsOptions::default() };
    let (authority, apns, home) = (Authority::new(98).unwrap(), FakeApns::start_with(options).unwrap(), tempfile::tempdir().unwrap());
    let server = server(&authority, &apns, home.path()).await;
    let (device, _) = enrolled(&server, &authority, 1, Behaviour::acknowledging()).await;
    let url = server.url();
    let calls = (0..30).map(|number| {
        let (url, path) = (url.clone(), format!("/v1/enqueue/{}", device.id()));
        async move {
            let document = command_document(&format!("C{number}"), "ProfileList", plist::Dictionary::new()).unwrap();
            call_at(&url, Method::PUT, &path, document).await
        }
    });
    for answer in futures_util::future::join_all(calls).await {
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.excerpt());
        assert_eq!(parsed(&answer)["status"][device.id()]["push_result"].as_str().map(str::len), Some(36));
    }
    // All arrive while the first is under way, if the machine is not slower than that: then it may be one more.
    let pushes = apns.counters().requests;
    assert!((1..=4).contains(&pushes), "{pushes} pushes");
    server.stop().await;
}

async fn fleet(home: &Home, authority: &Authority, devices: u64) -> crate::process::ServerProcess {
    let server = home.start();
    let options = FleetOptions { devices, connections: 8, ..FleetOptions::default() };
    let mut fleet = Fleet::new(authority, Target::parse(&server.url()).unwrap(), options).unwrap();
    fleet.enroll().await.unwrap();
    assert!(fleet.report.is_success(), "{}", fleet.report.to_text());
    server
}

fn home(authority: &Authority, apns: &FakeApns, directory: &Path, rate: &str) -> Home {
    let roots = directory.join("apns.pem");
    std::fs::write(&roots, apns.root_pem()).unwrap();
    let (endpoint, roots) = (apns.endpoint(), roots.to_string_lossy().into_owned());
    Home::new(&authority.root_pem()).with(&["--apns-endpoint", &endpoint, "--apns-roots", &roots, "--push-rate", rate])
}

/// Edge case 53. Whoever was promised a push gets it, and only those that were in flight get it twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mass_push_goes_on_after_kill_9_and_only_what_was_in_flight_is_pushed_twice() {
    const DEVICES: u64 = 300;
    let options = FakeApnsOptions { latency: Duration::from_millis(100), ..FakeApnsOptions::default() };
    let (authority, apns, directory) = (Authority::new(99).unwrap(), FakeApns::start_with(options).unwrap(), tempfile::tempdir().unwrap());
    let home = home(&authority, &apns, directory.path(), "200");
    let server = fleet(&home, &authority, DEVICES).await;
    store_certificate_at(&server.url(), &authority, &apns).await;
    let (status, begun) = post(&server.url(), json!({ "all": true })).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{begun}");
    let push = begun["id"].as_str().unwrap().to_owned();
    while apns.counters().requests < DEVICES / 3 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    server.kill();
    let received = apns.counters().requests;
    assert!(received < DEVICES, "it was killed too late");

    let server = home.start();
    let recorded = DEVICES - progress(&server.url(), &push).await["waiting"].as_u64().unwrap();
    let in_flight = received.saturating_sub(recorded);
    assert!(in_flight > 0, "nothing was in flight: {received} received, {recorded} recorded");
    let end = done(&server.url(), &push).await;
    assert_eq!((&end["pushed"], &end["failed"]), (&json!(DEVICES), &json!(0)), "{end}");
    let mut pushes: BTreeMap<Vec<u8>, u64> = BTreeMap::new();
    for received in apns.received() {
        *pushes.entry(received.token.unwrap()).or_default() += 1;
    }
    assert_eq!(pushes.len() as u64, DEVICES, "everyone was woken");
    let twice = pushes.values().filter(|count| **count > 1).count() as u64;
    assert!(twice <= in_flight && pushes.values().all(|count| *count <= 2), "{twice} twice, {in_flight} in flight");
    server.terminate();
    assert!(server.wait());
    home.check(&[]);
    println!("{received} received before the kill, {recorded} recorded, {twice} pushed twice");
}

/// Every device that is woken comes at once: the operator says how many the server bears.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mass_push_goes_no_faster_than_the_operator_wants() {
    const DEVICES: u64 = 60;
    let (authority, apns, directory) = (Authority::new(100).unwrap(), FakeApns::start().unwrap(), tempfile::tempdir().unwrap());
    let home = home(&authority, &apns, directory.path(), "50");
    let server = fleet(&home, &authority, DEVICES).await;
    store_certificate_at(&server.url(), &authority, &apns).await;
    let (_, begun) = post(&server.url(), json!({ "all": true })).await;
    let end = done(&server.url(), begun["id"].as_str().unwrap()).await;
    assert_eq!(end["pushed"], DEVICES, "{end}");
    let arrivals: Vec<Duration> = apns.received().into_iter().map(|received| received.at).collect();
    let took = arrivals.iter().max().unwrap().saturating_sub(*arrivals.iter().min().unwrap());
    assert!(took >= Duration::from_secs(1), "60 pushes at 50 a second took {took:?}");
}
