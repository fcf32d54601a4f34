use crate::fixture::*;
use crate::push_certificates::certificate;
use bytes::Bytes;
use std::time::Duration;
use wasmdm_protocol::report::Status;
use wasmdm_storage::commands::CommandOptions;
use wasmdm_storage::mass_pushes::{MassPush, NewMassPush, Targets};
use wasmdm_storage::push_certificates::{StoreOutcome, StorePushCertificate};
use wasmdm_storage::wakes::{NotWoken, Woken};

const SECOND: i64 = 1000;
const MINUTE: i64 = 60 * SECOND;

pub(crate) fn mass_push(push: &str, targets: &[&str]) -> NewMassPush {
    mass_push_at(push, targets, 0)
}

pub(crate) fn mass_push_at(push: &str, targets: &[&str], millis: i64) -> NewMassPush {
    NewMassPush {
        id: push.to_owned(),
        tenant: default(),
        origin: "api:test".to_owned(),
        targets: Targets::These(targets.iter().map(|target| id(target)).collect()),
        per_second: 1,
        now: at(millis),
    }
}

async fn begin(database: &Database, push: &str, targets: &[&str]) -> Vec<String> {
    let begun = database.storage().begin_mass_push(mass_push(push, targets)).await.unwrap();
    begun.nobody.into_iter().map(|id| id.to_string()).collect()
}

async fn due(database: &Database, millis: i64) -> Vec<String> {
    let taken = database.storage().take_due_wakes(100, at(millis)).await.unwrap();
    taken.into_iter().map(|wake| wake.enrollment.to_string()).collect()
}

async fn woken(database: &Database, target: &str, millis: i64) {
    let woken = Woken { enrollment: id(target), result: Ok(format!("apns-{target}")) };
    let storage = database.storage();
    storage.woken(vec![woken], storage.known_wakes(), at(millis)).await.unwrap();
}

async fn not_woken(database: &Database, target: &str, reason: &str, retry_after: Option<Duration>, millis: i64) {
    let woken = Woken { enrollment: id(target), result: Err(NotWoken { reason: reason.to_owned(), retry_after }) };
    let storage = database.storage();
    storage.woken(vec![woken], storage.known_wakes(), at(millis)).await.unwrap();
}

async fn progress(database: &Database, push: &str) -> MassPush {
    database.storage().mass_push(&default(), push).await.unwrap().unwrap()
}

/// Waiting, pushed, failed, unneeded.
async fn counts(database: &Database, push: &str) -> [u64; 4] {
    let progress = progress(database, push).await;
    [progress.waiting, progress.pushed, progress.failed, progress.unneeded]
}

/// Edge case 53.
pub(crate) async fn each_target_is_woken_once_in_its_turn_and_its_end_is_kept(database: &Database) {
    for device in ["A", "B", "C"] {
        database.enroll(device).await;
    }
    assert_eq!(begin(database, "M", &["A", "B", "GHOST", "C"]).await, ["GHOST"]);
    assert_eq!(counts(database, "M").await, [3, 0, 1, 0]);
    assert_eq!(due(database, 0).await, ["A"]);
    assert_eq!(due(database, SECOND).await, ["B"]);
    assert_eq!(due(database, 3 * SECOND).await, ["C"]);
    for device in ["A", "B"] {
        woken(database, device, 4 * SECOND).await;
    }
    not_woken(database, "C", "BadDeviceToken", None, 4 * SECOND).await;
    assert_eq!(counts(database, "M").await, [0, 2, 2, 0]);
    let failures: Vec<(String, u64, usize)> =
        progress(database, "M").await.failures.into_iter().map(|failure| (failure.reason, failure.count, failure.ids.len())).collect();
    assert_eq!(failures, [("BadDeviceToken".to_owned(), 1, 1), ("it is not enrolled".to_owned(), 1, 1)]);
    assert_eq!(due(database, 1_000 * MINUTE).await, Vec::<String>::new(), "nobody is told twice");
    assert_eq!(database.count_rows("wakes").await, 0);
    let recent = database.storage().recent_mass_pushes(&default(), 10).await.unwrap();
    assert_eq!(recent, [MassPush { failures: Vec::new(), ..progress(database, "M").await }]);
}

/// Those that were in flight are pushed to again, those whose end is known are not.
pub(crate) async fn what_was_in_flight_at_a_restart_is_pushed_to_again_at_once(database: &Database) {
    for device in ["A", "B", "C"] {
        database.enroll(device).await;
    }
    begin(database, "M", &["A", "B", "C"]).await;
    assert_eq!(due(database, SECOND).await, ["A", "B"]);
    woken(database, "A", SECOND).await;
    // The fixture opens at 0.
    database.restart().await;
    assert_eq!(counts(database, "M").await, [2, 1, 0, 0]);
    assert_eq!(due(database, SECOND).await, ["B"]);
    assert_eq!(due(database, 2 * SECOND).await, ["C"]);
}

/// Two people ask, and the device is told once.
pub(crate) async fn a_push_answers_everyone_who_asked_for_it(database: &Database) {
    database.enroll("A").await;
    begin(database, "M1", &["A"]).await;
    begin(database, "M2", &["A"]).await;
    let options = CommandOptions { push: true, ..CommandOptions::default() };
    database.queue_with("A", "C1", "DeviceInformation", options, "api:test").await;
    assert_eq!(due(database, 0).await, ["A"]);
    woken(database, "A", 1).await;
    for push in ["M1", "M2"] {
        assert_eq!(counts(database, push).await, [0, 1, 0, 0]);
    }
    // The command is still waited for.
    assert_eq!(due(database, 15 * MINUTE).await, Vec::<String>::new());
    assert_eq!(due(database, 17 * MINUTE).await, ["A"]);
}

pub(crate) async fn a_device_that_comes_by_itself_needs_no_push(database: &Database) {
    database.enroll("A").await;
    database.queue("A", "C1").await;
    begin(database, "M", &["A"]).await;
    database.poll("A").await;
    database.report("A", "C1", Status::Acknowledged).await;
    assert_eq!(counts(database, "M").await, [0, 0, 0, 1]);
    assert_eq!(due(database, MINUTE).await, Vec::<String>::new());
}

/// Edge case 52.
pub(crate) async fn who_leaves_before_its_turn_is_not_pushed_to(database: &Database) {
    for device in ["A", "B"] {
        database.enroll(device).await;
    }
    begin(database, "M", &["A", "B"]).await;
    database.storage().check_out(&default(), &id("A"), Bytes::new(), at(5)).await.unwrap();
    database.authenticate("B", 6).await;
    assert_eq!(due(database, MINUTE).await, Vec::<String>::new());
    assert_eq!(counts(database, "M").await, [0, 0, 2, 0]);
}

/// Apple's trouble is waited for, and not for ever.
pub(crate) async fn a_target_is_given_up_after_a_quarter_of_an_hour(database: &Database) {
    database.enroll("A").await;
    begin(database, "M", &["A"]).await;
    let mut attempts = Vec::new();
    for minute in 0..60 {
        if !due(database, minute * MINUTE).await.is_empty() {
            attempts.push(minute);
            not_woken(database, "A", "TooManyRequests", Some(Duration::from_secs(1)), minute * MINUTE).await;
        }
    }
    assert_eq!(attempts, [0, 1, 3, 7, 15]);
    assert_eq!(counts(database, "M").await, [0, 0, 1, 0]);
    assert_eq!(database.count_rows("wakes").await, 0);
}

pub(crate) async fn what_became_of_a_mass_push_is_forgotten_after_a_week(database: &Database) {
    database.enroll("A").await;
    begin(database, "M", &["A", "GHOST"]).await;
    due(database, 0).await;
    woken(database, "A", 1).await;
    let week = 7 * 24 * 60 * MINUTE;
    database.storage().expire_commands(at(week - 1)).await.unwrap();
    assert_eq!(counts(database, "M").await, [0, 1, 1, 0]);
    database.storage().expire_commands(at(week)).await.unwrap();
    assert_eq!(database.storage().mass_push(&default(), "M").await.unwrap(), None);
    assert_eq!(database.count_rows("mass_push_targets").await, 0);
}

/// A million of them were held in memory, and whoever asked waited for all of them to be stored.
pub(crate) async fn everyone_is_stored_page_by_page_over_a_restart(database: &Database) {
    database.enroll("A").await;
    database.enroll_user("A", "jo").await;
    database.authenticate("B", 1).await;
    // As many as a page holds, twice, beside those two.
    database
        .meddle(
            "INSERT INTO enrollments (id, tenant_id, kind, topic, state, generation, tally, re_enrolling, facts, url_params, decisions, push_magic, \
             push_token, authenticated_at, enrolled_at, created_at, updated_at) \
             WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 2000) \
             SELECT printf('D%04d', n), tenant_id, kind, topic, state, 1, 1, 0, facts, url_params, decisions, push_magic, push_token, 0, 0, 0, 0 \
             FROM numbers, enrollments WHERE id = 'A'",
        )
        .await;
    let push = NewMassPush { targets: Targets::Everyone, per_second: 1000, ..mass_push("M", &[]) };
    let begun = database.storage().begin_mass_push(push).await.unwrap();
    assert!(begun.nobody.is_empty() && begun.broke_off.is_none());
    let stored = async || (progress(database, "M").await.waiting, progress(database, "M").await.is_complete);
    assert_eq!(stored().await, (1000, false));
    database.restart().await;
    let mut pages = Vec::new();
    while database.storage().extend_mass_pushes(1000, at(0)).await.unwrap() {
        pages.push(stored().await);
    }
    assert_eq!(pages, [(2000, false), (2002, true)]);
    // Each has its turn behind those of the pages before.
    assert_eq!(database.storage().next_wake(&id("A")).await.unwrap(), Some(at(0)));
    assert_eq!(database.storage().next_wake(&id("D2000")).await.unwrap(), Some(at(2001)));
    let other = wasmdm_protocol::enrollment::TenantId::new("other");
    assert_eq!(database.storage().mass_push(&other, "M").await.unwrap(), None);
    // Of the devices that were made up only what is pushed to is there.
    database.meddle("DELETE FROM mass_push_targets; DELETE FROM wakes; DELETE FROM enrollments WHERE id LIKE 'D%'").await;
}

/// Whoever asked was told of an error only, and could not ask after those that were pushed to all the same.
pub(crate) async fn what_broke_off_in_the_middle_can_be_asked_after(database: &Database) {
    database.enroll("A").await;
    database
        .meddle(
            "CREATE TRIGGER full BEFORE INSERT ON mass_push_targets WHEN NEW.enrollment_id = 'G1500' BEGIN SELECT RAISE(ABORT, 'the disk is full'); END",
        )
        .await;
    let ghosts: Vec<String> = (0..2000).map(|number| format!("G{number}")).collect();
    let targets: Vec<&str> = std::iter::once("A").chain(ghosts.iter().map(String::as_str)).collect();
    let begun = database.storage().begin_mass_push(mass_push("M", &targets)).await.unwrap();
    assert_eq!(begun.nobody.len(), 999);
    assert!(begun.broke_off.is_some_and(|error| error.to_string().contains("full")));
    assert_eq!(counts(database, "M").await, [1, 0, 999, 0]);
    assert_eq!(due(database, 0).await, ["A"]);
}

/// The row that the report removed was written in the same group of the writer, so memory did not know that somebody had asked: the target
/// waited for a week.
pub(crate) async fn a_target_whose_device_comes_in_the_same_moment_has_its_end(database: &Database) {
    for number in 0..50 {
        let (device, push) = (format!("D{number}"), format!("M{number}"));
        database.enroll(&device).await;
        let options = CommandOptions { push: true, ..CommandOptions::default() };
        database.queue_with(&device, &format!("C{number}"), "DeviceInformation", options, "api:test").await;
        database.poll(&device).await;
        let command = format!("C{number}");
        let targets = [device.as_str()];
        let (_, _) = tokio::join!(begin(database, &push, &targets), database.report(&device, &command, Status::Acknowledged));
        // Whichever came first: it came, or it waits for its push.
        let counts = counts(database, &push).await;
        let due = due(database, MINUTE).await;
        assert!(counts == [0, 0, 0, 1] && due.is_empty() || counts == [1, 0, 0, 0] && due == [device.as_str()], "{counts:?}, {due:?}");
    }
    database.assert_sound().await;
}

/// Everyone was to be reached again as soon as the certificate was renewed, and was after up to six hours.
pub(crate) async fn a_renewed_certificate_brings_forward_what_it_can_push(database: &Database) {
    database.enroll("A").await;
    let options = CommandOptions { push: true, ..CommandOptions::default() };
    database.queue_with("A", "C1", "DeviceInformation", options, "api:test").await;
    for _ in 0..6 {
        not_woken(database, "A", "certificate-expired", None, 100).await;
    }
    assert_eq!(due(database, 300 * MINUTE).await, Vec::<String>::new());
    let store = StorePushCertificate { now: at(300 * MINUTE), ..certificate(TOPIC, 1) };
    assert_eq!(database.storage().store_push_certificate(store).await.unwrap(), StoreOutcome::Stored);
    assert_eq!(due(database, 300 * MINUTE).await, ["A"]);
}

/// What failed with the certificate before was put off, or given up, although the renewed one was there; and who had been reached was not to be
/// told twice because of it.
pub(crate) async fn a_push_that_was_under_way_when_its_certificate_was_renewed_counts_if_it_reached_somebody(database: &Database) {
    for device in ["A", "B"] {
        database.enroll(device).await;
    }
    begin(database, "M", &["A", "B"]).await;
    assert_eq!(due(database, SECOND).await, ["A", "B"]);
    let storage = database.storage();
    let known = storage.known_wakes();
    let store = StorePushCertificate { now: at(2 * SECOND), ..certificate(TOPIC, 1) };
    assert_eq!(storage.store_push_certificate(store).await.unwrap(), StoreOutcome::Stored);
    let failed = NotWoken { reason: "certificate-expired".to_owned(), retry_after: None };
    let results = [("A", Ok("apns-A".to_owned())), ("B", Err(failed))];
    let pushed = results.map(|(device, result)| Woken { enrollment: id(device), result });
    storage.woken(pushed.to_vec(), known, at(3 * SECOND)).await.unwrap();
    assert_eq!(counts(database, "M").await, [1, 1, 0, 0]);
    assert_eq!(due(database, 3 * MINUTE).await, ["B"]);
}
