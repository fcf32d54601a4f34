use crate::fixture::*;
use wasmdm_storage::enrollments::Authenticated;

/// Edge case 23.
pub(crate) async fn a_certificate_belongs_to_one_enrollment(database: &Database) {
    database.enroll("A").await;
    let done = database.try_authenticate(authenticate("B", "A", 5)).await;
    assert!(matches!(done, Authenticated::Refused { .. }));
    assert!(database.storage().enrollment(&id("B")).await.unwrap().is_none());
    let binding = database.storage().certificate_binding(&certificate("A").identity).await.unwrap().unwrap();
    assert_eq!((binding.enrollment.as_str(), binding.replaced), ("A", false));
    assert_eq!(database.storage().certificate_binding(&[9; 32]).await.unwrap(), None);
}

pub(crate) async fn a_new_certificate_replaces_the_old_one_at_commit(database: &Database) {
    database.enroll("A").await;
    let replaced = async |name: &str| {
        let binding = database.storage().certificate_binding(&certificate(name).identity).await.unwrap();
        binding.map(|binding| binding.replaced)
    };
    // Once from the database, once from the cache.
    assert_eq!(replaced("A").await, Some(false));
    assert_eq!(replaced("A").await, Some(false));
    assert_eq!(replaced("A2").await, None);
    database.try_authenticate(authenticate("A", "A2", 5)).await;
    assert_eq!(replaced("A").await, Some(true));
    assert_eq!(replaced("A2").await, Some(false));
    let done = database.try_authenticate(authenticate("A", "A", 6)).await;
    assert!(matches!(done, Authenticated::Refused { .. }), "the old certificate is no longer valid");
    assert_eq!(replaced("A2").await, Some(false));
}

pub(crate) async fn bindings_survive_a_restart(database: &Database) {
    database.enroll("A").await;
    database.try_authenticate(authenticate("A", "A2", 5)).await;
    database.restart().await;
    let binding = async |name: &str| database.storage().certificate_binding(&certificate(name).identity).await.unwrap().unwrap();
    assert!(binding("A").await.replaced);
    assert!(!binding("A2").await.replaced);
}
