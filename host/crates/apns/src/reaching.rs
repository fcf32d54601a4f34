//! A TCP connection to the push service, straight or through a proxy.
//!
//! A name has several addresses, of two families, and some of them may lead nowhere: a firewall that swallows IPv6, for instance. They are
//! tried as RFC 8305 says: the families take turns, and each address has a quarter of a second before the next is tried beside it.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use http::Uri;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use wasmdm_protocol::percent::decoded;

use crate::client::{Endpoint, SetUpError};

/// The lead of one address over the next.
const LEAD: Duration = Duration::from_millis(250);
/// How long one address may take, so that the error can name it.
const ADDRESS_TIMEOUT: Duration = Duration::from_secs(3);
/// The longest answer of a proxy that is read.
const LONGEST_HEAD: usize = 8 << 10;
/// How much of it is told.
const LONGEST_STATUS: usize = 80;

/// A TCP connection that leads to the service; the error says in words why there is none.
pub(crate) async fn reach(endpoint: &Endpoint, proxy: Option<&Proxy>) -> Result<TcpStream, String> {
    match proxy {
        None => connect(endpoint.host(), endpoint.port()).await,
        Some(proxy) => {
            let to = |problem| format!("the proxy {proxy}: {problem}");
            let stream = connect(&proxy.host, proxy.port).await.map_err(to)?;
            proxy.lead(stream, endpoint).await.map_err(to)
        }
    }
}

async fn connect(host: &str, port: u16) -> Result<TcpStream, String> {
    let addresses = lookup_host((host, port)).await.map_err(|error| error.to_string())?;
    let stream = race(in_turns(addresses.collect())).await?;
    // Pushes are small, and each waits for its answer: Nagle's algorithm would hold them back. Only speed suffers without.
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

/// The families by turns, beginning with what the resolver puts first.
fn in_turns(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let first = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (one, other): (Vec<_>, Vec<_>) = addresses.into_iter().partition(|address| address.is_ipv6() == first);
    let longer = one.len().max(other.len());
    let (mut one, mut other) = (one.into_iter(), other.into_iter());
    (0..longer).flat_map(|_| [one.next(), other.next()]).flatten().collect()
}

/// The first that answers.
async fn race(addresses: Vec<SocketAddr>) -> Result<TcpStream, String> {
    let mut waiting = addresses.into_iter();
    let mut attempts = FuturesUnordered::new();
    let mut problem = "the name has no address".to_owned();
    loop {
        let is_begun = waiting.next().map(|address| attempts.push(attempt(address))).is_some();
        let ended = if is_begun { timeout(LEAD, attempts.next()).await } else { Ok(attempts.next().await) };
        match ended {
            Ok(Some(Ok(stream))) => return Ok(stream),
            Ok(Some(Err(error))) => problem = error,
            Ok(None) => return Err(problem),
            // It goes on beside the next one.
            Err(_) => {}
        }
    }
}

async fn attempt(address: SocketAddr) -> Result<TcpStream, String> {
    match timeout(ADDRESS_TIMEOUT, TcpStream::connect(address)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(format!("{address}: {error}")),
        Err(_) => Err(format!("{address}: no connection within {ADDRESS_TIMEOUT:?}")),
    }
}

/// An HTTP proxy that leads connections on (CONNECT).
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    host: String,
    port: u16,
    /// A header's value.
    authorization: Option<String>,
}

impl Proxy {
    /// `http://HOST:PORT`, with `USER:PASSWORD@` before the host for a proxy that asks who one is. Without a port it is 80, as everywhere with
    /// `http://`.
    pub fn parse(text: &str) -> Result<Self, SetUpError> {
        const FORM: SetUpError = SetUpError::Proxy("write http://HOST:PORT, or http://USER:PASSWORD@HOST:PORT");
        let uri: Uri = text.trim().parse().map_err(|_| FORM)?;
        if uri.scheme_str().is_some_and(|scheme| scheme != "http") {
            return Err(SetUpError::Proxy("only proxies with http:// can be used"));
        }
        let authority = uri.authority().filter(|_| matches!(uri.path(), "" | "/") && uri.query().is_none()).ok_or(FORM)?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let port = match authority.port_u16() {
            Some(port) => port,
            None if authority.port().is_none() && !authority.as_str().ends_with(':') => 80,
            None => return Err(FORM),
        };
        if host.is_empty() || port == 0 {
            return Err(FORM);
        }
        let authorization = match authority.as_str().rsplit_once('@') {
            Some((credentials, _)) => {
                let (user, password) = credentials.split_once(':').unwrap_or((credentials, ""));
                let credentials = [decoded(user).ok_or(FORM)?, b":".to_vec(), decoded(password).ok_or(FORM)?].concat();
                Some(format!("Basic {}", STANDARD.encode(credentials)))
            }
            None => None,
        };
        Ok(Self { host: host.to_owned(), port, authorization })
    }

    /// Has the proxy connect to the service.
    async fn lead(&self, mut stream: TcpStream, endpoint: &Endpoint) -> Result<TcpStream, String> {
        let target = host_and_port(endpoint.host(), endpoint.port());
        let authorization = self.authorization.as_ref().map(|value| format!("Proxy-Authorization: {value}\r\n")).unwrap_or_default();
        let request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{authorization}\r\n");
        stream.write_all(request.as_bytes()).await.map_err(|error| error.to_string())?;
        let mut head = Vec::new();
        // Byte by byte: what follows is the service's.
        while !head.ends_with(b"\r\n\r\n") {
            if head.len() >= LONGEST_HEAD {
                return Err("its answer has no end".to_owned());
            }
            head.push(stream.read_u8().await.map_err(|_| "it closed the connection without an answer".to_owned())?);
        }
        let head = String::from_utf8_lossy(&head);
        let line = head.lines().next().unwrap_or_default();
        let status = line.strip_prefix("HTTP/1.").and_then(|rest| rest.split_once(' ')).map(|(_, status)| status.trim_start());
        match status {
            Some(status) if status.starts_with('2') => Ok(stream),
            Some(status) => Err(format!("it answers {}", status.chars().take(LONGEST_STATUS).flat_map(char::escape_default).collect::<String>())),
            None => Err("its answer is no HTTP".to_owned()),
        }
    }
}

/// Without who we say we are.
impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&host_and_port(&self.host, self.port))
    }
}

/// Without who we say we are.
impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy").field("host", &self.host).field("port", &self.port).finish_non_exhaustive()
    }
}

fn host_and_port(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream as Blocking};

    /// An address at which connections hang, as behind a firewall that swallows them: a listener that never accepts, with its queue full.
    struct BlackHole {
        address: SocketAddr,
        _listener: TcpListener,
        _queued: Vec<Blocking>,
    }

    impl BlackHole {
        fn at(host: &str) -> Self {
            let listener = TcpListener::bind((host, 0)).unwrap();
            let address = listener.local_addr().unwrap();
            let mut queued = Vec::new();
            while let Ok(stream) = Blocking::connect_timeout(&address, Duration::from_millis(200)) {
                queued.push(stream);
            }
            Self { address, _listener: listener, _queued: queued }
        }
    }

    /// Each address had three seconds, one after the other: four that led nowhere, and the ten seconds were over before the fifth.
    #[tokio::test]
    async fn addresses_that_lead_nowhere_keep_nobody_from_the_one_that_answers() {
        let holes: Vec<_> = ["127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"].into_iter().map(BlackHole::at).collect();
        let open = TcpListener::bind("127.0.0.1:0").unwrap();
        let addresses: Vec<_> = holes.iter().map(|hole| hole.address).chain([open.local_addr().unwrap()]).collect();
        let begin = tokio::time::Instant::now();
        let stream = race(addresses).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), open.local_addr().unwrap());
        assert!(begin.elapsed() < ADDRESS_TIMEOUT, "{:?}", begin.elapsed());
    }

    #[tokio::test]
    async fn an_address_that_refuses_is_left_at_once_and_the_last_problem_is_told() {
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let problem = race(vec![closed; 10]).await.unwrap_err();
        assert!(problem.starts_with(&closed.to_string()), "{problem}");
        assert_eq!(race(Vec::new()).await.unwrap_err(), "the name has no address");
    }

    #[test]
    fn families_take_turns() {
        let addresses = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<SocketAddr>>();
        let (a, b, c, d) = ("[::1]:1", "[::1]:2", "[::1]:3", "127.0.0.1:4");
        assert_eq!(in_turns(addresses(&[a, b, c, d])), addresses(&[a, d, b, c]));
        assert_eq!(in_turns(addresses(&[d, a, b, c])), addresses(&[d, a, b, c]));
        assert_eq!(in_turns(Vec::new()), []);
    }

    #[test]
    fn a_proxy_is_named_by_a_url_and_its_password_is_not_shown() {
        let basic = |text: &str| Some(format!("Basic {}", STANDARD.encode(text)));
        for (text, shown, authorization) in [
            ("http://proxy.example:3128", "proxy.example:3128", None),
            ("http://proxy.example:3128/", "proxy.example:3128", None),
            ("http://proxy.example", "proxy.example:80", None),
            ("proxy.example:3128", "proxy.example:3128", None),
            ("http://[::1]:3128", "[::1]:3128", None),
            ("http://jo:p%40ss%3Aword@proxy.example:3128", "proxy.example:3128", basic("jo:p@ss:word")),
            ("http://jo@proxy.example:3128", "proxy.example:3128", basic("jo:")),
        ] {
            let proxy = Proxy::parse(text).unwrap();
            assert_eq!((proxy.to_string().as_str(), &proxy.authorization), (shown, &authorization), "{text}");
            assert!(!format!("{proxy:?}").contains("Basic"));
        }
        for text in [
            "",
            "https://proxy.example:3128",
            "socks5://secret@proxy.example",
            "http://proxy.example:0",
            "http://secret:%zz@host:1",
            "http://host/secret",
        ] {
            let problem = Proxy::parse(text).unwrap_err().to_string();
            assert!(problem.starts_with("proxy: ") && !problem.contains("secret"), "{problem}");
        }
    }
}
