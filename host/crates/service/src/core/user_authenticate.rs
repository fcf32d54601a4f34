//! `UserAuthenticate`: a user of a Mac asks for a channel (edge case 33).

use tracing::info;
use wasmdm_protocol::checkin::{CheckInMessage, UserAuthenticate, digest_challenge_document};

use super::Core;
use super::check_out::unknown;
use crate::message::DeviceRequest;
use crate::reply::{Refusal, Reply};

impl Core {
    pub(super) async fn user_authenticate(&self, request: DeviceRequest, message: CheckInMessage, user: UserAuthenticate) -> Result<Reply, Refusal> {
        let Some(device) = &message.enrollment.parent else {
            return Err(Refusal::bad_request("UserID: UserAuthenticate is a user's message"));
        };
        if self.storage.enrollment(device).await?.is_none_or(|record| record.tenant != request.tenant) {
            return Err(unknown(device));
        }
        // 410 says "do not manage this user", and nothing else.
        if !self.options.zero_length_digest_challenge && user.digest_response.is_none() {
            return Err(Refusal::Declined);
        }
        info!(request.id = request.id, enrollment.id = %message.enrollment.id, "User {} is managed", message.enrollment.id);
        Ok(match user.digest_response {
            // A challenge of no length: the user need not prove anything.
            None => Reply::Plist(digest_challenge_document("")),
            Some(_) => Reply::Empty,
        })
    }
}
