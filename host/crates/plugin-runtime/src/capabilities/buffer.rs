//! What a call wrote, until it ends: its own reads see it, nobody else does.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use uuid::Uuid;
use wasmdm_protocol::command::Command;
use wasmdm_protocol::enrollment::EnrollmentId;
use wasmdm_storage::commands::CommandOptions;
use wasmdm_storage::effects::{KvQuota, KvWrite, PluginCommand, PluginEffects, TagChange, TimerChange};
use wasmdm_storage::events::Event;

use crate::bindings::wasmdm::plugin::types as wit;
use crate::call::{Failure, State};
use crate::capabilities::{invalid, not_granted, quota};
use crate::contract;
use crate::effective::KvGrant;

/// Bytes of keys that a guest chooses: idempotency, collapse, timers.
pub(crate) const MAX_KEY: usize = 255;

/// All writes of a call, and the versions that it read.
#[derive(Debug, Default)]
pub(crate) struct Buffer {
    /// The first read of each key.
    pub(crate) reads: BTreeMap<String, Option<String>>,
    pub(crate) writes: BTreeMap<String, KvWrite>,
    pub(crate) written_bytes: usize,
    pub(crate) commands: Vec<PluginCommand>,
    /// Of these, the ones that are queued only if their key turns out to be free again. The call does not see them.
    pub(crate) if_key_is_free: BTreeSet<String>,
    /// Calls of `enqueue` so far: names the commands that have no key of their own.
    pub(crate) enqueued: usize,
    pub(crate) cancels: Vec<(EnrollmentId, String)>,
    pub(crate) tags: Vec<TagChange>,
    pub(crate) releases: Vec<EnrollmentId>,
    pub(crate) timers: Vec<TimerChange>,
    pub(crate) pushes: BTreeSet<EnrollmentId>,
}

impl Buffer {
    fn is_empty(&self) -> bool {
        self.reads.is_empty()
            && self.writes.is_empty()
            && self.commands.is_empty()
            && self.cancels.is_empty()
            && self.tags.is_empty()
            && self.releases.is_empty()
            && self.timers.is_empty()
            && self.pushes.is_empty()
    }

    pub(crate) fn write(&mut self, key: &str, value: Option<Bytes>, expires_at: Option<wasmdm_protocol::time::Timestamp>) -> String {
        let size = |write: &KvWrite| write.key.len().saturating_add(write.value.as_ref().map_or(0, Bytes::len));
        let version = Uuid::new_v4().simple().to_string();
        let write = KvWrite { key: key.to_owned(), value, version: version.clone(), expires_at };
        self.written_bytes = self.written_bytes.saturating_add(size(&write));
        if let Some(before) = self.writes.insert(key.to_owned(), write) {
            self.written_bytes = self.written_bytes.saturating_sub(size(&before));
        }
        version
    }
}

impl State {
    /// The name space of the plugin's key-values.
    pub(crate) fn name_space(&self) -> &str {
        &self.shared.identity.name
    }

    /// Where a monitored plugin writes.
    pub(crate) fn shadow_name_space(&self) -> String {
        format!("{}~monitor", self.shared.identity.name)
    }

    /// Everything that the call leaves behind, if it is anything.
    pub(crate) fn into_effects(self) -> Option<PluginEffects> {
        let grant = self.settings.capabilities.kv.unwrap_or(KvGrant { bytes: 0, keys: 0, value_bytes: 0 });
        let plugin = if self.shadow { self.shadow_name_space() } else { self.name_space().to_owned() };
        let mut buffer = self.buffer;
        if self.shadow {
            // A decision that does not count must not be repeated because of what it read.
            buffer.reads.clear();
        }
        if buffer.is_empty() {
            return None;
        }
        Some(PluginEffects {
            tenant: self.tenant,
            plugin,
            reads: buffer.reads.into_iter().collect(),
            writes: buffer.writes.into_values().collect(),
            quota: KvQuota { bytes: grant.bytes, keys: grant.keys },
            commands: buffer.commands,
            cancels: buffer.cancels,
            tags: buffer.tags,
            releases: buffer.releases,
            timers: buffer.timers,
            pushes: buffer.pushes.into_iter().collect(),
        })
    }

    /// A command as the guest gives it, with a `CommandUUID` of the host, if it may queue such a one.
    pub(crate) fn command(&self, body: &wit::CommandBody, uuid: Uuid) -> Result<Command, wit::Failure> {
        // One above the limit is refused unread.
        let size = match body {
            wit::CommandBody::AsJson(json) => json.len(),
            wit::CommandBody::AsPlist(plist) => plist.len(),
        };
        if size > self.settings.limits.output {
            return Err(quota(format!("the command is longer than {} bytes", self.settings.limits.output)));
        }
        let uuid = command_uuid(uuid);
        let command = match body {
            wit::CommandBody::AsJson(json) => {
                let command = serde_json::from_str(json).map_err(|error| invalid(format!("the command is no JSON: {error}")))?;
                Command::from_json(uuid, &command)
            }
            wit::CommandBody::AsPlist(plist) => Command::parse_with_uuid(plist, uuid),
        };
        let command = command.map_err(|error| invalid(error.to_string()))?;
        if !self.settings.capabilities.commands.enqueue.permits(&command.request_type) {
            return Err(not_granted(&format!("commands `enqueue:{}`", contract::printable(&command.request_type, 64))));
        }
        Ok(command)
    }

    /// Buffers the commands that `event-commands` returned. Their keys begin with the event's id and their place, so that a repeated delivery
    /// queues nothing twice.
    pub(crate) fn take_generated(&mut self, commands: Vec<wit::NewCommand>, event: Option<&Event>) -> Result<(), Failure> {
        if commands.is_empty() {
            return Ok(());
        }
        let refused = |failure: wit::Failure| contract::failure_in(&failure, 1_000);
        let Some((event, who)) = event.and_then(|event| Some((event, event.who.as_ref()?))) else {
            return Err(refused(invalid("the event is about no enrollment: there is nobody to send a command to")));
        };
        if commands.len() > self.settings.limits.commands {
            return Err(refused(quota(format!("more than {} commands", self.settings.limits.commands))));
        }
        for (n, new) in commands.into_iter().enumerate() {
            let command = self.command(&new.body, Uuid::new_v4()).map_err(refused)?;
            let mut options = options(&new.options).map_err(refused)?;
            options.idempotency_key = Some(match options.idempotency_key {
                Some(key) => format!("{}/{n}/{key}", event.id),
                None => format!("{}/{n}", event.id),
            });
            self.buffer.commands.push(PluginCommand { target: who.id.clone(), command, options });
        }
        Ok(())
    }
}

/// As commands carry it.
pub(crate) fn command_uuid(uuid: Uuid) -> String {
    uuid.to_string().to_uppercase()
}

/// Checks a guest's options.
pub(crate) fn options(options: &wit::CommandOptions) -> Result<CommandOptions, wit::Failure> {
    let extra: Extra = match options.extra.as_deref() {
        None => Extra::default(),
        Some(extra) => serde_json::from_str(extra).map_err(|error| invalid(format!("options.extra: {error}")))?,
    };
    Ok(CommandOptions {
        idempotency_key: key("idempotency-key", options.idempotency_key.as_deref())?,
        collapse_key: key("collapse-key", options.collapse_key.as_deref())?,
        priority: options.priority,
        not_before: options.not_before.map(contract::timestamp_in),
        expires_at: options.expires_at.map(contract::timestamp_in),
        push: options.push,
        renews_identity: extra.renews_identity,
    })
}

/// What `options.extra` can say: what the contract has learnt since its records were fixed.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Extra {
    /// For a day after it went out, an Authenticate of the device is the renewal of its identity, and no new enrollment.
    renews_identity: bool,
}

fn key(name: &str, key: Option<&str>) -> Result<Option<String>, wit::Failure> {
    match key {
        Some(key) if key.is_empty() || key.len() > MAX_KEY => Err(invalid(format!("options.{name}: 1 to {MAX_KEY} bytes"))),
        key => Ok(key.map(str::to_owned)),
    }
}
