//! Waking devices.

use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use tracing::warn;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_storage::Storage;
use wasmdm_storage::wakes::{NotWoken, Woken};

use crate::clock::Clock;

/// Whoever tells Apple's push service to wake devices.
pub trait Pusher: std::fmt::Debug + Send + Sync + 'static {
    /// Wakes each enrollment, and tells of each once, as soon as it is known: what came together, comes together. It ends within a bounded
    /// time, however many there are.
    fn push<'a>(&'a self, tenant: &'a TenantId, ids: &'a [EnrollmentId]) -> BoxStream<'a, Vec<Pushed>>;
}

/// What became of one push.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// Its place among the ids.
    pub place: usize,
    /// The `apns-id`, or why it was not pushed.
    pub result: Result<String, NotWoken>,
}

/// Pushes, and keeps when each channel that owes a visit is to be woken next. One result per id, in order.
pub async fn wake(
    storage: &Storage,
    clock: &dyn Clock,
    pusher: &dyn Pusher,
    tenant: &TenantId,
    ids: &[EnrollmentId],
) -> Vec<Result<String, NotWoken>> {
    wake_each(storage, clock, pusher, tenant, ids, |_| ()).await
}

/// [`wake`], which tells `known` as the results come how many more there are.
///
/// Each is kept as it comes: a push that is never answered must not make those that were be made again.
pub async fn wake_each(
    storage: &Storage,
    clock: &dyn Clock,
    pusher: &dyn Pusher,
    tenant: &TenantId,
    ids: &[EnrollmentId],
    mut known: impl FnMut(usize) + Send,
) -> Vec<Result<String, NotWoken>> {
    let known_before = storage.known_wakes();
    let mut results: Vec<Option<Result<String, NotWoken>>> = vec![None; ids.len()];
    let mut pushing = pusher.push(tenant, ids);
    while let Some(pushed) = pushing.next().await {
        let mut woken = Vec::with_capacity(pushed.len());
        for Pushed { place, result } in pushed {
            if let (Some(id), Some(entry)) = (ids.get(place), results.get_mut(place)) {
                woken.push(Woken { enrollment: id.clone(), result: result.clone() });
                *entry = Some(result);
            }
        }
        let count = woken.len();
        if let Err(error) = storage.woken(woken, known_before, clock.now()).await {
            warn!("It could not be kept that devices were woken, they are woken once more: {error}");
        }
        known(count);
    }
    let untold = || Err(NotWoken::new("nothing is known of the push"));
    results.into_iter().map(|result| result.unwrap_or_else(untold)).collect()
}
