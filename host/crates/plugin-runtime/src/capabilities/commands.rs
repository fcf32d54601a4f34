//! `commands`: what devices are told. The host checks each command, and gives it its `CommandUUID`.

use aws_lc_rs::digest::{Context, SHA256};
use serde_json::json;
use uuid::{Builder, Uuid};
use wasmdm_protocol::enrollment::EnrollmentId;
use wasmdm_storage::effects::PluginCommand;
use wasmdm_storage::events::EnrollmentRecord;

use crate::bindings::wasmdm::plugin::commands::{Host, Outcome};
use crate::bindings::wasmdm::plugin::types as wit;
use crate::call::State;
use crate::capabilities::buffer::{command_uuid, options};
use crate::capabilities::{Denied, failure, invalid, not_granted, quota, unavailable};
use crate::contract;

/// States of a command that will not change any more.
const FINAL: [&str; 4] = ["acknowledged", "errored", "expired", "cancelled"];

impl State {
    fn reads_commands(&self) -> Result<(), Denied> {
        if self.settings.capabilities.commands.read { Ok(()) } else { Err(not_granted("commands `read`")) }
    }

    async fn validate_command(&self, new: &wit::NewCommand, target: Option<String>) -> Result<Vec<String>, Denied> {
        let command = self.command(&new.body, Uuid::new_v4())?;
        let options = options(&new.options)?;
        let mut warnings = Vec::new();
        let now = self.now();
        if options.expires_at.is_some_and(|end| end <= now) {
            warnings.push(String::from("options.expires-at is over: it would expire unsent"));
        }
        if let (Some(begin), Some(end)) = (options.not_before, options.expires_at)
            && end <= begin
        {
            warnings.push(String::from("options.expires-at is not after options.not-before: it would expire unsent"));
        }
        if let Some(target) = target {
            let id = EnrollmentId::new(target);
            match self.enrollment_of_tenant(&id).await? {
                None => return Err(failure("not-found", format!("there is no enrollment {id}"))),
                Some(record) if record.state != wasmdm_storage::events::EnrollmentState::Enrolled => {
                    let (state, request_type) = (record.state.as_str(), &command.request_type);
                    warnings.push(format!("enrollment {id} is {state}: {request_type} waits until it is enrolled"));
                }
                Some(_) => {}
            }
        }
        Ok(warnings)
    }

    async fn enqueue_command(&mut self, targets: Vec<String>, new: &wit::NewCommand) -> Result<Vec<Outcome>, Denied> {
        self.may_write("queueing commands")?;
        let command = self.command(&new.body, Uuid::new_v4())?;
        let mut options = options(&new.options)?;
        let own_key = options.idempotency_key.clone();
        let limit = self.settings.limits.commands;
        if self.buffer.commands.len().saturating_add(targets.len()) > limit {
            return Err(quota(format!("a call can queue {limit} commands")));
        }
        // Without a key of the plugin's own the event's makes a repeated delivery harmless.
        if own_key.is_none()
            && let Some(event) = &self.event
        {
            options.idempotency_key = Some(format!("{event}/{}/{}", self.hook, self.buffer.enqueued));
        }
        self.buffer.enqueued = self.buffer.enqueued.saturating_add(1);
        let mut outcomes = Vec::with_capacity(targets.len());
        for target in targets {
            let id = EnrollmentId::new(target.as_str());
            let Some(record) = self.enrollment_of_tenant(&id).await? else {
                let error = Some(failure("not-found", format!("there is no enrollment {id}")));
                outcomes.push(Outcome { id: target, uuid: None, state: String::from("unknown"), error });
                continue;
            };
            let queued = PluginCommand { target: id, command: command.clone(), options: options.clone() };
            let (uuid, state) = match &own_key {
                Some(key) => self.enqueue_with_key(queued, new, &record, key).await?,
                None => self.enqueue_once(queued),
            };
            outcomes.push(Outcome { id: target, uuid: Some(uuid), state, error: None });
        }
        Ok(outcomes)
    }

    /// Buffers a command, unless the same enrollment has one of its key in the buffer. Answers its UUID and state.
    fn enqueue_once(&mut self, new: PluginCommand) -> (String, String) {
        let uuid = new.command.uuid.clone();
        let key = &new.options.idempotency_key;
        let same = |queued: &PluginCommand| queued.target == new.target && key.is_some() && queued.options.idempotency_key == *key;
        if !self.buffer.commands.iter().any(same) {
            self.buffer.commands.push(new);
        }
        (uuid, String::from("queued"))
    }

    /// Buffers a command with a key of the plugin's own, under the UUID that follows from the key: what was queued with it before, in this
    /// call or in an earlier one, has the same.
    async fn enqueue_with_key(
        &mut self,
        mut queued: PluginCommand,
        new: &wit::NewCommand,
        record: &EnrollmentRecord,
        key: &str,
    ) -> Result<(String, String), Denied> {
        let derived = self.derived_uuid(record, key);
        let uuid = command_uuid(derived);
        let stored = self.storage()?.command_status(&self.tenant, &queued.target, &uuid).await.map_err(|error| unavailable(&error))?;
        let Some(stored) = stored else {
            queued.command = self.command(&new.body, derived)?;
            return Ok(self.enqueue_once(queued));
        };
        let state = if self.is_cancelled(&queued.target, &uuid) { String::from("cancelled") } else { stored.state };
        // Enrolling anew cancels what is open and frees the keys. So the key of an open command is taken; that of a finished one may be
        // free again, and only the commit knows.
        if FINAL.contains(&state.as_str()) {
            self.buffer.if_key_is_free.insert(queued.command.uuid.clone());
            self.enqueue_once(queued);
        }
        Ok((uuid, state))
    }

    /// The UUID of the command with that key: a hash of whose it is, for whom, and the key (a version 8 UUID of RFC 9562). The certificate
    /// tells one enrollment of a device from the next, whose keys are new.
    fn derived_uuid(&self, record: &EnrollmentRecord, key: &str) -> Uuid {
        let certificate = record.facts.pointer("/certificate/sha256").and_then(serde_json::Value::as_str).unwrap_or_default();
        let mut context = Context::new(&SHA256);
        for part in ["wasmdm command", self.tenant.as_str(), self.name_space(), record.id.as_str(), certificate, key] {
            // With its length, so that no two ways of dividing the same bytes are one.
            context.update(&(part.len() as u64).to_le_bytes());
            context.update(part.as_bytes());
        }
        let mut bytes = [0; 16];
        for (byte, hashed) in bytes.iter_mut().zip(context.finish().as_ref()) {
            *byte = *hashed;
        }
        Builder::from_custom_bytes(bytes).into_uuid()
    }

    fn buffered(&self, id: &EnrollmentId) -> impl Iterator<Item = wit::CommandStatus> {
        let now = contract::timestamp(self.now());
        let origin = format!("plugin:{}", self.name_space());
        let seen = move |queued: &&PluginCommand| queued.target == *id && !self.buffer.if_key_is_free.contains(&queued.command.uuid);
        self.buffer.commands.iter().filter(seen).map(move |queued| wit::CommandStatus {
            uuid: queued.command.uuid.clone(),
            request_type: queued.command.request_type.clone(),
            state: String::from("queued"),
            updated_at: now,
            report: None,
            facts: json!({ "origin": origin, "deliveries": 0 }).to_string(),
        })
    }

    fn is_cancelled(&self, id: &EnrollmentId, uuid: &str) -> bool {
        self.buffer.cancels.iter().any(|(of, cancelled)| of == id && cancelled == uuid)
    }

    async fn pending_of(&self, id: String) -> Result<Vec<wit::CommandStatus>, Denied> {
        self.reads_commands()?;
        let id = EnrollmentId::new(id);
        let stored = self.storage()?.pending_commands(&self.tenant, &id).await.map_err(|error| unavailable(&error))?;
        let stored = stored.iter().filter(|status| !self.is_cancelled(&id, &status.uuid)).map(contract::command_status);
        Ok(stored.chain(self.buffered(&id)).collect())
    }

    async fn status_of(&self, id: String, uuid: &str) -> Result<Option<wit::CommandStatus>, Denied> {
        self.reads_commands()?;
        let id = EnrollmentId::new(id);
        if let Some(buffered) = self.buffered(&id).find(|queued| queued.uuid == uuid) {
            return Ok(Some(buffered));
        }
        let stored = self.storage()?.command_status(&self.tenant, &id, uuid).await.map_err(|error| unavailable(&error))?;
        Ok(stored.map(|status| {
            let mut status = contract::command_status(&status);
            if self.is_cancelled(&id, uuid) {
                status.state = String::from("cancelled");
            }
            status
        }))
    }

    async fn cancel_of(&mut self, id: String, uuid: String) -> Result<bool, Denied> {
        self.may_write("cancelling commands")?;
        if !self.settings.capabilities.commands.cancel {
            return Err(not_granted("commands `cancel`"));
        }
        let id = EnrollmentId::new(id);
        let before = self.buffer.commands.len();
        self.buffer.commands.retain(|queued| queued.target != id || queued.command.uuid != uuid);
        if self.buffer.commands.len() < before {
            return Ok(true);
        }
        if self.is_cancelled(&id, &uuid) {
            return Ok(false);
        }
        let stored = self.storage()?.command_status(&self.tenant, &id, &uuid).await.map_err(|error| unavailable(&error))?;
        if stored.is_none_or(|status| FINAL.contains(&status.state.as_str())) {
            return Ok(false);
        }
        if self.buffer.cancels.len() >= self.settings.limits.commands {
            return Err(quota(format!("a call can cancel {} commands", self.settings.limits.commands)));
        }
        self.buffer.cancels.push((id, uuid));
        Ok(true)
    }
}

impl Host for State {
    async fn validate(&mut self, command: wit::NewCommand, target: Option<String>) -> wasmtime::Result<Result<Vec<String>, Denied>> {
        self.enter()?;
        Ok(self.validate_command(&command, target).await)
    }

    async fn enqueue(&mut self, targets: Vec<String>, command: wit::NewCommand) -> wasmtime::Result<Result<Vec<Outcome>, Denied>> {
        self.enter()?;
        if targets.is_empty() {
            return Ok(Err(invalid("targets: nobody")));
        }
        Ok(self.enqueue_command(targets, &command).await)
    }

    async fn pending(&mut self, id: String) -> wasmtime::Result<Result<Vec<wit::CommandStatus>, Denied>> {
        self.enter()?;
        Ok(self.pending_of(id).await)
    }

    async fn get(&mut self, id: String, uuid: String) -> wasmtime::Result<Result<Option<wit::CommandStatus>, Denied>> {
        self.enter()?;
        Ok(self.status_of(id, &uuid).await)
    }

    async fn cancel(&mut self, id: String, uuid: String) -> wasmtime::Result<Result<bool, Denied>> {
        self.enter()?;
        Ok(self.cancel_of(id, uuid).await)
    }
}
