//! Each invariant, broken by hand, is found.

use crate::fixture::*;
use std::collections::BTreeSet;
use wasmdm_protocol::report::Status;
use wasmdm_storage::check::INVARIANTS;
use wasmdm_storage::effects::{KvWrite, PluginEffects, TimerChange};
use wasmdm_storage::outbox::Completion;
use wasmdm_storage::push_certificates::StorePushCertificate;

/// A database in which every table has a row.
pub(crate) async fn inhabited(database: Database) -> Database {
    let storage = database.storage();
    database.subscribe("plugin:p", &["*"]).await;
    let mut message = authenticate("A", "A", 0);
    message.quarantined_by = Some("p".to_owned());
    database.try_authenticate(message).await;
    let mut update = token_update("A", 1);
    update.unlock_token = Some("unlock".into());
    storage.token_update(update).await.unwrap();
    database.enroll_user("A", "jo").await;
    storage.keep_user_verdict(crate::user_verdicts::given("jo", "token")).await.unwrap();
    for uuid in ["C1", "C2", "C3"] {
        database.queue("A", uuid).await;
    }
    database.poll("A").await;
    database.report("A", "C1", Status::Acknowledged).await;
    database.report("A", "unknown", Status::Acknowledged).await;
    storage.begin_mass_push(crate::mass_pushes::mass_push("M", &["A"])).await.unwrap();
    let certificate = crate::push_certificates::certificate(TOPIC, 9);
    let certificate = StorePushCertificate { certificate_pem: "c".to_owned(), private_key_pem: "k".to_owned(), ..certificate };
    storage.store_push_certificate(certificate).await.unwrap();
    let write = KvWrite { key: "k".to_owned(), value: Some("v".into()), version: "1".to_owned(), expires_at: None };
    let timer = TimerChange::Set { name: "t".to_owned(), who: None, at: at(100), data: "d".into() };
    let audit = wasmdm_storage::audit::AuditRow {
        tenant: default(),
        actor: "server".to_owned(),
        action: "test".to_owned(),
        target: None,
        detail: serde_json::json!({}),
        at: at(0),
    };
    let effects = PluginEffects { writes: vec![write], timers: vec![timer], ..effects("p") };
    storage.record_decision(vec![required(effects)], vec![audit], at(0)).await.unwrap();
    let (lease, delivery) = database.take(50).await;
    let dead = Completion::Dead { error: "never".to_owned(), by: serde_json::json!({}) };
    storage.complete(&lease, &delivery, dead, at(50)).await.unwrap();
    storage.close().await.unwrap();
    database
}

/// The invariant, and a statement that breaks it.
const BREAKS: &[(&str, &str)] = &[
    ("references", "UPDATE push_topics SET tenant_id = 'nobody'"),
    ("enrollment-state", "UPDATE enrollments SET state = 'asleep' WHERE id = 'A'"),
    ("enrollment-kind", "UPDATE enrollments SET kind = 'toaster' WHERE id = 'A'"),
    ("enrollment-kind", "UPDATE enrollments SET parent_id = NULL WHERE id = 'A:jo'"),
    ("enrolled-push", "UPDATE enrollments SET push_token = NULL WHERE id = 'A'"),
    ("not-enrolled-push", "UPDATE enrollments SET state = 'checked-out' WHERE id = 'A:jo'"),
    ("enrolled-parent", "UPDATE enrollments SET state = 'checked-out' WHERE id = 'A'"),
    ("binding-enrollment", "UPDATE certificate_bindings SET enrollment_id = 'ghost'"),
    ("binding-single", "UPDATE certificate_bindings SET replaced = 1"),
    ("binding-single", "DELETE FROM certificate_bindings"),
    ("binding-renewal", "UPDATE certificate_bindings SET pending = 1, replaced = 1"),
    ("quarantine-tag", "DELETE FROM enrollment_tags"),
    ("topic-tenant", "UPDATE push_topics SET tenant_id = 'nobody'"),
    ("queue-command", "DELETE FROM commands WHERE uuid = 'C2'"),
    ("queue-enrollment", "UPDATE command_queue SET enrollment_id = 'ghost' WHERE command_uuid = 'C3'"),
    ("queue-state", "UPDATE command_queue SET state = 'lost' WHERE command_uuid = 'C2'"),
    ("queue-state", "UPDATE command_queue SET is_open = 1 WHERE command_uuid = 'C1'"),
    ("queue-sent", "UPDATE command_queue SET deliveries = 0 WHERE state = 'sent'"),
    ("queue-result", "DELETE FROM command_results"),
    ("queue-result", "UPDATE command_results SET command_uuid = 'C2'"),
    ("queue-acknowledged", "UPDATE command_results SET status = 'Error'"),
    ("result-command", "UPDATE command_results SET command_uuid = 'ghost'"),
    ("sequence-order", "UPDATE sqlite_sequence SET seq = 1 WHERE name = 'command_queue'"),
    ("sequence-order", "UPDATE sqlite_sequence SET seq = 1 WHERE name = 'deliveries'"),
    ("delivery-event", "DELETE FROM events"),
    ("delivery-state", "UPDATE deliveries SET state = 'done' WHERE is_open = 1"),
    ("delivery-partition", "UPDATE partitions SET ready_at = NULL"),
    ("partition-lease", "UPDATE partitions SET ready_at = NULL"),
    ("mass-push-target", "UPDATE wakes SET asked = 0"),
    ("key-value-size", "UPDATE plugin_key_values SET size = size + 1"),
    ("key-value-usage", "UPDATE plugin_key_value_usage SET bytes = bytes + 1"),
    ("key-value-usage", "UPDATE plugin_key_value_usage SET pairs = pairs + 1"),
    ("key-value-usage", "DELETE FROM plugin_key_values"),
];

/// As [`BREAKS`], in a sealed database.
const BREAKS_OF_SEALS: &[(&str, &str)] = &[
    ("sealed", "UPDATE enrollments SET push_token = (SELECT push_token FROM enrollments WHERE id = 'A:jo') WHERE id = 'A'"),
    ("sealed", "UPDATE enrollments SET push_token = push_magic WHERE id = 'A'"),
    ("sealed", "UPDATE commands SET uuid = 'C9' WHERE uuid = 'C2'"),
    ("sealed", "UPDATE audit SET at = at + 1"),
    ("sealed", "UPDATE user_verdicts SET enrollment_id = 'A:al'"),
    ("sealed", "UPDATE orphan_reports SET tenant_id = 'other'"),
    ("format-commands-body", "DELETE FROM sealing_keys"),
];

async fn found(database: &Database) -> BTreeSet<&'static str> {
    let reader = wasmdm_storage::Storage::open_read_only_with_keys(&database.url(), database.keyring()).await.unwrap();
    let findings = reader.check().await.unwrap();
    reader.close().await.unwrap();
    assert!(findings.iter().all(|finding| !finding.what.is_empty() && !finding.sentence.is_empty()));
    findings.into_iter().map(|finding| finding.invariant).collect()
}

async fn assert_found(name: &'static str, statement: &str) {
    assert_found_in(Database::sqlite().await, name, statement).await;
}

async fn assert_found_in(database: Database, name: &'static str, statement: &str) {
    let database = inhabited(database).await;
    assert_eq!(found(&database).await, BTreeSet::new(), "before");
    database.meddle(statement).await;
    assert!(found(&database).await.contains(name), "`{statement}` breaks {name}");
}

const OPERATIONS: &str = include_str!("../../../../../docs/operations.md");

#[tokio::test]
async fn each_invariant_is_looked_for() {
    for (name, statement) in BREAKS {
        assert_found(name, statement).await;
    }
    for (name, statement) in BREAKS_OF_SEALS {
        assert_found_in(Database::sealed().await, name, statement).await;
    }
}

#[tokio::test]
async fn an_unknown_format_byte_is_found_in_every_column() {
    for invariant in INVARIANTS {
        let Some(column) = invariant.name.strip_prefix("format-") else {
            continue;
        };
        let (table, column) = column.split_once('-').unwrap();
        // The last one is sealed under a key that the database does not know.
        for blob in ["x'07aabb'".to_owned(), "x''".to_owned(), format!("x'01{}'", "00".repeat(60))] {
            assert_found(invariant.name, &format!("UPDATE {table} SET {column} = {blob} WHERE {column} IS NOT NULL")).await;
        }
    }
}

#[tokio::test]
async fn every_invariant_stands_in_the_documents_and_has_a_test_that_breaks_it() {
    let broken: BTreeSet<_> = BREAKS.iter().chain(BREAKS_OF_SEALS).map(|(name, _)| *name).collect();
    for invariant in INVARIANTS {
        let covered = broken.contains(invariant.name) || invariant.name.starts_with("format-") || invariant.name == "file";
        assert!(covered, "{}", invariant.name);
        let said = format!("`{}`: {}.", invariant.name, invariant.sentence);
        let is_listed = OPERATIONS.contains(&said) || invariant.name.starts_with("format-") && OPERATIONS.contains(invariant.name);
        assert!(is_listed, "docs/operations.md does not have: {said}");
    }
}

#[tokio::test]
async fn a_damaged_file_is_found() {
    let database = inhabited(Database::sqlite().await).await;
    // The pages of an index that the schema no longer knows.
    database.meddle("PRAGMA writable_schema = ON; DELETE FROM sqlite_schema WHERE name = 'enrollments_serial_number'").await;
    assert!(found(&database).await.contains("file"));
}
