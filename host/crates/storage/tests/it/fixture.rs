//! A database for one test, and short ways to say what happens in it.

use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::LazyLock;
use std::time::Duration;
use tempfile::TempDir;
use wasmdm_protocol::certificate::Certificate;
use wasmdm_protocol::command::Command;
use wasmdm_protocol::enrollment::{DeviceFacts, Enrollment, EnrollmentId, EnrollmentKind, TenantId};
use wasmdm_protocol::plist::{Dictionary, Value};
use wasmdm_protocol::report::Status;
use wasmdm_protocol::time::Timestamp;
use wasmdm_storage::commands::{CommandOptions, Enqueue, EnqueueOutcome, NextCommand, Offer, Recorded, ReportInput};
use wasmdm_storage::effects::{Applied, DecisionEffects, KvQuota, PluginEffects};
use wasmdm_storage::enrollments::{Authenticate, Authenticated, TokenUpdate, TokenUpdated};
use wasmdm_storage::keyring::{Keyring, add_new_key};
use wasmdm_storage::outbox::{Claim, Completed, Completion, Delivery, Lease, Subscription};
use wasmdm_storage::{OpenOptions, Storage};

pub(crate) const TOPIC: &str = "com.apple.mgmt.External.test";

pub(crate) fn at(millis: i64) -> Timestamp {
    Timestamp::from_millis(1_000_000_000 + millis)
}

pub(crate) fn id(text: &str) -> EnrollmentId {
    EnrollmentId::new(text)
}

pub(crate) fn default() -> TenantId {
    TenantId::default()
}

pub(crate) struct Database {
    pub(crate) directory: TempDir,
    keyring: parking_lot::Mutex<Keyring>,
    storage: parking_lot::Mutex<Storage>,
}

impl Database {
    pub(crate) async fn sqlite() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let storage = parking_lot::Mutex::new(open(&directory, Keyring::default()).await);
        Self { directory, keyring: parking_lot::Mutex::default(), storage }
    }

    /// Whose values are sealed from the beginning.
    pub(crate) async fn sealed() -> Self {
        let directory = tempfile::tempdir().unwrap();
        add_new_key(&directory.path().join("keys"), "first").unwrap();
        let keyring = Keyring::from_file(&directory.path().join("keys")).unwrap();
        let storage = parking_lot::Mutex::new(open(&directory, keyring.clone()).await);
        Self { directory, keyring: parking_lot::Mutex::new(keyring), storage }
    }

    /// Puts a new key in front of those of the key file, and opens the database with it.
    pub(crate) async fn rotate(&self, name: &str) {
        let path = self.directory.path().join("keys");
        add_new_key(&path, name).unwrap();
        *self.keyring.lock() = Keyring::from_file(&path).unwrap();
        self.restart().await;
    }

    pub(crate) fn keyring(&self) -> Keyring {
        self.keyring.lock().clone()
    }

    pub(crate) fn url(&self) -> String {
        url(&self.directory)
    }

    pub(crate) fn storage(&self) -> Storage {
        self.storage.lock().clone()
    }

    /// Closes, and opens again.
    pub(crate) async fn restart(&self) {
        self.storage().close().await.unwrap();
        let storage = open(&self.directory, self.keyring()).await;
        *self.storage.lock() = storage;
    }

    pub(crate) async fn assert_sound(&self) {
        assert_eq!(self.storage().check().await.unwrap(), []);
    }

    pub(crate) async fn try_authenticate(&self, message: Authenticate) -> Authenticated {
        match self.storage().authenticate(message).await.unwrap() {
            Applied::Done(done) => done,
            Applied::Conflict(what) => panic!("{what}"),
        }
    }

    pub(crate) async fn authenticate(&self, device: &str, millis: i64) {
        let done = self.try_authenticate(authenticate(device, device, millis)).await;
        assert!(matches!(done, Authenticated::Stored { .. }), "{done:?}");
    }

    pub(crate) async fn token_update(&self, device: &str, millis: i64) {
        let done = self.storage().token_update(token_update(device, millis)).await.unwrap();
        assert!(matches!(done, TokenUpdated::Stored { .. }), "{done:?}");
    }

    /// Authenticate and the first TokenUpdate.
    pub(crate) async fn enroll(&self, device: &str) {
        self.authenticate(device, 0).await;
        self.token_update(device, 1).await;
    }

    pub(crate) async fn enroll_user(&self, device: &str, user: &str) -> EnrollmentId {
        let update = user_token_update(device, user, 2);
        let user = update.enrollment.id.clone();
        let done = self.storage().token_update(update).await.unwrap();
        assert!(matches!(done, TokenUpdated::Stored { .. }), "{done:?}");
        user
    }

    pub(crate) async fn queue_with(&self, target: &str, uuid: &str, request_type: &str, options: CommandOptions, origin: &str) -> EnqueueOutcome {
        let enqueue = Enqueue {
            tenant: default(),
            targets: vec![id(target)],
            command: command(uuid, request_type),
            options,
            origin: origin.to_owned(),
            now: at(10),
        };
        self.storage().enqueue(enqueue).await.unwrap().pop().unwrap()
    }

    pub(crate) async fn queue(&self, target: &str, uuid: &str) {
        let outcome = self.queue_with(target, uuid, "DeviceInformation", CommandOptions::default(), "api:test").await;
        assert_eq!(outcome, EnqueueOutcome::Queued { uuid: uuid.to_owned() });
    }

    pub(crate) async fn poll_at(&self, target: &str, reoffer_sent: bool, millis: i64) -> Option<NextCommand> {
        self.storage().poll(&default(), &id(target), Offer { reoffer_sent, only_renewals: false }, at(millis)).await.unwrap()
    }

    /// The UUID that an Idle gets.
    pub(crate) async fn poll(&self, target: &str) -> Option<String> {
        self.poll_at(target, true, 20).await.map(|next| next.uuid)
    }

    pub(crate) async fn report(&self, target: &str, uuid: &str, status: Status) -> (Recorded, Option<String>) {
        let (recorded, next) = self.storage().report(report(target, uuid, status), false).await.unwrap();
        (recorded, next.map(|next| next.uuid))
    }

    pub(crate) async fn state(&self, target: &str, uuid: &str) -> String {
        self.storage().command_status(&default(), &id(target), uuid).await.unwrap().unwrap().state
    }

    pub(crate) async fn subscribe(&self, subscriber: &str, topics: &[&str]) {
        self.subscribe_to(subscriber, "event-sink", topics, false).await;
    }

    pub(crate) async fn subscribe_to(&self, subscriber: &str, interface: &str, topics: &[&str], include_self: bool) {
        let topics = topics.iter().map(|&topic| topic.to_owned()).collect();
        let subscription = Subscription { interface: interface.to_owned(), topics, include_self };
        self.storage().set_subscriptions(&default(), subscriber, vec![subscription], at(0)).await.unwrap();
    }

    pub(crate) async fn claim(&self, millis: i64) -> Vec<Lease> {
        self.claim_up_to(100, 100, &[], millis).await
    }

    /// As [`Self::claim`], with at most `share` leases of each subscriber but for those in `shares`.
    pub(crate) async fn claim_up_to(&self, limit: u32, share: u32, shares: &[(&str, u32)], millis: i64) -> Vec<Lease> {
        let shares = shares.iter().map(|(subscriber, share)| ((TenantId::default(), (*subscriber).to_owned()), *share)).collect();
        let claim = Claim { owner: "worker".to_owned(), limit, share, shares, lease: Duration::from_secs(30), now: at(millis) };
        self.storage().claim(claim).await.unwrap()
    }

    /// The first waiting delivery, with the lease on its partition.
    pub(crate) async fn take(&self, millis: i64) -> (Lease, Delivery) {
        let lease = self.claim(millis).await.into_iter().next().expect("a partition is due");
        let delivery = self.storage().next_delivery(&lease, at(millis)).await.unwrap().expect("a delivery is due");
        (lease, delivery)
    }

    pub(crate) async fn done(&self, lease: &Lease, delivery: &Delivery, effects: Option<PluginEffects>) -> Completed {
        let completion = Completion::Done { effects: effects.map(Box::new), by: serde_json::json!({ "digest": "d1" }) };
        self.storage().complete(lease, delivery, completion, at(100)).await.unwrap()
    }

    /// Handles everything that is due, and answers (subscriber, topic, enrollment) in the order of each partition.
    pub(crate) async fn drain(&self, millis: i64) -> Vec<Delivery> {
        let mut drained = Vec::new();
        loop {
            let leases = self.claim(millis).await;
            if leases.is_empty() {
                return drained;
            }
            for lease in leases {
                while let Some(delivery) = self.storage().next_delivery(&lease, at(millis)).await.unwrap() {
                    assert!(matches!(self.done(&lease, &delivery, None).await, Completed::Stored { .. }));
                    drained.push(delivery);
                }
                self.storage().release(&lease, at(millis)).await.unwrap();
            }
        }
    }

    pub(crate) async fn drain_topics(&self, millis: i64) -> Vec<String> {
        self.drain(millis).await.into_iter().map(|delivery| delivery.event.topic).collect()
    }

    /// Runs a statement beside the server, as a person with a shell would.
    pub(crate) async fn meddle(&self, sql: &str) {
        use sqlx::Connection as _;
        let mut connection = sqlx::sqlite::SqliteConnection::connect(&self.url()).await.unwrap();
        sqlx::raw_sql("PRAGMA foreign_keys = OFF").execute(&mut connection).await.unwrap();
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql.to_owned())).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
    }

    /// Every row of every table, as text.
    pub(crate) async fn count_rows(&self, table: &str) -> i64 {
        use sqlx::Connection as _;
        let mut connection = sqlx::sqlite::SqliteConnection::connect(&self.url()).await.unwrap();
        let sql = format!("SELECT COUNT(*) FROM {table}");
        let count = sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_one(&mut connection).await.unwrap();
        connection.close().await.unwrap();
        count
    }
}

fn url(directory: &TempDir) -> String {
    format!("sqlite://{}/wasmdm.db", directory.path().display())
}

async fn open(directory: &TempDir, keyring: Keyring) -> Storage {
    Storage::open_with_keys(OpenOptions { url: url(directory), now: at(0) }, keyring).await.unwrap()
}

/// A certificate that is told apart from others by its name. One is real; the storage looks at no more than what is said of it.
pub(crate) fn certificate(name: &str) -> Certificate {
    static REAL: LazyLock<Certificate> = LazyLock::new(|| {
        let key = rcgen::KeyPair::generate().unwrap();
        let signed = rcgen::CertificateParams::new(vec![]).unwrap().self_signed(&key).unwrap();
        Certificate::from_der(signed.der().to_vec()).unwrap()
    });
    let mut certificate = REAL.clone();
    certificate.identity = [0; 32];
    for (byte, of_name) in certificate.identity.iter_mut().zip(name.bytes()) {
        *byte = of_name;
    }
    certificate.sha256 = certificate.identity;
    certificate.subject = format!("CN={name}");
    "CN=authority".clone_into(&mut certificate.issuer);
    certificate
}

pub(crate) fn document(pairs: &[(&str, Value)]) -> Value {
    let mut dictionary = Dictionary::new();
    for (key, value) in pairs {
        dictionary.insert((*key).to_owned(), value.clone());
    }
    Value::Dictionary(dictionary)
}

pub(crate) fn authenticate(device: &str, certificate_name: &str, millis: i64) -> Authenticate {
    let document = document(&[("MessageType", "Authenticate".into()), ("UDID", device.into())]);
    Authenticate {
        tenant: default(),
        enrollment: Enrollment { id: id(device), parent: None, kind: EnrollmentKind::Device },
        topic: TOPIC.to_owned(),
        facts: DeviceFacts { serial_number: Some(format!("S-{device}")), model: Some("Mac1,1".to_owned()), ..DeviceFacts::default() },
        raw: wasmdm_protocol::plist::to_xml(&document),
        document,
        certificate: certificate(certificate_name),
        may_change_certificate: true,
        may_renew: true,
        may_share_certificate: false,
        url_params: BTreeMap::new(),
        tags: Vec::new(),
        quarantined_by: None,
        decisions: serde_json::json!([]),
        effects: Vec::new(),
        audit: Vec::new(),
        now: at(millis),
    }
}

pub(crate) fn token_update(device: &str, millis: i64) -> TokenUpdate {
    let token = Bytes::from_static(b"secret-push-token");
    let document = document(&[
        ("MessageType", "TokenUpdate".into()),
        ("UDID", device.into()),
        ("PushMagic", "secret-magic".into()),
        ("Token", Value::Data(token.to_vec())),
    ]);
    TokenUpdate {
        tenant: default(),
        enrollment: Enrollment { id: id(device), parent: None, kind: EnrollmentKind::Device },
        identity: certificate(device).identity,
        facts: DeviceFacts::default(),
        topic: TOPIC.to_owned(),
        push_magic: "secret-magic".to_owned(),
        token,
        unlock_token: None,
        awaiting_configuration: None,
        raw: wasmdm_protocol::plist::to_xml(&document),
        document,
        now: at(millis),
    }
}

pub(crate) fn user_token_update(device: &str, user: &str, millis: i64) -> TokenUpdate {
    let mut update = token_update(device, millis);
    update.enrollment = Enrollment { id: id(&format!("{device}:{user}")), parent: Some(id(device)), kind: EnrollmentKind::User };
    update.facts.user_short_name = Some(user.to_owned());
    update
}

pub(crate) fn command(uuid: &str, request_type: &str) -> Command {
    Command { uuid: uuid.to_owned(), request_type: request_type.to_owned(), raw: Bytes::from(format!("<command {uuid} {request_type}>")) }
}

pub(crate) fn report(target: &str, uuid: &str, status: Status) -> ReportInput {
    let mut pairs = vec![("Status", Value::from(status.as_str())), ("CommandUUID", uuid.into())];
    if status == Status::Error {
        pairs.push(("ErrorChain", Value::Array(vec![document(&[("ErrorCode", 12021.into())])])));
    }
    let document = document(&pairs);
    ReportInput {
        tenant: default(),
        id: id(target),
        status: Some(status),
        command_uuid: uuid.to_owned(),
        raw: wasmdm_protocol::plist::to_xml(&document),
        document: Some(document),
        now: at(30),
    }
}

/// Of a decision that does not stand without them.
pub(crate) fn required(effects: PluginEffects) -> DecisionEffects {
    DecisionEffects { effects, required: true }
}

pub(crate) fn effects(plugin: &str) -> PluginEffects {
    PluginEffects {
        tenant: default(),
        plugin: plugin.to_owned(),
        reads: Vec::new(),
        writes: Vec::new(),
        quota: KvQuota { bytes: 1000, keys: 10 },
        commands: Vec::new(),
        cancels: Vec::new(),
        tags: Vec::new(),
        releases: Vec::new(),
        timers: Vec::new(),
        pushes: Vec::new(),
    }
}
