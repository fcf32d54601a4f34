//! Who may use the authentication proxy (edge case 62).

use wasmdm_protocol::certificate::Certificate;
use wasmdm_protocol::time::Timestamp;
use wasmdm_storage::Storage;
use wasmdm_storage::certificate_bindings::Standing;
use wasmdm_storage::events::{EnrollmentRecord, EnrollmentState};

use crate::reply::Refusal;

/// The device whose certificate it is. Nothing is bound here: a request that carries no message says nothing about an enrollment.
///
/// What a device gets by declarations it must not get before it is enrolled, after it has left, or in quarantine; that holds for what the
/// declarations lead to as well.
pub async fn enrollment_of(storage: &Storage, certificate: &Certificate, now: Timestamp) -> Result<EnrollmentRecord, Refusal> {
    if certificate.not_after < now {
        return Err(Refusal::bad_request("its identity has expired, so it may poll for a command that renews it, and nothing else"));
    }
    let Some(binding) = storage.certificate_binding(&certificate.identity).await? else {
        return Err(Refusal::bad_request("its certificate is bound to no enrollment"));
    };
    let id = &binding.enrollment;
    if binding.is_replaced() {
        return Err(Refusal::bad_request(format!("enrollment {id}: its certificate was replaced by a later Authenticate")));
    }
    let Some(record) = storage.enrollment(id).await?.filter(|record| record.tenant == binding.tenant) else {
        return Err(Refusal::bad_request(format!("enrollment {id}: it is unknown here")));
    };
    if binding.standing == Standing::Outgoing && record.is_in_renewal(now) {
        return Err(Refusal::bad_request(format!("enrollment {id}: its identity is being renewed, and files are for the new one")));
    }
    if record.state != EnrollmentState::Enrolled || record.quarantined_by.is_some() {
        return Err(Refusal::NotFound { reason: format!("enrollment {id}: it is not enrolled, or in quarantine") });
    }
    Ok(record)
}
