use crate::fixture::*;
use bytes::Bytes;
use std::time::Duration;
use wasmdm_protocol::report::Status;
use wasmdm_storage::commands::CommandOptions;
use wasmdm_storage::wakes::{NotWoken, Woken};

use crate::mass_pushes::mass_push_at;

const MINUTE: i64 = 60_000;

fn pushed() -> CommandOptions {
    CommandOptions { push: true, ..CommandOptions::default() }
}

async fn due(database: &Database, millis: i64) -> Vec<String> {
    let taken = database.storage().take_due_wakes(100, at(millis)).await.unwrap();
    taken.into_iter().map(|wake| wake.enrollment.to_string()).collect()
}

async fn woken(database: &Database, target: &str, millis: i64) {
    let woken = Woken { enrollment: id(target), result: Ok("apns-id".to_owned()) };
    database.storage().woken(vec![woken], at(millis), at(millis)).await.unwrap();
}

async fn not_woken(database: &Database, target: &str, reason: &str, retry_after: Option<Duration>, millis: i64) {
    let woken = Woken { enrollment: id(target), result: Err(NotWoken { reason: reason.to_owned(), retry_after }) };
    database.storage().woken(vec![woken], at(millis), at(millis)).await.unwrap();
}

async fn next_in(database: &Database, target: &str, millis: i64) -> Option<i64> {
    let next = database.storage().next_wake(&id(target)).await.unwrap();
    next.map(|next| (next.as_millis() - at(millis).as_millis()) / MINUTE)
}

/// Edge case 36. The device does not keep a deferred command, and does not come by itself if its session ended with another word.
pub(crate) async fn a_session_that_leaves_deferred_commands_schedules_a_push(database: &Database) {
    database.enroll("A").await;
    database.queue("A", "C1").await;
    database.queue("A", "C2").await;
    assert_eq!(database.poll("A").await.as_deref(), Some("C1"));
    let (_, next) = database.report("A", "C1", Status::NotNow).await;
    assert_eq!(next.as_deref(), Some("C2"));
    assert_eq!(database.storage().next_wake(&id("A")).await.unwrap(), None, "the session goes on");
    database.report("A", "C2", Status::Acknowledged).await;
    // `report` happens at 30.
    for (wait, expected) in [(1, 1), (2, 2), (4, 4), (8, 8)] {
        assert_eq!(next_in(database, "A", 30).await, Some(expected), "after {wait}");
        assert_eq!(due(database, 30 + expected * MINUTE - 1).await, Vec::<String>::new());
        assert_eq!(due(database, 30 + expected * MINUTE).await, ["A"]);
        // It comes, and defers again; another command is its last word.
        database.queue("A", &format!("D{wait}")).await;
        assert_eq!(database.poll("A").await.as_deref(), Some("C1"));
        let (_, next) = database.report("A", "C1", Status::NotNow).await;
        assert!(next.is_some());
        database.report("A", &format!("D{wait}"), Status::Acknowledged).await;
    }
    // It is done at last: nobody is woken any more.
    assert_eq!(database.poll("A").await.as_deref(), Some("C1"));
    database.report("A", "C1", Status::Acknowledged).await;
    assert_eq!(database.storage().next_wake(&id("A")).await.unwrap(), None);
    assert_eq!(database.count_rows("wakes").await, 0);
}

/// Edge case 36. It said `NotNow` last, and comes by itself; if it does not, it owes a visit like any other.
pub(crate) async fn a_device_that_comes_by_itself_is_waited_for(database: &Database) {
    database.enroll("A").await;
    database.queue("A", "C1").await;
    assert_eq!(database.poll("A").await.as_deref(), Some("C1"));
    database.report("A", "C1", Status::NotNow).await;
    assert_eq!(next_in(database, "A", 30).await, Some(16));
}

/// Edge cases 36 and 53. The push that was promised with a command is made after a restart too, once for all commands, and again while
/// the device owes a visit.
pub(crate) async fn a_promised_push_survives_a_restart_and_is_one(database: &Database) {
    database.enroll("A").await;
    database.queue_with("A", "C1", "DeviceInformation", pushed(), "api:test").await;
    database.queue_with("A", "C2", "DeviceInformation", pushed(), "api:test").await;
    database.restart().await;
    assert_eq!(due(database, 29_000).await, Vec::<String>::new(), "whoever queued it pushes at once");
    assert_eq!(due(database, 31_000).await, ["A"]);
    assert_eq!(due(database, 32_000).await, Vec::<String>::new(), "it is taken");
    assert_eq!(due(database, 31_000 + 2 * MINUTE).await, ["A"], "but not for ever");
    woken(database, "A", 200_000).await;
    assert_eq!(next_in(database, "A", 200_000).await, Some(16));
    woken(database, "A", 200_000).await;
    assert_eq!(next_in(database, "A", 200_000).await, Some(32));
    assert_eq!(database.poll("A").await.as_deref(), Some("C1"));
    database.report("A", "C1", Status::Acknowledged).await;
    database.report("A", "C2", Status::Acknowledged).await;
    assert_eq!(due(database, 1_000 * MINUTE).await, Vec::<String>::new(), "an answered one is not woken again");
    assert_eq!(database.count_rows("wakes").await, 0);
}

/// Edge case 52.
pub(crate) async fn who_left_or_begins_anew_is_not_woken(database: &Database) {
    for device in ["A", "B"] {
        database.enroll(device).await;
        database.enroll_user(device, "jo").await;
        for target in [device.to_owned(), format!("{device}:jo")] {
            database.queue_with(&target, "C1", "DeviceInformation", pushed(), "api:test").await;
        }
    }
    database.storage().check_out(&default(), &id("A"), Bytes::new(), at(5)).await.unwrap();
    database.authenticate("B", 6).await;
    assert_eq!(due(database, 1_000 * MINUTE).await, Vec::<String>::new());
    assert_eq!(database.count_rows("wakes").await, 0);
}

/// A command that may go out later wakes its device then, and one without a push never.
pub(crate) async fn a_wake_waits_for_its_command_and_nopush_means_none(database: &Database) {
    database.enroll("A").await;
    database.queue("A", "C1").await;
    assert_eq!(due(database, 10_000 * MINUTE).await, Vec::<String>::new());
    let later = CommandOptions { not_before: Some(at(600 * MINUTE)), ..pushed() };
    database.queue_with("A", "C2", "DeviceInformation", later, "api:test").await;
    assert_eq!(due(database, 600 * MINUTE - 1).await, Vec::<String>::new());
    assert_eq!(due(database, 600 * MINUTE).await, ["A"]);
}

/// What did not reach the device is tried again sooner than what did, but not at once for ever.
/// Edge case 51.
pub(crate) async fn a_push_that_failed_for_a_while_is_made_again_soon(database: &Database) {
    database.enroll("A").await;
    database.queue_with("A", "C1", "DeviceInformation", pushed(), "api:test").await;
    for minutes in [1, 2, 4] {
        not_woken(database, "A", "busy", Some(Duration::from_secs(5)), 100).await;
        assert_eq!(next_in(database, "A", 100).await, Some(minutes));
    }
}

/// What came up after a push had begun may be too late for it: the device may have come and found nothing.
pub(crate) async fn a_push_that_began_earlier_does_not_answer_what_was_asked_for_since(database: &Database) {
    database.enroll("A").await;
    database.queue_with("A", "C1", "DeviceInformation", pushed(), "api:test").await;
    let woken = Woken { enrollment: id("A"), result: Ok("apns-id".to_owned()) };
    database.storage().begin_mass_push(mass_push_at("M", &["A"], 100)).await.unwrap();
    database.storage().woken(vec![woken.clone()], at(99), at(150)).await.unwrap();
    assert_eq!(due(database, 151).await, ["A"]);
    database.storage().woken(vec![woken], at(151), at(160)).await.unwrap();
    assert_eq!(due(database, 200).await, Vec::<String>::new());
}
