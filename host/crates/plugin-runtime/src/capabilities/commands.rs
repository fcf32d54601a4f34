//! `commands`: what devices are told. The host checks each command, and gives it its `CommandUUID`.

use serde_json::json;
use wasmdm_protocol::enrollment::EnrollmentId;
use wasmdm_storage::effects::PluginCommand;

use crate::bindings::wasmdm::plugin::commands::{Host, Outcome};
use crate::bindings::wasmdm::plugin::types as wit;
use crate::call::State;
use crate::capabilities::buffer::options;
use crate::capabilities::{Denied, failure, invalid, not_granted, quota, unavailable};
use crate::contract;

/// States of a command that will not change any more.
const FINAL: [&str; 4] = ["acknowledged", "errored", "expired", "cancelled"];

impl State {
    fn reads_commands(&self) -> Result<(), Denied> {
        if self.settings.capabilities.commands.read { Ok(()) } else { Err(not_granted("commands `read`")) }
    }

    async fn validate_command(&self, new: &wit::NewCommand, target: Option<String>) -> Result<Vec<String>, Denied> {
        let command = self.command(&new.body)?;
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
        let command = self.command(&new.body)?;
        let mut options = options(&new.options)?;
        let limit = self.settings.limits.commands;
        if self.buffer.commands.len().saturating_add(targets.len()) > limit {
            return Err(quota(format!("a call can queue {limit} commands")));
        }
        // Without a key of the plugin's own the event's makes a repeated delivery harmless.
        if options.idempotency_key.is_none()
            && let Some(event) = &self.event
        {
            options.idempotency_key = Some(format!("{event}/{}/{}", self.hook, self.buffer.commands.len()));
        }
        let mut outcomes = Vec::with_capacity(targets.len());
        for target in targets {
            let id = EnrollmentId::new(target.as_str());
            if self.enrollment_of_tenant(&id).await?.is_none() {
                let error = Some(failure("not-found", format!("there is no enrollment {id}")));
                outcomes.push(Outcome { id: target, uuid: None, state: String::from("unknown"), error });
                continue;
            }
            let same = self.buffer.commands.iter().find(|queued| {
                queued.target == id && queued.options.idempotency_key.is_some() && queued.options.idempotency_key == options.idempotency_key
            });
            let uuid = same.map_or_else(|| command.uuid.clone(), |queued| queued.command.uuid.clone());
            if same.is_none() {
                self.buffer.commands.push(PluginCommand { target: id, command: command.clone(), options: options.clone() });
            }
            outcomes.push(Outcome { id: target, uuid: Some(uuid), state: String::from("queued"), error: None });
        }
        Ok(outcomes)
    }

    fn buffered(&self, id: &EnrollmentId) -> impl Iterator<Item = wit::CommandStatus> {
        let now = contract::timestamp(self.now());
        let origin = format!("plugin:{}", self.name_space());
        self.buffer.commands.iter().filter(move |queued| queued.target == *id).map(move |queued| wit::CommandStatus {
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
