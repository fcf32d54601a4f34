//! Whoever gets events from the outbox.

use std::time::Duration;

use futures_util::future::BoxFuture;
use wasmdm_storage::effects::PluginEffects;
use wasmdm_storage::outbox::{Delivery, Lease};

/// A kind of subscriber, found by the prefix of its name (`plugin:`).
pub trait Subscriber: std::fmt::Debug + Send + Sync + 'static {
    /// Delivers one event. No database transaction or connection is held meanwhile.
    fn deliver<'a>(&'a self, lease: &'a Lease, delivery: &'a Delivery) -> BoxFuture<'a, Delivered>;
}

/// How an attempt ended. `by` is JSON of `{digest, generation, call}` and is kept with the delivery.
#[derive(Debug)]
pub enum Delivered {
    /// Handled; the effects commit with the acknowledgement.
    Done { effects: Option<Box<PluginEffects>>, by: serde_json::Value },
    /// Failed; tried again with backoff if `retryable`, else a dead letter at once.
    Failed { error: String, retryable: bool, retry_after: Option<Duration>, by: serde_json::Value },
    /// Could not be tried (suspended, saturated, absent): does not count as an attempt.
    Postponed { reason: String, retry_after: Duration },
}
