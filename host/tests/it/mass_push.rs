//! Pushes to many devices: in the background, at their pace, also over the end of the server.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use http::{Method, StatusCode};
use serde_json::{Value, json};
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_simulator::apns::{Answer, Effect, FakeApns, FakeApnsOptions, Rule};
use wasmdm_simulator::message::command_document;
use wasmdm_simulator::{Authority, Behaviour, Fleet, FleetOptions, Target};

use crate::api::{basic, call_at, json as parsed};
use crate::process::{API_KEY, Home};
use crate::push::{enrolled, server, store_certificate, store_certificate_at};

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

/// It answered 202, as if somebody were woken.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mass_push_in_which_nobody_is_enrolled_is_an_error() {
    let (authority, apns, home) = (Authority::new(116).unwrap(), FakeApns::start().unwrap(), tempfile::tempdir().unwrap());
    let server = server(&authority, &apns, home.path()).await;
    let answer = call_at(&server.url(), Method::GET, &format!("/v1/push/{}", ghosts(1001)), "").await;
    assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR, "{}", answer.excerpt());
    let body = parsed(&answer);
    assert_eq!(body["status"].as_object().unwrap().len(), 1001);
    assert_eq!(body["status"]["G1000"]["push_error"], "push data missing for id: it is not enrolled");
    server.stop().await;
}

/// The pushes were the handler's, and went with it when its client lost patience.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_are_pushed_to_although_the_caller_has_gone() {
    const DEVICES: u64 = 3;
    let options = FakeApnsOptions { latency: Duration::from_millis(300), ..FakeApnsOptions::default() };
    let (authority, apns, home) = (Authority::new(117).unwrap(), FakeApns::start_with(options).unwrap(), tempfile::tempdir().unwrap());
    let server = server(&authority, &apns, home.path()).await;
    let mut ids = Vec::new();
    for number in 1..=DEVICES {
        ids.push(enrolled(&server, &authority, number, Behaviour::acknowledging()).await.0.id());
    }
    // Each push is made again a second later.
    apns.add_rule(Rule::always(Effect::Answer(Answer::new(503, "ServiceUnavailable").retry_after(1))).times(DEVICES));
    let head = format!("GET /v1/push/{} HTTP/1.1\r\nHost: here\r\nAuthorization: {}\r\n\r\n", ids.join(","), basic("nanomdm", API_KEY));
    let mut connection = std::net::TcpStream::connect(server.running.address).unwrap();
    connection.write_all(head.as_bytes()).unwrap();
    let begin = Instant::now();
    while apns.counters().requests < DEVICES {
        assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", apns.counters());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop(connection);
    while apns.counters().delivered < DEVICES {
        assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", apns.counters());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
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

/// Each 410 names its own time: two thousand devices that had left were two thousand reasons.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_that_fail_for_the_same_reason_are_counted_together() {
    let (authority, apns, home) = (Authority::new(111).unwrap(), FakeApns::start().unwrap(), tempfile::tempdir().unwrap());
    let server = server(&authority, &apns, home.path()).await;
    let (one, _) = enrolled(&server, &authority, 1, Behaviour::acknowledging()).await;
    let (two, _) = enrolled(&server, &authority, 2, Behaviour::acknowledging()).await;
    for (device, later) in [(&one, 1000), (&two, 2000)] {
        apns.unregister(&device.token, 1_800_000_000_000 + later);
    }
    let url = server.url();
    // The second time they are known to be gone.
    for _ in 0..2 {
        let (_, begun) = post(&url, json!({ "all": true })).await;
        server.clock.advance(Duration::from_secs(1));
        let end = done(&url, begun["id"].as_str().unwrap()).await;
        assert_eq!(end["failures"].as_array().unwrap().len(), 1, "{end}");
        assert_eq!(end["failures"][0]["count"], 2);
        assert!(end["failures"][0]["reason"].as_str().unwrap().starts_with("Unregistered: "), "{end}");
    }
    let failing = server.running.storage.failing_push(&TenantId::default(), &EnrollmentId::new(one.id())).await.unwrap().unwrap();
    assert!(failing.detail.contains("since 2027-01-15"), "{}", failing.detail);
    server.stop().await;
}

/// Whoever went away while the targets were being stored left a part of them out, and nobody knew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_is_stored_whole_although_its_caller_has_gone() {
    const GHOSTS: usize = 30_000;
    let (authority, apns, home) = (Authority::new(112).unwrap(), FakeApns::start().unwrap(), tempfile::tempdir().unwrap());
    let server = server(&authority, &apns, home.path()).await;
    let body = json!({ "ids": ghosts(GHOSTS).split(',').collect::<Vec<_>>() }).to_string();
    let head = format!(
        "POST /api/v1/pushes HTTP/1.1\r\nHost: here\r\nAuthorization: {}\r\nContent-Length: {}\r\n\r\n",
        basic("nanomdm", API_KEY),
        body.len()
    );
    let mut connection = std::net::TcpStream::connect(server.running.address).unwrap();
    connection.write_all(head.as_bytes()).unwrap();
    connection.write_all(body.as_bytes()).unwrap();
    let listed = async || {
        let listed = parsed(&call_at(&server.url(), Method::GET, "/api/v1/pushes", "").await);
        listed["pushes"][0]["targets"].as_u64().unwrap_or(0)
    };
    // It has begun.
    while listed().await == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop(connection);
    let begin = Instant::now();
    while listed().await < GHOSTS as u64 {
        assert!(begin.elapsed() < Duration::from_secs(60), "{} of {GHOSTS} are stored", listed().await);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    server.stop().await;
}

/// Whoever asked heard of an error only, while a part of the devices was woken.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_that_is_stored_in_part_answers_with_its_id() {
    let (authority, apns, home) = (Authority::new(115).unwrap(), FakeApns::start().unwrap(), tempfile::tempdir().unwrap());
    let server = server(&authority, &apns, home.path()).await;
    let (device, _) = enrolled(&server, &authority, 1, Behaviour::acknowledging()).await;
    let full = "CREATE TRIGGER full BEFORE INSERT ON mass_push_targets WHEN NEW.enrollment_id = 'G999' BEGIN SELECT RAISE(ABORT, 'full'); END";
    wasmdm_testkit::seed::meddle(&server.database(), full).await;
    let url = server.url();
    let ids: Vec<String> = std::iter::once(device.id()).chain(ghosts(1300).split(',').map(str::to_owned)).collect();

    let answer = call_at(&url, Method::GET, &format!("/v1/push/{}", ids.join(",")), "").await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE, "{}", answer.excerpt());
    let answer = parsed(&answer);
    assert!(answer["push_error"].as_str().unwrap().starts_with("not all are pushed to: "), "{answer}");
    let end = done(&url, answer["push_id"].as_str().unwrap()).await;
    assert_eq!((&end["pushed"], &end["targets"]), (&json!(1), &json!(1000)), "{end}");

    let answer = call_at(&url, Method::POST, "/api/v1/pushes", json!({ "ids": ids }).to_string()).await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE, "{}", answer.excerpt());
    assert!(answer.headers.get("retry-after").is_none(), "again would be twice");
    let id = parsed(&answer)["id"].as_str().unwrap().to_owned();
    assert_eq!(answer.headers["location"], format!("/api/v1/pushes/{id}"));
    assert_eq!(progress(&url, &id).await["targets"], 1000);
    server.stop().await;
}

/// The slowest push decided when all of its beat were recorded: one that Apple never answered held the others for half a minute, and a crash
/// meanwhile pushed to them again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_push_without_an_answer_holds_nobody_elses_result() {
    const DEVICES: u64 = 60;
    let options = FakeApnsOptions { latency: Duration::from_millis(20), ..FakeApnsOptions::default() };
    let (authority, apns, directory) = (Authority::new(113).unwrap(), FakeApns::start_with(options).unwrap(), tempfile::tempdir().unwrap());
    let home = home(&authority, &apns, directory.path(), "200");
    let server = fleet(&home, &authority, DEVICES).await;
    store_certificate_at(&server.url(), &authority, &apns).await;
    apns.add_rule(Rule::always(Effect::Silence).every(10).times(1));
    let begin = Instant::now();
    let (_, begun) = post(&server.url(), json!({ "all": true })).await;
    let push = begun["id"].as_str().unwrap().to_owned();
    while progress(&server.url(), &push).await["pushed"] != DEVICES - 1 {
        assert!(begin.elapsed() < Duration::from_secs(25), "{}", progress(&server.url(), &push).await);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    server.kill();
    let server = home.start();
    assert_eq!(done(&server.url(), &push).await["pushed"], DEVICES);
    let twice: Vec<_> = pushes_by_device(&apns).into_values().filter(|count| *count > 1).collect();
    assert_eq!(twice, [2], "the one that nobody knew of");
    server.terminate();
    assert!(server.wait());
    home.check(&[]);
}

/// Everything goes wrong that can, through the whole server: each device is reached, or there is a reason why not, and nobody is told twice whose
/// answer was not lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mass_push_reaches_everyone_or_says_why_not_whatever_goes_wrong() {
    const DEVICES: u64 = 2_000;
    let options = FakeApnsOptions { latency: Duration::from_millis(20), remembered: 10_000, ..FakeApnsOptions::default() };
    let (authority, apns, directory) = (Authority::new(114).unwrap(), FakeApns::start_with(options).unwrap(), tempfile::tempdir().unwrap());
    let server = server(&authority, &apns, directory.path()).await;
    let url = server.url();
    let options = FleetOptions { devices: DEVICES, connections: 8, ..FleetOptions::default() };
    let mut fleet = Fleet::new(&authority, Target::parse(&url).unwrap(), options).unwrap();
    fleet.enroll().await.unwrap();
    assert!(fleet.report.is_success(), "{}", fleet.report.to_text());
    for (every, effect) in [
        (401, Effect::Answer(Answer::unregistered(1_900_000_000_000))),
        (97, Effect::Answer(Answer::new(429, "TooManyRequests").retry_after(0))),
        (101, Effect::Answer(Answer::new(429, "TooManyRequests"))),
        (211, Effect::Answer(Answer::new(503, "ServiceUnavailable"))),
        (503, Effect::GoAway),
        (701, Effect::RefuseStream),
        (997, Effect::Cut),
    ] {
        apns.add_rule(Rule::always(effect).every(every));
    }
    let (status, begun) = post(&url, json!({ "all": true })).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{begun}");
    let push = begun["id"].as_str().unwrap();
    let (mut waiting, mut is_renewed) = (u64::MAX, false);
    // Storage has the turn of each at a thousand a second; what failed for a while is due after a minute and more.
    server.clock.advance(Duration::from_secs(3));
    let end = loop {
        let progress = progress(&url, push).await;
        if progress["done"] == true {
            break progress;
        }
        if !is_renewed && apns.counters().requests > DEVICES / 2 {
            is_renewed = true;
            store_certificate(&server, &authority, &apns).await;
        }
        let now = progress["waiting"].as_u64().unwrap();
        if now == waiting {
            server.clock.advance(Duration::from_secs(61));
        }
        waiting = now;
        tokio::time::sleep(Duration::from_secs(1)).await;
    };
    assert!(is_renewed);
    let (received, counters) = (apns.received(), apns.counters());
    let gone = counters.answers[&(410, "Unregistered".to_owned())];
    assert_eq!((&end["targets"], &end["pushed"], &end["failed"]), (&json!(DEVICES), &json!(DEVICES - gone), &json!(gone)), "{end}");
    assert_eq!(end["failures"].as_array().unwrap().len(), 1, "{end}");
    assert_eq!(pushes_by_device(&apns).len() as u64, DEVICES, "everyone was pushed to");
    let serials: BTreeSet<_> = received.iter().map(|received| received.serial.as_str()).collect();
    assert_eq!(serials.len(), 2, "both certificates were used");
    let delivered = received.iter().filter(|received| received.delivered).count() as u64;
    let lost = received.iter().filter(|received| received.delivered && received.status.is_none()).count() as u64;
    let told_again = delivered - (DEVICES - gone);
    assert!(told_again <= lost, "{told_again} told again, {lost} answers lost");
    println!("{counters:?}: {lost} answers lost, {told_again} told again");
    server.stop().await;
}

/// Edge case 53. Whoever was promised a push gets it, and only those that were in flight get it twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mass_push_goes_on_after_kill_9_and_only_what_was_in_flight_is_pushed_twice() {
    const DEVICES: u64 = 400;
    const RATE: u64 = 200;
    const LATENCY: Duration = Duration::from_millis(100);
    /// What a busy machine takes to write down what it has heard.
    const MARGIN: Duration = Duration::from_millis(400);
    let options = FakeApnsOptions { latency: LATENCY, ..FakeApnsOptions::default() };
    let (authority, apns, directory) = (Authority::new(99).unwrap(), FakeApns::start_with(options).unwrap(), tempfile::tempdir().unwrap());
    let home = home(&authority, &apns, directory.path(), &RATE.to_string());
    let server = fleet(&home, &authority, DEVICES).await;
    store_certificate_at(&server.url(), &authority, &apns).await;
    let (status, begun) = post(&server.url(), json!({ "all": true })).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{begun}");
    let push = begun["id"].as_str().unwrap().to_owned();
    while apns.counters().requests < DEVICES / 2 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    server.kill();
    let received = apns.counters().requests;
    assert!(received < DEVICES, "it was killed too late");

    // What may have been under way, whatever the server says of itself.
    let in_flight = RATE * u64::try_from((LATENCY + MARGIN).as_millis()).unwrap() / 1000;

    let server = home.start();
    let end = done(&server.url(), &push).await;
    assert_eq!((&end["pushed"], &end["failed"]), (&json!(DEVICES), &json!(0)), "{end}");
    let pushes = pushes_by_device(&apns);
    assert_eq!(pushes.len() as u64, DEVICES, "everyone was woken");
    let twice = pushes.values().filter(|count| **count > 1).count() as u64;
    assert!(twice <= in_flight && pushes.values().all(|count| *count <= 2), "{twice} twice, {in_flight} in flight");
    server.terminate();
    assert!(server.wait());
    home.check(&[]);
    println!("{received} received before the kill, {twice} pushed twice");
}

fn pushes_by_device(apns: &FakeApns) -> BTreeMap<Vec<u8>, u64> {
    let mut pushes = BTreeMap::new();
    for received in apns.received() {
        *pushes.entry(received.token.unwrap()).or_default() += 1;
    }
    pushes
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
