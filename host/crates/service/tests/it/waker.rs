//! Pushes whose time has come.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wasmdm_protocol::command::Command;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_service::clock::Clock as _;
use wasmdm_service::pusher::{Pushed, Pusher};
use wasmdm_service::waker::Waker;
use wasmdm_simulator::Device;
use wasmdm_storage::commands::{CommandOptions, Enqueue};
use wasmdm_storage::mass_pushes::{NewMassPush, Targets};
use wasmdm_testkit::push::RecordingPusher;

use crate::stage::Stage;

fn waker(stage: &Stage, pusher: &RecordingPusher) -> Waker {
    waker_at(stage, pusher, 50)
}

fn waker_at(stage: &Stage, pusher: &RecordingPusher, per_second: u32) -> Waker {
    Waker::new(stage.storage.clone(), Arc::new(stage.clock.clone()), Arc::new(pusher.clone()), NonZeroU32::new(per_second).unwrap())
}

async fn queue(stage: &Stage, device: &Device, uuid: &str) {
    let document = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?><plist version=\"1.0\"><dict><key>CommandUUID</key><string>{uuid}</string>\
         <key>Command</key><dict><key>RequestType</key><string>SecurityInfo</string></dict></dict></plist>"
    );
    let enqueue = Enqueue {
        tenant: TenantId::default(),
        targets: vec![EnrollmentId::new(device.id())],
        command: Command::parse(document.into()).unwrap(),
        options: CommandOptions { push: true, ..CommandOptions::default() },
        origin: "api:test".to_owned(),
        now: stage.clock.now(),
    };
    stage.storage.enqueue(enqueue).await.unwrap();
}

/// Edge cases 36 and 53. A device that never comes is woken after a while, ever more rarely, and not at all once it has answered.
#[tokio::test]
async fn a_device_that_owes_a_visit_is_woken_until_it_comes() {
    let stage = Stage::new().await;
    let device = stage.device(1);
    stage.enroll(&device).await;
    queue(&stage, &device, "C1").await;
    let pusher = RecordingPusher::default();
    let waker = waker(&stage, &pusher);
    assert_eq!(waker.wake_due().await.unwrap(), 0, "whoever queued it wakes it at once");
    let mut woken_at = Vec::new();
    let began = stage.clock.now();
    for _ in 0..24 * 60 {
        stage.clock.advance(Duration::from_mins(1));
        if waker.wake_due().await.unwrap() > 0 {
            woken_at.push(stage.clock.now().since(began).as_secs() / 60);
        }
    }
    // The promised push; then after 16, 32, 64, 128, 256 minutes, and six hours.
    assert_eq!(woken_at, [1, 17, 49, 113, 241, 497, 857, 1217]);
    assert_eq!(pusher.woken().len(), woken_at.len());

    let command = stage.send(&device, device.idle().unwrap()).await.unwrap();
    let wasmdm_service::reply::Reply::Command { body, .. } = command else { panic!("{command:?}") };
    let command = wasmdm_simulator::message::ReceivedCommand::parse(&body).unwrap();
    stage.send(&device, device.acknowledgement(&command).unwrap()).await.unwrap();
    stage.clock.advance(Duration::from_hours(48));
    assert_eq!(waker.wake_due().await.unwrap(), 0);
}

#[tokio::test]
async fn the_task_wakes_by_itself_and_ends_when_told() {
    let stage = Stage::new().await;
    let device = stage.device(1);
    stage.enroll(&device).await;
    queue(&stage, &device, "C1").await;
    let pusher = RecordingPusher::default();
    let shutdown = CancellationToken::new();
    let tracker = TaskTracker::new();
    let waker = waker(&stage, &pusher);
    let running = tracker.spawn(waker.run(tracker.clone(), shutdown.clone()));
    while pusher.woken().is_empty() {
        stage.clock.advance(Duration::from_secs(1));
        tokio::task::yield_now().await;
    }
    assert_eq!(pusher.woken(), [EnrollmentId::new(device.id())]);
    shutdown.cancel();
    running.await.unwrap();
}

/// Edge case 53. However many are due, the server is not asked by all of them at once.
#[tokio::test]
async fn who_is_due_is_woken_at_the_pace_that_was_given_and_nobody_is_forgotten() {
    let stage = Stage::new().await;
    let mut ids = Vec::new();
    for number in 0..12 {
        let device = stage.device(number);
        stage.enroll(&device).await;
        ids.push(EnrollmentId::new(device.id()));
    }
    let push = NewMassPush {
        id: "M".to_owned(),
        tenant: TenantId::default(),
        origin: "api:test".to_owned(),
        targets: Targets::These(ids.clone()),
        per_second: 1_000_000,
        now: stage.clock.now(),
    };
    stage.storage.begin_mass_push(push).await.unwrap();
    let pusher = RecordingPusher::default();
    let waker = waker(&stage, &pusher);
    let mut beats = Vec::new();
    while let count @ 1.. = waker.wake_due().await.unwrap() {
        beats.push(count);
    }
    assert_eq!(beats, [5, 5, 2]);
    assert_eq!(pusher.woken(), ids);
    let progress = stage.storage.mass_push(&TenantId::default(), "M").await.unwrap().unwrap();
    assert_eq!((progress.pushed, progress.waiting), (12, 0));
}

/// Nobody waits a second for a look.
#[tokio::test]
async fn the_task_looks_at_once_when_somebody_asks() {
    let stage = Stage::new().await;
    let device = stage.device(1);
    stage.enroll(&device).await;
    let id = EnrollmentId::new(device.id());
    let pusher = RecordingPusher::default();
    let (shutdown, tracker) = (CancellationToken::new(), TaskTracker::new());
    let running = tracker.spawn(waker(&stage, &pusher).run(tracker.clone(), shutdown.clone()));
    // The clock stands still.
    let push = NewMassPush {
        id: "M".to_owned(),
        tenant: TenantId::default(),
        origin: "api:test".to_owned(),
        targets: Targets::These(vec![id.clone()]),
        per_second: 1,
        now: stage.clock.now(),
    };
    stage.storage.begin_mass_push(push).await.unwrap();
    while pusher.woken().is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(pusher.woken(), [id]);
    shutdown.cancel();
    running.await.unwrap();
}

/// Answers for every other id, and for the rest only when it is told to.
#[derive(Debug, Default)]
struct HalfSilentPusher {
    asked: Mutex<Vec<EnrollmentId>>,
    answers: CancellationToken,
}

impl Pusher for HalfSilentPusher {
    fn push<'a>(&'a self, _tenant: &'a TenantId, ids: &'a [EnrollmentId]) -> BoxStream<'a, Vec<Pushed>> {
        self.asked.lock().extend_from_slice(ids);
        let pushed =
            |parity: usize| (0..ids.len()).filter(move |place| place % 2 == parity).map(|place| Pushed { place, result: Ok("it".to_owned()) });
        let late = async move {
            self.answers.cancelled().await;
            pushed(1).collect()
        };
        Box::pin(stream::iter([pushed(0).collect()]).chain(stream::once(late)))
    }
}

/// A push that Apple never answered held its whole beat, and twenty of them stopped all that went on in the background for half a minute.
#[tokio::test]
async fn pushes_without_an_answer_hold_their_own_places_only() {
    let stage = Stage::new().await;
    let mut ids = Vec::new();
    for number in 0..60 {
        let device = stage.device(number);
        stage.enroll(&device).await;
        ids.push(EnrollmentId::new(device.id()));
    }
    let push = NewMassPush {
        id: "M".to_owned(),
        tenant: TenantId::default(),
        origin: "api:test".to_owned(),
        targets: Targets::These(ids),
        per_second: 1_000_000,
        now: stage.clock.now(),
    };
    stage.storage.begin_mass_push(push).await.unwrap();
    let pusher = Arc::new(HalfSilentPusher::default());
    let (shutdown, tracker) = (CancellationToken::new(), TaskTracker::new());
    // Two in each beat, one of which is without an answer.
    let waker =
        Waker::new(stage.storage.clone(), Arc::new(stage.clock.clone()), Arc::clone(&pusher) as Arc<dyn Pusher>, NonZeroU32::new(20).unwrap());
    let running = tracker.spawn(waker.run(tracker.clone(), shutdown.clone()));
    let all = async {
        while pusher.asked.lock().len() < 60 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), all).await.expect("it stopped in the middle");
    pusher.answers.cancel();
    shutdown.cancel();
    running.await.unwrap();
    tracker.close();
    tracker.wait().await;
    let progress = stage.storage.mass_push(&TenantId::default(), "M").await.unwrap().unwrap();
    assert_eq!((progress.pushed, progress.waiting), (60, 0));
}

/// One a second was ten a second: each tenth of a second took one at least.
#[tokio::test]
async fn the_slowest_pace_is_kept_too() {
    let stage = Stage::new().await;
    let mut ids = Vec::new();
    for number in 0..4 {
        let device = stage.device(number);
        stage.enroll(&device).await;
        ids.push(EnrollmentId::new(device.id()));
    }
    let push = NewMassPush {
        id: "M".to_owned(),
        tenant: TenantId::default(),
        origin: "api:test".to_owned(),
        targets: Targets::These(ids),
        per_second: 1_000_000,
        now: stage.clock.now(),
    };
    stage.storage.begin_mass_push(push).await.unwrap();
    let pusher = RecordingPusher::default();
    let (shutdown, tracker) = (CancellationToken::new(), TaskTracker::new());
    let began = tokio::time::Instant::now();
    let running = tracker.spawn(waker_at(&stage, &pusher, 2).run(tracker.clone(), shutdown.clone()));
    while pusher.woken().len() < 4 {
        tokio::task::yield_now().await;
    }
    assert!(began.elapsed() >= Duration::from_millis(1500), "four at two a second took {:?}", began.elapsed());
    shutdown.cancel();
    running.await.unwrap();
}
