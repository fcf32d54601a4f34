//! What the service knows: its devices, what arrived, and what is to go wrong.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::request;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::request::{Client, Push, check};
use super::rules::{Answer, Effect, Rules};

/// Wake-ups that a device has not looked at yet; one more would tell it nothing new.
const WAKE_UPS: usize = 16;
const MOST_COMPLAINTS: usize = 100;

/// A push that reached its device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WakeUp {
    /// What the device compares with its own; without it, it ignores the push.
    pub magic: Option<String>,
    /// The push's id.
    pub apns_id: Option<String>,
}

/// A device that listens. Dropping it means that it is away.
#[derive(Debug)]
pub struct WakeUps {
    receiver: mpsc::Receiver<WakeUp>,
}

impl WakeUps {
    /// The next push; `None` once the service has stopped or another listens to the token.
    pub async fn next(&mut self) -> Option<WakeUp> {
        self.receiver.recv().await
    }

    /// A push that is there already.
    pub fn try_next(&mut self) -> Option<WakeUp> {
        self.receiver.try_recv().ok()
    }
}

/// A request as it arrived.
#[derive(Debug, Clone)]
pub struct Received {
    /// Since the service began.
    pub at: Duration,
    /// Which connection, counted from 1.
    pub connection: u64,
    /// The client certificate's serial number, upper-case hexadecimal.
    pub serial: String,
    /// The method.
    pub method: String,
    /// The path.
    pub path: String,
    /// Names and values in their order; pseudo-headers are not among them.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Bytes,
    /// The device's token, where the request is in order.
    pub token: Option<Vec<u8>>,
    /// The push magic, where the body is in order.
    pub magic: Option<String>,
    /// Whether the push went to the device, or is kept for it.
    pub delivered: bool,
    /// The answer's status; `None` if it got none.
    pub status: Option<u16>,
}

impl Received {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(one, _)| one == name).map(|(_, value)| value.as_str())
    }
}

/// Counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// Connections that came through TLS.
    pub connections: u64,
    /// TLS handshakes that failed.
    pub failed_handshakes: u64,
    /// Requests that arrived whole.
    pub requests: u64,
    /// Pushes that went to their device, or are kept for it.
    pub delivered: u64,
    /// Answers by status and reason; 200 has none.
    pub answers: BTreeMap<(u16, String), u64>,
    /// Requests at once at most.
    pub most_at_once: u64,
}

#[derive(Debug, Default)]
struct Token {
    topic: Option<String>,
    gone_at: Option<i64>,
    listener: Option<mpsc::Sender<WakeUp>>,
    kept: Option<WakeUp>,
}

#[derive(Debug)]
pub(super) struct Service {
    pub(super) max_concurrent_streams: u32,
    pub(super) go_away_after: Option<u32>,
    latency: AtomicU64,
    remembered: usize,
    strict: bool,
    begin: Instant,
    rules: Mutex<Rules>,
    tokens: Mutex<HashMap<Vec<u8>, Token>>,
    received: Mutex<Vec<Received>>,
    complaints: Mutex<Vec<String>>,
    counters: Mutex<Counters>,
    at_once: AtomicU64,
}

/// What is to be done with one request.
#[derive(Debug)]
pub(super) struct Verdict {
    /// Where it stands in the record, if it does.
    pub(super) number: Option<usize>,
    pub(super) action: Action,
    pub(super) delay: Duration,
}

#[derive(Debug)]
pub(super) enum Action {
    Accept { then_go_away: bool },
    Refuse(Answer),
    Silence,
    RefuseStream,
    Dismiss(String),
    Cut,
}

impl Service {
    pub(super) fn new(max_concurrent_streams: u32, go_away_after: Option<u32>, latency: Duration, remembered: usize, strict: bool) -> Self {
        let service = Self {
            max_concurrent_streams,
            go_away_after,
            latency: AtomicU64::new(0),
            remembered,
            strict,
            begin: Instant::now(),
            rules: Mutex::default(),
            tokens: Mutex::default(),
            received: Mutex::default(),
            complaints: Mutex::default(),
            counters: Mutex::default(),
            at_once: AtomicU64::new(0),
        };
        service.set_latency(latency);
        service
    }

    pub(super) fn rules(&self) -> MutexGuard<'_, Rules> {
        self.rules.lock()
    }

    pub(super) fn set_latency(&self, latency: Duration) {
        self.latency.store(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(super) fn received(&self) -> Vec<Received> {
        self.received.lock().clone()
    }

    pub(super) fn complaints(&self) -> Vec<String> {
        self.complaints.lock().clone()
    }

    pub(super) fn counters(&self) -> Counters {
        self.counters.lock().clone()
    }

    pub(super) fn register(&self, token: &[u8], topic: &str) {
        let mut tokens = self.tokens.lock();
        let known = tokens.entry(token.to_vec()).or_default();
        known.topic = Some(topic.to_owned());
        known.gone_at = None;
    }

    pub(super) fn unregister(&self, token: &[u8], at: i64) {
        let mut tokens = self.tokens.lock();
        let known = tokens.entry(token.to_vec()).or_default();
        known.gone_at = Some(at);
        known.listener = None;
        known.kept = None;
    }

    pub(super) fn subscribe(&self, token: &[u8], topic: &str) -> WakeUps {
        let (sender, receiver) = mpsc::channel(WAKE_UPS);
        let mut tokens = self.tokens.lock();
        let known = tokens.entry(token.to_vec()).or_default();
        known.topic = Some(topic.to_owned());
        known.gone_at = None;
        if let Some(kept) = known.kept.take() {
            // The channel is new: it has room.
            let _ = sender.try_send(kept);
        }
        known.listener = Some(sender);
        WakeUps { receiver }
    }

    pub(super) fn connected(&self) -> u64 {
        let mut counters = self.counters.lock();
        counters.connections += 1;
        counters.connections
    }

    pub(super) fn failed_handshake(&self) {
        self.counters.lock().failed_handshakes += 1;
    }

    pub(super) fn begin_request(&self) {
        let now = self.at_once.fetch_add(1, Ordering::Relaxed) + 1;
        let mut counters = self.counters.lock();
        counters.most_at_once = counters.most_at_once.max(now);
    }

    pub(super) fn end_request(&self) {
        self.at_once.fetch_sub(1, Ordering::Relaxed);
    }

    pub(super) fn answered(&self, number: Option<usize>, status: u16, reason: &str) {
        *self.counters.lock().answers.entry((status, reason.to_owned())).or_default() += 1;
        if let Some(number) = number
            && let Some(received) = self.received.lock().get_mut(number)
        {
            received.status = Some(status);
        }
    }

    /// Decides, delivers and records.
    pub(super) fn judge(&self, client: &Client, connection: u64, head: &request::Parts, body: &Bytes) -> Verdict {
        self.counters.lock().requests += 1;
        let mut delay = Duration::from_micros(self.latency.load(Ordering::Relaxed));
        let checked = check(client, head, body);
        let action = match &checked {
            Err(answer) => Action::Refuse(answer.clone()),
            Ok(push) => {
                let effect = self.rules.lock().apply(&push.token, &push.topic);
                match effect {
                    Some(Effect::Answer(answer)) => Action::Refuse(answer),
                    Some(Effect::RefuseStream) => Action::RefuseStream,
                    Some(Effect::Dismiss(reason)) => Action::Dismiss(reason),
                    Some(other) => match self.deliver(push, head) {
                        Some(refusal) => Action::Refuse(refusal),
                        None => match other {
                            Effect::Silence => Action::Silence,
                            Effect::Cut => Action::Cut,
                            Effect::Delay(longer) => {
                                delay += longer;
                                Action::Accept { then_go_away: false }
                            }
                            _ => Action::Accept { then_go_away: true },
                        },
                    },
                    None => self.deliver(push, head).map_or(Action::Accept { then_go_away: false }, Action::Refuse),
                }
            }
        };
        let delivered = matches!(action, Action::Accept { .. } | Action::Silence | Action::Cut);
        if delivered {
            self.counters.lock().delivered += 1;
        }
        if let Ok(push) = &checked {
            self.complain(&push.complaints);
        }
        Verdict { number: self.record(client, connection, head, body, checked.ok(), delivered), action, delay }
    }

    /// Wakes the device, or says why not.
    fn deliver(&self, push: &Push, head: &request::Parts) -> Option<Answer> {
        let mut tokens = self.tokens.lock();
        let Some(token) = tokens.get_mut(&push.token) else {
            return self.strict.then(|| Answer::new(400, "BadDeviceToken"));
        };
        if let Some(at) = token.gone_at {
            return Some(Answer::unregistered(at));
        }
        if token.topic.as_ref().is_some_and(|topic| *topic != push.topic) {
            return Some(Answer::new(400, "DeviceTokenNotForTopic"));
        }
        let apns_id = head.headers.get("apns-id").and_then(|id| id.to_str().ok()).map(str::to_owned);
        let wake_up = WakeUp { magic: push.magic.clone(), apns_id };
        let away = match &token.listener {
            // One that has not looked at the last sixteen comes anyway.
            Some(listener) => matches!(listener.try_send(wake_up.clone()), Err(mpsc::error::TrySendError::Closed(_))),
            None => true,
        };
        // Only the last one is kept, as Apple does.
        if away && push.is_kept {
            token.kept = Some(wake_up);
        }
        None
    }

    fn complain(&self, found: &[&'static str]) {
        if found.is_empty() {
            return;
        }
        let mut complaints = self.complaints.lock();
        for complaint in found {
            if complaints.len() < MOST_COMPLAINTS && !complaints.iter().any(|one| one == complaint) {
                complaints.push((*complaint).to_owned());
            }
        }
    }

    fn record(&self, client: &Client, connection: u64, head: &request::Parts, body: &Bytes, push: Option<Push>, delivered: bool) -> Option<usize> {
        if self.remembered == 0 {
            return None;
        }
        let mut received = self.received.lock();
        if received.len() >= self.remembered {
            return None;
        }
        let (token, magic) = push.map_or((None, None), |push| (Some(push.token), push.magic));
        received.push(Received {
            at: self.begin.elapsed(),
            connection,
            serial: client.serial.clone(),
            method: head.method.to_string(),
            path: head.uri.path().to_owned(),
            headers: head.headers.iter().map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned())).collect(),
            body: body.clone(),
            token,
            magic,
            delivered,
            status: None,
        });
        Some(received.len() - 1)
    }
}

/// Counts a request for as long as it lives.
pub(super) struct AtOnce(Arc<Service>);

impl AtOnce {
    pub(super) fn begin(service: &Arc<Service>) -> Self {
        service.begin_request();
        Self(Arc::clone(service))
    }
}

impl Drop for AtOnce {
    fn drop(&mut self) {
        self.0.end_request();
    }
}
