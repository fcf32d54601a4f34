//! What devices fetch from another server with their MDM identity.

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use bytes::Bytes;
use wasmdm_simulator::{Answer, Authority, Connection, Device, DeviceOptions, Message, Proof};

use crate::process::Home;

/// What the other server was asked: method, path and query, headers, body.
type Asked = Arc<Mutex<Vec<(String, String, HeaderMap, Vec<u8>)>>>;

/// Answers by the last part of the path: a status code, or something odd.
async fn answer(State(asked): State<Asked>, request: Request) -> Response<Body> {
    let (head, body) = request.into_parts();
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap().to_vec();
    let last = head.uri.path().rsplit('/').next().unwrap_or_default().to_owned();
    asked.lock().unwrap().push((head.method.to_string(), head.uri.to_string(), head.headers, body));
    let status = last.parse().ok().and_then(|code| StatusCode::from_u16(code).ok()).unwrap_or(StatusCode::OK);
    let body = match last.as_str() {
        "large" => vec![b'x'; 48 << 20],
        _ => b"proxied".to_vec(),
    };
    Response::builder()
        .status(status)
        .header("Content-Type", "application/x-plist")
        .header("ETag", "\"7\"")
        .header("WWW-Authenticate", "Basic realm=\"theirs\"")
        .header("Connection", "x-between")
        .header("X-Between", "neighbours")
        .header("Location", "https://cdn.example/signed")
        .body(Body::from(body))
        .unwrap()
}

async fn other_server() -> (String, Asked) {
    let asked = Asked::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/base", listener.local_addr().unwrap());
    let router = Router::new().fallback(answer).layer(axum::extract::DefaultBodyLimit::disable()).with_state(Arc::clone(&asked));
    tokio_util::task::TaskTracker::new().spawn(async move { axum::serve(listener, router).await });
    (url, asked)
}

/// One request as a device makes it: the signature is over the body, also over an empty one.
async fn ask(device: &mut Device, connection: &mut Connection, method: Method, path: &str, body: &'static [u8]) -> Answer {
    ask_with(device, connection, method, path, body, &[]).await
}

async fn ask_with(
    device: &mut Device,
    connection: &mut Connection,
    method: Method,
    path: &str,
    body: &'static [u8],
    more: &[(&'static str, &'static str)],
) -> Answer {
    let mut headers = device.prepare(Message::raw_report(body)).unwrap().headers;
    for (name, value) in more {
        headers.append(*name, HeaderValue::from_static(value));
    }
    connection.request(method, path.parse().unwrap(), headers, Bytes::from_static(body)).await.unwrap()
}

/// Edge case 62.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_device_asks_for_is_handed_on_with_its_id_and_without_its_proof() {
    let (url, asked) = other_server().await;
    let authority = Authority::new(71).unwrap();
    for with_header in [false, true] {
        let home = Home::new(&authority.root_pem()).with(&["--auth-proxy-url", &url]);
        let (home, proof) = if with_header {
            let home = home.with(&["--cert-header", "Client-Cert", "--trusted-proxy", "127.0.0.1"]);
            (home, Proof::CertificateHeader("client-cert".parse().unwrap()))
        } else {
            (home, Proof::default())
        };
        let server = home.start();
        let mut connection = Connection::to(&server.url()).unwrap();
        let mut device = Device::with_options(&authority, 1, DeviceOptions { proof, ..DeviceOptions::default() }).unwrap();
        device.enroll(&mut connection).await.unwrap();
        asked.lock().unwrap().clear();

        let lies = [
            ("x-enrollment-id", "spoof"),
            ("x_enrollment_id", "spoof"),
            ("x-enrollment-type", "spoof"),
            ("x-trace-id", "spoof"),
            ("connection", "keep-alive, x-mine"),
            ("x-mine", "1"),
            ("te", "trailers"),
            ("x-forwarded-for", "192.0.2.7"),
            ("if-none-match", "\"6\""),
        ];
        let got = ask_with(&mut device, &mut connection, Method::GET, "/authproxy/foo/bar%20x?q=1&q=2", b"", &lies).await;
        assert_eq!((got.status, &got.body[..]), (StatusCode::OK, &b"proxied"[..]));
        assert_eq!((got.headers["content-type"].as_bytes(), got.headers["etag"].as_bytes()), (&b"application/x-plist"[..], &b"\"7\""[..]));
        assert!(!got.headers.contains_key("www-authenticate") && !got.headers.contains_key("x-between"), "{:?}", got.headers);
        let put = ask(&mut device, &mut connection, Method::PUT, "/authproxy/up", b"data").await;
        assert_eq!(put.status, StatusCode::OK);
        let head = ask(&mut device, &mut connection, Method::HEAD, "/authproxy/foo", b"").await;
        assert_eq!((head.status, head.body.len(), head.headers["content-length"].as_bytes()), (StatusCode::OK, 0, &b"7"[..]));

        let asked = asked.lock().unwrap();
        let (method, uri, headers, body) = &asked[0];
        assert_eq!((method.as_str(), uri.as_str(), body.len()), ("GET", "/base/foo/bar%20x?q=1&q=2", 0));
        assert_eq!(headers.get_all("x-enrollment-id").iter().collect::<Vec<_>>(), [device.id().as_str()]);
        assert_eq!(headers.get_all("x-trace-id").iter().filter(|value| *value != "spoof").count(), 1);
        assert_eq!(headers["host"], url.trim_start_matches("http://").trim_end_matches("/base"));
        assert_eq!(headers["x-forwarded-for"], "192.0.2.7, 127.0.0.1");
        assert_eq!(headers["if-none-match"], "\"6\"");
        for gone in ["mdm-signature", "client-cert", "x_enrollment_id", "x-enrollment-type", "connection", "x-mine", "te"] {
            assert!(!headers.contains_key(gone), "{gone}: {headers:?}");
        }
        let (method, uri, headers, body) = &asked[1];
        assert_eq!((method.as_str(), uri.as_str(), body.as_slice()), ("PUT", "/base/up", &b"data"[..]));
        assert_eq!(headers["content-length"], "4");
    }
}

/// In NanoMDM whatever the other server says goes to the device, a 401 too, at which an MDM client may remove its management.
/// Edge case 62.
#[tokio::test(flavor = "multi_thread")]
async fn no_status_of_the_other_server_could_un_enroll_a_device() {
    let (url, _asked) = other_server().await;
    let authority = Authority::new(72).unwrap();
    let home = Home::new(&authority.root_pem()).with(&["--auth-proxy-url", &url]);
    let server = home.start();
    let mut connection = Connection::to(&server.url()).unwrap();
    let mut device = Device::new(&authority, 1).unwrap();
    device.enroll(&mut connection).await.unwrap();
    for (theirs, ours) in [(401, 502), (403, 404), (407, 502), (404, 404), (410, 410), (302, 302), (304, 304), (500, 500), (503, 503)] {
        let answer = ask(&mut device, &mut connection, Method::GET, &format!("/authproxy/{theirs}"), b"").await;
        assert_eq!(answer.status.as_u16(), ours, "{theirs}");
        assert!(!answer.headers.contains_key("www-authenticate"), "{theirs}");
        assert!(matches!(theirs, 404 | 410 | 302 | 500 | 503) == (&answer.body[..] == b"proxied"), "{theirs}: {answer:?}");
    }
}

/// Edge case 62.
#[tokio::test(flavor = "multi_thread")]
async fn who_cannot_prove_an_enrollment_or_leaves_the_base_is_not_handed_on() {
    let (url, asked) = other_server().await;
    let authority = Authority::new(73).unwrap();
    let home = Home::new(&authority.root_pem()).with(&["--auth-proxy-url", &url]);
    let server = home.start();
    let mut connection = Connection::to(&server.url()).unwrap();
    let mut device = Device::new(&authority, 1).unwrap();

    // Of the right authority, but bound to nothing; then on the way to being enrolled.
    let bound_nowhere = ask(&mut device, &mut connection, Method::GET, "/authproxy/foo", b"").await;
    assert_eq!((bound_nowhere.status, &bound_nowhere.body[..]), (StatusCode::BAD_REQUEST, &b"Bad Request\n"[..]));
    let authenticate = device.authenticate().unwrap();
    device.insist(&mut connection, authenticate).await.unwrap();
    assert_eq!(ask(&mut device, &mut connection, Method::GET, "/authproxy/foo", b"").await.status, StatusCode::NOT_FOUND);

    device.enroll(&mut connection).await.unwrap();
    for path in [
        "//elsewhere.example/x",
        "../admin",
        "a/../../admin",
        "a/%2e%2e/%2E%2e/admin",
        "..;/admin",
        "a%2f..%2f..%2fadmin",
        "a%5c..%5cadmin",
        "a/%00",
        "http://elsewhere.example/",
    ] {
        let answer = ask(&mut device, &mut connection, Method::GET, &format!("/authproxy/{path}"), b"").await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{path}");
    }
    // A signature over another body, none, a strange authority's, and one that was replaced.
    let signed = device.prepare(Message::raw_report(&b"data"[..])).unwrap().headers;
    for headers in [signed, HeaderMap::new()] {
        let answer = connection.request(Method::PUT, "/authproxy/foo".parse().unwrap(), headers, Bytes::from_static(b"atad")).await.unwrap();
        assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    }
    let mut stranger = Device::new(&Authority::new(74).unwrap(), 1).unwrap();
    assert_eq!(ask(&mut stranger, &mut connection, Method::GET, "/authproxy/foo", b"").await.status, StatusCode::BAD_REQUEST);
    let mut again = Device::new(&authority, 1).unwrap();
    again.replace_identity(authority.issue(1001, "renewed").unwrap());
    again.enroll(&mut connection).await.unwrap();
    assert_eq!(ask(&mut device, &mut connection, Method::GET, "/authproxy/foo", b"").await.status, StatusCode::BAD_REQUEST);
    let check_out = again.check_out().unwrap();
    again.insist(&mut connection, check_out).await.unwrap();
    assert_eq!(ask(&mut again, &mut connection, Method::GET, "/authproxy/foo", b"").await.status, StatusCode::NOT_FOUND);
    assert!(asked.lock().unwrap().is_empty(), "{:?}", asked.lock().unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_of_any_length_streams_through_and_a_server_that_is_away_is_a_502() {
    let (url, _asked) = other_server().await;
    let authority = Authority::new(75).unwrap();
    let home = Home::new(&authority.root_pem()).with(&["--auth-proxy-url", &url]);
    let server = home.start();
    let mut connection = Connection::to(&server.url()).unwrap();
    let mut device = Device::new(&authority, 1).unwrap();
    device.enroll(&mut connection).await.unwrap();
    let before = server.resident();
    let large = ask(&mut device, &mut connection, Method::GET, "/authproxy/large", b"").await;
    assert_eq!((large.status, large.body.len()), (StatusCode::OK, 48 << 20));
    let risen = server.resident().saturating_sub(before);
    assert!(risen < 24 << 20, "resident memory rose by {} MiB", risen >> 20);

    let nobody = {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        format!("http://name:secret@{}/", listener.local_addr().unwrap())
    };
    let home = Home::new(&authority.root_pem()).with(&["--auth-proxy-url", &nobody]);
    let server = home.start();
    let mut connection = Connection::to(&server.url()).unwrap();
    device.enroll(&mut connection).await.unwrap();
    let answer = ask(&mut device, &mut connection, Method::GET, "/authproxy/foo", b"").await;
    assert_eq!((answer.status, &answer.body[..]), (StatusCode::BAD_GATEWAY, &b"Bad Gateway\n"[..]));
    assert!(!server.log().iter().any(|line| line.contains("secret")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_does_not_take_a_part_for_the_whole_when_the_other_server_breaks_off() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    tokio_util::task::TaskTracker::new().spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            // The whole request is in one packet; what it is does not matter.
            let _ = stream.read(&mut [0; 4096]).await;
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\na part").await.unwrap();
        }
    });
    let authority = Authority::new(76).unwrap();
    let home = Home::new(&authority.root_pem()).with(&["--auth-proxy-url", &url]);
    let server = home.start();
    let mut connection = Connection::to(&server.url()).unwrap();
    let mut device = Device::new(&authority, 1).unwrap();
    device.enroll(&mut connection).await.unwrap();
    let headers = device.prepare(Message::raw_report(&b""[..])).unwrap().headers;
    let broken = connection.request(Method::GET, "/authproxy/foo".parse().unwrap(), headers, Bytes::new()).await;
    assert!(broken.is_err_and(|error| error.is_transport()));
    assert!(device.poll_until_idle(&mut connection).await.unwrap().commands.is_empty(), "the server goes on");
}
