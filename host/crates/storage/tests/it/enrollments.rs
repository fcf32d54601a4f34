use crate::fixture::*;
use bytes::Bytes;
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_protocol::report::Status;
use wasmdm_storage::commands::CommandOptions;
use wasmdm_storage::enrollments::{Authenticated, EnrollmentFilter, TokenUpdated};
use wasmdm_storage::events::EnrollmentState;

async fn state(database: &Database, text: &str) -> Option<EnrollmentState> {
    database.storage().enrollment(&id(text)).await.unwrap().map(|record| record.state)
}

fn refused(done: &TokenUpdated) -> bool {
    matches!(done, TokenUpdated::Refused { .. })
}

/// Edge case 13. Edge case 14. Edge case 15.
pub(crate) async fn only_the_first_token_update_enrolls(database: &Database) {
    let done = database.try_authenticate(authenticate("A", "A", 0)).await;
    assert_eq!(done, Authenticated::Stored { re_enrolling: false });
    assert_eq!(state(database, "A").await, Some(EnrollmentState::Enrolling));
    let storage = database.storage();
    assert_eq!(storage.token_update(token_update("A", 1)).await.unwrap(), TokenUpdated::Stored { tally: 1 });
    storage.set_bootstrap_token(&default(), &id("A"), Some(Bytes::from_static(b"boot")), None, at(2)).await.unwrap();
    database.queue("A", "C1").await;
    database.queue("A", "C2").await;
    assert_eq!(database.poll("A").await.as_deref(), Some("C1"));
    for tally in 2..=3 {
        let mut update = token_update("A", 30);
        update.token = Bytes::from(format!("token {tally}"));
        update.push_magic = format!("magic {tally}");
        assert_eq!(storage.token_update(update).await.unwrap(), TokenUpdated::Stored { tally });
        assert_eq!(state(database, "A").await, Some(EnrollmentState::Enrolled));
        let targets = storage.push_targets(&default(), &[id("A")]).await.unwrap();
        let [target] = &targets[..] else { panic!("{targets:?}") };
        // None of the three is left of the update before.
        assert_eq!(
            (target.topic.as_str(), target.push_magic.as_str(), &*target.token),
            (TOPIC, &*format!("magic {tally}"), format!("token {tally}").as_bytes())
        );
    }
    assert_eq!(storage.bootstrap_token(&default(), &id("A")).await.unwrap().as_deref(), Some(&b"boot"[..]));
    assert_eq!(database.state("A", "C1").await, "sent");
    assert_eq!(database.report("A", "C1", Status::Acknowledged).await.1.as_deref(), Some("C2"));
    assert!(refused(&database.storage().token_update(token_update("unknown", 1)).await.unwrap()));
    assert_eq!(state(database, "unknown").await, None);
}

pub(crate) async fn a_user_channel_comes_with_its_first_token_update(database: &Database) {
    database.enroll("A").await;
    let user = database.enroll_user("A", "jo").await;
    let record = database.storage().enrollment(&user).await.unwrap().unwrap();
    assert_eq!(record.state, EnrollmentState::Enrolled);
    assert_eq!(record.parent, Some(id("A")));
    assert_eq!(record.facts["user_short_name"], "jo");
    let again = database.storage().token_update(user_token_update("A", "jo", 3)).await.unwrap();
    assert_eq!(again, TokenUpdated::Stored { tally: 2 });
}

pub(crate) async fn a_user_of_a_device_that_is_not_enrolled_is_refused(database: &Database) {
    assert!(refused(&database.storage().token_update(user_token_update("A", "jo", 1)).await.unwrap()));
    database.authenticate("A", 0).await;
    assert!(refused(&database.storage().token_update(user_token_update("A", "jo", 1)).await.unwrap()));
    assert_eq!(state(database, "A:jo").await, None);
}

/// Edge case 21. Edge case 31.
pub(crate) async fn another_topic_than_that_of_authenticate_is_refused(database: &Database) {
    database.authenticate("A", 0).await;
    let mut update = token_update("A", 1);
    update.topic.push_str(".other");
    assert!(refused(&database.storage().token_update(update).await.unwrap()));
    assert_eq!(state(database, "A").await, Some(EnrollmentState::Enrolling));
}

pub(crate) async fn a_token_update_after_check_out_is_refused_until_a_new_authenticate(database: &Database) {
    database.enroll("A").await;
    assert!(database.storage().check_out(&default(), &id("A"), Bytes::new(), at(5)).await.unwrap());
    assert!(refused(&database.storage().token_update(token_update("A", 6)).await.unwrap()));
    database.authenticate("A", 7).await;
    assert_eq!(database.storage().token_update(token_update("A", 8)).await.unwrap(), TokenUpdated::Stored { tally: 1 });
}

/// A new Authenticate left the queues of the device's users, and they stayed enabled with their tally. NanoMDM defect 4. Edge case 19.
/// Edge case 35. Edge case 44.
pub(crate) async fn re_enrolling_clears_queue_tokens_tally_and_users(database: &Database) {
    let storage = database.storage();
    database.enroll("A").await;
    let user = database.enroll_user("A", "jo").await;
    database.enroll("B").await;
    let mut update = token_update("A", 3);
    update.unlock_token = Some(Bytes::from_static(b"unlock"));
    storage.token_update(update).await.unwrap();
    storage.set_bootstrap_token(&default(), &id("A"), Some(Bytes::from_static(b"bootstrap")), None, at(4)).await.unwrap();
    for (target, uuid) in [("A", "C1"), ("A", "C2"), ("A:jo", "C3"), ("B", "C4")] {
        database.queue(target, uuid).await;
    }
    assert_eq!(database.poll("A").await.as_deref(), Some("C1"));

    let done = database.try_authenticate(authenticate("A", "A", 40)).await;

    assert_eq!(done, Authenticated::Stored { re_enrolling: true });
    for (target, uuid) in [("A", "C1"), ("A", "C2"), ("A:jo", "C3")] {
        assert_eq!(database.state(target, uuid).await, "cancelled");
    }
    assert_eq!(database.state("B", "C4").await, "queued");
    assert_eq!(storage.bootstrap_token(&default(), &id("A")).await.unwrap(), None);
    assert_eq!(storage.unlock_token(&default(), &id("A")).await.unwrap(), None);
    assert_eq!(state(database, user.as_str()).await, Some(EnrollmentState::CheckedOut));
    assert_eq!(storage.token_update(token_update("A", 41)).await.unwrap(), TokenUpdated::Stored { tally: 1 });
    assert_eq!(storage.token_update(user_token_update("A", "jo", 42)).await.unwrap(), TokenUpdated::Stored { tally: 1 });
    assert_eq!(database.poll("A").await, None);
    assert_eq!(database.poll("A:jo").await, None);
}

/// Edge case 19.
pub(crate) async fn a_first_authenticate_that_is_sent_again_is_no_re_enrollment(database: &Database) {
    database.subscribe("plugin:p", &["enrollment.enrolled"]).await;
    for millis in [0, 5] {
        let done = database.try_authenticate(authenticate("A", "A", millis)).await;
        assert_eq!(done, Authenticated::Stored { re_enrolling: false });
        // With another certificate it may be another device that says so.
        let done = database.try_authenticate(authenticate("B", if millis == 0 { "B" } else { "B2" }, millis)).await;
        assert_eq!(done, Authenticated::Stored { re_enrolling: millis != 0 });
    }
    database.token_update("A", 10).await;
    assert_eq!(database.drain(20).await[0].event.data["re_enrolling"], false);
    for millis in [30, 35] {
        let done = database.try_authenticate(authenticate("A", "A", millis)).await;
        assert_eq!(done, Authenticated::Stored { re_enrolling: true });
    }
    database.token_update("A", 40).await;
    assert_eq!(database.drain(50).await[0].event.data["re_enrolling"], true);
}

/// A user who waits for the configuration again after its device enrolled anew. Edge case 17.
pub(crate) async fn awaiting_configuration_of_an_earlier_enrollment_is_forgotten(database: &Database) {
    database.subscribe("plugin:p", &["configuration.awaiting"]).await;
    for _ in 0..2 {
        database.enroll("A").await;
        let mut update = user_token_update("A", "jo", 2);
        update.awaiting_configuration = Some(true);
        database.storage().token_update(update).await.unwrap();
    }
    assert_eq!(database.drain_topics(50).await.len(), 2);
}

/// Edge case 16.
pub(crate) async fn an_absent_unlock_token_keeps_the_old_one(database: &Database) {
    database.authenticate("A", 0).await;
    let mut update = token_update("A", 1);
    update.unlock_token = Some(Bytes::from_static(b"unlock"));
    database.storage().token_update(update).await.unwrap();
    database.token_update("A", 2).await;
    assert_eq!(database.storage().unlock_token(&default(), &id("A")).await.unwrap(), Some(Bytes::from_static(b"unlock")));
}

/// Apple forbids them on Shared iPad and in User Enrollment. They were kept all the same. Edge case 16.
pub(crate) async fn an_unlock_token_is_kept_of_a_devices_own_channel_only(database: &Database) {
    use wasmdm_protocol::enrollment::EnrollmentKind;
    for kind in EnrollmentKind::ALL {
        let device = format!("D-{}", kind.as_str());
        let mut authenticate = authenticate(&device, &device, 0);
        let mut update = if kind.is_device_channel() {
            authenticate.enrollment.kind = kind;
            token_update(&device, 2)
        } else {
            user_token_update(&device, "jo", 2)
        };
        database.try_authenticate(authenticate).await;
        database.token_update(&device, 1).await;
        update.enrollment.kind = kind;
        update.unlock_token = Some(Bytes::from_static(b"unlock"));
        let channel = update.enrollment.id.clone();
        assert!(!refused(&database.storage().token_update(update).await.unwrap()));
        let kept = database.storage().unlock_token(&default(), &channel).await.unwrap();
        assert_eq!(kept.is_some(), kind == EnrollmentKind::Device, "{kind:?}");
    }
}

/// Channels that had left were counted among those that could not be woken, for ever. Edge case 35.
pub(crate) async fn who_leaves_or_begins_anew_is_no_failing_push_any_more(database: &Database) {
    use wasmdm_storage::push_failures::{PushAttempt, PushFailure};
    let failure = PushFailure { code: "Unregistered".to_owned(), detail: "gone".to_owned(), fault: "device", token_is_dead: true };
    for leaves in [true, false] {
        database.enroll("A").await;
        database.enroll("B").await;
        let user = database.enroll_user("A", "jo").await;
        let attempts =
            [(id("A"), 1), (user, 2), (id("B"), 1)].map(|(id, told)| PushAttempt { id, told_at: at(told), failure: Some(failure.clone()) });
        database.storage().record_pushes(&default(), attempts.to_vec(), at(10)).await.unwrap();
        assert_eq!(database.count_rows("push_failures").await, 3);
        if leaves {
            database.storage().check_out(&default(), &id("A"), Bytes::new(), at(20)).await.unwrap();
        } else {
            database.authenticate("A", 20).await;
        }
        assert_eq!(database.storage().count_failing_pushes().await.unwrap(), [("Unregistered".to_owned(), 1)], "{leaves}");
        assert!(database.storage().failing_push(&default(), &id("B")).await.unwrap().is_some());
    }
}

/// A policy's own words stood in plain in a database whose audit is sealed because it holds them.
pub(crate) async fn why_a_policy_decided_stands_in_sealed_places_only(database: &Database) {
    database.subscribe("plugin:p", &["enrollment.enrolling"]).await;
    let mut message = authenticate("A", "A", 0);
    message.decisions = serde_json::json!([{ "plugin": "guard", "verdict": "quarantine", "reason": "stolen from Jo" }]);
    database.try_authenticate(message).await;
    let kept = database.storage().decisions(&id("A")).await.unwrap();
    assert_eq!(kept, Some(serde_json::json!([{ "plugin": "guard", "verdict": "quarantine" }])));
    assert_eq!(database.drain(50).await[0].event.data["decisions"][0]["reason"], "stolen from Jo");
}

/// Edge case 17.
pub(crate) async fn awaiting_configuration_is_set_and_released(database: &Database) {
    database.subscribe("plugin:p", &["configuration.awaiting", "configuration.released"]).await;
    database.authenticate("A", 0).await;
    for awaiting in [Some(true), None, Some(true)] {
        let mut update = token_update("A", 1);
        update.awaiting_configuration = awaiting;
        database.storage().token_update(update).await.unwrap();
    }
    database.queue_with("A", "C1", "DeviceConfigured", CommandOptions::default(), "api:test").await;
    assert_eq!(database.poll("A").await.as_deref(), Some("C1"));
    database.report("A", "C1", Status::Acknowledged).await;
    assert_eq!(database.drain_topics(50).await, ["configuration.awaiting", "configuration.released"]);
}

/// Edge case 47.
pub(crate) async fn an_empty_bootstrap_token_deletes_it(database: &Database) {
    let storage = database.storage();
    database.enroll("A").await;
    let token = Bytes::from_static(b"bootstrap");
    for deleting in [None, Some(Bytes::new())] {
        assert!(storage.set_bootstrap_token(&default(), &id("A"), Some(token.clone()), None, at(2)).await.unwrap());
        assert_eq!(storage.bootstrap_token(&default(), &id("A")).await.unwrap(), Some(token.clone()));
        assert!(storage.set_bootstrap_token(&default(), &id("A"), deleting, None, at(3)).await.unwrap());
        assert_eq!(storage.bootstrap_token(&default(), &id("A")).await.unwrap(), None);
    }
    assert!(!storage.set_bootstrap_token(&default(), &id("unknown"), Some(token), None, at(4)).await.unwrap());
}

/// Edge case 29. Edge case 35.
pub(crate) async fn check_out_disables_the_device_and_its_users(database: &Database) {
    database.enroll("A").await;
    let user = database.enroll_user("A", "jo").await;
    assert!(database.storage().check_out(&default(), &user, Bytes::new(), at(5)).await.unwrap());
    assert_eq!(state(database, "A").await, Some(EnrollmentState::Enrolled));
    database.enroll_user("A", "jo").await;
    assert!(database.storage().check_out(&default(), &id("A"), Bytes::new(), at(6)).await.unwrap());
    assert_eq!(state(database, "A").await, Some(EnrollmentState::CheckedOut));
    assert_eq!(state(database, user.as_str()).await, Some(EnrollmentState::CheckedOut));
    assert!(!database.storage().check_out(&default(), &id("unknown"), Bytes::new(), at(7)).await.unwrap());
}

pub(crate) async fn the_message_of_a_user_who_logged_in_is_kept_once_the_channel_exists(database: &Database) {
    database.enroll("A").await;
    let keep = async |user: &str| database.storage().user_authenticated(&default(), &id(user), Bytes::from_static(b"raw"), at(5)).await.unwrap();
    assert!(!keep("A:jo").await);
    let user = database.enroll_user("A", "jo").await;
    let before = database.count_rows("enrollment_messages").await;
    assert!(keep(user.as_str()).await && keep(user.as_str()).await);
    assert_eq!(database.count_rows("enrollment_messages").await, before + 1);
}

/// Edge case 25.
pub(crate) async fn an_enrollment_of_another_tenant_is_refused(database: &Database) {
    let other = TenantId::new("other");
    database.storage().create_tenant(&other, at(0)).await.unwrap();
    database.enroll("A").await;
    let mut message = authenticate("A", "A", 5);
    message.tenant = other.clone();
    assert!(matches!(database.try_authenticate(message).await, Authenticated::Refused { .. }));
    let mut update = token_update("A", 6);
    update.tenant = other.clone();
    assert!(refused(&database.storage().token_update(update).await.unwrap()));
    assert!(!database.storage().check_out(&other, &id("A"), Bytes::new(), at(7)).await.unwrap());
    assert!(!database.storage().set_bootstrap_token(&other, &id("A"), None, None, at(7)).await.unwrap());
    assert_eq!(state(database, "A").await, Some(EnrollmentState::Enrolled));
}

pub(crate) async fn facts_that_a_message_does_not_say_stay(database: &Database) {
    database.authenticate("A", 0).await;
    let mut update = token_update("A", 1);
    update.facts.os_version = Some("26.1".to_owned());
    database.storage().token_update(update).await.unwrap();
    let facts = database.storage().enrollment(&id("A")).await.unwrap().unwrap().facts;
    assert_eq!(facts["serial_number"], "S-A");
    assert_eq!(facts["os_version"], "26.1");
    assert_eq!(facts["state"], "enrolled");
    assert_eq!(facts["certificate"]["subject"], "CN=A");
    assert_eq!(facts.get("product_name"), None);
    let of_serial_number = database.storage().enrollments_by_serial_number(&default(), "S-A").await.unwrap();
    assert_eq!(of_serial_number.len(), 1);
}

/// Edge case 43.
pub(crate) async fn last_seen_is_seen_at_once_and_kept_over_a_restart(database: &Database) {
    database.enroll("A").await;
    database.storage().touch(&id("A"), at(77));
    database.storage().touch(&id("A"), at(66));
    database.storage().touch(&id("unknown"), at(66));
    assert_eq!(database.storage().enrollment(&id("A")).await.unwrap().unwrap().last_seen, Some(at(77)));
    database.restart().await;
    assert_eq!(database.storage().enrollment(&id("A")).await.unwrap().unwrap().last_seen, Some(at(77)));
}

pub(crate) async fn queries_filter_and_page(database: &Database) {
    for device in ["A", "B", "C"] {
        let mut message = authenticate(device, device, 0);
        message.tags = if device == "B" { vec![] } else { vec!["lab".to_owned()] };
        database.try_authenticate(message).await;
    }
    database.token_update("C", 1).await;
    let query = async |filter: EnrollmentFilter, cursor: Option<&str>, limit| {
        let found = database.storage().query_enrollments(&default(), &filter, cursor, limit).await.unwrap();
        found.iter().map(|record| record.id.as_str().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(query(EnrollmentFilter::default(), None, 2).await, ["A", "B"]);
    assert_eq!(query(EnrollmentFilter::default(), Some("B"), 2).await, ["C"]);
    let lab = EnrollmentFilter { tag: Some("lab".to_owned()), ..EnrollmentFilter::default() };
    assert_eq!(query(lab.clone(), None, 10).await, ["A", "C"]);
    let both = EnrollmentFilter { state: Some("enrolled".to_owned()), kind: Some("device".to_owned()), ..lab };
    assert_eq!(query(both, None, 10).await, ["C"]);
    let serial = EnrollmentFilter { serial_number: Some("S-B".to_owned()), model: Some("Mac1,1".to_owned()), ..EnrollmentFilter::default() };
    assert_eq!(query(serial, None, 10).await, ["B"]);
    let counts = database.storage().count_enrollments().await.unwrap();
    assert_eq!((counts["enrolling"], counts["enrolled"], counts["checked-out"]), (2, 1, 0));
}

/// Edge case 52.
/// Edge case 54.
pub(crate) async fn push_targets_are_the_enrolled_ones(database: &Database) {
    database.enroll("A").await;
    database.authenticate("B", 0).await;
    let targets = database.storage().push_targets(&default(), &[id("A"), id("B"), id("unknown")]).await.unwrap();
    assert_eq!(targets.len(), 1);
    let target = &targets[0];
    assert_eq!((target.id.as_str(), target.push_magic.as_str(), &*target.token), ("A", "secret-magic", &b"secret-push-token"[..]));
    assert!(!format!("{target:?}").contains("secret"));
    database.authenticate("A", 5).await;
    assert_eq!(database.storage().push_targets(&default(), &[id("A")]).await.unwrap().len(), 0);
}
