use crate::fixture::*;
use std::time::Duration;
use wasmdm_storage::outbox::{Completed, Completion, Lease};

fn retry(millis: i64, counted: bool) -> Completion {
    Completion::Retry { at: at(millis), error: "no route".to_owned(), counted, by: serde_json::json!({ "digest": "d1" }) }
}

fn dead() -> Completion {
    Completion::Dead { error: "never".to_owned(), by: serde_json::json!({ "digest": "d1" }) }
}

/// Two events of device A and one of B.
async fn three_events(database: &Database) {
    database.subscribe("plugin:p", &["enrollment.*"]).await;
    database.enroll("A").await;
    database.authenticate("B", 0).await;
}

pub(crate) async fn deliveries_of_a_device_come_in_order(database: &Database) {
    three_events(database).await;
    let leases = database.claim(50).await;
    let mut partitions: Vec<_> = leases.iter().map(|lease| lease.partition.as_str()).collect();
    partitions.sort_unstable();
    assert_eq!(partitions, ["A", "B"]);
    let of_a = leases.iter().find(|lease| lease.partition == "A").unwrap();
    let mut topics = Vec::new();
    while let Some(delivery) = database.storage().next_delivery(of_a, at(50)).await.unwrap() {
        assert_eq!((delivery.attempt, delivery.conflicts, delivery.first_failed_at), (1, 0, None));
        assert!(matches!(database.done(of_a, &delivery, None).await, Completed::Stored { .. }));
        topics.push(delivery.event.topic);
    }
    assert_eq!(topics, ["enrollment.enrolling", "enrollment.enrolled"]);
    let (waiting, age) = database.storage().outbox_lag(at(1000)).await.unwrap();
    assert_eq!((waiting, age), (1, Duration::from_secs(1)));
}

pub(crate) async fn a_leased_partition_is_not_claimed_again_before_its_end(database: &Database) {
    three_events(database).await;
    assert_eq!(database.claim(50).await.len(), 2);
    assert_eq!(database.claim(51).await.len(), 0);
    assert_eq!(database.storage().outbox_due().await.unwrap(), Some(at(30_050)));
    let again = database.claim(30_050).await;
    assert_eq!(again.len(), 2, "its worker is dead");
    for lease in &again {
        database.storage().release(lease, at(30_051)).await.unwrap();
    }
    assert_eq!(database.storage().outbox_due().await.unwrap(), Some(at(30_051)));
}

pub(crate) async fn a_worker_that_lost_its_lease_changes_nothing(database: &Database) {
    database.subscribe("plugin:p", &["enrollment.enrolling"]).await;
    database.authenticate("A", 0).await;
    let (slow, delivery) = database.take(50).await;
    let (quick, same) = database.take(40_000).await;
    assert_eq!(same.event.id, delivery.event.id);
    assert_eq!(database.done(&slow, &delivery, Some(effects("p"))).await, Completed::LeaseLost);
    assert!(!database.storage().renew(&slow, Duration::from_secs(30), at(40_001)).await.unwrap());
    assert!(database.storage().next_delivery(&slow, at(40_001)).await.unwrap().is_none());
    database.storage().release(&slow, at(40_001)).await.unwrap();
    assert_eq!(database.claim(40_002).await.len(), 0, "the quick one still holds it");
    assert!(matches!(database.done(&quick, &same, None).await, Completed::Stored { .. }));
}

pub(crate) async fn a_retry_holds_back_the_partition_and_new_events_do_not_wake_it(database: &Database) {
    database.subscribe("plugin:p", &["enrollment.*"]).await;
    database.authenticate("A", 0).await;
    let storage = database.storage();
    let (lease, delivery) = database.take(50).await;
    assert!(matches!(storage.complete(&lease, &delivery, retry(1000, true), at(60)).await.unwrap(), Completed::Stored { .. }));
    assert!(storage.next_delivery(&lease, at(999)).await.unwrap().is_none());
    storage.release(&lease, at(61)).await.unwrap();
    database.token_update("A", 70).await;
    assert_eq!(storage.outbox_due().await.unwrap(), Some(at(1000)));
    assert!(database.claim(999).await.is_empty());

    let (lease, again) = database.take(1000).await;
    assert_eq!((again.event.id.as_str(), again.attempt, again.first_failed_at), (delivery.event.id.as_str(), 2, Some(at(60))));
    storage.complete(&lease, &again, retry(2000, false), at(1001)).await.unwrap();
    storage.release(&lease, at(1002)).await.unwrap();
    let (lease, uncounted) = database.take(2000).await;
    assert_eq!((uncounted.attempt, uncounted.first_failed_at), (2, Some(at(1001))), "being put off does not age it");
    database.done(&lease, &uncounted, None).await;
    let next = storage.next_delivery(&lease, at(2001)).await.unwrap().unwrap();
    assert_eq!((next.event.topic.as_str(), next.attempt), ("enrollment.enrolled", 1));
}

/// However long the queue of a subscriber is that answers slowly, the others get their share of the workers.
pub(crate) async fn a_subscriber_gets_its_share_and_those_behind_it_theirs(database: &Database) {
    database.subscribe("plugin:slow", &["enrollment.enrolling"]).await;
    for device in 0..20 {
        database.authenticate(&format!("S{device}"), 0).await;
    }
    database.subscribe("plugin:quick", &["enrollment.enrolling"]).await;
    database.subscribe("plugin:slow", &[]).await;
    for device in 0..4 {
        database.authenticate(&format!("Q{device}"), 20).await;
    }
    let of = |leases: &[Lease], subscriber: &str| leases.iter().filter(|lease| lease.subscriber == subscriber).count();
    let first = database.claim_up_to(16, 3, &[], 50).await;
    assert_eq!((of(&first, "plugin:slow"), of(&first, "plugin:quick")), (3, 3));
    let second = database.claim_up_to(13, 3, &[("plugin:slow", 0), ("plugin:quick", 2)], 50).await;
    assert_eq!((of(&second, "plugin:slow"), of(&second, "plugin:quick")), (0, 1));
    let third = database.claim_up_to(5, 100, &[], 50).await;
    assert_eq!(of(&third, "plugin:slow"), 5);
}

/// The last delivery of a partition gives the lease back in its own commit, so that what comes next is claimed anew.
pub(crate) async fn a_partition_with_nothing_left_is_given_back_with_its_last_delivery(database: &Database) {
    database.subscribe("plugin:p", &["enrollment.*"]).await;
    database.enroll("A").await;
    let (lease, delivery) = database.take(50).await;
    assert_eq!(database.done(&lease, &delivery, None).await, Completed::Stored { released: false });
    let last = database.storage().next_delivery(&lease, at(51)).await.unwrap().unwrap();
    assert_eq!(database.done(&lease, &last, None).await, Completed::Stored { released: true });
    assert_eq!(database.done(&lease, &last, None).await, Completed::LeaseLost);
    assert_eq!(database.storage().outbox_due().await.unwrap(), None);
    database.authenticate("A", 60).await;
    assert_eq!(database.claim(61).await[0].epoch, lease.epoch + 1);
}

/// The process that held them is dead, as the database has another owner now; its late words change nothing.
pub(crate) async fn leases_do_not_outlive_the_owner_of_the_database(database: &Database) {
    database.subscribe("plugin:p", &["enrollment.*"]).await;
    database.enroll("A").await;
    database.authenticate("B", 0).await;
    for lease in database.claim(50).await {
        if lease.partition == "B" {
            let delivery = database.storage().next_delivery(&lease, at(50)).await.unwrap().unwrap();
            database.storage().complete(&lease, &delivery, retry(100_000, true), at(60)).await.unwrap();
        }
    }
    database.restart().await;
    let again = database.claim(70).await;
    assert_eq!(again.iter().map(|lease| lease.partition.as_str()).collect::<Vec<_>>(), ["A"], "B waits for its next attempt");
}

pub(crate) async fn waking_a_subscriber_ends_its_backoff(database: &Database) {
    three_events(database).await;
    let storage = database.storage();
    let leases = database.claim(50).await;
    for lease in &leases {
        let delivery = storage.next_delivery(lease, at(50)).await.unwrap().unwrap();
        storage.complete(lease, &delivery, retry(100_000, true), at(60)).await.unwrap();
    }
    storage.wake_subscriber(&default(), "plugin:other", at(70)).await.unwrap();
    assert!(database.claim(71).await.is_empty());
    storage.wake_subscriber(&default(), "plugin:p", at(72)).await.unwrap();
    assert_eq!(database.claim(72).await.len(), leases.len());
}

pub(crate) async fn a_dead_letter_lets_the_partition_go_on_and_can_be_replayed(database: &Database) {
    let storage = database.storage();
    database.subscribe("plugin:p", &["enrollment.*"]).await;
    database.enroll("A").await;
    let (lease, first) = database.take(50).await;
    storage.complete(&lease, &first, dead(), at(60)).await.unwrap();
    let second = storage.next_delivery(&lease, at(61)).await.unwrap().unwrap();
    assert_eq!(second.event.topic, "enrollment.enrolled");
    let letters = storage.dead_letters(&default(), None, 10).await.unwrap();
    assert_eq!(letters.len(), 1);
    assert_eq!((letters[0].event_id.as_str(), letters[0].error.as_str(), letters[0].attempts), (first.event.id.as_str(), "never", 1));
    assert_eq!(letters[0].subscriber, "plugin:p");
    let sequences = [letters[0].sequence, 4711];
    assert_eq!(storage.replay_dead_letters(&default(), &sequences, at(70)).await.unwrap(), 1);
    assert_eq!(storage.replay_dead_letters(&default(), &sequences, at(71)).await.unwrap(), 0);
    assert!(storage.dead_letters(&default(), None, 10).await.unwrap().is_empty());
    database.done(&lease, &second, None).await;
    let replayed = storage.next_delivery(&lease, at(80)).await.unwrap().unwrap();
    assert_eq!((replayed.event.id.as_str(), replayed.attempt), (first.event.id.as_str(), 1));
}

pub(crate) async fn what_is_finished_says_who_handled_it(database: &Database) {
    three_events(database).await;
    assert_eq!(database.drain(50).await.len(), 3);
    let finished = database.storage().finished_deliveries(&default(), 0, 10).await.unwrap();
    assert_eq!(finished.len(), 3);
    assert!(finished.iter().all(|delivery| delivery.state == "done" && delivery.by["digest"] == "d1" && delivery.attempts == 1));
    assert_eq!((finished[0].topic.as_str(), finished[0].enrollment.as_deref()), ("enrollment.enrolling", Some("A")));
    let rest = database.storage().finished_deliveries(&default(), finished[1].sequence, 10).await.unwrap();
    assert_eq!(rest.len(), 1);
    assert_eq!(database.storage().outbox_due().await.unwrap(), None);
}

pub(crate) async fn old_deliveries_are_cleared_away_and_dead_ones_kept(database: &Database) {
    let week = 7 * 24 * 60 * 60 * 1000;
    three_events(database).await;
    for lease in database.claim(50).await {
        let delivery = database.storage().next_delivery(&lease, at(50)).await.unwrap().unwrap();
        if lease.partition == "B" {
            database.storage().complete(&lease, &delivery, dead(), at(100)).await.unwrap();
        }
        database.storage().release(&lease, at(100)).await.unwrap();
    }
    database.drain(150).await;
    database.storage().expire_commands(at(week + 99)).await.unwrap();
    assert_eq!(database.count_rows("deliveries").await, 3);
    database.storage().expire_commands(at(week + 100)).await.unwrap();
    assert_eq!(database.count_rows("deliveries").await, 1);
    assert_eq!(database.count_rows("events").await, 1);
    assert_eq!(database.count_rows("partitions").await, 1);
    assert_eq!(database.storage().dead_letters(&default(), None, 10).await.unwrap().len(), 1);
    // A partition that comes again starts with an epoch that no old lease has.
    database.token_update("A", week + 200).await;
    database.authenticate("A", week + 201).await;
    assert!(database.claim(week + 300).await[0].epoch > 1000);
}

pub(crate) async fn a_renewed_lease_lasts_longer(database: &Database) {
    database.subscribe("plugin:p", &["enrollment.*"]).await;
    database.authenticate("A", 0).await;
    let (lease, delivery) = database.take(50).await;
    assert!(database.storage().renew(&lease, Duration::from_mins(1), at(20_000)).await.unwrap());
    assert!(database.claim(79_999).await.is_empty());
    assert!(matches!(database.done(&lease, &delivery, None).await, Completed::Stored { .. }));
    database.storage().release(&lease, at(80_000)).await.unwrap();
    assert!(database.claim(90_000).await.is_empty(), "nothing waits any more");
}
