//! The rule of each message.

mod authenticate;
mod bootstrap_token;
mod check_out;
mod declarative_management;
mod get_token;
mod report;
mod return_to_service;
mod token_update;
mod user_authenticate;
mod user_standing;

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use moka::sync::Cache;
use wasmdm_protocol::checkin::{CheckIn, CheckInMessage};
use wasmdm_protocol::enrollment::EnrollmentId;
use wasmdm_protocol::report::{Report, Status};
use wasmdm_protocol::time::Timestamp;
use wasmdm_storage::Storage;
use wasmdm_storage::device_messages::DeviceMessage;
use wasmdm_storage::events::CheckInHeard;

use crate::Service;
use crate::clock::Clock;
use crate::declarative_management::DeclarativeManagement;
use crate::enrollment_policy::EnrollmentPolicy;
use crate::in_flight::InFlight;
use crate::message::{DeviceRequest, Message};
use crate::reply::{Refusal, Reply};
use crate::return_to_service::ReturnToService;
use crate::token_source::TokenSource;
use crate::user_authentication::UserAuthentication;

/// Hears of Idle polls, which leave no trace in the database.
pub trait PollListener: std::fmt::Debug + Send + Sync + 'static {
    /// Whether it wants to hear of one of that many bytes.
    fn listens(&self, length: usize) -> bool;
    /// Must not wait: what it cannot take is lost.
    fn polled(&self, message: DeviceMessage, at: Timestamp);
}

/// Which certificate a known device may come back with, outside of a renewal (edge case 19).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReEnroll {
    /// Any that an authority of the operator's issued, as in NanoMDM. It is always told by an event and a row of the audit.
    #[default]
    Allow,
    /// The one that it has, or one that names it: its UDID, `EnrollmentID` or serial number. In a renewal too.
    SameIdentity,
    /// Only if a plugin says `allow`; that none objects is not enough.
    Policy,
}

/// What a server may be set up with, or not.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Who answers declarative management; without it, 404 (and a status report is taken and dropped).
    pub declarative_management: Option<Arc<dyn DeclarativeManagement>>,
    /// Who hears of polls.
    pub poll_listener: Option<Arc<dyn PollListener>>,
    /// Who makes tokens for services; without it, 400.
    pub token_source: Option<Arc<dyn TokenSource>>,
    /// Who says how a device returns to service; without it, 400.
    pub return_to_service: Option<Arc<dyn ReturnToService>>,
    /// Who authenticates users of Macs.
    pub user_authentication: Option<Arc<dyn UserAuthentication>>,
    /// Where nobody authenticates users of Macs, they are managed without a proof of who they are; otherwise they are declined.
    pub zero_length_digest_challenge: bool,
    /// What a known device may come back with.
    pub re_enroll: ReEnroll,
    /// Bindings of certificates are only watched ([`crate::certificate_binding::BindingRules::only_warn`]): a device may enroll with the
    /// certificate of another.
    pub certificates_may_be_shared: bool,
}

/// The innermost service. Clones share all state.
#[derive(Debug, Clone)]
pub struct Core {
    storage: Storage,
    clock: Arc<dyn Clock>,
    policy: Arc<dyn EnrollmentPolicy>,
    in_flight: InFlight,
    options: Options,
    /// Enrollments of which it was written down a moment ago that they were refused with a new certificate.
    refused_takeovers: Cache<EnrollmentId, ()>,
    /// How often the report of a command was too large, by enrollment and `CommandUUID`. Forgotten at a restart: it only takes longer then.
    oversized: Cache<(EnrollmentId, String), u32>,
}

/// Refusals of the same device are written down once in this time, for so many devices.
const TAKEOVER_ROWS_EVERY: Duration = Duration::from_mins(1);
const TAKEOVER_ROWS_OF: u64 = 10_000;
/// For how many commands it is remembered that their report was too large, and for how long after the last one.
const OVERSIZED_OF: u64 = 10_000;
const OVERSIZED_FOR: Duration = Duration::from_hours(24 * 7);

impl Core {
    /// A service over `storage` that asks `policy` before it stores an Authenticate.
    pub fn new(storage: Storage, clock: Arc<dyn Clock>, policy: Arc<dyn EnrollmentPolicy>, options: Options) -> Self {
        let refused_takeovers = Cache::builder().max_capacity(TAKEOVER_ROWS_OF).time_to_live(TAKEOVER_ROWS_EVERY).build();
        let oversized = Cache::builder().max_capacity(OVERSIZED_OF).time_to_idle(OVERSIZED_FOR).build();
        Self { storage, clock, policy, in_flight: InFlight::default(), options, refused_takeovers, oversized }
    }

    /// Whether the identity that the request came with has expired. The operator may let such devices go on for a while, but then only to get
    /// a new one (edge case 22).
    fn is_expired(&self, request: &DeviceRequest) -> bool {
        request.certificate.not_after < self.clock.now()
    }

    async fn check_in(&self, request: DeviceRequest, message: CheckInMessage) -> Result<Reply, Refusal> {
        if self.is_expired(&request) && !matches!(message.check_in, CheckIn::CheckOut) {
            return Err(Refusal::bad_request(format!(
                "enrollment {}: its identity has expired, so it may poll for a command that renews it, and nothing else",
                message.enrollment.id
            )));
        }
        if let (Some(device), CheckIn::TokenUpdate(_) | CheckIn::DeclarativeManagement(_) | CheckIn::GetToken(_)) =
            (&message.enrollment.parent, &message.check_in)
        {
            self.admit_user(&request, device, &message.enrollment.id, Some(&message.document)).await?;
        }
        match &message.check_in {
            // Their events commit with what they change.
            CheckIn::Authenticate(_) | CheckIn::TokenUpdate(_) | CheckIn::CheckOut | CheckIn::SetBootstrapToken(_) => {}
            CheckIn::UserAuthenticate(_)
            | CheckIn::GetBootstrapToken
            | CheckIn::DeclarativeManagement(_)
            | CheckIn::GetToken(_)
            | CheckIn::ReturnToService => {
                let heard = CheckInHeard {
                    tenant: request.tenant.clone(),
                    enrollment: message.enrollment.clone(),
                    topic: format!("checkin.{}", message.check_in.message_type()),
                    document: message.document.clone(),
                    now: self.clock.now(),
                };
                self.storage.check_in_heard(heard).await?;
            }
        }
        match message.check_in.clone() {
            CheckIn::Authenticate(authenticate) => self.authenticate(request, message, authenticate).await,
            CheckIn::TokenUpdate(update) => self.token_update(request, message, update).await,
            CheckIn::CheckOut => self.check_out(request, message).await,
            CheckIn::SetBootstrapToken(token) => self.set_bootstrap_token(request, message, token).await,
            CheckIn::GetBootstrapToken => self.bootstrap_token(request, message).await,
            CheckIn::UserAuthenticate(user) => self.user_authenticate(request, message, user).await,
            CheckIn::DeclarativeManagement(asked) => self.declarative_management(request, message, asked).await,
            CheckIn::GetToken(asked) => self.get_token(request, message, asked).await,
            CheckIn::ReturnToService => self.return_to_service(request, message).await,
        }
    }
}

impl Core {
    async fn answer(&self, request: DeviceRequest, message: Message) -> Result<Reply, Refusal> {
        match message {
            Message::CheckIn(message) => self.check_in(request, *message).await,
            Message::Report(report) => self.report(request, *report).await,
            Message::Malformed(report) => self.malformed_report(request, *report).await,
            Message::Oversized(device) => self.oversized_report(request, device).await,
        }
    }
}

impl Service for Core {
    fn handle(&self, request: DeviceRequest, message: Message) -> BoxFuture<'_, Result<Reply, Refusal>> {
        Box::pin(async move {
            let on_behalf_of = match &message {
                Message::CheckIn(check_in) => {
                    let heard = || check_in_message(&request, check_in);
                    self.storage.on_behalf_of(&request.tenant, check_in.check_in.message_type(), None, heard)
                }
                Message::Report(report) if report.status == Status::Idle => {
                    // A poll stays free of writes.
                    if let Some(listener) = self.options.poll_listener.as_ref().filter(|listener| listener.listens(report.raw.len())) {
                        listener.polled(report_message(&request, report), self.clock.now());
                    }
                    None
                }
                Message::Report(report) => {
                    let heard = || report_message(&request, report);
                    self.storage.on_behalf_of(&request.tenant, CONNECT, Some(report.status.as_str()), heard)
                }
                // It says nothing that could be believed, so nobody is told.
                Message::Malformed(_) | Message::Oversized(_) => None,
            };
            match on_behalf_of {
                Some(storage) => Self { storage, ..self.clone() }.answer(request, message).await,
                None => self.answer(request, message).await,
            }
        })
    }
}

/// NanoMDM's name of reports and polls.
const CONNECT: &str = "Connect";

fn check_in_message(request: &DeviceRequest, check_in: &CheckInMessage) -> DeviceMessage {
    DeviceMessage {
        enrollment: check_in.enrollment.clone(),
        status: None,
        command_uuid: None,
        document: check_in.document.clone(),
        is_cleaned: check_in.is_cleaned,
        raw: check_in.raw.clone(),
        url_params: request.url_params.clone(),
    }
}

fn report_message(request: &DeviceRequest, report: &Report) -> DeviceMessage {
    DeviceMessage {
        enrollment: report.enrollment.clone(),
        status: Some(report.status.as_str().to_owned()),
        command_uuid: report.command_uuid.clone(),
        document: report.document.clone(),
        is_cleaned: false,
        raw: report.raw.clone(),
        url_params: request.url_params.clone(),
    }
}
