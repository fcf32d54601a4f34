//! Command reports: what a device says of a command, and its Idle polls.

use std::fmt;

use bytes::Bytes;

use crate::enrollment::{DeviceFacts, Enrollment, Identifiers};
use crate::fields::{FieldError, Fields, MAX_TEXT, check_name};
use crate::plist::{self, Claim, Value};

/// A status of Apple's has at most 18 bytes.
const MAX_STATUS: usize = 64;
/// The keys that are looked for in a report that cannot be read.
const CLAIMS: [&str; 7] = ["UDID", "UserID", "UserShortName", "EnrollmentID", "EnrollmentUserID", "CommandUUID", "Status"];

/// How it went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// A poll: the device asks for a command.
    Idle,
    /// Done.
    Acknowledged,
    /// Failed, for good.
    Error,
    /// Not understood, for good.
    CommandFormatError,
    /// Not now; the device does not keep the command.
    NotNow,
    /// Stored, final, alerted (edge case 37). At most 64 bytes without control characters.
    Unknown(String),
}

impl Status {
    /// The text that devices send.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Idle => "Idle",
            Self::Acknowledged => "Acknowledged",
            Self::Error => "Error",
            Self::CommandFormatError => "CommandFormatError",
            Self::NotNow => "NotNow",
            Self::Unknown(other) => other,
        }
    }

    fn from_text(text: &str) -> Self {
        match text {
            "Idle" => Self::Idle,
            "Acknowledged" => Self::Acknowledged,
            "Error" => Self::Error,
            "CommandFormatError" => Self::CommandFormatError,
            "NotNow" => Self::NotNow,
            other => Self::Unknown(other.to_owned()),
        }
    }
}

/// A report, and who it says it is from. That the certificate agrees is for the service to check.
#[derive(Clone)]
pub struct Report {
    /// The channel it is from.
    pub enrollment: Enrollment,
    /// What it says about the device; mostly only the user's names.
    pub facts: DeviceFacts,
    /// How it went.
    pub status: Status,
    /// Always there but for Idle.
    pub command_uuid: Option<String>,
    /// The whole report. Can hold secrets.
    pub document: Value,
    /// The bytes as received. Can hold secrets.
    pub raw: Bytes,
}

impl fmt::Debug for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Report")
            .field("enrollment", &self.enrollment)
            .field("status", &self.status)
            .field("command_uuid", &self.command_uuid)
            .field("length", &self.raw.len())
            .finish_non_exhaustive()
    }
}

/// A report that the parser or its guard refused, and what could be read of it without trusting it (edge case 4).
#[derive(Clone)]
pub struct MalformedReport {
    /// Why it was refused.
    pub reason: String,
    /// Who it claims to be from; `None` where it does not say. The device's own channel where the user cannot be told.
    pub enrollment: Option<Enrollment>,
    /// The command it claims to be about.
    pub command_uuid: Option<String>,
    /// The status that it claims.
    pub status: Option<String>,
    /// The bytes as received. Can hold secrets.
    pub raw: Bytes,
}

impl fmt::Debug for MalformedReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MalformedReport")
            .field("reason", &self.reason)
            .field("enrollment", &self.enrollment)
            .field("command_uuid", &self.command_uuid)
            .field("status", &self.status)
            .field("length", &self.raw.len())
            .finish_non_exhaustive()
    }
}

impl Report {
    /// Reads a report, XML or binary. A report that says no status or no command is malformed.
    ///
    /// ```
    /// use wasmdm_protocol::report::{Report, Status};
    /// let raw = b"<dict><key>Status</key><string>Idle</string><key>UDID</key><string>U1</string></dict>";
    /// let report = Report::parse(raw.as_slice().into()).map_err(|malformed| malformed.reason)?;
    /// assert_eq!((report.enrollment.id.as_str(), report.status), ("U1", Status::Idle));
    /// # Ok::<(), String>(())
    /// ```
    pub fn parse(raw: Bytes) -> Result<Self, Box<MalformedReport>> {
        let document = match plist::parse(&raw) {
            Ok(document) => document,
            Err(error) => return Err(malformed(error.to_string(), plist::salvage(&raw, &CLAIMS), raw)),
        };
        let Some(fields) = Fields::of(&document) else {
            return Err(malformed("the report is not a dictionary".into(), Vec::new(), raw));
        };
        match read(fields) {
            Ok((enrollment, status, command_uuid)) => {
                let facts = fields.facts();
                Ok(Self { enrollment, facts, status, command_uuid, document, raw })
            }
            Err(error) => {
                let claim = |value: &Value| Claim::new(value.as_string().map(str::to_owned));
                let claims = CLAIMS.iter().map(|key| fields.value(key).map_or(Claim::Absent, claim)).collect();
                Err(malformed(format!("{} {}", error.key, error.problem), claims, raw))
            }
        }
    }
}

fn read(fields: Fields<'_>) -> Result<(Enrollment, Status, Option<String>), FieldError> {
    let status = Status::from_text(fields.name("Status", MAX_STATUS)?);
    // Polls are not about a command, whatever they say.
    let command_uuid = if status == Status::Idle { None } else { Some(fields.name("CommandUUID", MAX_TEXT)?.to_owned()) };
    Ok((fields.identifiers()?.resolve()?, status, command_uuid))
}

/// `claims` are the values of [`CLAIMS`] in that order.
fn malformed(reason: String, claims: Vec<Claim>, raw: Bytes) -> Box<MalformedReport> {
    // A UDID that cannot be told is there all the same: no EnrollmentID takes its place.
    let names_nobody = claims.first() == Some(&Claim::Unreadable);
    let mut claims = claims.into_iter().map(|claim| match claim {
        Claim::Text(text) if !text.is_empty() => Some(text),
        Claim::Text(_) | Claim::Unreadable | Claim::Absent => None,
    });
    let mut next = || claims.next().flatten();
    let whole = Identifiers { udid: next(), user_id: next(), user_short_name: next(), enrollment_id: next(), enrollment_user_id: next() };
    let command_uuid = next().filter(|uuid| check_name(uuid, MAX_TEXT).is_ok());
    let status = next().filter(|status| check_name(status, MAX_STATUS).is_ok());
    // Where it cannot be told which of the device's users it is, the device is known.
    let device = Identifiers { udid: whole.udid.clone(), enrollment_id: whole.enrollment_id.clone(), ..Identifiers::default() };
    let enrollment = whole.resolve().or_else(|_| device.resolve()).ok().filter(|_| !names_nobody);
    Box::new(MalformedReport { reason, enrollment, command_uuid, status, raw })
}
