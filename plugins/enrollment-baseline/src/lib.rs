//! The first commands after an enrollment, and the release from Setup Assistant when all of them are done.
//!
//! Two hooks work on the same event without knowing of each other: `event-commands` answers `enrollment.enrolled` with
//! commands (`baseline`); the event sink follows their results (`progress`). They are delivered independently, so
//! nothing depends on who comes first: each command carries in its idempotency key which step of how many it is.

mod baseline;
mod progress;
mod settings;

use wasmdm_plugin::{CallInfo, Event, EventCommands, EventSink, Failure, Lifecycle, NewCommand, Schedule, Timestamp};

/// The plugin.
#[derive(Debug)]
pub struct EnrollmentBaseline;

impl Lifecycle for EnrollmentBaseline {
    fn validate_config(_: CallInfo, document: String) -> Result<(), Failure> {
        settings::validate(&document)
    }
}

impl EventCommands for EnrollmentBaseline {
    fn generate(_: CallInfo, occurrence: Event) -> Result<Vec<NewCommand>, Failure> {
        if occurrence.topic != "enrollment.enrolled" {
            return Ok(Vec::new());
        }
        Ok(baseline::commands(&settings::read()?))
    }
}

impl EventSink for EnrollmentBaseline {
    fn handle(_: CallInfo, occurrence: Event) -> Result<(), Failure> {
        progress::follow(&occurrence)
    }
}

impl Schedule for EnrollmentBaseline {
    fn tick(_: CallInfo, name: String, _scheduled_for: Timestamp, who: Option<String>, data: Vec<u8>) -> Result<(), Failure> {
        match who {
            Some(device) if name == progress::TIMER => progress::time_is_up(&device, &data),
            _ => Ok(()),
        }
    }
}

wasmdm_plugin::export!(EnrollmentBaseline: Lifecycle, EventCommands, EventSink, Schedule);
