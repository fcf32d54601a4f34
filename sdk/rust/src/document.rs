//! The JSON documents that come with calls, as types. Unknown keys are ignored, because the host may add some.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{Enrollment, Event, Failure, Input};

/// What is known of an enrollment. Absent means unknown.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Facts {
    /// The serial number; unknown for a User Enrollment.
    pub serial_number: Option<String>,
    /// `Mac15,3`, `iPhone16,1` or an Apple order number: whatever the device said.
    pub model: Option<String>,
    /// `MacBook Pro`.
    pub model_name: Option<String>,
    /// `Mac15,3`.
    pub product_name: Option<String>,
    /// `26.1`.
    pub os_version: Option<String>,
    /// `25B78`.
    pub build_version: Option<String>,
    /// The account of a user channel.
    pub user_short_name: Option<String>,
    /// The full name of a user channel's user.
    pub user_long_name: Option<String>,
    /// What plugins and people have marked it with.
    pub tags: Vec<String>,
    /// The query of the URL under which the device enrolled.
    pub url_params: BTreeMap<String, String>,
    /// `enrolling`, `enrolled`, `checked-out`; more may come.
    pub state: Option<String>,
    /// RFC 3339.
    pub last_seen: Option<String>,
    /// The device identity certificate.
    pub certificate: Option<CertificateFacts>,
}

/// What a device identity certificate says.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct CertificateFacts {
    /// The SHA-256 of the certificate, in lower-case hexadecimal digits.
    pub sha256: String,
    /// Its subject, possibly empty.
    pub subject: String,
    /// Its issuer.
    pub issuer: String,
    /// RFC 3339.
    pub not_before: String,
    /// RFC 3339.
    pub not_after: String,
}

impl Enrollment {
    /// The facts as a type. Fails if they are no JSON, which a host never sends.
    ///
    /// ```
    /// use wasmdm_plugin::mock;
    /// let device = mock::enrollment("UDID-1", serde_json::json!({ "serial_number": "C02X" }));
    /// assert_eq!(device.read_facts().unwrap().serial_number.as_deref(), Some("C02X"));
    /// ```
    pub fn read_facts(&self) -> Result<Facts, Failure> {
        self.facts_as()
    }

    /// The facts as a type of the plugin's own, which names only what the plugin needs.
    pub fn facts_as<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        serde_json::from_str(&self.facts).map_err(|error| Failure::from(error).context("reading the enrollment's facts"))
    }

    /// Whether this is a device's own channel rather than a user's.
    pub fn is_device_channel(&self) -> bool {
        self.parent_id.is_none()
    }

    /// The device's own channel: the parent of a user's channel, else this one.
    pub fn device_id(&self) -> &str {
        self.parent_id.as_deref().unwrap_or(&self.id)
    }
}

impl Input {
    /// The document as a type. A truncated document may lack what the type needs; see [`Input::truncated`].
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        serde_json::from_str(&self.body).map_err(|error| Failure::from(error).context("reading the input"))
    }
}

/// What an event tells. Which fields are there depends on the topic; see `docs/contract.md` of wasmdm.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct EventData {
    /// The check-in that caused it, redacted, with Apple's keys.
    pub message: Option<Value>,
    /// The command that it is about.
    pub command: Option<CommandData>,
    /// Of `enrollment.enrolled`: whether the enrollment was known before.
    pub re_enrolling: Option<bool>,
}

/// The command that an event is about.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct CommandData {
    /// Its `CommandUUID`.
    pub uuid: String,
    /// `DeviceInformation`.
    pub request_type: String,
    /// The `Status` of the device's report (`Acknowledged`, `NotNow`, …), or what happened without one: `queued`, `sent`,
    /// `expired`, `cancelled`.
    pub status: String,
    /// The device's report, redacted, with Apple's keys.
    pub report: Option<Value>,
    /// The report's `ErrorChain`.
    pub error_chain: Option<Value>,
    /// `api:SUBJECT` or `plugin:NAME`.
    pub origin: Option<String>,
    /// The key that the command was queued with. Keys of commands that `event-commands` returned are
    /// `EVENT/PLACE/KEY`.
    pub idempotency_key: Option<String>,
}

impl Event {
    /// What the event tells, as a type.
    ///
    /// ```
    /// use wasmdm_plugin::mock;
    /// let event = mock::event("command.acknowledged", serde_json::json!({ "command": { "uuid": "C-1", "request_type": "Restart" } }));
    /// assert_eq!(event.read_data().unwrap().command.unwrap().uuid, "C-1");
    /// ```
    pub fn read_data(&self) -> Result<EventData, Failure> {
        self.data.read()
    }
}
