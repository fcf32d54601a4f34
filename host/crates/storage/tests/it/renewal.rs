use crate::fixture::*;
use bytes::Bytes;
use wasmdm_protocol::report::Status;
use wasmdm_storage::commands::{CommandOptions, EnqueueOutcome, Offer};
use wasmdm_storage::enrollments::{Authenticated, TokenUpdated};
use wasmdm_storage::events::EnrollmentState;

const HOUR: i64 = 3_600_000;

/// An enrolled device with a user, a bootstrap token and a waiting command, to which a command that renews the identity went out at 20.
async fn renewing(database: &Database) {
    database.enroll("A").await;
    database.enroll_user("A", "jo").await;
    let token = Some(Bytes::from_static(b"bootstrap"));
    assert!(database.storage().set_bootstrap_token(&default(), &id("A"), token, None, at(5)).await.unwrap());
    let options = CommandOptions { renews_identity: true, ..CommandOptions::default() };
    let queued = database.queue_with("A", "RENEW", "InstallProfile", options, "api:test").await;
    assert_eq!(queued, EnqueueOutcome::Queued { uuid: "RENEW".to_owned() });
    database.queue("A", "WAITS").await;
    database.queue("A:jo", "USERS").await;
    assert_eq!(database.poll("A").await.as_deref(), Some("RENEW"));
}

async fn replaced(database: &Database, name: &str) -> Option<bool> {
    database.storage().certificate_binding(&certificate(name).identity).await.unwrap().map(|binding| binding.replaced)
}

async fn kept_everything(database: &Database) -> bool {
    let storage = database.storage();
    let state = storage.enrollment(&id("A")).await.unwrap().unwrap().state;
    let token = storage.bootstrap_token(&default(), &id("A")).await.unwrap();
    let user = storage.enrollment(&id("A:jo")).await.unwrap().unwrap().state;
    let waits = [database.state("A", "WAITS").await, database.state("A:jo", "USERS").await];
    let kept = (state, token.is_some(), user, waits == ["queued", "queued"]);
    assert!(kept.1 == kept.3 && (kept.2 == EnrollmentState::Enrolled) == kept.3, "half of it: {kept:?}");
    kept.0 == EnrollmentState::Enrolled && kept.3
}

/// Edge case 19. NanoMDM takes a renewal for a new device: the queue is cleared and the bootstrap token is gone.
pub(crate) async fn an_authenticate_that_a_command_asked_for_is_a_renewal_and_keeps_everything(database: &Database) {
    renewing(database).await;
    database.subscribe("plugin:p", &["enrollment.*", "identity.renewed"]).await;
    for again in 0..2 {
        // The second one is the first again: its answer was lost.
        let done = database.try_authenticate(authenticate("A", "A2", 30 + again)).await;
        assert_eq!(done, Authenticated::Renewed);
        assert!(kept_everything(database).await);
    }
    assert_eq!((replaced(database, "A").await, replaced(database, "A2").await), (Some(true), Some(false)));
    let done = database.storage().token_update(token_update("A", 40)).await.unwrap();
    assert_eq!(done, TokenUpdated::Stored { tally: 2 }, "the enrollment goes on");
    assert!(kept_everything(database).await);
    let deliveries = database.drain(50).await;
    assert_eq!(deliveries.iter().map(|delivery| delivery.event.topic.as_str()).collect::<Vec<_>>(), ["identity.renewed"]);
    let event = &deliveries[0].event;
    assert_eq!(event.data["how"], "renewal");
    assert_eq!(event.data["message"]["MessageType"], "Authenticate");
    assert!(event.data["previous_certificate"].as_str().unwrap().starts_with("41"), "{}", event.data);
    // It is over: what comes next is a new enrollment.
    let done = database.try_authenticate(authenticate("A", "A3", 60)).await;
    assert_eq!(done, Authenticated::Stored { re_enrolling: true });
    assert_eq!(database.state("A", "WAITS").await, "cancelled");
}

/// Edge case 19. With the default of `--re-enroll` a certificate that names another device was let through as a renewal, and got the tokens and
/// the queue of a device that was not its own: whoever calls says whether it may be one.
pub(crate) async fn what_may_be_no_renewal_is_none_within_the_day_either(database: &Database) {
    renewing(database).await;
    let mut message = authenticate("A", "A2", 30);
    message.may_renew = false;
    assert_eq!(database.try_authenticate(message).await, Authenticated::Stored { re_enrolling: true });
    assert!(!kept_everything(database).await);
    assert_eq!(database.storage().bootstrap_token(&default(), &id("A")).await.unwrap(), None);
}

/// Edge case 19. Nobody asked for it, or not within a day, or the device did not do it.
pub(crate) async fn any_other_authenticate_begins_anew(database: &Database) {
    renewing(database).await;
    let done = database.try_authenticate(authenticate("A", "A2", 20 + 24 * HOUR)).await;
    assert_eq!(done, Authenticated::Stored { re_enrolling: true }, "a day later");
    assert!(!kept_everything(database).await);

    for (number, status) in [Status::Error, Status::NotNow].into_iter().enumerate() {
        database.token_update("A", 30).await;
        let uuid = format!("RENEW{number}");
        let options = CommandOptions { renews_identity: true, ..CommandOptions::default() };
        database.queue_with("A", &uuid, "InstallProfile", options, "api:test").await;
        assert_eq!(database.poll("A").await.as_deref(), Some(uuid.as_str()));
        database.report("A", &uuid, status).await;
        let done = database.try_authenticate(authenticate("A", &format!("B{number}"), 40)).await;
        assert_eq!(done, Authenticated::Stored { re_enrolling: true }, "the device has not carried it out");
    }
}

/// Edges 19 and 30. A wipe makes a new device of it, whatever was asked for before.
/// Edge case 19.
pub(crate) async fn a_device_that_is_wiped_within_the_day_comes_back_as_a_new_one(database: &Database) {
    for (number, acknowledged) in [true, false].into_iter().enumerate() {
        let device = format!("D{number}");
        database.enroll(&device).await;
        let options = CommandOptions { renews_identity: true, ..CommandOptions::default() };
        database.queue_with(&device, &format!("R{number}"), "InstallProfile", options, "api:test").await;
        database.queue_with(&device, &format!("E{number}"), "EraseDevice", CommandOptions::default(), "api:test").await;
        assert_eq!(database.poll(&device).await, Some(format!("R{number}")));
        let (_, next) = database.report(&device, &format!("R{number}"), Status::Acknowledged).await;
        assert_eq!(next, Some(format!("E{number}")));
        if acknowledged {
            database.report(&device, &format!("E{number}"), Status::Acknowledged).await;
        }
        let done = database.try_authenticate(authenticate(&device, &format!("D{number}-new"), 40)).await;
        assert_eq!(done, Authenticated::Stored { re_enrolling: true }, "acknowledged: {acknowledged}");
    }
}

/// Edge case 19. The TokenUpdate tells that the device stands in its Setup Assistant: it was wiped by hand.
pub(crate) async fn a_renewal_that_waits_for_its_configuration_was_a_wipe(database: &Database) {
    renewing(database).await;
    database.subscribe("plugin:p", &["enrollment.enrolled", "configuration.awaiting"]).await;
    assert_eq!(database.try_authenticate(authenticate("A", "A2", 30)).await, Authenticated::Renewed);
    let mut update = token_update("A", 40);
    update.awaiting_configuration = Some(true);
    update.unlock_token = Some(Bytes::from_static(b"unlock"));
    assert_eq!(database.storage().token_update(update).await.unwrap(), TokenUpdated::Stored { tally: 1 });
    assert_eq!(database.storage().bootstrap_token(&default(), &id("A")).await.unwrap(), None);
    assert!(database.storage().unlock_token(&default(), &id("A")).await.unwrap().is_some(), "what came with it stays");
    assert_eq!(database.state("A", "WAITS").await, "cancelled");
    assert_eq!(database.storage().enrollment(&id("A:jo")).await.unwrap().unwrap().state, EnrollmentState::CheckedOut);
    let deliveries = database.drain(50).await;
    assert_eq!(deliveries[0].event.topic, "enrollment.enrolled");
    assert_eq!(deliveries[0].event.data["re_enrolling"], true);
    assert_eq!(deliveries[1].event.topic, "configuration.awaiting");
}

/// Edge case 19. Whoever holds any certificate of the authority could take over a device.
pub(crate) async fn a_new_certificate_is_refused_where_it_may_not_be(database: &Database) {
    database.enroll("A").await;
    let strict = |name: &str, millis| {
        let mut message = authenticate("A", name, millis);
        message.may_change_certificate = false;
        message
    };
    assert!(matches!(database.try_authenticate(strict("A2", 10)).await, Authenticated::Refused { .. }));
    assert_eq!((replaced(database, "A").await, replaced(database, "A2").await), (Some(false), None));
    assert_eq!(database.try_authenticate(strict("A", 11)).await, Authenticated::Stored { re_enrolling: true }, "its own it may bring again");
    let mut new = authenticate("B", "B", 12);
    new.may_change_certificate = false;
    assert_eq!(database.try_authenticate(new).await, Authenticated::Stored { re_enrolling: false }, "an unknown device has none to change");
}

/// Where bindings are only watched, a cloned machine enrolls beside its original, whose binding stays.
pub(crate) async fn a_certificate_is_shared_only_where_bindings_are_watched(database: &Database) {
    database.enroll("A").await;
    database.enroll("B").await;
    let mut clone = authenticate("B", "A", 10);
    clone.may_share_certificate = true;
    assert_eq!(database.try_authenticate(clone).await, Authenticated::Stored { re_enrolling: true });
    let bound = database.storage().certificate_binding(&certificate("A").identity).await.unwrap().unwrap();
    assert_eq!((bound.enrollment.as_str(), bound.replaced), ("A", false));
    assert_eq!(replaced(database, "B").await, Some(false));
}

/// Edge case 22. A device whose identity has expired gets nothing but what renews it.
pub(crate) async fn an_expired_identity_is_offered_renewals_only(database: &Database) {
    database.enroll("A").await;
    database.queue("A", "C1").await;
    let options = CommandOptions { renews_identity: true, ..CommandOptions::default() };
    database.queue_with("A", "RENEW", "InstallProfile", options, "api:test").await;
    let expired = Offer { reoffer_sent: true, only_renewals: true };
    let storage = database.storage();
    let next = storage.poll(&default(), &id("A"), expired, at(20)).await.unwrap();
    assert_eq!(next.map(|next| next.uuid).as_deref(), Some("RENEW"));
    let (_, next) = storage.report(report("A", "RENEW", Status::Acknowledged), true).await.unwrap();
    assert!(next.is_none(), "C1 waits for the new identity");
    assert_eq!(database.poll("A").await.as_deref(), Some("C1"));
}

pub(crate) async fn the_window_of_a_renewal_survives_a_restart(database: &Database) {
    renewing(database).await;
    database.restart().await;
    assert!(database.storage().enrollment(&id("A")).await.unwrap().unwrap().awaits_renewal(TOPIC, at(30)));
    let mut message = authenticate("A", "A2", 30);
    message.topic.push_str(".other");
    let done = database.try_authenticate(message).await;
    assert_eq!(done, Authenticated::Stored { re_enrolling: true }, "another topic is another management (edge case 21)");
}
