use crate::fixture::*;
use bytes::Bytes;
use wasmdm_protocol::report::Status;
use wasmdm_storage::certificate_bindings::Standing;
use wasmdm_storage::commands::{CommandOptions, EnqueueOutcome, Offer, Recorded, ReportInput};
use wasmdm_storage::enrollments::{Authenticated, TokenUpdate, TokenUpdated};
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

async fn standing(database: &Database, name: &str) -> Option<Standing> {
    database.storage().certificate_binding(&certificate(name).identity).await.unwrap().map(|binding| binding.standing)
}

async fn standings<const N: usize>(database: &Database, names: [&str; N]) -> [Option<Standing>; N] {
    let mut standings = [None; N];
    for (of, name) in standings.iter_mut().zip(names) {
        *of = standing(database, name).await;
    }
    standings
}

/// Of the device `A`, signed with the certificate of that name.
fn token_update_by(name: &str, millis: i64) -> TokenUpdate {
    TokenUpdate { identity: certificate(name).identity, ..token_update("A", millis) }
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
    let done = database.storage().token_update(token_update_by("A2", 40)).await.unwrap();
    assert_eq!(done, TokenUpdated::Stored { tally: 2 }, "the enrollment goes on");
    assert!(kept_everything(database).await);
    assert_eq!(standings(database, ["A", "A2"]).await, [Some(Standing::Replaced), Some(Standing::Own)]);
    let deliveries = database.drain(50).await;
    assert_eq!(deliveries.iter().map(|delivery| delivery.event.topic.as_str()).collect::<Vec<_>>(), ["identity.renewed"]);
    let event = &deliveries[0].event;
    assert_eq!(event.data["how"], "renewal");
    assert_eq!(event.data["message"]["MessageType"], "TokenUpdate");
    assert_eq!(event.who.as_ref().unwrap().facts["certificate"]["subject"], "CN=A2");
    assert!(event.data["previous_certificate"].as_str().unwrap().starts_with("41"), "{}", event.data);
    // It is over: what comes next is a new enrollment.
    let done = database.try_authenticate(authenticate("A", "A3", 60)).await;
    assert_eq!(done, Authenticated::Stored { re_enrolling: true });
    assert_eq!(database.state("A", "WAITS").await, "cancelled");
}

/// Edge case 19. The Authenticate ended the certificate before: a device whose TokenUpdate was answered 503, and which fell back to what it had,
/// was answered 400 for ever.
pub(crate) async fn until_the_token_update_behind_it_a_renewal_ends_no_certificate(database: &Database) {
    renewing(database).await;
    assert_eq!(standings(database, ["A", "A2"]).await, [Some(Standing::Own), None]);
    assert_eq!(database.try_authenticate(authenticate("A", "A2", 30)).await, Authenticated::Renewed);
    for _ in 0..2 {
        assert_eq!(standings(database, ["A", "A2"]).await, [Some(Standing::Outgoing), Some(Standing::Incoming)]);
        database.restart().await;
    }
    // It installs the profile once more, and its authority issues another certificate each time.
    assert_eq!(database.try_authenticate(authenticate("A", "A3", 31)).await, Authenticated::Renewed);
    assert_eq!(standings(database, ["A", "A2", "A3"]).await, [Some(Standing::Outgoing), None, Some(Standing::Incoming)]);
    database.assert_sound().await;
    // A user's TokenUpdate says nothing of the device's identity.
    database.storage().token_update(user_token_update("A", "jo", 32)).await.unwrap();
    assert_eq!(standing(database, "A").await, Some(Standing::Outgoing));
    database.storage().token_update(token_update_by("A3", 33)).await.unwrap();
    assert_eq!(standings(database, ["A", "A2", "A3"]).await, [Some(Standing::Replaced), None, Some(Standing::Own)]);
    assert!(kept_everything(database).await);
}

/// Edge case 19. What a renewal has brought came to nothing, and the device goes on with the certificate that it had.
pub(crate) async fn a_device_that_falls_back_from_a_renewal_has_its_certificate_and_may_try_again(database: &Database) {
    renewing(database).await;
    database.subscribe("plugin:p", &["enrollment.*", "identity.renewed"]).await;
    assert_eq!(database.try_authenticate(authenticate("A", "A2", 30)).await, Authenticated::Renewed);
    let mut update = token_update_by("A", 31);
    // Who was wiped would not have the old certificate any more.
    update.awaiting_configuration = Some(true);
    assert_eq!(database.storage().token_update(update).await.unwrap(), TokenUpdated::Stored { tally: 2 });
    assert_eq!(standings(database, ["A", "A2"]).await, [Some(Standing::Outgoing), Some(Standing::Incoming)]);
    assert!(kept_everything(database).await);

    assert_eq!(database.try_authenticate(authenticate("A", "A2", 32)).await, Authenticated::Renewed, "the day is not over");
    assert_eq!(database.try_authenticate(authenticate("A", "A", 33)).await, Authenticated::Renewed, "with its own it may always");
    assert_eq!(standings(database, ["A", "A2"]).await, [Some(Standing::Own), None]);
    database.storage().token_update(token_update_by("A", 34)).await.unwrap();
    assert!(kept_everything(database).await);
    assert!(database.drain_topics(50).await.is_empty(), "nothing was renewed");
    let done = database.try_authenticate(authenticate("A", "A3", 60)).await;
    assert_eq!(done, Authenticated::Stored { re_enrolling: true }, "it is over");
    assert_eq!(standings(database, ["A", "A3"]).await, [Some(Standing::Replaced), Some(Standing::Own)]);
}

/// Edge case 19. A TokenUpdate that was signed before had been on its way, and ended the certificate that the device went on with: every later
/// message was refused.
pub(crate) async fn a_token_update_that_was_late_does_not_end_the_new_certificate(database: &Database) {
    renewing(database).await;
    assert_eq!(database.try_authenticate(authenticate("A", "A2", 30)).await, Authenticated::Renewed);
    database.storage().token_update(token_update_by("A", 31)).await.unwrap();
    database.storage().token_update(token_update_by("A2", 32)).await.unwrap();
    assert_eq!(standings(database, ["A", "A2"]).await, [Some(Standing::Replaced), Some(Standing::Own)]);
    assert!(kept_everything(database).await);
    let done = database.try_authenticate(authenticate("A", "A3", 60)).await;
    assert_eq!(done, Authenticated::Stored { re_enrolling: true }, "it is over");
}

/// Edge case 19. A device that begins anew, or whose system renews its identity, in the middle of a renewal has one certificate in the end.
pub(crate) async fn whatever_happens_within_a_renewal_one_certificate_stays(database: &Database) {
    for (number, comes_with) in ["new", "incoming", "own"].into_iter().enumerate() {
        let device = format!("D{number}");
        database.enroll(&device).await;
        let options = CommandOptions { renews_identity: true, ..CommandOptions::default() };
        database.queue_with(&device, &format!("R{number}"), "InstallProfile", options, "api:test").await;
        database.poll(&device).await;
        let [new, incoming] = [format!("{device}-new"), format!("{device}-incoming")];
        let done = database.try_authenticate(authenticate(&device, &incoming, 30)).await;
        assert_eq!(done, Authenticated::Renewed);
        let with = if comes_with == "new" {
            &new
        } else if comes_with == "incoming" {
            &incoming
        } else {
            &device
        };
        let done = database.try_authenticate(authenticate(&device, with, 20 + 24 * HOUR)).await;
        assert_eq!(done, Authenticated::Stored { re_enrolling: true });
        assert_eq!(standing(database, with).await, Some(Standing::Own), "{comes_with}");
        let others = [&new, &incoming, &device].into_iter().filter(|name| *name != with);
        for other in others {
            assert!(standing(database, other).await.is_none_or(|standing| standing == Standing::Replaced), "{comes_with}: {other}");
        }
        database.assert_sound().await;
    }
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

/// Edge cases 19 and 30. A wipe makes a new device of it, whatever was asked for before. One whose `EraseDevice` had expired, was cancelled or was
/// answered by a report that could not be read came back as the old one, with its queue and its tokens.
pub(crate) async fn a_device_that_is_wiped_within_the_day_comes_back_as_a_new_one(database: &Database) {
    let [error, format_error] = [Some(Status::Error), Some(Status::CommandFormatError)];
    let cases = [
        (Some(Status::Acknowledged), "open", false),
        (None, "open", false),
        // Whatever became of it here: it went out, and the device has not said that it failed.
        (None, "cancelled", false),
        (None, "expired", false),
        (None, "malformed", false),
        (error.clone(), "open", true),
        (format_error.clone(), "open", true),
        (error, "cancelled", true),
        (format_error, "expired", true),
    ];
    for (number, (said, became, is_renewal)) in cases.into_iter().enumerate() {
        let storage = database.storage();
        let device = format!("D{number}");
        database.enroll(&device).await;
        let options = CommandOptions { renews_identity: true, ..CommandOptions::default() };
        database.queue_with(&device, &format!("R{number}"), "InstallProfile", options, "api:test").await;
        let erase = format!("E{number}");
        let options = CommandOptions { expires_at: Some(at(35)), ..CommandOptions::default() };
        database.queue_with(&device, &erase, "EraseDevice", options, "api:test").await;
        assert_eq!(database.poll(&device).await, Some(format!("R{number}")));
        let (_, next) = database.report(&device, &format!("R{number}"), Status::Acknowledged).await;
        assert_eq!(next.as_ref(), Some(&erase));
        match became {
            "cancelled" => assert!(storage.cancel_command(&default(), &id(&device), &erase, at(31)).await.unwrap()),
            "expired" => assert_eq!(storage.expire_commands(at(36)).await.unwrap(), 1),
            "malformed" => {
                let malformed = ReportInput { status: None, document: None, ..report(&device, &erase, Status::Acknowledged) };
                assert_eq!(storage.report(malformed, false).await.unwrap().0, Recorded::Final);
            }
            _ => {}
        }
        if let Some(said) = said.clone() {
            database.report(&device, &erase, said).await;
        }
        let done = database.try_authenticate(authenticate(&device, &format!("D{number}-new"), 40)).await;
        let expected = if is_renewal { Authenticated::Renewed } else { Authenticated::Stored { re_enrolling: true } };
        assert_eq!(done, expected, "{said:?} {became}");
        storage.cancel_command(&default(), &id(&device), &erase, at(41)).await.unwrap();
    }
}

/// Edge case 19. The TokenUpdate tells that the device stands in its Setup Assistant: it was wiped by hand.
pub(crate) async fn a_renewal_that_waits_for_its_configuration_was_a_wipe(database: &Database) {
    renewing(database).await;
    database.subscribe("plugin:p", &["enrollment.enrolled", "configuration.awaiting"]).await;
    assert_eq!(database.try_authenticate(authenticate("A", "A2", 30)).await, Authenticated::Renewed);
    let mut update = token_update_by("A2", 40);
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
    assert_eq!(standings(database, ["A", "A2"]).await, [Some(Standing::Own), None]);
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
    assert_eq!((bound.enrollment.as_str(), bound.is_replaced()), ("A", false));
    assert_eq!(standing(database, "B").await, Some(Standing::Own));
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
