//! A server without a network: plugins, a database, a clock that a test moves.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use wasmdm_plugin_runtime::answers::PluginAnswers;
use wasmdm_plugin_runtime::call::{Called, Request};
use wasmdm_plugin_runtime::effective::{Effective, EnqueueGrant, EnrollmentsGrant, KvGrant, Settings};
use wasmdm_plugin_runtime::egress;
use wasmdm_plugin_runtime::engine::Engines;
use wasmdm_plugin_runtime::enrollment_policy::PluginEnrollmentPolicy;
use wasmdm_plugin_runtime::events::PluginSubscriber;
use wasmdm_plugin_runtime::plugin::{LinkError, LinkedPlugin, PluginIdentity, link};
use wasmdm_plugin_runtime::registry::{CurrentRegistry, Entry, Registry};
use wasmdm_plugin_runtime::runtime::{Runtime, Services};
use wasmdm_protocol::certificate::Certificate;
use wasmdm_protocol::enrollment::{DeviceFacts, Enrollment, EnrollmentId, EnrollmentKind, TenantId};
use wasmdm_protocol::plist;
use wasmdm_protocol::time::Timestamp;
use wasmdm_service::clock::Clock;
use wasmdm_service::enrollment_policy::{Candidate, EnrollmentPolicy, PolicyAnswer};
use wasmdm_service::subscriber::{Delivered, Subscriber};
use wasmdm_storage::enrollments::Authenticate;
use wasmdm_storage::events::Event;
use wasmdm_storage::outbox::{Delivery, Lease};
use wasmdm_storage::{OpenOptions, Storage};
use wasmdm_testkit::clock::ManualClock;
use wasmtime::component::Component;

/// Shared by all tests: compiling is what takes time.
static ENGINES: LazyLock<Engines> = LazyLock::new(|| Engines::new().unwrap());
static COMPONENTS: LazyLock<Mutex<HashMap<String, Component>>> = LazyLock::new(Mutex::default);

pub(crate) fn component(guest: &str) -> Component {
    let mut components = COMPONENTS.lock().unwrap();
    components.entry(guest.to_owned()).or_insert_with(|| ENGINES.compile(&wasmdm_testkit::guests::build(guest)).unwrap()).clone()
}

pub(crate) struct Server {
    pub(crate) storage: Storage,
    pub(crate) clock: ManualClock,
    pub(crate) runtime: Arc<Runtime>,
    pub(crate) registry: CurrentRegistry,
    pub(crate) policy: PluginEnrollmentPolicy,
    pub(crate) answers: PluginAnswers,
    pub(crate) subscriber: PluginSubscriber,
    _directory: tempfile::TempDir,
}

impl Server {
    pub(crate) async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let clock = ManualClock::new(Timestamp::from_millis(1_700_000_000_000));
        let url = format!("sqlite://{}", directory.path().join("wasmdm.sqlite").display());
        let storage = Storage::open(OpenOptions { url, now: clock.now() }).await.unwrap();
        let services = Services {
            storage: Some(storage.clone()),
            clock: Arc::new(clock.clone()),
            egress: egress::Client::new().unwrap(),
            server_version: String::from("0.1.0-test"),
        };
        let runtime = Runtime::new(ENGINES.clone(), services).unwrap();
        let registry = CurrentRegistry::default();
        Self {
            policy: PluginEnrollmentPolicy::new(registry.clone(), Arc::new(clock.clone())),
            answers: PluginAnswers::new(registry.clone(), storage.clone(), Arc::new(clock.clone())),
            subscriber: PluginSubscriber::new(registry.clone(), Arc::new(clock.clone())),
            storage,
            clock,
            runtime,
            registry,
            _directory: directory,
        }
    }

    pub(crate) fn link(&self, name: &str, guest: &str, effective: Effective) -> Result<Arc<LinkedPlugin>, LinkError> {
        let identity = PluginIdentity { name: name.to_owned(), version: String::from("1.2.3"), digest: "ab".repeat(32), generation: 7 };
        link(&self.runtime, &component(guest), identity, effective).map(Arc::new)
    }

    /// The guest that does what its configuration says.
    pub(crate) fn misbehaving(&self, behave: &str, adjust: impl FnOnce(&mut Effective)) -> Arc<LinkedPlugin> {
        self.named("misbehaving", &json!({ "behave": behave }), adjust)
    }

    pub(crate) fn named(&self, name: &str, config: &Value, adjust: impl FnOnce(&mut Effective)) -> Arc<LinkedPlugin> {
        let mut effective = granted(config);
        adjust(&mut effective);
        self.link(name, "misbehaving", effective).unwrap()
    }

    /// The guest that answers check-ins as its configuration says, tokens for these services.
    pub(crate) fn answering(&self, name: &str, behave: &str, services: &[&str], adjust: impl FnOnce(&mut Effective)) -> Arc<LinkedPlugin> {
        let mut effective = granted(&json!({ "behave": behave }));
        effective.token_services = services.iter().map(|service| (*service).to_owned()).collect();
        effective.settings.limits.wall.answer = Duration::from_secs(20);
        adjust(&mut effective);
        self.link(name, "answering", effective).unwrap()
    }

    pub(crate) fn activate(&self, plugins: impl IntoIterator<Item = Arc<LinkedPlugin>>) {
        self.registry.swap(Registry::new(plugins.into_iter().map(Entry::Active)));
    }

    /// One plugin's own answer.
    pub(crate) async fn call(&self, plugin: &LinkedPlugin, id: &str) -> Called {
        let candidate = candidate(id);
        plugin.call(&TenantId::default(), Request::Decide { candidate: &candidate, within: Duration::from_mins(1) }).await
    }

    /// The chain's answer.
    pub(crate) async fn decide(&self, id: &str) -> PolicyAnswer {
        self.policy.decide(&candidate(id)).await
    }

    pub(crate) async fn enroll(&self, id: &str) {
        let candidate = candidate(id);
        let message = Authenticate {
            tenant: candidate.tenant,
            enrollment: candidate.enrollment,
            topic: candidate.topic,
            facts: candidate.facts,
            raw: Bytes::from_static(b"raw"),
            document: candidate.message,
            certificate: candidate.certificate,
            may_change_certificate: true,
            may_renew: false,
            may_share_certificate: false,
            url_params: candidate.url_params,
            tags: Vec::new(),
            quarantined_by: None,
            decisions: json!([]),
            effects: Vec::new(),
            audit: Vec::new(),
            now: self.clock.now(),
        };
        self.storage.authenticate(message).await.unwrap();
    }

    pub(crate) async fn event(&self, topic: &str, id: &str) -> Event {
        let who = self.storage.enrollment(&EnrollmentId::new(id)).await.unwrap();
        Event {
            id: String::from("EVENT"),
            tenant: TenantId::default(),
            topic: topic.to_owned(),
            at: self.clock.now(),
            who,
            data: json!({ "message": { "MessageType": "TokenUpdate" } }),
            hops: 0,
        }
    }

    pub(crate) async fn deliver(&self, subscriber: &str, interface: &str, event: Event) -> Delivered {
        let lease = Lease {
            tenant: TenantId::default(),
            subscriber: subscriber.to_owned(),
            interface: interface.to_owned(),
            partition: String::from("D"),
            owner: String::from("test"),
            epoch: 1,
            until: self.clock.now().plus(Duration::from_mins(1)),
        };
        let delivery = Delivery { sequence: 1, event, attempt: 1, conflicts: 0, first_failed_at: None };
        self.subscriber.deliver(&lease, &delivery).await
    }
}

/// Everything but HTTP is granted.
pub(crate) fn granted(config: &Value) -> Effective {
    let mut settings = Settings { config: Arc::new(config.as_object().unwrap().clone().into()), ..Settings::default() };
    let capabilities = &mut settings.capabilities;
    capabilities.kv = Some(KvGrant::default());
    capabilities.enrollments = EnrollmentsGrant { read: true, tag: true, release: true };
    capabilities.commands.enqueue = EnqueueGrant::Types(["DeviceInformation".to_owned()].into());
    capabilities.commands.read = true;
    capabilities.commands.cancel = true;
    capabilities.push = true;
    capabilities.timers = true;
    // Longer than any scheduler of a busy machine keeps a task waiting: what ends the call is the limit under test.
    settings.limits.wall.decision = Duration::from_secs(20);
    Effective { settings, ..Effective::default() }
}

pub(crate) fn candidate(id: &str) -> Candidate {
    let mut message = plist::Dictionary::new();
    message.insert(String::from("MessageType"), plist::Value::from("Authenticate"));
    message.insert(String::from("UDID"), plist::Value::from(id));
    message.insert(String::from("UnlockToken"), plist::Value::Data(b"secret".to_vec()));
    Candidate {
        tenant: TenantId::default(),
        enrollment: Enrollment { id: EnrollmentId::new(id), parent: None, kind: EnrollmentKind::Device },
        topic: String::from("com.apple.mgmt.External.test"),
        facts: DeviceFacts { serial_number: Some(format!("SN-{id}")), ..DeviceFacts::default() },
        certificate: certificate(),
        url_params: BTreeMap::new(),
        message: plist::Value::Dictionary(message),
        re_enrolling: false,
        renewing: false,
        request_id: String::from("REQUEST"),
    }
}

/// Another one each time, signed by itself.
fn certificate() -> Certificate {
    let mut parameters = rcgen::CertificateParams::default();
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    parameters.distinguished_name.push(rcgen::DnType::CommonName, "device");
    let key = rcgen::KeyPair::generate().unwrap();
    Certificate::from_der(parameters.self_signed(&key).unwrap().der().to_vec()).unwrap()
}
