//! The client: one pool of connections for each topic, and the life of one push.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::CertifiedKey;
use tokio::time::{Instant, timeout_at};
use tokio_util::task::TaskTracker;
use wasmdm_protocol::time::Timestamp;

use crate::connection::Exchange;
use crate::notification::Notification;
use crate::outcome::{Failure, Outcome};
use crate::pool::{Pool, Retirement, TopicState};
use crate::push_certificate::{PushCertificateError, PushCertificatePair};
use crate::reaching::Proxy;

/// How often a push that the service did not process is sent again before the caller is asked.
const MOST_RESENDS: usize = 5;
/// When to try again after that.
const REFUSED: Duration = Duration::from_secs(5);

/// Where the push service is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    host: String,
    port: u16,
}

impl Endpoint {
    /// `HOST` or `HOST:PORT`; without a port it is 443. Apple also listens on 2197, for firewalls that treat 443 specially.
    pub fn parse(text: &str) -> Result<Self, SetUpError> {
        let wrong = || SetUpError::Endpoint(text.chars().take(100).flat_map(char::escape_default).collect());
        let authority: http::uri::Authority = text.parse().map_err(|_| wrong())?;
        let port = match authority.port() {
            Some(port) => port.as_u16(),
            None if authority.as_str() == authority.host() => 443,
            None => return Err(wrong()),
        };
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        if authority.as_str().contains('@') || port == 0 || ServerName::try_from(host.as_str()).is_err() {
            return Err(wrong());
        }
        Ok(Self { host, port })
    }

    /// The name that its certificate must have.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The TCP port.
    pub const fn port(&self) -> u16 {
        self.port
    }
}

/// Apple's, for devices in production: that is all managed devices.
impl Default for Endpoint {
    fn default() -> Self {
        Self { host: "api.push.apple.com".into(), port: 443 }
    }
}

/// As it stands in `:authority`.
impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.host.contains(':'), self.port) {
            (true, 443) => write!(f, "[{}]", self.host),
            (true, port) => write!(f, "[{}]:{port}", self.host),
            (false, 443) => f.write_str(&self.host),
            (false, port) => write!(f, "{}:{port}", self.host),
        }
    }
}

/// Whom to believe that the service is the service.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Roots {
    /// Mozilla's list, which is compiled in. Apple's service is under it.
    #[default]
    Mozilla,
    /// These certificates, PEM, and no others.
    Pem(String),
}

/// A number in `0.0..1.0`, for the jitter of connection attempts.
pub type Jitter = Arc<dyn Fn() -> f64 + Send + Sync>;

/// How to reach the service, and the bounds.
#[derive(Clone)]
pub struct ApnsOptions {
    /// Where the service is.
    pub endpoint: Endpoint,
    /// Whom to believe.
    pub roots: Roots,
    /// Through whom, if not straight.
    pub proxy: Option<Proxy>,
    /// A topic's connections at most. A further one is only opened when the others carry as many pushes as the service allows.
    pub connections_per_topic: usize,
    /// Pushes at once on one connection at most, if the service allows so many. Apple's limit is about 1,000.
    pub streams_per_connection: usize,
    /// Pushes of a topic that may wait for their turn; more are refused at once.
    pub waiting_per_topic: usize,
    /// How long a push may take, waiting for its turn included.
    pub push_timeout: Duration,
    /// How long opening a connection may take, from resolving the name to the service's first word.
    pub connect_timeout: Duration,
    /// After this time without an answer, a PING asks whether the other side is still there.
    pub keep_alive: Duration,
    /// While pushes are under way, a PING asks already after this time without an answer: a connection that is dead in the middle of work is
    /// noticed within this, a tenth of it, and [`Self::ping_timeout`].
    pub patience: Duration,
    /// How long the PING's answer may take.
    pub ping_timeout: Duration,
    /// A connection that carried no push for so long is closed, at the next PING's time.
    pub idle_timeout: Duration,
    /// The pause after the first failed connection attempt; it doubles with each further one.
    pub shortest_backoff: Duration,
    /// The longest such pause.
    pub longest_backoff: Duration,
    /// Pauses are between half and the whole of what they would be.
    pub jitter: Jitter,
}

impl ApnsOptions {
    /// Apple's service, with bounds that suit it.
    pub fn new(jitter: Jitter) -> Self {
        Self {
            endpoint: Endpoint::default(),
            roots: Roots::default(),
            proxy: None,
            connections_per_topic: 4,
            streams_per_connection: 1_000,
            waiting_per_topic: 10_000,
            push_timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(10),
            keep_alive: Duration::from_mins(1),
            patience: Duration::from_secs(5),
            ping_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_mins(30),
            shortest_backoff: Duration::from_millis(250),
            longest_backoff: Duration::from_mins(1),
            jitter,
        }
    }
}

impl fmt::Debug for ApnsOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApnsOptions").field("endpoint", &self.endpoint).field("roots", &self.roots).finish_non_exhaustive()
    }
}

/// What is wrong with the options.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SetUpError {
    /// Not a host with or without a port.
    #[error("endpoint: `{0}` is not HOST or HOST:PORT")]
    Endpoint(String),
    /// Not certificates.
    #[error("roots: {0}")]
    Roots(String),
    /// Not a proxy that can be used. The text is not repeated: it may hold a password.
    #[error("proxy: {0}")]
    Proxy(&'static str),
    /// Zero where at least one is needed.
    #[error("{0}: at least 1 is needed")]
    Zero(&'static str),
    /// The library's words.
    #[error("TLS: {0}")]
    Tls(String),
}

/// A topic's certificate, ready for use. Cheap to clone.
#[derive(Clone)]
pub struct ClientCertificate {
    topic: Arc<str>,
    version: i64,
    not_after: Timestamp,
    key: Arc<CertifiedKey>,
}

impl ClientCertificate {
    /// From PEM as storage keeps it, with the number that tells a renewed certificate from the one before: the higher one is used.
    pub fn new(certificate_pem: &str, private_key_pem: &str, version: i64) -> Result<Self, PushCertificateError> {
        let pair = PushCertificatePair::from_pem(format!("{certificate_pem}\n{private_key_pem}").as_bytes(), None)?;
        let certificate = CertificateDer::from_pem_slice(pair.certificate_pem.as_bytes()).map_err(|_| PushCertificateError::UnreadableCertificate)?;
        let key = PrivateKeyDer::from_pem_slice(pair.private_key_pem.as_bytes()).map_err(|_| PushCertificateError::UnreadableKey)?;
        let key = CertifiedKey::from_der(vec![certificate], key, &provider()).map_err(|_| PushCertificateError::UnreadableKey)?;
        Ok(Self { topic: pair.topic.into(), version, not_after: pair.not_after, key: Arc::new(key) })
    }

    /// Whose it is.
    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// Which of the topic's certificates it is.
    pub const fn version(&self) -> i64 {
        self.version
    }

    /// When it ends.
    pub const fn not_after(&self) -> Timestamp {
        self.not_after
    }

    pub(crate) fn key(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.key)
    }
}

/// Without the key.
impl fmt::Debug for ClientCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientCertificate").field("topic", &self.topic).field("version", &self.version).finish_non_exhaustive()
    }
}

/// What all pools share.
pub(crate) struct Shared {
    pub(crate) options: ApnsOptions,
    pub(crate) authority: String,
    pub(crate) server_name: ServerName<'static>,
    pub(crate) provider: Arc<CryptoProvider>,
    pub(crate) verifier: Arc<WebPkiServerVerifier>,
    pub(crate) tasks: TaskTracker,
}

/// Sends pushes. Cheap to clone; all clones share their connections.
///
/// It connects straight to the endpoint, or through [`ApnsOptions::proxy`]: variables such as `HTTPS_PROXY` are not looked at here.
#[derive(Clone)]
pub struct Apns {
    shared: Arc<Shared>,
    pools: Arc<Mutex<Pools>>,
}

#[derive(Default)]
struct Pools {
    // As many as there are topics with certificates.
    by_topic: HashMap<Arc<str>, Arc<Pool>>,
    closed: bool,
}

impl fmt::Debug for Apns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Apns").field("endpoint", &self.shared.authority).finish_non_exhaustive()
    }
}

impl Apns {
    /// A client; nothing is opened yet.
    pub fn new(options: ApnsOptions) -> Result<Self, SetUpError> {
        for (name, value) in [
            ("connections_per_topic", options.connections_per_topic),
            ("streams_per_connection", options.streams_per_connection),
            ("waiting_per_topic", options.waiting_per_topic),
        ] {
            if value == 0 {
                return Err(SetUpError::Zero(name));
            }
        }
        let provider = provider();
        let roots = Arc::new(roots(&options.roots)?);
        let verifier =
            WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider)).build().map_err(|error| SetUpError::Tls(error.to_string()))?;
        let server_name = ServerName::try_from(options.endpoint.host.clone()).map_err(|_| SetUpError::Endpoint(options.endpoint.host.clone()))?;
        let authority = options.endpoint.to_string();
        let shared = Shared { options, authority, server_name, provider, verifier, tasks: TaskTracker::new() };
        Ok(Self { shared: Arc::new(shared), pools: Arc::default() })
    }

    /// Sends one push and says what became of it, within [`ApnsOptions::push_timeout`].
    ///
    /// A push that the service says it did not process is sent again; one whose answer was lost is not, because the device may have been
    /// woken: that is the caller's choice. How many to send at once is the caller's too: what exceeds the bounds waits here.
    ///
    /// A certificate of a higher version than the topic's last is used from now on: new connections are opened with it, and the old ones
    /// end with the pushes that they carry. One of a lower version is taken for the current one.
    pub async fn push(&self, certificate: &ClientCertificate, notification: &Notification) -> Outcome {
        let (head, body) = match notification.request(&self.shared.authority, certificate.topic()) {
            Ok(request) => request,
            Err(unsendable) => return Outcome::Failed(unsendable.into()),
        };
        let Some(pool) = self.pool(certificate) else {
            return Outcome::Failed(Failure::Closed);
        };
        let limit = self.shared.options.push_timeout;
        let deadline = Instant::now() + limit;
        let mut refusal = String::new();
        for _ in 0..=MOST_RESENDS {
            let lease = match timeout_at(deadline, pool.acquire(certificate)).await {
                Ok(Ok(lease)) => lease,
                Ok(Err(failure)) => return Outcome::Failed(failure),
                Err(_) => return Outcome::Failed(Failure::TimedOut { limit, sent: false }),
            };
            let connection = lease.connection();
            match connection.exchange(&head, &body, notification.apns_id, deadline).await {
                Exchange::Answered(outcome) => {
                    match &outcome {
                        Outcome::Rejected(rejection) if rejection.is_shutdown() => {
                            pool.retire(connection, &Retirement::Shutdown(rejection.to_string()));
                        }
                        _ => pool.prove(connection),
                    }
                    return outcome;
                }
                Exchange::Unprocessed { problem, end } => {
                    if let Some(end) = end {
                        pool.retire(connection, &end);
                    }
                    refusal = problem;
                }
                Exchange::Lost(problem) => return Outcome::Failed(Failure::Lost { problem }),
                Exchange::TimedOut => {
                    connection.doubt();
                    return Outcome::Failed(Failure::TimedOut { limit, sent: true });
                }
            }
        }
        Outcome::Failed(Failure::Refused { problem: refusal, retry_after: REFUSED })
    }

    /// How each topic that was pushed to is doing, in the order of their names.
    pub fn topics(&self) -> Vec<TopicState> {
        let mut topics: Vec<_> = self.pools.lock().by_topic.values().map(|pool| pool.topic_state()).collect();
        topics.sort_by(|one, other| one.topic.cmp(&other.topic));
        topics
    }

    /// Lets go of a topic whose certificate was removed. Its connections end with the pushes that they carry.
    pub fn forget(&self, topic: &str) {
        let pool = self.pools.lock().by_topic.remove(topic);
        if let Some(pool) = pool {
            pool.close();
        }
    }

    /// Takes no more pushes, and returns when those under way and their connections have ended: the pushes within
    /// [`ApnsOptions::push_timeout`], a connection that is stuck within [`ApnsOptions::keep_alive`] after them.
    pub async fn close(&self) {
        let pools: Vec<_> = {
            let mut pools = self.pools.lock();
            pools.closed = true;
            pools.by_topic.drain().map(|(_, pool)| pool).collect()
        };
        for pool in pools {
            pool.close();
        }
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }

    fn pool(&self, certificate: &ClientCertificate) -> Option<Arc<Pool>> {
        let mut pools = self.pools.lock();
        if pools.closed {
            return None;
        }
        if let Some(pool) = pools.by_topic.get(certificate.topic()) {
            return Some(Arc::clone(pool));
        }
        let pool = Arc::new(Pool::new(Arc::clone(&self.shared), certificate));
        pools.by_topic.insert(Arc::clone(&certificate.topic), Arc::clone(&pool));
        Some(pool)
    }
}

/// The one that the rest of the server has its cryptography from.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn roots(roots: &Roots) -> Result<RootCertStore, SetUpError> {
    let mut store = RootCertStore::empty();
    match roots {
        Roots::Mozilla => store.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
        Roots::Pem(text) => {
            for certificate in CertificateDer::pem_slice_iter(text.as_bytes()) {
                let certificate = certificate.map_err(|error| SetUpError::Roots(error.to_string()))?;
                store.add(certificate).map_err(|error| SetUpError::Roots(error.to_string()))?;
            }
            if store.is_empty() {
                return Err(SetUpError::Roots("there is no CERTIFICATE block in it".into()));
            }
        }
    }
    Ok(store)
}
