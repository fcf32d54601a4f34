//! What a plugin's call leaves behind: buffered while it runs, committed with the decision or the acknowledgement.
//!
//! [`check`] comes first and writes nothing of the plugin's; only when all that it read still holds does [`apply`] write. So a conflict
//! never has to be rolled back.

use crate::commands::{CommandOptions, EnqueueOutcome, Queueing, cancel, is_cancellable, is_key_used, is_reused, queue};
use crate::enrollments::{add_tag, is_known, is_quarantined, release, remove_tag};
use crate::events::Cause;
use crate::plugin_key_values::{DELETE_PAIR, add_usage, clear_expired, size, usage};
use crate::sql::{Columns, args};
use crate::writer::Tx;
use crate::{StorageError, millis, sealed, timers, wakes};
use bytes::Bytes;
use std::collections::HashMap;
use std::fmt;
use wasmdm_protocol::command::Command;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_protocol::time::Timestamp;

/// A write that depended on values which may have changed meanwhile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Applied<T> {
    /// All of it is stored.
    Done(T),
    /// Something that a plugin read has changed; nothing was written. The text says what.
    Conflict(String),
}

/// What a plugin wrote while it decided about a device.
#[derive(Debug, Clone)]
pub struct DecisionEffects {
    /// What it wrote.
    pub effects: PluginEffects,
    /// `false`: the decision stands without them, so what cannot be stored (over the quota, for instance) is left out. So it is with a
    /// plugin that is only monitored or fails open, and with every deny.
    pub required: bool,
}

/// Those of the effects that are to be applied with a decision.
///
/// # Errors
/// [`StorageError::Invalid`] when required ones can never be stored.
pub(crate) async fn check_decision<'a>(
    tx: &mut Tx,
    all: &'a [DecisionEffects],
    now: Timestamp,
) -> Result<Applied<Vec<&'a PluginEffects>>, StorageError> {
    let mut sound = Vec::new();
    for DecisionEffects { effects, required } in all {
        match check(tx, effects, now).await? {
            Checked::Sound => sound.push(effects),
            Checked::Conflict(what) => return Ok(Applied::Conflict(what)),
            Checked::Rejected(problem) if *required => return Err(StorageError::Invalid { field: "effects", problem }),
            Checked::Rejected(problem) => {
                tracing::warn!(plugin = effects.plugin, "What plugin {} wrote with its decision is left out: {problem}", effects.plugin);
            }
        }
    }
    Ok(Applied::Done(sound))
}

/// All effects of one call of one plugin.
#[derive(Debug, Clone)]
pub struct PluginEffects {
    /// The tenant that the call belonged to.
    pub tenant: TenantId,
    /// The plugin's name with its scope: `NAME` for a shared one, `TENANT/NAME` for a tenant's own.
    pub plugin: String,
    /// Re-checked at commit: the key and the version that was read (`None`: it was absent). One entry per key: the first read.
    pub reads: Vec<(String, Option<String>)>,
    /// In order.
    pub writes: Vec<KvWrite>,
    /// What the writes must stay within.
    pub quota: KvQuota,
    /// In order. All of one call or none.
    pub commands: Vec<PluginCommand>,
    /// Commands to cancel; each was cancellable when the plugin asked (re-checked).
    pub cancels: Vec<(EnrollmentId, String)>,
    /// In order.
    pub tags: Vec<TagChange>,
    /// Enrollments whose quarantine ends; each was quarantined when the plugin asked (re-checked).
    pub releases: Vec<EnrollmentId>,
    /// In order.
    pub timers: Vec<TimerChange>,
    /// Whom to wake, whether or not a command waits.
    pub pushes: Vec<EnrollmentId>,
}

/// A key-value that is put or removed.
#[derive(Clone)]
pub struct KvWrite {
    /// Not empty.
    pub key: String,
    /// `None` removes.
    pub value: Option<Bytes>,
    /// The version that the write gives the key: chosen by the host, random.
    pub version: String,
    /// Absent from then on.
    pub expires_at: Option<Timestamp>,
}

/// Without the value: a plugin may keep secrets there.
impl fmt::Debug for KvWrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvWrite").field("key", &self.key).field("removes", &self.value.is_none()).finish_non_exhaustive()
    }
}

/// Checked at commit over the plugin's whole name space of the tenant.
#[derive(Debug, Clone, Copy)]
pub struct KvQuota {
    /// Of keys and values together.
    pub bytes: u64,
    /// Pairs.
    pub keys: u64,
}

/// A command that a plugin queues.
#[derive(Debug, Clone)]
pub struct PluginCommand {
    /// For whom.
    pub target: EnrollmentId,
    /// What; the host has given it its UUID.
    pub command: Command,
    /// How.
    pub options: CommandOptions,
}

/// Tags of one enrollment.
#[derive(Debug, Clone)]
pub struct TagChange {
    /// Whose.
    pub id: EnrollmentId,
    /// To set.
    pub add: Vec<String>,
    /// To take away.
    pub remove: Vec<String>,
}

/// A one-shot timer that is set or cancelled.
#[derive(Debug, Clone)]
pub enum TimerChange {
    /// Sets or moves it. A fired tick of it that still waits is withdrawn.
    Set {
        /// The timer.
        name: String,
        /// The enrollment that it is about.
        who: Option<EnrollmentId>,
        /// When it fires.
        at: Timestamp,
        /// Handed back with the tick.
        data: Bytes,
    },
    /// `existed` is what the plugin was told (re-checked). Also withdraws a fired tick that is still waiting.
    Cancel {
        /// The timer.
        name: String,
        /// The enrollment that it is about.
        who: Option<EnrollmentId>,
        /// What [`crate::Storage::timer`] said.
        existed: bool,
    },
}

/// Whether effects may be applied.
pub(crate) enum Checked {
    Sound,
    /// Something that the plugin read or was told has changed.
    Conflict(String),
    /// They can never be stored.
    Rejected(String),
}

const SELECT_STORED: &str = "SELECT version, size, expires_at FROM plugin_key_values WHERE tenant_id = ? AND plugin = ? AND item_key = ?";
const UPSERT_PAIR: &str = "INSERT INTO plugin_key_values (tenant_id, plugin, item_key, item_value, version, size, expires_at, updated_at) \
    VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (tenant_id, plugin, item_key) DO UPDATE SET item_value = excluded.item_value, \
    version = excluded.version, size = excluded.size, expires_at = excluded.expires_at, updated_at = excluded.updated_at";

/// Who is behind the effects of a call that handled an event of so many hops.
pub(crate) fn cause_of(effects: &PluginEffects, hops: u32) -> Cause {
    Cause { subscriber: Some(format!("plugin:{}", effects.plugin)), hops: hops.saturating_add(1) }
}

/// Whether all that the plugin read and was told still holds, and the effects can be stored.
pub(crate) async fn check(tx: &mut Tx, effects: &PluginEffects, now: Timestamp) -> Result<Checked, StorageError> {
    let conflict = |what: String| Ok(Checked::Conflict(what));
    let PluginEffects { tenant, plugin, .. } = effects;
    for (key, version) in &effects.reads {
        let stored = stored(tx, effects, key).await?;
        let current = stored.filter(|stored| stored.expires_at.is_none_or(|at| at > now)).map(|stored| stored.version);
        if current != *version {
            return conflict(format!("the key `{key}` has changed"));
        }
    }
    for (id, uuid) in &effects.cancels {
        if !is_cancellable(tx, tenant, id, uuid).await? {
            return conflict(format!("command {uuid} of enrollment {id} is finished"));
        }
    }
    for id in &effects.releases {
        if !is_quarantined(tx, tenant, id).await? {
            return conflict(format!("enrollment {id} is not in quarantine"));
        }
    }
    let mut set_here: HashMap<(&str, Option<&EnrollmentId>), bool> = HashMap::new();
    for timer in &effects.timers {
        match timer {
            TimerChange::Set { name, who, .. } => {
                set_here.insert((name, who.as_ref()), true);
            }
            TimerChange::Cancel { name, who, existed } => {
                // What the call itself did before is what it was told.
                let exists = match set_here.insert((name, who.as_ref()), false) {
                    Some(exists) => exists,
                    None => timers::exists(&mut tx.db(), tenant, plugin, name, who.as_ref()).await?.is_some(),
                };
                if exists != *existed {
                    return conflict(format!("the timer `{name}` has changed"));
                }
            }
        }
    }
    reject(tx, effects, now).await
}

async fn reject(tx: &mut Tx, effects: &PluginEffects, now: Timestamp) -> Result<Checked, StorageError> {
    let rejected = |problem: String| Ok(Checked::Rejected(problem));
    let targets = effects.commands.iter().map(|command| &command.target).chain(effects.tags.iter().map(|change| &change.id));
    let timers = effects.timers.iter().filter_map(|timer| match timer {
        TimerChange::Set { who, .. } => who.as_ref(),
        TimerChange::Cancel { .. } => None,
    });
    for target in targets.chain(timers).chain(&effects.pushes) {
        if !is_known(tx, &effects.tenant, target).await? {
            return rejected(format!("enrollment {target} is unknown"));
        }
    }
    let mut bodies: HashMap<&str, &Bytes> = HashMap::new();
    let origin = format!("plugin:{}", effects.plugin);
    for PluginCommand { command, target, options, .. } in &effects.commands {
        // A call that ran beside this one may have queued another body under the same key: that one stands, and this is not queued.
        if let Some(key) = &options.idempotency_key
            && is_key_used(tx, &effects.tenant, &origin, target, key).await?
        {
            continue;
        }
        let same = bodies.insert(&command.uuid, &command.raw).is_none_or(|first| *first == command.raw);
        if !same || is_reused(tx, &effects.tenant, command).await? {
            return rejected(format!("the CommandUUID {} was used for another command", command.uuid));
        }
    }
    if effects.writes.iter().any(|write| write.key.is_empty()) {
        return rejected("a key is empty".to_owned());
    }
    if effects.writes.is_empty() || within_quota(tx, effects).await? {
        return Ok(Checked::Sound);
    }
    // Expired pairs count until they are cleared away; a plugin must not fail because of them.
    clear_expired(tx, &effects.tenant, &effects.plugin, now, i64::MAX).await?;
    if within_quota(tx, effects).await? {
        return Ok(Checked::Sound);
    }
    let KvQuota { bytes, keys } = effects.quota;
    rejected(format!("the key-values would exceed the quota of {bytes} bytes in {keys} keys"))
}

struct Stored {
    version: String,
    size: i64,
    expires_at: Option<Timestamp>,
}

async fn stored(tx: &mut Tx, effects: &PluginEffects, key: &str) -> Result<Option<Stored>, StorageError> {
    let row = tx.one(SELECT_STORED, args![effects.tenant.as_str(), effects.plugin.as_str(), key]).await?;
    row.map(|row| Ok(Stored { version: row.text(0)?, size: row.int(1)?, expires_at: row.opt_time(2)? })).transpose()
}

/// How bytes and keys would change.
async fn growth(tx: &mut Tx, effects: &PluginEffects) -> Result<(i64, i64), StorageError> {
    // The last write of a key is what stays.
    let last: HashMap<&str, &KvWrite> = effects.writes.iter().map(|write| (write.key.as_str(), write)).collect();
    let (mut bytes, mut keys) = (0, 0);
    for (key, write) in last {
        if let Some(stored) = stored(tx, effects, key).await? {
            bytes -= stored.size;
            keys -= 1;
        }
        if let Some(value) = &write.value {
            bytes += size(key, value);
            keys += 1;
        }
    }
    Ok((bytes, keys))
}

/// Writes that free space are always within it: a quota may have been lowered.
async fn within_quota(tx: &mut Tx, effects: &PluginEffects) -> Result<bool, StorageError> {
    let (bytes, keys) = usage(&mut tx.db(), &effects.tenant, &effects.plugin).await?;
    let (more_bytes, more_keys) = growth(tx, effects).await?;
    let within = |used: u64, more: i64, limit: u64| more <= 0 || used.saturating_add(more.unsigned_abs()) <= limit;
    Ok(within(bytes, more_bytes, effects.quota.bytes) && within(keys, more_keys, effects.quota.keys))
}

/// Writes all of it; [`check`] said that it may. `completing`: the delivery that the call handled, which a timer change leaves alone.
pub(crate) async fn apply(tx: &mut Tx, effects: &PluginEffects, cause: &Cause, completing: Option<i64>, now: Timestamp) -> Result<(), StorageError> {
    let PluginEffects { tenant, plugin, .. } = effects;
    if !effects.writes.is_empty() {
        let (bytes, keys) = growth(tx, effects).await?;
        for write in &effects.writes {
            put(tx, effects, write, now).await?;
        }
        add_usage(tx, tenant, plugin, bytes, keys).await?;
    }
    for (id, uuid) in &effects.cancels {
        cancel(tx, tenant, id, uuid, cause, now).await?;
    }
    let origin = format!("plugin:{plugin}");
    for PluginCommand { target, command, options } in &effects.commands {
        let queued = queue(tx, &Queueing { tenant, target, command, options, origin: &origin, cause, now }).await?;
        match queued {
            EnqueueOutcome::Queued { .. } | EnqueueOutcome::AlreadyQueued { .. } => {}
            EnqueueOutcome::UnknownEnrollment | EnqueueOutcome::UuidReused | EnqueueOutcome::NotAgain(_) => {
                return Err(StorageError::corrupt(format!("command {} passed its check and could not be queued", command.uuid)));
            }
        }
    }
    for TagChange { id, add, remove } in &effects.tags {
        for tag in add {
            add_tag(tx, tenant, id, tag, now).await?;
        }
        for tag in remove {
            remove_tag(tx, id, tag).await?;
        }
    }
    for id in &effects.releases {
        release(tx, tenant, id, now).await?;
    }
    for timer in &effects.timers {
        timers::change(tx, tenant, plugin, timer, completing, now).await?;
    }
    for id in &effects.pushes {
        wakes::asked(tx, tenant, id, now).await?;
    }
    Ok(())
}

async fn put(tx: &mut Tx, effects: &PluginEffects, write: &KvWrite, now: Timestamp) -> Result<(), StorageError> {
    let (tenant, plugin, key) = (effects.tenant.as_str(), effects.plugin.as_str(), write.key.as_str());
    match &write.value {
        Some(value) => {
            let value_blob = tx.keyring.at(&sealed::KEY_VALUE, &effects.tenant, &[&plugin, &key]).seal(value)?;
            let size = size(key, value);
            let args = args![tenant, plugin, key, value_blob, write.version.as_str(), size, millis(write.expires_at), now.as_millis()];
            tx.run(UPSERT_PAIR, args).await?;
        }
        None => {
            tx.run(DELETE_PAIR, args![tenant, plugin, key]).await?;
        }
    }
    Ok(())
}
