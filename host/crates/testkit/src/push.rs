//! A pusher that only remembers.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_service::pusher::Pusher;
use wasmdm_storage::wakes::NotWoken;

/// Records whom it was asked to wake, and says that it did.
#[derive(Debug, Clone, Default)]
pub struct RecordingPusher {
    woken: Arc<Mutex<Vec<EnrollmentId>>>,
}

impl RecordingPusher {
    /// Everyone woken so far, in order.
    pub fn woken(&self) -> Vec<EnrollmentId> {
        self.woken.lock().clone()
    }
}

impl Pusher for RecordingPusher {
    fn push<'a>(&'a self, _tenant: &'a TenantId, ids: &'a [EnrollmentId]) -> BoxFuture<'a, Vec<Result<String, NotWoken>>> {
        Box::pin(async move {
            self.woken.lock().extend_from_slice(ids);
            ids.iter().map(|id| Ok(format!("recorded-{id}"))).collect()
        })
    }
}
