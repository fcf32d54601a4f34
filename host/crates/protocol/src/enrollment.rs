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
    pub const ALL: [Self; 5] = [
        Self::Device,
        Self::User,
        Self::UserEnrollmentDevice,
        Self::UserEnrollment,
        Self::SharedIpad,
    ];

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

/// What a message says about the device; absent means that it did not say.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DeviceFacts {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial_number: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub product_name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub os_version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub build_version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_short_name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_long_name: Option<String>,
}

/// The identifying keys of a message, as received.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Identifiers {
    pub udid: Option<String>,
    pub user_id: Option<String>,
    pub user_short_name: Option<String>,
    pub enrollment_id: Option<String>,
    pub enrollment_user_id: Option<String>,
}

/// A message that names no enrollment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct IdentifierError {
    pub key: &'static str,
    pub problem: &'static str,
}

impl Identifiers {
    pub fn resolve(&self) -> Result<Enrollment, IdentifierError> {
        todo!()
    }
}
