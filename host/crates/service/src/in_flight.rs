//! Which enrollments have a request in the server right now.
//!
//! An Idle offers a command again that was sent and not answered, but not while another request of the same enrollment is being
//! served: that one may be its answer (edge case 10).

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use wasmdm_protocol::enrollment::EnrollmentId;

/// A count per enrollment; holds only those above zero.
#[derive(Debug, Clone, Default)]
pub struct InFlight {
    counts: Arc<Mutex<HashMap<EnrollmentId, usize>>>,
}

impl InFlight {
    /// Counts a request until the answer is dropped.
    pub fn enter(&self, id: &EnrollmentId) -> Presence {
        let mut counts = self.counts.lock();
        let count = counts.entry(id.clone()).or_default();
        *count += 1;
        Presence { alone: *count == 1, id: id.clone(), counts: Arc::clone(&self.counts) }
    }
}

/// One request's presence.
#[derive(Debug)]
pub struct Presence {
    alone: bool,
    id: EnrollmentId,
    counts: Arc<Mutex<HashMap<EnrollmentId, usize>>>,
}

impl Presence {
    /// Whether no other request of the enrollment was there when this one came.
    pub fn alone(&self) -> bool {
        self.alone
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        let mut counts = self.counts.lock();
        if let Some(count) = counts.get_mut(&self.id) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Edge case 10.
    #[test]
    fn the_second_request_of_an_enrollment_is_not_alone_until_the_first_ends() {
        let in_flight = InFlight::default();
        let id = EnrollmentId::new("A");
        let first = in_flight.enter(&id);
        assert!(first.alone());
        assert!(!in_flight.enter(&id).alone());
        assert!(in_flight.enter(&EnrollmentId::new("B")).alone());
        drop(first);
        assert!(in_flight.enter(&id).alone());
        assert!(in_flight.counts.lock().is_empty());
    }
}
