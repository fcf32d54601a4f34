//! The connections of one topic: which of them carries the next push, when another is opened, and with which certificate.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rustls::ClientConfig;
use rustls::sign::SingleCertAndKey;
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::{debug, info, warn};
use wasmdm_protocol::time::Timestamp;

use crate::client::{ClientCertificate, Shared};
use crate::connection::{Connection, OpenError};
use crate::outcome::Failure;

/// How a topic is doing, for metrics and for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicState {
    /// The topic.
    pub topic: String,
    /// Which of its certificates is in use.
    pub version: i64,
    /// When that certificate ends.
    pub not_after: Timestamp,
    /// Open connections; those of an earlier certificate that still end their pushes are not counted.
    pub connections: usize,
    /// Pushes that these carry.
    pub in_flight: usize,
    /// Pushes that wait for their turn.
    pub waiting: usize,
    /// Why there is no connection, while that is so.
    pub failure: Option<Failure>,
}

pub(crate) struct Pool {
    shared: Arc<Shared>,
    topic: Arc<str>,
    state: Mutex<State>,
    waiting: AtomicUsize,
    changed: Notify,
}

struct State {
    certificate: ClientCertificate,
    config: Option<Arc<ClientConfig>>,
    connections: Vec<Arc<Connection>>,
    /// The attempt under way, by its number.
    opening: Option<u64>,
    attempts: u64,
    /// The last attempt that failed.
    failed: u64,
    /// How often in a row no useful connection came about.
    failures: u32,
    not_before: Option<Instant>,
    failure: Option<Failure>,
    closed: bool,
}

impl State {
    /// How long until the next attempt.
    fn pause(&self) -> Duration {
        self.not_before.map_or(Duration::ZERO, |at| at.saturating_duration_since(Instant::now()))
    }
}

/// Why a connection carries no further pushes.
#[derive(Debug)]
pub(crate) enum Retirement {
    /// It broke, or the service said that it will close it.
    Ended(String),
    /// The service answered that it is going away.
    Shutdown(String),
    /// The service closed it because of the push certificate.
    Dismissed(String),
    /// Nobody needed it.
    Idle,
}

/// The right to send one push on a connection.
pub(crate) struct Lease {
    connection: Arc<Connection>,
    pool: Arc<Pool>,
}

impl Lease {
    pub(crate) const fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.connection.end();
        if self.pool.waiting.load(Ordering::SeqCst) > 0 {
            self.pool.changed.notify_one();
        }
    }
}

/// Counts one that waits.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Pool {
    pub(crate) fn new(shared: Arc<Shared>, certificate: &ClientCertificate) -> Self {
        Self {
            shared,
            topic: certificate.topic().into(),
            state: Mutex::new(State {
                certificate: certificate.clone(),
                config: None,
                connections: Vec::new(),
                opening: None,
                attempts: 0,
                failed: 0,
                failures: 0,
                not_before: None,
                failure: None,
                closed: false,
            }),
            waiting: AtomicUsize::new(0),
            changed: Notify::new(),
        }
    }

    /// Waits for a place on a connection. Fails with the attempt that it waits for, and at once between attempts, so that callers do not
    /// pile up behind a service that is not there.
    pub(crate) async fn acquire(self: &Arc<Self>, certificate: &ClientCertificate) -> Result<Lease, Failure> {
        let mut awaited = None;
        if let Some(lease) = self.try_acquire(certificate, &mut awaited)? {
            return Ok(lease);
        }
        let waiting = self.waiting.fetch_add(1, Ordering::SeqCst);
        let _waiting = Waiting(&self.waiting);
        if waiting >= self.shared.options.waiting_per_topic {
            return Err(Failure::Overloaded { waiting });
        }
        loop {
            // Listening before looking: a place that is given back in between is not missed.
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            if let Some(lease) = self.try_acquire(certificate, &mut awaited)? {
                return Ok(lease);
            }
            changed.await;
        }
    }

    fn try_acquire(self: &Arc<Self>, certificate: &ClientCertificate, awaited: &mut Option<u64>) -> Result<Option<Lease>, Failure> {
        let mut state = self.state.lock();
        if state.closed {
            return Err(Failure::Closed);
        }
        if certificate.version() > state.certificate.version() {
            self.swap(&mut state, certificate);
        }
        let free = state.connections.iter().filter(|connection| connection.has_room()).min_by_key(|connection| connection.in_flight());
        if let Some(connection) = free {
            connection.begin();
            return Ok(Some(Lease { connection: Arc::clone(connection), pool: Arc::clone(self) }));
        }
        if state.connections.is_empty()
            && let Some(failure) = &state.failure
        {
            let pause = state.pause();
            if !pause.is_zero() || awaited.is_some_and(|attempt| attempt <= state.failed) {
                return Err(failure.clone().with_retry_after(pause));
            }
        }
        if state.opening.is_none() && state.connections.len() < self.shared.options.connections_per_topic && state.pause().is_zero() {
            self.start(&mut state);
        }
        if awaited.is_none() {
            *awaited = state.opening;
        }
        Ok(None)
    }

    /// From here on the newer certificate; connections of the older one end with what they carry.
    fn swap(&self, state: &mut State, certificate: &ClientCertificate) {
        info!(
            topic = &*self.topic,
            from = state.certificate.version(),
            to = certificate.version(),
            "Pushes of topic {} go out with a new certificate",
            self.topic
        );
        state.certificate = certificate.clone();
        state.config = None;
        state.connections.clear();
        state.opening = None;
        state.failures = 0;
        state.not_before = None;
        state.failure = None;
    }

    fn start(self: &Arc<Self>, state: &mut State) {
        state.attempts += 1;
        let attempt = state.attempts;
        let config = match self.config(state) {
            Ok(config) => config,
            Err(error) => {
                state.failed = attempt;
                return self.fail(state, Failure::CertificateRefused { problem: error.to_string(), retry_after: Duration::ZERO });
            }
        };
        state.opening = Some(attempt);
        let (pool, version) = (Arc::clone(self), state.certificate.version());
        self.shared.tasks.spawn(async move {
            let opened = Connection::open(&pool.shared, config, version, Arc::downgrade(&pool)).await;
            pool.finish(attempt, opened);
        });
    }

    /// One for each certificate, so that TLS sessions are resumed only under the certificate that began them.
    fn config(&self, state: &mut State) -> Result<Arc<ClientConfig>, rustls::Error> {
        if let Some(config) = &state.config {
            return Ok(Arc::clone(config));
        }
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&self.shared.provider))
            .with_safe_default_protocol_versions()?
            .with_webpki_verifier(Arc::clone(&self.shared.verifier))
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(state.certificate.key())));
        config.alpn_protocols = vec![b"h2".to_vec()];
        let config = Arc::new(config);
        state.config = Some(Arc::clone(&config));
        Ok(config)
    }

    fn finish(&self, attempt: u64, opened: Result<Arc<Connection>, OpenError>) {
        let mut state = self.state.lock();
        // A newer certificate came meanwhile, or the topic was closed: this connection is nobody's.
        if state.opening != Some(attempt) {
            return;
        }
        state.opening = None;
        if opened.is_err() {
            state.failed = attempt;
        }
        match opened {
            Ok(connection) => {
                debug!(topic = &*self.topic, "Connected to {} for topic {}", self.shared.authority, self.topic);
                state.connections.push(connection);
            }
            Err(OpenError { problem, certificate: true }) => {
                self.fail(&mut state, Failure::CertificateRefused { problem, retry_after: Duration::ZERO });
            }
            Err(OpenError { problem, certificate: false }) => {
                let endpoint = self.shared.authority.clone();
                self.fail(&mut state, Failure::Unreachable { endpoint, problem, retry_after: Duration::ZERO });
            }
        }
        drop(state);
        self.changed.notify_waiters();
    }

    /// Remembers why, and when to try again.
    fn fail(&self, state: &mut State, failure: Failure) {
        let options = &self.shared.options;
        let longest = options.shortest_backoff.saturating_mul(2_u32.saturating_pow(state.failures)).min(options.longest_backoff);
        let pause = longest.mul_f64(0.5 + (options.jitter)().clamp(0.0, 1.0) / 2.0);
        state.failures = state.failures.saturating_add(1);
        state.not_before = Some(Instant::now() + pause);
        // Once in a row is enough for the log; how it goes on is in the state.
        if state.failures == 1 {
            warn!(topic = &*self.topic, "No pushes of topic {} for now: {failure}", self.topic);
        }
        state.failure = Some(failure);
    }

    /// The connection answered sensibly: earlier failures are over.
    pub(crate) fn prove(&self, connection: &Connection) {
        if connection.prove() {
            let mut state = self.state.lock();
            if state.failures > 0 {
                info!(topic = &*self.topic, "Pushes of topic {} go out again", self.topic);
            }
            state.failures = 0;
            state.not_before = None;
            state.failure = None;
        }
    }

    /// No further pushes on this connection. It ends with those that it carries. If it never did any good, the next one waits.
    pub(crate) fn retire(&self, connection: &Arc<Connection>, why: &Retirement) {
        let mut state = self.state.lock();
        let before = state.connections.len();
        state.connections.retain(|one| !Arc::ptr_eq(one, connection));
        let was_in_use = state.connections.len() < before;
        // The end of a connection may be noticed before its reason is: this reason is worth telling late, once, of the current certificate.
        let is_news = matches!(why, Retirement::Dismissed(_))
            && connection.version() == state.certificate.version()
            && state.connections.is_empty()
            && !matches!(state.failure, Some(Failure::CertificateRefused { .. }));
        if !was_in_use && !is_news {
            return;
        }
        debug!(topic = &*self.topic, ?why, "A connection for topic {} is given up", self.topic);
        let failure = match why {
            Retirement::Idle => None,
            Retirement::Ended(_) | Retirement::Shutdown(_) if connection.is_proved() => None,
            Retirement::Dismissed(problem) => Some(Failure::CertificateRefused { problem: problem.clone(), retry_after: Duration::ZERO }),
            Retirement::Shutdown(problem) => Some(Failure::Refused { problem: problem.clone(), retry_after: Duration::ZERO }),
            Retirement::Ended(problem) => {
                Some(Failure::Unreachable { endpoint: self.shared.authority.clone(), problem: problem.clone(), retry_after: Duration::ZERO })
            }
        };
        if let Some(failure) = failure {
            self.fail(&mut state, failure);
        }
        drop(state);
        self.changed.notify_waiters();
    }

    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.opening = None;
        state.connections.clear();
        drop(state);
        self.changed.notify_waiters();
    }

    pub(crate) fn topic_state(&self) -> TopicState {
        let state = self.state.lock();
        let failing = state.connections.is_empty();
        TopicState {
            topic: self.topic.to_string(),
            version: state.certificate.version(),
            not_after: state.certificate.not_after(),
            connections: state.connections.len(),
            in_flight: state.connections.iter().map(|connection| connection.in_flight()).sum(),
            waiting: self.waiting.load(Ordering::SeqCst),
            failure: state.failure.clone().filter(|_| failing).map(|failure| failure.with_retry_after(state.pause())),
        }
    }
}
