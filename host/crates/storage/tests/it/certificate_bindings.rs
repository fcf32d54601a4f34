use crate::fixture::*;
use wasmdm_protocol::certificate::Certificate;
use wasmdm_storage::certificate_bindings::{Associated, Association, Binding, CertificateOwner, Reason};
use wasmdm_storage::enrollments::Authenticated;

/// Edge case 23.
pub(crate) async fn a_certificate_belongs_to_one_enrollment(database: &Database) {
    database.enroll("A").await;
    let done = database.try_authenticate(authenticate("B", "A", 5)).await;
    assert!(matches!(done, Authenticated::Refused { .. }));
    assert!(database.storage().enrollment(&id("B")).await.unwrap().is_none());
    let binding = database.storage().certificate_binding(&certificate("A").identity).await.unwrap().unwrap();
    assert_eq!((binding.enrollment.as_str(), binding.is_replaced()), ("A", false));
    assert_eq!(database.storage().certificate_binding(&[9; 32]).await.unwrap(), None);
}

pub(crate) async fn an_authenticate_learns_what_is_known_of_it(database: &Database) {
    database.enroll("A").await;
    let known = async |enrollment: &str, name: &str| {
        let identity = certificate(name).identity;
        let (record, binding) = database.storage().enrollment_and_binding(&id(enrollment), &identity).await.unwrap();
        (record.map(|record| record.id), binding.map(|binding| binding.enrollment))
    };
    for restarted in [false, true] {
        // After a restart the first one reads the database, and the next ones find the binding in memory.
        if restarted {
            database.restart().await;
        }
        assert_eq!(known("A", "A").await, (Some(id("A")), Some(id("A"))));
        assert_eq!(known("B", "A").await, (None, Some(id("A"))));
        assert_eq!(known("A", "A2").await, (Some(id("A")), None));
        assert_eq!(known("B", "B").await, (None, None));
    }
    database.restart().await;
    for _ in 0..2 {
        let owner = database.storage().certificate_owner(&certificate("A").identity, "topic").await.unwrap();
        assert!(matches!(owner, CertificateOwner::Enrollment(binding) if binding.enrollment == id("A")));
    }
}

pub(crate) async fn a_new_certificate_replaces_the_old_one_at_commit(database: &Database) {
    database.enroll("A").await;
    let replaced = async |name: &str| {
        let binding = database.storage().certificate_binding(&certificate(name).identity).await.unwrap();
        binding.as_ref().map(Binding::is_replaced)
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
    assert!(binding("A").await.is_replaced());
    assert!(!binding("A2").await.is_replaced());
}

/// A certificate of that name whose validity begins so many milliseconds later than that of others.
fn later(name: &str, millis: i64) -> Certificate {
    let mut certificate = certificate(name);
    certificate.not_before = wasmdm_protocol::time::Timestamp::from_millis(certificate.not_before.as_millis() + millis);
    certificate
}

async fn associate(database: &Database, device: &str, certificate: Certificate, reason: Reason) -> bool {
    let association = Association { enrollment: id(device), certificate, reason, request_id: "r".to_owned(), now: at(10) };
    matches!(database.storage().associate_certificate(association).await.unwrap(), Associated::Bound(_))
}

/// Edge case 20. The device's system renews its identity without a word.
pub(crate) async fn a_rotated_identity_replaces_the_one_before(database: &Database) {
    database.enroll("A").await;
    database.queue("A", "C1").await;
    database.subscribe("plugin:p", &["identity.renewed"]).await;
    assert!(associate(database, "A", later("A2", 1000), Reason::Rotation).await);
    assert!(associate(database, "A", later("A2", 1000), Reason::Rotation).await, "two requests at once");
    let binding = async |name: &str| database.storage().certificate_binding(&certificate(name).identity).await.unwrap().unwrap();
    assert!(binding("A").await.is_replaced());
    assert!(!binding("A2").await.is_replaced());
    assert_eq!(database.poll("A").await.as_deref(), Some("C1"), "the queue goes on");
    let deliveries = database.drain(50).await;
    assert_eq!(deliveries.len(), 1);
    assert_eq!(deliveries[0].event.data["how"], "rotation");
    assert_eq!(deliveries[0].event.who.as_ref().unwrap().facts["certificate"]["subject"], "CN=A2");
    assert_eq!(database.storage().audit(&default(), 10).await.unwrap()[0].action, "identity.renewed");
}

/// Edge case 20. An older certificate that somebody kept does not come back to life, nor one that was replaced, nor a stranger's.
pub(crate) async fn an_identity_is_not_rotated_backwards_or_twice(database: &Database) {
    database.enroll("A").await;
    database.enroll("B").await;
    assert!(!associate(database, "A", later("A0", -1000), Reason::Rotation).await);
    assert!(!associate(database, "A", certificate("B"), Reason::Rotation).await);
    assert!(associate(database, "A", later("A2", 1000), Reason::Rotation).await);
    assert!(!associate(database, "A", certificate("A"), Reason::Rotation).await);
    assert!(!associate(database, "unknown", certificate("C"), Reason::Rotation).await);
    assert!(!associate(database, "A", certificate("C"), Reason::Retroactive).await);
}

/// A device that came with its database row from another server: there is no certificate it could be known by.
pub(crate) async fn a_device_that_was_moved_here_takes_its_first_certificate(database: &Database) {
    database.enroll("A").await;
    database.meddle("DELETE FROM certificate_bindings").await;
    database.restart().await;
    assert!(!associate(database, "A", certificate("A2"), Reason::Rotation).await, "there is none to follow");
    assert!(associate(database, "A", certificate("A2"), Reason::Retroactive).await);
    assert!(!associate(database, "A", certificate("A3"), Reason::Retroactive).await);
    assert_eq!(database.storage().audit(&default(), 10).await.unwrap()[0].action, "identity.associated");
}
