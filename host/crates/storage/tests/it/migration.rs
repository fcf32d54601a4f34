//! What another server knew of a device.

use crate::fixture::*;
use bytes::Bytes;
use wasmdm_protocol::checkin::CheckInMessage;
use wasmdm_protocol::plist::Value;
use wasmdm_storage::certificate_bindings::{Associated, Association, Reason};
use wasmdm_storage::commands::CommandOptions;
use wasmdm_storage::enrollments::{Authenticated, TokenUpdated};
use wasmdm_storage::migration::Migrated;

fn message(message_type: &str, device: &str, more: &[(&str, Value)]) -> CheckInMessage {
    let mut pairs = vec![("MessageType", Value::from(message_type)), ("UDID", device.into())];
    pairs.extend_from_slice(more);
    CheckInMessage::parse(wasmdm_protocol::plist::to_xml(&document(&pairs))).unwrap()
}

fn brought_authenticate(device: &str, build: &str) -> CheckInMessage {
    let facts = [("SerialNumber", Value::from(format!("S-{device}"))), ("BuildVersion", build.into()), ("Topic", TOPIC.into())];
    message("Authenticate", device, &facts)
}

fn brought_token_update(device: &str, magic: &str) -> CheckInMessage {
    let push = [
        ("Topic", Value::from(TOPIC)),
        ("PushMagic", magic.into()),
        ("Token", Value::Data(b"token".to_vec())),
        ("UnlockToken", Value::Data(b"unlock".to_vec())),
        // Said once, years ago.
        ("AwaitingConfiguration", true.into()),
    ];
    message("TokenUpdate", device, &push)
}

fn brought_user(device: &str, magic: &str) -> CheckInMessage {
    let push = [
        ("UserID", Value::from("jo")),
        ("UserShortName", "jo".into()),
        ("Topic", TOPIC.into()),
        ("PushMagic", magic.into()),
        ("Token", Value::Data(b"user-token".to_vec())),
    ];
    message("TokenUpdate", device, &push)
}

fn brought_bootstrap_token(device: &str, token: &[u8]) -> CheckInMessage {
    message("SetBootstrapToken", device, &[("BootstrapToken", Value::Data(token.to_vec()))])
}

/// In the order of NanoMDM's `nano2nano`.
fn all(device: &str) -> [CheckInMessage; 4] {
    [
        brought_authenticate(device, "1A"),
        brought_token_update(device, "magic"),
        brought_bootstrap_token(device, b"bootstrap"),
        brought_user(device, "user-magic"),
    ]
}

async fn bring(database: &Database, message: CheckInMessage, millis: i64) -> Migrated {
    database.storage().migrate(message, "api:nanomdm", at(millis)).await.unwrap()
}

async fn refused(database: &Database, message: CheckInMessage, because: &str) {
    let rows = database.count_rows("audit").await;
    match bring(database, message, 500).await {
        Migrated::Refused { reason } => assert!(reason.contains(because), "{reason}"),
        other => panic!("{other:?}, not refused because {because}"),
    }
    assert_eq!(database.count_rows("audit").await, rows);
}

/// As the first message after the move does where the operator allows it.
async fn bind(database: &Database, device: &str, millis: i64) {
    let association = Association {
        enrollment: id(device),
        certificate: certificate(device),
        reason: Reason::Retroactive,
        request_id: "r".to_owned(),
        now: at(millis),
    };
    let bound = database.storage().associate_certificate(association).await.unwrap();
    assert!(matches!(bound, Associated::Bound(_)), "{bound:?}");
}

pub(crate) async fn what_is_brought_counts_as_if_the_device_had_enrolled_here_and_nothing_is_emitted(database: &Database) {
    let storage = database.storage();
    database.subscribe("plugin:p", &["*", "checkin.*"]).await;
    for message in all("A") {
        assert_eq!(bring(database, message, 0).await, Migrated::Stored);
    }
    assert!(database.drain(10).await.is_empty());
    let record = storage.enrollment(&id("A")).await.unwrap().unwrap();
    assert_eq!((record.state.as_str(), record.topic.as_str(), &record.facts["serial_number"]), ("enrolled", TOPIC, &"S-A".into()));
    assert!(record.facts.get("certificate").is_none() && record.last_seen.is_none());
    let targets = storage.push_targets(&default(), &[id("A"), id("A:jo")]).await.unwrap();
    assert_eq!(targets.iter().map(|target| target.push_magic.as_str()).collect::<Vec<_>>(), ["magic", "user-magic"]);
    assert_eq!(storage.unlock_token(&default(), &id("A")).await.unwrap(), Some(Bytes::from_static(b"unlock")));
    assert_eq!(storage.bootstrap_token(&default(), &id("A")).await.unwrap(), Some(Bytes::from_static(b"bootstrap")));
    let audit = storage.audit(&default(), 10).await.unwrap();
    assert!(audit.iter().all(|row| row.action == "enrollment.migrated" && row.actor == "api:nanomdm"));
    assert_eq!(audit.len(), 4);
    database.queue("A", "C").await;
    assert_eq!(database.poll("A").await.as_deref(), Some("C"));
}

pub(crate) async fn the_same_message_again_changes_nothing(database: &Database) {
    for message in all("A") {
        bring(database, message, 0).await;
    }
    database.queue("A", "C").await;
    for message in all("A") {
        assert_eq!(bring(database, message, 5).await, Migrated::Unchanged);
    }
    assert_eq!(database.count_rows("audit").await, 4);
    assert_eq!(database.state("A", "C").await, "queued");
    // A token that changed with the other server in the meantime does change it.
    assert_eq!(bring(database, brought_token_update("A", "newer"), 6).await, Migrated::Stored);
    let targets = database.storage().push_targets(&default(), &[id("A")]).await.unwrap();
    assert_eq!(targets[0].push_magic, "newer");
}

pub(crate) async fn a_message_that_comes_before_what_it_needs_is_refused(database: &Database) {
    refused(database, brought_token_update("A", "magic"), "send the Authenticate first").await;
    refused(database, brought_bootstrap_token("A", b"t"), "send the Authenticate first").await;
    refused(database, brought_user("A", "magic"), "send the Authenticate first").await;
    bring(database, brought_authenticate("A", "1A"), 0).await;
    refused(database, brought_user("A", "magic"), "send the device's TokenUpdate first").await;
    let other_topic = [("Topic", Value::from("other")), ("PushMagic", "m".into()), ("Token", Value::Data(vec![1]))];
    refused(database, message("TokenUpdate", "A", &other_topic), "Topic").await;
}

pub(crate) async fn a_device_that_enrolled_here_is_not_touched_by_what_is_brought(database: &Database) {
    database.enroll("A").await;
    database.queue("A", "C").await;
    for message in all("A") {
        refused(database, message, "it has come here itself").await;
    }
    assert_eq!(database.state("A", "C").await, "queued");
    let targets = database.storage().push_targets(&default(), &[id("A")]).await.unwrap();
    assert_eq!(targets[0].push_magic, "secret-magic");
    // What it said itself may be brought: that changes nothing.
    let own = [("Topic", Value::from(TOPIC)), ("PushMagic", "secret-magic".into()), ("Token", Value::Data(b"secret-push-token".to_vec()))];
    assert_eq!(bring(database, message("TokenUpdate", "A", &own), 9).await, Migrated::Unchanged);
}

pub(crate) async fn what_a_device_that_came_with_its_old_certificate_has_not_said_is_still_taken(database: &Database) {
    bring(database, brought_authenticate("A", "1A"), 0).await;
    bind(database, "A", 50).await;
    for message in all("A").into_iter().skip(1) {
        assert_eq!(bring(database, message, 60).await, Migrated::Stored);
    }
    for message in all("A") {
        assert_eq!(bring(database, message, 70).await, Migrated::Unchanged);
    }
    refused(database, brought_authenticate("A", "2B"), "it has come here itself").await;
    refused(database, brought_token_update("A", "older"), "it has come here itself").await;
    refused(database, brought_bootstrap_token("A", b"older"), "it has come here itself").await;
    refused(database, brought_user("A", "older"), "it has come here itself").await;
    // Its own word replaces what was brought, and is no enrolling.
    let done = database.storage().token_update(token_update("A", 80)).await.unwrap();
    assert_eq!(done, TokenUpdated::Stored { tally: 2 });
}

pub(crate) async fn a_device_that_enrolled_anew_with_the_other_server_begins_anew_here(database: &Database) {
    for message in all("A") {
        bring(database, message, 0).await;
    }
    let keyed = CommandOptions { idempotency_key: Some("k".to_owned()), ..CommandOptions::default() };
    database.queue_with("A", "erase", "EraseDevice", keyed, "api:test").await;
    database.queue("A:jo", "profile").await;
    assert_eq!(bring(database, brought_authenticate("A", "2B"), 10).await, Migrated::Stored);
    let storage = database.storage();
    assert_eq!(database.state("A", "erase").await, "cancelled");
    assert_eq!(database.state("A:jo", "profile").await, "cancelled");
    assert!(storage.push_targets(&default(), &[id("A"), id("A:jo")]).await.unwrap().is_empty());
    assert_eq!(storage.unlock_token(&default(), &id("A")).await.unwrap(), None);
    assert_eq!(storage.bootstrap_token(&default(), &id("A")).await.unwrap(), None);
    for message in all("A").into_iter().skip(1) {
        assert_eq!(bring(database, message, 20).await, Migrated::Stored);
    }
    assert_eq!(storage.push_targets(&default(), &[id("A"), id("A:jo")]).await.unwrap().len(), 2);
}

pub(crate) async fn an_authenticate_of_a_migrated_device_is_a_re_enrollment(database: &Database) {
    for message in all("A") {
        bring(database, message, 0).await;
    }
    let done = database.try_authenticate(authenticate("A", "new", 10)).await;
    assert_eq!(done, Authenticated::Stored { re_enrolling: true });
    refused(database, brought_token_update("A", "magic"), "it has come here itself").await;
}

pub(crate) async fn other_messages_than_those_that_are_kept_are_refused(database: &Database) {
    bring(database, brought_authenticate("A", "1A"), 0).await;
    for message_type in ["CheckOut", "GetBootstrapToken", "UserAuthenticate"] {
        refused(database, message(message_type, "A", &[("UserID", "jo".into()), ("UserShortName", "jo".into())]), message_type).await;
    }
    let of_a_user = [("UserID", Value::from("jo")), ("UserShortName", "jo".into()), ("Topic", TOPIC.into())];
    refused(database, message("Authenticate", "A", &of_a_user), "device channel").await;
}
