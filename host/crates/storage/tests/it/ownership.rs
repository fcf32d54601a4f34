//! What only a database file has: its owner, and readers beside it.

use crate::fixture::*;
use wasmdm_protocol::report::Status;
use wasmdm_storage::{OpenOptions, Storage, StorageError};

#[tokio::test]
async fn a_second_server_is_refused_by_name_of_the_lock_file() {
    let database = Database::sqlite().await;
    let second = Storage::open(OpenOptions { url: database.url(), now: at(0) }).await;
    let Err(StorageError::Owned { reason }) = second else {
        panic!("{second:?}");
    };
    assert!(reason.contains("wasmdm.db.lock"), "{reason}");
    database.storage().close().await.unwrap();
    let third = Storage::open(OpenOptions { url: database.url(), now: at(0) }).await.unwrap();
    third.close().await.unwrap();
}

/// Two names of one file had two locks.
#[tokio::test]
async fn a_link_to_the_database_leads_to_the_same_lock() {
    let database = Database::sqlite().await;
    let link = database.directory.path().join("link.db");
    std::os::unix::fs::symlink(database.url().replace("sqlite://", ""), &link).unwrap();
    let second = Storage::open(OpenOptions { url: format!("sqlite://{}", link.display()), now: at(0) }).await;
    assert!(matches!(second, Err(StorageError::Owned { .. })), "{second:?}");
}

#[tokio::test]
async fn a_reader_is_welcome_beside_the_server_and_cannot_write() {
    let database = Database::sqlite().await;
    database.enroll("A").await;
    let reader = Storage::open_read_only(&database.url()).await.unwrap();
    assert!(reader.enrollment(&id("A")).await.unwrap().is_some());
    assert_eq!(reader.check().await.unwrap(), []);
    database.queue("A", "C1").await;
    assert_eq!(reader.pending_commands(&default(), &id("A")).await.unwrap().len(), 1);
    let refused = reader.authenticate(authenticate("B", "B", 0)).await;
    assert!(matches!(refused, Err(StorageError::Unavailable { .. })));
    reader.close().await.unwrap();
    assert_eq!(database.poll("A").await.as_deref(), Some("C1"));
}

#[tokio::test]
async fn what_is_no_database_of_ours_is_not_opened() {
    let directory = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}/missing.db", directory.path().display());
    assert!(matches!(Storage::open_read_only(&url).await, Err(StorageError::Unavailable { .. })));
    std::fs::write(directory.path().join("missing.db"), b"").unwrap();
    assert!(matches!(Storage::open_read_only(&url).await, Err(StorageError::Corrupt { .. })));
    std::fs::write(directory.path().join("text.db"), "no database, but long enough to be looked at as one. ".repeat(40)).unwrap();
    let url = format!("sqlite://{}/text.db", directory.path().display());
    assert!(Storage::open(OpenOptions { url, now: at(0) }).await.is_err());
}

#[tokio::test]
async fn a_database_of_a_newer_server_is_refused() {
    let database = Database::sqlite().await;
    database.storage().close().await.unwrap();
    database
        .meddle("INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) VALUES (999, 'future', 1, x'00', 0)")
        .await;
    let opened = Storage::open(OpenOptions { url: database.url(), now: at(0) }).await;
    assert!(matches!(&opened, Err(StorageError::Corrupt { reason }) if reason.contains("newer")), "{opened:?}");
    assert!(matches!(Storage::open_read_only(&database.url()).await, Err(StorageError::Corrupt { .. })));
}

#[tokio::test]
async fn what_waits_at_the_end_is_written_and_then_nothing_more() {
    let database = Database::sqlite().await;
    database.enroll("A").await;
    let storage = database.storage();
    let (queued, closed) = tokio::join!(database.queue("A", "C1"), storage.close());
    let () = queued;
    closed.unwrap();
    let refused = storage.report(report("A", "C1", Status::Acknowledged), false).await;
    assert!(matches!(refused, Err(StorageError::Unavailable { .. })));
}

#[tokio::test]
async fn the_files_are_readable_by_their_owner_only() {
    use std::os::unix::fs::PermissionsExt as _;
    let database = Database::sqlite().await;
    database.enroll("A").await;
    let path = database.url().replace("sqlite://", "");
    for suffix in ["", "-wal", "-shm", ".lock"] {
        let mode = std::fs::metadata(format!("{path}{suffix}")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{suffix}");
    }
}
