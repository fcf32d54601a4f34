//! How events reach subscribers: in order per device, again after a failure, never lost.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wasmdm_protocol::command::Command;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_protocol::time::Timestamp;
use wasmdm_service::clock::Clock as _;
use wasmdm_service::outbox::Outbox;
use wasmdm_service::pusher::{Pushed, Pusher};
use wasmdm_service::subscriber::{Delivered, Subscriber};
use wasmdm_storage::commands::CommandOptions;
use wasmdm_storage::effects::{KvQuota, PluginCommand, PluginEffects};
use wasmdm_storage::outbox::{Claim, Completion, Delivery, Lease, Subscription};
use wasmdm_testkit::push::RecordingPusher;

use crate::stage::Stage;

/// What a subscriber was given: topic, enrollment, attempt.
type Seen = (String, String, u32);

/// Fails as often as it was told to for a topic, and reports each attempt.
#[derive(Debug)]
struct ScriptedSubscriber {
    failures: Mutex<Vec<(&'static str, Delivered)>>,
    seen: mpsc::UnboundedSender<Seen>,
}

impl Subscriber for ScriptedSubscriber {
    fn deliver<'a>(&'a self, _lease: &'a Lease, delivery: &'a Delivery) -> BoxFuture<'a, Delivered> {
        let event = &delivery.event;
        let who = event.who.as_ref().map(|who| who.id.to_string()).unwrap_or_default();
        let mut failures = self.failures.lock();
        let planned = failures.iter().position(|(topic, _)| *topic == event.topic).map(|index| failures.remove(index).1);
        let _ = self.seen.send((event.topic.clone(), who, delivery.attempt));
        Box::pin(async move { planned.unwrap_or_else(|| Delivered::Done { effects: None, by: serde_json::json!({}) }) })
    }
}

fn failed(retryable: bool, retry_after: Option<Duration>) -> Delivered {
    Delivered::Failed { error: "no".to_owned(), retryable, retry_after, by: serde_json::json!({}) }
}

struct Running {
    seen: mpsc::UnboundedReceiver<Seen>,
    tracker: TaskTracker,
    shutdown: CancellationToken,
}

impl Running {
    async fn start(stage: &Stage, failures: Vec<(&'static str, Delivered)>) -> Self {
        Self::start_with(stage, failures, Arc::new(RecordingPusher::default())).await
    }

    async fn start_with(stage: &Stage, failures: Vec<(&'static str, Delivered)>, pusher: Arc<dyn Pusher>) -> Self {
        let subscription = Subscription { interface: "event-sink".to_owned(), topics: vec!["enrollment.*".to_owned()], include_self: false };
        stage.storage.set_subscriptions(&TenantId::default(), "test:one", vec![subscription], stage.clock.now()).await.unwrap();
        let (sender, seen) = mpsc::unbounded_channel();
        let subscriber = Arc::new(ScriptedSubscriber { failures: Mutex::new(failures), seen: sender });
        let outbox = Outbox::new(
            stage.storage.clone(),
            Arc::new(stage.clock.clone()),
            pusher,
            vec![("test:", subscriber)],
            "worker".to_owned(),
            Arc::new(|| 1.0),
        );
        let (tracker, shutdown) = (TaskTracker::new(), CancellationToken::new());
        tracker.spawn(outbox.run(tracker.clone(), shutdown.clone()));
        Self { seen, tracker, shutdown }
    }

    async fn next(&mut self) -> Seen {
        tokio::time::timeout(Duration::from_secs(20), self.seen.recv()).await.expect("nothing was delivered").unwrap()
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }
}

/// A push service that does not answer before it is told to.
#[derive(Debug, Default)]
struct SilentPusher {
    asked: Mutex<Vec<EnrollmentId>>,
    answers: CancellationToken,
}

impl Pusher for SilentPusher {
    fn push<'a>(&'a self, _tenant: &'a TenantId, ids: &'a [EnrollmentId]) -> BoxStream<'a, Vec<Pushed>> {
        self.asked.lock().extend_from_slice(ids);
        Box::pin(futures_util::stream::once(async {
            self.answers.cancelled().await;
            (0..ids.len()).map(|place| Pushed { place, result: Ok("late".to_owned()) }).collect()
        }))
    }
}

fn queues(target: &str, uuid: &str, not_before: Option<Timestamp>) -> Delivered {
    let document = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?><plist version=\"1.0\"><dict><key>CommandUUID</key><string>{uuid}</string>\
         <key>Command</key><dict><key>RequestType</key><string>SecurityInfo</string></dict></dict></plist>"
    );
    let effects = PluginEffects {
        tenant: TenantId::default(),
        plugin: "one".to_owned(),
        reads: Vec::new(),
        writes: Vec::new(),
        quota: KvQuota { bytes: 0, keys: 0 },
        commands: vec![PluginCommand {
            target: EnrollmentId::new(target),
            command: Command::parse(document.into()).unwrap(),
            options: CommandOptions { push: true, not_before, ..CommandOptions::default() },
        }],
        cancels: Vec::new(),
        tags: Vec::new(),
        releases: Vec::new(),
        timers: Vec::new(),
        pushes: Vec::new(),
    };
    Delivered::Done { effects: Some(Box::new(effects)), by: serde_json::json!({}) }
}

/// Each worker waited for the pushes that its event had caused: while Apple's service hung, plugins heard of nothing for 30 to 45 seconds at a time.
#[tokio::test]
async fn events_flow_while_the_push_service_hangs() {
    let stage = Stage::new().await;
    let (one, two) = (stage.device(1), stage.device(2));
    let pusher = Arc::new(SilentPusher::default());
    let later = stage.clock.now().plus(Duration::from_hours(1));
    let planned = vec![
        ("enrollment.enrolling", queues(&one.id(), "C1", None)),
        ("enrollment.enrolled", queues(&one.id(), "C2", None)),
        ("enrollment.enrolling", queues(&two.id(), "C3", Some(later))),
    ];
    let mut running = Running::start_with(&stage, planned, Arc::clone(&pusher) as Arc<dyn Pusher>).await;
    for device in [&one, &two] {
        stage.enroll(device).await;
        for topic in ["enrollment.enrolling", "enrollment.enrolled"] {
            assert_eq!(running.next().await, (topic.to_owned(), device.id(), 1));
        }
    }
    while pusher.asked.lock().len() < 2 {
        tokio::task::yield_now().await;
    }
    // The other one's command must not go out yet: it is woken when its time has come.
    assert!(pusher.asked.lock().iter().all(|id| id.as_str() == one.id()));
    assert_eq!(stage.storage.next_wake(&EnrollmentId::new(two.id())).await.unwrap(), Some(later));
    pusher.answers.cancel();
    running.stop().await;
}

#[tokio::test]
async fn events_of_a_device_arrive_in_order_and_a_failed_one_holds_back_the_later_ones() {
    let stage = Stage::new().await;
    let enrolling = || ("enrollment.enrolling", failed(true, None));
    let mut running = Running::start(&stage, vec![enrolling(), enrolling(), enrolling()]).await;
    let id = stage.device(1).id();
    // One second of backoff, at full jitter; other devices are not held up.
    for number in 1..=4 {
        let device = stage.device(number);
        stage.enroll(&device).await;
        assert_eq!(running.next().await, ("enrollment.enrolling".to_owned(), device.id(), 1));
    }
    // The first success after three failures wakes what waits for the subscriber.
    let mut rest = Vec::new();
    for _ in 0..7 {
        rest.push(running.next().await);
    }
    rest.retain(|(_, who, _)| *who == id);
    assert_eq!(rest, [("enrollment.enrolling".to_owned(), id.clone(), 2), ("enrollment.enrolled".to_owned(), id, 1)]);
    running.stop().await;
}

#[tokio::test]
async fn a_failure_is_tried_again_when_its_time_has_come() {
    let stage = Stage::new().await;
    let wait = Some(Duration::from_secs(90));
    let mut running = Running::start(&stage, vec![("enrollment.enrolling", failed(true, wait)), ("enrollment.enrolling", failed(true, None))]).await;
    let device = stage.device(1);
    stage.enroll(&device).await;
    assert_eq!(running.next().await.2, 1);
    stage.clock.advance(Duration::from_secs(89));
    assert!(tokio::time::timeout(Duration::from_millis(200), running.seen.recv()).await.is_err(), "it came too early");
    stage.clock.advance(Duration::from_secs(1));
    assert_eq!(running.next().await.2, 2);
    // The second wait is the backoff's: 2 s.
    stage.clock.advance(Duration::from_secs(2));
    assert_eq!(running.next().await, ("enrollment.enrolling".to_owned(), device.id(), 3));
    assert_eq!(running.next().await.0, "enrollment.enrolled");
    running.stop().await;
}

#[tokio::test]
async fn what_cannot_be_delivered_is_kept_as_a_dead_letter_and_can_be_replayed() {
    let stage = Stage::new().await;
    let mut running = Running::start(&stage, vec![("enrollment.enrolling", failed(false, None))]).await;
    let device = stage.device(1);
    stage.enroll(&device).await;
    assert_eq!(running.next().await.0, "enrollment.enrolling");
    assert_eq!(running.next().await.0, "enrollment.enrolled", "the partition goes on");
    let dead = stage.storage.dead_letters(&TenantId::default(), None, 10).await.unwrap();
    assert_eq!(dead.len(), 1);
    assert_eq!((dead[0].topic.as_str(), dead[0].error.as_str()), ("enrollment.enrolling", "no"));
    let replayed = stage.storage.replay_dead_letters(&TenantId::default(), &[dead[0].sequence], stage.clock.now()).await.unwrap();
    assert_eq!(replayed, 1);
    assert_eq!(running.next().await.0, "enrollment.enrolling");
    running.stop().await;
}

#[tokio::test]
async fn a_postponed_delivery_does_not_count_as_an_attempt() {
    let stage = Stage::new().await;
    let postponed = Delivered::Postponed { reason: "saturated".to_owned(), retry_after: Duration::from_secs(1) };
    let mut running = Running::start(&stage, vec![("enrollment.enrolling", postponed)]).await;
    stage.enroll(&stage.device(1)).await;
    assert_eq!(running.next().await.2, 1);
    stage.clock.advance(Duration::from_secs(1));
    assert_eq!(running.next().await.2, 1);
    running.stop().await;
}

#[tokio::test]
async fn what_was_waiting_when_a_process_died_is_delivered_by_the_next() {
    let stage = Stage::new().await;
    let running = Running::start(&stage, Vec::new()).await;
    running.stop().await;
    stage.enroll(&stage.device(1)).await;
    // Another process took a lease and was killed.
    let (owner, lease, now) = ("killed".to_owned(), Duration::from_secs(60), stage.clock.now());
    let leases = stage.storage.claim(Claim { owner, limit: 10, share: 10, shares: HashMap::new(), lease, now }).await.unwrap();
    assert_eq!(leases.len(), 1);
    let mut running = Running::start(&stage, Vec::new()).await;
    assert!(tokio::time::timeout(Duration::from_millis(200), running.seen.recv()).await.is_err(), "its lease still holds");
    stage.clock.advance(Duration::from_secs(61));
    assert_eq!(running.next().await.0, "enrollment.enrolling");
    assert_eq!(running.next().await.0, "enrollment.enrolled");
    running.stop().await;
}

/// What changes nothing here is an event all the same.
#[tokio::test]
async fn every_kind_of_check_in_is_an_event_for_whoever_wants_it() {
    let stage = Stage::new().await;
    let mut device = stage.device(1);
    stage.enroll(&device).await;
    let subscription = Subscription { interface: "event-sink".to_owned(), topics: vec!["checkin.*".to_owned()], include_self: false };
    stage.storage.set_subscriptions(&TenantId::default(), "test:one", vec![subscription], stage.clock.now()).await.unwrap();
    device.awaiting_configuration = None;
    let messages = [
        device.get_bootstrap_token(),
        device.declarative_management("tokens", None),
        device.get_token("com.example.unknown"),
        device.return_to_service(),
        device.set_bootstrap_token(Some(b"secret")),
        device.token_update(),
        device.check_out(),
    ];
    for message in messages {
        // Some are refused, as nobody serves them; they were heard.
        drop(stage.send(&device, message.unwrap()).await);
    }
    let (owner, lease, now) = ("worker".to_owned(), Duration::from_secs(60), stage.clock.now());
    let claim = Claim { owner, limit: 10, share: 10, shares: HashMap::new(), lease, now };
    let leases = stage.storage.claim(claim).await.unwrap();
    let mut topics = Vec::new();
    while let Some(delivery) = stage.storage.next_delivery(&leases[0], now).await.unwrap() {
        assert_eq!(delivery.event.who.as_ref().unwrap().id.as_str(), device.id());
        assert_eq!(format!("checkin.{}", delivery.event.data["message"]["MessageType"].as_str().unwrap()), delivery.event.topic);
        topics.push(delivery.event.topic.clone());
        let done = Completion::Done { effects: None, by: serde_json::json!({}) };
        stage.storage.complete(&leases[0], &delivery, done, now).await.unwrap();
    }
    let expected = ["GetBootstrapToken", "DeclarativeManagement", "GetToken", "ReturnToService", "SetBootstrapToken", "TokenUpdate", "CheckOut"];
    assert_eq!(topics, expected.map(|name| format!("checkin.{name}")));
}
