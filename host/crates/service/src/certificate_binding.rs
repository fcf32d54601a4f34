//! Is this the enrollment's certificate?
//!
//! A chain that verifies says only that some authority of ours issued the certificate. Whose it is was written by the Authenticate that
//! brought it, and every later message must come with it (edge cases 20 and 23). This layer only checks; the binding itself is written
//! in Authenticate's own transaction.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use tracing::warn;
use wasmdm_protocol::checkin::CheckIn;
use wasmdm_protocol::enrollment::{Enrollment, EnrollmentId};
use wasmdm_storage::Storage;

use crate::Service;
use crate::message::{DeviceRequest, Message};
use crate::reply::{Refusal, Reply};

/// Lets a message through to `inner` if its certificate is bound to the enrollment that it names.
#[derive(Debug)]
pub struct CertificateBinding<S> {
    storage: Storage,
    inner: Arc<S>,
}

impl<S: Service> CertificateBinding<S> {
    /// A layer around `inner`.
    pub fn new(storage: Storage, inner: Arc<S>) -> Self {
        Self { storage, inner }
    }

    async fn check(&self, request: &mut DeviceRequest, message: &mut Message) -> Result<(), Refusal> {
        let bound = self.storage.certificate_binding(&request.certificate.identity).await?;
        match message {
            Message::CheckIn(check_in) if matches!(check_in.check_in, CheckIn::Authenticate(_)) => {
                let device = check_in.enrollment.device();
                if let CheckIn::Authenticate(authenticate) = &check_in.check_in
                    && bound.is_none()
                {
                    // Before there is a binding, the owner of the topic is the tenant.
                    request.tenant = self.storage.topic_owner(&authenticate.topic).await?.unwrap_or_default();
                }
                if let Some(binding) = bound {
                    // The storage decides again when it writes; here it only spares the plugins.
                    if binding.enrollment != *device {
                        return Err(refused(request, device, "its certificate is bound to another enrollment"));
                    }
                    request.tenant = binding.tenant;
                }
                Ok(())
            }
            _ => {
                let Some(binding) = bound else {
                    return Err(refused(request, &claimed(message), "its certificate is bound to no enrollment"));
                };
                if binding.replaced {
                    return Err(refused(request, &binding.enrollment, "its certificate was replaced by a later Authenticate"));
                }
                match message {
                    Message::Malformed(report) => {
                        // The report is the certificate's enrollment's; what its bytes claim must agree or be absent.
                        match &report.enrollment {
                            Some(claim) if *claim.device() != binding.enrollment => {
                                return Err(refused(request, claim.device(), "its certificate is bound to another enrollment"));
                            }
                            Some(_) => {}
                            None => {
                                let known = self.storage.enrollment(&binding.enrollment).await?;
                                report.enrollment = known.map(|record| Enrollment { id: record.id, parent: record.parent, kind: record.kind });
                            }
                        }
                    }
                    Message::CheckIn(_) | Message::Report(_) => {
                        let device = claimed(message);
                        if device != binding.enrollment {
                            return Err(refused(request, &device, "its certificate is bound to another enrollment"));
                        }
                    }
                }
                request.tenant = binding.tenant;
                Ok(())
            }
        }
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
    match message {
        Message::CheckIn(check_in) => check_in.enrollment.device().clone(),
        Message::Report(report) => report.enrollment.device().clone(),
        Message::Malformed(report) => report.enrollment.as_ref().map_or_else(|| EnrollmentId::new("?"), |claim| claim.device().clone()),
    }
}

fn refused(request: &DeviceRequest, device: &EnrollmentId, reason: &str) -> Refusal {
    metrics::counter!("wasmdm_binding_refusals_total").increment(1);
    warn!(
        request.id = request.id,
        enrollment.id = %device,
        certificate.sha256 = request.certificate.fingerprint(),
        "Enrollment {device} was refused: {reason}"
    );
    Refusal::bad_request(format!("enrollment {device}: {reason}"))
}
