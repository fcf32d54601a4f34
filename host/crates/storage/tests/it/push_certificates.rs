use crate::fixture::*;
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_storage::StorageError;
use wasmdm_storage::certificate_bindings::CertificateOwner;
use wasmdm_storage::push_certificates::{CertificateSummary, StoreOutcome, StorePushCertificate, TopicSummary, TopicUse};

const OTHER_TOPIC: &str = "com.apple.mgmt.External.other";
const DAY: i64 = 24 * 60 * 60 * 1000;

pub(crate) fn certificate(topic: &str, not_after: i64) -> StorePushCertificate {
    StorePushCertificate {
        tenant: default(),
        topic: topic.to_owned(),
        certificate_pem: "certificate".to_owned(),
        private_key_pem: "secret key".to_owned(),
        not_after: at(not_after),
        may_be_new: false,
        actor: "api:test".to_owned(),
        now: at(0),
    }
}

pub(crate) async fn storing_counts_versions_and_owns_the_topic(database: &Database) {
    let storage = database.storage();
    let other = TenantId::new("other");
    storage.create_tenant(&other, at(0)).await.unwrap();
    assert!(storage.push_certificate(&default(), TOPIC).await.unwrap().is_none());
    assert_eq!(storage.certificate_owner(&[9; 32], TOPIC).await.unwrap(), CertificateOwner::Nobody { topic_owner: None });
    for version in 1..=2 {
        let (certificate, key) = (format!("certificate {version}"), format!("secret key {version}"));
        let store = StorePushCertificate { certificate_pem: certificate.clone(), private_key_pem: key.clone(), ..self::certificate(TOPIC, version) };
        assert!(!format!("{store:?}").contains("secret"));
        assert_eq!(storage.store_push_certificate(store).await.unwrap(), StoreOutcome::Stored);
        let stored = storage.push_certificate(&default(), TOPIC).await.unwrap().unwrap();
        assert_eq!((stored.version, stored.certificate_pem.as_str(), stored.private_key_pem.as_str()), (version, &*certificate, &*key));
        assert_eq!(stored.not_after, at(version));
        assert!(!format!("{stored:?}").contains("secret"));
    }
    assert!(storage.push_certificate(&other, TOPIC).await.unwrap().is_none(), "it is another tenant's");
    let refused = storage.store_push_certificate(StorePushCertificate { tenant: other, ..certificate(TOPIC, 9) }).await;
    assert!(matches!(refused, Err(StorageError::Invalid { field: "topic", .. })));
    let owner = storage.certificate_owner(&[9; 32], TOPIC).await.unwrap();
    assert_eq!(owner, CertificateOwner::Nobody { topic_owner: Some(default()) });
}

/// Who stores one can keep a whole fleet from being woken.
pub(crate) async fn who_stored_a_certificate_stands_in_the_audit(database: &Database) {
    let storage = database.storage();
    database.enroll("A").await;
    storage.store_push_certificate(certificate(TOPIC, 9)).await.unwrap();
    storage.store_push_certificate(certificate(OTHER_TOPIC, 9)).await.unwrap();
    let rows = storage.audit(&default(), 10).await.unwrap();
    assert_eq!(rows.len(), 1, "what was refused changed nothing");
    assert_eq!((rows[0].actor.as_str(), rows[0].action.as_str(), &rows[0].target, rows[0].at), ("api:test", "push-certificate.store", &None, at(0)));
    assert_eq!(rows[0].detail, serde_json::json!({ "topic": TOPIC, "not_after": at(9).to_string() }));
}

/// Edge case 31. Who renews with another Apple account gets a certificate of another topic, and with it not one device could be woken.
pub(crate) async fn a_topic_that_no_device_uses_takes_the_place_of_none_unless_that_is_said(database: &Database) {
    let storage = database.storage();
    // Nobody is enrolled: there is nothing to lose.
    assert_eq!(storage.store_push_certificate(certificate("com.apple.mgmt.first", 1)).await.unwrap(), StoreOutcome::Stored);
    database.enroll("A").await;
    let refused = storage.store_push_certificate(certificate(OTHER_TOPIC, 2)).await.unwrap();
    assert_eq!(refused, StoreOutcome::OtherTopicsInUse(vec![TopicUse { topic: TOPIC.to_owned(), channels: 1 }]));
    assert!(storage.push_certificate(&default(), OTHER_TOPIC).await.unwrap().is_none());
    let owner = storage.certificate_owner(&[9; 32], OTHER_TOPIC).await.unwrap();
    assert_eq!(owner, CertificateOwner::Nobody { topic_owner: None });
    // The devices' own topic, a renewal, and what is said to be new.
    for store in [
        certificate(TOPIC, 3),
        certificate("com.apple.mgmt.first", 4),
        StorePushCertificate { may_be_new: true, ..certificate(OTHER_TOPIC, 5) },
        certificate(OTHER_TOPIC, 6),
    ] {
        assert_eq!(storage.store_push_certificate(store).await.unwrap(), StoreOutcome::Stored);
    }
    let summary = |topic: &str, not_after, version, channels| {
        let certificate = Some(CertificateSummary { not_after: at(not_after), version, stored_at: at(0) });
        TopicSummary { topic: topic.to_owned(), certificate, channels }
    };
    let mut expected = [summary("com.apple.mgmt.first", 4, 2, 0), summary(OTHER_TOPIC, 6, 2, 0), summary(TOPIC, 3, 1, 1)];
    expected.sort_by(|one, other| one.topic.cmp(&other.topic));
    assert_eq!(storage.push_topics(&default()).await.unwrap(), expected);
}

/// A certificate that ends silently takes its whole fleet out of reach; one message a day would be read by nobody.
pub(crate) async fn an_end_that_comes_nearer_is_told_once_for_each_of_its_days(database: &Database) {
    database.subscribe("plugin:p", &["push.*"]).await;
    let end = 100 * DAY;
    database.storage().store_push_certificate(certificate(TOPIC, end)).await.unwrap();
    database.storage().store_push_certificate(certificate(OTHER_TOPIC, 1000 * DAY)).await.unwrap();
    let mut told = Vec::new();
    for day in 60..=102 {
        for _ in 0..2 {
            let now = at(day * DAY);
            told.extend(database.storage().tell_expiring_push_certificates(now).await.unwrap().into_iter().map(|one| (one.topic, one.days_left)));
        }
        database.restart().await;
    }
    assert_eq!(told, [30, 14, 7, 3, 1, 0].map(|days| (TOPIC.to_owned(), days)));
    let deliveries = database.drain(102 * DAY).await;
    let days: Vec<_> = deliveries.iter().map(|delivery| delivery.event.data["certificate"]["days_left"].as_i64().unwrap()).collect();
    assert_eq!(days, [30, 14, 7, 3, 1, 0]);
    assert!(deliveries.iter().all(|delivery| delivery.event.topic == "push.certificate-expiring" && delivery.event.who.is_none()));

    // The same certificate again is not news, a renewed one begins anew.
    database.storage().store_push_certificate(certificate(TOPIC, end)).await.unwrap();
    assert_eq!(database.storage().tell_expiring_push_certificates(at(103 * DAY)).await.unwrap(), []);
    database.storage().store_push_certificate(certificate(TOPIC, end + 10 * DAY)).await.unwrap();
    assert_eq!(database.storage().tell_expiring_push_certificates(at(103 * DAY)).await.unwrap()[0].days_left, 7);
    let ends = database.storage().push_certificate_ends().await.unwrap();
    assert!(ends.contains(&(TOPIC.to_owned(), at(end + 10 * DAY))) && ends.len() == 2, "{ends:?}");
}
