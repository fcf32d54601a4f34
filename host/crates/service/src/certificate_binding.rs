//! Is this the enrollment's certificate?
//!
//! A chain that verifies says only that some authority of ours issued the certificate. Whose it is was written by the Authenticate that
//! brought it, and every later message must come with it (edge case 23). This layer only checks; the binding itself is written in
//! Authenticate's own transaction. Two exceptions bind here, each in a transaction of its own before the message is served: a certificate
//! that the device's system has renewed and that names the enrollment (edge case 20), and, where the operator says so, the first
//! certificate of a device that was moved here from another server.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use tracing::{info, warn};
use wasmdm_protocol::checkin::CheckIn;
use wasmdm_protocol::enrollment::{Enrollment, EnrollmentId};
use wasmdm_storage::Storage;
use wasmdm_storage::certificate_bindings::{Associated, Association, Binding, CertificateOwner, Reason, Standing};
use wasmdm_storage::events::EnrollmentRecord;

use crate::Service;
use crate::clock::Clock;
use crate::message::{DeviceRequest, Message};
use crate::reply::{Refusal, Reply};

/// How strictly certificates and enrollments belong together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BindingRules {
    /// A mismatch is logged and counted, and the message is served all the same: for the days after a move, while somebody looks.
    pub only_warn: bool,
    /// An enrollment that has never had a certificate takes the first one that is nobody's, as NanoMDM does with `-retro`.
    pub retroactive: bool,
}

/// Lets a message through to `inner` if its certificate is bound to the enrollment that it names.
#[derive(Debug)]
pub struct CertificateBinding<S> {
    storage: Storage,
    clock: Arc<dyn Clock>,
    rules: BindingRules,
    inner: Arc<S>,
}

impl<S: Service> CertificateBinding<S> {
    /// A layer around `inner`.
    pub fn new(storage: Storage, clock: Arc<dyn Clock>, rules: BindingRules, inner: Arc<S>) -> Self {
        Self { storage, clock, rules, inner }
    }

    async fn check(&self, request: &mut DeviceRequest, message: &mut Message) -> Result<(), Refusal> {
        let identity = request.certificate.identity;
        if let Message::CheckIn(check_in) = message
            && let CheckIn::Authenticate(authenticate) = &check_in.check_in
        {
            let device = check_in.enrollment.device();
            request.tenant = match self.storage.certificate_owner(&identity, &authenticate.topic).await? {
                CertificateOwner::Nobody { topic_owner } => topic_owner.unwrap_or_default(),
                CertificateOwner::Enrollment(binding) => {
                    // The storage decides again when it writes; here it only spares the plugins.
                    if binding.enrollment != *device {
                        self.mismatch(request, device, "its certificate is bound to another enrollment")?;
                    }
                    binding.tenant
                }
            };
            return Ok(());
        }
        let bound = self.storage.certificate_binding(&identity).await?;
        self.check_known(request, message, bound).await
    }

    /// Of every message but Authenticate.
    async fn check_known(&self, request: &mut DeviceRequest, message: &mut Message, bound: Option<Binding>) -> Result<(), Refusal> {
        let binding = match bound {
            Some(binding) => binding,
            None => match self.adopted(request, message).await? {
                Some(binding) => binding,
                None => {
                    let device = claimed(message);
                    self.mismatch(request, &device, "its certificate is bound to no enrollment, and does not name this one")?;
                    return self.trusted(request, &device).await;
                }
            },
        };
        match binding.standing {
            Standing::Replaced => self.mismatch(request, &binding.enrollment, "its certificate was replaced by a later one")?,
            Standing::Outgoing if !is_for_outgoing(message) && self.is_renewing(&binding.enrollment).await? => {
                self.mismatch(request, &binding.enrollment, "its identity is being renewed, and it may not say this with the one before")?;
            }
            Standing::Own | Standing::Outgoing | Standing::Incoming => {}
        }
        match message {
            Message::Malformed(report) => {
                // The report is the certificate's enrollment's; what its bytes claim must agree or be absent. Nothing of it is believed, so
                // a mismatch is refused even where others are only watched.
                match &report.enrollment {
                    Some(claim) if *claim.device() != binding.enrollment => {
                        return Err(refused(request, claim.device(), "its certificate is bound to another enrollment"));
                    }
                    Some(_) => {}
                    None => report.enrollment = self.bound(&binding).await?,
                }
            }
            Message::Oversized(enrollment) => *enrollment = self.bound(&binding).await?,
            Message::CheckIn(_) | Message::Report(_) => {
                let device = claimed(message);
                if device != binding.enrollment {
                    self.mismatch(request, &device, "its certificate is bound to another enrollment")?;
                    return self.trusted(request, &device).await;
                }
            }
        }
        request.tenant = binding.tenant;
        Ok(())
    }

    /// Whether the renewal goes on. A device that came to nothing with it and has kept its certificate is as before: when its time is over, or
    /// when it has said so by a TokenUpdate.
    async fn is_renewing(&self, device: &EnrollmentId) -> Result<bool, Refusal> {
        Ok(self.storage.enrollment(device).await?.is_some_and(|record| record.renewing && record.is_in_renewal(self.clock.now())))
    }

    async fn bound(&self, binding: &Binding) -> Result<Option<Enrollment>, Refusal> {
        let known = self.storage.enrollment(&binding.enrollment).await?;
        Ok(known.map(|record| Enrollment { id: record.id, parent: record.parent, kind: record.kind }))
    }

    /// A certificate that nobody is known by becomes the enrollment's, if it may.
    async fn adopted(&self, request: &DeviceRequest, message: &Message) -> Result<Option<Binding>, Refusal> {
        // What a malformed report claims to be is not believed, and what has expired is nobody's new identity.
        let now = self.clock.now();
        if matches!(message, Message::Malformed(_) | Message::Oversized(_)) || request.certificate.not_after < now {
            return Ok(None);
        }
        let device = claimed(message);
        let Some(record) = self.storage.enrollment(&device).await? else { return Ok(None) };
        let has_one = record.facts.get("certificate").is_some();
        let reason = if has_one && names(&request.certificate, &record) {
            Reason::Rotation
        } else if !has_one && self.rules.retroactive {
            Reason::Retroactive
        } else {
            return Ok(None);
        };
        let association =
            Association { enrollment: device.clone(), certificate: request.certificate.clone(), reason, request_id: request.id.clone(), now };
        match self.storage.associate_certificate(association).await? {
            Associated::Bound(binding) => {
                metrics::counter!("wasmdm_identities_adopted_total", "how" => if has_one { "rotation" } else { "retroactive" }).increment(1);
                info!(
                    request.id = request.id,
                    enrollment.id = %device,
                    certificate.sha256 = request.certificate.fingerprint(),
                    "Enrollment {device} is known by a new certificate"
                );
                Ok(Some(binding))
            }
            Associated::Refused { reason } => {
                warn!(request.id = request.id, enrollment.id = %device, "The new certificate of enrollment {device} is not taken: {reason}");
                Ok(None)
            }
        }
    }

    /// Refuses, unless mismatches are only watched.
    fn mismatch(&self, request: &DeviceRequest, device: &EnrollmentId, reason: &str) -> Result<(), Refusal> {
        if !self.rules.only_warn {
            return Err(refused(request, device, reason));
        }
        metrics::counter!("wasmdm_binding_warnings_total").increment(1);
        warn!(
            request.id = request.id,
            enrollment.id = %device,
            certificate.sha256 = request.certificate.fingerprint(),
            "Enrollment {device} is served, but would be refused: {reason}"
        );
        Ok(())
    }

    /// Bindings are only watched: the message is of the enrollment that it names.
    async fn trusted(&self, request: &mut DeviceRequest, device: &EnrollmentId) -> Result<(), Refusal> {
        if let Some(record) = self.storage.enrollment(device).await? {
            request.tenant = record.tenant;
        }
        Ok(())
    }
}

/// Whether the certificate itself says that it is this enrollment's: by its UDID or `EnrollmentID`, or by its serial number.
pub(crate) fn names(certificate: &wasmdm_protocol::certificate::Certificate, record: &EnrollmentRecord) -> bool {
    let serial_number = record.facts.get("serial_number").and_then(serde_json::Value::as_str);
    certificate.names_one_of([record.id.as_str()].into_iter().chain(serial_number))
}

/// What a device may say with the certificate that a renewal is about to end: what its session goes on with, and what tells that it stays with
/// that certificate, or leaves. Tokens are for the new one.
fn is_for_outgoing(message: &Message) -> bool {
    match message {
        Message::Report(_) | Message::Malformed(_) | Message::Oversized(_) => true,
        Message::CheckIn(check_in) => matches!(check_in.check_in, CheckIn::TokenUpdate(_) | CheckIn::CheckOut),
    }
}

impl<S: Service> Service for CertificateBinding<S> {
    fn handle(&self, mut request: DeviceRequest, mut message: Message) -> BoxFuture<'_, Result<Reply, Refusal>> {
        Box::pin(async move {
            self.check(&mut request, &mut message).await?;
            self.inner.handle(request, message).await
        })
    }
}

fn claimed(message: &Message) -> EnrollmentId {
    let of_claim = |claim: Option<&Enrollment>| claim.map_or_else(|| EnrollmentId::new("?"), |claim| claim.device().clone());
    match message {
        Message::CheckIn(check_in) => check_in.enrollment.device().clone(),
        Message::Report(report) => report.enrollment.device().clone(),
        Message::Malformed(report) => of_claim(report.enrollment.as_ref()),
        Message::Oversized(enrollment) => of_claim(enrollment.as_ref()),
    }
}

/// A certificate that does not speak for the enrollment: 400, a line of the log and a count.
pub(crate) fn refused(request: &DeviceRequest, device: &EnrollmentId, reason: &str) -> Refusal {
    metrics::counter!("wasmdm_binding_refusals_total").increment(1);
    warn!(
        request.id = request.id,
        enrollment.id = %device,
        certificate.sha256 = request.certificate.fingerprint(),
        "Enrollment {device} was refused: {reason}"
    );
    Refusal::bad_request(format!("enrollment {device}: {reason}"))
}
