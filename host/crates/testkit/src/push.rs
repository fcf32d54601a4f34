//! A pusher that only remembers.

use std::sync::Arc;

use futures_util::stream::BoxStream;
use parking_lot::Mutex;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_service::pusher::{Pushed, Pusher};

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
    fn push<'a>(&'a self, _tenant: &'a TenantId, ids: &'a [EnrollmentId]) -> BoxStream<'a, Vec<Pushed>> {
        self.woken.lock().extend_from_slice(ids);
        let pushed = ids.iter().enumerate().map(|(place, id)| Pushed { place, result: Ok(format!("recorded-{id}")) });
        Box::pin(futures_util::stream::iter([pushed.collect()]))
    }
}
