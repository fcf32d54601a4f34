//! Declarative management is handed to another server, whose words are not trusted.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use aws_lc_rs::hmac;
use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, Response, StatusCode};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use wasmdm_simulator::{Authority, Connection, Device, Target};

use crate::process::Home;

/// What the other server was asked: method, path, headers, body.
type Asked = Arc<Mutex<Vec<(String, String, HeaderMap, Vec<u8>)>>>;

fn signature(key: &str, body: &[u8]) -> String {
    STANDARD.encode(hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key.as_bytes()), body))
}

/// What the other server says beside an error's status.
const WORDS: &[u8] = b"kanarienvogel: SELECT secret FROM the_other_server";

/// Answers by the last part of the path: a status code, or something odd.
async fn answer(State(asked): State<Asked>, request: Request) -> Response<Body> {
    let (head, body) = request.into_parts();
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap().to_vec();
    let path = head.uri.path().to_owned();
    asked.lock().unwrap().push((head.method.to_string(), head.uri.to_string(), head.headers, body));
    let last = path.rsplit('/').next().unwrap_or_default();
    let status = last.parse().ok().and_then(|code| StatusCode::from_u16(code).ok()).unwrap_or(StatusCode::OK);
    let document = match last {
        "long" => vec![b' '; 9 << 20],
        _ if status == StatusCode::NO_CONTENT => Vec::new(),
        _ if status == StatusCode::OK => b"{\"Declarations\":{}}".to_vec(),
        // With the mark that is looked for in the log.
        _ => WORDS.to_vec(),
    };
    if last == "slow" {
        std::future::pending::<()>().await;
    }
    let key = if last == "forged" { "another" } else { "kanarienvogel-theirs" };
    let mut response = Response::builder().status(status);
    if status.is_redirection() {
        response = response.header("Location", "https://kanarienvogel:secret@new.example:8443/kanarienvogel");
    }
    if last != "unsigned" {
        response = response.header("X-Hmac-Signature", signature(key, &document));
    }
    response.body(Body::from(document)).unwrap()
}

async fn other_server() -> (String, Asked) {
    let asked = Asked::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/ddm/", listener.local_addr().unwrap());
    let router = Router::new().fallback(answer).with_state(Arc::clone(&asked));
    tokio_util::task::TaskTracker::new().spawn(async move { axum::serve(listener, router).await });
    (url, asked)
}

/// Its 404 and 204 became a 500 for the device, with the other server's text behind it. NanoMDM defect 9. Edge case 56.
#[tokio::test(flavor = "multi_thread")]
async fn endpoints_are_handed_on_signed_and_the_answers_come_back() {
    let (url, asked) = other_server().await;
    let authority = Authority::new(61).unwrap();
    let home = Home::new(&authority.root_pem()).with(&[
        "--dm",
        &url,
        "--dm-send-hmac-key",
        "kanarienvogel-ours",
        "--dm-recv-hmac-key",
        "kanarienvogel-theirs",
    ]);
    let server = home.start();
    let mut connection = Connection::new(Target::parse(&server.url()).unwrap());
    let mut device = Device::new(&authority, 1).unwrap();
    device.enroll(&mut connection).await.unwrap();

    let message = device.declarative_management("declaration/configuration/com.example.a b", None).unwrap();
    let document = device.send(&mut connection, message).await.unwrap();
    assert_eq!((document.status, &document.body[..]), (StatusCode::OK, &b"{\"Declarations\":{}}"[..]));
    assert_eq!(document.headers["content-type"], "application/json");
    let status = device.declarative_management("status", Some(b"{\"StatusItems\":{}}")).unwrap();
    assert_eq!(device.send(&mut connection, status).await.unwrap().status, StatusCode::OK);
    {
        let asked = asked.lock().unwrap();
        let (method, uri, headers, body) = &asked[0];
        assert_eq!((method.as_str(), uri.as_str(), body.len()), ("GET", "/ddm/declaration/configuration/com.example.a%20b", 0));
        assert_eq!(headers["x-enrollment-id"], device.id().as_str());
        assert_eq!(headers["x-enrollment-type"], "Device");
        assert!(!headers.contains_key("x-enrollment-parentid") && !headers.contains_key("mdm-signature"));
        assert_eq!(headers["x-hmac-signature"], signature("kanarienvogel-ours", b"").as_str(), "an empty body is signed too");
        let (method, uri, headers, body) = &asked[1];
        assert_eq!((method.as_str(), uri.as_str(), body.as_slice()), ("PUT", "/ddm/status", &b"{\"StatusItems\":{}}"[..]));
        assert_eq!(headers["content-type"], "application/json");
        assert_eq!(headers["x-hmac-signature"], signature("kanarienvogel-ours", body).as_str());
    }
    for (endpoint, expected) in [
        ("declaration/asset/204", 204),
        ("declaration/asset/404", 404),
        ("declaration/asset/400", 400),
        ("declaration/asset/401", 503),
        ("declaration/asset/302", 503),
        ("declaration/asset/500", 503),
        ("declaration/asset/forged", 503),
        ("declaration/asset/unsigned", 503),
        ("declaration/asset/long", 503),
    ] {
        let message = device.declarative_management(endpoint, None).unwrap();
        let answer = device.send(&mut connection, message).await.unwrap();
        assert_eq!(answer.status.as_u16(), expected, "{endpoint}");
        assert!(expected != 503 || answer.headers.contains_key("retry-after"), "{endpoint}");
        assert!(expected != 204 || answer.body.is_empty());
        assert!(!String::from_utf8_lossy(&answer.body).contains("kanarienvogel"), "{endpoint}: {answer:?}");
    }
    // What the log must not show either is looked for at its end.
    server.logs(&["it answered 302, a redirect to https://new.example:8443, and redirects are not followed"]).await;
    server.logs(&["it answered 500"]).await;
}

/// It was put there as a status report of no length. Go's server tests for the length.
#[tokio::test(flavor = "multi_thread")]
async fn an_empty_document_is_none() {
    let (url, asked) = other_server().await;
    let authority = Authority::new(66).unwrap();
    let home = Home::new(&authority.root_pem()).with(&["--dm", &url]);
    let server = home.start();
    let mut connection = Connection::new(Target::parse(&server.url()).unwrap());
    let mut device = Device::new(&authority, 1).unwrap();
    device.enroll(&mut connection).await.unwrap();
    let message = device.declarative_management("tokens", Some(b"")).unwrap();
    assert_eq!(device.send(&mut connection, message).await.unwrap().status, StatusCode::OK);
    let asked = asked.lock().unwrap();
    assert_eq!((asked[0].0.as_str(), asked[0].1.as_str(), asked[0].3.len()), ("GET", "/ddm/tokens", 0));
    assert!(!asked[0].2.contains_key("content-type"));
}

/// In NanoMDM an enrolled device can make the server fetch any URL: an absolute `Endpoint` replaces the configured one.
/// NanoMDM defect 9. Edge case 55.
#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_leads_elsewhere_is_refused_and_asked_of_nobody() {
    let (url, asked) = other_server().await;
    let (elsewhere, asked_elsewhere) = other_server().await;
    let authority = Authority::new(62).unwrap();
    let home = Home::new(&authority.root_pem()).with(&["--dm", &url]);
    let server = home.start();
    let mut connection = Connection::new(Target::parse(&server.url()).unwrap());
    let mut device = Device::new(&authority, 1).unwrap();
    device.enroll(&mut connection).await.unwrap();
    let without_scheme = elsewhere.trim_start_matches("http:").to_owned();
    for endpoint in [elsewhere.as_str(), &without_scheme, "../admin", "declaration/%2e%2e/%2e%2e/admin", "/admin", "tokens?x=1/../.."] {
        let message = device.declarative_management(endpoint, None).unwrap();
        let answer = device.send(&mut connection, message).await.unwrap();
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{endpoint}");
    }
    // Who is not enrolled asks nothing either.
    let mut stranger = Device::new(&authority, 2).unwrap();
    let message = stranger.declarative_management("tokens", None).unwrap();
    assert_eq!(stranger.send(&mut connection, message).await.unwrap().status, StatusCode::BAD_REQUEST);
    assert!(asked.lock().unwrap().is_empty());
    assert!(asked_elsewhere.lock().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_other_server_is_away_or_silent_devices_are_asked_to_come_again_and_others_are_served() {
    let (url, _asked) = other_server().await;
    let authority = Authority::new(63).unwrap();
    let home = Home::new(&authority.root_pem()).with(&["--dm", &url]);
    let server = home.start();
    let mut connection = Connection::new(Target::parse(&server.url()).unwrap());
    let mut device = Device::new(&authority, 1).unwrap();
    device.enroll(&mut connection).await.unwrap();
    let mut other_connection = Connection::new(Target::parse(&server.url()).unwrap());
    let mut other = Device::new(&authority, 2).unwrap();
    other.enroll(&mut other_connection).await.unwrap();
    let silent = device.declarative_management("declaration/asset/slow", None).unwrap();
    let silent = device.prepare(silent).unwrap();
    // One device had all places, and others got no declarations.
    let mut waiting: FuturesUnordered<_> = (0..5)
        .map(|_| {
            let (url, headers, body) = (server.url(), silent.headers.clone(), silent.message.body.clone());
            async move { Connection::to(&url).unwrap().request(Method::PUT, "/mdm".parse().unwrap(), headers, body).await.unwrap().status }
        })
        .collect();
    let begun = Instant::now();
    assert_eq!(waiting.next().await, Some(StatusCode::SERVICE_UNAVAILABLE), "four are its share");
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    for message in [other.idle(), other.declarative_management("tokens", None)] {
        assert_eq!(other.send(&mut other_connection, message.unwrap()).await.unwrap().status, StatusCode::OK);
    }
    let given_up = async {
        while let Some(status) = waiting.next().await {
            assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        }
    };
    tokio::time::timeout(Duration::from_secs(30), given_up).await.expect("they are given up within 30 s");

    let nobody = {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        format!("http://{}/", listener.local_addr().unwrap())
    };
    let home = Home::new(&authority.root_pem()).with(&["--dm", &nobody]);
    let server = home.start();
    let mut connection = Connection::new(Target::parse(&server.url()).unwrap());
    device.enroll(&mut connection).await.unwrap();
    let message = device.declarative_management("tokens", None).unwrap();
    let answer = device.send(&mut connection, message).await.unwrap();
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(!server.log().iter().any(|line| line.contains("panicked")));
}

/// What a device gets by declarations it must not get before it is enrolled, nor after it has left.
#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_enrolled_gets_no_declarations() {
    let (url, asked) = other_server().await;
    let authority = Authority::new(65).unwrap();
    let home = Home::new(&authority.root_pem()).with(&["--dm", &url]);
    let server = home.start();
    let mut connection = Connection::new(Target::parse(&server.url()).unwrap());
    let mut device = Device::new(&authority, 1).unwrap();
    let [first, last] = [device.authenticate().unwrap(), device.check_out().unwrap()];
    for message in [first, last] {
        assert_eq!(device.send(&mut connection, message).await.unwrap().status, StatusCode::OK);
        for (endpoint, data, expected) in [("tokens", None, StatusCode::NOT_FOUND), ("status", Some(&b"{}"[..]), StatusCode::OK)] {
            let message = device.declarative_management(endpoint, data).unwrap();
            assert_eq!(device.send(&mut connection, message).await.unwrap().status, expected, "{endpoint}");
        }
    }
    assert!(asked.lock().unwrap().is_empty());
}

/// Users of Macs: declined by default, managed without a proof where the operator says so (edge case 33). Edge case 33.
#[tokio::test(flavor = "multi_thread")]
async fn users_are_declined_or_get_a_challenge_of_no_length() {
    let authority = Authority::new(64).unwrap();
    for (flags, first, body) in [(&[][..], StatusCode::GONE, ""), (&["--ua-zl-dc"][..], StatusCode::OK, "<key>DigestChallenge</key>")] {
        let home = Home::new(&authority.root_pem()).with(flags);
        let server = home.start();
        let mut connection = Connection::new(Target::parse(&server.url()).unwrap());
        let mut device = Device::new(&authority, 1).unwrap();
        device.enroll(&mut connection).await.unwrap();
        let options = wasmdm_simulator::DeviceOptions { kind: Some(wasmdm_protocol::enrollment::EnrollmentKind::User), ..Default::default() };
        let mut user = Device::with_options(&authority, 1, options).unwrap();
        user.replace_identity(device.identity.clone());
        let message = user.user_authenticate(None).unwrap();
        let answer = user.send(&mut connection, message).await.unwrap();
        assert_eq!(answer.status, first);
        assert!(String::from_utf8_lossy(&answer.body).contains(body), "{answer:?}");
        let message = user.user_authenticate(Some("digest")).unwrap();
        let answer = user.send(&mut connection, message).await.unwrap();
        assert_eq!((answer.status, answer.body.len()), (StatusCode::OK, 0));
    }
}
