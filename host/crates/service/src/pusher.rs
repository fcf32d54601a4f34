//! Waking devices.

use std::time::Duration;

use futures_util::future::BoxFuture;
use tracing::warn;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_storage::Storage;

use crate::clock::Clock;

/// Whoever tells Apple's push service to wake devices.
pub trait Pusher: std::fmt::Debug + Send + Sync + 'static {
    /// Wakes each enrollment; answers one result per id, in order: the `apns-id`, or why it was not pushed. Within a bounded time, however
    /// many there are.
    fn push<'a>(&'a self, tenant: &'a TenantId, ids: &'a [EnrollmentId]) -> BoxFuture<'a, Vec<Result<String, PushError>>>;
}

/// Why a device was not woken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct PushError {
    /// A sentence for the operator, without secrets.
    pub reason: String,
    /// When the same push may go well, if it may by itself.
    pub retry_after: Option<Duration>,
}

impl PushError {
    /// One that stays until somebody does something.
    pub fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), retry_after: None }
    }
}

/// Pushes, and keeps when each channel that owes a visit is to be woken next.
pub async fn wake(
    storage: &Storage,
    clock: &dyn Clock,
    pusher: &dyn Pusher,
    tenant: &TenantId,
    ids: &[EnrollmentId],
) -> Vec<Result<String, PushError>> {
    let results = pusher.push(tenant, ids).await;
    let retries = results.iter().map(|result| result.as_ref().err().and_then(|error| error.retry_after));
    let woken = ids.iter().cloned().zip(retries).collect();
    if let Err(error) = storage.woken(woken, clock.now()).await {
        warn!("It could not be kept that devices were woken, they are woken once more: {error}");
    }
    results
}
