//! `GetToken`: a device wants a token for a service of Apple's (edge case 48).

use tracing::{info, warn};
use wasmdm_protocol::checkin::{CheckInMessage, GetToken, token_document};
use wasmdm_protocol::plist::Value;
use wasmdm_storage::events::EnrollmentState;

use super::Core;
use super::check_out::unknown;
use crate::asker::Asker;
use crate::message::DeviceRequest;
use crate::owned_answer::OwnedAnswer;
use crate::reply::{Refusal, Reply};
use crate::token_source::TokenRequest;

/// What Apple's schema requires of a watch that is paired.
const WATCH_PAIRING: (&str, [&str; 3]) = ("com.apple.watch.pairing", ["SecurityToken", "PhoneUDID", "WatchUDID"]);
/// Of `TokenParameters`, as their property list.
const MAX_PARAMETERS: usize = 64 << 10;

impl Core {
    pub(super) async fn get_token(&self, request: DeviceRequest, message: CheckInMessage, asked: GetToken) -> Result<Reply, Refusal> {
        let asker = self.enrolled_asker(&request, &message).await?;
        check_parameters(&asked)?;
        let id = message.enrollment.id;
        let service = asked.service_type.escape_default().to_string();
        let nobody = || Refusal::bad_request(format!("TokenServiceType: nobody serves `{service}`"));
        let Some(source) = &self.options.token_source else { return Err(nobody()) };
        let answer = source.token(&TokenRequest { asker, service_type: asked.service_type, parameters: asked.parameters }).await?;
        match answer {
            OwnedAnswer::Nobody => Err(nobody()),
            OwnedAnswer::Failed { reason } => {
                warn!(request.id = request.id, enrollment.id = %id, "Enrollment {id} got no token for `{service}`: {reason}");
                Err(Refusal::unavailable(format!("the token for `{service}` could not be made: {reason}")))
            }
            OwnedAnswer::Given(None) => Err(Refusal::bad_request(format!("TokenServiceType: enrollment {id} gets no token for `{service}`"))),
            OwnedAnswer::Given(Some(token)) => {
                info!(request.id = request.id, enrollment.id = %id, "Enrollment {id} got a token for `{service}`");
                Ok(Reply::Plist(token_document(token.expose())))
            }
        }
    }

    /// Whoever is enrolled and not in quarantine: what these answers hold is for nobody else.
    pub(super) async fn enrolled_asker(&self, request: &DeviceRequest, message: &CheckInMessage) -> Result<Asker, Refusal> {
        let id = &message.enrollment.id;
        let Some(record) = self.storage.enrollment(id).await?.filter(|record| record.tenant == request.tenant) else {
            return Err(unknown(id));
        };
        self.storage.touch(id, self.clock.now());
        if record.state != EnrollmentState::Enrolled {
            return Err(Refusal::bad_request(format!("enrollment {id}: it is not enrolled")));
        }
        let mut quarantined = record.quarantined_by.is_some();
        if let Some(device) = &record.parent {
            quarantined |= self.storage.enrollment(device).await?.is_none_or(|device| device.quarantined_by.is_some());
        }
        if quarantined {
            return Err(Refusal::bad_request(format!("enrollment {id}: it is in quarantine")));
        }
        Ok(Asker::known(record, request.id.clone()))
    }
}

fn check_parameters(asked: &GetToken) -> Result<(), Refusal> {
    let size = asked.parameters.as_ref().map_or(0, |parameters| wasmdm_protocol::plist::to_xml(parameters).len());
    if size > MAX_PARAMETERS {
        return Err(Refusal::bad_request(format!("TokenParameters: longer than {MAX_PARAMETERS} bytes")));
    }
    let (pairing, keys) = WATCH_PAIRING;
    if asked.service_type != pairing {
        return Ok(());
    }
    let parameters = asked.parameters.as_ref().and_then(Value::as_dictionary);
    match keys.into_iter().find(|key| parameters.and_then(|parameters| parameters.get(key)).and_then(Value::as_string).is_none()) {
        Some(missing) => Err(Refusal::bad_request(format!("TokenParameters: `{pairing}` needs the string {missing}"))),
        None => Ok(()),
    }
}
