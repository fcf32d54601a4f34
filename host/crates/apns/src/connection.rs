//! One HTTP/2 connection to the push service: opening it, one exchange on it, and watching whether it is alive.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use h2::client::SendRequest;
use h2::{Ping, PingPong, Reason, RecvStream};
use http::Request;
use rustls::AlertDescription;
use rustls::ClientConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, MissedTickBehavior, timeout, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use uuid::Uuid;

use crate::client::Shared;
use crate::outcome::{Fault, Outcome, announced_reason, judge};
use crate::pool::{Pool, Retirement};
use crate::reaching::reach;

/// The most that is read of an answer's body; Apple's have less than 100 bytes.
const BODY_LIMIT: usize = 4096;
/// The longest description of a problem that is kept.
const LONGEST_PROBLEM: usize = 200;

type Wire = h2::client::Connection<Witnessed, Bytes>;

/// What the pool and the pushes hold. The last of them to let go ends the connection.
pub(crate) struct Connection {
    sender: SendRequest<Bytes>,
    /// Of the certificate that it was opened with.
    version: i64,
    /// How many pushes it may carry.
    limit: AtomicUsize,
    most: usize,
    in_flight: AtomicUsize,
    answers: AtomicU64,
    /// Whether it has ever answered sensibly.
    proved: AtomicBool,
    doubted: Arc<Notify>,
}

/// Why no connection came about.
#[derive(Debug, Clone)]
pub(crate) struct OpenError {
    pub(crate) problem: String,
    /// Whether the other side said that the client certificate is the reason.
    pub(crate) certificate: bool,
}

/// What came of one request.
pub(crate) enum Exchange {
    /// The service answered.
    Answered(Outcome),
    /// The service did not look at the request, and never will.
    Unprocessed {
        /// What it said.
        problem: String,
        /// Why nothing else can be sent on this connection either, if that is so.
        end: Option<Retirement>,
    },
    /// Nobody knows.
    Lost(String),
    /// Nobody knows yet.
    TimedOut,
}

impl Connection {
    /// Opens one and starts its driver. It has proved that the service takes the client certificate and has said how many streams it
    /// allows: with TLS 1.3 a client learns of neither before the first answer, so a PING is sent and awaited.
    pub(crate) async fn open(shared: &Shared, config: Arc<ClientConfig>, version: i64, pool: Weak<Pool>) -> Result<Arc<Self>, OpenError> {
        let limit = shared.options.connect_timeout;
        let opening = async {
            let reached = reach(&shared.options.endpoint, shared.options.proxy.as_ref()).await;
            let stream = reached.map_err(|problem| OpenError { problem, certificate: false })?;
            let stream = TlsConnector::from(config).connect(shared.server_name.clone(), stream).await.map_err(|error| OpenError::from_io(&error))?;
            if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
                return Err(OpenError { problem: "the other side does not speak HTTP/2".into(), certificate: false });
            }
            let alert = Arc::new(OnceLock::new());
            let stream = Witnessed { inner: stream, alert: Arc::clone(&alert) };
            let failed = |error: h2::Error| OpenError {
                problem: describe(&error),
                certificate: dismisses_the_certificate(&error) || alert.get().copied().is_some_and(is_about_the_certificate),
            };
            let mut builder = h2::client::Builder::new();
            let (sender, mut wire) = builder.enable_push(false).handshake::<_, Bytes>(stream).await.map_err(failed)?;
            let mut pings = wire.ping_pong().ok_or_else(|| OpenError { problem: "no PING is possible".into(), certificate: false })?;
            tokio::select! {
                // Its error says why; that of the PING only says that the connection is closed.
                biased;
                ended = &mut wire => return Err(ended.map_or_else(failed, |()| OpenError {
                    problem: "the other side closed the connection at once".into(),
                    certificate: false,
                })),
                pong = pings.ping(Ping::opaque()) => pong.map_err(failed)?,
            };
            Ok((sender, wire, pings))
        };
        let (sender, wire, pings) = match timeout(limit, opening).await {
            Ok(opened) => opened?,
            Err(_) => return Err(OpenError { problem: format!("no connection within {limit:?}"), certificate: false }),
        };
        let most = shared.options.streams_per_connection;
        let connection = Arc::new(Self {
            limit: AtomicUsize::new(sender.current_max_send_streams().clamp(1, most)),
            most,
            sender,
            version,
            in_flight: AtomicUsize::new(0),
            answers: AtomicU64::new(0),
            proved: AtomicBool::new(false),
            doubted: Arc::default(),
        });
        let driver = Driver {
            connection: Arc::downgrade(&connection),
            doubted: Arc::clone(&connection.doubted),
            pool,
            keep_alive: shared.options.keep_alive.max(Duration::from_millis(1)),
            patience: shared.options.patience.max(Duration::from_millis(10)),
            ping_timeout: shared.options.ping_timeout,
            idle_timeout: shared.options.idle_timeout,
        };
        shared.tasks.spawn(driver.drive(wire, pings));
        Ok(connection)
    }

    pub(crate) const fn version(&self) -> i64 {
        self.version
    }

    /// Whether it may carry one more.
    pub(crate) fn has_room(&self) -> bool {
        self.in_flight.load(Ordering::SeqCst) < self.limit.load(Ordering::Relaxed)
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::SeqCst)
    }

    pub(crate) fn begin(&self) {
        self.in_flight.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn end(&self) {
        self.in_flight.fetch_sub(1, Ordering::SeqCst);
    }

    /// Whether this is the first sensible answer.
    pub(crate) fn prove(&self) -> bool {
        !self.proved.load(Ordering::Relaxed) && !self.proved.swap(true, Ordering::Relaxed)
    }

    pub(crate) fn is_proved(&self) -> bool {
        self.proved.load(Ordering::Relaxed)
    }

    /// Asks whether the other side is still there.
    pub(crate) fn doubt(&self) {
        self.doubted.notify_one();
    }

    /// Sends one request and waits for its answer.
    pub(crate) async fn exchange(&self, head: &Request<()>, body: &Bytes, apns_id: Uuid, deadline: Instant) -> Exchange {
        let mut sender = self.sender.clone();
        let (response, mut stream) = match sender.send_request(head.clone(), false) {
            Ok(begun) => begun,
            // Nothing left this process: the connection has ended, or has run out of stream numbers.
            Err(error) => return Exchange::Unprocessed { problem: describe(&error), end: Some(retirement(&error)) },
        };
        // What is wrong with the stream is told by the answer.
        let _ = stream.send_data(body.clone(), true);
        let response = match timeout_at(deadline, response).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return self.without_answer(&error),
            Err(_) => return Exchange::TimedOut,
        };
        self.answers.fetch_add(1, Ordering::Relaxed);
        let (head, body) = response.into_parts();
        let body = if head.status == 200 { Bytes::new() } else { timeout_at(deadline, read(body)).await.unwrap_or_default() };
        Exchange::Answered(judge(head.status.as_u16(), apns_id, &head.headers, &body))
    }

    fn without_answer(&self, error: &h2::Error) -> Exchange {
        let problem = describe(error);
        // h2 gives this error only to streams beyond the last that the GOAWAY names: those were not processed. The others go on.
        if error.is_go_away() && error.is_remote() {
            return Exchange::Unprocessed { problem, end: Some(retirement(error)) };
        }
        if error.is_reset() && error.is_remote() && error.reason() == Some(Reason::REFUSED_STREAM) {
            self.limit.store(self.sender.current_max_send_streams().clamp(1, self.most), Ordering::Relaxed);
            return Exchange::Unprocessed { problem, end: None };
        }
        Exchange::Lost(problem)
    }
}

/// The body, as much of it as matters.
async fn read(mut body: RecvStream) -> Bytes {
    let mut read = BytesMut::new();
    while let Some(Ok(part)) = body.data().await {
        let room = BODY_LIMIT.saturating_sub(read.len());
        read.extend_from_slice(part.get(..room).unwrap_or(&part));
        // It fails only where the stream has ended.
        let _ = body.flow_control().release_capacity(part.len());
        if read.len() >= BODY_LIMIT {
            break;
        }
    }
    read.freeze()
}

impl OpenError {
    fn from_io(error: &io::Error) -> Self {
        Self { problem: bounded(error.to_string()), certificate: received_alert(error).is_some_and(is_about_the_certificate) }
    }
}

fn received_alert(error: &io::Error) -> Option<AlertDescription> {
    match error.get_ref()?.downcast_ref::<rustls::Error>()? {
        rustls::Error::AlertReceived(alert) => Some(*alert),
        _ => None,
    }
}

/// A TLS stream that remembers the alert which ended it: h2 keeps of an error only its words.
struct Witnessed {
    inner: TlsStream<TcpStream>,
    alert: Arc<OnceLock<AlertDescription>>,
}

impl Witnessed {
    fn witness<T>(&self, outcome: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if let Poll::Ready(Err(error)) = &outcome
            && let Some(alert) = received_alert(error)
        {
            // The first one is the reason.
            let _ = self.alert.set(alert);
        }
        outcome
    }
}

impl AsyncRead for Witnessed {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.inner).poll_read(context, buffer);
        self.witness(outcome)
    }
}

impl AsyncWrite for Witnessed {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.inner).poll_write(context, bytes);
        self.witness(outcome)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, context: &mut Context<'_>, parts: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.inner).poll_write_vectored(context, parts);
        self.witness(outcome)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.inner).poll_flush(context);
        self.witness(outcome)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

/// An alert that we receive speaks of our certificate; what we think of theirs is an error of our own.
const fn is_about_the_certificate(alert: AlertDescription) -> bool {
    matches!(
        alert,
        AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateRequired
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied
    )
}

/// What the end of a connection says of it.
fn retirement(error: &h2::Error) -> Retirement {
    if dismisses_the_certificate(error) { Retirement::Dismissed(describe(error)) } else { Retirement::Ended(describe(error)) }
}

/// Whether a GOAWAY carries one of Apple's reasons that speak of the certificate. h2 shows the frame's data only in the error's words.
fn dismisses_the_certificate(error: &h2::Error) -> bool {
    if !(error.is_go_away() && error.is_remote()) {
        return false;
    }
    let words = error.to_string();
    let data = words.find('{').zip(words.rfind('}')).and_then(|(begin, end)| words.get(begin..=end)).unwrap_or_default();
    announced_reason(&data.replace('\\', "")).is_some_and(|reason| reason.fault() == Fault::Certificate)
}

fn describe(error: &h2::Error) -> String {
    bounded(error.to_string())
}

fn bounded(mut text: String) -> String {
    if let Some((end, _)) = text.char_indices().nth(LONGEST_PROBLEM) {
        text.truncate(end);
    }
    text
}

/// Moves a connection's bytes, and sees to it that a dead one is noticed.
struct Driver {
    connection: Weak<Connection>,
    doubted: Arc<Notify>,
    pool: Weak<Pool>,
    keep_alive: Duration,
    patience: Duration,
    ping_timeout: Duration,
    idle_timeout: Duration,
}

/// How finely the time is measured for which pushes have been without an answer: it is exceeded by one such part at most.
const PARTS: u32 = 10;

impl Driver {
    async fn drive(self, mut wire: Wire, mut pings: PingPong) {
        let mut tick = tokio::time::interval_at(Instant::now() + self.keep_alive, self.keep_alive);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let part = self.patience / PARTS;
        let mut watch = tokio::time::interval_at(Instant::now() + part, part);
        watch.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut heard, mut unanswered) = (0, 0);
        let mut pong_due: Option<Instant> = None;
        let mut answers = 0;
        let mut idle = Duration::ZERO;
        let end = loop {
            let ask = tokio::select! {
                ended = &mut wire => break ended.err().map_or_else(|| Retirement::Ended("the connection was closed".into()), |error| retirement(&error)),
                () = self.doubted.notified(), if pong_due.is_none() => true,
                _ = tick.tick() => {
                    // Without holders it ends by itself, unless its last bytes are stuck.
                    let Some(connection) = self.connection.upgrade() else { return };
                    let now = connection.answers.load(Ordering::Relaxed);
                    if now != answers || connection.in_flight() > 0 {
                        idle = Duration::ZERO;
                    } else {
                        idle += self.keep_alive;
                    }
                    if idle >= self.idle_timeout {
                        self.retire(&Retirement::Idle);
                        continue;
                    }
                    std::mem::replace(&mut answers, now) == now && pong_due.is_none()
                }
                _ = watch.tick() => {
                    let waits = self.connection.upgrade().filter(|connection| connection.in_flight() > 0);
                    let now = waits.map(|connection| connection.answers.load(Ordering::Relaxed));
                    unanswered = if now == Some(heard) { unanswered + 1 } else { 0 };
                    heard = now.unwrap_or(heard);
                    let is_too_long = unanswered >= PARTS && pong_due.is_none();
                    if is_too_long {
                        unanswered = 0;
                    }
                    is_too_long
                }
                pong = poll_fn(|context| pings.poll_pong(context)), if pong_due.is_some() => {
                    if let Err(error) = pong {
                        break retirement(&error);
                    }
                    pong_due = None;
                    false
                }
                () = tokio::time::sleep_until(pong_due.unwrap_or_else(Instant::now)), if pong_due.is_some() => {
                    break Retirement::Ended(format!("no answer to a PING within {:?}", self.ping_timeout));
                }
            };
            if ask {
                if let Err(error) = pings.send_ping(Ping::opaque()) {
                    break retirement(&error);
                }
                pong_due = Some(Instant::now() + self.ping_timeout);
            }
        };
        self.retire(&end);
    }

    fn retire(&self, why: &Retirement) {
        if let (Some(pool), Some(connection)) = (self.pool.upgrade(), self.connection.upgrade()) {
            pool.retire(&connection, why);
        }
    }
}
