//! Waking devices.

use futures_util::future::BoxFuture;
use tracing::warn;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_storage::Storage;
use wasmdm_storage::wakes::{NotWoken, Woken};

use crate::clock::Clock;

/// Whoever tells Apple's push service to wake devices.
pub trait Pusher: std::fmt::Debug + Send + Sync + 'static {
    /// Wakes each enrollment; answers one result per id, in order: the `apns-id`, or why it was not pushed. Within a bounded time, however
    /// many there are.
    fn push<'a>(&'a self, tenant: &'a TenantId, ids: &'a [EnrollmentId]) -> BoxFuture<'a, Vec<Result<String, NotWoken>>>;
}

/// Pushes, and keeps when each channel that owes a visit is to be woken next.
pub async fn wake(
    storage: &Storage,
    clock: &dyn Clock,
    pusher: &dyn Pusher,
    tenant: &TenantId,
    ids: &[EnrollmentId],
) -> Vec<Result<String, NotWoken>> {
    let known = storage.known_wakes();
    let results = pusher.push(tenant, ids).await;
    let woken = ids.iter().zip(&results).map(|(id, result)| Woken { enrollment: id.clone(), result: result.clone() }).collect();
    if let Err(error) = storage.woken(woken, known, clock.now()).await {
        warn!("It could not be kept that devices were woken, they are woken once more: {error}");
    }
    results
}
