//! Pushes, as Apple's service sees them and as operators hear of them.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use http::{Method, StatusCode};
use wasmdm::config::ServeOptions;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_service::clock::Clock as _;
use wasmdm_simulator::apns::{Answer, Effect, FakeApns, Rule};
use wasmdm_simulator::{Answering, Authority, Behaviour, Connection, Device, DeviceOptions};

use crate::api::{call_at, enqueue_with, json};
use crate::in_process::Server;
use crate::process::{Home, run};

/// A server whose pushes go to the fake, with a certificate for the authority's devices.
pub(crate) async fn server(authority: &Authority, apns: &FakeApns, home: &Path) -> Server {
    let roots = home.join("apns.pem");
    std::fs::write(&roots, apns.root_pem()).unwrap();
    let options = ServeOptions { apns_endpoint: Some(apns.endpoint()), apns_roots: Some(roots), ..ServeOptions::default() };
    let server = Server::start_with(authority, &[], options).await;
    store_certificate(&server, authority, apns).await;
    server
}

async fn store_certificate(server: &Server, authority: &Authority, apns: &FakeApns) {
    store_certificate_at(&server.url(), authority, apns).await;
}

pub(crate) async fn store_certificate_at(url: &str, authority: &Authority, apns: &FakeApns) {
    let certificate = apns.authority().issue(authority.topic()).unwrap();
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
