//! Push certificates by topic, and what a push needs of an enrollment.

use crate::audit::AuditRow;
use crate::sql::{Columns, Row, args};
use crate::writer::{Class, Outcome};
use crate::{Storage, StorageError, audit, sealed, wakes};
use bytes::Bytes;
use serde_json::json;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_protocol::time::Timestamp;

/// A push certificate with its key.
#[derive(Clone)]
pub struct PushCertificate {
    /// Whose topic it is.
    pub tenant: TenantId,
    /// The push topic (the certificate's UID).
    pub topic: String,
    /// PEM.
    pub certificate_pem: String,
    /// PEM.
    pub private_key_pem: String,
    /// End of validity.
    pub not_after: Timestamp,
    /// Counts every store.
    pub version: i64,
}

/// Without the key.
impl fmt::Debug for PushCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PushCertificate")
            .field("tenant", &self.tenant)
            .field("topic", &self.topic)
            .field("not_after", &self.not_after)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

/// A push certificate to be stored.
#[derive(Clone)]
pub struct StorePushCertificate {
    /// Whose topic it is.
    pub tenant: TenantId,
    /// The push topic (the certificate's UID).
    pub topic: String,
    /// PEM.
    pub certificate_pem: String,
    /// PEM.
    pub private_key_pem: String,
    /// End of validity.
    pub not_after: Timestamp,
    /// Also where devices are enrolled and none of them uses the topic.
    pub may_be_new: bool,
    /// `api:SUBJECT`, for the audit.
    pub actor: String,
    /// When it came.
    pub now: Timestamp,
}

/// Without the key.
impl fmt::Debug for StorePushCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StorePushCertificate").field("tenant", &self.tenant).field("topic", &self.topic).finish_non_exhaustive()
    }
}

/// What became of a certificate that was to be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreOutcome {
    /// It is used from the next push on.
    Stored,
    /// Nothing was stored: the topic is new here, no channel uses it, and channels are enrolled under these.
    OtherTopicsInUse(Vec<TopicUse>),
}

/// How many device and user channels are enrolled under a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicUse {
    /// The topic.
    pub topic: String,
    /// At least one.
    pub channels: u32,
}

/// What there is of a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicSummary {
    /// The topic.
    pub topic: String,
    /// `None`: channels are enrolled under a topic that has no certificate here.
    pub certificate: Option<CertificateSummary>,
    /// Device and user channels that are enrolled under it.
    pub channels: u32,
}

/// What of a certificate everybody may know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateSummary {
    /// End of validity.
    pub not_after: Timestamp,
    /// Counts every store.
    pub version: i64,
    /// When it was stored.
    pub stored_at: Timestamp,
}

/// What a push needs.
#[derive(Clone)]
pub struct PushTarget {
    /// Whom it wakes.
    pub id: EnrollmentId,
    /// Which certificate it goes out with.
    pub topic: String,
    /// The payload.
    pub push_magic: String,
    /// The address.
    pub token: Bytes,
    /// When the device has last told it.
    pub told_at: Timestamp,
    /// Apple said since then that it is none any more, with this code.
    pub dead: Option<String>,
}

/// Without token and magic: with both, anyone with the certificate wakes the device.
impl fmt::Debug for PushTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PushTarget").field("id", &self.id).field("topic", &self.topic).finish_non_exhaustive()
    }
}

const INSERT_TOPIC: &str = "INSERT INTO push_topics (topic, tenant_id, created_at) VALUES (?, ?, ?) ON CONFLICT (topic) DO NOTHING";
const SELECT_TOPIC: &str = "SELECT tenant_id FROM push_topics WHERE topic = ?";
const UPSERT_CERTIFICATE: &str = "INSERT INTO push_certificates \
    (topic, tenant_id, certificate_pem, private_key_pem, not_after, version, updated_at) VALUES (?, ?, ?, ?, ?, 1, ?) \
    ON CONFLICT (topic) DO UPDATE SET certificate_pem = excluded.certificate_pem, private_key_pem = excluded.private_key_pem, \
    not_after = excluded.not_after, version = push_certificates.version + 1, updated_at = excluded.updated_at, \
    expiry_told = CASE WHEN push_certificates.not_after = excluded.not_after THEN push_certificates.expiry_told ELSE NULL END";
const SELECT_VERSION: &str = "SELECT version FROM push_certificates WHERE topic = ?";
const SELECT_SUMMARIES: &str = "SELECT topic, not_after, version, updated_at FROM push_certificates WHERE tenant_id = ? ORDER BY topic";
// Reads every enrollment: for people who list, and for a topic that is new here.
const COUNT_BY_TOPIC: &str =
    "SELECT topic, COUNT(*) FROM enrollments WHERE tenant_id = ? AND state = 'enrolled' GROUP BY topic ORDER BY COUNT(*) DESC, topic";
const SELECT_CERTIFICATE: &str =
    "SELECT tenant_id, topic, certificate_pem, private_key_pem, not_after, version FROM push_certificates WHERE topic = ? AND tenant_id = ?";
const SELECT_TARGET: &str = "SELECT e.topic, e.push_magic, e.push_token, COALESCE(m.received_at, e.enrolled_at, 0), f.code FROM enrollments e \
    LEFT JOIN enrollment_messages m ON m.enrollment_id = e.id AND m.message_type = 'TokenUpdate' \
    LEFT JOIN push_failures f ON f.enrollment_id = e.id AND f.token_is_dead = 1 AND f.last_at >= m.received_at \
    WHERE e.id = ? AND e.tenant_id = ? AND e.state = 'enrolled' AND e.push_token IS NOT NULL";

impl Storage {
    /// Replaces the topic's certificate. The first store makes the topic the tenant's.
    ///
    /// A topic that is new here, while channels are enrolled under others only, is most likely that of a certificate which was made in
    /// place of the renewed one: it is not stored unless `may_be_new`.
    ///
    /// # Errors
    /// [`StorageError::Invalid`] when the topic is another tenant's.
    pub async fn store_push_certificate(&self, store: StorePushCertificate) -> Result<StoreOutcome, StorageError> {
        let StorePushCertificate { tenant, topic, certificate_pem, private_key_pem, .. } = &store;
        let certificate = self.keyring().at(&sealed::PUSH_CERTIFICATE, tenant, &[topic]).seal(certificate_pem.as_bytes())?;
        let key = self.keyring().at(&sealed::PUSH_CERTIFICATE_KEY, tenant, &[topic]).seal(private_key_pem.as_bytes())?;
        let store = Arc::new((store, certificate, key));
        self.write(Class::Answer, move |tx| {
            let store = Arc::clone(&store);
            Box::pin(async move {
                let (StorePushCertificate { tenant, topic, not_after, may_be_new, actor, now, .. }, certificate, key) = &*store;
                let owner = tx.one(SELECT_TOPIC, args![topic.as_str()]).await?;
                if owner.is_some_and(|row| row.text(0).is_ok_and(|owner| owner != tenant.as_str())) {
                    return Err(StorageError::Invalid { field: "topic", problem: format!("{topic} belongs to another tenant") });
                }
                if !may_be_new && tx.one(SELECT_VERSION, args![topic.as_str()]).await?.is_none() {
                    let used = topic_uses(&tx.all(COUNT_BY_TOPIC, args![tenant.as_str()]).await?)?;
                    if !used.is_empty() && !used.iter().any(|used| used.topic == *topic) {
                        return Ok(Outcome::Commit(StoreOutcome::OtherTopicsInUse(used)));
                    }
                }
                tx.run(INSERT_TOPIC, args![topic.as_str(), tenant.as_str(), now.as_millis()]).await?;
                tx.run(
                    UPSERT_CERTIFICATE,
                    args![topic.as_str(), tenant.as_str(), certificate.as_slice(), key.as_slice(), not_after.as_millis(), now.as_millis()],
                )
                .await?;
                wakes::topic_can_be_pushed(tx, topic, *now).await?;
                // Whoever has one can wake devices, or keep them from being woken.
                let detail = json!({ "topic": topic, "not_after": not_after.to_string() });
                let (actor, action) = (actor.clone(), "push-certificate.store".to_owned());
                audit::insert(tx, &AuditRow { tenant: tenant.clone(), actor, action, target: None, detail, at: *now }).await?;
                Ok(Outcome::Commit(StoreOutcome::Stored))
            })
        })
        .await
    }

    /// Every topic of the tenant that has a certificate or an enrolled channel, by name.
    pub async fn push_topics(&self, tenant: &TenantId) -> Result<Vec<TopicSummary>, StorageError> {
        let mut topics = BTreeMap::new();
        for row in self.read_all(SELECT_SUMMARIES, args![tenant.as_str()]).await? {
            let certificate = CertificateSummary { not_after: row.time(1)?, version: row.int(2)?, stored_at: row.time(3)? };
            topics.insert(row.text(0)?, (Some(certificate), 0));
        }
        for TopicUse { topic, channels } in topic_uses(&self.read_all(COUNT_BY_TOPIC, args![tenant.as_str()]).await?)? {
            topics.entry(topic).or_insert((None, 0)).1 = channels;
        }
        Ok(topics.into_iter().map(|(topic, (certificate, channels))| TopicSummary { topic, certificate, channels }).collect())
    }

    /// The topic's certificate, if the topic is the tenant's.
    pub async fn push_certificate(&self, tenant: &TenantId, topic: &str) -> Result<Option<PushCertificate>, StorageError> {
        let Some(row) = self.look_up(SELECT_CERTIFICATE, args![topic, tenant.as_str()]).await? else {
            return Ok(None);
        };
        let tenant = crate::tenant(&row, 0)?;
        Ok(Some(PushCertificate {
            topic: topic.to_owned(),
            certificate_pem: self.keyring().at(&sealed::PUSH_CERTIFICATE, &tenant, &[&topic]).open_text(row.blob(2)?)?,
            private_key_pem: self.keyring().at(&sealed::PUSH_CERTIFICATE_KEY, &tenant, &[&topic]).open_text(row.blob(3)?)?,
            tenant,
            not_after: row.time(4)?,
            version: row.int(5)?,
        }))
    }

    /// Of those ids that are enrolled now; others are left out.
    pub async fn push_targets(&self, tenant: &TenantId, ids: &[EnrollmentId]) -> Result<Vec<PushTarget>, StorageError> {
        /// Look-ups, half a millisecond, before somebody else's task has a turn.
        const TURN: usize = 64;
        let mut reader = self.quick_reader()?;
        let mut targets = Vec::with_capacity(ids.len());
        for (place, id) in ids.iter().enumerate() {
            if place % TURN == TURN - 1 {
                drop(reader);
                tokio::task::yield_now().await;
                reader = self.quick_reader()?;
            }
            let Some(row) = reader.db().one(SELECT_TARGET, args![id.as_str(), tenant.as_str()]).await? else {
                continue;
            };
            targets.push(PushTarget {
                id: id.clone(),
                topic: row.text(0)?,
                push_magic: self.keyring().at(&sealed::PUSH_MAGIC, tenant, &[id]).open_text(row.blob(1)?)?,
                token: self.keyring().at(&sealed::PUSH_TOKEN, tenant, &[id]).open(row.blob(2)?)?,
                told_at: row.time(3)?,
                dead: row.opt_text(4)?,
            });
        }
        Ok(targets)
    }
}

fn topic_uses(rows: &[Row]) -> Result<Vec<TopicUse>, StorageError> {
    rows.iter().map(|row| Ok(TopicUse { topic: row.text(0)?, channels: row.count(1)? })).collect()
}
