//! Every route, and every error that a device can be answered with.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use http_body_util::BodyExt as _;
use wasmdm::config::ServeOptions;
use wasmdm::http::body::{BodyError, CHECK_IN_LIMIT, REPORT_LIMIT};
use wasmdm::http::problem;
use wasmdm::wiring::{RunningServer, Surroundings};
use wasmdm_plugin_runtime::loading::CompilerCommand;
use wasmdm_protocol::time::Timestamp;
use wasmdm_service::clock::Clock;
use wasmdm_service::reply::Refusal;
use wasmdm_simulator::authority::CertificateRequest;
use wasmdm_simulator::{Answer, Authority, Connection, Device, DeviceOptions, Message, Proof};
use wasmdm_testkit::clock::ManualClock;
use wasmdm_testkit::guests;

use crate::in_process::Server;

/// Where devices talk. Whoever adds a route for devices adds it here, and the walk below goes there too.
const DEVICE_ROUTES: [&str; 2] = ["/mdm", "/checkin"];
/// What devices fetch from another server, where one is configured.
const PROXIED_ROUTES: [&str; 2] = ["/authproxy/", "/authproxy/{*path}"];
/// Where nobody but clients of the API and monitoring talk: a 401 is their answer.
const OTHER_ROUTES: [&str; 20] = [
    "/v1/enqueue/",
    "/v1/enqueue/{*ids}",
    "/v1/push/",
    "/v1/push/{*ids}",
    "/v1/pushcert",
    "/v1/escrowkeyunlock",
    "/migration",
    "/api/v1/dead-letters",
    "/api/v1/dead-letters/replay",
    "/api/v1/plugins",
    "/api/v1/plugins/reload",
    "/api/v1/plugins/{name}",
    "/api/v1/plugins/{name}/reload",
    "/api/v1/push-certificates",
    "/api/v1/pushes",
    "/api/v1/pushes/{id}",
    "/version",
    "/healthz",
    "/readyz",
    "/metrics",
];
/// Paths that a device could be given by mistake, or that look like a device's.
const STRAY_PATHS: [&str; 7] = ["/mdm?x=1", "/mdm/", "/checkin/more", "/MDM", "/", "/authproxy/x", "/authproxy/../mdm"];

#[test]
fn every_route_of_the_server_is_known_to_the_walk() {
    let source = include_str!("../../src/http.rs");
    let routes: BTreeSet<&str> = source.split(".route(\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    let known: BTreeSet<&str> = DEVICE_ROUTES.into_iter().chain(PROXIED_ROUTES).chain(OTHER_ROUTES).collect();
    assert_eq!(routes, known, "a route is missing in one of the lists above, or is no more");
}

/// What of an answer a device acts upon.
struct Seen {
    case: String,
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Seen {
    fn of(case: impl Into<String>, answer: Answer) -> Self {
        Self { case: case.into(), status: answer.status, headers: answer.headers, body: answer.body }
    }

    async fn of_response(case: impl Into<String>, response: axum::response::Response) -> Self {
        let (head, body) = response.into_parts();
        Self { case: case.into(), status: head.status, headers: head.headers, body: body.collect().await.unwrap().to_bytes() }
    }

    /// Neither of the two answers that make a device remove its management: 401, and an error code of Apple's in a 403.
    fn check(&self) {
        let Self { case, status, headers, body } = self;
        let body = String::from_utf8_lossy(body);
        assert_ne!(*status, StatusCode::UNAUTHORIZED, "{case}");
        assert!(!headers.contains_key("www-authenticate"), "{case}");
        assert!(!body.contains("com.apple."), "{case}: {body}");
        assert!(*status != StatusCode::FORBIDDEN || case.starts_with("a policy"), "{case}: 403 is a policy's word");
        assert!(!status.is_redirection(), "{case}: a device does not follow, {status}");
        if !status.is_success() {
            let content_type = headers.get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
            assert!(content_type.starts_with("text/plain") || body.is_empty(), "{case}: {content_type}");
        }
        assert_eq!(headers.contains_key("retry-after"), *status == StatusCode::SERVICE_UNAVAILABLE, "{case}: {status}");
    }
}

/// Every refusal of the service. A new one does not compile until it stands here.
async fn refusals() -> Vec<Seen> {
    let reason = || "{\"code\": \"com.apple.unrecognized.device\"}\r\nWWW-Authenticate: Basic".to_owned();
    let all = [
        Refusal::BadRequest { reason: reason() },
        Refusal::Denied { reason: reason() },
        Refusal::NotFound { reason: reason() },
        Refusal::Declined,
        Refusal::unavailable(reason()),
    ];
    let mut seen = Vec::new();
    for refusal in all {
        let case = match &refusal {
            Refusal::BadRequest { .. } => "a bad request",
            Refusal::Denied { .. } => "a policy's denial",
            Refusal::NotFound { .. } => "nothing there",
            Refusal::Declined => "a declined user",
            Refusal::Unavailable { .. } => "something unavailable",
        };
        seen.push(Seen::of_response(case, problem::refusal(&refusal)).await);
    }
    seen
}

/// Every reason not to read a body; "too many bodies" is among them.
async fn body_errors() -> Vec<Seen> {
    let all = [
        BodyError::TooLarge { limit: 1 },
        BodyError::Budget,
        BodyError::Slow,
        BodyError::GaveWay,
        BodyError::Broken("com.apple.unrecognized.device".into()),
        BodyError::Encoding("com.apple.unrecognized.device".into()),
    ];
    let mut seen = Vec::new();
    for error in all {
        let case = match &error {
            BodyError::TooLarge { .. } => "a body that is too large",
            BodyError::Budget => "too many bodies",
            BodyError::Slow => "a body that pauses",
            BodyError::GaveWay => "a body among many of its certificate",
            BodyError::Broken(_) => "a broken body",
            BodyError::Encoding(_) => "an unknown encoding",
        };
        seen.push(Seen::of_response(case, error.response()).await);
    }
    seen
}

fn header(name: &'static str, value: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(HeaderName::from_static(name), HeaderValue::from_str(value).unwrap());
    headers
}

/// Sends one message to a route.
async fn send(connection: &mut Connection, device: &mut Device, route: &str, message: Message, case: &str) -> Seen {
    let case = format!("{case}: {} to {route}", message.name());
    let prepared = device.prepare(message).unwrap();
    let answer = connection.request(Method::PUT, route.parse().unwrap(), prepared.headers, prepared.message.body).await;
    Seen::of(case, answer.unwrap())
}

/// All that the device can say, whether it may or not.
fn messages(device: &Device) -> Vec<Message> {
    let said = [
        device.idle(),
        device.report("Acknowledged", "never-sent"),
        device.error_report("never-sent"),
        device.token_update(),
        device.check_out(),
        device.set_bootstrap_token(Some(b"token")),
        device.get_bootstrap_token(),
        device.get_token("x"),
        device.user_authenticate(None),
        device.return_to_service(),
        device.declarative_management("tokens", None),
        device.declarative_management("//elsewhere.example/", None),
        Message::check_in("com.apple.unrecognized.device", plist::Dictionary::new()),
    ];
    let broken = [
        Message::raw_check_in("com.apple.unrecognized.device"),
        Message::raw_report("com.apple.unrecognized.device"),
        device.malformed_report(device.device_id(), "never-sent"),
        Message::raw_report(""),
    ];
    said.into_iter().map(Result::unwrap).chain(broken).collect()
}

/// What anyone can send, without any proof of who it is or with a bad one.
async fn without_identity(url: &str, authority: &Authority, stranger: &Authority) -> Vec<Seen> {
    let foreign = Device::new(stranger, 1).unwrap().identity.rfc9440();
    let own = Device::new(authority, 1).unwrap().identity.rfc9440();
    let header_sets = [
        HeaderMap::new(),
        header("mdm-signature", "garbage!"),
        header("mdm-signature", "AAAA"),
        header("client-cert", &foreign),
        header("client-cert", &own),
        header("authorization", "Basic AAAA"),
        header("content-type", "application/x-apple-aspen-mdm-checkin"),
        header("content-encoding", "br"),
    ];
    let mut connection = Connection::to(url).unwrap();
    let methods = [Method::PUT, Method::POST, Method::GET, Method::DELETE, Method::HEAD, Method::OPTIONS, Method::PATCH];
    let mut seen = Vec::new();
    for path in DEVICE_ROUTES.into_iter().chain(PROXIED_ROUTES).chain(STRAY_PATHS) {
        for method in &methods {
            for headers in &header_sets {
                let answer = connection
                    .request(method.clone(), path.replace("{*path}", "some/file").parse().unwrap(), headers.clone(), Bytes::from_static(b"<x/>"))
                    .await;
                let answer = Seen::of(format!("{method} {path} {headers:?}"), answer.unwrap());
                assert!(answer.status.is_client_error(), "{}: {}", answer.case, answer.status);
                seen.push(answer);
            }
        }
    }
    // More than any message has; announced, so that nothing of it is read.
    for (route, limit) in [("/checkin", CHECK_IN_LIMIT), ("/mdm", REPORT_LIMIT)] {
        // Each on a connection of its own: the server may close it under a body that it refused.
        let mut connection = Connection::to(url).unwrap();
        let answer = connection.request(Method::PUT, route.parse().unwrap(), HeaderMap::new(), vec![b' '; limit + 1].into()).await.unwrap();
        assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
        seen.push(Seen::of(format!("too large for {route}"), answer));
    }
    seen
}

/// Devices with every wrong kind of identity, and one with the right one.
async fn with_identity(url: &str, authority: &Authority, stranger: &Authority) -> Vec<Seen> {
    let mut connection = Connection::to(url).unwrap();
    let mut enrolled = Device::new(authority, 1).unwrap();
    enrolled.enroll(&mut connection).await.unwrap();
    let of = |authority: &Authority, number| Device::new(authority, number).unwrap();
    let with = |number, request: CertificateRequest| {
        let mut device = of(authority, number);
        device.replace_identity(authority.issue_as(&request).unwrap());
        device
    };
    let mut usurper = of(authority, 1);
    usurper.replace_identity(of(authority, 2).identity);
    let unsigned = DeviceOptions { proof: Proof::None, ..DeviceOptions::default() };
    let server_only = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    let devices = [
        ("no signature", Device::with_options(authority, 1, unsigned).unwrap()),
        ("a wrong authority", of(stranger, 1)),
        ("an expired certificate", with(3, CertificateRequest { not_after: (2025, 1, 1), ..CertificateRequest::device(3, "x") })),
        ("a certificate of later", with(4, CertificateRequest { not_before: (2040, 1, 1), ..CertificateRequest::device(4, "x") })),
        ("a server's certificate", with(5, CertificateRequest { usages: server_only, ..CertificateRequest::device(5, "x") })),
        ("another enrollment's certificate", usurper),
        ("nobody who is enrolled", of(authority, 6)),
    ];
    let mut seen = Vec::new();
    for (case, mut device) in devices {
        for route in DEVICE_ROUTES {
            for message in messages(&device) {
                let answer = send(&mut connection, &mut device, route, message, case).await;
                assert!(answer.status.is_client_error(), "{}: {}", answer.case, answer.status);
                seen.push(answer);
            }
        }
    }
    for route in DEVICE_ROUTES {
        for message in messages(&enrolled) {
            seen.push(send(&mut connection, &mut enrolled, route, message, "an enrolled device").await);
        }
    }
    seen
}

/// A policy that fails, and one that denies.
async fn plugins(authority: &Authority) -> Vec<Seen> {
    const MANIFEST: &str = "[plugin]\nname = \"misbehaving\"\nversion = \"1.0.0\"\nwasm = \"plugin.wasm\"\n";
    let component = guests::build("misbehaving");
    let mut seen = Vec::new();
    for (behaviour, status) in [("trap", StatusCode::SERVICE_UNAVAILABLE), ("deny", StatusCode::FORBIDDEN)] {
        let grant = format!("enabled = true\n[config]\nbehave = \"{behaviour}\"\n");
        let server = Server::start(authority, &[("misbehaving", MANIFEST, &component, &grant)]).await;
        let mut connection = Connection::to(&server.url()).unwrap();
        let mut device = Device::new(authority, 1).unwrap();
        for route in DEVICE_ROUTES {
            let message = device.authenticate().unwrap();
            let answer = send(&mut connection, &mut device, route, message, &format!("a policy plugin, {behaviour}")).await;
            assert_eq!(answer.status, status, "{}", answer.case);
            seen.push(answer);
        }
        drop(connection);
        server.stop().await;
    }
    seen
}

/// A clock that can be told to panic once, in whatever asks it next.
#[derive(Debug)]
struct Trap {
    clock: ManualClock,
    armed: Arc<AtomicBool>,
}

impl Clock for Trap {
    fn now(&self) -> Timestamp {
        assert!(!self.armed.swap(false, Ordering::SeqCst), "the test asked for it");
        self.clock.now()
    }

    fn sleep_until(&self, at: Timestamp) -> BoxFuture<'static, ()> {
        self.clock.sleep_until(at)
    }
}

fn options(home: &tempfile::TempDir) -> ServeOptions {
    ServeOptions {
        listen: Some("127.0.0.1:0".to_owned()),
        data: Some(home.path().join("data")),
        api_key: Some(crate::process::API_KEY.to_owned()),
        ..ServeOptions::default()
    }
}

async fn start(options: ServeOptions, armed: Arc<AtomicBool>) -> (RunningServer, Connection) {
    let surroundings = Surroundings {
        clock: Arc::new(Trap { clock: ManualClock::new(Timestamp::from_millis(1_800_000_000_000)), armed }),
        compiler: CompilerCommand { program: env!("CARGO_BIN_EXE_wasmdm").into(), args: vec!["__compile-plugin".into()] },
        pusher: None,
    };
    let running = RunningServer::start(options.resolve().unwrap(), surroundings).await.unwrap();
    let connection = Connection::to(&format!("http://{}", running.address)).unwrap();
    (running, connection)
}

/// A server that no authority was configured for, and one that believes a header of another proxy.
async fn misconfigured(authority: &Authority) -> Vec<Seen> {
    let home = tempfile::tempdir().unwrap();
    let ca = home.path().join("ca.pem");
    std::fs::write(&ca, authority.root_pem()).unwrap();
    let header = DeviceOptions { proof: Proof::CertificateHeader(HeaderName::from_static("client-cert")), ..DeviceOptions::default() };
    let mut device = Device::with_options(authority, 1, header).unwrap();
    let behind_a_proxy =
        ServeOptions { ca: Some(ca), cert_header: Some("client-cert".to_owned()), trusted_proxies: vec!["192.0.2.1".to_owned()], ..options(&home) };
    let mut seen = Vec::new();
    for (case, options) in [("no authority", options(&home)), ("no trusted proxy", behind_a_proxy)] {
        let (running, mut connection) = start(options, Arc::default()).await;
        for route in DEVICE_ROUTES {
            for message in messages(&device) {
                let answer = send(&mut connection, &mut device, route, message, case).await;
                assert!(!answer.status.is_success(), "{}", answer.case);
                seen.push(answer);
            }
        }
        drop(connection);
        running.stop().await.unwrap();
    }
    seen
}

/// A panic in a handler, and a database that is gone.
async fn outages(authority: &Authority) -> Vec<Seen> {
    let home = tempfile::tempdir().unwrap();
    let ca = home.path().join("ca.pem");
    std::fs::write(&ca, authority.root_pem()).unwrap();
    let armed = Arc::new(AtomicBool::new(false));
    let (running, mut connection) = start(ServeOptions { ca: Some(ca), ..options(&home) }, Arc::clone(&armed)).await;
    let mut device = Device::new(authority, 1).unwrap();
    device.enroll(&mut connection).await.unwrap();
    let mut seen = Vec::new();
    for route in DEVICE_ROUTES {
        let message = device.token_update().unwrap();
        // Something else of the server's may ask the clock first.
        let mut panicked = None;
        for _ in 0..100 {
            armed.store(true, Ordering::SeqCst);
            let answer = send(&mut connection, &mut device, route, message.clone(), "a panic").await;
            if answer.status == StatusCode::SERVICE_UNAVAILABLE {
                panicked = Some(answer);
                break;
            }
        }
        let answer = panicked.unwrap();
        assert!(String::from_utf8_lossy(&answer.body).contains("internal error"), "{:?}", answer.body);
        seen.push(answer);
    }
    armed.store(false, Ordering::SeqCst);
    running.storage.close().await.unwrap();
    for route in DEVICE_ROUTES {
        for message in messages(&device) {
            seen.push(send(&mut connection, &mut device, route, message, "no database").await);
        }
    }
    assert!(seen.iter().filter(|answer| answer.case.starts_with("no database") && answer.status == StatusCode::SERVICE_UNAVAILABLE).count() > 4);
    seen
}

/// A device that is answered 401, or 403 with an error code of Apple's, removes its management; nobody gets it back but by hand.
/// Edge case 26.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_error_of_a_device_route_could_un_enroll_a_device() {
    let (authority, stranger) = (Authority::new(33).unwrap(), Authority::new(34).unwrap());
    let mut seen = refusals().await;
    seen.extend(body_errors().await);
    // Nothing listens behind the proxy: who has no proof does not get so far.
    let more = ServeOptions { auth_proxy_url: Some("http://127.0.0.1:1/".to_owned()), migration: Some(true), ..ServeOptions::default() };
    let server = Server::start_with(&authority, &[], more).await;
    seen.extend(without_identity(&server.url(), &authority, &stranger).await);
    seen.extend(with_identity(&server.url(), &authority, &stranger).await);
    server.stop().await;
    seen.extend(misconfigured(&authority).await);
    seen.extend(plugins(&authority).await);
    seen.extend(outages(&authority).await);
    for answer in &seen {
        answer.check();
    }
}
