//! Users who were turned away stay out, whatever their device sends (edge case 33).

use tracing::warn;
use wasmdm_protocol::enrollment::{Enrollment, EnrollmentId};
use wasmdm_protocol::plist;
use wasmdm_storage::user_verdicts::KeepUserVerdict;

use super::Core;
use crate::message::DeviceRequest;
use crate::owned_answer::OwnedAnswer;
use crate::reply::Refusal;
use crate::user_authentication::UserVerdict;

impl Core {
    /// Refuses what comes in the name of a user who was turned away or has not answered a challenge, and what brings another token than the
    /// user was given. Where nobody authenticates users, and where nobody has said anything of this one, it is taken.
    pub(super) async fn admit_user(
        &self,
        request: &DeviceRequest,
        device: &EnrollmentId,
        user: &EnrollmentId,
        document: Option<&plist::Value>,
    ) -> Result<(), Refusal> {
        if !self.authenticates_users(request) {
            return Ok(());
        }
        let Some(standing) = self.storage.user_standing(&request.tenant, device, user).await? else { return Ok(()) };
        let token = document.and_then(plist::Value::as_dictionary).and_then(|document| document.get("AuthToken"));
        match standing.refusal(token.map(|token| token.as_string().unwrap_or_default())) {
            None => Ok(()),
            Some(reason) => {
                warn!(request.id = request.id, enrollment.id = %user, "A message of enrollment {user} was refused: {reason}");
                Err(Refusal::bad_request(format!("enrollment {user}: {reason}")))
            }
        }
    }

    /// As [`Self::admit_user`], of a report that cannot be read: it need not say that it is a user's, and what goes out next is of the channel
    /// whose command it is about.
    pub(super) async fn admit_whose_command(&self, request: &DeviceRequest, enrollment: &Enrollment, command_uuid: &str) -> Result<(), Refusal> {
        if !self.authenticates_users(request) {
            return Ok(());
        }
        let device = enrollment.device();
        match self.storage.channel_of_sent_command(&request.tenant, &enrollment.id, command_uuid).await? {
            Some(channel) if channel != *device => self.admit_user(request, device, &channel, None).await,
            _ => Ok(()),
        }
    }

    fn authenticates_users(&self, request: &DeviceRequest) -> bool {
        self.options.user_authentication.as_ref().is_some_and(|owner| owner.is_there(&request.tenant))
    }

    /// What was said of a user who logs in stands until the next login.
    pub(super) async fn keep_verdict(
        &self,
        request: &DeviceRequest,
        device: &EnrollmentId,
        user: &EnrollmentId,
        is_first: bool,
        answer: &OwnedAnswer<UserVerdict>,
    ) -> Result<(), Refusal> {
        let (verdict, is_managed, auth_token) = match answer {
            OwnedAnswer::Given(UserVerdict::Abstain) if !is_first => {
                // Having no opinion of a digest does not make it the right one: the challenge stays unanswered.
                return Ok(());
            }
            OwnedAnswer::Nobody | OwnedAnswer::Given(UserVerdict::Abstain) => {
                return Ok(self.storage.forget_user_verdict(&request.tenant, device, user).await?);
            }
            OwnedAnswer::Failed { .. } => ("failure", false, None),
            OwnedAnswer::Given(verdict @ UserVerdict::AuthToken(token)) => (verdict.as_str(), true, Some(token.clone())),
            OwnedAnswer::Given(verdict) => (verdict.as_str(), *verdict == UserVerdict::NoChallenge, None),
        };
        let verdict = KeepUserVerdict {
            tenant: request.tenant.clone(),
            device: device.clone(),
            user: user.clone(),
            verdict,
            is_managed,
            auth_token,
            now: self.clock.now(),
        };
        if self.storage.keep_user_verdict(verdict).await? {
            return Ok(());
        }
        Err(Refusal::bad_request(format!("enrollment {user}: too many users of its device have logged in")))
    }
}
