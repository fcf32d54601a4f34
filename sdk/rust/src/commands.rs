//! Commands for devices: making them (for `event-commands` and [`enqueue`]), and following them. Needs the grant
//! `commands`.
//!
//! ```
//! use wasmdm_plugin::{NewCommand, commands};
//! use serde_json::json;
//!
//! let query = commands::device_information(["OSVersion", "SerialNumber"]).idempotency_key("inventory");
//! let restart = NewCommand::json(&json!({ "RequestType": "RestartDevice" })).priority(10).push(false);
//! assert!(query.options.push && !restart.options.push);
//! ```

use serde_json::{Value, json};

use crate::{CommandBody, CommandOptions, CommandStatus, Failure, NewCommand, Timestamp, host};

pub use crate::host::types::commands::Outcome;

/// Queues a command for enrollments. One outcome per target, in order; an unknown target does not fail the others.
pub fn enqueue(targets: &[&str], command: &NewCommand) -> Result<Vec<Outcome>, Failure> {
    let targets: Vec<String> = targets.iter().map(|&target| target.to_owned()).collect();
    host::commands::enqueue(&targets, command)
}

/// Queues a command for one enrollment. Returns its `CommandUUID`.
pub fn enqueue_for(target: &str, command: &NewCommand) -> Result<String, Failure> {
    let outcome = enqueue(&[target], command)?.into_iter().next();
    let outcome = outcome.ok_or_else(|| Failure::new("internal", "no outcome for the target"))?;
    match (outcome.uuid, outcome.error) {
        (_, Some(failure)) => Err(failure),
        (Some(uuid), None) => Ok(uuid),
        (None, None) => Err(Failure::new("internal", "an outcome without a CommandUUID")),
    }
}

/// Checks a command without queueing it. Returns warnings; a failure names the key that is wrong.
pub fn validate(command: &NewCommand, target: Option<&str>) -> Result<Vec<String>, Failure> {
    host::commands::validate(command, target)
}

/// The enrollment's unfinished commands.
pub fn pending(id: &str) -> Result<Vec<CommandStatus>, Failure> {
    host::commands::pending(id)
}

/// A command with the device's report.
pub fn get(id: &str, uuid: &str) -> Result<Option<CommandStatus>, Failure> {
    host::commands::get(id, uuid)
}

/// Takes a command back. Whether it was still to be cancelled: a finished one is not.
pub fn cancel(id: &str, uuid: &str) -> Result<bool, Failure> {
    host::commands::cancel(id, uuid)
}

impl NewCommand {
    /// A command from its inner `Command` dictionary, in the contract's JSON. The device is woken for it.
    pub fn json(command: &Value) -> Self {
        Self::new(CommandBody::AsJson(command.to_string()))
    }

    /// A command from a whole document as `/v1/enqueue` takes it. The host replaces its `CommandUUID`.
    pub fn plist(document: impl Into<Vec<u8>>) -> Self {
        Self::new(CommandBody::AsPlist(document.into()))
    }

    fn new(body: CommandBody) -> Self {
        let options =
            CommandOptions { idempotency_key: None, collapse_key: None, priority: 0, not_before: None, expires_at: None, push: true, extra: None };
        Self { body, options }
    }

    /// The same key again is the same command: nothing is queued twice. In the answer of `event-commands`, the
    /// host puts the event's id and the command's place before it.
    #[must_use]
    pub fn idempotency_key(mut self, key: impl Into<String>) -> Self {
        self.options.idempotency_key = Some(key.into());
        self
    }

    /// Replaces a command of the same key that was not sent yet.
    #[must_use]
    pub fn collapse_key(mut self, key: impl Into<String>) -> Self {
        self.options.collapse_key = Some(key.into());
        self
    }

    /// Higher goes first; 0 is usual.
    #[must_use]
    pub fn priority(mut self, priority: i8) -> Self {
        self.options.priority = priority;
        self
    }

    /// Not sent before that time.
    #[must_use]
    pub fn not_before(mut self, at: Timestamp) -> Self {
        self.options.not_before = Some(at);
        self
    }

    /// Given up at that time.
    #[must_use]
    pub fn expires_at(mut self, at: Timestamp) -> Self {
        self.options.expires_at = Some(at);
        self
    }

    /// Whether to wake the device.
    #[must_use]
    pub fn push(mut self, push: bool) -> Self {
        self.options.push = push;
        self
    }

    /// The `RequestType`, if the body is JSON that has one.
    pub fn request_type(&self) -> Option<String> {
        let CommandBody::AsJson(command) = &self.body else {
            return None;
        };
        let command: Value = serde_json::from_str(command).ok()?;
        Some(command.get("RequestType")?.as_str()?.to_owned())
    }
}

/// `DeviceInformation` with its `Queries`.
pub fn device_information<Query: Into<String>>(queries: impl IntoIterator<Item = Query>) -> NewCommand {
    let queries: Vec<String> = queries.into_iter().map(Into::into).collect();
    NewCommand::json(&json!({ "RequestType": "DeviceInformation", "Queries": queries }))
}

/// `InstallProfile` with the profile in base64.
pub fn install_profile(base64: &str) -> NewCommand {
    NewCommand::json(&json!({ "RequestType": "InstallProfile", "Payload": { "$data": base64 } }))
}

/// `DeviceConfigured`: ends the wait in Setup Assistant.
pub fn device_configured() -> NewCommand {
    NewCommand::json(&json!({ "RequestType": "DeviceConfigured" }))
}

/// A command that has no keys but its `RequestType`: `SecurityInfo`, `ProfileList`, ….
pub fn plain(request_type: &str) -> NewCommand {
    NewCommand::json(&json!({ "RequestType": request_type }))
}
