//! Pushes whose time has come.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wasmdm_protocol::command::Command;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_service::clock::Clock as _;
use wasmdm_service::waker::Waker;
use wasmdm_simulator::Device;
use wasmdm_storage::commands::{CommandOptions, Enqueue};
use wasmdm_storage::mass_pushes::{NewMassPush, Targets};
use wasmdm_testkit::push::RecordingPusher;

use crate::stage::Stage;

fn waker(stage: &Stage, pusher: &RecordingPusher) -> Waker {
    Waker::new(stage.storage.clone(), Arc::new(stage.clock.clone()), Arc::new(pusher.clone()), NonZeroU32::new(50).unwrap())
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
