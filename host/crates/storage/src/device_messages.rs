//! Messages of devices as events, for receivers of NanoMDM's webhook.
//!
//! A receiver gets the message itself, so its event is made where the message is at hand: [`Storage::on_behalf_of`] makes a handle whose
//! writes know the message, and each change that a message causes tells of it by [`heard`] in its own transaction. The topics are
//! NanoMDM's (`mdm.Authenticate`, `mdm.Connect`); those that begin with `mdm+secrets.` are the same with the message to the byte. An Idle
//! is no such message: a poll must stay free of writes.

use crate::Storage;
use crate::StorageError;
use crate::commands::LONGEST_ORPHAN;
use crate::events::{Cause, Happened, emit};
use crate::writer::Tx;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use wasmdm_protocol::enrollment::{Enrollment, EnrollmentId, TenantId};
use wasmdm_protocol::json::without_secrets;
use wasmdm_protocol::plist;
use wasmdm_protocol::time::Timestamp;

/// The beginnings of the topics of messages without their secrets, and with them.
const WITHOUT_SECRETS: &str = "mdm.";
const WITH_SECRETS: &str = "mdm+secrets.";

/// What a device has sent.
#[derive(Clone)]
pub struct DeviceMessage {
    /// Who sent it.
    pub enrollment: Enrollment,
    /// Of a report or a poll.
    pub status: Option<String>,
    /// Of a report.
    pub command_uuid: Option<String>,
    /// Parsed.
    pub document: plist::Value,
    /// `document` lacks secrets that `raw` has.
    pub is_cleaned: bool,
    /// As received.
    pub raw: Bytes,
    /// The query of the URL.
    pub url_params: BTreeMap<String, String>,
}

/// Without what it says.
impl fmt::Debug for DeviceMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceMessage").field("enrollment", &self.enrollment).field("status", &self.status).finish_non_exhaustive()
    }
}

impl DeviceMessage {
    /// NanoMDM's event, but for what is of the delivery (`topic`, `event_id`, `created_at`) and for `token_update_tally`. A `redacted` beside it
    /// says that the message is not to the byte.
    pub fn event(&self, with_secrets: bool) -> Value {
        let mut ids = Map::new();
        ids.insert("id".to_owned(), self.enrollment.id.as_str().into());
        ids.insert("type".to_owned(), self.enrollment.kind.nanomdm_name().into());
        if let Some(parent) = &self.enrollment.parent {
            ids.insert("parent_id".to_owned(), parent.as_str().into());
        }
        let mut event = Map::new();
        event.insert("ids".to_owned(), ids.into());
        let text = |key: &str| self.document.as_dictionary().and_then(|document| document.get(key)).and_then(plist::Value::as_string);
        for (name, value) in [("udid", text("UDID")), ("enrollment_id", text("EnrollmentID"))] {
            if let Some(value) = value {
                event.insert(name.to_owned(), value.into());
            }
        }
        let cleaned =
            if with_secrets { None } else { Some(without_secrets(&self.document)).filter(|cleaned| self.is_cleaned || *cleaned != self.document) };
        let payload = cleaned.as_ref().map_or_else(|| self.raw.clone(), plist::to_xml);
        event.insert("raw_payload".to_owned(), STANDARD.encode(payload).into());
        if !self.url_params.is_empty() {
            event.insert("url_params".to_owned(), json!(self.url_params));
        }
        let name = match &self.status {
            None => "checkin_event",
            Some(status) => {
                event.insert("status".to_owned(), status.as_str().into());
                if let Some(command_uuid) = &self.command_uuid {
                    event.insert("command_uuid".to_owned(), command_uuid.as_str().into());
                }
                "acknowledge_event"
            }
        };
        let mut whole = Map::new();
        whole.insert(name.to_owned(), event.into());
        if cleaned.is_some() {
            whole.insert("redacted".to_owned(), true.into());
        }
        whole.into()
    }
}

/// A message as the events that somebody wants of it.
pub(crate) struct HeardMessage {
    status: Option<String>,
    length: usize,
    /// Topic and data.
    events: Vec<(String, Value)>,
}

/// Without what they say.
impl fmt::Debug for HeardMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeardMessage").field("length", &self.length).finish_non_exhaustive()
    }
}

impl Storage {
    /// A handle whose writes are on behalf of that message, where somebody wants to hear of it. The work that a long message makes is done
    /// here, and not in the transaction. `message` is asked for only if need be.
    pub fn on_behalf_of(&self, tenant: &TenantId, message_type: &str, status: Option<&str>, message: impl FnOnce() -> DeviceMessage) -> Option<Self> {
        let wanted: Vec<(String, bool)> = [(WITHOUT_SECRETS, false), (WITH_SECRETS, true)]
            .into_iter()
            .map(|(prefix, with_secrets)| (format!("{prefix}{message_type}"), with_secrets))
            .filter(|(topic, _)| self.is_wanted(tenant, topic, status))
            .collect();
        if wanted.is_empty() {
            return None;
        }
        let message = message();
        let events = wanted.into_iter().map(|(topic, with_secrets)| (topic, message.event(with_secrets))).collect();
        let heard = HeardMessage { status: message.status, length: message.raw.len(), events };
        Some(Self { inner: Arc::clone(&self.inner), message: Some(Arc::new(heard)) })
    }
}

/// Tells of the message that the transaction's member is on behalf of, if it is of one.
pub(crate) async fn heard(tx: &mut Tx, tenant: &TenantId, who: &EnrollmentId, tally: Option<u32>, at: Timestamp) -> Result<(), StorageError> {
    let Some(message) = tx.message.clone() else { return Ok(()) };
    for (topic, data) in &message.events {
        let happened = Happened { tenant, topic, request_type: message.status.as_deref(), at, who: Some(who), cause: &Cause::default() };
        let with_tally = || {
            let mut data = data.clone();
            if let (Some(tally), Some(Value::Object(event))) = (tally, data.get_mut("checkin_event")) {
                event.insert("token_update_tally".to_owned(), tally.into());
            }
            data
        };
        emit(tx, happened, with_tally).await?;
    }
    Ok(())
}

/// As [`heard`], for a report that belongs to no command.
pub(crate) async fn heard_orphan(tx: &mut Tx, tenant: &TenantId, who: &EnrollmentId, at: Timestamp) -> Result<(), StorageError> {
    if tx.message.as_ref().is_some_and(|message| message.length > LONGEST_ORPHAN) {
        tracing::warn!(enrollment.id = %who, "A long report of enrollment {who} belongs to no command; receivers of messages are not told");
        return Ok(());
    }
    heard(tx, tenant, who, None, at).await
}
