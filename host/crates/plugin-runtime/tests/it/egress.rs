//! What plugins' outbound requests may reach, against servers on the loopback interface.

#![cfg(test)]

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use wasmdm_plugin_runtime::egress::{
    CallBudget, Client, EgressError, EgressPolicy, Header, Origin, Request, Resolve, Resolving, Response, SecretBinding,
};

const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Seen: yes\r\nSet-Cookie: a=b\r\nConnection: close\r\n\r\nok";

/// Answers every connection with the same bytes, and keeps what it was sent.
struct Server {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
    _tasks: JoinSet<()>,
}

impl Server {
    async fn answering(answer: &'static [u8]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let head = read_head(&mut stream).await;
                seen.lock().unwrap().push(head);
                let _ = stream.write_all(answer).await;
            }
        });
        Self { address, requests, _tasks: tasks }
    }

    fn origin(&self) -> Origin {
        Origin::parse(&format!("http://{}", self.address)).unwrap()
    }

    fn named(&self, host: &str) -> Origin {
        Origin::parse(&format!("http://{host}:{}", self.address.port())).unwrap()
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

async fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    let mut buffer = [0; 4096];
    while !head.windows(4).any(|window| window == b"\r\n\r\n") {
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(read) => head.extend_from_slice(&buffer[..read]),
        }
    }
    String::from_utf8_lossy(&head).into_owned()
}

/// Answers the scripted addresses in turn, the last one for ever.
struct Script {
    answers: Vec<Vec<IpAddr>>,
    asked: Arc<AtomicUsize>,
}

impl Resolve for Script {
    fn resolve<'a>(&'a self, _host: &'a str) -> Resolving<'a> {
        let turn = self.asked.fetch_add(1, Ordering::SeqCst);
        let answer = self.answers[turn.min(self.answers.len() - 1)].clone();
        Box::pin(async move { Ok::<_, io::Error>(answer) })
    }
}

fn resolving_to(answers: &[&[&str]]) -> (Client, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let script = Script {
        answers: answers.iter().map(|answer| answer.iter().map(|text| text.parse().unwrap()).collect()).collect(),
        asked: Arc::clone(&asked),
    };
    (Client::new().unwrap().with_resolver(script), asked)
}

fn get(url: impl Into<String>) -> Request {
    Request { method: "GET".into(), url: url.into(), url_template: false, headers: Vec::new(), body: None, timeout: None }
}

fn allowing(origins: impl IntoIterator<Item = Origin>) -> EgressPolicy {
    EgressPolicy { allowed: origins.into_iter().collect(), ..EgressPolicy::default() }
}

async fn send(policy: &EgressPolicy, request: Request) -> Result<Response, EgressError> {
    Client::new().unwrap().send(policy, request).await
}

#[tokio::test]
async fn a_granted_loopback_address_is_reached_and_its_answer_comes_back() {
    let server = Server::answering(OK).await;
    let policy = allowing([server.origin()]);
    let mut request = get(format!("http://{}/path?a=b", server.address));
    request.method = "POST".into();
    request.body = Some(Bytes::from_static(b"hello"));

    let response = send(&policy, request).await.unwrap();

    assert_eq!(response.status, 200);
    assert_eq!(response.body, "ok");
    let names: Vec<&str> = response.headers.iter().map(|(name, _)| name.as_str()).collect();
    assert!(names.contains(&"x-seen") && names.contains(&"set-cookie"));
    assert!(!names.contains(&"connection"), "{names:?}");
    assert!(server.requests()[0].starts_with("POST /path?a=b HTTP/1.1\r\n"));
}

#[tokio::test]
async fn loopback_is_refused_without_a_grant_of_that_host_and_port() {
    let server = Server::answering(OK).await;
    let other_port = Origin { port: server.address.port() ^ 1, ..server.origin() };
    let url = format!("http://{}/", server.address);
    for policy in [allowing([]), allowing([other_port]), allowing([Origin::parse("http://127.0.0.1").unwrap()])] {
        assert_eq!(send(&policy, get(&*url)).await.unwrap_err().code, "denied");
    }
    assert!(server.requests().is_empty());
}

#[tokio::test]
async fn the_metadata_address_is_refused_behind_a_granted_name() {
    let (client, _) = resolving_to(&[&["169.254.169.254"]]);
    let policy = allowing([Origin::parse("http://metadata.example").unwrap()]);
    let error = client.send(&policy, get("http://metadata.example/latest")).await.unwrap_err();
    assert_eq!(error.code, "denied");
    assert!(!error.retryable);
    assert!(!error.message.contains("169.254"), "{error}");
}

#[tokio::test]
async fn one_private_address_among_public_ones_refuses_the_name() {
    for private in ["10.0.0.7", "::ffff:127.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::", "fe80::1"] {
        let (client, _) = resolving_to(&[&["93.184.215.14", private]]);
        let policy = allowing([Origin::parse("https://hooks.example").unwrap()]);
        let error = client.send(&policy, get("https://hooks.example/")).await.unwrap_err();
        assert_eq!(error.code, "denied", "{private}");
    }
}

#[tokio::test]
async fn mapped_forms_of_loopback_in_the_url_are_refused() {
    let server = Server::answering(OK).await;
    let port = server.address.port();
    for host in ["[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::1]", "2130706433", "0x7f.1", "0"] {
        let policy = allowing([Origin::parse("http://hooks.example").unwrap()]);
        let error = send(&policy, get(format!("http://{host}:{port}/"))).await.unwrap_err();
        assert_eq!(error.code, "denied", "{host}");
    }
    assert!(server.requests().is_empty());
}

#[tokio::test]
async fn a_name_that_changes_its_address_is_looked_up_once() {
    let server = Server::answering(OK).await;
    // The first address is public and answers nobody; a second look-up would find the server on loopback.
    let (client, asked) = resolving_to(&[&["203.0.113.1"], &["127.0.0.1"]]);
    let policy = EgressPolicy { timeout: Duration::from_millis(200), ..allowing([server.named("hooks.example")]) };
    let url = format!("http://hooks.example:{}/", server.address.port());

    let first = client.send(&policy, get(&*url)).await.unwrap_err();
    assert!(matches!(first.code, "timeout" | "unreachable"), "{first}");
    assert_eq!(asked.load(Ordering::SeqCst), 1);

    let second = client.send(&policy, get(&*url)).await.unwrap_err();
    assert_eq!(second.code, "denied");
    assert!(server.requests().is_empty());
}

#[tokio::test]
async fn a_connection_is_not_kept_for_the_next_call() {
    let keep_alive = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    let server = Server::answering(keep_alive).await;
    let (client, asked) = resolving_to(&[&["127.0.0.1"], &["10.0.0.1"]]);
    let policy = allowing([server.named("hooks.example"), server.origin()]);
    let url = format!("http://hooks.example:{}/", server.address.port());
    assert_eq!(client.send(&policy, get(&*url)).await.unwrap().status, 200);
    assert_eq!(client.send(&policy, get(&*url)).await.unwrap_err().code, "denied");
    assert_eq!(asked.load(Ordering::SeqCst), 2);
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test]
async fn the_servers_own_listener_is_refused_even_where_it_is_granted() {
    let server = Server::answering(OK).await;
    let port = server.address.port();
    for own in [server.address, SocketAddr::from(([0, 0, 0, 0], port))] {
        let policy = EgressPolicy { refused: vec![own], ..allowing([server.origin()]) };
        let error = send(&policy, get(format!("http://{}/", server.address))).await.unwrap_err();
        assert_eq!(error.code, "denied", "{own}");
    }
    assert!(server.requests().is_empty());
}

#[tokio::test]
async fn a_redirect_is_returned_and_not_followed() {
    let inside = Server::answering(OK).await;
    let location = format!("HTTP/1.1 302 Found\r\nLocation: http://{}/\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", inside.address);
    let server = Server::answering(location.leak().as_bytes()).await;
    let policy = allowing([server.origin(), inside.origin()]);
    let response = send(&policy, get(format!("http://{}/", server.address))).await.unwrap();
    assert_eq!(response.status, 302);
    assert!(inside.requests().is_empty());
}

#[tokio::test]
async fn a_user_in_the_url_is_refused() {
    let server = Server::answering(OK).await;
    let policy = allowing([server.origin()]);
    for user in ["user@", "user:password@", ":password@"] {
        let url = format!("http://{user}{}/", server.address);
        assert_eq!(send(&policy, get(url)).await.unwrap_err().code, "denied");
    }
    assert!(server.requests().is_empty());
}

#[tokio::test]
async fn other_schemes_methods_and_framing_headers_are_refused() {
    let server = Server::answering(OK).await;
    let policy = allowing([server.origin()]);
    assert_eq!(send(&policy, get("file:///etc/passwd")).await.unwrap_err().code, "denied");
    let url = format!("http://{}/", server.address);
    for method in ["CONNECT", "TRACE", "GET / HTTP/1.1\r\nX:"] {
        let request = Request { method: method.into(), ..get(&*url) };
        assert_eq!(send(&policy, request).await.unwrap_err().code, "invalid");
    }
    for name in ["Host", "Content-Length", "transfer-encoding", "Connection", "Proxy-Connection", "a b"] {
        let request = Request { headers: vec![Header { name: name.into(), value: "x".into(), template: false }], ..get(&*url) };
        assert_eq!(send(&policy, request).await.unwrap_err().code, "invalid", "{name}");
    }
    assert!(server.requests().is_empty());
}

#[tokio::test]
async fn an_endless_answer_ends_at_the_limit() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        read_head(&mut stream).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
        while stream.write_all(&[b'x'; 4096]).await.is_ok() {}
    });
    let policy = EgressPolicy {
        max_response_bytes: 100_000,
        timeout: Duration::from_secs(30),
        ..allowing([Origin::parse(&format!("http://{address}")).unwrap()])
    };
    let error = send(&policy, get(format!("http://{address}/"))).await.unwrap_err();
    assert_eq!(error.code, "too-large");
    // The connection was closed: the server's next write failed and its task ended.
    tasks.join_next().await.unwrap().unwrap();
}

#[tokio::test]
async fn a_declared_length_beyond_the_limit_is_not_read() {
    let server = Server::answering(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n").await;
    let policy = allowing([server.origin()]);
    let error = send(&policy, get(format!("http://{}/", server.address))).await.unwrap_err();
    assert_eq!(error.code, "too-large");
}

#[tokio::test]
async fn a_slow_answer_ends_at_the_shorter_of_both_timeouts() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let policy = allowing([Origin::parse(&format!("http://{address}")).unwrap()]);
    let mut request = get(format!("http://{address}/"));
    request.timeout = Some(Duration::from_millis(100));
    // Nobody accepts: the connection stands in the backlog and no byte comes back.
    let error = send(&policy, request).await.unwrap_err();
    assert_eq!(error.code, "timeout");
    assert!(error.retryable);
    drop(listener);
}

fn with_secret(mut policy: EgressPolicy, host: &str) -> EgressPolicy {
    policy.secrets = BTreeMap::from([("token".to_owned(), SecretBinding { host: host.into(), value: "s3cret-value".into() })]);
    policy
}

fn authorized(url: String) -> Request {
    Request { headers: vec![Header { name: "Authorization".into(), value: "Bearer ${token}".into(), template: true }], ..get(url) }
}

#[tokio::test]
async fn a_secret_is_put_into_header_and_url_of_its_host() {
    let server = Server::answering(OK).await;
    let policy = with_secret(allowing([server.origin()]), "127.0.0.1");
    let mut request = authorized(format!("http://{}/hooks/${{token}}", server.address));
    request.url_template = true;
    assert_eq!(send(&policy, request).await.unwrap().status, 200);
    let head = server.requests().remove(0).to_lowercase();
    assert!(head.starts_with("get /hooks/s3cret-value http/1.1"), "{head}");
    assert!(head.contains("authorization: bearer s3cret-value"), "{head}");
}

#[tokio::test]
async fn without_template_nothing_is_replaced() {
    let server = Server::answering(OK).await;
    let policy = with_secret(allowing([server.origin()]), "127.0.0.1");
    let mut request = authorized(format!("http://{}/", server.address));
    request.headers[0].template = false;
    send(&policy, request).await.unwrap();
    assert!(server.requests()[0].contains("Bearer ${token}"));
}

#[tokio::test]
async fn a_secret_goes_to_no_other_host() {
    let server = Server::answering(OK).await;
    let (client, _) = resolving_to(&[&["127.0.0.1"]]);
    let policy = with_secret(allowing([server.named("other.example"), server.named("hooks.example"), server.origin()]), "hooks.example");
    let port = server.address.port();
    let error = client.send(&policy, authorized(format!("http://other.example:{port}/"))).await.unwrap_err();
    assert_eq!(error.code, "denied");
    assert!(server.requests().is_empty());

    client.send(&policy, authorized(format!("http://hooks.example:{port}/"))).await.unwrap();
    assert!(server.requests()[0].contains("s3cret-value"));
}

#[tokio::test]
async fn errors_name_no_secret() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = closed.local_addr().unwrap();
    drop(closed);
    let origin = Origin::parse(&format!("http://{address}")).unwrap();
    let policy = with_secret(allowing([origin]), "127.0.0.1");
    for url in [
        format!("http://{address}/${{token}}"),
        "http://${token}.example/".to_owned(),
        format!("http://${{token}}@{address}/"),
        "http://${token}:99999/".to_owned(),
        "${token}".to_owned(),
    ] {
        let mut request = get(url);
        request.url_template = true;
        let error = send(&policy, request).await.unwrap_err();
        assert!(!error.to_string().contains("s3cret"), "{error}");
        assert!(!format!("{error:?}").contains("s3cret"), "{error:?}");
    }
    assert!(!format!("{policy:?}").contains("s3cret"));
}

#[tokio::test]
async fn a_secret_may_be_the_whole_url_of_its_host() {
    let server = Server::answering(OK).await;
    let mut policy = with_secret(allowing([server.origin()]), "127.0.0.1");
    policy.secrets.get_mut("token").unwrap().value = format!("http://{}/room/abc", server.address);
    let mut request = get("${token}");
    request.url_template = true;
    send(&policy, request).await.unwrap();
    assert!(server.requests()[0].starts_with("GET /room/abc "));
}

#[tokio::test]
async fn a_call_has_only_so_many_requests() {
    let budget = CallBudget::new(&EgressPolicy { max_calls: 3, max_concurrent: 2, ..EgressPolicy::default() });
    let first = budget.take().unwrap();
    let second = budget.take().unwrap();
    assert_eq!(budget.take().unwrap_err().code, "limit");
    drop((first, second));
    let _third = budget.take().unwrap();
    assert_eq!(budget.take().unwrap_err().code, "limit");
}

#[test]
fn origins_are_exact() {
    assert_eq!(Origin::parse("https://Hooks.Example").unwrap().to_string(), "https://hooks.example");
    assert_eq!(Origin::parse("http://127.0.0.1:9999").unwrap().to_string(), "http://127.0.0.1:9999");
    for wrong in ["hooks.example", "ftp://hooks.example", "https://a@b.example", "https://b.example/path", "https://b.example?x"] {
        assert!(Origin::parse(wrong).is_err(), "{wrong}");
    }
}
