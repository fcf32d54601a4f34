//! CheckOut: the device has removed its management. Best effort on the device's side (edge case 29).

use tracing::info;
use wasmdm_protocol::checkin::CheckInMessage;

use super::Core;
use crate::message::DeviceRequest;
use crate::reply::{Refusal, Reply};

impl Core {
    pub(super) async fn check_out(&self, request: DeviceRequest, message: CheckInMessage) -> Result<Reply, Refusal> {
        let id = &message.enrollment.id;
        if !self.storage.check_out(&request.tenant, id, message.raw.clone(), self.clock.now()).await? {
            return Err(unknown(id));
        }
        info!(request.id = request.id, enrollment.id = %id, "Enrollment {id} checked out");
        Ok(Reply::Empty)
    }
}

/// A restored database must not un-enroll a fleet: an enrollment that is not there is a 400, never a 401 or 404.
pub(super) fn unknown(id: &wasmdm_protocol::enrollment::EnrollmentId) -> Refusal {
    Refusal::bad_request(format!("enrollment {id}: it is unknown here"))
}
