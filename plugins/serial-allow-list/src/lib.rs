//! Only devices whose serial numbers are listed may enroll.
//!
//! The list stands in the configuration, or is fetched from URLs by a schedule into key-values, or both. The policy hook
//! never fetches anything: it answers from what is there. Start reading at `policy`; `refresh` fills the lists.

mod config_list;
mod policy;
mod refresh;
mod serial_number;
mod settings;
mod stored_list;

use wasmdm_plugin::{CallInfo, Decision, Enrollment, EnrollmentPolicy, Failure, Input, Lifecycle, Schedule, Timestamp};

/// The plugin.
#[derive(Debug)]
pub struct SerialAllowList;

impl Lifecycle for SerialAllowList {
    fn validate_config(_: CallInfo, document: String) -> Result<(), Failure> {
        settings::validate(&document)
    }
}

impl EnrollmentPolicy for SerialAllowList {
    fn decide(_: CallInfo, candidate: Enrollment, _message: Input, _re_enrolling: bool) -> Result<Decision, Failure> {
        policy::decide(&candidate)
    }
}

impl Schedule for SerialAllowList {
    fn tick(_: CallInfo, _name: String, _scheduled_for: Timestamp, _who: Option<String>, _data: Vec<u8>) -> Result<(), Failure> {
        refresh::refresh_due_lists()
    }
}

wasmdm_plugin::export!(SerialAllowList: Lifecycle, EnrollmentPolicy, Schedule);
