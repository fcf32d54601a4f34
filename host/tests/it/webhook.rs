//! Receivers of NanoMDM's webhook hear of every message, in NanoMDM's words, until they have confirmed it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use aws_lc_rs::hmac;
use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Response, StatusCode};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use wasmdm_simulator::canary::found_in;
use wasmdm_simulator::{Authority, Connection, Device, Target};

use crate::process::Home;

/// Headers and body of a request.
pub(crate) type Heard = (HeaderMap, Vec<u8>);

/// A receiver, which answers what it is told to and then 200.
#[derive(Clone, Default)]
pub(crate) struct Receiver {
    answers: Arc<Mutex<Vec<StatusCode>>>,
    pub(crate) heard: Arc<Mutex<Vec<Heard>>>,
}

async fn hear(State(receiver): State<Receiver>, request: Request) -> Response<Body> {
    let (head, body) = request.into_parts();
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap().to_vec();
    receiver.heard.lock().unwrap().push((head.headers, body));
    let status = receiver.answers.lock().unwrap().pop().unwrap_or(StatusCode::OK);
    Response::builder().status(status).body(Body::empty()).unwrap()
}

impl Receiver {
    pub(crate) async fn start(answers: &[StatusCode]) -> (String, Self) {
        let receiver = Self::default();
        receiver.answers.lock().unwrap().extend(answers.iter().rev());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/hook?x=1", listener.local_addr().unwrap());
        let router = Router::new().fallback(hear).with_state(receiver.clone());
        tokio_util::task::TaskTracker::new().spawn(async move { axum::serve(listener, router).await });
        (url, receiver)
    }

    /// Once it has heard so many: their JSON, in order.
    pub(crate) async fn events(&self, number: usize) -> Vec<Value> {
        for _ in 0..3000 {
            if self.heard.lock().unwrap().len() >= number {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let heard = self.heard.lock().unwrap();
        assert!(heard.len() >= number, "{heard:#?}");
        heard.iter().map(|(_, body)| serde_json::from_slice(body).unwrap()).collect()
    }
}

fn topics(events: &[Value]) -> Vec<String> {
    events.iter().map(|event| event["topic"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_receivers_hear_of_every_message_in_nanomdms_words() {
    let (first, one) = Receiver::start(&[]).await;
    let (second, two) = Receiver::start(&[]).await;
    let authority = Authority::new(71).unwrap();
    let home =
        Home::new(&authority.root_pem()).with(&["--webhook-url", &first, "--webhook-url", &second, "--webhook-hmac-key", "kanarienvogel-shared"]);
    let server = home.start();
    let mut connection = Connection::new(Target::parse(&format!("{}/mdm?team=red", server.url())).unwrap());
    let mut device = Device::new(&authority, 1).unwrap();
    device.enroll(&mut connection).await.unwrap();
    for message in [device.set_bootstrap_token(Some(b"very secret")), device.get_bootstrap_token(), device.idle(), device.report("Error", "unknown")]
    {
        device.send(&mut connection, message.unwrap()).await.unwrap();
    }
    // The poll is told from memory, so its place among the others is not certain.
    let names = ["mdm.Authenticate", "mdm.TokenUpdate", "mdm.SetBootstrapToken", "mdm.GetBootstrapToken", "mdm.Connect", "mdm.Connect"];
    for receiver in [&one, &two] {
        let mut events = receiver.events(6).await;
        let polled = events.iter().position(|event| event["acknowledge_event"]["status"] == "Idle").unwrap();
        let poll = events.remove(polled);
        events.insert(4, poll);
        assert_eq!(topics(&events), names);
        for event in &events {
            assert!(!event["event_id"].as_str().unwrap().is_empty());
            assert!(event["created_at"].as_str().unwrap().ends_with('Z'));
            let (message, other) = (&event["checkin_event"], &event["acknowledge_event"]);
            let message = if message.is_null() { other } else { message };
            assert_eq!(message["ids"]["id"], device.id());
            assert_eq!(message["ids"]["type"], "Device");
            assert_eq!(message["udid"], device.udid);
            assert_eq!(message["url_params"]["team"], "red");
            let payload = STANDARD.decode(message["raw_payload"].as_str().unwrap()).unwrap();
            let text = String::from_utf8(payload.clone()).unwrap();
            assert!(plist::from_bytes::<plist::Value>(&payload).is_ok());
            assert_eq!(found_in(&payload), None);
            assert!(!text.contains(&device.push_magic) && !text.contains(&STANDARD.encode(b"very secret")), "{text}");
        }
        assert_eq!(events[1]["checkin_event"]["token_update_tally"], 1);
        assert_eq!(events[4]["acknowledge_event"]["status"], "Idle");
        assert_eq!(events[4]["acknowledge_event"].get("command_uuid"), None);
        assert_eq!(
            (&events[5]["acknowledge_event"]["status"], &events[5]["acknowledge_event"]["command_uuid"]),
            (&"Error".into(), &"unknown".into())
        );
        let heard = receiver.heard.lock().unwrap();
        for (headers, body) in heard.iter() {
            assert_eq!(headers["content-type"], "application/json; charset=utf-8");
            let key = hmac::Key::new(hmac::HMAC_SHA256, b"kanarienvogel-shared");
            assert_eq!(headers["x-hmac-signature"], STANDARD.encode(hmac::sign(&key, body)).as_str());
            // NanoMDM's order of keys, to the byte.
            let mut sorted: Value = serde_json::from_slice(body).unwrap();
            sorted.sort_all_objects();
            assert_eq!(serde_json::to_vec(&sorted).unwrap(), *body);
            assert_eq!(found_in(body), None);
            let text = String::from_utf8_lossy(body);
            let holds_secrets = text.contains("mdm.TokenUpdate") || text.contains("mdm.SetBootstrapToken");
            assert_eq!(headers.contains_key("x-wasmdm-redacted"), holds_secrets, "{text}");
        }
    }
}

/// The document that was searched for secrets had been cleaned already, so the message seemed to have none and went out to the byte.
#[tokio::test(flavor = "multi_thread")]
async fn the_secrets_of_a_status_report_go_out_only_where_the_operator_wants_them() {
    let authority = Authority::new(76).unwrap();
    for (number, flags, redacted) in [(1, &[][..], true), (2, &["--webhook-secrets"][..], false)] {
        let (url, receiver) = Receiver::start(&[]).await;
        let home = Home::new(&authority.root_pem()).with(&["--webhook-url", &url, "--webhook-topic", "mdm.DeclarativeManagement"]).with(flags);
        let server = home.start();
        let mut connection = Connection::new(Target::parse(&server.url()).unwrap());
        let mut device = Device::new(&authority, number).unwrap();
        device.enroll(&mut connection).await.unwrap();
        let status = device.status_report().unwrap();
        device.insist(&mut connection, status.clone()).await.unwrap();
        let event = receiver.events(1).await.remove(0);
        let payload = STANDARD.decode(event["checkin_event"]["raw_payload"].as_str().unwrap()).unwrap();
        let document = plist::from_bytes::<plist::Value>(&payload).unwrap();
        let report: Value = serde_json::from_slice(document.as_dictionary().unwrap()["Data"].as_data().unwrap()).unwrap();
        let items = &report["StatusItems"];
        assert_eq!(items["device"]["model"]["family"], "Mac");
        assert_eq!(receiver.heard.lock().unwrap()[0].0.contains_key("x-wasmdm-redacted"), redacted);
        if redacted {
            assert_eq!(found_in(report.to_string().as_bytes()), None);
            assert!(items["mdm"]["push-magic"].is_null() && items["mdm"]["push-token"].is_null());
        } else {
            assert_eq!((payload.as_slice(), &items["mdm"]["push-magic"]), (&status.body[..], &device.push_magic.as_str().into()));
        }
    }
}

/// A receiver that was told with a failure was never told again, and events came in any order. NanoMDM defect 15.
#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_fails_hears_again_and_the_order_of_a_device_holds() {
    let (url, receiver) = Receiver::start(&[StatusCode::INTERNAL_SERVER_ERROR, StatusCode::FOUND]).await;
    let authority = Authority::new(72).unwrap();
    let home = Home::new(&authority.root_pem()).with(&["--webhook-url", &url, "--webhook-topic", "mdm.TokenUpdate,mdm.Connect:Acknowledged"]);
    let server = home.start();
    let mut connection = Connection::new(Target::parse(&server.url()).unwrap());
    let mut device = Device::new(&authority, 1).unwrap();
    device.enroll(&mut connection).await.unwrap();
    for message in [device.idle(), device.report("Acknowledged", "unknown"), device.report("Error", "other")] {
        device.send(&mut connection, message.unwrap()).await.unwrap();
    }
    let events = receiver.events(4).await;
    assert_eq!(topics(&events), ["mdm.TokenUpdate", "mdm.TokenUpdate", "mdm.TokenUpdate", "mdm.Connect"]);
    assert_eq!(events[0]["event_id"], events[2]["event_id"], "the same event again");
    assert_eq!(events[3]["acknowledge_event"]["status"], "Acknowledged");
}

/// A message whose storing failed was told all the same. NanoMDM defect 15.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_stored_is_not_told() {
    let (url, receiver) = Receiver::start(&[]).await;
    let authority = Authority::new(76).unwrap();
    let home = Home::new(&authority.root_pem()).with(&["--webhook-url", &url]);
    let server = home.start();
    let mut connection = Connection::new(Target::parse(&server.url()).unwrap());
    let mut device = Device::new(&authority, 1).unwrap();
    device.enroll(&mut connection).await.unwrap();
    let topic = std::mem::replace(&mut device.topic, "com.apple.mgmt.of-somebody-else".to_owned());
    let update = device.token_update().unwrap();
    assert_eq!(device.send(&mut connection, update).await.unwrap().status, StatusCode::BAD_REQUEST);
    device.topic = topic;
    let report = device.report("Acknowledged", "unknown").unwrap();
    device.send(&mut connection, report).await.unwrap();
    // In order: what was told between would be here.
    assert_eq!(topics(&receiver.events(3).await), ["mdm.Authenticate", "mdm.TokenUpdate", "mdm.Connect"]);
}

/// NanoMDM tells once, and what it has not told when it stops is lost.
/// NanoMDM defect 15.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_told_when_the_server_was_killed_is_told_by_the_next() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = nobody.local_addr().unwrap();
    drop(nobody);
    let authority = Authority::new(73).unwrap();
    let home = Home::new(&authority.root_pem()).with(&["--webhook-url", &format!("http://{address}/"), "--webhook-secrets"]);
    let server = home.start();
    let mut connection = Connection::new(Target::parse(&server.url()).unwrap());
    let mut device = Device::new(&authority, 1).unwrap();
    device.enroll(&mut connection).await.unwrap();
    server.kill();

    let receiver = Receiver::default();
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    let router = Router::new().fallback(hear).with_state(receiver.clone());
    tokio_util::task::TaskTracker::new().spawn(async move { axum::serve(listener, router).await });
    let server = home.start();
    let events = receiver.events(2).await;
    assert_eq!(topics(&events), ["mdm.Authenticate", "mdm.TokenUpdate"]);
    // A poll is told too, but leaves no trace.
    let before = home.fingerprint()["events"].clone();
    let mut connection = Connection::new(Target::parse(&server.url()).unwrap());
    let idle = device.idle().unwrap();
    device.send(&mut connection, idle).await.unwrap();
    assert_eq!(receiver.events(3).await[2]["acknowledge_event"]["status"], "Idle");
    assert_eq!(home.fingerprint()["events"], before);
    let payload = STANDARD.decode(events[1]["checkin_event"]["raw_payload"].as_str().unwrap()).unwrap();
    assert!(String::from_utf8(payload).unwrap().contains(&device.push_magic), "to the byte, where the operator asks for it");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_receiver_refuses_is_a_dead_letter_that_can_be_seen_and_sent_again() {
    let (url, receiver) = Receiver::start(&[StatusCode::UNPROCESSABLE_ENTITY]).await;
    let authority = Authority::new(74).unwrap();
    let home = Home::new(&authority.root_pem()).with(&["--webhook-url", &url]);
    let server = home.start();
    let mut connection = Connection::new(Target::parse(&server.url()).unwrap());
    let mut device = Device::new(&authority, 1).unwrap();
    device.enroll(&mut connection).await.unwrap();
    receiver.events(2).await;
    let data = home.data();
    let listed = || {
        let (code, out, error) = crate::process::run(&["db", "dead-letters", "--data", &data.to_string_lossy()]);
        assert_eq!(code, 0, "{error}");
        out
    };
    let line = {
        let mut tries = 0;
        loop {
            let out = listed();
            if !out.is_empty() || tries > 200 {
                break out;
            }
            tries += 1;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let letter: Value = serde_json::from_str(line.trim()).unwrap();
    assert_eq!((&letter["topic"], &letter["enrollment"]), (&"mdm.Authenticate".into(), &device.id().into()));
    assert_eq!(letter["error"], "the receiver answered 422");
    assert!(!line.contains("raw_payload"));

    let authorization = format!("Bearer {}", crate::process::API_KEY);
    let http = reqwest::Client::new();
    let call = async |method: reqwest::Method, path: &str, body: Value| {
        let request = http.request(method, format!("{}{path}", server.url())).header("authorization", &authorization);
        let answer = request.header("content-type", "application/json").body(body.to_string()).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    let (status, text) = call(reqwest::Method::GET, "/api/v1/dead-letters", Value::Null).await;
    assert_eq!((status, &serde_json::from_str::<Value>(&text).unwrap()["dead_letters"][0]), (200, &letter));
    for (body, field) in [(serde_json::json!({}), "sequences"), (serde_json::json!({ "sequences": [] }), "sequences")] {
        let (status, text) = call(reqwest::Method::POST, "/api/v1/dead-letters/replay", body).await;
        assert_eq!((status, &serde_json::from_str::<Value>(&text).unwrap()["field"]), (400, &field.into()));
    }
    let wanted = serde_json::json!({ "sequences": [letter["sequence"]] });
    assert_eq!(call(reqwest::Method::POST, "/api/v1/dead-letters/replay", wanted).await, (200, "{\"replayed\":1}".to_owned()));
    let events = receiver.events(3).await;
    assert_eq!(topics(&events), ["mdm.Authenticate", "mdm.TokenUpdate", "mdm.Authenticate"]);
    assert_eq!(listed(), "");

    let unauthorized = http.get(format!("{}/api/v1/dead-letters", server.url())).send().await.unwrap();
    assert_eq!(unauthorized.status(), StatusCode::UNAUTHORIZED);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_a_running_server_is_whole_and_starts() {
    let authority = Authority::new(75).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let mut connection = Connection::new(Target::parse(&server.url()).unwrap());
    let mut device = Device::new(&authority, 1).unwrap();
    device.enroll(&mut connection).await.unwrap();
    let restored = Home::new(&authority.root_pem());
    std::fs::create_dir_all(restored.data()).unwrap();
    let file = restored.data().join("wasmdm.sqlite");
    let data = home.data();
    let backup = || crate::process::run(&["db", "backup", "--data", &data.to_string_lossy(), &file.to_string_lossy()]);
    let (code, out, error) = backup();
    assert_eq!(code, 0, "{out}{error}");
    let (code, _, error) = backup();
    assert!(code != 0 && error.contains("exists already"), "{error}");
    restored.check(&[]);
    let second = restored.start();
    let mut to_second = Connection::new(Target::parse(&second.url()).unwrap());
    let idle = device.idle().unwrap();
    assert_eq!(device.send(&mut to_second, idle).await.unwrap().status, StatusCode::OK, "the device is known there");
}
