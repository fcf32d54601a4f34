//! A push service as faithful as need be: TLS with client certificates, HTTP/2, Apple's checks and reasons, and everything that goes
//! wrong there on demand. Devices subscribe to their tokens and are woken.
//!
//! It runs on a thread of its own, so that its CPU time can be told from that of the server under test. Start at [`FakeApns`]; what goes
//! wrong is a [`Rule`].

mod authority;
mod connection;
mod frames;
mod request;
mod rules;
mod service;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

pub use authority::{IssuedPushCertificate, PushAuthority, PushCertificateRequest};
pub use rules::{Answer, Effect, Rule};
pub use service::{Counters, Received, WakeUp, WakeUps};

use crate::error::SimulatorError;
use crate::measure::thread_cpu;
use service::Service;

/// How the service is set up; what is wrong with single pushes is a matter of [`Rule`]s.
#[derive(Debug, Clone)]
pub struct FakeApnsOptions {
    /// Where it listens. Port 0 is any free one.
    pub address: SocketAddr,
    /// Who issued its certificate and vouches for push certificates; a new one if there is none.
    pub authority: Option<Arc<PushAuthority>>,
    /// The names in its certificate, the first of which [`FakeApns::endpoint`] gives.
    pub names: Vec<String>,
    /// How many streams it allows on a connection. Apple allows about 1,000.
    pub max_concurrent_streams: u32,
    /// How long an answer takes.
    pub latency: Duration,
    /// After so many requests a connection gets a GOAWAY; those that come later on it are not processed.
    pub go_away_after: Option<u32>,
    /// How many requests are remembered. The latest make way for none: what is beyond is only counted.
    pub remembered: usize,
    /// Whether only tokens that were made known are devices; else every token is one.
    pub strict: bool,
}

impl Default for FakeApnsOptions {
    fn default() -> Self {
        Self {
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            authority: None,
            names: vec!["localhost".into(), "127.0.0.1".into()],
            max_concurrent_streams: 1_000,
            latency: Duration::ZERO,
            go_away_after: None,
            remembered: 10_000,
            strict: false,
        }
    }
}

/// A running push service. Dropping it stops it and cuts its connections.
#[derive(Debug)]
pub struct FakeApns {
    address: SocketAddr,
    name: String,
    authority: Arc<PushAuthority>,
    service: Arc<Service>,
    stop: CancellationToken,
    thread_id: i32,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl FakeApns {
    /// Starts one with the defaults.
    pub fn start() -> Result<Self, SimulatorError> {
        Self::start_with(FakeApnsOptions::default())
    }

    /// Starts one.
    pub fn start_with(options: FakeApnsOptions) -> Result<Self, SimulatorError> {
        let failed = |error| SimulatorError::io("push service", error);
        let authority = match options.authority {
            Some(authority) => authority,
            None => Arc::new(PushAuthority::new()?),
        };
        let tls = authority.server_config(&options.names)?;
        let listener = std::net::TcpListener::bind(options.address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let stop = CancellationToken::new();
        let service =
            Arc::new(Service::new(options.max_concurrent_streams, options.go_away_after, options.latency, options.remembered, options.strict));
        let (started, starting) = std::sync::mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("fake-apns".into())
            .spawn({
                let (stop, service) = (stop.clone(), Arc::clone(&service));
                move || {
                    // Whoever waits for the id may be gone already; then nobody needs it.
                    let _ = started.send(thread_id());
                    runtime.block_on(serve(listener, TlsAcceptor::from(tls), service, stop));
                }
            })
            .map_err(failed)?;
        let thread_id = starting.recv().map_err(|_| failed(std::io::Error::other("the thread ended at once")))?;
        let name = options.names.into_iter().next().unwrap_or_else(|| "localhost".into());
        Ok(Self { address, name, authority, service, stop, thread_id, thread: Some(thread) })
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Host and port as a server is configured with them.
    pub fn endpoint(&self) -> String {
        format!("{}:{}", self.name, self.address.port())
    }

    /// What a server must believe to believe that this is the push service.
    pub fn root_pem(&self) -> String {
        self.authority.root_pem()
    }

    /// Who issues push certificates.
    pub const fn authority(&self) -> &Arc<PushAuthority> {
        &self.authority
    }

    /// Adds a rule; the first that fits a push is applied.
    pub fn add_rule(&self, rule: Rule) {
        self.service.rules().push(rule);
    }

    /// Forgets all rules.
    pub fn clear_rules(&self) {
        self.service.rules().clear();
    }

    /// From now on answers take so long.
    pub fn set_latency(&self, latency: Duration) {
        self.service.set_latency(latency);
    }

    /// Makes a device's token known, with its topic. Pushes of other topics to it are refused.
    pub fn register(&self, token: &[u8], topic: &str) {
        self.service.register(token, topic);
    }

    /// The device left: pushes to its token are answered 410 with this time, in milliseconds since 1970.
    pub fn unregister(&self, token: &[u8], at: i64) {
        self.service.unregister(token, at);
    }

    /// The device is there: it is woken by pushes to its token, and by the one that was kept for it while it was away. The token is made
    /// known with its topic.
    pub fn subscribe(&self, token: &[u8], topic: &str) -> WakeUps {
        self.service.subscribe(token, topic)
    }

    /// The requests that arrived, in the order of their arrival, up to the number that is remembered.
    pub fn received(&self) -> Vec<Received> {
        self.service.received()
    }

    /// What no careful server does, though Apple might take it: the first of each kind of words, at most a hundred.
    pub fn complaints(&self) -> Vec<String> {
        self.service.complaints()
    }

    /// Counts so far.
    pub fn counters(&self) -> Counters {
        self.service.counters()
    }

    /// CPU time of its thread so far, where the operating system tells.
    pub fn cpu(&self) -> Option<Duration> {
        thread_cpu(self.thread_id)
    }
}

impl Drop for FakeApns {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            // It only panics if a bug is in it, and then there is nothing to clean up.
            let _ = thread.join();
        }
    }
}

#[cfg(target_os = "linux")]
fn thread_id() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}

#[cfg(not(target_os = "linux"))]
fn thread_id() -> i32 {
    0
}

async fn serve(listener: std::net::TcpListener, acceptor: TlsAcceptor, service: Arc<Service>, stop: CancellationToken) {
    let Ok(listener) = TcpListener::from_std(listener) else {
        return;
    };
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                // Only speed suffers without it.
                let _ = stream.set_nodelay(true);
                connections.spawn(connection::serve(Arc::clone(&service), acceptor.clone(), stream));
            }
            Some(_) = connections.join_next() => {}
        }
    }
    connections.shutdown().await;
}
