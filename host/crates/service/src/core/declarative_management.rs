//! `DeclarativeManagement`: handed to whoever serves declarations (edge case 2: an unknown endpoint is theirs to refuse).

use wasmdm_protocol::checkin::{CheckInMessage, DeclarativeManagement};
use wasmdm_protocol::declarative_management::EndpointPath;
use wasmdm_storage::events::EnrollmentState;

use super::Core;
use super::check_out::unknown;
use crate::declarative_management::{Answer, EndpointRequest};
use crate::message::DeviceRequest;
use crate::reply::{Refusal, Reply};

impl Core {
    pub(super) async fn declarative_management(
        &self,
        request: DeviceRequest,
        message: CheckInMessage,
        asked: DeclarativeManagement,
    ) -> Result<Reply, Refusal> {
        let id = &message.enrollment.id;
        let path = EndpointPath::parse(&asked.endpoint).map_err(|error| Refusal::bad_request(error.to_string()))?;
        let Some(record) = self.storage.enrollment(id).await?.filter(|record| record.tenant == request.tenant) else {
            return Err(unknown(id));
        };
        self.storage.touch(id, self.clock.now());
        let not_served = || Refusal::NotFound { reason: format!("declarative management: nothing is served at `{}`", path.as_str()) };
        let mut may_ask = record.state == EnrollmentState::Enrolled && record.quarantined_by.is_none();
        if let Some(device) = &record.parent {
            may_ask &= self.storage.enrollment(device).await?.is_some_and(|device| device.quarantined_by.is_none());
        }
        // What a device gets by declarations it must not get before it is enrolled, nor in quarantine.
        let Some(server) = self.options.declarative_management.as_ref().filter(|_| may_ask) else {
            // A status report that nobody reads is taken all the same, or the device would send it for ever.
            return if path.as_str() == "status" { Ok(Reply::Empty) } else { Err(not_served()) };
        };
        let asked = EndpointRequest { enrollment: message.enrollment.clone(), path: path.clone(), data: asked.data, request_id: request.id };
        match server.answer(&asked).await? {
            Answer::Document(body) => Ok(Reply::Json(body)),
            Answer::NoContent => Ok(Reply::NoContent),
            Answer::NotFound => Err(not_served()),
        }
    }
}
