//! Devices that were enrolled with another server, whose check-ins a client of the API brings (NanoMDM's `/migration`).
//!
//! No policy is asked: they were let in before. No event says that they enrolled, because they did not enroll now.

use tracing::info;
use wasmdm_protocol::checkin::CheckInMessage;
use wasmdm_protocol::time::Timestamp;
use wasmdm_storage::Storage;
use wasmdm_storage::migration::Migrated;

use crate::reply::Refusal;

/// Takes one message; `actor` is the client.
pub async fn migrate(storage: &Storage, message: CheckInMessage, actor: &str, now: Timestamp) -> Result<(), Refusal> {
    let (id, kind) = (message.enrollment.id.clone(), message.check_in.message_type());
    match storage.migrate(message, actor, now).await? {
        Migrated::Stored => {
            info!(enrollment.id = %id, actor, "Enrollment {id} was migrated: {kind}");
            Ok(())
        }
        Migrated::Unchanged => Ok(()),
        Migrated::Refused { reason } => Err(Refusal::bad_request(format!("enrollment {id}: {reason}"))),
    }
}
