//! Pushes, as Apple's service sees them and as operators hear of them.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::time::Duration;

use http::{Method, StatusCode};
use wasmdm::apple_push::PushLimits;
use wasmdm::config::ServeOptions;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_service::clock::Clock as _;
use wasmdm_simulator::apns::{Answer, Effect, FakeApns, Rule};
use wasmdm_simulator::{Answering, Authority, Behaviour, Connection, Device, DeviceOptions};

use crate::api::{call_at, enqueue_with, json, text};
use crate::in_process::Server;
use crate::process::{Home, run};
use crate::schemas::{GRANT, MANIFEST, recorded, recorder};

/// A server whose pushes go to the fake, with a certificate for the authority's devices.
pub(crate) async fn server(authority: &Authority, apns: &FakeApns, home: &Path) -> Server {
    server_within(authority, apns, home, PushLimits::default()).await
}

/// As [`server`], with other limits.
pub(crate) async fn server_within(authority: &Authority, apns: &FakeApns, home: &Path, limits: PushLimits) -> Server {
    let server = Server::start_configured(authority, &[], options(apns, home), |config| config.apns.limits = limits).await;
    store_certificate(&server, authority, apns).await;
    server
}

/// Options of a server whose pushes go to the fake.
pub(crate) fn options(apns: &FakeApns, home: &Path) -> ServeOptions {
    let roots = home.join("apns.pem");
    std::fs::write(&roots, apns.root_pem()).unwrap();
    ServeOptions { apns_endpoint: Some(apns.endpoint()), apns_roots: Some(roots), ..ServeOptions::default() }
}

pub(crate) async fn store_certificate(server: &Server, authority: &Authority, apns: &FakeApns) {
    store_certificate_at(&server.url(), authority, apns).await;
}

pub(crate) async fn store_certificate_at(url: &str, authority: &Authority, apns: &FakeApns) {
    store_certificate_of(url, authority.topic(), apns).await;
}

async fn store_certificate_of(url: &str, topic: &str, apns: &FakeApns) {
    let certificate = apns.authority().issue(topic).unwrap();
    let body = format!("{}{}", certificate.certificate_pem, certificate.private_key_pem);
    let answer = call_at(url, Method::PUT, "/v1/pushcert", body).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.excerpt());
}

pub(crate) async fn enrolled(server: &Server, authority: &Authority, number: u64, behaviour: Behaviour) -> (Device, Connection) {
    let mut device = Device::with_options(authority, number, DeviceOptions { behaviour, ..DeviceOptions::default() }).unwrap();
    let mut connection = Connection::to(&server.url()).unwrap();
    device.enroll(&mut connection).await.unwrap();
    (device, connection)
}

async fn push(server: &Server, ids: &str) -> (StatusCode, serde_json::Value) {
    let answer = call_at(&server.url(), Method::GET, &format!("/v1/push/{ids}"), "").await;
    (answer.status, json(&answer))
}

/// NanoMDM defect 17. Edge case 50. No expiration means that Apple drops what it cannot deliver at once, and a device that slept never hears of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_is_woken_by_a_push_with_everything_that_apple_wants() {
    let (authority, apns, home) = (Authority::new(91).unwrap(), FakeApns::start().unwrap(), tempfile::tempdir().unwrap());
    let server = server(&authority, &apns, home.path()).await;
    let (mut device, mut connection) = enrolled(&server, &authority, 1, Behaviour::acknowledging()).await;
    let mut wake_ups = apns.subscribe(&device.token, authority.topic());
    enqueue_with(&server.url(), &device.id(), "C1", "ProfileList", "").await;
    let woken = wake_ups.next().await.unwrap();
    assert_eq!(woken.magic.as_deref(), Some(device.push_magic.as_str()));
    let received = apns.received().remove(0);
    assert_eq!(received.path, format!("/3/device/{}", hex(&device.token)));
    assert_eq!(received.body, format!("{{\"mdm\":\"{}\"}}", device.push_magic));
    let month = 30 * 24 * 3600;
    let expiration = (1_800_000_000 + month).to_string();
    for (name, value) in [("apns-push-type", "mdm"), ("apns-topic", authority.topic()), ("apns-priority", "10"), ("apns-expiration", &expiration)] {
        assert_eq!(received.header(name), Some(value), "{name}");
    }
    assert_eq!(apns.complaints(), Vec::<String>::new());
    assert_eq!(device.poll_until_idle(&mut connection).await.unwrap().commands.len(), 1);
    // It has answered: nobody wakes it any more.
    server.clock.advance(Duration::from_hours(48));
    assert_eq!(server.running.storage.next_wake(&EnrollmentId::new(device.id())).await.unwrap(), None);
    assert_eq!(apns.counters().requests, 1);
    server.stop().await;
}

/// NanoMDM defect 17. Edge case 53. Two channels with one token lose one result there; here each id has its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_id_of_a_push_has_its_own_result() {
    let (authority, apns, home) = (Authority::new(92).unwrap(), FakeApns::start().unwrap(), tempfile::tempdir().unwrap());
    let server = server(&authority, &apns, home.path()).await;
    let (one, _) = enrolled(&server, &authority, 1, Behaviour::acknowledging()).await;
    let mut same = Device::new(&authority, 3).unwrap();
    same.token.clone_from(&one.token);
    same.enroll(&mut Connection::to(&server.url()).unwrap()).await.unwrap();
    let (two, _) = enrolled(&server, &authority, 2, Behaviour::acknowledging()).await;
    apns.add_rule(Rule::for_token(&two.token, Effect::Answer(Answer::new(400, "BadDeviceToken"))));
    let (status, answer) = push(&server, &format!("{},{},{},NOPE", one.id(), same.id(), two.id())).await;
    assert_eq!(status, StatusCode::MULTI_STATUS, "{answer}");
    let [first, second] = [&one, &same].map(|device| answer["status"][device.id()]["push_result"].as_str().unwrap());
    assert!(first.len() >= 36 && second.len() >= 36 && first != second, "{answer}");
    let of_one = format!("/3/device/{}", hex(&one.token));
    let magics: BTreeSet<String> =
        apns.received().into_iter().filter(|push| push.path == of_one).map(|push| String::from_utf8_lossy(&push.body).into_owned()).collect();
    assert_eq!(magics, [&one, &same].map(|device| format!("{{\"mdm\":\"{}\"}}", device.push_magic)).into());
    assert!(answer["status"][two.id()]["push_error"].as_str().unwrap().contains("BadDeviceToken"));
    assert!(answer["status"]["NOPE"]["push_error"].as_str().unwrap().contains("not enrolled"));
    let failing = server.running.storage.failing_push(&TenantId::default(), &EnrollmentId::new(two.id())).await.unwrap().unwrap();
    assert_eq!((failing.code.as_str(), failing.token_is_dead), ("BadDeviceToken", false));
    server.stop().await;
}

/// Edge case 51. A 410 that is older than the last TokenUpdate is about a token that the device has left behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_apple_does_not_know_any_more_is_left_alone_until_it_tells_a_new_token() {
    let (authority, apns, home) = (Authority::new(93).unwrap(), FakeApns::start().unwrap(), tempfile::tempdir().unwrap());
    let server = server(&authority, &apns, home.path()).await;
    let (mut device, mut connection) = enrolled(&server, &authority, 1, Behaviour::acknowledging()).await;
    let told_at = 1_800_000_000_000;
    for (at, dead) in [(told_at - 1, false), (told_at + 1, true)] {
        apns.unregister(&device.token, at);
        let (status, answer) = push(&server, &device.id()).await;
        assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR, "{answer}");
        let failing = server.running.storage.failing_push(&TenantId::default(), &EnrollmentId::new(device.id())).await.unwrap().unwrap();
        assert_eq!((failing.code.as_str(), failing.token_is_dead), ("Unregistered", dead));
    }
    let requests = apns.counters().requests;
    let (_, answer) = push(&server, &device.id()).await;
    assert!(answer["status"][device.id()]["push_error"].as_str().unwrap().contains("new one"), "{answer}");
    assert_eq!(apns.counters().requests, requests, "Apple is not asked again");
    server.clock.advance(Duration::from_mins(1));
    device.rotate_push_token(7);
    let update = device.token_update().unwrap();
    device.insist(&mut connection, update).await.unwrap();
    assert_eq!(push(&server, &device.id()).await.0, StatusCode::OK);
    server.stop().await;
}

/// A device told another token while Apple's answer about the old one was on its way: the new one was taken for dead, and the device was never
/// pushed to again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_about_the_old_token_says_nothing_of_the_one_that_was_told_meanwhile() {
    let (authority, apns, home) = (Authority::new(101).unwrap(), FakeApns::start().unwrap(), tempfile::tempdir().unwrap());
    let server = server(&authority, &apns, home.path()).await;
    let (mut device, mut connection) = enrolled(&server, &authority, 1, Behaviour::acknowledging()).await;
    apns.unregister(&device.token, 1_800_000_000_000 + 1);
    apns.set_latency(Duration::from_secs(3));
    let id = device.id();
    let meanwhile = async {
        while apns.counters().requests == 0 {
            tokio::task::yield_now().await;
        }
        server.clock.advance(Duration::from_secs(1));
        device.rotate_push_token(7);
        let update = device.token_update().unwrap();
        device.insist(&mut connection, update).await.unwrap();
        assert!(apns.counters().answers.is_empty(), "Apple has answered too soon");
    };
    let ((status, answer), ()) = futures_util::future::join(push(&server, &id), meanwhile).await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR, "{answer}");
    assert!(answer["status"][&id]["push_error"].as_str().unwrap().starts_with("Unregistered"), "{answer}");
    apns.set_latency(Duration::ZERO);
    assert_eq!(push(&server, &id).await.0, StatusCode::OK);
    assert_eq!(apns.received()[1].token.as_ref(), Some(&device.token));
    assert_eq!(server.running.storage.failing_push(&TenantId::default(), &EnrollmentId::new(id.as_str())).await.unwrap(), None);
    server.stop().await;
}

/// Whoever queues a command waits for Apple, but not for ever, and learns that the command is queued all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_enqueue_is_answered_in_time_while_apple_says_nothing() {
    let (authority, apns, home) = (Authority::new(102).unwrap(), FakeApns::start().unwrap(), tempfile::tempdir().unwrap());
    let limits = PushLimits { push: Duration::from_secs(1), ..PushLimits::default() };
    let server = server_within(&authority, &apns, home.path(), limits).await;
    let (mut device, mut connection) = enrolled(&server, &authority, 1, Behaviour::acknowledging()).await;
    apns.add_rule(Rule::always(Effect::Silence));
    let document = wasmdm_simulator::message::command_document("C1", "ProfileList", plist::Dictionary::new()).unwrap();
    let begin = std::time::Instant::now();
    let answer = call_at(&server.url(), Method::PUT, &format!("/v1/enqueue/{}", device.id()), document).await;
    assert_eq!(answer.status, StatusCode::MULTI_STATUS, "{}", answer.excerpt());
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    let answer = json(&answer);
    assert_eq!(answer["status"][device.id()], serde_json::json!({ "push_error": "no answer within 1s" }));
    assert_eq!(answer["command_uuid"], "C1");
    assert_eq!(device.poll_until_idle(&mut connection).await.unwrap().commands.len(), 1);
    server.stop().await;
}

/// What was given up with the whole call left no trace: a device whose pushes were never answered seemed to be well. And what Apple
/// had, perhaps, was called not sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_that_is_not_answered_within_its_call_is_a_failure_that_is_kept_counted_and_told() {
    let (authority, apns, home) = (Authority::new(103).unwrap(), FakeApns::start().unwrap(), tempfile::tempdir().unwrap());
    let limits = PushLimits { call: Duration::from_secs(1), ..PushLimits::default() };
    let recorder = recorder();
    let plugins = [("recorder", MANIFEST, recorder.as_slice(), GRANT)];
    let server = Server::start_configured(&authority, &plugins, options(&apns, home.path()), |config| config.apns.limits = limits).await;
    store_certificate(&server, &authority, &apns).await;
    let (device, _) = enrolled(&server, &authority, 1, Behaviour::acknowledging()).await;
    apns.add_rule(Rule::always(Effect::Silence).times(1));
    let (_, answer) = push(&server, &device.id()).await;
    assert_eq!(answer["status"][device.id()]["push_error"], "no answer within 1s");
    let metric = async || {
        let metrics = text(&call_at(&server.url(), Method::GET, "/metrics", "").await);
        let line = metrics.lines().find(|line| line.starts_with("wasmdm_push_failing{code=\"timed-out\"}")).unwrap_or_default();
        line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok())
    };
    assert_eq!(metric().await, Some(1.0));
    server.quiet().await;
    let recorded = recorded(&server).await;
    let told: Vec<_> = recorded.iter().filter(|(key, _)| key.starts_with("event/push.failed/")).map(|(_, handed)| handed).collect();
    assert_eq!(told.len(), 1);
    let failure = serde_json::json!({ "code": "timed-out", "detail": "no answer within 1s", "fault": "service", "token_is_dead": false });
    assert_eq!(told[0]["data"]["push"], failure);
    assert_eq!(push(&server, &device.id()).await.0, StatusCode::OK);
    // One look at the metrics does for a second.
    server.clock.advance(Duration::from_secs(1));
    assert_eq!(metric().await, Some(0.0));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_topic_is_pushed_to_with_its_own_certificate() {
    const OTHER: &str = "com.apple.mgmt.External.99999999-8888-7777-6666-555555555555";
    let (authority, apns, home) = (Authority::new(104).unwrap(), FakeApns::start().unwrap(), tempfile::tempdir().unwrap());
    let server = server(&authority, &apns, home.path()).await;
    store_certificate_of(&server.url(), OTHER, &apns).await;
    let (one, _) = enrolled(&server, &authority, 1, Behaviour::acknowledging()).await;
    let enroll = async |number, topic: &str| {
        let options = DeviceOptions { topic: Some(topic.to_owned()), ..DeviceOptions::default() };
        let mut device = Device::with_options(&authority, number, options).unwrap();
        device.enroll(&mut Connection::to(&server.url()).unwrap()).await.unwrap();
        device
    };
    let (two, three) = (enroll(2, OTHER).await, enroll(3, "com.apple.mgmt.External.nobodys").await);
    let (status, answer) = push(&server, &[one.id(), two.id(), three.id()].join(",")).await;
    assert_eq!(status, StatusCode::MULTI_STATUS, "{answer}");
    assert!(answer["status"][three.id()]["push_error"].as_str().unwrap().starts_with("no push certificate for topic"), "{answer}");
    let received = apns.received();
    assert_eq!(received.len(), 2);
    let pushed = |device: &Device| received.iter().find(|received| received.token.as_ref() == Some(&device.token)).unwrap();
    assert_eq!((pushed(&one).header("apns-topic"), pushed(&one).status), (Some(authority.topic()), Some(200)));
    assert_eq!((pushed(&two).header("apns-topic"), pushed(&two).status), (Some(OTHER), Some(200)));
    assert_ne!(pushed(&one).serial, pushed(&two).serial);
    server.stop().await;
}

/// Apple's word counts: a second is waited for at once, two minutes later on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_is_made_again_when_apple_says() {
    let (authority, apns, home) = (Authority::new(105).unwrap(), FakeApns::start().unwrap(), tempfile::tempdir().unwrap());
    let server = server(&authority, &apns, home.path()).await;
    let (device, _) = enrolled(&server, &authority, 1, Behaviour::acknowledging()).await;
    let id = EnrollmentId::new(device.id());
    apns.add_rule(Rule::always(Effect::Answer(Answer::new(429, "TooManyRequests").retry_after(1))).times(1));
    apns.add_rule(Rule::always(Effect::Answer(Answer::new(503, "ServiceUnavailable").retry_after(0))).times(1));
    assert_eq!(push(&server, &device.id()).await.0, StatusCode::OK);
    let ids: Vec<_> = apns.received().iter().map(|received| received.header("apns-id").unwrap().to_owned()).collect();
    assert_eq!(ids.len(), 3);
    assert!(ids.iter().all(|id| *id == ids[0]), "the same push");
    assert_eq!(server.running.storage.failing_push(&TenantId::default(), &id).await.unwrap(), None);

    apns.add_rule(Rule::always(Effect::Answer(Answer::new(503, "ServiceUnavailable").retry_after(120))).times(1));
    let document = wasmdm_simulator::message::command_document("C1", "ProfileList", plist::Dictionary::new()).unwrap();
    let answer = call_at(&server.url(), Method::PUT, &format!("/v1/enqueue/{}", device.id()), document).await;
    assert_eq!(answer.status, StatusCode::MULTI_STATUS, "{}", answer.excerpt());
    let due = server.running.storage.next_wake(&id).await.unwrap().unwrap();
    assert_eq!(due.as_millis(), 1_800_000_000_000 + 120_000);
    server.clock.advance(Duration::from_secs(120));
    while apns.counters().delivered < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    server.stop().await;
}

/// The way through an egress proxy, and its password in no log.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_behind_an_egress_proxy_pushes_through_it() {
    let (authority, apns, directory) = (Authority::new(106).unwrap(), FakeApns::start().unwrap(), tempfile::tempdir().unwrap());
    let roots = directory.path().join("apns.pem");
    std::fs::write(&roots, apns.root_pem()).unwrap();
    let (proxy, heads) = connect_proxy();
    let (endpoint, roots) = (apns.endpoint(), roots.to_string_lossy().into_owned());
    let url = format!("http://jo:kanarienvogel-of-the-proxy@{proxy}");
    for (url, works) in [(url.as_str(), true), ("http://jo:kanarienvogel-of-the-proxy@127.0.0.1:1", false)] {
        let home = Home::new(&authority.root_pem()).with(&["--apns-endpoint", &endpoint, "--apns-roots", &roots, "--apns-proxy", url]);
        let server = home.start();
        store_certificate_at(&server.url(), &authority, &apns).await;
        let mut device = Device::with_options(&authority, 1, DeviceOptions::default()).unwrap();
        device.enroll(&mut Connection::to(&server.url()).unwrap()).await.unwrap();
        let answer = call_at(&server.url(), Method::GET, &format!("/v1/push/{}", device.id()), "").await;
        assert_eq!(answer.status == StatusCode::OK, works, "{}", answer.excerpt());
        let error = json(&answer)["status"][device.id()]["push_error"].as_str().unwrap_or_default().to_owned();
        assert!(works || error.contains("the proxy 127.0.0.1:1: ") && !error.contains("jo:"), "{error}");
        server.stop();
    }
    assert!(heads.try_iter().all(|head| head.contains("\r\nProxy-Authorization: Basic ")));
    assert_eq!(apns.counters().requests, 1);
}

/// A proxy that leads wherever it is asked to, and hands on what it was asked.
fn connect_proxy() -> (std::net::SocketAddr, std::sync::mpsc::Receiver<String>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, heads) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        while let Ok((mut client, _)) = listener.accept() {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                client.read_exact(&mut byte).unwrap();
                head.push(byte[0]);
            }
            let head = String::from_utf8(head).unwrap();
            let mut service = std::net::TcpStream::connect(head.split(' ').nth(1).unwrap()).unwrap();
            let _ = sender.send(head);
            client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
            let (mut back, mut forth) = (service.try_clone().unwrap(), client.try_clone().unwrap());
            std::thread::spawn(move || drop(std::io::copy(&mut back, &mut forth)));
            std::thread::spawn(move || drop(std::io::copy(&mut client, &mut service)));
        }
    });
    (address, heads)
}

/// Edge case 36, to the end: the clock moves, and the device that deferred everything is woken after one minute, two and four. The pushes of
/// the commands themselves had made of these an hour and more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deferred_commands_wake_their_device_by_the_schedule() {
    let (authority, apns, home) = (Authority::new(94).unwrap(), FakeApns::start().unwrap(), tempfile::tempdir().unwrap());
    let server = server(&authority, &apns, home.path()).await;
    let behaviour = Behaviour::acknowledging().with("InstallProfile", Answering::NotNow { times: 3 });
    let (mut device, mut connection) = enrolled(&server, &authority, 1, behaviour).await;
    let id = EnrollmentId::new(device.id());
    let mut wake_ups = apns.subscribe(&device.token, authority.topic());
    enqueue_and_push(&server, &device, "LATER", "InstallProfile").await;
    wake_ups.next().await.unwrap();
    for minutes in [1, 2, 4] {
        let now = format!("NOW{minutes}");
        enqueue_and_push(&server, &device, &now, "ProfileList").await;
        wake_ups.next().await.unwrap();
        let session = device.poll_until_idle(&mut connection).await.unwrap();
        assert_eq!(session.commands.iter().map(|command| command.uuid.as_str()).collect::<Vec<_>>(), ["LATER", now.as_str()]);
        let due = server.running.storage.next_wake(&id).await.unwrap().unwrap();
        assert_eq!(due.since(server.clock.now()), Duration::from_mins(minutes));
        assert!(wake_ups.try_next().is_none());
        server.clock.advance(Duration::from_secs(minutes * 60 + 1));
        wake_ups.next().await.unwrap();
    }
    let session = device.poll_until_idle(&mut connection).await.unwrap();
    assert_eq!(session.commands.iter().map(|command| command.uuid.as_str()).collect::<Vec<_>>(), ["LATER"]);
    assert_eq!(server.running.storage.next_wake(&id).await.unwrap(), None);
    server.stop().await;
}

async fn enqueue_and_push(server: &Server, device: &Device, uuid: &str, request_type: &str) {
    let document = wasmdm_simulator::message::command_document(uuid, request_type, plist::Dictionary::new()).unwrap();
    let answer = call_at(&server.url(), Method::PUT, &format!("/v1/enqueue/{}", device.id()), document).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.excerpt());
}

/// A renewed certificate is used from the next push on, without a restart; one of another topic changes nothing (edge case 31).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renewed_push_certificate_is_used_from_the_next_push_on() {
    let (authority, apns, home) = (Authority::new(95).unwrap(), FakeApns::start().unwrap(), tempfile::tempdir().unwrap());
    let server = server(&authority, &apns, home.path()).await;
    let (device, _) = enrolled(&server, &authority, 1, Behaviour::acknowledging()).await;
    assert_eq!(push(&server, &device.id()).await.0, StatusCode::OK);
    store_certificate(&server, &authority, &apns).await;
    assert_eq!(push(&server, &device.id()).await.0, StatusCode::OK);
    let serials: Vec<String> = apns.received().into_iter().map(|received| received.serial).collect();
    assert_eq!(serials.len(), 2);
    assert_ne!(serials[0], serials[1]);
    server.stop().await;
}

/// A push service of one's own, as docs/operations.md shows it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn simulated_devices_come_when_a_push_wakes_them() {
    let directory = tempfile::tempdir().unwrap();
    let ca = directory.path().to_string_lossy().into_owned();
    let (code, _, error) = run(&["simulate", "--ca-dir", &ca, "--make-ca"]);
    assert_eq!(code, 0, "{error}");
    // Free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (endpoint, listen, roots) = (format!("localhost:{port}"), format!("127.0.0.1:{port}"), format!("{ca}/push-root.pem"));
    let root = std::fs::read_to_string(directory.path().join("root.pem")).unwrap();
    let home = Home::new(&root).with(&["--apns-endpoint", &endpoint, "--apns-roots", &roots]);
    let server = home.start();
    let url = server.url();
    let usual =
        ["simulate", "--url", &url, "--ca-dir", &ca, "--devices", "12", "--commands", "3", "--not-now", "1", "--push", "--push-listen", &listen];
    let (code, out, error) = run(&[&usual[..], &["--api-key", crate::process::API_KEY]].concat());
    assert_eq!(code, 0, "{out}{error}{:#?}", server.log());
    assert!(out.contains("36 commands queued, 12 devices woken"), "{out}");

    let (code, _, error) = run(&["simulate", "--url", &url, "--ca-dir", &ca, "--push"]);
    assert!(code != 0 && error.contains("--commands"), "{error}");
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |hex, byte| format!("{hex}{byte:02x}"))
}
