//! `SetBootstrapToken` and `GetBootstrapToken` (edge case 47).

use tracing::info;
use wasmdm_protocol::checkin::{CheckInMessage, SetBootstrapToken, bootstrap_token_document};

use super::Core;
use super::check_out::unknown;
use crate::message::DeviceRequest;
use crate::reply::{Refusal, Reply};

impl Core {
    pub(super) async fn set_bootstrap_token(
        &self,
        request: DeviceRequest,
        message: CheckInMessage,
        set: SetBootstrapToken,
    ) -> Result<Reply, Refusal> {
        // The token belongs to the device, whichever channel brings it.
        let id = message.enrollment.device();
        let deleted = set.bootstrap_token.is_none();
        if !self.storage.set_bootstrap_token(&request.tenant, id, set.bootstrap_token, set.awaiting_configuration, self.clock.now()).await? {
            return Err(unknown(id));
        }
        info!(request.id = request.id, enrollment.id = %id, deleted, "Enrollment {id} escrowed its bootstrap token");
        Ok(Reply::Empty)
    }

    pub(super) async fn bootstrap_token(&self, request: DeviceRequest, message: CheckInMessage) -> Result<Reply, Refusal> {
        let id = message.enrollment.device();
        self.storage.touch(id, self.clock.now());
        Ok(match self.storage.bootstrap_token(&request.tenant, id).await? {
            Some(token) => Reply::Plist(bootstrap_token_document(&token)),
            // None escrowed is an empty 200, not an error: the device asks on its own account.
            None => Reply::Empty,
        })
    }
}
