//! What became of a push, and what follows from it.

use std::fmt;
use std::time::Duration;

use a2::ErrorReason;
use serde::Deserialize;
use serde::de::IntoDeserializer as _;
use serde::de::value::{Error as ValueError, StrDeserializer};
use uuid::Uuid;
use wasmdm_protocol::time::Timestamp;

use crate::notification::Unsendable;

/// The longest reason that is kept; Apple's longest has 27 letters.
const LONGEST_REASON: usize = 100;
/// `Retry-After` beyond this is not believed: a push that waits for weeks is a push that never comes.
const LONGEST_RETRY_AFTER: Duration = Duration::from_hours(24);
/// How long to wait where a device was woken too often.
const TOO_MANY_REQUESTS: Duration = Duration::from_mins(1);
/// How long to wait where Apple has trouble of its own.
const TROUBLE: Duration = Duration::from_secs(5);

/// What became of a push.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Apple took it. Whether the device comes is another matter.
    Accepted {
        /// The push's id in Apple's words.
        apns_id: Uuid,
    },
    /// The device is gone from this topic: stop pushing to this token, unless it was told to us anew after `at`.
    Unregistered {
        /// When Apple last found the token invalid. The caller compares it with the time of the last `TokenUpdate`.
        at: Option<Timestamp>,
    },
    /// Apple answered, and said no.
    Rejected(Rejection),
    /// There was no answer, or the push never left.
    Failed(Failure),
}

/// An answer other than 200 and 410.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// HTTP status.
    pub status: u16,
    /// Apple's code, such as `BadDeviceToken`: as it came, at most 100 characters, control characters escaped; empty if there was none.
    pub reason: String,
    /// `Retry-After`, where the answer had one.
    pub retry_after: Option<Duration>,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// No connection to the service; nothing was sent.
    #[error("the push service at {endpoint} cannot be reached: {problem}")]
    Unreachable {
        /// Host and port.
        endpoint: String,
        /// Resolving, connecting or TLS, in the library's words.
        problem: String,
        /// When the next connection is tried.
        retry_after: Duration,
    },
    /// The service ended the connection because of the client certificate; nothing was sent.
    #[error("the push service refuses the push certificate: {problem}")]
    CertificateRefused {
        /// The TLS alert.
        problem: String,
        /// When the next connection is tried.
        retry_after: Duration,
    },
    /// The connection broke after the push was sent. The device may have been woken.
    #[error("the connection broke before the answer: {problem}")]
    Lost {
        /// The cause.
        problem: String,
    },
    /// No answer within the time.
    #[error("no answer within {limit:?}")]
    TimedOut {
        /// How long was waited.
        limit: Duration,
        /// Whether the push had been sent. Then the device may have been woken.
        sent: bool,
    },
    /// The service kept refusing to process it, or had just begun to shut down; the device was not woken.
    #[error("the push service takes no pushes at the moment: {problem}")]
    Refused {
        /// What it said.
        problem: String,
        /// When to try again.
        retry_after: Duration,
    },
    /// As many pushes as allowed are waiting already.
    #[error("{waiting} pushes of this topic are waiting already")]
    Overloaded {
        /// How many.
        waiting: usize,
    },
    /// This push cannot be written down as a request.
    #[error(transparent)]
    Unsendable(#[from] Unsendable),
    /// The client is shutting down.
    #[error("the server is shutting down")]
    Closed,
}

/// Whose fault it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// The token: the device has another, has left, or belongs to another topic or environment.
    Device,
    /// The push certificate: expired, of another topic or environment, or not accepted.
    Certificate,
    /// Apple, or the network between.
    Service,
    /// This server: the request was wrong, or there were too many at once.
    Server,
}

/// Whether to push again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// After this time, and longer each time it fails again.
    After(Duration),
    /// Once the device has sent a `TokenUpdate`.
    WithNewToken,
    /// Once the operator has stored a new certificate.
    WithNewCertificate,
    /// The same push would fail the same way.
    Never,
}

impl Outcome {
    /// Whether Apple took it.
    pub const fn is_accepted(&self) -> bool {
        matches!(self, Self::Accepted { .. })
    }

    /// Whether the device may have been woken: surely if accepted, perhaps if the answer was lost.
    pub const fn may_have_woken(&self) -> bool {
        matches!(self, Self::Accepted { .. } | Self::Failed(Failure::Lost { .. } | Failure::TimedOut { sent: true, .. }))
    }

    /// Whose fault it is; `None` if it is accepted.
    pub fn fault(&self) -> Option<Fault> {
        match self {
            Self::Accepted { .. } => None,
            Self::Unregistered { .. } => Some(Fault::Device),
            Self::Rejected(rejection) => Some(rejection.fault()),
            Self::Failed(failure) => Some(failure.fault()),
        }
    }

    /// Whether to push again; `None` if it is accepted.
    pub fn retry(&self) -> Option<Retry> {
        match self {
            Self::Accepted { .. } => None,
            Self::Unregistered { .. } => Some(Retry::WithNewToken),
            Self::Rejected(rejection) => Some(rejection.retry()),
            Self::Failed(failure) => Some(failure.retry()),
        }
    }

    /// The sentence for an operator without what differs from device to device, so that those that fail for one reason can be counted.
    pub fn reason(&self) -> String {
        match self {
            Self::Unregistered { .. } => Self::Unregistered { at: None }.to_string(),
            Self::Failed(Failure::Overloaded { .. }) => "as many pushes of this topic as are allowed are waiting already".to_owned(),
            other => other.to_string(),
        }
    }

    /// One word, for metrics and events: Apple's reason, or ours. A reason that is not known is `unknown` here, so that the words are
    /// finitely many.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Accepted { .. } => "accepted",
            Self::Unregistered { .. } => "Unregistered",
            Self::Rejected(rejection) => rejection.code(),
            Self::Failed(failure) => failure.code(),
        }
    }
}

/// The sentence for an operator.
impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accepted { apns_id } => write!(f, "accepted as {apns_id}"),
            Self::Unregistered { at: Some(at) } => write!(f, "Unregistered: the device's token has been invalid since {at}"),
            Self::Unregistered { at: None } => f.write_str("Unregistered: the device's token is invalid"),
            Self::Rejected(rejection) => rejection.fmt(f),
            Self::Failed(failure) => failure.fmt(f),
        }
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.known(), self.reason.as_str()) {
            (Some(known), reason) => write!(f, "{reason}: {known}"),
            (None, "") => write!(f, "HTTP status {} without a reason", self.status),
            (None, reason) => write!(f, "{reason} (HTTP status {})", self.status),
        }
    }
}

impl Rejection {
    pub(crate) fn new(status: u16, reason: &str, retry_after: Option<&str>) -> Self {
        // Seconds only: Apple documents no such header, and a date would need a clock.
        let retry_after = retry_after.and_then(|text| text.trim().parse().ok()).map(|seconds| Duration::from_secs(seconds).min(LONGEST_RETRY_AFTER));
        let mut kept = String::new();
        for letter in reason.chars() {
            let plain = letter.is_ascii_graphic() || letter == ' ';
            let written = if plain { letter.to_string() } else { letter.escape_default().to_string() };
            if kept.len() + written.len() > LONGEST_REASON {
                break;
            }
            kept.push_str(&written);
        }
        Self { status, reason: kept, retry_after }
    }

    fn known(&self) -> Option<ErrorReason> {
        let code: StrDeserializer<'_, ValueError> = self.reason.as_str().into_deserializer();
        ErrorReason::deserialize(code).ok()
    }

    /// Whose fault it is: decided by the reason's code, and by the status only where the code says nothing.
    pub fn fault(&self) -> Fault {
        self.judge().1
    }

    /// Whether to push again.
    pub fn retry(&self) -> Retry {
        match self.judge().2 {
            Retry::After(usual) => Retry::After(self.retry_after.unwrap_or(usual)),
            other => other,
        }
    }

    fn code(&self) -> &'static str {
        self.judge().0
    }

    /// Whether the service said that it is going away.
    pub(crate) fn is_shutdown(&self) -> bool {
        self.status == 503 || matches!(self.known(), Some(ErrorReason::Shutdown | ErrorReason::ServiceUnavailable))
    }

    fn judge(&self) -> (&'static str, Fault, Retry) {
        const REQUEST: (Fault, Retry) = (Fault::Server, Retry::Never);
        const DEVICE: (Fault, Retry) = (Fault::Device, Retry::WithNewToken);
        const CERTIFICATE: (Fault, Retry) = (Fault::Certificate, Retry::WithNewCertificate);
        const SERVICE: (Fault, Retry) = (Fault::Service, Retry::After(TROUBLE));
        let (code, (fault, retry)) = match self.known() {
            Some(known) => match known {
                // Of another environment, or of another topic: the device's next TokenUpdate mends it, or a re-enrollment.
                ErrorReason::BadDeviceToken => ("BadDeviceToken", DEVICE),
                ErrorReason::DeviceTokenNotForTopic => ("DeviceTokenNotForTopic", DEVICE),
                // With another status than 410, which is an outcome of its own.
                ErrorReason::Unregistered => ("Unregistered", DEVICE),
                ErrorReason::TooManyRequests => ("TooManyRequests", (Fault::Device, Retry::After(TOO_MANY_REQUESTS))),
                ErrorReason::TopicDisallowed => ("TopicDisallowed", CERTIFICATE),
                ErrorReason::BadTopic => ("BadTopic", CERTIFICATE),
                ErrorReason::MissingTopic => ("MissingTopic", CERTIFICATE),
                ErrorReason::BadCertificate => ("BadCertificate", CERTIFICATE),
                ErrorReason::BadCertificateEnvironment => ("BadCertificateEnvironment", CERTIFICATE),
                ErrorReason::Forbidden => ("Forbidden", CERTIFICATE),
                // Apple speaks of provider tokens where it saw no certificate.
                ErrorReason::ExpiredProviderToken => ("ExpiredProviderToken", CERTIFICATE),
                ErrorReason::InvalidProviderToken => ("InvalidProviderToken", CERTIFICATE),
                ErrorReason::MissingProviderToken => ("MissingProviderToken", CERTIFICATE),
                ErrorReason::TooManyProviderTokenUpdates => ("TooManyProviderTokenUpdates", (Fault::Server, Retry::After(TOO_MANY_REQUESTS))),
                ErrorReason::IdleTimeout => ("IdleTimeout", SERVICE),
                ErrorReason::InternalServerError => ("InternalServerError", SERVICE),
                ErrorReason::ServiceUnavailable => ("ServiceUnavailable", SERVICE),
                ErrorReason::Shutdown => ("Shutdown", SERVICE),
                ErrorReason::BadCollapseId => ("BadCollapseId", REQUEST),
                ErrorReason::BadExpirationDate => ("BadExpirationDate", REQUEST),
                ErrorReason::BadMessageId => ("BadMessageId", REQUEST),
                ErrorReason::BadPriority => ("BadPriority", REQUEST),
                ErrorReason::DuplicateHeaders => ("DuplicateHeaders", REQUEST),
                ErrorReason::MissingDeviceToken => ("MissingDeviceToken", REQUEST),
                ErrorReason::PayloadEmpty => ("PayloadEmpty", REQUEST),
                ErrorReason::PayloadTooLarge => ("PayloadTooLarge", REQUEST),
                ErrorReason::BadPath => ("BadPath", REQUEST),
                ErrorReason::MethodNotAllowed => ("MethodNotAllowed", REQUEST),
            },
            // Apple has more reasons than the library.
            None => match (self.reason.as_str(), self.status) {
                ("ExpiredToken", _) => ("ExpiredToken", DEVICE),
                ("InvalidPushType", _) => ("InvalidPushType", REQUEST),
                ("BadEnvironmentKeyInToken", _) => ("BadEnvironmentKeyInToken", CERTIFICATE),
                ("UnrelatedKeyIdInToken", _) => ("UnrelatedKeyIdInToken", CERTIFICATE),
                (_, 410) => ("unknown", DEVICE),
                (_, 403) => ("unknown", CERTIFICATE),
                (_, 429) => ("unknown", (Fault::Server, Retry::After(TOO_MANY_REQUESTS))),
                (_, 500..) => ("unknown", SERVICE),
                _ => ("unknown", REQUEST),
            },
        };
        (code, fault, retry)
    }
}

impl Failure {
    /// Whose fault it is.
    pub const fn fault(&self) -> Fault {
        match self {
            Self::CertificateRefused { .. } => Fault::Certificate,
            Self::Unreachable { .. } | Self::Lost { .. } | Self::TimedOut { .. } | Self::Refused { .. } => Fault::Service,
            Self::Overloaded { .. } | Self::Unsendable(_) | Self::Closed => Fault::Server,
        }
    }

    /// Whether to push again.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Unreachable { retry_after, .. } | Self::Refused { retry_after, .. } => Retry::After(*retry_after),
            Self::CertificateRefused { .. } => Retry::WithNewCertificate,
            Self::Lost { .. } | Self::Closed => Retry::After(Duration::ZERO),
            Self::TimedOut { .. } | Self::Overloaded { .. } => Retry::After(TROUBLE),
            Self::Unsendable(_) => Retry::Never,
        }
    }

    /// The same, with another time to try again.
    pub(crate) fn with_retry_after(mut self, pause: Duration) -> Self {
        if let Self::Unreachable { retry_after, .. } | Self::CertificateRefused { retry_after, .. } | Self::Refused { retry_after, .. } = &mut self {
            *retry_after = pause;
        }
        self
    }

    const fn code(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "unreachable",
            Self::CertificateRefused { .. } => "certificate-refused",
            Self::Lost { .. } => "lost",
            Self::TimedOut { .. } => "timed-out",
            Self::Refused { .. } => "refused",
            Self::Overloaded { .. } => "overloaded",
            Self::Unsendable(_) => "unsendable",
            Self::Closed => "closed",
        }
    }
}

/// The body of an answer other than 200.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct ErrorBody {
    #[serde(default)]
    reason: String,
    /// Milliseconds since the Unix epoch, with 410.
    #[serde(default)]
    timestamp: Option<i64>,
}

/// The reason with which a connection was ended.
pub(crate) fn announced_reason(data: &str) -> Option<Rejection> {
    serde_json::from_str::<ErrorBody>(data).ok().map(|body| Rejection::new(0, &body.reason, None))
}

/// What an answer means.
pub(crate) fn judge(status: u16, sent: Uuid, headers: &http::HeaderMap, body: &[u8]) -> Outcome {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    if status == 200 {
        return Outcome::Accepted { apns_id: header("apns-id").and_then(|id| id.parse().ok()).unwrap_or(sent) };
    }
    // What is no JSON is somebody's who is not Apple: the status still counts.
    let body: ErrorBody = serde_json::from_slice(body).unwrap_or_default();
    let rejection = Rejection::new(status, &body.reason, header("retry-after"));
    match (status, rejection.known()) {
        // 410 also stands for `ExpiredToken`.
        (410, _) => Outcome::Unregistered { at: body.timestamp.map(Timestamp::from_millis) },
        _ => Outcome::Rejected(rejection),
    }
}
