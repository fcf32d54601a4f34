//! Connections: accepted, bounded in number and time, and ended in order.

use std::io;
use std::net::SocketAddr;
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
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;
use tracing::{debug, warn};

/// One request's head: a signature with a chain of certificates fits many times.
const HEAD_LIMIT: usize = 256 << 10;
const HEADERS: usize = 100;

/// What connections may take.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// So many at once.
    pub connections: usize,
    /// For a request's head, and for the next one on a connection that is kept.
    pub head: Duration,
    /// For a peer that takes nothing of its answer.
    pub write: Duration,
}

impl Bounds {
    /// The times of a server in production.
    pub fn of(connections: usize) -> Self {
        Self { connections, head: Duration::from_mins(1), write: Duration::from_secs(30) }
    }
}

/// Accepts connections until `shutdown`, then lets each finish the request it is in.
pub async fn serve(listener: TcpListener, router: Router, bounds: Bounds, tracker: TaskTracker, shutdown: CancellationToken) {
    let places = Arc::new(Semaphore::new(bounds.connections));
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
        let router = router.clone();
        let shutdown = shutdown.clone();
        tracker.spawn(async move {
            connection(stream, peer, router, bounds, shutdown).await;
            drop(place);
        });
    }
}

async fn connection(stream: TcpStream, peer: SocketAddr, router: Router, bounds: Bounds, shutdown: CancellationToken) {
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
        .header_read_timeout(bounds.head)
        .max_buf_size(HEAD_LIMIT)
        .max_headers(HEADERS)
        .serve_connection(TokioIo::new(Impatient::new(stream, bounds.write)), service);
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
        let (address, tracker, shutdown) = server(Bounds { connections: 1, head: LONG * 2, write: SHORT }).await;
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
        let (address, ..) = server(Bounds { connections: 1, head: LONG, write: LONG }).await;
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
        let (address, ..) = server(Bounds { connections: 1, head: SHORT, write: LONG * 2 }).await;
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
        let (address, ..) = server(Bounds { connections: 1, head: SHORT, write: LONG * 2 }).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        let ended = tokio::time::timeout(LONG, stream.read(&mut [0; 1])).await.expect("it is still connected");
        assert!(matches!(ended, Ok(0)), "{ended:?}");
        is_served(address).await;
    }
}
