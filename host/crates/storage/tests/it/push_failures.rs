use crate::fixture::*;
use wasmdm_storage::push_failures::{PushAttempt, PushFailure};

/// Of the token that the fixture's devices enroll with.
fn failed(device: &str, code: &str, token_is_dead: bool) -> PushAttempt {
    failed_with(device, 1, code, &format!("{code}: a sentence"), token_is_dead)
}

fn failed_with(device: &str, told: i64, code: &str, detail: &str, token_is_dead: bool) -> PushAttempt {
    let failure = PushFailure { code: code.to_owned(), detail: detail.to_owned(), fault: "device", token_is_dead };
    PushAttempt { id: id(device), told_at: at(told), failure: Some(failure) }
}

fn went_well(device: &str) -> PushAttempt {
    PushAttempt { id: id(device), told_at: at(1), failure: None }
}

async fn record(database: &Database, attempts: Vec<PushAttempt>, millis: i64) {
    database.storage().record_pushes(&default(), attempts, at(millis)).await.unwrap();
}

/// The loudest complaint about push is that nobody is told when it fails; a message for each attempt would be as useless.
pub(crate) async fn a_failure_is_told_once_for_each_reason_and_ends_with_a_push_that_goes_well(database: &Database) {
    database.enroll("A").await;
    database.subscribe("plugin:p", &["push.failed"]).await;
    record(database, vec![failed("A", "BadDeviceToken", false), failed("unknown", "BadDeviceToken", false)], 10).await;
    record(database, vec![failed("A", "BadDeviceToken", false)], 20).await;
    let failing = database.storage().failing_push(&default(), &id("A")).await.unwrap().unwrap();
    assert_eq!((failing.code.as_str(), failing.failures, failing.first_at, failing.last_at), ("BadDeviceToken", 2, at(10), at(20)));
    record(database, vec![failed("A", "TooManyRequests", false)], 30).await;
    let deliveries = database.drain(50).await;
    let codes: Vec<_> = deliveries.iter().map(|delivery| delivery.event.data["push"]["code"].as_str().unwrap()).collect();
    assert_eq!(codes, ["BadDeviceToken", "TooManyRequests"]);
    database.restart().await;
    assert_eq!(database.storage().count_failing_pushes().await.unwrap(), [("TooManyRequests".to_owned(), 1)]);
    record(database, vec![went_well("A")], 40).await;
    assert_eq!(database.storage().failing_push(&default(), &id("A")).await.unwrap(), None);
    assert_eq!(database.count_rows("push_failures").await, 0);
}

/// Edge case 51. A token that Apple does not know any more is not pushed to; the next TokenUpdate brings another.
pub(crate) async fn a_dead_token_is_left_alone_until_the_device_tells_another(database: &Database) {
    database.enroll("A").await;
    let dead = async || database.storage().push_targets(&default(), &[id("A")]).await.unwrap()[0].dead.clone();
    assert_eq!(dead().await, None);
    record(database, vec![failed("A", "Unregistered", true)], 10).await;
    assert_eq!(dead().await.as_deref(), Some("Unregistered"));
    database.token_update("A", 20).await;
    assert_eq!(dead().await, None);
    assert_eq!(database.count_rows("push_failures").await, 0);
}

/// A push was under way when the device told another token: Apple's answer about the old one, which came after it, kept the new one from ever
/// being pushed to.
pub(crate) async fn what_is_said_of_a_token_that_was_left_behind_counts_for_nothing(database: &Database) {
    database.enroll("A").await;
    database.subscribe("plugin:p", &["push.failed"]).await;
    let told_at = database.storage().push_targets(&default(), &[id("A")]).await.unwrap()[0].told_at;
    assert_eq!(told_at, at(1));
    database.token_update("A", 20).await;
    record(database, vec![failed("A", "Unregistered", true)], 30).await;
    assert_eq!(database.storage().push_targets(&default(), &[id("A")]).await.unwrap()[0].dead, None);
    assert_eq!(database.drain_topics(40).await, Vec::<String>::new());
    // Nor does a success with the old one make up for a failure with the new one.
    record(database, vec![failed_with("A", 20, "BadDeviceToken", "told", false)], 50).await;
    record(database, vec![went_well("A")], 60).await;
    assert_eq!(database.storage().failing_push(&default(), &id("A")).await.unwrap().unwrap().code, "BadDeviceToken");
}

/// Memory hears of a failure when it is committed; a success that was recorded with it, in one transaction, left it standing.
pub(crate) async fn a_success_that_is_recorded_right_behind_a_failure_ends_it(database: &Database) {
    use sqlx::Connection as _;
    database.enroll("A").await;
    // Nothing is written while somebody else holds the database, so what waits is written together.
    let mut other = sqlx::sqlite::SqliteConnection::connect(&database.url()).await.unwrap();
    sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut other).await.unwrap();
    let (storage, tenant) = (database.storage(), default());
    let release = async {
        // Polled last: all three wait by now.
        sqlx::raw_sql("COMMIT").execute(&mut other).await.unwrap();
    };
    let (first, failure, success, ()) = tokio::join!(
        storage.record_pushes(&tenant, vec![failed("A", "TooManyRequests", false)], at(5)),
        storage.record_pushes(&tenant, vec![failed("A", "BadDeviceToken", false)], at(10)),
        storage.record_pushes(&tenant, vec![went_well("A")], at(20)),
        release
    );
    first.and(failure).and(success).unwrap();
    other.close().await.unwrap();
    assert_eq!(storage.failing_push(&tenant, &id("A")).await.unwrap(), None);
    assert_eq!(database.count_rows("push_failures").await, 0);
}

/// Apple's newer reasons have no code here; a second one passed for the first, and nobody was told.
pub(crate) async fn another_unknown_reason_is_told_too(database: &Database) {
    database.enroll("A").await;
    database.subscribe("plugin:p", &["push.failed"]).await;
    for (millis, detail) in [(10, "OneReason (HTTP status 400)"), (20, "OneReason (HTTP status 400)"), (30, "Another (HTTP status 400)")] {
        record(database, vec![failed_with("A", 1, "unknown", detail, false)], millis).await;
    }
    let deliveries = database.drain(50).await;
    let details: Vec<_> = deliveries.iter().map(|delivery| delivery.event.data["push"]["detail"].as_str().unwrap()).collect();
    assert_eq!(details, ["OneReason (HTTP status 400)", "Another (HTTP status 400)"]);
    let failing = database.storage().failing_push(&default(), &id("A")).await.unwrap().unwrap();
    assert_eq!((failing.failures, failing.first_at), (1, at(30)));
}
