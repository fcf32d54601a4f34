//! The life of a database under keys: plain, sealed, under another key, plain again.

use crate::check::inhabited;
use crate::fixture::*;
use std::path::Path;
use wasmdm_storage::commands::{CommandOptions, EnqueueOutcome};
use wasmdm_storage::keyring::{Keyring, add_new_key};
use wasmdm_storage::{OpenOptions, Storage, StorageError};

fn options(database: &Database) -> OpenOptions {
    OpenOptions { url: database.url(), now: at(0) }
}

fn key_file(database: &Database) -> std::path::PathBuf {
    database.directory.path().join("keys")
}

/// Until every value is under the key of that name and no other is needed.
async fn until_sealed(storage: &Storage, name: &str) {
    loop {
        let keys = storage.sealing_keys().await.unwrap();
        if keys.len() == 1 && keys[0].name == name && keys[0].is_complete {
            return;
        }
        tokio::task::yield_now().await;
    }
}

async fn assert_all_is_there(storage: &Storage) {
    assert_eq!(storage.unlock_token(&default(), &id("A")).await.unwrap().as_deref(), Some(&b"unlock"[..]));
    let targets = storage.push_targets(&default(), &[id("A")]).await.unwrap();
    assert_eq!((targets[0].push_magic.as_str(), &*targets[0].token), ("secret-magic", &b"secret-push-token"[..]));
    assert!(storage.command_status(&default(), &id("A"), "C1").await.unwrap().unwrap().report.is_some());
    assert_eq!(storage.push_certificate(&default(), TOPIC).await.unwrap().unwrap().private_key_pem, "k");
    assert_eq!(storage.dead_letters(&default(), None, 10).await.unwrap()[0].error, "never");
    assert_eq!(storage.check().await.unwrap(), []);
}

/// Whether the bytes stand in the database, in what is beside it, or in a copy of it.
async fn stands_in_files(database: &Database, wanted: &[u8]) -> bool {
    let path = database.url().replace("sqlite://", "");
    let copy = database.directory.path().join("copy");
    let reader = Storage::open_read_only(&database.url()).await.unwrap();
    reader.backup(&copy).await.unwrap();
    reader.close().await.unwrap();
    let files = [format!("{path}-wal"), path, copy.to_string_lossy().into_owned()];
    let found = files.iter().any(|file| std::fs::read(file).is_ok_and(|content| content.windows(wanted.len()).any(|window| window == wanted)));
    std::fs::remove_file(Path::new(&copy)).unwrap();
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plain_database_is_sealed_beside_the_work_and_left_plain_again_by_a_person() {
    let database = inhabited(Database::sqlite().await).await;
    assert!(stands_in_files(&database, b"secret-push-token").await);
    let reader = Storage::open_read_only(&database.url()).await.unwrap();
    let before = reader.sealing_census().await.unwrap();
    assert!(before.plain > 15 && before.sealed.is_empty(), "{before:?}");
    reader.close().await.unwrap();

    database.rotate("2026").await;
    until_sealed(&database.storage(), "2026").await;
    assert_all_is_there(&database.storage()).await;
    let after = database.storage().sealing_census().await.unwrap();
    assert_eq!((after.plain, after.sealed.values().sum::<u64>()), (0, before.plain));
    // The same command again is known by its digest, which was made without a key.
    let again = database.queue_with("A", "C2", "DeviceInformation", CommandOptions::default(), "api:test").await;
    assert_eq!(again, EnqueueOutcome::AlreadyQueued { uuid: "C2".to_owned() });
    assert!(!database.storage().sealing_keys().await.unwrap()[0].is_clean);
    database.storage().close().await.unwrap();

    let resealed = Storage::reseal(options(&database), database.keyring(), false).await.unwrap();
    assert_eq!(resealed, 0, "only the file is written anew");
    for secret in ["secret-push-token", "secret-magic"] {
        assert!(!stands_in_files(&database, secret.as_bytes()).await, "{secret}");
    }
    let reader = Storage::open_read_only_with_keys(&database.url(), database.keyring()).await.unwrap();
    assert!(reader.sealing_keys().await.unwrap()[0].is_clean);
    reader.close().await.unwrap();

    let made_plain = Storage::reseal(options(&database), database.keyring(), true).await.unwrap();
    assert!(made_plain >= before.plain, "{made_plain}");
    let plain = Storage::open(options(&database)).await.unwrap();
    assert_all_is_there(&plain).await;
    assert_eq!(plain.sealing_keys().await.unwrap(), []);
    plain.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_rotation_the_old_key_can_go() {
    let database = inhabited(Database::sealed().await).await;
    let before = database.keyring();
    database.rotate("second").await;
    until_sealed(&database.storage(), "second").await;
    assert_all_is_there(&database.storage()).await;
    assert_eq!(database.storage().sealing_census().await.unwrap().sealed.len(), 1);
    database.storage().close().await.unwrap();

    let text = std::fs::read_to_string(key_file(&database)).unwrap();
    std::fs::write(key_file(&database), text.lines().next().unwrap()).unwrap();
    let alone = Storage::open_with_keys(options(&database), Keyring::from_file(&key_file(&database)).unwrap()).await.unwrap();
    assert_all_is_there(&alone).await;
    alone.close().await.unwrap();
    let refused = Storage::open_with_keys(options(&database), before).await;
    assert!(matches!(&refused, Err(StorageError::Key { reason }) if reason.contains("`second`")), "{refused:?}");
}

/// A rotation that is taken back before it is over, which is the same as one more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sealing_anew_goes_on_after_every_interruption() {
    let database = inhabited(Database::sealed().await).await;
    let before = database.keyring();
    add_new_key(&key_file(&database), "second").unwrap();
    let both = Keyring::from_file(&key_file(&database)).unwrap();
    for keyring in [&both, &before, &both] {
        match Storage::open_with_keys(options(&database), keyring.clone()).await {
            Ok(storage) => storage.close().await.unwrap(),
            // It has come so far that the new key is needed.
            Err(error) => assert!(matches!(error, StorageError::Key { .. }), "{error}"),
        }
    }
    let storage = Storage::open_with_keys(options(&database), both).await.unwrap();
    until_sealed(&storage, "second").await;
    assert_all_is_there(&storage).await;
    storage.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sealed_database_is_not_opened_without_its_key() {
    let database = inhabited(Database::sealed().await).await;
    let other = database.directory.path().join("other");
    add_new_key(&other, "first").unwrap();
    for keyring in [Keyring::default(), Keyring::from_file(&other).unwrap()] {
        let refused = Storage::open_with_keys(options(&database), keyring.clone()).await;
        let Err(error @ StorageError::Key { .. }) = refused else { panic!("{refused:?}") };
        assert!(error.to_string().starts_with("key-file: ") && error.to_string().contains("`first`"), "{error}");
        assert!(matches!(Storage::reseal(options(&database), keyring, true).await, Err(StorageError::Key { .. })));
    }
    assert!(matches!(Storage::open_read_only_with_keys(&database.url(), Keyring::from_file(&other).unwrap()).await, Err(StorageError::Key { .. })));
    // Who only counts or copies needs no key; a value is not had without.
    let reader = Storage::open_read_only(&database.url()).await.unwrap();
    assert_eq!(reader.check().await.unwrap(), []);
    assert!(matches!(reader.unlock_token(&default(), &id("A")).await, Err(StorageError::Key { .. })));
    reader.close().await.unwrap();
    // It was not harmed by the attempts.
    let storage = Storage::open_with_keys(options(&database), database.keyring()).await.unwrap();
    assert_all_is_there(&storage).await;
    storage.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_sealed_anew_while_a_server_runs() {
    let database = Database::sealed().await;
    let refused = Storage::reseal(options(&database), database.keyring(), false).await;
    assert!(matches!(refused, Err(StorageError::Owned { .. })), "{refused:?}");
    database.storage().close().await.unwrap();
}

/// A value that somebody has damaged does not keep the others from being sealed, and is never said to be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_that_does_not_open_is_left_as_it_is() {
    let database = inhabited(Database::sealed().await).await;
    database.meddle("UPDATE enrollments SET push_token = push_magic WHERE id = 'A'").await;
    add_new_key(&key_file(&database), "second").unwrap();
    let both = Keyring::from_file(&key_file(&database)).unwrap();
    let resealed = Storage::reseal(options(&database), both.clone(), false).await;
    assert!(matches!(&resealed, Err(StorageError::Corrupt { reason }) if reason.contains("1 values")), "{resealed:?}");
    let reader = Storage::open_read_only_with_keys(&database.url(), both).await.unwrap();
    assert_eq!(reader.sealing_keys().await.unwrap().len(), 2);
    let census = reader.sealing_census().await.unwrap();
    assert_eq!(census.sealed.values().min(), Some(&1), "{census:?}");
    reader.close().await.unwrap();
}
