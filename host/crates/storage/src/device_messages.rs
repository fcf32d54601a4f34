//! Messages of devices as events, for receivers of NanoMDM's webhook.
//!
//! A receiver gets the message itself, so its event is made where the message is at hand: [`Storage::on_behalf_of`] makes a handle whose
//! writes know the message, and each change that a message causes tells of it by [`heard`] in its own transaction. The topics are
//! NanoMDM's (`mdm.Authenticate`, `mdm.Connect`); those that begin with `mdm+secrets.` are the same with the message to the byte.

use crate::Storage;
use crate::events::{Cause, Happened, emit};
use crate::writer::Tx;
use crate::{StorageError, memory::Subscribed};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use wasmdm_protocol::enrollment::{Enrollment, EnrollmentId, TenantId};
use wasmdm_protocol::plist;
use wasmdm_protocol::time::Timestamp;

/// The topics of messages without their secrets, and with them.
const TOPICS: [(&str, bool); 2] = [("mdm.", false), ("mdm+secrets.", true)];

/// What a device has sent.
#[derive(Clone)]
pub struct DeviceMessage {
    /// Who sent it.
    pub enrollment: Enrollment,
    /// The MessageType; `Connect` for a report and an Idle.
    pub message_type: &'static str,
    /// Of a report.
    pub status: Option<String>,
    /// Of a report.
    pub command_uuid: Option<String>,
    /// Parsed.
    pub document: plist::Value,
    /// As received.
    pub raw: Bytes,
    /// The query of the URL.
    pub url_params: BTreeMap<String, String>,
}

/// Without what it says.
impl fmt::Debug for DeviceMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceMessage").field("enrollment", &self.enrollment).field("message_type", &self.message_type).finish_non_exhaustive()
    }
}

impl DeviceMessage {
    /// NanoMDM's event, but for what is of the delivery: `topic`, `event_id`, `created_at`.
    fn event(&self, with_secrets: bool, tally: Option<u32>) -> Value {
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
        let payload = if with_secrets { self.raw.clone() } else { plist::to_xml(&wasmdm_protocol::json::without_secrets(&self.document)) };
        event.insert("raw_payload".to_owned(), STANDARD.encode(payload).into());
        if !self.url_params.is_empty() {
            event.insert("url_params".to_owned(), json!(self.url_params));
        }
        if let Some(tally) = tally {
            event.insert("token_update_tally".to_owned(), tally.into());
        }
        let Some(status) = &self.status else { return json!({ "checkin_event": event }) };
        event.insert("status".to_owned(), status.as_str().into());
        if let Some(command_uuid) = &self.command_uuid {
            event.insert("command_uuid".to_owned(), command_uuid.as_str().into());
        }
        json!({ "acknowledge_event": event })
    }
}

impl Storage {
    /// Whether anybody wants to hear of devices' messages.
    pub fn wants_messages(&self, tenant: &TenantId) -> bool {
        let wants = |line: &Subscribed| line.subscription.topics.iter().any(|topic| TOPICS.iter().any(|(prefix, _)| topic.starts_with(prefix)));
        !self.inner.memory.subscribed(tenant, wants).is_empty()
    }

    /// A handle whose writes are on behalf of that message.
    #[must_use]
    pub fn on_behalf_of(&self, message: DeviceMessage) -> Self {
        Self { inner: Arc::clone(&self.inner), message: Some(Arc::new(message)) }
    }
}

/// Tells of the message that the transaction's member is on behalf of, if it is of one.
pub(crate) async fn heard(tx: &mut Tx, tenant: &TenantId, who: &EnrollmentId, tally: Option<u32>, at: Timestamp) -> Result<(), StorageError> {
    let Some(message) = tx.message.clone() else { return Ok(()) };
    for (prefix, with_secrets) in TOPICS {
        let topic = format!("{prefix}{}", message.message_type);
        let request_type = message.status.as_deref();
        let happened = Happened { tenant, topic: &topic, request_type, at, who: Some(who), cause: &Cause::default() };
        emit(tx, happened, || message.event(with_secrets, tally)).await?;
    }
    Ok(())
}
