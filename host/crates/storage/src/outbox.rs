//! Events on their way to subscribers: at least once, in order per (subscriber, interface, device), effects with the acknowledgement.
//!
//! What is leased is the partition, so that two workers never hold two events of one device. A partition carries the one time at which it
//! may be claimed; commits only ever set it where it is empty, so new events neither wake a partition that waits for its next attempt nor
//! disturb one that is being worked on.

use crate::effects::{self, Checked, PluginEffects};
use crate::events::{Address, Event, deliver, event};
use crate::memory::Change;
use crate::sql::{Columns, Db, Row, args, together};
use crate::writer::{Class, Outcome, Tx};
use crate::{Storage, StorageError, sealed, tenant};
use serde_json::Value;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use tokio::sync::Notify;
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_protocol::time::Timestamp;

/// Who wants which events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscription {
    /// `event-sink`, `event-commands`. One subscription per interface.
    pub interface: String,
    /// `enrollment.enrolled`, `command.acknowledged:SecurityInfo`, `command.*`, `*` (all but the raw `checkin.*`, `mdm.*` and `mdm+secrets.*`).
    pub topics: Vec<String>,
    /// Also events that the subscriber's own effects caused.
    pub include_self: bool,
}

/// The right to deliver one partition's events, until `until`.
#[derive(Debug, Clone)]
pub struct Lease {
    /// Whose events.
    pub tenant: TenantId,
    /// To whom.
    pub subscriber: String,
    /// Through what.
    pub interface: String,
    /// The parent device, `timer/NAME/ENROLLMENT` or `cron/NAME`.
    pub partition: String,
    /// The worker.
    pub owner: String,
    /// Higher with each claim: what fences a worker that came too late.
    pub epoch: i64,
    /// From then on somebody else may claim it.
    pub until: Timestamp,
}

/// What a worker process asks for.
#[derive(Debug, Clone)]
pub struct Claim {
    /// Names the process.
    pub owner: String,
    /// Leases, at most.
    pub limit: u32,
    /// Leases of one subscriber, at most, with those that it has already; [`Self::shares`] may say otherwise.
    pub share: u32,
    /// Subscribers that may get another number now, for what they hold already or because they fail.
    pub shares: HashMap<(TenantId, String), u32>,
    /// How long a lease holds.
    pub lease: Duration,
    /// When.
    pub now: Timestamp,
}

/// An event for a subscriber.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// Its place in the order.
    pub sequence: i64,
    /// What happened.
    pub event: Event,
    /// 1 at the first.
    pub attempt: u32,
    /// Conflicts in a row.
    pub conflicts: u32,
    /// When its first counted attempt failed.
    pub first_failed_at: Option<Timestamp>,
}

/// How a delivery ended.
#[derive(Debug, Clone)]
pub enum Completion {
    /// It is handled.
    Done {
        /// Committed with it.
        effects: Option<Box<PluginEffects>>,
        /// JSON of {digest, generation, call}: kept with the delivery.
        by: Value,
    },
    /// It failed, and comes again.
    Retry {
        /// Not earlier.
        at: Timestamp,
        /// Kept with the delivery.
        error: String,
        /// Whether it counts as an attempt: not while the subscriber is suspended or saturated.
        counted: bool,
        /// As above.
        by: Value,
    },
    /// It failed for good; the partition goes on.
    Dead {
        /// Kept with the delivery.
        error: String,
        /// As above.
        by: Value,
    },
}

/// What became of a [`Completion`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Completed {
    /// All of it is stored.
    Stored {
        /// Nothing of the partition is due any more: the lease was given back in the same commit.
        released: bool,
    },
    /// A value that was read has changed, or the delivery was withdrawn: the effects were discarded; a delivery that was not withdrawn
    /// stays, and its `conflicts` went up. Ask for the next delivery.
    Conflict(String),
    /// Effects that can never be stored (quota, unknown target): discarded; complete it as `Retry` or `Dead`.
    Rejected(String),
    /// Another worker owns the partition now: nothing was written.
    LeaseLost,
}

/// A delivery that failed for good.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    /// For [`Storage::replay_dead_letters`].
    pub sequence: i64,
    /// To whom it went.
    pub subscriber: String,
    /// Through what.
    pub interface: String,
    /// Of which event.
    pub event_id: String,
    /// The event's topic.
    pub topic: String,
    /// When that happened.
    pub occurred_at: Timestamp,
    /// The event's enrollment.
    pub enrollment: Option<String>,
    /// How often it was tried.
    pub attempts: u32,
    /// Why the last one failed.
    pub error: String,
    /// When it was given up.
    pub at: Timestamp,
}

/// A delivery that is handled, as long as its history is kept (seven days).
#[derive(Debug, Clone)]
pub struct FinishedDelivery {
    /// Its place in the order.
    pub sequence: i64,
    /// To whom it went.
    pub subscriber: String,
    /// Through what.
    pub interface: String,
    /// Of which event.
    pub event_id: String,
    /// The event's topic.
    pub topic: String,
    /// The event's enrollment.
    pub enrollment: Option<String>,
    /// `done`, `dead`, `withdrawn`.
    pub state: String,
    /// How often it was tried.
    pub attempts: u32,
    /// JSON of {digest, generation, call}, if it was handled.
    pub by: Value,
    /// When.
    pub finished_at: Timestamp,
}

impl Storage {
    /// Makes the subscriber's subscriptions these, from now on. Waiting deliveries stay.
    pub async fn set_subscriptions(
        &self,
        tenant: &TenantId,
        subscriber: &str,
        subscriptions: Vec<Subscription>,
        now: Timestamp,
    ) -> Result<(), StorageError> {
        let new = Arc::new((tenant.clone(), subscriber.to_owned(), subscriptions));
        self.write(Class::Answer, move |tx| {
            let new = Arc::clone(&new);
            Box::pin(async move {
                let (tenant, subscriber, subscriptions) = &*new;
                set_subscriptions(tx, tenant, subscriber, subscriptions, now).await?;
                Ok(Outcome::Commit(()))
            })
        })
        .await
    }

    /// The tenant's subscribers whose name begins with `prefix`, for instance `plugin:`, in the order of their names.
    pub async fn subscribers(&self, tenant: &TenantId, prefix: &str) -> Result<Vec<String>, StorageError> {
        let mut subscribers = Vec::new();
        for row in self.read_all(SELECT_SUBSCRIBERS, args![tenant.as_str()]).await? {
            let subscriber = row.text(0)?;
            if subscriber.starts_with(prefix) {
                subscribers.push(subscriber);
            }
        }
        Ok(subscribers)
    }

    /// Leases partitions that have something due and no owner, the longest waiting first, but of no subscriber more than its share.
    pub async fn claim(&self, claim: Claim) -> Result<Vec<Lease>, StorageError> {
        if self.outbox_due().await?.is_none_or(|due| due > claim.now) {
            return Ok(Vec::new());
        }
        let new = Arc::new(claim);
        self.write(Class::Background, move |tx| {
            let new = Arc::clone(&new);
            Box::pin(async move { Ok(Outcome::Commit(claim_ready(tx, &new).await?)) })
        })
        .await
    }

    /// The partition's oldest waiting delivery, if it is due and the lease holds.
    pub async fn next_delivery(&self, lease: &Lease, now: Timestamp) -> Result<Option<Delivery>, StorageError> {
        let args = args![
            lease.tenant.as_str(),
            lease.subscriber.as_str(),
            lease.interface.as_str(),
            lease.partition.as_str(),
            lease.owner.as_str(),
            lease.epoch,
            now.as_millis(),
        ];
        let Some(row) = self.look_up(SELECT_DELIVERY, args).await? else {
            return Ok(None);
        };
        Ok(Some(Delivery {
            sequence: row.int(0)?,
            attempt: row.count(1)?.saturating_add(1),
            conflicts: row.count(2)?,
            first_failed_at: row.opt_time(3)?,
            event: event(self.keyring(), &row, 4)?,
        }))
    }

    /// Ends a delivery, with its effects, fenced by the lease.
    pub async fn complete(&self, lease: &Lease, delivery: &Delivery, completion: Completion, now: Timestamp) -> Result<Completed, StorageError> {
        let work = Arc::new(Work { lease: lease.clone(), sequence: delivery.sequence, hops: delivery.event.hops, completion });
        self.write(Class::Background, move |tx| {
            let work = Arc::clone(&work);
            Box::pin(async move { Ok(Outcome::Commit(complete(tx, &work, now).await?)) })
        })
        .await
    }

    /// Prolongs a lease; `false`: it is lost.
    pub async fn renew(&self, lease: &Lease, for_: Duration, now: Timestamp) -> Result<bool, StorageError> {
        let (lease, until) = (lease.clone(), now.plus(for_));
        self.write(Class::Background, move |tx| {
            let lease = lease.clone();
            Box::pin(async move { Ok(Outcome::Commit(tx.run(RENEW, of_lease(args![until.as_millis()], &lease)).await? > 0)) })
        })
        .await
    }

    /// Gives a lease back; the partition is due again when its first waiting delivery is.
    pub async fn release(&self, lease: &Lease, now: Timestamp) -> Result<(), StorageError> {
        let lease = lease.clone();
        self.write(Class::Background, move |tx| {
            let lease = lease.clone();
            Box::pin(async move {
                release(tx, &lease, now).await?;
                Ok(Outcome::Commit(()))
            })
        })
        .await
    }

    /// Makes waiting partitions of a subscriber due, those first that would be next, at most 1,000 (a success to its destination, a reload).
    pub async fn wake_subscriber(&self, tenant: &TenantId, subscriber: &str, now: Timestamp) -> Result<(), StorageError> {
        let (tenant, subscriber) = (tenant.clone(), subscriber.to_owned());
        self.write(Class::Background, move |tx| {
            let (tenant, subscriber) = (tenant.clone(), subscriber.clone());
            Box::pin(async move {
                if tx
                    .run(WAKE, args![now.as_millis(), tenant.as_str(), subscriber.as_str(), tenant.as_str(), subscriber.as_str(), now.as_millis()])
                    .await?
                    > 0
                {
                    tx.after_commit(Change::Outbox);
                }
                Ok(Outcome::Commit(()))
            })
        })
        .await
    }

    /// When the next partition may be claimed that may not be claimed at `now`.
    pub async fn outbox_due_after(&self, now: Timestamp) -> Result<Option<Timestamp>, StorageError> {
        self.look_up(SELECT_DUE_AFTER, args![now.as_millis()]).await?.map_or(Ok(None), |row| row.opt_time(0))
    }

    /// When the next partition may be claimed; `None`: nothing waits.
    pub async fn outbox_due(&self) -> Result<Option<Timestamp>, StorageError> {
        self.look_up(SELECT_DUE, args![]).await?.map_or(Ok(None), |row| row.opt_time(0))
    }

    /// Notified after each commit that added or woke a delivery or set a timer. Everyone who waits is woken, and one permit is left.
    pub fn outbox_changed(&self) -> Arc<Notify> {
        Arc::clone(&self.inner.memory.outbox)
    }

    /// Waiting deliveries and the age of the oldest: for the metric.
    pub async fn outbox_lag(&self, now: Timestamp) -> Result<(u64, Duration), StorageError> {
        let Some(row) = self.read_one(SELECT_LAG, args![]).await? else {
            return Ok((0, Duration::ZERO));
        };
        let oldest = row.opt_time(1)?;
        Ok((u64::from(row.count(0)?), oldest.map_or(Duration::ZERO, |oldest| now.since(oldest))))
    }

    /// Newest first; `before` is the sequence of the last one of the page before. Without what the events say, which may be long.
    pub async fn dead_letters(&self, tenant: &TenantId, before: Option<i64>, limit: u32) -> Result<Vec<DeadLetter>, StorageError> {
        let rows = self.read_all(SELECT_DEAD, args![tenant.as_str(), before.unwrap_or(i64::MAX), i64::from(limit)]).await?;
        rows.iter()
            .map(|row| {
                Ok(DeadLetter {
                    sequence: row.int(0)?,
                    subscriber: row.text(1)?,
                    interface: row.text(2)?,
                    attempts: row.count(3)?,
                    error: match row.opt_blob(4)? {
                        Some(error) => self.keyring().at(&sealed::LAST_ERROR, tenant, &[&row.int(0)?]).open_text(error)?,
                        None => String::new(),
                    },
                    at: row.time(5)?,
                    event_id: row.text(6)?,
                    topic: row.text(7)?,
                    occurred_at: row.time(8)?,
                    enrollment: row.opt_text(9)?,
                })
            })
            .collect()
    }

    /// Puts dead letters back, at the end of their partitions, in the order in which they happened. Answers how many there were.
    pub async fn replay_dead_letters(&self, tenant: &TenantId, sequences: &[i64], now: Timestamp) -> Result<u64, StorageError> {
        let mut sequences = sequences.to_vec();
        sequences.sort_unstable();
        let (tenant, sequences): (_, Arc<[i64]>) = (tenant.clone(), sequences.into());
        self.write(Class::Answer, move |tx| {
            let (tenant, sequences) = (tenant.clone(), Arc::clone(&sequences));
            Box::pin(async move { Ok(Outcome::Commit(replay(tx, &tenant, &sequences, now).await?)) })
        })
        .await
    }

    /// Deliveries that are over, in their order, after `after`: which version of a plugin handled what.
    pub async fn finished_deliveries(&self, tenant: &TenantId, after: i64, limit: u32) -> Result<Vec<FinishedDelivery>, StorageError> {
        let rows = self.read_all(SELECT_FINISHED, args![tenant.as_str(), after, i64::from(limit)]).await?;
        rows.iter()
            .map(|row| {
                Ok(FinishedDelivery {
                    sequence: row.int(0)?,
                    subscriber: row.text(1)?,
                    interface: row.text(2)?,
                    event_id: row.text(3)?,
                    topic: row.text(4)?,
                    enrollment: row.opt_text(5)?,
                    state: row.text(6)?,
                    attempts: row.count(7)?,
                    by: row.opt_text(8)?.map_or(Ok(Value::Null), |by| crate::sql::parse_json(by.as_bytes()))?,
                    finished_at: row.time(9)?,
                })
            })
            .collect()
    }
}

const DELETE_SUBSCRIPTIONS: &str = "DELETE FROM subscriptions WHERE tenant_id = ? AND subscriber = ?";
const INSERT_SUBSCRIPTION: &str =
    "INSERT INTO subscriptions (tenant_id, subscriber, interface, topics, include_self, created_at) VALUES (?, ?, ?, ?, ?, ?)";
const SELECT_SUBSCRIPTIONS: &str =
    "SELECT tenant_id, subscriber, interface, topics, include_self FROM subscriptions ORDER BY tenant_id, subscriber, interface";
const SELECT_SUBSCRIBERS: &str = "SELECT DISTINCT subscriber FROM subscriptions WHERE tenant_id = ? ORDER BY subscriber";
pub(crate) const SELECT_READY: &str = "SELECT tenant_id, subscriber, interface, partition_key, lease_epoch FROM partitions \
    WHERE ready_at <= ? ORDER BY ready_at LIMIT ?";
pub(crate) const SELECT_READY_OF: &str = "SELECT tenant_id, subscriber, interface, partition_key, lease_epoch FROM partitions \
    WHERE tenant_id = ? AND subscriber = ? AND ready_at <= ? ORDER BY ready_at LIMIT ?";
pub(crate) const SELECT_NEXT_SUBSCRIBER: &str = "SELECT tenant_id, subscriber FROM partitions \
    WHERE ready_at IS NOT NULL AND (tenant_id, subscriber) > (?, ?) ORDER BY tenant_id, subscriber LIMIT 1";
const TAKE: &str = "UPDATE partitions SET lease_owner = ?, lease_epoch = ?, ready_at = ? \
    WHERE tenant_id = ? AND subscriber = ? AND interface = ? AND partition_key = ? AND lease_epoch = ? AND ready_at <= ?";
const RENEW: &str = "UPDATE partitions SET ready_at = ? \
    WHERE tenant_id = ? AND subscriber = ? AND interface = ? AND partition_key = ? AND lease_owner = ? AND lease_epoch = ?";
// A row while the lease holds; its column is NULL when the delivery waits no more.
const HOLDS: &str = "SELECT d.is_open FROM partitions p LEFT JOIN deliveries d ON d.sequence = ? AND d.is_open = 1 \
    WHERE p.tenant_id = ? AND p.subscriber = ? AND p.interface = ? AND p.partition_key = ? AND p.lease_owner = ? AND p.lease_epoch = ?";
const SET_BACKOFF: &str = "UPDATE partitions SET backoff_until = ? \
    WHERE tenant_id = ? AND subscriber = ? AND interface = ? AND partition_key = ? AND lease_owner = ? AND lease_epoch = ?";
// Due when the backoff of the first waiting delivery ends; with nothing waiting, never.
pub(crate) const RELEASE: &str = "UPDATE partitions SET lease_owner = NULL, ready_at = CASE WHEN EXISTS (SELECT 1 FROM deliveries d \
    WHERE d.tenant_id = partitions.tenant_id AND d.subscriber = partitions.subscriber AND d.interface = partitions.interface \
    AND d.partition_key = partitions.partition_key AND d.is_open = 1) THEN COALESCE(backoff_until, ?) ELSE NULL END \
    WHERE tenant_id = ? AND subscriber = ? AND interface = ? AND partition_key = ? AND lease_owner = ? AND lease_epoch = ?";
// Not all of a long backlog at once: the rest comes by its own times.
const WAKE: &str = "UPDATE partitions SET backoff_until = NULL, ready_at = ? WHERE tenant_id = ? AND subscriber = ? AND lease_owner IS NULL \
    AND (interface, partition_key) IN (SELECT w.interface, w.partition_key FROM partitions w WHERE w.tenant_id = ? AND w.subscriber = ? \
    AND w.lease_owner IS NULL AND w.ready_at > ? ORDER BY w.ready_at LIMIT 1000)";
// When nothing of the partition waits any more.
pub(crate) const RELEASE_IF_EMPTY: &str = "UPDATE partitions SET lease_owner = NULL, ready_at = NULL, backoff_until = NULL \
    WHERE tenant_id = ? AND subscriber = ? AND interface = ? AND partition_key = ? AND lease_owner = ? AND lease_epoch = ? \
    AND NOT EXISTS (SELECT 1 FROM deliveries d WHERE d.tenant_id = partitions.tenant_id AND d.subscriber = partitions.subscriber \
    AND d.interface = partitions.interface AND d.partition_key = partitions.partition_key AND d.is_open = 1)";
// Until the next attempt.
const RELEASE_UNTIL: &str = "UPDATE partitions SET lease_owner = NULL, ready_at = ?, backoff_until = ? \
    WHERE tenant_id = ? AND subscriber = ? AND interface = ? AND partition_key = ? AND lease_owner = ? AND lease_epoch = ?";
pub(crate) const SELECT_DUE_AFTER: &str = "SELECT MIN(ready_at) FROM partitions WHERE ready_at > ?";
const FREE_LEASES: &str =
    "UPDATE partitions SET lease_owner = NULL, ready_at = COALESCE(backoff_until, ?) WHERE lease_owner IS NOT NULL AND ready_at IS NOT NULL";
pub(crate) const SELECT_DUE: &str = "SELECT MIN(ready_at) FROM partitions WHERE ready_at IS NOT NULL";
pub(crate) const SELECT_DELIVERY: &str = "SELECT d.sequence, d.attempts, d.conflicts, d.first_failed_at, \
    e.id, e.tenant_id, e.topic, e.occurred_at, e.who, e.data, e.hops \
    FROM partitions p JOIN deliveries d ON d.tenant_id = p.tenant_id AND d.subscriber = p.subscriber AND d.interface = p.interface \
    AND d.partition_key = p.partition_key AND d.is_open = 1 JOIN events e ON e.id = d.event_id \
    WHERE p.tenant_id = ? AND p.subscriber = ? AND p.interface = ? AND p.partition_key = ? AND p.lease_owner = ? AND p.lease_epoch = ? \
    AND (p.backoff_until IS NULL OR p.backoff_until <= ?) ORDER BY d.sequence LIMIT 1";
const FINISH: &str =
    "UPDATE deliveries SET state = ?, is_open = 0, attempts = attempts + 1, last_error = ?, handled_by = ?, finished_at = ? WHERE sequence = ?";
static FINISH_AND_RELEASE: LazyLock<String> = LazyLock::new(|| together(&[FINISH, RELEASE_IF_EMPTY]));
const FAIL: &str = "UPDATE deliveries SET attempts = attempts + 1, conflicts = 0, first_failed_at = COALESCE(first_failed_at, ?), \
    last_error = ?, handled_by = ? WHERE sequence = ?";
// The time that it is put off does not count towards giving it up.
const POSTPONE: &str = "UPDATE deliveries SET conflicts = 0, first_failed_at = CASE WHEN first_failed_at + ? < ? THEN first_failed_at + ? ELSE ? END, last_error = ?, handled_by = ? WHERE sequence = ?";
const COUNT_CONFLICT: &str = "UPDATE deliveries SET conflicts = conflicts + 1 WHERE sequence = ?";
pub(crate) const SELECT_LAG: &str = "SELECT COUNT(*), MIN(created_at) FROM deliveries WHERE is_open = 1";
const SELECT_DEAD: &str = "SELECT d.sequence, d.subscriber, d.interface, d.attempts, d.last_error, d.finished_at, \
    e.id, e.topic, e.occurred_at, e.enrollment_id FROM deliveries d JOIN events e ON e.id = d.event_id \
    WHERE d.tenant_id = ? AND d.state = 'dead' AND d.sequence < ? ORDER BY d.sequence DESC LIMIT ?";
const SELECT_TO_REPLAY: &str =
    "SELECT subscriber, interface, partition_key, event_id FROM deliveries WHERE sequence = ? AND tenant_id = ? AND state = 'dead'";
const DELETE_DELIVERY: &str = "DELETE FROM deliveries WHERE sequence = ?";
const SELECT_FINISHED: &str = "SELECT d.sequence, d.subscriber, d.interface, d.event_id, e.topic, e.enrollment_id, d.state, d.attempts, \
    d.handled_by, d.finished_at FROM deliveries d JOIN events e ON e.id = d.event_id \
    WHERE d.tenant_id = ? AND d.sequence > ? AND d.is_open = 0 ORDER BY d.sequence LIMIT ?";

/// Frees every partition: who owns the database alone knows that the holders are dead, and need not wait for their leases to run out.
pub(crate) async fn free_leases(db: &mut Db<'_>, now: Timestamp) -> Result<(), StorageError> {
    db.run(FREE_LEASES, args![now.as_millis()]).await?;
    Ok(())
}

/// All tenants' subscriptions, at start.
pub(crate) async fn all_subscriptions(db: &mut Db<'_>) -> Result<Vec<(TenantId, String, Vec<Subscription>)>, StorageError> {
    let mut all: Vec<(TenantId, String, Vec<Subscription>)> = Vec::new();
    for row in db.all(SELECT_SUBSCRIPTIONS, args![]).await? {
        let (tenant, subscriber) = (tenant(&row, 0)?, row.text(1)?);
        let topics = serde_json::from_str(&row.text(3)?)
            .map_err(|error| StorageError::corrupt(format!("the topics of {subscriber} do not parse: {error}")))?;
        let subscription = Subscription { interface: row.text(2)?, topics, include_self: row.flag(4)? };
        match all.last_mut() {
            Some((last_tenant, last, subscriptions)) if *last_tenant == tenant && *last == subscriber => subscriptions.push(subscription),
            _ => all.push((tenant, subscriber, vec![subscription])),
        }
    }
    Ok(all)
}

async fn set_subscriptions(
    tx: &mut Tx,
    tenant: &TenantId,
    subscriber: &str,
    subscriptions: &[Subscription],
    now: Timestamp,
) -> Result<(), StorageError> {
    tx.run(DELETE_SUBSCRIPTIONS, args![tenant.as_str(), subscriber]).await?;
    for Subscription { interface, topics, include_self } in subscriptions {
        let topics = Value::from(topics.as_slice()).to_string();
        let args = args![tenant.as_str(), subscriber, interface.as_str(), topics, i64::from(*include_self), now.as_millis()];
        tx.run(INSERT_SUBSCRIPTION, args).await?;
    }
    tx.after_commit(Change::Subscriptions(tenant.clone(), subscriber.to_owned(), subscriptions.to_vec()));
    Ok(())
}

async fn claim_ready(tx: &mut Tx, new: &Claim) -> Result<Vec<Lease>, StorageError> {
    let mut leases = Leases { new, taken: Vec::new(), shares: new.shares.clone() };
    let rows = tx.all(SELECT_READY, args![new.now.as_millis(), i64::from(new.limit)]).await?;
    let may_be_more = rows.len() >= usize::try_from(new.limit).unwrap_or(usize::MAX);
    let mut skipped = false;
    for row in &rows {
        skipped |= !leases.take(tx, row).await?;
    }
    // Behind those of a subscriber that has its share already others may wait: each of them is asked for.
    let (mut tenant, mut subscriber) = (String::new(), String::new());
    while skipped && may_be_more && !leases.is_full() {
        let Some(row) = tx.one(SELECT_NEXT_SUBSCRIBER, args![tenant.as_str(), subscriber.as_str()]).await? else {
            break;
        };
        (tenant, subscriber) = (row.text(0)?, row.text(1)?);
        let left = leases.left_of(&TenantId::new(tenant.as_str()), &subscriber);
        if left == 0 {
            continue;
        }
        let args = args![tenant.as_str(), subscriber.as_str(), new.now.as_millis(), i64::from(left)];
        for row in tx.all(SELECT_READY_OF, args).await? {
            leases.take(tx, &row).await?;
        }
    }
    Ok(leases.taken)
}

struct Leases<'a> {
    new: &'a Claim,
    taken: Vec<Lease>,
    shares: HashMap<(TenantId, String), u32>,
}

impl Leases<'_> {
    fn is_full(&self) -> bool {
        self.taken.len() >= usize::try_from(self.new.limit).unwrap_or(usize::MAX)
    }

    fn left_of(&self, tenant: &TenantId, subscriber: &str) -> u32 {
        self.shares.get(&(tenant.clone(), subscriber.to_owned())).copied().unwrap_or(self.new.share)
    }

    /// `false`: its subscriber has its share.
    async fn take(&mut self, tx: &mut Tx, row: &Row) -> Result<bool, StorageError> {
        let Claim { owner, lease, now, .. } = self.new;
        let (tenant, subscriber, interface, partition) = (tenant(row, 0)?, row.text(1)?, row.text(2)?, row.text(3)?);
        let left = self.left_of(&tenant, &subscriber);
        if left == 0 {
            return Ok(false);
        }
        if self.is_full() {
            return Ok(true);
        }
        let (epoch, until) = (row.int(4)?, now.plus(*lease));
        let args = args![
            owner.as_str(),
            epoch + 1,
            until.as_millis(),
            tenant.as_str(),
            subscriber.as_str(),
            interface.as_str(),
            partition.as_str(),
            epoch,
            now.as_millis(),
        ];
        if tx.run(TAKE, args).await? > 0 {
            self.shares.insert((tenant.clone(), subscriber.clone()), left - 1);
            self.taken.push(Lease { tenant, subscriber, interface, partition, owner: owner.clone(), epoch: epoch + 1, until });
        }
        Ok(true)
    }
}

/// The partition's key, and what fences.
fn of_lease(mut args: crate::sql::Args, lease: &Lease) -> crate::sql::Args {
    args.add(lease.tenant.as_str());
    args.add(lease.subscriber.as_str());
    args.add(lease.interface.as_str());
    args.add(lease.partition.as_str());
    args.add(lease.owner.as_str());
    args.add(lease.epoch);
    args
}

async fn release(tx: &mut Tx, lease: &Lease, now: Timestamp) -> Result<(), StorageError> {
    if tx.run(RELEASE, of_lease(args![now.as_millis()], lease)).await? > 0 {
        tx.after_commit(Change::Outbox);
    }
    Ok(())
}

struct Work {
    lease: Lease,
    sequence: i64,
    hops: u32,
    completion: Completion,
}

async fn complete(tx: &mut Tx, work: &Work, now: Timestamp) -> Result<Completed, StorageError> {
    let Work { lease, sequence, hops, completion } = work;
    let Some(held) = tx.one(HOLDS, of_lease(args![*sequence], lease)).await? else {
        return Ok(Completed::LeaseLost);
    };
    if held.opt_int(0)?.is_none() {
        return Ok(Completed::Conflict("the delivery was withdrawn".to_owned()));
    }
    match completion {
        Completion::Done { effects, by } => {
            if let Some(effects) = effects {
                match effects::check(tx, effects, now).await? {
                    Checked::Sound => {}
                    Checked::Conflict(what) => {
                        tx.run(COUNT_CONFLICT, args![*sequence]).await?;
                        return Ok(Completed::Conflict(what));
                    }
                    Checked::Rejected(what) => return Ok(Completed::Rejected(what)),
                }
                effects::apply(tx, effects, &effects::cause_of(effects, *hops), Some(*sequence), now).await?;
            }
            let no_error: Option<Vec<u8>> = None;
            finish(tx, lease, args!["done", no_error, by.to_string(), now.as_millis(), *sequence]).await
        }
        Completion::Retry { at, error, counted, by } => {
            let error = tx.keyring.at(&sealed::LAST_ERROR, &lease.tenant, &[sequence]).seal(error.as_bytes())?;
            if *counted {
                tx.run(FAIL, args![now.as_millis(), error, by.to_string(), *sequence]).await?;
            } else {
                let wait = at.as_millis().saturating_sub(now.as_millis()).max(0);
                tx.run(POSTPONE, args![wait, now.as_millis(), wait, now.as_millis(), error, by.to_string(), *sequence]).await?;
            }
            tx.run(RELEASE_UNTIL, of_lease(args![at.as_millis(), at.as_millis()], lease)).await?;
            tx.after_commit(Change::Outbox);
            Ok(Completed::Stored { released: true })
        }
        Completion::Dead { error, by } => {
            let error = tx.keyring.at(&sealed::LAST_ERROR, &lease.tenant, &[sequence]).seal(error.as_bytes())?;
            finish(tx, lease, args!["dead", error, by.to_string(), now.as_millis(), *sequence]).await
        }
    }
}

/// Ends a delivery, and gives the lease back if nothing more waits.
async fn finish(tx: &mut Tx, lease: &Lease, finished: crate::sql::Args) -> Result<Completed, StorageError> {
    // One row is the delivery; the other can only be the partition.
    if tx.run(&FINISH_AND_RELEASE, of_lease(finished, lease)).await? > 1 {
        return Ok(Completed::Stored { released: true });
    }
    let never: Option<i64> = None;
    tx.run(SET_BACKOFF, of_lease(args![never], lease)).await?;
    Ok(Completed::Stored { released: false })
}

async fn replay(tx: &mut Tx, tenant: &TenantId, sequences: &[i64], now: Timestamp) -> Result<u64, StorageError> {
    let mut replayed = 0;
    for &sequence in sequences {
        let Some(row) = tx.one(SELECT_TO_REPLAY, args![sequence, tenant.as_str()]).await? else {
            continue;
        };
        let (subscriber, interface, partition, event) = (row.text(0)?, row.text(1)?, row.text(2)?, row.text(3)?);
        let to = Address { tenant, subscriber: &subscriber, interface: &interface, partition: &partition };
        deliver(tx, &to, &event, now).await?;
        tx.run(DELETE_DELIVERY, args![sequence]).await?;
        replayed += 1;
    }
    Ok(replayed)
}
