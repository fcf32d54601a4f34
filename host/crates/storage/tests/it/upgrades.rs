//! What a newer version makes of what an older one has written.

use crate::fixture::*;
use wasmdm_storage::commands::CommandOptions;
use wasmdm_storage::enrollments::Authenticated;

/// The database as version 6 of its schema had it, with what that one should not have kept.
const AS_BEFORE: &str = "DROP TABLE user_verdicts; ALTER TABLE certificate_bindings DROP COLUMN pending; \
    ALTER TABLE enrollments DROP COLUMN erase_command_uuid; DELETE FROM _sqlx_migrations WHERE version = 10; \
    UPDATE enrollments SET decisions = '[{\"plugin\":\"a\",\"verdict\":\"allow\"},{\"plugin\":\"b\",\"verdict\":\"quarantine\",\"reason\":\"stolen\"}]' \
    WHERE id = 'A'; \
    INSERT INTO enrollment_tokens SELECT tenant_id, 'A:jo', name, token, stored_at FROM enrollment_tokens WHERE enrollment_id = 'A'; \
    INSERT INTO push_failures SELECT id, tenant_id, 'Unregistered', '', 1, 1, 0, 0 FROM enrollments";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_clears_what_should_not_have_been_kept_and_knows_who_is_being_wiped() {
    let database = Database::sqlite().await;
    let storage = database.storage();
    database.authenticate("A", 0).await;
    let mut update = token_update("A", 1);
    update.unlock_token = Some("unlock".into());
    storage.token_update(update).await.unwrap();
    database.enroll_user("A", "jo").await;
    database.authenticate("LEFT", 0).await;
    for device in ["WIPED", "FAILED"] {
        database.enroll(device).await;
        let options = CommandOptions { renews_identity: true, ..CommandOptions::default() };
        database.queue_with(device, &format!("R-{device}"), "InstallProfile", options, "api:test").await;
        database.queue_with(device, &format!("E-{device}"), "EraseDevice", CommandOptions::default(), "api:test").await;
        assert_eq!(database.poll(device).await, Some(format!("R-{device}")));
        let (_, next) = database.report(device, &format!("R-{device}"), wasmdm_protocol::report::Status::Acknowledged).await;
        assert_eq!(next, Some(format!("E-{device}")));
    }
    database.report("FAILED", "E-FAILED", wasmdm_protocol::report::Status::Error).await;
    storage.cancel_command(&default(), &id("WIPED"), "E-WIPED", at(35)).await.unwrap();
    storage.close().await.unwrap();
    database.meddle(AS_BEFORE).await;

    database.restart().await;

    database.assert_sound().await;
    let storage = database.storage();
    let decisions = serde_json::json!([{ "plugin": "a", "verdict": "allow" }, { "plugin": "b", "verdict": "quarantine" }]);
    assert_eq!(storage.decisions(&id("A")).await.unwrap(), Some(decisions));
    assert!(storage.unlock_token(&default(), &id("A")).await.unwrap().is_some());
    assert_eq!(database.count_rows("enrollment_tokens").await, 1);
    assert_eq!(database.count_rows("push_failures").await, 4, "those of channels that are enrolled");
    let done = database.try_authenticate(authenticate("WIPED", "WIPED-2", 40)).await;
    assert_eq!(done, Authenticated::Stored { re_enrolling: true });
    let done = database.try_authenticate(authenticate("FAILED", "FAILED-2", 40)).await;
    assert_eq!(done, Authenticated::Renewed);
}
