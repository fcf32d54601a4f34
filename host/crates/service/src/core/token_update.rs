//! TokenUpdate: the first after an Authenticate enrolls; it repeats for life (edge case 14).

use tracing::{info, warn};
use wasmdm_protocol::checkin::{CheckInMessage, TokenUpdate};
use wasmdm_storage::enrollments::{self, TokenUpdated};

use super::Core;
use crate::message::DeviceRequest;
use crate::reply::{Refusal, Reply};

impl Core {
    pub(super) async fn token_update(&self, request: DeviceRequest, message: CheckInMessage, update: TokenUpdate) -> Result<Reply, Refusal> {
        let id = message.enrollment.id.clone();
        let stored = self
            .storage
            .token_update(enrollments::TokenUpdate {
                tenant: request.tenant,
                enrollment: message.enrollment,
                identity: request.certificate.identity,
                facts: message.facts,
                topic: update.topic,
                push_magic: update.push_magic,
                token: update.token,
                unlock_token: update.unlock_token,
                awaiting_configuration: update.awaiting_configuration,
                raw: message.raw,
                document: message.document,
                now: self.clock.now(),
            })
            .await?;
        match stored {
            TokenUpdated::Stored { tally } => {
                info!(request.id = request.id, enrollment.id = %id, tally, "Enrollment {id} updated its push token");
                Ok(Reply::Empty)
            }
            TokenUpdated::Refused { reason } => {
                warn!(request.id = request.id, enrollment.id = %id, "The push token of enrollment {id} was refused: {reason}");
                Err(Refusal::bad_request(format!("enrollment {id}: {reason}")))
            }
        }
    }
}
