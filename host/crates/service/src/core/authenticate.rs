//! Authenticate: a device asks to enroll. It is not enrolled before its first TokenUpdate (edge case 13).

use std::collections::BTreeSet;

use tracing::{info, warn};
use wasmdm_protocol::checkin::{Authenticate, CheckInMessage};
use wasmdm_protocol::enrollment::EnrollmentId;
use wasmdm_storage::audit::AuditRow;
use wasmdm_storage::effects::Applied;
use wasmdm_storage::enrollments::{self, Authenticated};
use wasmdm_storage::events::EnrollmentRecord;

use super::{Core, ReEnroll};
use crate::certificate_binding::{names, refused};
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
            renewing: false,
            request_id: request.id.clone(),
        };
        for _ in 0..ATTEMPTS {
            let (known, bound) = self.storage.enrollment_and_binding(&id, &request.certificate.identity).await?;
            if known.as_ref().is_some_and(|record| record.tenant != request.tenant) {
                return Err(Refusal::bad_request(format!("enrollment {id}: it belongs to another tenant")));
            }
            let its_own = bound.as_ref().is_some_and(|bound| bound.enrollment == id && !bound.is_replaced());
            candidate.re_enrolling = known.as_ref().is_some_and(|known| known.would_re_enroll(its_own));
            candidate.renewing = match &known {
                Some(known) => known.awaits_renewal(&authenticate.topic, self.clock.now()) && !self.names_another(&request, known).await?,
                None => false,
            };
            let new_certificate = known.as_ref().filter(|_| bound.is_none());
            let mut may_change_certificate = match (&new_certificate, self.options.re_enroll) {
                (None, _) | (_, ReEnroll::Allow) => true,
                (Some(known), ReEnroll::SameIdentity) => names(&request.certificate, known),
                (Some(_), ReEnroll::Policy) => false,
            };
            if !may_change_certificate && self.options.re_enroll == ReEnroll::SameIdentity {
                return Err(self.refuse_takeover(&request, &id, "the new certificate does not name it").await);
            }
            let answer = self.policy.decide(&candidate).await;
            may_change_certificate |= answer.is_allowed_by_name();
            if !may_change_certificate && !candidate.renewing && matches!(answer.verdict, Verdict::Allow { .. } | Verdict::Quarantine { .. }) {
                return Err(self.refuse_takeover(&request, &id, "no policy allows the new certificate").await);
            }
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
                    may_change_certificate,
                    // Its window is looked at again when it is written.
                    may_renew: candidate.renewing,
                    may_share_certificate: self.options.certificates_may_be_shared,
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
                Applied::Done(Authenticated::Renewed) => {
                    info!(
                        request.id = request.id,
                        enrollment.id = %id,
                        certificate.sha256 = request.certificate.fingerprint(),
                        "Enrollment {id} renewed its identity"
                    );
                    return Ok(Reply::Empty);
                }
                Applied::Done(Authenticated::Refused { reason }) => return Err(refused(&request, &id, &reason)),
                Applied::Conflict(_) => {}
            }
        }
        Err(Refusal::unavailable("what the enrollment policy read kept changing"))
    }

    /// Whether the certificate says that it is another device's, by its id or its serial number, and not that it is this one's: then it is no
    /// renewal of this one's, whoever sends it.
    async fn names_another(&self, request: &DeviceRequest, known: &EnrollmentRecord) -> Result<bool, Refusal> {
        if names(&request.certificate, known) {
            return Ok(false);
        }
        // A name counts whatever the case of its letters; rows are found as devices write them.
        let spellings = |name: String| [name.to_ascii_uppercase(), name.to_ascii_lowercase(), name];
        let named: BTreeSet<String> = request.certificate.names().into_iter().filter(|name| !name.is_empty()).flat_map(spellings).collect();
        for name in named {
            let by_id = self.storage.enrollment(&EnrollmentId::new(name.as_str())).await?;
            let by_serial_number = self.storage.enrollments_by_serial_number(&known.tenant, &name).await?;
            if by_id.into_iter().chain(by_serial_number).any(|named| named.parent.is_none() && named.id != known.id) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The device is refused, and somebody can see it: a known device came with a certificate that it may not have.
    async fn refuse_takeover(&self, request: &DeviceRequest, id: &EnrollmentId, reason: &str) -> Refusal {
        if !self.refused_takeovers.contains_key(id) {
            self.refused_takeovers.insert(id.clone(), ());
            let row = self.audit_row(request, id, "enrollment.new-certificate-refused");
            // The device is refused either way.
            if let Err(error) = self.storage.record_decision(Vec::new(), vec![row], self.clock.now()).await {
                warn!(request.id = request.id, "A refused certificate is missing in the audit: {error}");
            }
        }
        refused(request, id, reason)
    }

    fn audit_row(&self, request: &DeviceRequest, id: &EnrollmentId, action: &str) -> AuditRow {
        AuditRow {
            tenant: request.tenant.clone(),
            actor: "server".to_owned(),
            action: action.to_owned(),
            target: Some(id.clone()),
            detail: serde_json::json!({ "certificate": request.certificate.fingerprint(), "request": request.id }),
            at: self.clock.now(),
        }
    }

    /// Another certificate for a known device may be a re-enrollment or a takeover by a holder of any certificate of the authority: the
    /// operator can always see that it happened (edge case 19).
    async fn takeover_audit(&self, request: &DeviceRequest, id: &EnrollmentId, known: bool) -> Result<Option<AuditRow>, Refusal> {
        if !known || self.storage.certificate_binding(&request.certificate.identity).await?.is_some() {
            return Ok(None);
        }
        Ok(Some(self.audit_row(request, id, "enrollment.new-certificate")))
    }
}
