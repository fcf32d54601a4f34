//! Command reports: what a device says of a command, and its Idle polls.
use crate::enrollment::{DeviceFacts, Enrollment};
use crate::plist::Value;
use bytes::Bytes;
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    Idle,
    Acknowledged,
    Error,
    CommandFormatError,
    NotNow,
    /// Stored, final, alerted (edge case 37).
    Unknown(String),
}
impl Status {
    pub fn as_str(&self) -> &str {
        todo!()
    }
}
#[derive(Debug, Clone)]
pub struct Report {
    pub enrollment: Enrollment,
    pub facts: DeviceFacts,
    pub status: Status,
    /// Always there but for Idle.
    pub command_uuid: Option<String>,
    pub document: Value,
    pub raw: Bytes,
}
/// A report that the parser or its guard refused, and what could be read of it without trusting it (edge case 4).
#[derive(Debug, Clone)]
pub struct MalformedReport {
    pub reason: String,
    pub enrollment: Option<Enrollment>,
    pub command_uuid: Option<String>,
    pub status: Option<String>,
    pub raw: Bytes,
}
impl Report {
    pub fn parse(_raw: Bytes) -> Result<Self, Box<MalformedReport>> {
        todo!()
    }
}
