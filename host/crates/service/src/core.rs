//! The rule of each message.

mod authenticate;
mod bootstrap_token;
mod check_out;
mod report;
mod token_update;

use std::sync::Arc;

use futures_util::future::BoxFuture;
use wasmdm_protocol::checkin::{CheckIn, CheckInMessage};
use wasmdm_storage::Storage;

use crate::Service;
use crate::clock::Clock;
use crate::enrollment_policy::EnrollmentPolicy;
use crate::in_flight::InFlight;
use crate::message::{DeviceRequest, Message};
use crate::reply::{Refusal, Reply};

/// The innermost service.
#[derive(Debug)]
pub struct Core {
    storage: Storage,
    clock: Arc<dyn Clock>,
    policy: Arc<dyn EnrollmentPolicy>,
    in_flight: InFlight,
}

impl Core {
    /// A service over `storage` that asks `policy` before it stores an Authenticate.
    pub fn new(storage: Storage, clock: Arc<dyn Clock>, policy: Arc<dyn EnrollmentPolicy>) -> Self {
        Self { storage, clock, policy, in_flight: InFlight::default() }
    }

    async fn check_in(&self, request: DeviceRequest, message: CheckInMessage) -> Result<Reply, Refusal> {
        match message.check_in.clone() {
            CheckIn::Authenticate(authenticate) => self.authenticate(request, message, authenticate).await,
            CheckIn::TokenUpdate(update) => self.token_update(request, message, update).await,
            CheckIn::CheckOut => self.check_out(request, message).await,
            CheckIn::SetBootstrapToken(token) => self.set_bootstrap_token(request, message, token).await,
            CheckIn::GetBootstrapToken => self.bootstrap_token(request, message).await,
            // Nobody manages directory users yet, and 410 says just that ("do not manage this user").
            CheckIn::UserAuthenticate(_) => Err(Refusal::Declined),
            CheckIn::DeclarativeManagement(endpoint) if endpoint.endpoint == "status" => Ok(Reply::Empty),
            CheckIn::DeclarativeManagement(endpoint) => {
                Err(Refusal::NotFound { reason: format!("declarative management is not served: `{}`", endpoint.endpoint.escape_default()) })
            }
            CheckIn::GetToken(token) => {
                Err(Refusal::bad_request(format!("TokenServiceType: nobody serves `{}`", token.service_type.escape_default())))
            }
            CheckIn::ReturnToService => Err(Refusal::bad_request("MessageType: nobody serves ReturnToService")),
        }
    }
}

impl Service for Core {
    fn handle(&self, request: DeviceRequest, message: Message) -> BoxFuture<'_, Result<Reply, Refusal>> {
        Box::pin(async move {
            match message {
                Message::CheckIn(message) => self.check_in(request, *message).await,
                Message::Report(report) => self.report(request, *report).await,
                Message::Malformed(report) => self.malformed_report(request, *report).await,
            }
        })
    }
}
