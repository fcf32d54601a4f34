use crate::fixture::*;
use bytes::Bytes;
use std::time::Duration;
use wasmdm_protocol::report::Status;
use wasmdm_storage::commands::{CommandOptions, Enqueue};
use wasmdm_storage::push_failures::{PushAttempt, PushFailure};
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

/// A push that knew everything reached it.
async fn woken(database: &Database, target: &str, millis: i64) {
    let woken = Woken { enrollment: id(target), result: Ok("apns-id".to_owned()) };
    let storage = database.storage();
    storage.woken(vec![woken], storage.known_wakes(), at(millis)).await.unwrap();
}

async fn not_woken(database: &Database, target: &str, reason: &str, retry_after: Option<Duration>, millis: i64) {
    let woken = Woken { enrollment: id(target), result: Err(NotWoken { reason: reason.to_owned(), retry_after }) };
    let storage = database.storage();
    storage.woken(vec![woken], storage.known_wakes(), at(millis)).await.unwrap();
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
        woken(database, "A", 30 + expected * MINUTE).await;
        // It comes, and defers again; another command, which was pushed too, is its last word.
        database.queue_with("A", &format!("D{wait}"), "DeviceInformation", pushed(), "api:test").await;
        woken(database, "A", 30 + expected * MINUTE).await;
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
    database.queue_with("A", "C2", "DeviceInformation", later(600), "api:test").await;
    assert_eq!(due(database, 600 * MINUTE - 1).await, Vec::<String>::new());
    assert_eq!(due(database, 600 * MINUTE).await, ["A"]);
}

fn later(minutes: i64) -> CommandOptions {
    CommandOptions { not_before: Some(at(minutes * MINUTE)), ..pushed() }
}

/// Edge case 36. A push for another command put the row off, and the later command left hours late, after pushes that could bring nothing.
pub(crate) async fn a_later_command_wakes_its_device_in_time_whatever_is_pushed_before(database: &Database) {
    database.enroll("A").await;
    database.queue_with("A", "C1", "DeviceInformation", pushed(), "api:test").await;
    database.queue_with("A", "C2", "DeviceInformation", later(600), "api:test").await;
    woken(database, "A", 0).await;
    assert_eq!(next_in(database, "A", 0).await, Some(16));
    assert_eq!(database.poll("A").await.as_deref(), Some("C1"));
    database.report("A", "C1", Status::Acknowledged).await;
    // Nothing can go out now: nobody is woken for nothing.
    assert_eq!(due(database, 17 * MINUTE).await, Vec::<String>::new());
    assert_eq!(due(database, 600 * MINUTE - 1).await, Vec::<String>::new());
    assert_eq!(due(database, 600 * MINUTE).await, ["A"]);
    woken(database, "A", 600 * MINUTE).await;
    // An earlier one among several is not forgotten either.
    database.queue_with("A", "C3", "DeviceInformation", later(605), "api:test").await;
    database.queue_with("A", "C4", "DeviceInformation", pushed(), "api:test").await;
    woken(database, "A", 601 * MINUTE).await;
    assert_eq!(due(database, 605 * MINUTE).await, ["A"]);
}

/// Edge case 36. A command for a device that had not come for a day was tried again after six hours when Apple was busy once.
pub(crate) async fn a_new_command_does_not_inherit_how_long_the_device_was_silent(database: &Database) {
    database.enroll("A").await;
    database.queue_with("A", "C1", "DeviceInformation", pushed(), "api:test").await;
    for _ in 0..9 {
        woken(database, "A", 100).await;
    }
    assert_eq!(next_in(database, "A", 100).await, Some(360));
    database.queue_with("A", "C2", "DeviceLock", pushed(), "api:test").await;
    not_woken(database, "A", "busy", Some(Duration::from_secs(5)), 100).await;
    assert_eq!(next_in(database, "A", 100).await, Some(1));
    woken(database, "A", 100).await;
    assert_eq!(next_in(database, "A", 100).await, Some(16));
    // A burst of commands, each with its push, is one visit that is owed.
    for number in 0..6 {
        database.queue_with("A", &format!("B{number}"), "DeviceInformation", pushed(), "api:test").await;
        woken(database, "A", 100).await;
    }
    assert_eq!(next_in(database, "A", 100).await, Some(16));
}

/// The push failed because the device was not enrolled yet, or its token was dead, and nobody woke it when it was.
pub(crate) async fn a_token_that_is_new_is_pushed_to_at_once_if_commands_wait(database: &Database) {
    database.authenticate("A", 1).await;
    database.queue_with("A", "C1", "DeviceInformation", pushed(), "api:test").await;
    not_woken(database, "A", "it is not enrolled", None, 100).await;
    assert_eq!(due(database, 17 * MINUTE).await, Vec::<String>::new());
    assert_eq!(database.count_rows("wakes").await, 0);
    database.token_update("A", 17 * MINUTE).await;
    assert_eq!(due(database, 17 * MINUTE).await, ["A"]);
    not_woken(database, "A", "Unregistered", None, 17 * MINUTE).await;
    assert_eq!(next_in(database, "A", 17 * MINUTE).await, Some(16));
    // The same token again says nothing new.
    database.token_update("A", 18 * MINUTE).await;
    assert_eq!(due(database, 18 * MINUTE).await, Vec::<String>::new());
    let mut rotated = token_update("A", 19 * MINUTE);
    rotated.token = Bytes::from_static(b"secret-other-token");
    database.storage().token_update(rotated).await.unwrap();
    assert_eq!(due(database, 19 * MINUTE).await, ["A"]);
}

/// Whoever only pushes for commands that were queued without a push owes the device one, too, if it failed.
pub(crate) async fn a_push_of_its_own_that_fails_is_made_again_if_commands_wait(database: &Database) {
    for device in ["A", "B"] {
        database.enroll(device).await;
    }
    database.queue("A", "C1").await;
    for device in ["A", "B"] {
        not_woken(database, device, "busy", Some(Duration::from_secs(5)), 100).await;
    }
    assert_eq!(next_in(database, "A", 100).await, Some(1));
    assert_eq!(next_in(database, "B", 100).await, None);
}

/// Expired and cancelled commands leave rows behind, which held up the others: a hundred in a second.
pub(crate) async fn rows_that_nobody_needs_do_not_hold_up_the_others(database: &Database) {
    for number in 0..30 {
        let device = format!("D{number:02}");
        database.enroll(&device).await;
        let expires_at = (number < 25).then(|| at(20));
        database.queue_with(&device, &format!("C{number}"), "DeviceInformation", CommandOptions { expires_at, ..pushed() }, "api:test").await;
    }
    database.storage().expire_commands(at(20)).await.unwrap();
    let taken = database.storage().take_due_wakes(10, at(MINUTE)).await.unwrap();
    assert_eq!(taken.len(), 5, "{taken:?}");
    assert_eq!(database.count_rows("wakes").await, 5);
}

/// A clock that was years ahead put everything off; it was set right, and nobody was woken for years.
pub(crate) async fn what_a_wrong_clock_put_off_is_due_after_a_restart(database: &Database) {
    database.enroll("A").await;
    let ahead = 5_000_000 * MINUTE;
    let enqueue = Enqueue {
        tenant: default(),
        targets: vec![id("A")],
        command: command("C1", "DeviceInformation"),
        options: pushed(),
        origin: "api:test".to_owned(),
        now: at(ahead),
    };
    database.storage().enqueue(enqueue).await.unwrap();
    assert_eq!(due(database, 1_000 * MINUTE).await, Vec::<String>::new());
    database.restart().await;
    assert_eq!(due(database, 1_000 * MINUTE).await, ["A"]);
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
    let storage = database.storage();
    database.queue_with("A", "C1", "DeviceInformation", pushed(), "api:test").await;
    let woken = Woken { enrollment: id("A"), result: Ok("apns-id".to_owned()) };
    let before = storage.known_wakes();
    // By the clock it was asked for before that push began: whoever asked had waited for the commit.
    storage.begin_mass_push(mass_push_at("M", &["A"], 100)).await.unwrap();
    storage.woken(vec![woken.clone()], before, at(150)).await.unwrap();
    assert_eq!(due(database, 151).await, ["A"]);
    storage.woken(vec![woken], storage.known_wakes(), at(160)).await.unwrap();
    assert_eq!(due(database, 200).await, Vec::<String>::new());
}

/// Edge case 36. The device had come during the push, and deferred; the push put its next one off to a quarter of an hour.
pub(crate) async fn a_session_that_ends_during_a_push_keeps_its_schedule(database: &Database) {
    database.enroll("A").await;
    database.queue_with("A", "C1", "DeviceInformation", pushed(), "api:test").await;
    database.queue("A", "C2").await;
    let storage = database.storage();
    let began = storage.known_wakes();
    assert_eq!(database.poll("A").await.as_deref(), Some("C1"));
    database.report("A", "C1", Status::NotNow).await;
    database.report("A", "C2", Status::Acknowledged).await;
    let woken = Woken { enrollment: id("A"), result: Ok("apns-id".to_owned()) };
    storage.woken(vec![woken], began, at(40)).await.unwrap();
    assert_eq!(next_in(database, "A", 30).await, Some(1));
}

/// A mass push once, and a command without a push was pushed for every six hours without end.
pub(crate) async fn nobody_is_woken_for_what_was_queued_without_a_push(database: &Database) {
    database.enroll("A").await;
    database.queue("A", "C1").await;
    database.storage().begin_mass_push(mass_push_at("M", &["A"], 0)).await.unwrap();
    assert_eq!(due(database, 0).await, ["A"]);
    woken(database, "A", 1).await;
    assert_eq!(due(database, 1_000 * MINUTE).await, Vec::<String>::new());
    assert_eq!(database.count_rows("wakes").await, 0);
}

/// Edge case 36. A session that deferred another command put the promise of the later one off by hours.
pub(crate) async fn a_deferral_does_not_forget_a_later_command(database: &Database) {
    database.enroll("A").await;
    database.queue("A", "C1").await;
    for number in 0..8 {
        database.queue("A", &format!("D{number}")).await;
        assert_eq!(database.poll("A").await.as_deref(), Some("C1"));
        database.report("A", "C1", Status::NotNow).await;
        if number == 7 {
            database.queue_with("A", "LATER", "DeviceLock", later(30), "api:test").await;
        }
        database.report("A", &format!("D{number}"), Status::Acknowledged).await;
    }
    assert_eq!(due(database, 30 * MINUTE).await, ["A"]);
}

/// Edge case 51. The token was alive again, and the commands waited for hours as if it were not.
pub(crate) async fn the_same_token_told_again_is_pushed_to_at_once_if_apple_had_missed_it(database: &Database) {
    database.enroll("A").await;
    database.queue_with("A", "C1", "DeviceInformation", pushed(), "api:test").await;
    let failure = PushFailure { code: "Unregistered".to_owned(), detail: "gone".to_owned(), fault: "device", token_is_dead: true };
    let attempt = PushAttempt { id: id("A"), told_at: at(1), failure: Some(failure) };
    database.storage().record_pushes(&default(), vec![attempt], at(100)).await.unwrap();
    for _ in 0..6 {
        not_woken(database, "A", "Unregistered", None, 100).await;
    }
    assert_eq!(due(database, 60 * MINUTE).await, Vec::<String>::new());
    database.token_update("A", 60 * MINUTE).await;
    assert_eq!(due(database, 60 * MINUTE).await, ["A"]);
}
