use crate::fixture::*;
use bytes::Bytes;
use wasmdm_protocol::report::Status;
use wasmdm_storage::commands::{CommandOptions, Enqueue, EnqueueOutcome, NotAgain, Recorded};

/// Edge case 40.
pub(crate) async fn commands_go_out_in_the_order_of_the_queue(database: &Database) {
    database.enroll("A").await;
    assert_eq!(database.poll("A").await, None);
    // Not the order of their names, and all in one millisecond.
    for uuid in ["C3", "C1", "C2"] {
        database.queue("A", uuid).await;
    }
    assert_eq!(database.poll("A").await.as_deref(), Some("C3"));
    assert_eq!(database.report("A", "C3", Status::Acknowledged).await, (Recorded::Final, Some("C1".to_owned())));
    assert_eq!(database.report("A", "C1", Status::Error).await, (Recorded::Final, Some("C2".to_owned())));
    assert_eq!(database.report("A", "C2", Status::CommandFormatError).await, (Recorded::Final, None));
    assert_eq!(database.poll("A").await, None);
    assert_eq!(database.state("A", "C3").await, "acknowledged");
    assert_eq!(database.state("A", "C1").await, "errored");
    assert_eq!(database.state("A", "C2").await, "errored");
}

pub(crate) async fn a_higher_priority_goes_first(database: &Database) {
    database.enroll("A").await;
    for (uuid, priority) in [("C1", 0), ("C2", 5), ("C3", -5), ("C4", 5)] {
        let options = CommandOptions { priority, ..CommandOptions::default() };
        database.queue_with("A", uuid, "DeviceInformation", options, "api:test").await;
    }
    let pending = database.storage().pending_commands(&default(), &id("A")).await.unwrap();
    assert_eq!(pending.iter().map(|command| command.uuid.as_str()).collect::<Vec<_>>(), ["C2", "C4", "C1", "C3"]);
    for uuid in ["C2", "C4", "C1", "C3"] {
        assert_eq!(database.poll("A").await.as_deref(), Some(uuid));
        database.report("A", uuid, Status::Acknowledged).await;
    }
}

/// Edge case 10.
pub(crate) async fn an_idle_re_offers_what_was_sent_when_asked_to(database: &Database) {
    database.enroll("A").await;
    database.queue("A", "C1").await;
    database.queue("A", "C2").await;
    let first = database.poll_at("A", true, 20).await.unwrap();
    assert_eq!((first.uuid.as_str(), first.deliveries), ("C1", 1));
    let again = database.poll_at("A", true, 21).await.unwrap();
    assert_eq!((again.uuid.as_str(), again.deliveries), ("C1", 2));
    let beside = database.poll_at("A", false, 22).await.unwrap();
    assert_eq!((beside.uuid.as_str(), beside.deliveries), ("C2", 1));
    assert_eq!(database.poll_at("A", false, 23).await, None);
}

/// After a kill, a device that had not read its answer got the command behind the one it had missed, and so both out of order. Edge case 10.
pub(crate) async fn a_report_offers_what_was_sent_only_if_its_own_answer_was_lost(database: &Database) {
    database.enroll("A").await;
    for uuid in ["C1", "C2", "C3"] {
        database.queue("A", uuid).await;
    }
    assert_eq!(database.poll("A").await.as_deref(), Some("C1"));
    assert_eq!(database.report("A", "C1", Status::NotNow).await, (Recorded::NotNow, Some("C2".to_owned())));
    // Its answer was lost on the way, and the device says it again.
    assert_eq!(database.report("A", "C1", Status::NotNow).await, (Recorded::Repeated, Some("C2".to_owned())));
    assert_eq!(database.report("A", "C2", Status::Acknowledged).await, (Recorded::Final, Some("C3".to_owned())));
    assert_eq!(database.report("A", "C2", Status::Acknowledged).await, (Recorded::Repeated, Some("C3".to_owned())));
    // A report of something else says nothing of C3, which was sent and not answered.
    assert_eq!(database.report("A", "unknown", Status::Acknowledged).await, (Recorded::Orphan, None));
    assert_eq!(database.poll_at("A", true, 20).await.map(|next| next.uuid).as_deref(), Some("C3"));
}

/// A server that offered it again after any other report sent a device round in circles within one session.
/// NanoMDM defect 6. Edge case 36.
pub(crate) async fn not_now_is_offered_again_by_the_next_idle_only(database: &Database) {
    database.enroll("A").await;
    database.queue("A", "C1").await;
    database.queue("A", "C2").await;
    assert_eq!(database.poll("A").await.as_deref(), Some("C1"));
    database.report("A", "C1", Status::NotNow).await;
    assert_eq!(database.state("A", "C1").await, "not-now");
    assert_eq!(database.report("A", "C2", Status::Acknowledged).await, (Recorded::Final, None));
    assert_eq!(database.poll("A").await.as_deref(), Some("C1"));
    assert_eq!(database.state("A", "C1").await, "sent");
    assert_eq!(database.report("A", "C1", Status::Acknowledged).await, (Recorded::Final, None));
}

/// Edge case 39.
pub(crate) async fn not_now_after_another_delivery_is_no_repetition(database: &Database) {
    database.subscribe("plugin:p", &["command.not-now"]).await;
    database.enroll("A").await;
    database.queue("A", "C1").await;
    for _ in 0..2 {
        assert_eq!(database.poll("A").await.as_deref(), Some("C1"));
        assert_eq!(database.report("A", "C1", Status::NotNow).await.0, Recorded::NotNow);
        assert_eq!(database.report("A", "C1", Status::NotNow).await.0, Recorded::Repeated);
    }
    assert_eq!(database.drain_topics(50).await, ["command.not-now", "command.not-now"]);
}

/// Edge case 39.
pub(crate) async fn the_first_final_report_wins(database: &Database) {
    database.subscribe("plugin:p", &["command.acknowledged", "command.errored"]).await;
    database.enroll("A").await;
    database.queue("A", "C1").await;
    database.queue("A", "C2").await;
    database.poll("A").await;
    assert_eq!(database.report("A", "C1", Status::Acknowledged).await, (Recorded::Final, Some("C2".to_owned())));
    assert_eq!(database.report("A", "C1", Status::Acknowledged).await, (Recorded::Repeated, Some("C2".to_owned())));
    assert_eq!(database.report("A", "C1", Status::Error).await, (Recorded::Orphan, None));
    assert_eq!(database.report("A", "C1", Status::NotNow).await, (Recorded::Orphan, None));
    assert_eq!(database.state("A", "C1").await, "acknowledged");
    assert_eq!(database.state("A", "C2").await, "sent");
    assert_eq!(database.drain_topics(50).await, ["command.acknowledged"]);
    let orphans = database.storage().orphan_reports(&default(), &id("A"), 10).await.unwrap();
    assert_eq!(orphans.iter().map(|orphan| orphan.status.as_str()).collect::<Vec<_>>(), ["NotNow", "Error"]);
}

/// Edge case 38.
pub(crate) async fn a_report_of_an_unknown_command_is_kept_as_an_orphan(database: &Database) {
    database.enroll("A").await;
    database.enroll("B").await;
    database.queue("A", "C1").await;
    database.queue("B", "B1").await;
    assert_eq!(database.report("A", "unknown", Status::Acknowledged).await, (Recorded::Orphan, Some("C1".to_owned())));
    // Another device's command is unknown to this one.
    assert_eq!(database.report("A", "B1", Status::Acknowledged).await.0, Recorded::Orphan);
    assert_eq!(database.state("B", "B1").await, "queued");
    assert_eq!(database.storage().orphan_reports(&default(), &id("A"), 10).await.unwrap().len(), 2);
    assert_eq!(database.report("nobody", "C1", Status::Acknowledged).await, (Recorded::Refused, None));
    for number in 0..150 {
        database.report("A", &format!("unknown-{number}"), Status::Acknowledged).await;
    }
    assert_eq!(database.storage().orphan_reports(&default(), &id("A"), 1000).await.unwrap().len(), 100, "a device cannot fill the disk");
}

/// Edge case 38.
pub(crate) async fn reports_of_cancelled_and_expired_commands_are_orphans(database: &Database) {
    database.enroll("A").await;
    database.queue("A", "C1").await;
    let options = CommandOptions { expires_at: Some(at(25)), ..CommandOptions::default() };
    database.queue_with("A", "C2", "DeviceLock", options, "api:test").await;
    database.poll("A").await;
    assert!(database.storage().cancel_command(&default(), &id("A"), "C1", at(21)).await.unwrap());
    assert!(!database.storage().cancel_command(&default(), &id("A"), "C1", at(22)).await.unwrap());
    assert!(!database.storage().cancel_command(&default(), &id("A"), "unknown", at(22)).await.unwrap());
    assert_eq!(database.storage().expire_commands(at(26)).await.unwrap(), 1);
    for (uuid, state) in [("C1", "cancelled"), ("C2", "expired")] {
        assert_eq!(database.report("A", uuid, Status::Acknowledged).await, (Recorded::Orphan, None));
        assert_eq!(database.state("A", uuid).await, state);
    }
}

/// Edge case 37.
pub(crate) async fn an_unknown_status_is_final(database: &Database) {
    database.subscribe("plugin:p", &["command.errored"]).await;
    database.enroll("A").await;
    database.queue("A", "C1").await;
    database.poll("A").await;
    assert_eq!(database.report("A", "C1", Status::Unknown("Perhaps".to_owned())).await, (Recorded::Final, None));
    assert_eq!(database.state("A", "C1").await, "errored");
    assert_eq!(database.drain(50).await[0].event.data["command"]["status"], "Perhaps");
}

/// Edge case 34. Edge case 42.
pub(crate) async fn nothing_goes_out_before_its_time_or_after_its_end(database: &Database) {
    database.enroll("A").await;
    let options = CommandOptions { not_before: Some(at(100)), expires_at: Some(at(200)), ..CommandOptions::default() };
    database.queue_with("A", "C1", "DeviceLock", options, "api:test").await;
    database.queue("A", "C2").await;
    assert_eq!(database.poll_at("A", true, 99).await.unwrap().uuid, "C2");
    database.report("A", "C2", Status::Acknowledged).await;
    assert_eq!(database.poll_at("A", true, 99).await, None);
    assert_eq!(database.poll_at("A", true, 100).await.unwrap().uuid, "C1");
    assert_eq!(database.poll_at("A", true, 199).await.unwrap().uuid, "C1");
    assert_eq!(database.poll_at("A", true, 200).await, None);
    assert_eq!(database.state("A", "C1").await, "expired");
}

pub(crate) async fn expired_commands_are_found_on_the_way_and_by_the_sweep(database: &Database) {
    database.subscribe("plugin:p", &["command.expired"]).await;
    database.enroll("A").await;
    let options = CommandOptions { expires_at: Some(at(15)), ..CommandOptions::default() };
    // More than one poll marks on its way.
    for number in 0..40 {
        database.queue_with("A", &format!("E{number}"), "DeviceLock", options.clone(), "api:test").await;
    }
    database.queue("A", "C1").await;
    assert_eq!(database.storage().expire_commands(at(14)).await.unwrap(), 0);
    assert_eq!(database.poll("A").await.as_deref(), Some("C1"));
    assert_eq!(database.storage().expire_commands(at(16)).await.unwrap(), 8);
    assert_eq!(database.storage().expire_commands(at(16)).await.unwrap(), 0);
    assert_eq!(database.drain_topics(50).await.len(), 40);
}

pub(crate) async fn nothing_goes_out_before_enrollment_or_after_check_out_but_reports_are_stored(database: &Database) {
    database.authenticate("A", 0).await;
    database.queue("A", "C1").await;
    assert_eq!(database.poll("A").await, None);
    assert_eq!(database.report("A", "C1", Status::Acknowledged).await, (Recorded::Final, None));
    database.token_update("A", 1).await;
    database.queue("A", "C2").await;
    database.queue("A", "C3").await;
    assert_eq!(database.poll("A").await.as_deref(), Some("C2"));
    database.storage().check_out(&default(), &id("A"), Bytes::new(), at(22)).await.unwrap();
    assert_eq!(database.poll("A").await, None);
    assert_eq!(database.report("A", "C2", Status::Acknowledged).await, (Recorded::Final, None));
    assert_eq!(database.state("A", "C2").await, "acknowledged");
}

pub(crate) async fn in_quarantine_only_people_and_the_quarantining_plugin_are_heard(database: &Database) {
    let mut message = authenticate("A", "A", 0);
    message.quarantined_by = Some("guard".to_owned());
    database.try_authenticate(message).await;
    database.token_update("A", 1).await;
    let record = database.storage().enrollment(&id("A")).await.unwrap().unwrap();
    assert_eq!(record.quarantined_by.as_deref(), Some("guard"));
    assert_eq!(record.facts["tags"], serde_json::json!(["quarantined"]));
    for (uuid, origin) in [("C1", "plugin:other"), ("C2", "plugin:guard"), ("C3", "api:ann"), ("C4", "plugin:guard2")] {
        database.queue_with("A", uuid, "DeviceInformation", CommandOptions::default(), origin).await;
    }
    assert_eq!(database.poll("A").await.as_deref(), Some("C2"));
    assert_eq!(database.report("A", "C2", Status::Acknowledged).await.1.as_deref(), Some("C3"));
    assert_eq!(database.report("A", "C3", Status::Acknowledged).await.1, None);
    assert!(database.storage().release_quarantine(&default(), &id("A"), at(40)).await.unwrap());
    assert!(!database.storage().release_quarantine(&default(), &id("A"), at(41)).await.unwrap());
    assert_eq!(database.poll("A").await.as_deref(), Some("C1"));
    let tags = database.storage().enrollment(&id("A")).await.unwrap().unwrap().facts["tags"].clone();
    assert_eq!(tags, serde_json::json!([]));
}

/// Edge case 30.
pub(crate) async fn an_acknowledged_erase_ends_the_old_queue(database: &Database) {
    database.enroll("A").await;
    database.enroll_user("A", "jo").await;
    database.queue_with("A", "C1", "EraseDevice", CommandOptions::default(), "api:test").await;
    database.queue("A", "C2").await;
    database.queue("A:jo", "C3").await;
    database.poll("A").await;
    assert_eq!(database.report("A", "C1", Status::Acknowledged).await, (Recorded::Final, None));
    assert_eq!(database.state("A", "C1").await, "acknowledged");
    assert_eq!(database.state("A", "C2").await, "cancelled");
    assert_eq!(database.state("A:jo", "C3").await, "cancelled");
    assert_eq!(database.poll("A").await, None);
}

/// The device was wiped, whatever had become of the command here meanwhile. Edge case 30.
pub(crate) async fn an_erase_that_was_given_up_and_is_acknowledged_late_ends_the_old_queue_too(database: &Database) {
    database.enroll("A").await;
    let options = CommandOptions { expires_at: Some(at(25)), ..CommandOptions::default() };
    database.queue_with("A", "C1", "EraseDevice", options, "api:test").await;
    database.queue("A", "C2").await;
    assert_eq!(database.poll("A").await.as_deref(), Some("C1"));
    assert_eq!(database.storage().expire_commands(at(26)).await.unwrap(), 1);
    assert_eq!(database.report("A", "C1", Status::Acknowledged).await, (Recorded::Orphan, None));
    assert_eq!(database.state("A", "C1").await, "expired");
    assert_eq!(database.state("A", "C2").await, "cancelled");
}

pub(crate) async fn an_erase_of_an_earlier_enrollment_that_is_acknowledged_late_changes_nothing(database: &Database) {
    database.enroll("A").await;
    database.queue_with("A", "C1", "EraseDevice", CommandOptions::default(), "api:test").await;
    database.poll("A").await;
    database.authenticate("A", 40).await;
    database.token_update("A", 41).await;
    database.queue("A", "C2").await;
    assert_eq!(database.report("A", "C1", Status::Acknowledged).await, (Recorded::Orphan, Some("C2".to_owned())));
    assert_eq!(database.state("A", "C2").await, "sent");
}

/// A device that was wiped gets the first commands again, although the plugin that queues them uses the same key each time. Edge case 19.
pub(crate) async fn idempotency_keys_of_an_earlier_enrollment_are_free_again(database: &Database) {
    let options = || CommandOptions { idempotency_key: Some("baseline".to_owned()), ..CommandOptions::default() };
    database.enroll("A").await;
    database.enroll_user("A", "jo").await;
    for (target, first, second) in [("A", "C1", "C2"), ("A:jo", "U1", "U2")] {
        let queue = async |uuid: &str| database.queue_with(target, uuid, "DeviceInformation", options(), "plugin:p").await;
        assert_eq!(queue(first).await, EnqueueOutcome::Queued { uuid: first.to_owned() });
        assert_eq!(queue(second).await, EnqueueOutcome::AlreadyQueued { uuid: first.to_owned() });
    }
    database.enroll("A").await;
    database.enroll_user("A", "jo").await;
    for (target, third) in [("A", "C3"), ("A:jo", "U3")] {
        let again = database.queue_with(target, third, "DeviceInformation", options(), "plugin:p").await;
        assert_eq!(again, EnqueueOutcome::Queued { uuid: third.to_owned() });
        assert_eq!(database.poll(target).await.as_deref(), Some(third));
    }
}

/// Edge case 38.
pub(crate) async fn orphan_reports_are_bounded_by_their_bytes(database: &Database) {
    database.enroll("A").await;
    for number in 0..5 {
        let mut long = report("A", &format!("unknown-{number}"), Status::Acknowledged);
        long.raw = vec![b'x'; 400_000].into();
        database.storage().report(long, false).await.unwrap();
    }
    let kept = async || {
        let orphans = database.storage().orphan_reports(&default(), &id("A"), 1000).await.unwrap();
        orphans.into_iter().map(|orphan| orphan.command_uuid).collect::<Vec<_>>()
    };
    assert_eq!(kept().await, ["unknown-4", "unknown-3"]);
    let mut longer = report("A", "longest", Status::Acknowledged);
    longer.raw = vec![b'x'; 3_000_000].into();
    database.storage().report(longer, false).await.unwrap();
    assert_eq!(kept().await, ["longest"], "the newest stays");
    let orphan = database.storage().orphan_reports(&default(), &id("A"), 1).await.unwrap().remove(0);
    assert_eq!((orphan.report.len(), orphan.length), (1 << 20, 3_000_000), "and it is cut");
}

/// A device could say that it had ten thousand users, and leave a long report of each. Edge case 38.
pub(crate) async fn orphan_reports_are_bounded_by_device_whoever_its_users_are(database: &Database) {
    database.enroll("A").await;
    database.enroll("B").await;
    let long = async |who: &str| {
        let mut long = report(who, "unknown", Status::Acknowledged);
        long.raw = vec![b'x'; 400_000].into();
        database.storage().report(long, false).await.unwrap();
    };
    long("A").await;
    long("B").await;
    for user in ["jo", "ann", "eve", "bob"] {
        database.enroll_user("A", user).await;
        long(&format!("A:{user}")).await;
    }
    let mut kept = Vec::new();
    for who in ["A", "A:jo", "A:ann", "A:eve", "A:bob", "B"] {
        kept.push(database.storage().orphan_reports(&default(), &id(who), 10).await.unwrap().len());
    }
    assert_eq!(kept, [0, 0, 0, 1, 1, 1]);
}

/// A report that was larger than any that is taken left its command open, and the device was offered it for ever. Edge case 5.
pub(crate) async fn the_command_whose_report_is_too_large_ends_and_the_queue_goes_on(database: &Database) {
    database.enroll("A").await;
    database.enroll_user("A", "jo").await;
    database.subscribe("events", &["command.errored"]).await;
    let storage = database.storage();
    assert_eq!(storage.last_sent(&default(), &id("A")).await.unwrap(), None);
    database.queue("A", "C1").await;
    database.queue("A", "C2").await;
    database.queue("A:jo", "U1").await;
    assert_eq!(storage.last_sent(&default(), &id("A")).await.unwrap(), None, "nothing was sent yet");
    database.poll("A").await;
    assert_eq!(storage.last_sent(&default(), &id("A")).await.unwrap(), Some((id("A"), "C1".to_owned())));
    database.poll("A:jo").await;
    assert_eq!(storage.last_sent(&default(), &id("A")).await.unwrap(), Some((id("A:jo"), "U1".to_owned())), "its user's was the last");
    assert!(storage.end_oversized(&default(), &id("A:jo"), "U1", at(50)).await.unwrap());
    assert_eq!(database.state("A:jo", "U1").await, "errored");
    assert_eq!(database.poll("A:jo").await, None);
    assert!(!storage.end_oversized(&default(), &id("A:jo"), "U1", at(50)).await.unwrap(), "once");
    assert!(!storage.end_oversized(&default(), &id("A"), "C2", at(50)).await.unwrap(), "it was not sent");
    assert!(storage.end_oversized(&default(), &id("A"), "C1", at(50)).await.unwrap());
    assert_eq!(database.poll("A").await.as_deref(), Some("C2"));
    // It is final: what comes after all belongs to no open command.
    assert_eq!(database.report("A", "C1", Status::Acknowledged).await.0, Recorded::Orphan);
    assert_eq!(database.drain_topics(50).await, ["command.errored", "command.errored"]);
}

pub(crate) async fn the_same_command_again_changes_nothing(database: &Database) {
    database.enroll("A").await;
    database.queue("A", "C1").await;
    let again = database.queue_with("A", "C1", "DeviceInformation", CommandOptions::default(), "api:test").await;
    assert_eq!(again, EnqueueOutcome::AlreadyQueued { uuid: "C1".to_owned() });
    database.poll("A").await;
    database.report("A", "C1", Status::Acknowledged).await;
    let finished = database.queue_with("A", "C1", "DeviceInformation", CommandOptions::default(), "api:test").await;
    assert_eq!(finished, EnqueueOutcome::AlreadyQueued { uuid: "C1".to_owned() });
    assert_eq!(database.poll("A").await, None);
}

/// What had been cancelled, had expired or was answered before the device enrolled anew was queued again with a success, and never went out.
pub(crate) async fn the_same_command_again_is_no_success_if_it_will_not_go_out(database: &Database) {
    database.enroll("A").await;
    let again = async |uuid: &str| database.queue_with("A", uuid, "DeviceInformation", CommandOptions::default(), "api:test").await;
    database.queue("A", "cancelled").await;
    assert!(database.storage().cancel_command(&default(), &id("A"), "cancelled", at(15)).await.unwrap());
    let expiring = CommandOptions { expires_at: Some(at(12)), ..CommandOptions::default() };
    database.queue_with("A", "expired", "DeviceInformation", expiring, "api:test").await;
    database.storage().expire_commands(at(15)).await.unwrap();
    for uuid in ["answered", "deferred", "sent", "open"] {
        database.queue("A", uuid).await;
    }
    assert_eq!(database.poll("A").await.as_deref(), Some("answered"));
    database.report("A", "answered", Status::Error).await;
    assert_eq!(database.report("A", "deferred", Status::NotNow).await.1.as_deref(), Some("sent"));
    for uuid in ["answered", "deferred", "sent", "open"] {
        assert_eq!(again(uuid).await, EnqueueOutcome::AlreadyQueued { uuid: uuid.to_owned() });
    }
    assert_eq!(again("cancelled").await, EnqueueOutcome::NotAgain(NotAgain::Cancelled));
    assert_eq!(again("expired").await, EnqueueOutcome::NotAgain(NotAgain::Expired));

    database.authenticate("A", 40).await;
    database.token_update("A", 41).await;
    assert_eq!(again("answered").await, EnqueueOutcome::NotAgain(NotAgain::EarlierEnrollment));
    assert_eq!(again("open").await, EnqueueOutcome::NotAgain(NotAgain::Cancelled));
    assert_eq!(database.poll("A").await, None);
    // Another device has nothing to do with it.
    database.enroll("B").await;
    database.queue("B", "answered").await;
}

pub(crate) async fn the_same_uuid_with_other_bytes_is_refused(database: &Database) {
    database.enroll("A").await;
    database.enroll("B").await;
    database.queue("A", "C1").await;
    let other = database.queue_with("B", "C1", "DeviceLock", CommandOptions::default(), "api:test").await;
    assert_eq!(other, EnqueueOutcome::UuidReused);
    assert_eq!(database.poll("B").await, None);
}

pub(crate) async fn an_unknown_target_does_not_fail_the_others(database: &Database) {
    database.enroll("A").await;
    database.enroll("B").await;
    let enqueue = Enqueue {
        tenant: default(),
        targets: ["A", "unknown", "B", "A"].into_iter().map(id).collect(),
        command: command("C1", "DeviceInformation"),
        options: CommandOptions::default(),
        origin: "api:test".to_owned(),
        now: at(10),
    };
    let uuid = || "C1".to_owned();
    let outcomes = database.storage().enqueue(enqueue).await.unwrap();
    assert_eq!(
        outcomes,
        [
            EnqueueOutcome::Queued { uuid: uuid() },
            EnqueueOutcome::UnknownEnrollment,
            EnqueueOutcome::Queued { uuid: uuid() },
            // The same id twice in one list once made a server deliver a command for ever.
            EnqueueOutcome::AlreadyQueued { uuid: uuid() },
        ]
    );
    for device in ["A", "B"] {
        assert_eq!(database.poll(device).await.as_deref(), Some("C1"));
        assert_eq!(database.report(device, "C1", Status::Acknowledged).await, (Recorded::Final, None));
    }
}

pub(crate) async fn an_idempotency_key_is_one_command_per_origin_and_enrollment(database: &Database) {
    database.subscribe("plugin:p", &["command.acknowledged"]).await;
    database.enroll("A").await;
    database.enroll("B").await;
    let options = CommandOptions { idempotency_key: Some("key".to_owned()), ..CommandOptions::default() };
    let queue = async |target: &str, uuid: &str, origin: &str| database.queue_with(target, uuid, "DeviceLock", options.clone(), origin).await;
    assert_eq!(queue("A", "C1", "api:ann").await, EnqueueOutcome::Queued { uuid: "C1".to_owned() });
    assert_eq!(queue("A", "C2", "api:ann").await, EnqueueOutcome::AlreadyQueued { uuid: "C1".to_owned() });
    assert_eq!(queue("B", "C3", "api:ann").await, EnqueueOutcome::Queued { uuid: "C3".to_owned() });
    assert_eq!(queue("A", "C4", "api:bob").await, EnqueueOutcome::Queued { uuid: "C4".to_owned() });
    database.poll("A").await;
    database.report("A", "C1", Status::Acknowledged).await;
    assert_eq!(queue("A", "C5", "api:ann").await, EnqueueOutcome::AlreadyQueued { uuid: "C1".to_owned() });
    // With the key a plugin knows its own command again.
    let answers = database.drain(200).await;
    assert_eq!(answers.len(), 1);
    assert_eq!(answers[0].event.data["command"]["idempotency_key"], "key");
}

/// Edge case 42.
pub(crate) async fn a_collapse_key_replaces_what_was_not_yet_sent(database: &Database) {
    database.enroll("A").await;
    let options = CommandOptions { collapse_key: Some("lock".to_owned()), ..CommandOptions::default() };
    for (uuid, origin) in [("C1", "api:ann"), ("C2", "api:ann"), ("P1", "plugin:p")] {
        database.queue_with("A", uuid, "DeviceLock", options.clone(), origin).await;
    }
    assert_eq!(database.state("A", "C1").await, "cancelled");
    assert_eq!(database.poll("A").await.as_deref(), Some("C2"));
    database.queue_with("A", "C3", "DeviceLock", options, "api:ann").await;
    assert_eq!(database.state("A", "C2").await, "sent", "the device may be at it");
    assert_eq!(database.state("A", "P1").await, "queued");
}

/// Edge case 4.
pub(crate) async fn a_malformed_report_errors_only_what_was_sent_to_the_enrollment_or_its_users(database: &Database) {
    database.enroll("A").await;
    database.enroll("B").await;
    database.enroll_user("A", "jo").await;
    for (target, uuid) in [("A", "C1"), ("A", "C2"), ("A:jo", "U1"), ("A:jo", "U2"), ("B", "B1")] {
        database.queue(target, uuid).await;
    }
    database.poll("A").await;
    database.poll("A:jo").await;
    database.poll("B").await;
    let malformed = async |uuid: &str| {
        let mut input = report("A", uuid, Status::Acknowledged);
        (input.status, input.document, input.raw) = (None, None, Bytes::from_static(b"<plist"));
        let (recorded, next) = database.storage().report(input, false).await.unwrap();
        (recorded, next.map(|next| next.uuid))
    };
    assert_eq!(malformed("B1").await, (Recorded::Refused, None));
    assert_eq!(malformed("C2").await, (Recorded::Refused, None), "it was never sent");
    assert_eq!(malformed("unknown").await, (Recorded::Refused, None));
    assert_eq!(database.state("B", "B1").await, "sent");
    assert_eq!(database.count_rows("orphan_reports").await, 0);
    assert_eq!(malformed("C1").await, (Recorded::Final, Some("C2".to_owned())));
    assert_eq!(malformed("C1").await, (Recorded::Repeated, Some("C2".to_owned())));
    // The answer goes to the channel whose command it was.
    assert_eq!(malformed("U1").await, (Recorded::Final, Some("U2".to_owned())));
    let status = database.storage().command_status(&default(), &id("A"), "C1").await.unwrap().unwrap();
    assert_eq!((status.state.as_str(), status.report.as_deref()), ("errored", Some(&b"<plist"[..])));
    assert_eq!(database.state("A:jo", "U1").await, "errored");
}

/// Edge case 3.
pub(crate) async fn bodies_and_reports_come_back_to_the_byte(database: &Database) {
    database.enroll("A").await;
    let body: Bytes = (0..=255).cycle().take(200_000).collect::<Vec<u8>>().into();
    let mut new = command("C1", "InstallProfile");
    new.raw = body.clone();
    let enqueue = Enqueue {
        tenant: default(),
        targets: vec![id("A")],
        command: new,
        options: CommandOptions::default(),
        origin: "api:test".to_owned(),
        now: at(10),
    };
    database.storage().enqueue(enqueue).await.unwrap();
    let next = database.poll_at("A", true, 20).await.unwrap();
    assert_eq!(next.body, body);
    assert_eq!(next.request_type, "InstallProfile");
    // A report is what the device sent, XML or not.
    let mut input = report("A", "C1", Status::Acknowledged);
    input.raw = body.clone();
    database.storage().report(input, false).await.unwrap();
    let status = database.storage().command_status(&default(), &id("A"), "C1").await.unwrap().unwrap();
    assert_eq!(status.report, Some(body));
    assert_eq!((status.origin.as_str(), status.deliveries), ("api:test", 1));
}

pub(crate) async fn a_queue_survives_a_restart(database: &Database) {
    database.enroll("A").await;
    for uuid in ["C1", "C2", "C3"] {
        database.queue("A", uuid).await;
    }
    database.poll("A").await;
    database.report("A", "C1", Status::NotNow).await;
    database.restart().await;
    assert_eq!(database.poll("A").await.as_deref(), Some("C2"), "it was sent with the report's answer");
    assert_eq!(database.report("A", "C2", Status::Acknowledged).await.1.as_deref(), Some("C1"), "the Idle cleared its mark");
}
