//! Authenticate: a device asks to enroll. It is not enrolled before its first TokenUpdate (edge case 13).

use tracing::{info, warn};
use wasmdm_protocol::checkin::{Authenticate, CheckInMessage};
use wasmdm_storage::audit::AuditRow;
use wasmdm_storage::effects::Applied;
use wasmdm_storage::enrollments::{self, Authenticated};

use super::Core;
use crate::enrollment_policy::{Candidate, Verdict};
use crate::message::DeviceRequest;
use crate::reply::{Refusal, Reply};

/// How often a decision is made again because something that a plugin read has changed before it was committed.
const ATTEMPTS: u32 = 3;

impl Core {
    pub(super) async fn authenticate(&self, request: DeviceRequest, message: CheckInMessage, authenticate: Authenticate) -> Result<Reply, Refusal> {
        let id = message.enrollment.id.clone();
        if !message.enrollment.kind.is_device_channel() {
            return Err(Refusal::bad_request(format!("enrollment {id}: Authenticate belongs to the device channel")));
        }
        let mut candidate = Candidate {
            tenant: request.tenant.clone(),
            enrollment: message.enrollment.clone(),
            topic: authenticate.topic.clone(),
            facts: message.facts.clone(),
            certificate: request.certificate.clone(),
            url_params: request.url_params.clone(),
            message: message.document.clone(),
            re_enrolling: false,
            request_id: request.id.clone(),
        };
        for _ in 0..ATTEMPTS {
            let known = self.storage.enrollment(&id).await?;
            if known.as_ref().is_some_and(|record| record.tenant != request.tenant) {
                return Err(Refusal::bad_request(format!("enrollment {id}: it belongs to another tenant")));
            }
            candidate.re_enrolling = match &known {
                None => false,
                Some(known) => {
                    let bound = self.storage.certificate_binding(&request.certificate.identity).await?;
                    known.would_re_enroll(bound.is_some_and(|bound| bound.enrollment == id && !bound.replaced))
                }
            };
            let answer = self.policy.decide(&candidate).await;
            let now = self.clock.now();
            let (quarantined_by, tags) = match answer.verdict {
                Verdict::Allow { tags } => (None, tags),
                Verdict::Quarantine { by, tags } => (Some(by), tags),
                Verdict::Deny { reason } => match self.storage.record_decision(answer.effects, answer.audit, now).await? {
                    Applied::Done(()) => {
                        info!(request.id = request.id, enrollment.id = %id, "Enrollment {id} was denied: {reason}");
                        return Err(Refusal::Denied { reason });
                    }
                    Applied::Conflict(_) => continue,
                },
                Verdict::Unavailable { reason } => {
                    warn!(request.id = request.id, enrollment.id = %id, "Enrollment {id} could not be decided: {reason}");
                    // The device is refused either way; a lost audit row is not worth another answer.
                    if let Err(error) = self.storage.record_decision(Vec::new(), answer.audit, now).await {
                        warn!(request.id = request.id, "The failed decision is missing in the audit: {error}");
                    }
                    return Err(Refusal::unavailable(format!("the enrollment policy could not decide: {reason}")));
                }
            };
            let mut audit = answer.audit;
            audit.extend(self.takeover_audit(&request, &id, known.is_some()).await?);
            let stored = self
                .storage
                .authenticate(enrollments::Authenticate {
                    tenant: request.tenant.clone(),
                    enrollment: message.enrollment.clone(),
                    topic: authenticate.topic.clone(),
                    facts: message.facts.clone(),
                    raw: message.raw.clone(),
                    document: message.document.clone(),
                    certificate: request.certificate.clone(),
                    url_params: request.url_params.clone(),
                    tags,
                    quarantined_by,
                    decisions: answer.decisions,
                    effects: answer.effects,
                    audit,
                    now,
                })
                .await?;
            match stored {
                Applied::Done(Authenticated::Stored { re_enrolling }) => {
                    info!(
                        request.id = request.id,
                        enrollment.id = %id,
                        re_enrolling,
                        serial_number = message.facts.serial_number.as_deref().unwrap_or_default(),
                        "Enrollment {id} authenticated"
                    );
                    return Ok(Reply::Empty);
                }
                Applied::Done(Authenticated::Refused { reason }) => {
                    warn!(request.id = request.id, enrollment.id = %id, "Enrollment {id} was refused: {reason}");
                    return Err(Refusal::bad_request(format!("enrollment {id}: {reason}")));
                }
                Applied::Conflict(_) => {}
            }
        }
        Err(Refusal::unavailable("what the enrollment policy read kept changing"))
    }

    /// Another certificate for a known device may be a re-enrollment or a takeover by a holder of any certificate of the authority: the
    /// operator can always see that it happened (edge case 19).
    async fn takeover_audit(
        &self,
        request: &DeviceRequest,
        id: &wasmdm_protocol::enrollment::EnrollmentId,
        known: bool,
    ) -> Result<Option<AuditRow>, Refusal> {
        if !known || self.storage.certificate_binding(&request.certificate.identity).await?.is_some() {
            return Ok(None);
        }
        Ok(Some(AuditRow {
            tenant: request.tenant.clone(),
            actor: "server".to_owned(),
            action: "enrollment.new-certificate".to_owned(),
            target: Some(id.clone()),
            detail: serde_json::json!({ "certificate": request.certificate.fingerprint(), "request": request.id }),
            at: self.clock.now(),
        }))
    }
}
