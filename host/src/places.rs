//! Places of exchanges with another server: so many at once, and of one device so many that it cannot keep the others out, however slowly
//! it or the other server goes.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use wasmdm_protocol::enrollment::EnrollmentId;

/// Who has which.
#[derive(Debug)]
pub struct Places {
    all: Arc<Semaphore>,
    each: usize,
    by_device: Arc<Mutex<HashMap<EnrollmentId, usize>>>,
}

impl Places {
    /// `all` places, and at most `each` of them for one device.
    pub fn new(all: usize, each: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(all)), each, by_device: Arc::default() }
    }

    /// A place, if there is one for that device.
    pub fn take(&self, device: &EnrollmentId) -> Option<Place> {
        let all = Arc::clone(&self.all).try_acquire_owned().ok()?;
        let mut by_device = self.by_device.lock();
        let taken = by_device.entry(device.clone()).or_default();
        if *taken >= self.each {
            return None;
        }
        *taken += 1;
        Some(Place { _all: all, by_device: Arc::clone(&self.by_device), device: device.clone() })
    }

    #[cfg(test)]
    pub(crate) fn are_free(&self) -> bool {
        self.by_device.lock().is_empty()
    }
}

/// One of them, until it is dropped.
#[derive(Debug)]
pub struct Place {
    _all: OwnedSemaphorePermit,
    by_device: Arc<Mutex<HashMap<EnrollmentId, usize>>>,
    device: EnrollmentId,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut by_device = self.by_device.lock();
        match by_device.get_mut(&self.device) {
            Some(taken) if *taken > 1 => *taken -= 1,
            _ => {
                by_device.remove(&self.device);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_device_cannot_take_all_places() {
        let places = Places::new(10, 3);
        let (one, other) = (EnrollmentId::new("A"), EnrollmentId::new("B"));
        let mut taken: Vec<Place> = (0..3).map(|_| places.take(&one).unwrap()).collect();
        assert!(places.take(&one).is_none());
        assert!(places.take(&other).is_some());
        taken.pop();
        assert!(places.take(&one).is_some());
        drop(taken);
        assert!(places.are_free());
    }
}
