//! Plugins' one-shot timers and cron entries. Both become deliveries of the interface `schedule`, in partitions of their own.

use crate::effects::TimerChange;
use crate::events::{Address, Cause, Happened, deliver, insert_event, record};
use crate::memory::Change;
use crate::sql::{Columns, Db, args};
use crate::writer::{Class, Outcome, Tx};
use crate::{Storage, StorageError, sealed, tenant};
use bytes::Bytes;
use serde_json::json;
use std::sync::Arc;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_protocol::json::to_json;
use wasmdm_protocol::time::Timestamp;

/// A cron entry of a plugin's manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CronEntry {
    /// For which tenant.
    pub tenant: TenantId,
    /// With its scope, as in [`crate::effects::PluginEffects::plugin`].
    pub plugin: String,
    /// Of the manifest.
    pub name: String,
    /// When it fires next.
    pub next_due: Timestamp,
}

/// The interface of ticks.
const SCHEDULE: &str = "schedule";
const TICK: &str = "schedule.tick";
/// Timers and cron entries in one step, at most.
const STEP: i64 = 100;

const SELECT_TIMER: &str = "SELECT due_at FROM timers WHERE tenant_id = ? AND plugin = ? AND name = ? AND enrollment_id = ?";
const SELECT_WAITING_TICK: &str = "SELECT e.occurred_at FROM deliveries d JOIN events e ON e.id = d.event_id \
    WHERE d.tenant_id = ? AND d.subscriber = ? AND d.interface = 'schedule' AND d.partition_key = ? AND d.is_open = 1 ORDER BY d.sequence LIMIT 1";
const UPSERT_TIMER: &str = "INSERT INTO timers (tenant_id, plugin, name, enrollment_id, due_at, data, created_at) VALUES (?, ?, ?, ?, ?, ?, ?) \
    ON CONFLICT (tenant_id, plugin, name, enrollment_id) DO UPDATE SET due_at = excluded.due_at, data = excluded.data, created_at = excluded.created_at";
const DELETE_TIMER: &str = "DELETE FROM timers WHERE tenant_id = ? AND plugin = ? AND name = ? AND enrollment_id = ?";
const WITHDRAW: &str = "UPDATE deliveries SET state = 'withdrawn', is_open = 0, finished_at = ? WHERE tenant_id = ? AND subscriber = ? \
    AND interface = 'schedule' AND partition_key = ? AND is_open = 1 AND sequence <> ?";
pub(crate) const SELECT_DUE_TIMERS: &str =
    "SELECT tenant_id, plugin, name, enrollment_id, due_at, data FROM timers WHERE due_at <= ? ORDER BY due_at LIMIT ?";
const NEXT_TIMER: &str = "SELECT MIN(due_at) FROM timers";
const SELECT_CRON: &str = "SELECT name FROM cron_entries WHERE tenant_id = ? AND plugin = ?";
const DELETE_CRON: &str = "DELETE FROM cron_entries WHERE tenant_id = ? AND plugin = ? AND name = ?";
const UPSERT_CRON: &str = "INSERT INTO cron_entries (tenant_id, plugin, name, next_due) VALUES (?, ?, ?, ?) \
    ON CONFLICT (tenant_id, plugin, name) DO UPDATE SET next_due = excluded.next_due WHERE cron_entries.next_due > excluded.next_due";
pub(crate) const SELECT_DUE_CRON: &str = "SELECT tenant_id, plugin, name, next_due FROM cron_entries WHERE next_due <= ? ORDER BY next_due LIMIT ?";
const NEXT_CRON: &str = "SELECT MIN(next_due) FROM cron_entries";
const MOVE_CRON: &str = "UPDATE cron_entries SET next_due = ? WHERE tenant_id = ? AND plugin = ? AND name = ? AND next_due = ?";

impl Storage {
    /// Turns due timers into deliveries of the interface `schedule` (event topic `schedule.tick`, data `{name, scheduled_for, data: {"$data"}}`;
    /// `scheduled_for` in milliseconds). Answers when the next is due.
    pub async fn fire_timers(&self, now: Timestamp) -> Result<Option<Timestamp>, StorageError> {
        loop {
            let next = self.next(NEXT_TIMER).await?;
            if next.is_none_or(|next| next > now) {
                return Ok(next);
            }
            self.write(Class::Background, move |tx| {
                Box::pin(async move {
                    fire_due(tx, now).await?;
                    Ok(Outcome::Commit(()))
                })
            })
            .await?;
        }
    }

    /// When the timer fires, or fired if its tick still waits or is being handled; `None`: there is none.
    pub async fn timer(&self, tenant: &TenantId, plugin: &str, name: &str, who: Option<&EnrollmentId>) -> Result<Option<Timestamp>, StorageError> {
        exists(&mut self.quick_reader()?.db(), tenant, plugin, name, who).await
    }

    /// Makes the plugin's cron entries these: new ones get `next_due`, known ones keep theirs unless it is later than `next_due`, others go.
    pub async fn set_cron(&self, tenant: &TenantId, plugin: &str, entries: Vec<CronEntry>) -> Result<(), StorageError> {
        let new = Arc::new((tenant.clone(), plugin.to_owned(), entries));
        self.write(Class::Answer, move |tx| {
            let new = Arc::clone(&new);
            Box::pin(async move {
                let (tenant, plugin, entries) = &*new;
                for row in tx.all(SELECT_CRON, args![tenant.as_str(), plugin.as_str()]).await? {
                    let name = row.text(0)?;
                    if !entries.iter().any(|entry| entry.name == name) {
                        tx.run(DELETE_CRON, args![tenant.as_str(), plugin.as_str(), name]).await?;
                    }
                }
                for entry in entries {
                    let args = args![tenant.as_str(), plugin.as_str(), entry.name.as_str(), entry.next_due.as_millis()];
                    tx.run(UPSERT_CRON, args).await?;
                }
                tx.after_commit(Change::Outbox);
                Ok(Outcome::Commit(()))
            })
        })
        .await
    }

    /// Entries that are due, and when the next one is after them.
    pub async fn due_cron(&self, now: Timestamp) -> Result<(Vec<CronEntry>, Option<Timestamp>), StorageError> {
        let mut due = Vec::new();
        for row in self.read_all(SELECT_DUE_CRON, args![now.as_millis(), STEP]).await? {
            due.push(CronEntry { tenant: tenant(&row, 0)?, plugin: row.text(1)?, name: row.text(2)?, next_due: row.time(3)? });
        }
        Ok((due, self.next(NEXT_CRON).await?))
    }

    /// Moves the entry from `entry.next_due` to `next` and adds one delivery, unless one of the same entry still waits (missed ticks coalesce).
    /// Does nothing if another node moved it already.
    pub async fn fire_cron(&self, entry: &CronEntry, next: Timestamp, now: Timestamp) -> Result<(), StorageError> {
        let entry = Arc::new(entry.clone());
        self.write(Class::Background, move |tx| {
            let entry = Arc::clone(&entry);
            Box::pin(async move {
                fire_cron(tx, &entry, next, now).await?;
                Ok(Outcome::Commit(()))
            })
        })
        .await
    }

    async fn next(&self, sql: &'static str) -> Result<Option<Timestamp>, StorageError> {
        self.look_up(sql, args![]).await?.map_or(Ok(None), |row| row.opt_time(0))
    }
}

fn partition(name: &str, who: Option<&EnrollmentId>) -> String {
    format!("timer/{name}/{}", who.map_or("", EnrollmentId::as_str))
}

/// When the timer fires, or fired if its tick is not yet handled.
pub(crate) async fn exists(
    db: &mut Db<'_>,
    tenant: &TenantId,
    plugin: &str,
    name: &str,
    who: Option<&EnrollmentId>,
) -> Result<Option<Timestamp>, StorageError> {
    let id = who.map_or("", EnrollmentId::as_str);
    if let Some(row) = db.one(SELECT_TIMER, args![tenant.as_str(), plugin, name, id]).await? {
        return row.time(0).map(Some);
    }
    let args = args![tenant.as_str(), format!("plugin:{plugin}"), partition(name, who)];
    db.one(SELECT_WAITING_TICK, args).await?.map(|row| row.time(0)).transpose()
}

/// Sets or cancels; ticks that wait are withdrawn, but for the one that is being completed.
pub(crate) async fn change(
    tx: &mut Tx,
    tenant: &TenantId,
    plugin: &str,
    change: &TimerChange,
    completing: Option<i64>,
    now: Timestamp,
) -> Result<(), StorageError> {
    let (name, who) = match change {
        TimerChange::Set { name, who, .. } | TimerChange::Cancel { name, who, .. } => (name, who.as_ref()),
    };
    let id = who.map_or("", EnrollmentId::as_str);
    match change {
        TimerChange::Set { at, data, .. } => {
            let data = tx.keyring.at(&sealed::TIMER_DATA, tenant, &[&plugin, name, &id]).seal(data)?;
            let args = args![tenant.as_str(), plugin, name.as_str(), id, at.as_millis(), data, now.as_millis()];
            tx.run(UPSERT_TIMER, args).await?;
            tx.after_commit(Change::Outbox);
        }
        TimerChange::Cancel { .. } => {
            tx.run(DELETE_TIMER, args![tenant.as_str(), plugin, name.as_str(), id]).await?;
        }
    }
    let args = args![now.as_millis(), tenant.as_str(), format!("plugin:{plugin}"), partition(name, who), completing.unwrap_or(-1)];
    tx.run(WITHDRAW, args).await?;
    Ok(())
}

async fn fire_due(tx: &mut Tx, now: Timestamp) -> Result<(), StorageError> {
    for row in tx.all(SELECT_DUE_TIMERS, args![now.as_millis(), STEP]).await? {
        let (tenant, plugin, name, id) = (tenant(&row, 0)?, row.text(1)?, row.text(2)?, row.text(3)?);
        let who = (!id.is_empty()).then(|| EnrollmentId::new(id.as_str()));
        let tick = Tick { tenant: &tenant, plugin: &plugin, name: &name, partition: partition(&name, who.as_ref()), due: row.time(4)? };
        let data = tx.keyring.at(&sealed::TIMER_DATA, &tenant, &[&plugin, &name, &id]).open(row.blob(5)?)?;
        tick_now(tx, &tick, who.as_ref(), &data, now).await?;
        tx.run(DELETE_TIMER, args![tenant.as_str(), plugin.as_str(), name.as_str(), id]).await?;
    }
    Ok(())
}

async fn fire_cron(tx: &mut Tx, entry: &CronEntry, next: Timestamp, now: Timestamp) -> Result<(), StorageError> {
    let CronEntry { tenant, plugin, name, next_due } = entry;
    let args = args![next.as_millis(), tenant.as_str(), plugin.as_str(), name.as_str(), next_due.as_millis()];
    if tx.run(MOVE_CRON, args).await? == 0 {
        return Ok(());
    }
    tx.after_commit(Change::Outbox);
    let partition = format!("cron/{name}");
    let waiting = args![tenant.as_str(), format!("plugin:{plugin}"), partition.as_str()];
    if tx.one(SELECT_WAITING_TICK, waiting).await?.is_some() {
        return Ok(());
    }
    tick_now(tx, &Tick { tenant, plugin, name, partition, due: *next_due }, None, &Bytes::new(), now).await
}

struct Tick<'a> {
    tenant: &'a TenantId,
    plugin: &'a str,
    name: &'a str,
    partition: String,
    due: Timestamp,
}

async fn tick_now(tx: &mut Tx, tick: &Tick<'_>, who: Option<&EnrollmentId>, data: &Bytes, now: Timestamp) -> Result<(), StorageError> {
    let record = match who {
        Some(id) => record(tx, id).await?,
        None => None,
    };
    let outside = Cause::default();
    let happened = Happened { tenant: tick.tenant, topic: TICK, request_type: None, at: tick.due, who, cause: &outside };
    let data = json!({
        "name": tick.name,
        "scheduled_for": tick.due.as_millis(),
        "data": to_json(&wasmdm_protocol::plist::Value::Data(data.to_vec())),
    });
    let event = insert_event(tx, &happened, record.as_ref(), &data).await?;
    let subscriber = format!("plugin:{}", tick.plugin);
    let to = Address { tenant: tick.tenant, subscriber: &subscriber, interface: SCHEDULE, partition: &tick.partition };
    deliver(tx, &to, &event, now).await
}
