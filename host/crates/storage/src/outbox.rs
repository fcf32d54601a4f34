//! Events on their way to subscribers: at least once, in order per (subscriber, interface, device), effects with the acknowledgement.
use crate::effects::PluginEffects;
use crate::events::Event;
use crate::{Storage, StorageError};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_protocol::time::Timestamp;

/// Who wants which events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscription {
    /// `event-sink`, `event-commands`.
    pub interface: String,
    /// `enrollment.enrolled`, `command.acknowledged:SecurityInfo`, `command.*`, `*` (all but `checkin.*` and `device.polled`).
    pub topics: Vec<String>,
    /// Also events that the subscriber's own effects caused.
    pub include_self: bool,
}

/// The right to deliver one partition's events, until `until`.
#[derive(Debug, Clone)]
pub struct Lease {
    pub tenant: TenantId,
    pub subscriber: String,
    pub interface: String,
    pub partition: String,
    pub owner: String,
    pub epoch: i64,
    pub until: Timestamp,
}

#[derive(Debug, Clone)]
pub struct Delivery {
    pub sequence: i64,
    pub event: Event,
    /// 1 at the first.
    pub attempt: u32,
    /// Conflicts in a row.
    pub conflicts: u32,
    pub first_failed_at: Option<Timestamp>,
}

/// How a delivery ended.
#[derive(Debug, Clone)]
pub enum Completion {
    Done {
        effects: Option<Box<PluginEffects>>,
        /// JSON of {digest, generation, call}: kept with the delivery.
        by: serde_json::Value,
    },
    Retry {
        at: Timestamp,
        error: String,
        /// Whether it counts as an attempt: not while the subscriber is suspended or saturated.
        counted: bool,
        by: serde_json::Value,
    },
    Dead {
        error: String,
        by: serde_json::Value,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Completed {
    Stored,
    /// A value that was read has changed: the effects were discarded, the delivery stays, `conflicts` went up.
    Conflict(String),
    /// Effects that can never be stored (quota, unknown target): discarded; complete it as `Retry` or `Dead`.
    Rejected(String),
    /// Another worker owns the partition now: nothing was written.
    LeaseLost,
}

#[derive(Debug, Clone)]
pub struct DeadLetter {
    pub sequence: i64,
    pub subscriber: String,
    pub interface: String,
    pub event: Event,
    pub attempts: u32,
    pub error: String,
    pub at: Timestamp,
}

impl Storage {
    /// Makes the subscriber's subscriptions these, from now on. Waiting deliveries stay.
    pub async fn set_subscriptions(
        &self,
        _tenant: &TenantId,
        _subscriber: &str,
        _subscriptions: Vec<Subscription>,
        _now: Timestamp,
    ) -> Result<(), StorageError> {
        todo!()
    }
    /// Subscriptions of the tenant's subscribers whose name begins with `prefix`, for instance `plugin:`.
    pub async fn subscribers(
        &self,
        _tenant: &TenantId,
        _prefix: &str,
    ) -> Result<Vec<String>, StorageError> {
        todo!()
    }
    /// Leases up to `limit` partitions that have something due and no owner.
    pub async fn claim(
        &self,
        _owner: &str,
        _limit: u32,
        _lease: Duration,
        _now: Timestamp,
    ) -> Result<Vec<Lease>, StorageError> {
        todo!()
    }
    /// The partition's oldest waiting delivery, if it is due.
    pub async fn next_delivery(
        &self,
        _lease: &Lease,
        _now: Timestamp,
    ) -> Result<Option<Delivery>, StorageError> {
        todo!()
    }
    /// Ends a delivery, with its effects, fenced by the lease.
    pub async fn complete(
        &self,
        _lease: &Lease,
        _delivery: &Delivery,
        _completion: Completion,
        _now: Timestamp,
    ) -> Result<Completed, StorageError> {
        todo!()
    }
    /// Prolongs a lease; `false`: it is lost.
    pub async fn renew(
        &self,
        _lease: &Lease,
        _for_: Duration,
        _now: Timestamp,
    ) -> Result<bool, StorageError> {
        todo!()
    }
    pub async fn release(&self, _lease: &Lease, _now: Timestamp) -> Result<(), StorageError> {
        todo!()
    }
    /// Makes the waiting partitions of a subscriber due (a success to its destination, a reload).
    pub async fn wake_subscriber(
        &self,
        _tenant: &TenantId,
        _subscriber: &str,
        _now: Timestamp,
    ) -> Result<(), StorageError> {
        todo!()
    }
    /// When the next partition is due; `None`: nothing waits.
    pub async fn outbox_due(&self) -> Result<Option<Timestamp>, StorageError> {
        todo!()
    }
    /// Notified after each commit that added or woke a delivery or set a timer.
    pub fn outbox_changed(&self) -> Arc<Notify> {
        todo!()
    }
    /// Waiting deliveries and the age of the oldest: for the metric.
    pub async fn outbox_lag(&self, _now: Timestamp) -> Result<(u64, Duration), StorageError> {
        todo!()
    }
    pub async fn dead_letters(
        &self,
        _tenant: &TenantId,
        _limit: u32,
    ) -> Result<Vec<DeadLetter>, StorageError> {
        todo!()
    }
    /// Puts dead letters back, at the end of their partitions.
    pub async fn replay_dead_letters(
        &self,
        _tenant: &TenantId,
        _sequences: &[i64],
        _now: Timestamp,
    ) -> Result<u64, StorageError> {
        todo!()
    }
}
