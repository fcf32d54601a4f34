//! Who a message is from: the five kinds of enrollment and their ids.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// A tenant of the server. Everything stored belongs to exactly one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TenantId(Arc<str>);

impl TenantId {
    /// A tenant of that name.
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self(name.into())
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The tenant of a server that has only one.
impl Default for TenantId {
    fn default() -> Self {
        Self::new("default")
    }
}

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `DEVICE`, `DEVICE:USER` or `DEVICE:SHORTNAME`; the same text that `NanoMDM` uses.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EnrollmentId(Arc<str>);

impl EnrollmentId {
    /// An id as the API and the database write it. Ids of devices come from [`Identifiers::resolve`].
    pub fn new(id: impl Into<Arc<str>>) -> Self {
        Self(id.into())
    }

    /// The text of the id.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for EnrollmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The five kinds of enrollment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EnrollmentKind {
    /// A device's own channel.
    Device,
    /// A user of a Mac.
    User,
    /// The device channel of a User Enrollment.
    UserEnrollmentDevice,
    /// The user channel of a User Enrollment.
    UserEnrollment,
    /// A user of a Shared iPad.
    SharedIpad,
}

impl EnrollmentKind {
    /// All kinds.
    pub const ALL: [Self; 5] = [Self::Device, Self::User, Self::UserEnrollmentDevice, Self::UserEnrollment, Self::SharedIpad];

    /// The name in the plugin contract, the database and `/api/v1`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::User => "user",
            Self::UserEnrollmentDevice => "user-enrollment-device",
            Self::UserEnrollment => "user-enrollment",
            Self::SharedIpad => "shared-ipad",
        }
    }

    /// The name in `NanoMDM`'s webhooks and headers.
    pub const fn nanomdm_name(self) -> &'static str {
        match self {
            Self::Device => "Device",
            Self::User => "User",
            Self::UserEnrollmentDevice => "User Enrollment (Device)",
            Self::UserEnrollment => "User Enrollment",
            Self::SharedIpad => "Shared iPad",
        }
    }

    /// The kind of that name, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }

    /// Whether this is a device's own channel rather than a user's.
    pub const fn is_device_channel(self) -> bool {
        matches!(self, Self::Device | Self::UserEnrollmentDevice)
    }
}

/// One channel of one enrolled device.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Enrollment {
    /// Unique over the whole server.
    pub id: EnrollmentId,
    /// The device's own channel, for a user's.
    pub parent: Option<EnrollmentId>,
    /// Which of the five kinds.
    pub kind: EnrollmentKind,
}

impl Enrollment {
    /// The device's own channel: the parent of a user's channel, else this one.
    pub fn device(&self) -> &EnrollmentId {
        self.parent.as_ref().unwrap_or(&self.id)
    }
}

/// What a message says about the device; absent means that it did not say. None is empty, longer than 255 bytes or has a control character.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DeviceFacts {
    /// `SerialNumber`; not in User Enrollment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial_number: Option<String>,
    /// `Model`, such as `MB1234LL`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// `ModelName`, such as `MacBook Air`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_name: Option<String>,
    /// `ProductName`, such as `Mac14,2`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub product_name: Option<String>,
    /// `OSVersion`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub os_version: Option<String>,
    /// `BuildVersion`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub build_version: Option<String>,
    /// `UserShortName`; on a Shared iPad the Managed Apple Account.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_short_name: Option<String>,
    /// `UserLongName`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_long_name: Option<String>,
}

/// The identifying keys of a message, as received.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Identifiers {
    /// `UDID`; not in User Enrollment.
    pub udid: Option<String>,
    /// `UserID`; on user channels, [`SHARED_IPAD_USER_ID`] on every Shared iPad.
    pub user_id: Option<String>,
    /// `UserShortName`; which user it is on a Shared iPad.
    pub user_short_name: Option<String>,
    /// `EnrollmentID`; in User Enrollment instead of `UDID`.
    pub enrollment_id: Option<String>,
    /// `EnrollmentUserID`; on the user channel of a User Enrollment.
    pub enrollment_user_id: Option<String>,
}

/// The `UserID` of all users of Shared iPads. Devices differ in its case.
pub const SHARED_IPAD_USER_ID: &str = "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF";

/// How long a part of an id may be, in bytes. Apple's own stay under 100.
const MAX_PART: usize = 255;

/// A message that names no enrollment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct IdentifierError {
    /// The key that is missing or wrong.
    pub key: &'static str,
    /// What is wrong with it.
    pub problem: &'static str,
}

impl Identifiers {
    /// Which channel of which enrollment the message is from; `UDID` wins over `EnrollmentID`, as in `NanoMDM`.
    ///
    /// Fails where a part is missing, empty, over 255 bytes or has a control character, and where the device's part has a colon: it would
    /// read like the id of another device's user.
    ///
    /// ```
    /// use wasmdm_protocol::enrollment::{EnrollmentKind, Identifiers};
    /// let user = Identifiers { udid: Some("U1".into()), user_id: Some("A2".into()), ..Identifiers::default() }.resolve()?;
    /// assert_eq!((user.id.as_str(), user.kind), ("U1:A2", EnrollmentKind::User));
    /// assert_eq!(user.device().as_str(), "U1");
    /// # Ok::<(), wasmdm_protocol::enrollment::IdentifierError>(())
    /// ```
    pub fn resolve(&self) -> Result<Enrollment, IdentifierError> {
        if let Some(udid) = &self.udid {
            let device = device_part("UDID", udid)?;
            return match self.user_id.as_deref() {
                None => Ok(device_channel(device, EnrollmentKind::Device)),
                Some(user) if user.eq_ignore_ascii_case(SHARED_IPAD_USER_ID) => {
                    let name = self.user_short_name.as_deref().ok_or(IdentifierError { key: "UserShortName", problem: "is missing" })?;
                    Ok(user_channel(device, part("UserShortName", name)?, EnrollmentKind::SharedIpad))
                }
                Some(user) => Ok(user_channel(device, part("UserID", user)?, EnrollmentKind::User)),
            };
        }
        let enrollment_id = self.enrollment_id.as_deref().ok_or(IdentifierError { key: "UDID", problem: "is missing, and so is EnrollmentID" })?;
        let device = device_part("EnrollmentID", enrollment_id)?;
        match self.enrollment_user_id.as_deref() {
            None => Ok(device_channel(device, EnrollmentKind::UserEnrollmentDevice)),
            Some(user) => Ok(user_channel(device, part("EnrollmentUserID", user)?, EnrollmentKind::UserEnrollment)),
        }
    }
}

fn device_channel(device: &str, kind: EnrollmentKind) -> Enrollment {
    Enrollment { id: EnrollmentId::new(device), parent: None, kind }
}

fn user_channel(device: &str, user: &str, kind: EnrollmentKind) -> Enrollment {
    Enrollment { id: EnrollmentId::new(format!("{device}:{user}")), parent: Some(EnrollmentId::new(device)), kind }
}

fn device_part<'a>(key: &'static str, text: &'a str) -> Result<&'a str, IdentifierError> {
    if text.contains(':') {
        return Err(IdentifierError { key, problem: "has a colon" });
    }
    part(key, text)
}

fn part<'a>(key: &'static str, text: &'a str) -> Result<&'a str, IdentifierError> {
    let problem = if text.is_empty() {
        "is empty"
    } else if text.len() > MAX_PART {
        "is longer than 255 bytes"
    } else if text.chars().any(char::is_control) {
        "has a control character"
    } else if text.contains(',') {
        // The API separates ids by commas: a user of such a name would be somebody else's device.
        "has a comma"
    } else {
        return Ok(text);
    };
    Err(IdentifierError { key, problem })
}
