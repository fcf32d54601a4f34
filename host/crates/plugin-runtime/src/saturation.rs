//! How many calls of one plugin run and wait at once.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use wasmdm_protocol::enrollment::TenantId;

use crate::effective::Limits;

/// The places of a plugin. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    running: Arc<Semaphore>,
    waiting: Arc<Mutex<Waiting>>,
}

#[derive(Debug, Default)]
struct Waiting {
    total: usize,
    by_tenant: HashMap<TenantId, usize>,
}

/// There is no place, not even to wait.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Full;

impl Places {
    pub(crate) fn new(concurrent: usize) -> Self {
        Self { running: Arc::new(Semaphore::new(concurrent.min(Semaphore::MAX_PERMITS))), waiting: Arc::default() }
    }

    /// Takes a place to run, after waiting for one if there is a place to wait.
    pub(crate) async fn take(&self, tenant: &TenantId, limits: &Limits) -> Result<OwnedSemaphorePermit, Full> {
        if let Ok(permit) = Arc::clone(&self.running).try_acquire_owned() {
            return Ok(permit);
        }
        let _waits = self.wait(tenant, limits)?;
        Arc::clone(&self.running).acquire_owned().await.map_err(|_| Full)
    }

    /// A tenant has its own places. It may use the others as long as one more tenant would still find its own free.
    fn wait(&self, tenant: &TenantId, limits: &Limits) -> Result<Waits, Full> {
        let mut waiting = self.waiting.lock();
        let own = waiting.by_tenant.get(tenant).copied().unwrap_or(0);
        let reserve = if own < limits.waiting_per_tenant { 0 } else { limits.waiting_per_tenant };
        if waiting.total.saturating_add(reserve) >= limits.waiting {
            return Err(Full);
        }
        waiting.total = waiting.total.saturating_add(1);
        waiting.by_tenant.insert(tenant.clone(), own.saturating_add(1));
        Ok(Waits { waiting: Arc::clone(&self.waiting), tenant: tenant.clone() })
    }
}

struct Waits {
    waiting: Arc<Mutex<Waiting>>,
    tenant: TenantId,
}

impl Drop for Waits {
    fn drop(&mut self) {
        let mut waiting = self.waiting.lock();
        waiting.total = waiting.total.saturating_sub(1);
        if let Some(own) = waiting.by_tenant.get_mut(&self.tenant) {
            *own = own.saturating_sub(1);
            if *own == 0 {
                waiting.by_tenant.remove(&self.tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn limits() -> Limits {
        Limits { concurrent: 1, waiting: 4, waiting_per_tenant: 2, ..Limits::default() }
    }

    #[test]
    fn one_tenant_cannot_take_the_places_that_another_has_to_itself() {
        let (one, two) = (TenantId::new("one"), TenantId::new("two"));
        let places = Places::new(1);
        let running = places.take(&one, &limits()).now_or_never();
        assert!(matches!(running, Some(Ok(_))));
        let first = places.wait(&one, &limits());
        let second = places.wait(&one, &limits());
        assert!(first.is_ok() && second.is_ok());
        assert!(places.wait(&one, &limits()).is_err(), "the rest is another tenant's");
        let other = places.wait(&two, &limits());
        let another = places.wait(&two, &limits());
        assert!(other.is_ok() && another.is_ok());
        assert!(places.wait(&two, &limits()).is_err());
        drop(first);
        assert!(places.wait(&one, &limits()).is_ok());
    }

    #[test]
    fn who_waits_gets_the_place_that_becomes_free() {
        let tenant = TenantId::default();
        let places = Places::new(1);
        let running = places.take(&tenant, &limits()).now_or_never().unwrap().unwrap();
        let mut next = Box::pin({
            let places = places.clone();
            async move { places.take(&TenantId::default(), &limits()).await.map(drop) }
        });
        assert!((&mut next).now_or_never().is_none());
        drop(running);
        assert_eq!(next.now_or_never(), Some(Ok(())));
    }
}
