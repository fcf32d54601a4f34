//! What the owner of the database keeps in memory: always bounded or in proportion to the enrollments, changed only after the commit that
//! it follows from, rebuilt at start. Losing it costs time, never facts.

use crate::certificate_bindings::Binding;
use crate::outbox::Subscription;
use parking_lot::{Mutex, RwLock};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use tokio::sync::Notify;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_protocol::time::Timestamp;

/// Bindings in each half of the cache.
const BINDINGS: usize = 50_000;

/// What a commit changed.
#[derive(Debug)]
pub(crate) enum Change {
    /// The enrollment has open commands now, or none.
    Pending(EnrollmentId, bool),
    /// What the wakes say of the enrollment now.
    Wake(EnrollmentId, WakeState),
    /// Some of them are due at once.
    WakesDue,
    /// A push certificate was stored.
    PushCertificate,
    /// The enrollment's last push failed, or did not.
    PushFailing(EnrollmentId, bool),
    Binding([u8; 32], Binding),
    /// An enrollment's bindings were replaced: what the cache says of it is old.
    BindingsOf(EnrollmentId),
    Subscriptions(TenantId, String, Vec<Subscription>),
    /// A delivery was added or woken, or a timer set.
    Outbox,
    Seen(EnrollmentId, Timestamp),
}

/// What became of an enrollment's row among the wakes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WakeState {
    /// It is there.
    Waits,
    /// It is there, and due at once.
    Due,
    /// There is none.
    Gone,
}

#[derive(Debug, Default)]
pub(crate) struct Memory {
    pending: Mutex<HashSet<EnrollmentId>>,
    wakes: Mutex<HashSet<EnrollmentId>>,
    push_failing: Mutex<HashSet<EnrollmentId>>,
    bindings: Mutex<BindingCache>,
    subscriptions: RwLock<HashMap<TenantId, Vec<Subscribed>>>,
    last_seen: Mutex<LastSeen>,
    /// Held by the flush that runs.
    pub(crate) flush: tokio::sync::Mutex<()>,
    pub(crate) outbox: Arc<Notify>,
    pub(crate) wakes_due: Arc<Notify>,
    /// The number of the last transaction whose commit returned, counted since the start.
    committed: AtomicI64,
    /// The number of the transaction that last stored a push certificate.
    push_certificate_stored_in: AtomicI64,
}

/// One line of the subscriptions.
#[derive(Debug, Clone)]
pub(crate) struct Subscribed {
    pub(crate) subscriber: String,
    pub(crate) subscription: Subscription,
}

#[derive(Debug, Default)]
struct LastSeen {
    waiting: HashMap<EnrollmentId, Timestamp>,
    /// Taken for a flush that has not committed yet.
    flushing: HashMap<EnrollmentId, Timestamp>,
}

impl Memory {
    /// After the commit of the transaction with that number.
    pub(crate) fn follow(&self, number: i64, changes: impl Iterator<Item = Change>) {
        let stores = |change: &Change| {
            if matches!(change, Change::PushCertificate) {
                self.push_certificate_stored_in.store(number, Ordering::Release);
            }
        };
        self.apply(changes.inspect(stores));
        self.committed.store(number, Ordering::Release);
    }

    pub(crate) fn apply(&self, changes: impl Iterator<Item = Change>) {
        let (mut outbox, mut wakes_due) = (false, false);
        for change in changes {
            match change {
                Change::Pending(id, true) => {
                    self.pending.lock().insert(id);
                }
                Change::Pending(id, false) => {
                    self.pending.lock().remove(&id);
                }
                Change::Wake(id, WakeState::Gone) => {
                    self.wakes.lock().remove(&id);
                }
                Change::Wake(id, state) => {
                    self.wakes.lock().insert(id);
                    wakes_due |= state == WakeState::Due;
                }
                Change::WakesDue => wakes_due = true,
                Change::PushCertificate => {}
                Change::PushFailing(id, true) => {
                    self.push_failing.lock().insert(id);
                }
                Change::PushFailing(id, false) => {
                    self.push_failing.lock().remove(&id);
                }
                Change::Binding(identity, binding) => self.bindings.lock().put(identity, binding),
                Change::BindingsOf(id) => self.bindings.lock().forget(&id),
                Change::Subscriptions(tenant, subscriber, subscriptions) => self.set_subscriptions(&tenant, &subscriber, subscriptions),
                Change::Seen(id, at) => self.touch(&id, at),
                Change::Outbox => outbox = true,
            }
        }
        if outbox {
            // Everyone who waits now, and one permit for whoever was just about to.
            self.outbox.notify_waiters();
            self.outbox.notify_one();
        }
        if wakes_due {
            self.wakes_due.notify_one();
        }
    }

    pub(crate) fn is_pending(&self, id: &EnrollmentId) -> bool {
        self.pending.lock().contains(id)
    }

    pub(crate) fn has_wake(&self, id: &EnrollmentId) -> bool {
        self.wakes.lock().contains(id)
    }

    pub(crate) fn push_certificate_stored_in(&self) -> i64 {
        self.push_certificate_stored_in.load(Ordering::Acquire)
    }

    pub(crate) fn committed(&self) -> i64 {
        self.committed.load(Ordering::Acquire)
    }

    pub(crate) fn is_push_failing(&self, id: &EnrollmentId) -> bool {
        self.push_failing.lock().contains(id)
    }

    /// A failure is about to be written: what comes behind it must not take the channel for well meanwhile. One that is not written after all
    /// costs a look at the database.
    pub(crate) fn expect_push_failure(&self, id: &EnrollmentId) {
        self.push_failing.lock().insert(id.clone());
    }

    pub(crate) fn cached_binding(&self, identity: &[u8; 32]) -> (Option<Binding>, u64) {
        let mut bindings = self.bindings.lock();
        (bindings.get(identity), bindings.changes)
    }

    /// Keeps what was read, unless a commit changed bindings since `changes` was taken: the read may be older than it.
    pub(crate) fn cache_binding(&self, identity: [u8; 32], binding: Binding, changes: u64) {
        let mut bindings = self.bindings.lock();
        if bindings.changes == changes {
            bindings.insert(identity, binding);
        }
    }

    pub(crate) fn set_subscriptions(&self, tenant: &TenantId, subscriber: &str, subscriptions: Vec<Subscription>) {
        let mut all = self.subscriptions.write();
        let of_tenant = all.entry(tenant.clone()).or_default();
        of_tenant.retain(|line| line.subscriber != subscriber);
        of_tenant.extend(subscriptions.into_iter().map(|subscription| Subscribed { subscriber: subscriber.to_owned(), subscription }));
    }

    /// The lines of the tenant for which `wants` is true.
    pub(crate) fn subscribed(&self, tenant: &TenantId, wants: impl Fn(&Subscribed) -> bool) -> Vec<Subscribed> {
        self.subscriptions.read().get(tenant).map(|lines| lines.iter().filter(|line| wants(line)).cloned().collect()).unwrap_or_default()
    }

    pub(crate) fn touch(&self, id: &EnrollmentId, at: Timestamp) {
        let mut last_seen = self.last_seen.lock();
        match last_seen.waiting.get_mut(id) {
            Some(known) => *known = at.max(*known),
            None => {
                last_seen.waiting.insert(id.clone(), at);
            }
        }
    }

    /// Of what is not yet in the database.
    pub(crate) fn last_seen(&self, id: &EnrollmentId) -> Option<Timestamp> {
        let last_seen = self.last_seen.lock();
        last_seen.waiting.get(id).max(last_seen.flushing.get(id)).copied()
    }

    /// Takes what waits; [`Self::end_flush`] must follow.
    pub(crate) fn begin_flush(&self) -> Vec<(EnrollmentId, Timestamp)> {
        let mut last_seen = self.last_seen.lock();
        last_seen.flushing = std::mem::take(&mut last_seen.waiting);
        last_seen.flushing.iter().map(|(id, at)| (id.clone(), *at)).collect()
    }

    /// Puts back what was not written.
    pub(crate) fn end_flush(&self, written: bool) {
        let taken = std::mem::take(&mut self.last_seen.lock().flushing);
        if !written {
            for (id, at) in taken {
                self.touch(&id, at);
            }
        }
    }
}

/// Two halves: what is asked for moves to the younger, and when that is full the elder is dropped. So at most twice [`BINDINGS`] are held,
/// and whatever is in use stays.
#[derive(Debug, Default)]
struct BindingCache {
    young: HashMap<[u8; 32], Binding>,
    old: HashMap<[u8; 32], Binding>,
    /// Which certificates of an enrollment are in one of the halves.
    of_enrollment: HashMap<EnrollmentId, Vec<[u8; 32]>>,
    /// Counts the commits that changed bindings.
    changes: u64,
}

impl BindingCache {
    fn get(&mut self, identity: &[u8; 32]) -> Option<Binding> {
        if let Some(binding) = self.young.get(identity) {
            return Some(binding.clone());
        }
        let binding = self.old.get(identity)?.clone();
        self.insert(*identity, binding.clone());
        Some(binding)
    }

    fn put(&mut self, identity: [u8; 32], binding: Binding) {
        self.changes += 1;
        self.insert(identity, binding);
    }

    fn insert(&mut self, identity: [u8; 32], binding: Binding) {
        if self.young.len() >= BINDINGS {
            for (dropped, binding) in std::mem::replace(&mut self.old, std::mem::take(&mut self.young)) {
                if !self.old.contains_key(&dropped) {
                    self.unlink(&binding.enrollment, &dropped);
                }
            }
        }
        let linked = self.of_enrollment.entry(binding.enrollment.clone()).or_default();
        if !linked.contains(&identity) {
            linked.push(identity);
        }
        self.young.insert(identity, binding);
    }

    fn unlink(&mut self, id: &EnrollmentId, identity: &[u8; 32]) {
        if let Some(linked) = self.of_enrollment.get_mut(id) {
            linked.retain(|known| known != identity);
            if linked.is_empty() {
                self.of_enrollment.remove(id);
            }
        }
    }

    fn forget(&mut self, id: &EnrollmentId) {
        self.changes += 1;
        for identity in self.of_enrollment.remove(id).unwrap_or_default() {
            self.young.remove(&identity);
            self.old.remove(&identity);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificate_bindings::Standing;

    fn binding(id: &str) -> Binding {
        Binding { tenant: TenantId::default(), enrollment: EnrollmentId::new(id), standing: Standing::Own }
    }

    fn hash(number: usize) -> [u8; 32] {
        let mut hash = [0; 32];
        hash[..8].copy_from_slice(&number.to_le_bytes());
        hash
    }

    #[test]
    fn the_binding_cache_is_bounded_and_keeps_what_is_used() {
        let memory = Memory::default();
        for number in 0..BINDINGS * 4 {
            let (_, changes) = memory.cached_binding(&hash(0));
            memory.cache_binding(hash(number), binding(&number.to_string()), changes);
        }
        assert_eq!(memory.cached_binding(&hash(0)).0, Some(binding("0")));
        assert_eq!(memory.cached_binding(&hash(1)).0, None);
        let bindings = memory.bindings.lock();
        assert!(bindings.young.len() + bindings.old.len() <= BINDINGS * 2);
        assert!(bindings.of_enrollment.len() <= BINDINGS * 2);
    }

    #[test]
    fn a_read_that_is_older_than_a_commit_is_not_cached() {
        let memory = Memory::default();
        let (_, changes) = memory.cached_binding(&hash(1));
        memory.apply([Change::BindingsOf(EnrollmentId::new("a"))].into_iter());
        memory.cache_binding(hash(1), binding("a"), changes);
        assert_eq!(memory.cached_binding(&hash(1)).0, None);
    }

    #[test]
    fn what_a_failed_flush_took_comes_back() {
        let memory = Memory::default();
        let id = EnrollmentId::new("a");
        memory.touch(&id, Timestamp::from_millis(5));
        memory.touch(&id, Timestamp::from_millis(3));
        assert_eq!(memory.begin_flush(), [(id.clone(), Timestamp::from_millis(5))]);
        assert_eq!(memory.last_seen(&id), Some(Timestamp::from_millis(5)));
        memory.end_flush(false);
        assert_eq!(memory.begin_flush().len(), 1);
        memory.end_flush(true);
        assert_eq!(memory.last_seen(&id), None);
    }
}
