//! `ReturnToService`: a device is about to erase itself and asks with what it returns (edge case 49).
//!
//! Apple: it asks when its user triggers the return, or when it has been idle for long enough, and only in the mode that its Automated Device
//! Enrollment set. So it is an enrolled device that asks, with the identity that it has always had.

use tracing::{info, warn};
use wasmdm_protocol::checkin::{CheckInMessage, return_to_service_document};

use super::Core;
use crate::message::DeviceRequest;
use crate::owned_answer::OwnedAnswer;
use crate::reply::{Refusal, Reply};

impl Core {
    pub(super) async fn return_to_service(&self, request: DeviceRequest, message: CheckInMessage) -> Result<Reply, Refusal> {
        let id = &message.enrollment.id;
        if !message.enrollment.kind.is_device_channel() {
            return Err(Refusal::bad_request(format!("enrollment {id}: ReturnToService belongs to the device channel")));
        }
        let asker = self.enrolled_asker(&request, &message).await?;
        let nobody = || Refusal::bad_request("MessageType: nobody serves ReturnToService");
        let Some(owner) = &self.options.return_to_service else { return Err(nobody()) };
        match owner.configuration(&asker).await? {
            OwnedAnswer::Nobody => Err(nobody()),
            OwnedAnswer::Failed { reason } => {
                warn!(request.id = request.id, enrollment.id = %id, "Enrollment {id} is not told how to return to service: {reason}");
                Err(Refusal::unavailable(format!("the return to service could not be configured: {reason}")))
            }
            OwnedAnswer::Given(None) => Err(Refusal::bad_request(format!("MessageType: enrollment {id} does not return to service"))),
            OwnedAnswer::Given(Some(configuration)) => {
                // Without a token the device erases itself all the same, and merely keeps no apps.
                let escrowed = self.storage.bootstrap_token(&request.tenant, id).await?;
                let token = escrowed.filter(|_| configuration.with_bootstrap_token);
                info!(request.id = request.id, enrollment.id = %id, bootstrap_token = token.is_some(), "Enrollment {id} was told how to return to service");
                Ok(Reply::Plist(return_to_service_document(configuration.into_keys(token.as_deref()))))
            }
        }
    }
}
