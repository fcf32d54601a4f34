//! Receivers of NanoMDM's webhook, as subscribers of the outbox.
//!
//! What NanoMDM tells its receiver once and forgets is kept here until the receiver has confirmed it with a 2xx: in order per device, tried
//! again with backoff, and a dead letter in the end. Idle polls are the exception: they are told once, from memory, as a poll must not cost
//! a write.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use aws_lc_rs::{digest, hmac};
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use http::{StatusCode, header};
use reqwest::Url;
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_protocol::time::Timestamp;
use wasmdm_service::core::PollListener;
use wasmdm_service::subscriber::{Delivered, Subscriber};
use wasmdm_storage::device_messages::DeviceMessage;
use wasmdm_storage::events::Event;
use wasmdm_storage::outbox::{Delivery, Lease, Subscription};
use wasmdm_storage::{Storage, StorageError};

use crate::outward;

/// The prefix of receivers among subscribers.
pub const PREFIX: &str = "webhook:";
const INTERFACE: &str = "webhook";
/// How topics begin whose events hold secrets.
const WITH_SECRETS: &str = "mdm+secrets.";
const TIMEOUT: Duration = Duration::from_secs(10);

/// Which receivers there are, and what they get.
#[derive(Clone)]
pub struct WebhookOptions {
    /// Each gets everything.
    pub urls: Vec<Url>,
    /// Requests carry an HMAC of the body with this key.
    pub hmac_key: Option<String>,
    /// NanoMDM's topics (`mdm.TokenUpdate`, `mdm.Connect`), reports also by their status (`mdm.Connect:Error`). None: all of them.
    pub topics: Vec<String>,
    /// The messages to the byte, tokens and keys included.
    pub with_secrets: bool,
}

/// The topics that exist.
const TOPICS: [&str; 10] = [
    "mdm.Authenticate",
    "mdm.TokenUpdate",
    "mdm.CheckOut",
    "mdm.UserAuthenticate",
    "mdm.SetBootstrapToken",
    "mdm.GetBootstrapToken",
    "mdm.DeclarativeManagement",
    "mdm.GetToken",
    "mdm.ReturnToService",
    "mdm.Connect",
];

/// Whether it is a topic that a receiver can ask for.
pub fn is_topic(topic: &str) -> bool {
    TOPICS.contains(&topic) || topic.strip_prefix("mdm.Connect:").is_some_and(|status| !status.is_empty())
}

/// Delivers to all receivers. Clones share the connections.
#[derive(Debug, Clone)]
pub struct Webhooks {
    http: reqwest::Client,
    /// By the name of the subscriber.
    receivers: BTreeMap<String, Url>,
    hmac_key: Option<hmac::Key>,
    with_secrets: bool,
}

/// Polls that wait to be told, at most, and their length together. A poll has a few hundred bytes.
const POLLS: usize = 1024;
const POLLS_KIB: usize = 16 << 10;
/// A longer one is not told: what waits here is of no request any more, and so not within the bounds of bodies.
const LONGEST_POLL: usize = 64 << 10;
/// Of which so many are told at once.
const POLLS_AT_ONCE: usize = 16;

/// Puts polls where [`Webhooks::tell_polls`] takes them from.
#[derive(Debug)]
pub struct Polls {
    wanted: bool,
    with_secrets: bool,
    kibibytes: Arc<Semaphore>,
    sender: mpsc::Sender<WaitingPoll>,
}

/// A poll as the event that a receiver gets: the parsed message would take many times as much.
#[derive(Debug)]
pub struct WaitingPoll {
    event: Value,
    at: Timestamp,
    _share: OwnedSemaphorePermit,
}

impl PollListener for Polls {
    fn listens(&self, length: usize) -> bool {
        if self.wanted && length > LONGEST_POLL {
            metrics::counter!("wasmdm_webhook_polls_dropped_total").increment(1);
        }
        self.wanted && length <= LONGEST_POLL
    }

    fn polled(&self, message: DeviceMessage, at: Timestamp) {
        let in_url: usize = message.url_params.iter().map(|(key, value)| key.len() + value.len()).sum();
        // Base64 makes it longer by a third.
        let kibibytes = u32::try_from((message.raw.len() * 4 / 3 + in_url).div_ceil(1024)).unwrap_or(u32::MAX);
        let told = Arc::clone(&self.kibibytes).try_acquire_many_owned(kibibytes).ok().and_then(|share| {
            let poll = WaitingPoll { event: message.event(self.with_secrets), at, _share: share };
            self.sender.try_send(poll).ok()
        });
        if told.is_none() {
            metrics::counter!("wasmdm_webhook_polls_dropped_total").increment(1);
        }
    }
}

impl Webhooks {
    /// A client of the receivers; they need not be there yet.
    pub fn new(options: &WebhookOptions) -> anyhow::Result<Self> {
        Self::with_timeout(options, TIMEOUT)
    }

    fn with_timeout(options: &WebhookOptions, timeout: Duration) -> anyhow::Result<Self> {
        let http = outward::client(timeout).context("webhook-url")?;
        Ok(Self {
            http,
            receivers: named(&options.urls),
            with_secrets: options.with_secrets,
            hmac_key: options.hmac_key.as_deref().map(outward::hmac_key),
        })
    }

    /// Subscribes the receivers, and ends the subscriptions of those that are configured no longer.
    pub async fn subscribe(&self, storage: &Storage, options: &WebhookOptions, now: Timestamp) -> Result<(), StorageError> {
        let tenant = TenantId::default();
        for old in storage.subscribers(&tenant, PREFIX).await? {
            if !self.receivers.contains_key(&old) {
                storage.set_subscriptions(&tenant, &old, Vec::new(), now).await?;
                // What still waits for it becomes dead letters, which can be seen.
                storage.wake_subscriber(&tenant, &old, now).await?;
            }
        }
        let all = || vec!["mdm.*".to_owned()];
        let mut topics = if options.topics.is_empty() { all() } else { options.topics.clone() };
        if options.with_secrets {
            for topic in &mut topics {
                *topic = topic.replacen("mdm.", WITH_SECRETS, 1);
            }
        }
        for name in self.receivers.keys() {
            let subscription = Subscription { interface: INTERFACE.to_owned(), topics: topics.clone(), include_self: false };
            storage.set_subscriptions(&tenant, name, vec![subscription], now).await?;
        }
        Ok(())
    }

    /// The two ends of the way of polls.
    pub fn polls(options: &WebhookOptions) -> (Arc<Polls>, mpsc::Receiver<WaitingPoll>) {
        let (sender, receiver) = mpsc::channel(POLLS);
        let is_wanted = options.topics.is_empty() || options.topics.iter().any(|topic| topic == "mdm.Connect" || topic == "mdm.Connect:Idle");
        let polls = Polls {
            wanted: !options.urls.is_empty() && is_wanted,
            with_secrets: options.with_secrets,
            kibibytes: Arc::new(Semaphore::new(POLLS_KIB)),
            sender,
        };
        (Arc::new(polls), receiver)
    }

    /// Tells of polls until `shutdown`. What a receiver does not take is not told again.
    pub async fn tell_polls(self, mut polls: mpsc::Receiver<WaitingPoll>, shutdown: CancellationToken) {
        let mut telling = FuturesUnordered::new();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                Some(()) = telling.next() => {}
                poll = polls.recv(), if telling.len() < POLLS_AT_ONCE => match poll {
                    Some(poll) => telling.push(self.tell_poll(poll)),
                    None => return,
                },
            }
        }
    }

    async fn tell_poll(&self, poll: WaitingPoll) {
        let event = Event {
            id: uuid::Uuid::new_v4().to_string(),
            tenant: TenantId::default(),
            topic: "mdm.Connect".to_owned(),
            at: poll.at,
            who: None,
            data: poll.event,
            hops: 0,
        };
        let Ok(told) = Told::of(&event) else { return };
        for url in self.receivers.values() {
            if !self.request(url, &told).send().await.is_ok_and(|response| response.status().is_success()) {
                metrics::counter!("wasmdm_webhook_polls_dropped_total").increment(1);
            }
        }
    }

    fn request(&self, url: &Url, told: &Told) -> reqwest::RequestBuilder {
        let mut request = self.http.post(url.clone()).header(header::CONTENT_TYPE, "application/json; charset=utf-8");
        if let Some(key) = &self.hmac_key {
            request = request.header("X-Hmac-Signature", outward::hmac_signature(key, &told.body));
        }
        if told.is_redacted {
            request = request.header("X-Wasmdm-Redacted", "1");
        }
        request.body(told.body.clone())
    }

    async fn attempt(&self, lease: &Lease, delivery: &Delivery) -> Delivered {
        let failed = |error: String, retryable: bool, retry_after| Delivered::Failed { error, retryable, retry_after, by: json!({}) };
        let Some(url) = self.receivers.get(&lease.subscriber) else {
            return failed("this receiver is configured no longer".to_owned(), false, None);
        };
        if delivery.event.topic.starts_with(WITH_SECRETS) && !self.with_secrets {
            return failed("it holds secrets, which receivers get no longer".to_owned(), false, None);
        }
        let told = match Told::of(&delivery.event) {
            Ok(told) => told,
            Err(problem) => return failed(problem, false, None),
        };
        let response = match self.request(url, &told).send().await {
            Ok(response) => response,
            // Without the URL, which may hold a password.
            Err(error) if error.is_timeout() => return failed("the receiver took too long".to_owned(), true, None),
            Err(error) => return failed(error.without_url().to_string(), true, None),
        };
        let status = response.status();
        if status.is_success() {
            return Delivered::Done { effects: None, by: json!({ "status": status.as_u16() }) };
        }
        let retry_after = response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()).and_then(|value| value.parse().ok());
        // The receiver says that it is this event which is wrong: those behind it must not wait for three days. A 400 may be said of all
        // events, after a change of the key for instance.
        let hopeless = matches!(status, StatusCode::PAYLOAD_TOO_LARGE | StatusCode::UNPROCESSABLE_ENTITY);
        failed(format!("the receiver answered {}", outward::status(&response)), !hopeless, retry_after.map(Duration::from_secs))
    }
}

impl Subscriber for Webhooks {
    fn deliver<'a>(&'a self, lease: &'a Lease, delivery: &'a Delivery) -> BoxFuture<'a, Delivered> {
        Box::pin(self.attempt(lease, delivery))
    }
}

/// What a receiver is told.
struct Told {
    /// NanoMDM's JSON, the keys of objects in the order of the alphabet, as there.
    body: Bytes,
    /// The message in it is not to the byte.
    is_redacted: bool,
}

impl Told {
    fn of(event: &Event) -> Result<Self, String> {
        let Value::Object(mut told) = event.data.clone() else { return Err("the event is no object".to_owned()) };
        let is_redacted = told.remove("redacted").is_some();
        told.insert("topic".to_owned(), event.topic.replacen(WITH_SECRETS, "mdm.", 1).into());
        told.insert("event_id".to_owned(), event.id.as_str().into());
        told.insert("created_at".to_owned(), event.at.to_string().into());
        let mut told = Value::Object(told);
        told.sort_all_objects();
        let body = serde_json::to_vec(&told).map_err(|error| error.to_string())?.into();
        Ok(Self { body, is_redacted })
    }
}

/// The names of the receivers as subscribers: the same over restarts, and where only a password or a token in the query has changed. Receivers
/// that differ in nothing else are told apart by a number.
fn named(urls: &[Url]) -> BTreeMap<String, Url> {
    let mut named = BTreeMap::new();
    for url in urls {
        let place = format!("{}://{}:{}{}", url.scheme(), url.host_str().unwrap_or_default(), url.port_or_known_default().unwrap_or(0), url.path());
        let sha256 = digest::digest(&digest::SHA256, place.as_bytes());
        let short = sha256.as_ref().iter().take(8).fold(String::new(), |short, byte| format!("{short}{byte:02x}"));
        let mut name = format!("{PREFIX}{short}");
        for number in 2.. {
            if !named.contains_key(&name) {
                break;
            }
            name = format!("{PREFIX}{short}-{number}");
        }
        named.insert(name, url.clone());
    }
    named
}

#[cfg(test)]
mod tests {
    use wasmdm_protocol::report::Report;

    use super::*;

    /// What one receiver makes of an event; it answers with these bytes, and then says no more.
    async fn told(answer: &str) -> Delivered {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/hook?key=SECRET", listener.local_addr().unwrap());
        let options = WebhookOptions { urls: vec![url.parse().unwrap()], hmac_key: None, topics: Vec::new(), with_secrets: false };
        let webhooks = Webhooks::with_timeout(&options, Duration::from_millis(300)).unwrap();
        let at = Timestamp::from_millis(1_800_000_000_000);
        let lease = Lease {
            tenant: TenantId::default(),
            subscriber: webhooks.receivers.keys().next().unwrap().clone(),
            interface: INTERFACE.to_owned(),
            partition: "A".to_owned(),
            owner: "worker".to_owned(),
            epoch: 1,
            until: at,
        };
        let topic = "mdm.Connect".to_owned();
        let event = Event { id: "1".to_owned(), tenant: TenantId::default(), topic, at, who: None, data: json!({}), hops: 0 };
        let delivery = Delivery { sequence: 1, event, attempt: 1, conflicts: 0, first_failed_at: None };
        let receiver = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            // The event is the end of the request.
            let mut request = Vec::new();
            while !request.ends_with(b"}") {
                stream.read_buf(&mut request).await.unwrap();
            }
            stream.write_all(answer.as_bytes()).await.unwrap();
            std::future::pending::<()>().await;
        };
        tokio::select! {
            delivered = webhooks.deliver(&lease, &delivery) => delivered,
            () = receiver => unreachable!("it stays"),
        }
    }

    /// Nothing ended a delivery to a receiver that says nothing. NanoMDM defect 15.
    #[tokio::test]
    async fn a_receiver_that_says_nothing_is_given_up_and_told_again() {
        let Delivered::Failed { error, retryable, .. } = told("").await else { panic!("it did not fail") };
        assert_eq!((error.as_str(), retryable), ("the receiver took too long", true));
    }

    /// Go's client went after a redirect; here somebody must read where it leads.
    #[tokio::test]
    async fn a_redirect_is_a_failure_that_says_where_to() {
        let answer = "HTTP/1.1 307 Temporary Redirect\r\nLocation: https://new.example:8443/hook?key=SECRET\r\nContent-Length: 0\r\n\r\n";
        let Delivered::Failed { error, retryable, .. } = told(answer).await else { panic!("it did not fail") };
        assert!(error.starts_with("the receiver answered 307, a redirect to https://new.example:8443, ") && retryable, "{error}");
        assert!(!error.contains("SECRET"), "{error}");
        let within = "HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n";
        let Delivered::Failed { error, .. } = told(within).await else { panic!("it did not fail") };
        assert!(error.contains("302, a redirect to http://127.0.0.1:"), "{error}");
    }

    fn poll() -> DeviceMessage {
        let raw = b"<dict><key>Status</key><string>Idle</string><key>UDID</key><string>U1</string></dict>";
        let report = Report::parse(raw.as_slice().into()).unwrap();
        DeviceMessage {
            enrollment: report.enrollment,
            status: Some("Idle".to_owned()),
            command_uuid: None,
            document: report.document,
            is_cleaned: false,
            raw: report.raw,
            url_params: BTreeMap::new(),
        }
    }

    /// Polls of up to 32 MiB, each of them also parsed, waited a thousand at a time for a receiver that did not answer.
    #[test]
    fn polls_that_wait_for_a_receiver_are_bounded_by_their_bytes() {
        let urls = vec![Url::parse("http://127.0.0.1/").unwrap()];
        let (polls, mut waiting) = Webhooks::polls(&WebhookOptions { urls, hmac_key: None, topics: Vec::new(), with_secrets: false });
        assert!(polls.listens(LONGEST_POLL) && !polls.listens(LONGEST_POLL + 1));
        let long = DeviceMessage { raw: vec![b'x'; LONGEST_POLL].into(), ..poll() };
        let at = Timestamp::from_millis(0);
        let mut told = 0;
        for _ in 0..POLLS {
            polls.polled(long.clone(), at);
        }
        let mut bytes = 0;
        while let Ok(poll) = waiting.try_recv() {
            told += 1;
            bytes += poll.event.to_string().len();
        }
        assert!(told > 100 && bytes < (POLLS_KIB << 10) * 11 / 10, "{told} of {bytes} bytes");
        // Usual ones find room for as many as there may be.
        for _ in 0..=POLLS {
            polls.polled(poll(), at);
        }
        assert_eq!(std::iter::from_fn(|| waiting.try_recv().ok()).count(), POLLS);
    }
}
