//! Receivers of NanoMDM's webhook, as subscribers of the outbox.
//!
//! What NanoMDM tells its receiver once and forgets is kept here until the receiver has confirmed it with a 2xx: in order per device, tried
//! again with backoff, and a dead letter in the end.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context as _;
use aws_lc_rs::{digest, hmac};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::future::BoxFuture;
use http::{StatusCode, header};
use reqwest::Url;
use serde_json::{Value, json};
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_protocol::time::Timestamp;
use wasmdm_service::subscriber::{Delivered, Subscriber};
use wasmdm_storage::outbox::{Delivery, Lease, Subscription};
use wasmdm_storage::{Storage, StorageError};

/// The prefix of receivers among subscribers.
pub const PREFIX: &str = "webhook:";
const INTERFACE: &str = "webhook";
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

/// Delivers to all receivers.
#[derive(Debug)]
pub struct Webhooks {
    http: reqwest::Client,
    /// By the name of the subscriber.
    receivers: BTreeMap<String, Url>,
    hmac_key: Option<hmac::Key>,
}

impl Webhooks {
    /// A client of the receivers; they need not be there yet.
    pub fn new(options: &WebhookOptions) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .timeout(TIMEOUT)
            .tcp_nodelay(true)
            .user_agent(concat!("wasmdm/", env!("CARGO_PKG_VERSION")))
            .build()
            .context("webhook-url")?;
        Ok(Self {
            http,
            receivers: options.urls.iter().map(|url| (subscriber_name(url), url.clone())).collect(),
            hmac_key: options.hmac_key.as_ref().map(|key| hmac::Key::new(hmac::HMAC_SHA256, key.as_bytes())),
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
                *topic = topic.replacen("mdm.", "mdm+secrets.", 1);
            }
        }
        for name in self.receivers.keys() {
            let subscription = Subscription { interface: INTERFACE.to_owned(), topics: topics.clone(), include_self: false };
            storage.set_subscriptions(&tenant, name, vec![subscription], now).await?;
        }
        Ok(())
    }

    async fn attempt(&self, lease: &Lease, delivery: &Delivery) -> Delivered {
        let failed = |error: String, retryable: bool, retry_after| Delivered::Failed { error, retryable, retry_after, by: json!({}) };
        let Some(url) = self.receivers.get(&lease.subscriber) else {
            return failed("this receiver is configured no longer".to_owned(), false, None);
        };
        let body = match body(delivery) {
            Ok(body) => body,
            Err(problem) => return failed(problem, false, None),
        };
        let mut request = self.http.post(url.clone()).header(header::CONTENT_TYPE, "application/json; charset=utf-8");
        if let Some(key) = &self.hmac_key {
            request = request.header("X-Hmac-Signature", STANDARD.encode(hmac::sign(key, &body)));
        }
        let response = match request.body(body).send().await {
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
        // The receiver says that it is this event which is wrong: those behind it must not wait for three days.
        let hopeless = matches!(status, StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE | StatusCode::UNPROCESSABLE_ENTITY);
        failed(format!("the receiver answered {}", status.as_u16()), !hopeless, retry_after.map(Duration::from_secs))
    }
}

impl Subscriber for Webhooks {
    fn deliver<'a>(&'a self, lease: &'a Lease, delivery: &'a Delivery) -> BoxFuture<'a, Delivered> {
        Box::pin(self.attempt(lease, delivery))
    }
}

/// NanoMDM's JSON. The keys of objects are in the order of the alphabet, as there.
fn body(delivery: &Delivery) -> Result<Vec<u8>, String> {
    let event = &delivery.event;
    let Value::Object(mut message) = event.data.clone() else { return Err("the event is no object".to_owned()) };
    message.insert("topic".to_owned(), event.topic.replacen("mdm+secrets.", "mdm.", 1).into());
    message.insert("event_id".to_owned(), event.id.as_str().into());
    message.insert("created_at".to_owned(), event.at.to_string().into());
    serde_json::to_vec(&message).map_err(|error| error.to_string())
}

/// The same for the same URL over restarts, and without what the URL says.
fn subscriber_name(url: &Url) -> String {
    let sha256 = digest::digest(&digest::SHA256, url.as_str().as_bytes());
    let short: String = sha256.as_ref().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("{PREFIX}{short}")
}
