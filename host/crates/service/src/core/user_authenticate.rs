//! `UserAuthenticate`: a user of a Mac asks for a channel (edge case 33).

use tracing::{info, warn};
use wasmdm_protocol::checkin::{CheckInMessage, UserAuthenticate, auth_token_document, digest_challenge_document};
use wasmdm_protocol::json::without_secrets;
use wasmdm_protocol::plist;

use super::Core;
use super::check_out::unknown;
use crate::asker::Asker;
use crate::message::DeviceRequest;
use crate::owned_answer::OwnedAnswer;
use crate::reply::{Refusal, Reply};
use crate::user_authentication::{Login, UserVerdict};

impl Core {
    pub(super) async fn user_authenticate(&self, request: DeviceRequest, message: CheckInMessage, user: UserAuthenticate) -> Result<Reply, Refusal> {
        let Some(device_id) = message.enrollment.parent.clone() else {
            return Err(Refusal::bad_request("UserID: UserAuthenticate is a user's message"));
        };
        let Some(device) = self.storage.enrollment(&device_id).await?.filter(|record| record.tenant == request.tenant) else {
            return Err(unknown(&device_id));
        };
        let id = message.enrollment.id.clone();
        let first = user.digest_response.is_none();
        // A digest is as good as the password to whoever can try passwords: it is not for keeping.
        let kept = if first { message.raw.clone() } else { plist::to_xml(&without_secrets(&message.document)) };
        let answer = match &self.options.user_authentication {
            None => OwnedAnswer::Nobody,
            Some(owner) => {
                let asker = match self.storage.enrollment(&id).await? {
                    Some(record) => Asker::known(record, request.id.clone()),
                    None => Asker::new_user(device, message.enrollment, &message.facts, request.id.clone()),
                };
                owner.authenticate(&Login { asker, message: message.document, digest_response: user.digest_response }).await?
            }
        };
        // Before the device learns of it: what it sends next is judged by it.
        self.keep_verdict(&request, &device_id, &id, first, &answer).await?;
        let verdict = match answer {
            OwnedAnswer::Nobody => UserVerdict::Abstain,
            // A login does not wait: an answer that came later would be for nobody. The user is asked again at the next login.
            OwnedAnswer::Failed { reason } => {
                warn!(request.id = request.id, enrollment.id = %id, "User {id} could not be authenticated: {reason}");
                return Err(Refusal::Declined);
            }
            OwnedAnswer::Given(verdict) => verdict,
        };
        let reply = match verdict {
            // A challenge of no length: the user need not prove anything.
            UserVerdict::Abstain if first && self.options.zero_length_digest_challenge => Reply::Plist(digest_challenge_document("")),
            UserVerdict::NoChallenge => Reply::Plist(digest_challenge_document("")),
            UserVerdict::Abstain if !first => Reply::Empty,
            // 410 says "do not manage this user", and nothing else.
            UserVerdict::Abstain | UserVerdict::Decline => return Err(Refusal::Declined),
            UserVerdict::Challenge(challenge) => return Ok(Reply::Plist(digest_challenge_document(&challenge))),
            UserVerdict::AuthToken(token) => Reply::Plist(auth_token_document(&token)),
            UserVerdict::Reject => {
                info!(request.id = request.id, enrollment.id = %id, "The digest of user {id} is wrong");
                return Ok(Reply::Plist(auth_token_document("")));
            }
        };
        // The answer stands whether or not the message is kept: what a plugin wrote with it is stored.
        if let Err(error) = self.storage.user_authenticated(&request.tenant, &id, kept, self.clock.now()).await {
            warn!(request.id = request.id, enrollment.id = %id, "The UserAuthenticate of user {id} is not kept: {error}");
        }
        info!(request.id = request.id, enrollment.id = %id, "User {id} is managed");
        Ok(reply)
    }
}
