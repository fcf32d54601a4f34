//! Events as subscribers get them, and how a state change makes them.
//!
//! [`emit`] runs in the transaction of the change: where somebody subscribes, it writes the event once and a delivery for each subscriber.
//! Where nobody does, it costs a look at a list in memory.

use crate::device_messages;
use crate::keyring::Keyring;
use crate::memory::{Change, Subscribed};
use crate::outbox::Subscription;
use crate::sql::{Columns, Db, Row, args, together};
use crate::writer::{Class, Outcome, Tx};
use crate::{Reader, Storage, StorageError, sealed, sql, tenant};
use serde_json::{Map, Value, json};
use std::sync::{Arc, LazyLock};
use wasmdm_protocol::enrollment::{Enrollment, EnrollmentId, EnrollmentKind, TenantId};
use wasmdm_protocol::json::to_redacted_json;
use wasmdm_protocol::time::Timestamp;

/// An event. `who` and `data` follow docs/contract.md.
#[derive(Debug, Clone)]
pub struct Event {
    /// Stable across redeliveries.
    pub id: String,
    /// Whose it is.
    pub tenant: TenantId,
    /// `command.acknowledged`; the request type stands in `data`.
    pub topic: String,
    /// When it happened.
    pub at: Timestamp,
    /// The enrollment as of the event.
    pub who: Option<EnrollmentRecord>,
    /// JSON, redacted.
    pub data: Value,
    /// How many plugin effects stand between the event and a device or a person.
    pub hops: u32,
}

/// What is known of an enrollment.
#[derive(Debug, Clone)]
pub struct EnrollmentRecord {
    /// Whose it is.
    pub tenant: TenantId,
    /// Unique over the whole server.
    pub id: EnrollmentId,
    /// The device's channel, for a user's.
    pub parent: Option<EnrollmentId>,
    /// Which of the five kinds.
    pub kind: EnrollmentKind,
    /// The push topic.
    pub topic: String,
    /// Where it stands.
    pub state: EnrollmentState,
    /// The plugin that quarantines it.
    pub quarantined_by: Option<String>,
    /// It was enrolled before its last Authenticate. Not in events.
    pub re_enrolling: bool,
    /// Until then an Authenticate is the renewal of the identity that a command asked for; of a device that is being wiped none is. Not in events.
    pub renewal_until: Option<Timestamp>,
    /// A renewal has brought a certificate, and the TokenUpdate that decides about it has not come. Not in events.
    pub renewing: bool,
    /// Its last message; behind by at most the interval of the flush when another process reads it.
    pub last_seen: Option<Timestamp>,
    /// The contract's `facts`: device facts, `tags`, `url_params`, `state`, `last_seen`, `certificate`.
    pub facts: Value,
}

impl EnrollmentRecord {
    /// Whether an Authenticate for that push topic would be the renewal of its identity.
    pub fn awaits_renewal(&self, topic: &str, now: Timestamp) -> bool {
        self.state == EnrollmentState::Enrolled && self.topic == topic && self.is_in_renewal(now)
    }

    /// Whether a command has asked for the renewal of its identity, and the time for it goes on.
    pub fn is_in_renewal(&self, now: Timestamp) -> bool {
        self.renewal_until.is_some_and(|until| until > now)
    }

    /// Whether a device that authenticates now enrolls anew. One whose first Authenticate was not answered, and which sends it again with the
    /// same certificate, is as new as before.
    pub fn would_re_enroll(&self, same_certificate: bool) -> bool {
        !same_certificate || self.state != EnrollmentState::Enrolling || self.re_enrolling
    }
}

/// Where an enrollment stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EnrollmentState {
    /// Authenticate was stored, no TokenUpdate since.
    Enrolling,
    /// It gets commands.
    Enrolled,
    /// It left, or its device authenticated anew.
    CheckedOut,
}

impl EnrollmentState {
    /// All states.
    pub const ALL: [Self; 3] = [Self::Enrolling, Self::Enrolled, Self::CheckedOut];

    /// The name in the database and in the plugin contract.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Enrolling => "enrolling",
            Self::Enrolled => "enrolled",
            Self::CheckedOut => "checked-out",
        }
    }

    /// The state of that name, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == name)
    }
}

/// Why something happens: a device, a person or the server itself, or a plugin's effect.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cause {
    /// The subscriber whose effect it is.
    pub(crate) subscriber: Option<String>,
    pub(crate) hops: u32,
}

/// Beyond so many plugin effects in a row an event is delivered to nobody: somebody runs in a circle.
const MAX_HOPS: u32 = 8;

/// A check-in that changes nothing in the database.
#[derive(Debug, Clone)]
pub struct CheckInHeard {
    /// Whose device it is.
    pub tenant: TenantId,
    /// Who sent it.
    pub enrollment: Enrollment,
    /// `checkin.GetToken`
    pub topic: String,
    /// Parsed.
    pub document: wasmdm_protocol::plist::Value,
    /// When it arrived.
    pub now: Timestamp,
}

/// What happened.
pub(crate) struct Happened<'a> {
    pub(crate) tenant: &'a TenantId,
    pub(crate) topic: &'a str,
    /// For the filter `topic:RequestType`.
    pub(crate) request_type: Option<&'a str>,
    pub(crate) at: Timestamp,
    /// `None`: it is about no enrollment.
    pub(crate) who: Option<&'a EnrollmentId>,
    pub(crate) cause: &'a Cause,
}

/// Whether anybody would get it.
pub(crate) fn wanted(tx: &Tx, tenant: &TenantId, topic: &str, request_type: Option<&str>, cause: &Cause) -> Vec<Subscribed> {
    let lines = tx.memory.subscribed(tenant, |line| {
        matches_any(&line.subscription, topic, request_type)
            && (line.subscription.include_self || cause.subscriber.as_deref() != Some(line.subscriber.as_str()))
    });
    if cause.hops > MAX_HOPS && !lines.is_empty() {
        metrics::counter!("wasmdm_event_loops_total").increment(1);
        tracing::warn!(topic, hops = cause.hops, "An event {topic} is {} plugin effects away from its origin; it is not delivered", cause.hops);
        return Vec::new();
    }
    lines
}

/// Writes the event and its deliveries, if anybody wants it. The change that it tells of is already written in `tx`.
pub(crate) async fn emit(tx: &mut Tx, happened: Happened<'_>, data: impl FnOnce() -> Value + Send) -> Result<(), StorageError> {
    let lines = wanted(tx, happened.tenant, happened.topic, happened.request_type, happened.cause);
    if lines.is_empty() {
        return Ok(());
    }
    let who = match happened.who {
        Some(id) => record(tx, id).await?,
        None => None,
    };
    let partition = match (&who, happened.who) {
        (Some(who), _) => who.parent.as_ref().unwrap_or(&who.id).as_str().to_owned(),
        (None, Some(id)) => id.as_str().to_owned(),
        (None, None) => happened.topic.to_owned(),
    };
    let id = insert_event(tx, &happened, who.as_ref(), &data()).await?;
    for line in lines {
        let to = Address { tenant: happened.tenant, subscriber: &line.subscriber, interface: &line.subscription.interface, partition: &partition };
        deliver(tx, &to, &id, happened.at).await?;
    }
    Ok(())
}

/// The raw `checkin.…` event of a message.
pub(crate) async fn emit_check_in(
    tx: &mut Tx,
    tenant: &TenantId,
    who: &EnrollmentId,
    topic: &str,
    at: Timestamp,
    message: impl FnOnce() -> Value + Send,
) -> Result<(), StorageError> {
    let happened = Happened { tenant, topic, request_type: None, at, who: Some(who), cause: &Cause::default() };
    emit(tx, happened, || json!({ "message": message() })).await
}

const INSERT_EVENT: &str = "INSERT INTO events (id, tenant_id, topic, request_type, occurred_at, enrollment_id, who, data, hops, caused_by) \
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)";

/// Answers the event's id.
pub(crate) async fn insert_event(tx: &mut Tx, happened: &Happened<'_>, who: Option<&EnrollmentRecord>, data: &Value) -> Result<String, StorageError> {
    let id = new_id(happened.at);
    let seal = |column, value: &Value| tx.keyring.at(column, happened.tenant, &[&id]).seal(value.to_string().as_bytes());
    let who = who.map(|who| seal(&sealed::EVENT_WHO, &to_stored(who))).transpose()?;
    let data = seal(&sealed::EVENT_DATA, data)?;
    tx.run(
        INSERT_EVENT,
        args![
            id.as_str(),
            happened.tenant.as_str(),
            happened.topic,
            happened.request_type,
            happened.at.as_millis(),
            happened.who.map(EnrollmentId::as_str),
            who,
            data,
            i64::from(happened.cause.hops),
            happened.cause.subscriber.as_deref(),
        ],
    )
    .await?;
    Ok(id)
}

/// Sorted by time, so that the newest rows of the table stand together; random, so that a restored database does not use one twice.
fn new_id(at: Timestamp) -> String {
    let millis = u64::try_from(at.as_millis()).unwrap_or(0);
    let nanos = u32::try_from(millis % 1000).unwrap_or(0) * 1_000_000;
    uuid::Uuid::new_v7(uuid::Timestamp::from_unix(uuid::NoContext, millis / 1000, nanos)).to_string()
}

/// Where a delivery goes.
pub(crate) struct Address<'a> {
    pub(crate) tenant: &'a TenantId,
    pub(crate) subscriber: &'a str,
    pub(crate) interface: &'a str,
    pub(crate) partition: &'a str,
}

// A partition that is leased, or whose first delivery waits for its next attempt, keeps its time.
const UPSERT_PARTITION: &str = "INSERT INTO partitions \
    (tenant_id, subscriber, interface, partition_key, ready_at, backoff_until, lease_owner, lease_epoch) VALUES (?, ?, ?, ?, ?, NULL, NULL, ?) \
    ON CONFLICT (tenant_id, subscriber, interface, partition_key) DO UPDATE SET ready_at = COALESCE(partitions.ready_at, excluded.ready_at)";
const INSERT_DELIVERY: &str = "INSERT INTO deliveries \
    (tenant_id, subscriber, interface, partition_key, event_id, state, is_open, attempts, conflicts, created_at) \
    VALUES (?, ?, ?, ?, ?, 'waiting', 1, 0, 0, ?)";

static DELIVER: LazyLock<String> = LazyLock::new(|| together(&[UPSERT_PARTITION, INSERT_DELIVERY]));

/// Adds a delivery at the end of its partition.
pub(crate) async fn deliver(tx: &mut Tx, to: &Address<'_>, event: &str, now: Timestamp) -> Result<(), StorageError> {
    let at = now.as_millis();
    // A partition that is cleared away and comes again must not repeat an epoch: it starts at the time.
    let (tenant, subscriber, interface, partition) = (to.tenant.as_str(), to.subscriber, to.interface, to.partition);
    tx.run(&DELIVER, args![tenant, subscriber, interface, partition, at, at, tenant, subscriber, interface, partition, event, at]).await?;
    tx.after_commit(Change::Outbox);
    Ok(())
}

fn matches_any(subscription: &Subscription, topic: &str, request_type: Option<&str>) -> bool {
    subscription.topics.iter().any(|wanted| matches(wanted, topic, request_type))
}

/// Whether a topic pattern of a subscription covers the topic.
fn matches(pattern: &str, topic: &str, request_type: Option<&str>) -> bool {
    if pattern == "*" {
        return !["checkin.", "mdm.", "mdm+secrets."].iter().any(|raw| topic.starts_with(raw));
    }
    let (pattern, of_type) = match pattern.split_once(':') {
        Some((pattern, of_type)) => (pattern, Some(of_type)),
        None => (pattern, None),
    };
    let covered = match pattern.strip_suffix(".*") {
        Some(family) => topic.strip_prefix(family).is_some_and(|rest| rest.starts_with('.')),
        None => pattern == topic,
    };
    covered && of_type.is_none_or(|of_type| request_type == Some(of_type))
}

macro_rules! select_record {
    ($rest:literal) => {
        concat!(
            "SELECT e.id, e.tenant_id, e.parent_id, e.kind, e.topic, e.state, e.quarantined_by, e.facts, e.url_params, p.last_seen_at, ",
            "b.sha256, b.subject, b.issuer, b.not_before, b.not_after, e.re_enrolling, ",
            "CASE WHEN e.erase_command_uuid IS NULL THEN e.renewal_until END, e.renewing FROM enrollments e ",
            "LEFT JOIN enrollment_presence p ON p.enrollment_id = e.id ",
            "LEFT JOIN certificate_bindings b ON b.enrollment_id = COALESCE(e.parent_id, e.id) AND b.replaced = 0 AND b.pending = 0 ",
            $rest
        )
    };
}

pub(crate) const SELECT_RECORD: &str = select_record!("WHERE e.id = ?");
pub(crate) const SELECT_BY_SERIAL_NUMBER: &str = select_record!("WHERE e.tenant_id = ? AND e.serial_number = ? ORDER BY e.id LIMIT 1000");
pub(crate) const QUERY_RECORDS: &str = select_record!(
    "WHERE e.tenant_id = ? AND e.id > ? AND (? = 0 OR e.kind = ?) AND (? = 0 OR e.state = ?) AND (? = 0 OR e.serial_number = ?) \
     AND (? = 0 OR e.model = ?) AND (? = 0 OR EXISTS (SELECT 1 FROM enrollment_tags t WHERE t.enrollment_id = e.id AND t.tag = ?)) \
     ORDER BY e.id LIMIT ?"
);
const SELECT_TAGS: &str = "SELECT tag FROM enrollment_tags WHERE enrollment_id = ? ORDER BY tag";

/// As of now, in the transaction.
pub(crate) async fn record(tx: &mut Tx, id: &EnrollmentId) -> Result<Option<EnrollmentRecord>, StorageError> {
    let Some(row) = tx.one(SELECT_RECORD, args![id.as_str()]).await? else {
        return Ok(None);
    };
    let seen = tx.memory.last_seen(id);
    from_row(&mut tx.db(), &row, seen).await.map(Some)
}

impl Storage {
    /// By id over the whole server: ids are unique.
    pub async fn enrollment(&self, id: &EnrollmentId) -> Result<Option<EnrollmentRecord>, StorageError> {
        let mut reader = self.quick_reader()?;
        let rows = reader.db().all(SELECT_RECORD, args![id.as_str()]).await?;
        Ok(self.records_of(&mut reader, rows).await?.pop())
    }

    /// Tells whoever wants it of a check-in that changes nothing here: the raw event `checkin.…`. Without a subscriber nothing is written.
    /// A user who has no channel yet speaks for the device.
    pub async fn check_in_heard(&self, heard: CheckInHeard) -> Result<(), StorageError> {
        if self.message.is_none() && !self.is_wanted(&heard.tenant, &heard.topic, None) {
            return Ok(());
        }
        let heard = Arc::new(heard);
        self.write(Class::Answer, move |tx| {
            let heard = Arc::clone(&heard);
            Box::pin(async move {
                let CheckInHeard { tenant, enrollment, topic, document, now } = &*heard;
                let who = if record(tx, &enrollment.id).await?.is_some() { &enrollment.id } else { enrollment.device() };
                emit_check_in(tx, tenant, who, topic, *now, || redacted(document)).await?;
                device_messages::heard(tx, tenant, who, None, *now).await?;
                Ok(Outcome::Commit(()))
            })
        })
        .await
    }

    /// Whether anybody subscribes to the topic.
    pub(crate) fn is_wanted(&self, tenant: &TenantId, topic: &str, request_type: Option<&str>) -> bool {
        !self.inner.memory.subscribed(tenant, |line| matches_any(&line.subscription, topic, request_type)).is_empty()
    }

    pub(crate) async fn records(&self, sql: &'static str, args: sql::Args) -> Result<Vec<EnrollmentRecord>, StorageError> {
        let mut reader = self.reader().await?;
        let rows = reader.db().all(sql, args).await?;
        self.records_of(&mut reader, rows).await
    }

    /// Of rows of [`SELECT_RECORD`] and its like.
    pub(crate) async fn records_of(&self, reader: &mut Reader, rows: Vec<Row>) -> Result<Vec<EnrollmentRecord>, StorageError> {
        let mut records = Vec::with_capacity(rows.len());
        for row in rows {
            let seen = self.inner.memory.last_seen(&EnrollmentId::new(row.text(0)?));
            records.push(from_row(&mut reader.db(), &row, seen).await?);
        }
        Ok(records)
    }
}

async fn from_row(db: &mut Db<'_>, row: &Row, seen: Option<Timestamp>) -> Result<EnrollmentRecord, StorageError> {
    let id = EnrollmentId::new(row.text(0)?);
    let tenant = tenant(row, 1)?;
    let state = state(&row.text(5)?)?;
    let last_seen = row.opt_time(9)?.max(seen);
    let mut tags = Vec::new();
    for row in db.all(SELECT_TAGS, args![id.as_str()]).await? {
        tags.push(Value::String(row.text(0)?));
    }
    let Value::Object(mut facts) = row.json(7)? else {
        return Err(StorageError::corrupt(format!("the facts of enrollment {id} are no object")));
    };
    facts.insert("tags".to_owned(), Value::Array(tags));
    facts.insert("url_params".to_owned(), db.keyring.at(&sealed::URL_PARAMS, &tenant, &[&id]).open_json(row.blob(8)?)?);
    facts.insert("state".to_owned(), state.as_str().into());
    if let Some(last_seen) = last_seen {
        facts.insert("last_seen".to_owned(), last_seen.to_string().into());
    }
    if let Some(sha256) = row.opt_text(10)? {
        let certificate = json!({
            "sha256": sha256,
            "subject": row.text(11)?,
            "issuer": row.text(12)?,
            "not_before": row.time(13)?.to_string(),
            "not_after": row.time(14)?.to_string(),
        });
        facts.insert("certificate".to_owned(), certificate);
    }
    Ok(EnrollmentRecord {
        tenant,
        parent: row.opt_text(2)?.map(EnrollmentId::new),
        kind: kind(&row.text(3)?)?,
        topic: row.text(4)?,
        state,
        quarantined_by: row.opt_text(6)?,
        re_enrolling: row.flag(15)?,
        renewal_until: row.opt_time(16)?,
        renewing: row.flag(17)?,
        last_seen,
        facts: Value::Object(facts),
        id,
    })
}

pub(crate) fn state(name: &str) -> Result<EnrollmentState, StorageError> {
    EnrollmentState::from_name(name).ok_or_else(|| StorageError::corrupt(format!("`{name}` is no state of an enrollment")))
}

fn kind(name: &str) -> Result<EnrollmentKind, StorageError> {
    EnrollmentKind::from_name(name).ok_or_else(|| StorageError::corrupt(format!("`{name}` is no kind of enrollment")))
}

fn to_stored(who: &EnrollmentRecord) -> Value {
    json!({
        "id": who.id,
        "parent": who.parent,
        "kind": who.kind.as_str(),
        "topic": who.topic,
        "state": who.state.as_str(),
        "quarantined_by": who.quarantined_by,
        "last_seen": who.last_seen,
        "facts": who.facts,
    })
}

fn from_stored(tenant: &TenantId, mut stored: Value) -> Result<EnrollmentRecord, StorageError> {
    let text = |key: &str| stored.get(key).and_then(Value::as_str).map(str::to_owned);
    let missing = || StorageError::corrupt("an event's enrollment is incomplete");
    Ok(EnrollmentRecord {
        tenant: tenant.clone(),
        id: EnrollmentId::new(text("id").ok_or_else(missing)?),
        parent: text("parent").map(EnrollmentId::new),
        kind: kind(&text("kind").ok_or_else(missing)?)?,
        topic: text("topic").ok_or_else(missing)?,
        state: state(&text("state").ok_or_else(missing)?)?,
        quarantined_by: text("quarantined_by"),
        re_enrolling: false,
        renewal_until: None,
        renewing: false,
        last_seen: stored.get("last_seen").and_then(Value::as_i64).map(Timestamp::from_millis),
        facts: stored.get_mut("facts").map_or(Value::Object(Map::new()), Value::take),
    })
}

/// `id, tenant_id, topic, occurred_at, who, data, hops`, from that column on.
pub(crate) fn event(keyring: &Keyring, row: &Row, first: usize) -> Result<Event, StorageError> {
    let id = row.text(first)?;
    let tenant = tenant(row, first + 1)?;
    let who = match row.opt_blob(first + 4)? {
        Some(who) => Some(from_stored(&tenant, keyring.at(&sealed::EVENT_WHO, &tenant, &[&id]).open_json(who)?)?),
        None => None,
    };
    Ok(Event {
        topic: row.text(first + 2)?,
        at: row.time(first + 3)?,
        who,
        data: keyring.at(&sealed::EVENT_DATA, &tenant, &[&id]).open_json(row.blob(first + 5)?)?,
        hops: row.count(first + 6)?,
        id,
        tenant,
    })
}

/// A document without its secrets.
pub(crate) fn redacted(document: &wasmdm_protocol::plist::Value) -> Value {
    to_redacted_json(document)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_match_whole_families_types_and_everything_but_the_raw_ones() {
        assert!(matches("enrollment.enrolled", "enrollment.enrolled", None));
        assert!(matches("command.*", "command.acknowledged", Some("SecurityInfo")));
        assert!(!matches("command.*", "commander.acknowledged", None));
        assert!(matches("command.acknowledged:SecurityInfo", "command.acknowledged", Some("SecurityInfo")));
        assert!(!matches("command.acknowledged:SecurityInfo", "command.acknowledged", Some("DeviceLock")));
        assert!(matches("command.*:DeviceLock", "command.errored", Some("DeviceLock")));
        assert!(matches("*", "command.errored", Some("DeviceLock")));
        assert!(!matches("*", "checkin.Authenticate", None));
        assert!(!matches("*", "mdm.Connect", Some("Idle")));
        assert!(matches("mdm.*", "mdm.Connect", Some("Idle")));
        assert!(!matches("mdm.*", "mdm+secrets.Connect", Some("Idle")));
        assert!(!matches("mdm.Connect:Acknowledged", "mdm.Connect", Some("Idle")));
        assert!(matches("checkin.*", "checkin.Authenticate", None));
    }
}
