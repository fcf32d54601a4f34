//! Connections: accepted, bounded in number and time, and ended in order.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use ipnet::IpNet;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;
use tracing::{debug, warn};

/// One request's head: the longest signature that is read has 64 KiB, and so has the longest path. Every connection may take as much.
const HEAD_LIMIT: usize = 96 << 10;
const HEADERS: usize = 100;

/// Where the proxies are that end TLS, and the hosts of the operator: they bring the devices of all the world.
const LOCAL: [IpNet; 9] = [
    IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)), 8),
    IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 0)), 8),
    IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(172, 16, 0, 0)), 12),
    IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(192, 168, 0, 0)), 16),
    IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(169, 254, 0, 0)), 16),
    IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(100, 64, 0, 0)), 10),
    IpNet::new_assert(IpAddr::V6(Ipv6Addr::LOCALHOST), 128),
    IpNet::new_assert(IpAddr::V6(Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0)), 7),
    IpNet::new_assert(IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0)), 10),
];

/// What connections may take.
#[derive(Debug, Clone)]
pub struct Bounds {
    /// So many at once.
    pub connections: usize,
    /// Of one peer, or one network of IPv6.
    pub of_a_peer: usize,
    /// Whose connections are not counted by peer.
    pub proxies: Vec<IpNet>,
    /// For a request's head, and for the next one on a connection that is kept.
    pub head: Duration,
    /// For a peer that takes nothing of its answer.
    pub write: Duration,
}

impl Bounds {
    /// Those of a server in production. One peer can take half of the places: a school whose devices are all woken at once stands behind one
    /// address, but it must not be able to shut out everybody else.
    pub fn of(connections: usize, trusted_proxies: &[IpNet]) -> Self {
        let proxies = LOCAL.iter().chain(trusted_proxies).copied().collect();
        Self { connections, of_a_peer: connections.div_ceil(2), proxies, head: Duration::from_mins(1), write: Duration::from_secs(30) }
    }
}

/// How many connections each peer has.
#[derive(Debug, Clone, Default)]
struct Peers {
    counts: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

/// One of them, until it is dropped.
struct OfPeer {
    network: IpAddr,
    peers: Peers,
}

impl Peers {
    /// `None`: it has as many as it may.
    fn enter(&self, peer: IpAddr, most: usize) -> Option<OfPeer> {
        // Whoever has an address of IPv6 has all that share its first half.
        let network = match peer {
            IpAddr::V4(_) => peer,
            IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        };
        let mut counts = self.counts.lock();
        let count = counts.entry(network).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(OfPeer { network, peers: self.clone() })
    }
}

impl Drop for OfPeer {
    fn drop(&mut self) {
        let mut counts = self.peers.counts.lock();
        if let Some(count) = counts.get_mut(&self.network) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.network);
            }
        }
    }
}

/// Accepts connections until `shutdown`, then lets each finish the request it is in.
pub async fn serve(listener: TcpListener, router: Router, bounds: Bounds, tracker: TaskTracker, shutdown: CancellationToken) {
    let places = Arc::new(Semaphore::new(bounds.connections));
    let peers = Peers::default();
    loop {
        let place = tokio::select! {
            place = Arc::clone(&places).acquire_owned() => place,
            () = shutdown.cancelled() => return,
        };
        let Ok(place) = place else { return };
        let (stream, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Usually no more descriptors: those in use will come back.
                    warn!("A connection could not be accepted: {error}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
            () = shutdown.cancelled() => return,
        };
        let address = peer.ip().to_canonical();
        let of_peer = if bounds.proxies.iter().any(|proxy| proxy.contains(&address)) {
            None
        } else {
            let Some(of_peer) = peers.enter(address, bounds.of_a_peer) else {
                metrics::counter!("wasmdm_connections_refused_total").increment(1);
                debug!(peer = %peer, "A connection was closed at once: {address} has {} already", bounds.of_a_peer);
                continue;
            };
            Some(of_peer)
        };
        let router = router.clone();
        let shutdown = shutdown.clone();
        let (head, write) = (bounds.head, bounds.write);
        tracker.spawn(async move {
            connection(stream, peer, router, (head, write), shutdown).await;
            drop((of_peer, place));
        });
    }
}

async fn connection(stream: TcpStream, peer: SocketAddr, router: Router, (head, write): (Duration, Duration), shutdown: CancellationToken) {
    if let Err(error) = stream.set_nodelay(true) {
        debug!(peer = %peer, "TCP_NODELAY could not be set: {error}");
    }
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(ConnectInfo(peer));
        router.clone().oneshot(request)
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head)
        .max_buf_size(HEAD_LIMIT)
        .max_headers(HEADERS)
        .serve_connection(TokioIo::new(Impatient::new(stream, write)), service);
    tokio::pin!(connection);
    let outcome = tokio::select! {
        outcome = &mut connection => outcome,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = outcome {
        debug!(peer = %peer, "A connection ended: {error}");
    }
}

/// A stream whose peer must take something of what is written now and then. Otherwise one that sends requests and reads no answer would keep
/// its place for ever: hyper has a time for heads, but none for answers.
struct Impatient {
    stream: TcpStream,
    patience: Duration,
    /// Runs while a write waits.
    waiting: Pin<Box<Sleep>>,
    waits: bool,
}

impl Impatient {
    fn new(stream: TcpStream, patience: Duration) -> Self {
        // Its first deadline is set when a write waits.
        Self { stream, patience, waiting: Box::pin(tokio::time::sleep(patience)), waits: false }
    }

    /// Makes an error of a write that has waited too long.
    fn watch<T>(&mut self, context: &mut Context<'_>, outcome: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if outcome.is_ready() {
            self.waits = false;
            return outcome;
        }
        if !self.waits {
            self.waits = true;
            self.waiting.as_mut().reset(Instant::now() + self.patience);
        }
        ready!(self.waiting.as_mut().poll(context));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, format!("the peer has read nothing for {:?}", self.patience))))
    }
}

impl AsyncRead for Impatient {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Impatient {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.watch(context, outcome)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.stream).poll_flush(context);
        self.watch(context, outcome)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.stream).poll_shutdown(context);
        self.watch(context, outcome)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, context: &mut Context<'_>, parts: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write_vectored(context, parts);
        self.watch(context, outcome)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    const SHORT: Duration = Duration::from_millis(200);
    /// Whatever takes longer than this does not come at all.
    const LONG: Duration = Duration::from_secs(20);
    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";

    fn bounds(head: Duration, write: Duration) -> Bounds {
        Bounds { connections: 1, of_a_peer: 1, proxies: vec![], head, write }
    }

    /// A server with one place, whose answers are larger than what a socket holds.
    async fn server(bounds: Bounds) -> (SocketAddr, TaskTracker, CancellationToken) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/", get(|| async { vec![b'x'; 1 << 20] }));
        let (tracker, shutdown) = (TaskTracker::new(), CancellationToken::new());
        tracker.spawn(serve(listener, router, bounds, tracker.clone(), shutdown.clone()));
        (address, tracker, shutdown)
    }

    /// The beginning of the answer that a newcomer gets: there is a place for it.
    async fn is_served(address: SocketAddr) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(REQUEST).await.unwrap();
        let mut head = [0; 15];
        tokio::time::timeout(LONG, stream.read_exact(&mut head)).await.expect("there is no place").unwrap();
        assert_eq!(&head, b"HTTP/1.1 200 OK");
    }

    /// A client that was slow on purpose kept its connection for ever. NanoMDM defect 10.
    #[tokio::test]
    async fn who_sends_requests_and_never_reads_loses_the_place() {
        let (address, tracker, shutdown) = server(bounds(LONG * 2, SHORT)).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        // Ends with an error once the server has closed, and not before: it stops reading when its answers are not taken.
        let send = async { while stream.write_all(REQUEST).await.is_ok() {} };
        tokio::time::timeout(LONG, send).await.expect("it is still connected");
        is_served(address).await;
        shutdown.cancel();
        tracker.close();
        tokio::time::timeout(LONG, tracker.wait()).await.expect("a connection is left");
    }

    #[tokio::test]
    async fn who_reads_slowly_but_reads_gets_the_whole_answer() {
        let (address, ..) = server(bounds(LONG, LONG)).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
        let (mut part, mut length) = (vec![0; 1 << 10], 0);
        loop {
            match stream.read(&mut part).await.unwrap() {
                0 => break,
                read => length += read,
            }
            tokio::task::yield_now().await;
        }
        assert!(length > 1 << 20, "{length}");
    }

    #[tokio::test]
    async fn a_connection_that_is_kept_and_not_used_is_ended_after_its_time() {
        let (address, ..) = server(bounds(SHORT, LONG * 2)).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(REQUEST).await.unwrap();
        // The whole answer, then the end, which the client has not asked for.
        let mut answer = Vec::new();
        tokio::time::timeout(LONG, stream.read_to_end(&mut answer)).await.expect("it is still connected").unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 200 OK") && answer.len() > 1 << 20, "{}", answer.len());
        is_served(address).await;
    }

    #[tokio::test]
    async fn who_connects_and_says_nothing_loses_the_place_too() {
        let (address, ..) = server(bounds(SHORT, LONG * 2)).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        let ended = tokio::time::timeout(LONG, stream.read(&mut [0; 1])).await.expect("it is still connected");
        assert!(matches!(ended, Ok(0)), "{ended:?}");
        is_served(address).await;
    }

    /// One address that opens connections and says nothing could take all places, minute after minute.
    #[tokio::test]
    async fn one_peer_cannot_take_all_places_but_a_proxy_can() {
        let two = Bounds { connections: 4, of_a_peer: 2, ..bounds(LONG * 2, LONG * 2) };
        for (proxies, refused) in [(vec![], true), (vec!["127.0.0.1/32".parse().unwrap()], false)] {
            let (address, ..) = server(Bounds { proxies, ..two.clone() }).await;
            let first = TcpStream::connect(address).await.unwrap();
            let _second = TcpStream::connect(address).await.unwrap();
            let mut third = TcpStream::connect(address).await.unwrap();
            if !refused {
                is_served(address).await;
                continue;
            }
            let ended = tokio::time::timeout(LONG, third.read(&mut [0; 1])).await.expect("it is still connected");
            assert!(!matches!(ended, Ok(1..)), "{ended:?}");
            // The place of one that ends is another's.
            drop(first);
            let served = async {
                loop {
                    let mut stream = TcpStream::connect(address).await.unwrap();
                    let mut head = [0; 15];
                    if stream.write_all(REQUEST).await.is_ok() && stream.read_exact(&mut head).await.is_ok() {
                        break;
                    }
                }
            };
            tokio::time::timeout(LONG, served).await.expect("there is no place");
        }
    }

    #[test]
    fn an_address_of_ipv6_counts_with_its_network() {
        let peers = Peers::default();
        let enter = |address: &str| peers.enter(address.parse().unwrap(), 1);
        let held = enter("2001:db8::1");
        assert!(held.is_some() && enter("2001:db8::ffff:1").is_none() && enter("2001:db8:0:1::1").is_some());
        assert!(enter("192.0.2.1").is_some());
        drop(held);
        assert!(peers.counts.lock().is_empty());
        let bounds = Bounds::of(10_000, &["198.51.100.7/32".parse().unwrap()]);
        let is_counted = |address: &str| !bounds.proxies.iter().any(|proxy| proxy.contains(&address.parse::<IpAddr>().unwrap()));
        assert!(!["127.0.0.1", "10.1.2.3", "172.31.0.1", "::1", "fd00::1", "198.51.100.7"].into_iter().any(is_counted));
        assert!(["172.32.0.1", "203.0.113.9", "2001:db8::1"].into_iter().all(is_counted));
    }

    /// What NanoMDM takes as ids of a thousand enrollments stands in the path.
    #[tokio::test]
    async fn a_path_of_a_thousand_ids_is_read_and_a_head_without_end_is_not() {
        let (address, ..) = server(Bounds { connections: 10, of_a_peer: 10, ..bounds(LONG, LONG) }).await;
        let answer = async |request: String| {
            let mut stream = TcpStream::connect(address).await.unwrap();
            // The server may close before all of it is written.
            drop(stream.write_all(request.as_bytes()).await);
            let mut head = [0; 12];
            tokio::time::timeout(LONG, stream.read_exact(&mut head)).await.expect("no answer").map(|_| String::from_utf8_lossy(&head).into_owned())
        };
        let ids = vec!["11111111-2222-3333-4444-555555555555"; 1000].join(",");
        assert_eq!(answer(format!("GET /v1/push/{ids} HTTP/1.1\r\nHost: x\r\n\r\n")).await.unwrap(), "HTTP/1.1 404");
        let padding = "x".repeat(2 * HEAD_LIMIT);
        let outcome = answer(format!("GET / HTTP/1.1\r\nHost: x\r\nX-Padding: {padding}\r\n\r\n")).await;
        assert!(outcome.as_ref().map_or(true, |head| head == "HTTP/1.1 431"), "{outcome:?}");
    }
}
