//! A service, its database, a clock that is moved by hand, and a scripted policy.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use wasmdm_protocol::certificate::Certificate;
use wasmdm_protocol::checkin::CheckInMessage;
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_protocol::report::Report;
use wasmdm_protocol::time::Timestamp;
use wasmdm_service::Service as _;
use wasmdm_service::certificate_binding::{BindingRules, CertificateBinding};
use wasmdm_service::core::{Core, Options};
use wasmdm_service::enrollment_policy::{Candidate, EnrollmentPolicy, PolicyAnswer, Verdict};
use wasmdm_service::message::{DeviceRequest, Message};
use wasmdm_service::reply::{Refusal, Reply};
use wasmdm_simulator::{Authority, Device};
use wasmdm_storage::{OpenOptions, Storage};
use wasmdm_testkit::clock::ManualClock;

pub(crate) struct Stage {
    pub(crate) storage: Storage,
    pub(crate) clock: ManualClock,
    pub(crate) policy: Arc<ScriptedPolicy>,
    pub(crate) authority: Authority,
    service: CertificateBinding<Core>,
    _home: tempfile::TempDir,
}

impl Stage {
    pub(crate) async fn new() -> Self {
        Self::with(Options::default(), BindingRules::default()).await
    }

    pub(crate) async fn with(options: Options, rules: BindingRules) -> Self {
        let home = tempfile::tempdir().unwrap();
        let clock = ManualClock::new(Timestamp::from_millis(1_800_000_000_000));
        let url = format!("sqlite://{}", home.path().join("test.sqlite").display());
        let storage = Storage::open(OpenOptions { url, now: wasmdm_service::clock::Clock::now(&clock) }).await.unwrap();
        let policy = Arc::new(ScriptedPolicy::default());
        let core = Core::new(storage.clone(), Arc::new(clock.clone()), Arc::clone(&policy) as Arc<dyn EnrollmentPolicy>, options);
        let service = CertificateBinding::new(storage.clone(), Arc::new(clock.clone()), rules, Arc::new(core));
        Self { storage, clock, policy, authority: Authority::new(1).unwrap(), service, _home: home }
    }

    pub(crate) fn device(&self, number: u64) -> Device {
        Device::new(&self.authority, number).unwrap()
    }

    /// Hands a message to the service as if it had come over HTTP with the device's certificate.
    pub(crate) async fn send(&self, device: &Device, message: wasmdm_simulator::Message) -> Result<Reply, Refusal> {
        let certificate = Certificate::from_der(device.identity.certificate.clone()).unwrap();
        let request = DeviceRequest { id: "request".to_owned(), certificate, url_params: BTreeMap::new(), tenant: TenantId::default() };
        let parsed = if message.is_check_in() {
            Message::CheckIn(Box::new(CheckInMessage::parse(message.body).unwrap()))
        } else {
            match Report::parse(message.body) {
                Ok(report) => Message::Report(Box::new(report)),
                Err(malformed) => Message::Malformed(malformed),
            }
        };
        self.service.handle(request, parsed).await
    }

    pub(crate) async fn enroll(&self, device: &Device) {
        for message in device.enrollment_messages().unwrap() {
            assert_eq!(self.send(device, message).await, Ok(Reply::Empty));
        }
    }
}

/// Answers with what was prepared, then allows; remembers whom it was asked about.
#[derive(Debug, Default)]
pub(crate) struct ScriptedPolicy {
    pub(crate) answers: Mutex<Vec<PolicyAnswer>>,
    pub(crate) asked: Mutex<Vec<Candidate>>,
}

impl EnrollmentPolicy for ScriptedPolicy {
    fn decide<'a>(&'a self, candidate: &'a Candidate) -> BoxFuture<'a, PolicyAnswer> {
        self.asked.lock().push(candidate.clone());
        let answer = self.answers.lock().pop().unwrap_or_else(|| answer(Verdict::Allow { tags: Vec::new() }));
        Box::pin(async move { answer })
    }
}

pub(crate) fn answer(verdict: Verdict) -> PolicyAnswer {
    PolicyAnswer { verdict, decisions: serde_json::json!([]), effects: Vec::new(), audit: Vec::new() }
}
