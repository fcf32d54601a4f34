use crate::effects::{Applied, PluginEffects};
use crate::events::EnrollmentRecord;
use crate::{Storage, StorageError};
use bytes::Bytes;
use std::collections::BTreeMap;
use wasmdm_protocol::certificate::Certificate;
use wasmdm_protocol::enrollment::{DeviceFacts, Enrollment, EnrollmentId, TenantId};
use wasmdm_protocol::time::Timestamp;

/// An Authenticate that may be stored: verified and allowed.
#[derive(Debug, Clone)]
pub struct Authenticate {
    pub tenant: TenantId,
    pub enrollment: Enrollment,
    pub topic: String,
    pub facts: DeviceFacts,
    pub raw: Bytes,
    pub document: wasmdm_protocol::plist::Value,
    pub certificate: Certificate,
    pub url_params: BTreeMap<String, String>,
    pub tags: Vec<String>,
    /// The plugin that quarantines it.
    pub quarantined_by: Option<String>,
    /// JSON array of {plugin, digest, generation, verdict, reason?}: kept with the enrollment and in the event `enrollment.enrolling`.
    pub decisions: serde_json::Value,
    pub effects: Vec<PluginEffects>,
    pub audit: Vec<crate::audit::AuditRow>,
    pub now: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authenticated {
    Stored {
        /// The enrollment was known before.
        re_enrolling: bool,
    },
    /// The certificate is bound to another enrollment, or the enrollment belongs to another tenant: nothing was written.
    Refused { reason: String },
}

#[derive(Debug, Clone)]
pub struct TokenUpdate {
    pub tenant: TenantId,
    pub enrollment: Enrollment,
    pub facts: DeviceFacts,
    pub topic: String,
    pub push_magic: String,
    pub token: Bytes,
    pub unlock_token: Option<Bytes>,
    pub awaiting_configuration: Option<bool>,
    pub raw: Bytes,
    pub document: wasmdm_protocol::plist::Value,
    pub now: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenUpdated {
    Stored {
        /// 1 is the first since Authenticate.
        tally: u32,
    },
    /// Unknown enrollment (of a device), another topic than Authenticate's, or checked out without a new Authenticate: nothing was written.
    Refused { reason: String },
}

impl Storage {
    pub async fn authenticate(
        &self,
        _message: Authenticate,
    ) -> Result<Applied<Authenticated>, StorageError> {
        todo!()
    }
    pub async fn token_update(&self, _message: TokenUpdate) -> Result<TokenUpdated, StorageError> {
        todo!()
    }
    /// Disables it (a device: with its users), emits `enrollment.checked-out`. `false`: unknown.
    pub async fn check_out(
        &self,
        _tenant: &TenantId,
        _id: &EnrollmentId,
        _raw: Bytes,
        _now: Timestamp,
    ) -> Result<bool, StorageError> {
        todo!()
    }
    /// `None` deletes it. `false`: unknown enrollment.
    pub async fn set_bootstrap_token(
        &self,
        _tenant: &TenantId,
        _id: &EnrollmentId,
        _token: Option<Bytes>,
        _awaiting_configuration: Option<bool>,
        _now: Timestamp,
    ) -> Result<bool, StorageError> {
        todo!()
    }
    pub async fn bootstrap_token(
        &self,
        _tenant: &TenantId,
        _id: &EnrollmentId,
    ) -> Result<Option<Bytes>, StorageError> {
        todo!()
    }
    /// By id over the whole server: ids are unique.
    pub async fn enrollment(
        &self,
        _id: &EnrollmentId,
    ) -> Result<Option<EnrollmentRecord>, StorageError> {
        todo!()
    }
    pub async fn enrollments_by_serial_number(
        &self,
        _tenant: &TenantId,
        _serial_number: &str,
    ) -> Result<Vec<EnrollmentRecord>, StorageError> {
        todo!()
    }
    /// In the order of ids, after `cursor` (the last id of the page before).
    pub async fn query_enrollments(
        &self,
        _tenant: &TenantId,
        _filter: &EnrollmentFilter,
        _cursor: Option<&str>,
        _limit: u32,
    ) -> Result<Vec<EnrollmentRecord>, StorageError> {
        todo!()
    }
    /// Coalesced in memory, flushed every second or so.
    pub fn touch(&self, _id: &EnrollmentId, _now: Timestamp) {
        todo!()
    }
    /// Device and user channels that are enrolled, by state: for the metric.
    pub async fn count_enrollments(&self) -> Result<BTreeMap<String, u64>, StorageError> {
        todo!()
    }
}

/// All that are given must match.
#[derive(Debug, Clone, Default)]
pub struct EnrollmentFilter {
    pub kind: Option<String>,
    pub state: Option<String>,
    pub tag: Option<String>,
    pub serial_number: Option<String>,
    pub model: Option<String>,
}
