//! What the outside hands in.

use std::collections::BTreeMap;

use wasmdm_protocol::certificate::Certificate;
use wasmdm_protocol::checkin::CheckInMessage;
use wasmdm_protocol::enrollment::{Enrollment, EnrollmentId, TenantId};
use wasmdm_protocol::report::{MalformedReport, Report};

/// Who sent a message, and how.
#[derive(Debug, Clone)]
pub struct DeviceRequest {
    /// The same in the log, the audit and plugins' call facts.
    pub id: String,
    /// The identity, verified up to a trust anchor.
    pub certificate: Certificate,
    /// The query of the URL, first value per key.
    pub url_params: BTreeMap<String, String>,
    /// The owner of the certificate's binding; set by [`crate::certificate_binding::CertificateBinding`].
    pub tenant: TenantId,
}

/// A parsed message.
#[derive(Debug, Clone)]
pub enum Message {
    /// A check-in.
    CheckIn(Box<CheckInMessage>),
    /// A command report or an Idle poll.
    Report(Box<Report>),
    /// A report that could not be parsed; it must not wedge the queue (edge case 4).
    Malformed(Box<MalformedReport>),
    /// A report that was too large to be kept (edge case 5), from whom the certificate says: the binding layer puts the device in.
    Oversized(Option<Enrollment>),
}

impl Message {
    /// Whom it says it is from; that the certificate agrees is another question.
    pub fn enrollment(&self) -> Option<&EnrollmentId> {
        match self {
            Self::CheckIn(check_in) => Some(&check_in.enrollment.id),
            Self::Report(report) => Some(&report.enrollment.id),
            Self::Malformed(report) => report.enrollment.as_ref().map(|enrollment| &enrollment.id),
            Self::Oversized(enrollment) => enrollment.as_ref().map(|enrollment| &enrollment.id),
        }
    }
}
