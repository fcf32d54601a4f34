//! The statements of the hot path find their rows by an index, however large the tables are.

use crate::sql::args;
use crate::{OpenOptions, Storage, certificate_bindings, commands, enrollments, maintenance, mass_pushes, outbox, push_failures, timers, wakes};
use sqlx::{AssertSqlSafe, Connection, Row};
use wasmdm_protocol::time::Timestamp;

/// The statement, and the index that it must use.
const HOT: &[(&str, &str)] = &[
    // poll and report
    (commands::SELECT_NEXT, "command_queue_open"),
    (commands::CLEAR_NOT_NOW, "command_queue_open"),
    (commands::HAS_OPEN, "command_queue_open"),
    (commands::HAS_DEFERRED, "command_queue_open"),
    (wakes::SELECT_DUE, "wakes_due"),
    (mass_pushes::CLOSE, "mass_push_targets_waiting"),
    (mass_pushes::SELECT_UNFINISHED, "mass_pushes_unfinished"),
    (mass_pushes::COUNT, "COVERING INDEX mass_push_targets_state"),
    (mass_pushes::COUNT_FAILURES, "COVERING INDEX mass_push_targets_failed"),
    (mass_pushes::SELECT_FAILED, "COVERING INDEX mass_push_targets_failed"),
    (mass_pushes::SELECT_PAGE, "sqlite_autoindex_enrollments_2"),
    (commands::SELECT_QUEUED, "command_queue_command"),
    (commands::SELECT_SENT_TO, "command_queue_by_command"),
    (commands::SELECT_LAST_SENT, "command_queue_open"),
    (commands::SELECT_EXPIRED, "command_queue_expiring"),
    (commands::SELECT_COLLAPSED, "command_queue_collapse"),
    (commands::SELECT_BY_KEY, "command_queue_idempotency"),
    (commands::FORGET_KEYS, "command_queue_idempotency"),
    (commands::SELECT_OPEN_OF_DEVICE, "command_queue_open"),
    (certificate_bindings::SELECT_BINDING, "sqlite_autoindex_certificate_bindings_1"),
    // outbox
    (outbox::SELECT_READY, "partitions_ready"),
    (outbox::SELECT_READY_OF, "partitions_ready_of"),
    (outbox::SELECT_NEXT_SUBSCRIBER, "partitions_ready_of"),
    (outbox::RELEASE_IF_EMPTY, "deliveries_partition"),
    (outbox::SELECT_DUE, "partitions_ready"),
    (outbox::SELECT_DUE_AFTER, "partitions_ready"),
    (outbox::SELECT_DELIVERY, "deliveries_partition"),
    (outbox::SELECT_LAG, "deliveries_open"),
    (outbox::RELEASE, "deliveries_partition"),
    (timers::SELECT_DUE_TIMERS, "timers_due"),
    (timers::SELECT_DUE_CRON, "cron_entries_due"),
    // metrics
    (enrollments::COUNT_BY_STATE, "enrollments_state"),
    (push_failures::COUNT, "push_failures_code"),
    // clearing away
    (maintenance::SELECT_OLD, "deliveries_finished"),
    (maintenance::SELECT_EXPIRED_PAIR, "plugin_key_values_expiring"),
    (mass_pushes::SELECT_OLD, "mass_pushes_created"),
];

/// Without an index for queue and certificates (PostgreSQL) every poll read all rows; in memory and in files every Authenticate read all keys.
/// NanoMDM defect 12. NanoMDM defect 14. Edge case 43.
#[tokio::test]
async fn hot_statements_use_their_indexes_and_scan_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}/test.db", directory.path().display());
    let storage = Storage::open(OpenOptions { url: url.clone(), now: Timestamp::from_millis(0) }).await.unwrap();
    storage.read_one("SELECT 1", args![]).await.unwrap();
    let mut connection = sqlx::sqlite::SqliteConnection::connect(&url).await.unwrap();
    for (statement, index) in HOT {
        let mut explain = sqlx::query(AssertSqlSafe(format!("EXPLAIN QUERY PLAN {statement}")));
        for _ in 0..statement.matches('?').count() {
            explain = explain.bind(1_i64);
        }
        let rows = explain.fetch_all(&mut connection).await.unwrap();
        let plan: Vec<String> = rows.iter().map(|row| row.get::<String, _>("detail")).collect();
        assert!(plan.iter().any(|step| step.contains(index)), "{statement}\n{plan:#?}");
        let scans = plan.iter().filter(|step| step.starts_with("SCAN") && !step.contains(index)).collect::<Vec<_>>();
        assert!(scans.is_empty(), "{statement}\n{plan:#?}");
    }
    storage.close().await.unwrap();
}

/// The rows of a queue come in order out of the index; sorting would read all of them for one.
#[tokio::test]
async fn the_next_command_is_not_sorted_for() {
    let directory = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}/test.db", directory.path().display());
    let storage = Storage::open(OpenOptions { url: url.clone(), now: Timestamp::from_millis(0) }).await.unwrap();
    let mut connection = sqlx::sqlite::SqliteConnection::connect(&url).await.unwrap();
    for statement in [commands::SELECT_NEXT, outbox::SELECT_DELIVERY, outbox::SELECT_READY, outbox::SELECT_READY_OF, commands::SELECT_EXPIRED] {
        let mut explain = sqlx::query(AssertSqlSafe(format!("EXPLAIN QUERY PLAN {statement}")));
        for _ in 0..statement.matches('?').count() {
            explain = explain.bind(1_i64);
        }
        let rows = explain.fetch_all(&mut connection).await.unwrap();
        assert!(rows.iter().all(|row| !row.get::<String, _>("detail").contains("TEMP B-TREE")), "{statement}");
    }
    storage.close().await.unwrap();
}
