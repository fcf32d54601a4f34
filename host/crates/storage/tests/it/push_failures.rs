use crate::fixture::*;
use wasmdm_storage::push_failures::{PushAttempt, PushFailure};

fn failed(device: &str, code: &str, token_is_dead: bool) -> PushAttempt {
    let failure = PushFailure { code: code.to_owned(), detail: format!("{code}: a sentence"), fault: "device", token_is_dead };
    PushAttempt { id: id(device), failure: Some(failure) }
}

fn went_well(device: &str) -> PushAttempt {
    PushAttempt { id: id(device), failure: None }
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
    assert_eq!(dead().await.as_deref(), Some("Unregistered: a sentence"));
    database.token_update("A", 20).await;
    assert_eq!(dead().await, None);
    assert_eq!(database.count_rows("push_failures").await, 0);
}
