use crate::fixture::*;
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_storage::StorageError;
use wasmdm_storage::certificate_bindings::CertificateOwner;

pub(crate) async fn storing_counts_versions_and_owns_the_topic(database: &Database) {
    let storage = database.storage();
    let other = TenantId::new("other");
    storage.create_tenant(&other, at(0)).await.unwrap();
    assert!(storage.push_certificate(TOPIC).await.unwrap().is_none());
    assert_eq!(storage.certificate_owner(&[9; 32], TOPIC).await.unwrap(), CertificateOwner::Nobody { topic_owner: None });
    for version in 1..=2 {
        let (certificate, key) = (format!("certificate {version}"), format!("secret key {version}"));
        storage.store_push_certificate(&default(), TOPIC, certificate.clone(), key.clone(), at(version), at(0)).await.unwrap();
        let stored = storage.push_certificate(TOPIC).await.unwrap().unwrap();
        assert_eq!((stored.version, stored.certificate_pem.as_str(), stored.private_key_pem.as_str()), (version, &*certificate, &*key));
        assert_eq!(stored.not_after, at(version));
        assert!(!format!("{stored:?}").contains("secret"));
    }
    let refused = storage.store_push_certificate(&other, TOPIC, String::new(), String::new(), at(9), at(0)).await;
    assert!(matches!(refused, Err(StorageError::Invalid { field: "topic", .. })));
    let owner = storage.certificate_owner(&[9; 32], TOPIC).await.unwrap();
    assert_eq!(owner, CertificateOwner::Nobody { topic_owner: Some(default()) });
}
