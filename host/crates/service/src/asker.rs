//! Who asks for an answer that only one plugin can give.

use serde_json::{Value, json};
use wasmdm_protocol::enrollment::{DeviceFacts, Enrollment, TenantId};
use wasmdm_storage::events::EnrollmentRecord;

/// A channel whose certificate was verified, as plugins are told of it.
#[derive(Debug, Clone)]
pub struct Asker {
    pub tenant: TenantId,
    pub enrollment: Enrollment,
    pub topic: String,
    /// The contract's `facts` of an enrollment.
    pub facts: Value,
    /// Of the device's request: the same in log and audit.
    pub request_id: String,
}

impl Asker {
    /// A channel that is enrolled, or was.
    pub fn known(record: EnrollmentRecord, request_id: String) -> Self {
        let EnrollmentRecord { tenant, id, parent, kind, topic, facts, .. } = record;
        Self { tenant, enrollment: Enrollment { id, parent, kind }, topic, facts, request_id }
    }

    /// A user of a known device whose channel does not exist yet.
    pub fn new_user(device: EnrollmentRecord, enrollment: Enrollment, said: &DeviceFacts, request_id: String) -> Self {
        let mut facts = serde_json::to_value(said).unwrap_or_else(|_| json!({}));
        if let Value::Object(facts) = &mut facts {
            facts.insert("tags".to_owned(), json!([]));
            facts.insert("url_params".to_owned(), json!({}));
        }
        Self { tenant: device.tenant, enrollment, topic: device.topic, facts, request_id }
    }
}
