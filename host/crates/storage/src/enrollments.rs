//! Enrollments: how they begin, go on and end.

use crate::audit::{self, AuditRow};
use crate::certificate_bindings::{
    Binding, SELECT_BINDING, Settled, Standing, bind, binding, forget_incoming, has_own, hex, is_incoming, renewed, replace_bindings, settle,
};
use crate::commands::{clear_queue, forget_idempotency_keys};
use crate::device_messages::heard;
use crate::effects::{self, Applied, DecisionEffects, PluginEffects};
use crate::events::{
    Cause, EnrollmentRecord, EnrollmentState, Happened, QUERY_RECORDS, SELECT_BY_SERIAL_NUMBER, emit, emit_check_in, redacted, state,
};
use crate::memory::Change;
use crate::sql::{Args, Columns, Row, args, together};
use crate::writer::{Class, Outcome, Tx};
use crate::{Storage, StorageError, push_failures, sealed, wakes};
use bytes::Bytes;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use wasmdm_protocol::certificate::Certificate;
use wasmdm_protocol::enrollment::{DeviceFacts, Enrollment, EnrollmentId, EnrollmentKind, TenantId};
use wasmdm_protocol::time::Timestamp;

/// An Authenticate that may be stored: verified and allowed.
#[derive(Debug, Clone)]
pub struct Authenticate {
    /// The owner of the topic, or of the certificate.
    pub tenant: TenantId,
    /// A device's channel.
    pub enrollment: Enrollment,
    /// The push topic; later `TokenUpdate`s must name the same.
    pub topic: String,
    /// What the message says of the device.
    pub facts: DeviceFacts,
    /// As received.
    pub raw: Bytes,
    /// Parsed.
    pub document: wasmdm_protocol::plist::Value,
    /// Whom the message was signed by.
    pub certificate: Certificate,
    /// Whether a device that is known may come back with a certificate that it is not known by, outside of a renewal.
    pub may_change_certificate: bool,
    /// Whether it may be the renewal that a command asked for; that one did is looked at when it is stored.
    pub may_renew: bool,
    /// Store it although the certificate is bound to another enrollment, and leave that binding as it is: bindings are only watched.
    pub may_share_certificate: bool,
    /// Of the URL that the device called.
    pub url_params: BTreeMap<String, String>,
    /// Tags that policies give it.
    pub tags: Vec<String>,
    /// The plugin that quarantines it.
    pub quarantined_by: Option<String>,
    /// JSON array of {plugin, digest, generation, verdict, reason?}: kept with the enrollment (without the reasons) and in the event
    /// `enrollment.enrolling`.
    pub decisions: Value,
    /// What the policies wrote.
    pub effects: Vec<DecisionEffects>,
    /// Rows for the audit.
    pub audit: Vec<AuditRow>,
    /// When it arrived.
    pub now: Timestamp,
}

/// What became of an [`Authenticate`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authenticated {
    /// It is enrolling.
    Stored {
        /// The enrollment was known before.
        re_enrolling: bool,
    },
    /// It goes on as it was, under the certificate that it came with: the renewal that a command asked for (edge case 19).
    Renewed,
    /// The certificate is bound to another enrollment, or was replaced, or the enrollment belongs to another tenant: nothing was written.
    Refused {
        /// For the log.
        reason: String,
    },
}

/// A TokenUpdate of a device or a user.
#[derive(Clone)]
pub struct TokenUpdate {
    /// The tenant of the certificate.
    pub tenant: TenantId,
    /// A device's channel or a user's.
    pub enrollment: Enrollment,
    /// Of the certificate that signed it.
    pub identity: [u8; 32],
    /// What the message says; what it does not say stays.
    pub facts: DeviceFacts,
    /// The push topic.
    pub topic: String,
    /// What a push must contain.
    pub push_magic: String,
    /// Where a push goes.
    pub token: Bytes,
    /// Absent keeps the old one.
    pub unlock_token: Option<Bytes>,
    /// Absent keeps what is known.
    pub awaiting_configuration: Option<bool>,
    /// As received.
    pub raw: Bytes,
    /// Parsed.
    pub document: wasmdm_protocol::plist::Value,
    /// When it arrived.
    pub now: Timestamp,
}

/// Without tokens and raw bytes.
impl fmt::Debug for TokenUpdate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenUpdate")
            .field("tenant", &self.tenant)
            .field("enrollment", &self.enrollment)
            .field("topic", &self.topic)
            .field("now", &self.now)
            .finish_non_exhaustive()
    }
}

/// What became of a [`TokenUpdate`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenUpdated {
    /// It is enrolled.
    Stored {
        /// 1 is the first since Authenticate.
        tally: u32,
    },
    /// Unknown enrollment (of a device), another topic than Authenticate's, or checked out without a new Authenticate: nothing was written.
    Refused {
        /// For the log.
        reason: String,
    },
}

impl Storage {
    /// Begins an enrollment anew: the queue of the device and its users is cancelled, tokens are dropped, users' channels are disabled,
    /// and the certificate becomes the device's only one. Within the day after a command that renews the identity went out, nothing of
    /// this: the certificate is accepted beside the one before, until the TokenUpdate behind tells which of them stays.
    ///
    /// # Errors
    /// [`StorageError::Invalid`] when an effect of a policy can never be stored.
    pub async fn authenticate(&self, message: Authenticate) -> Result<Applied<Authenticated>, StorageError> {
        let message = Arc::new(message);
        self.write(Class::Answer, move |tx| {
            let message = Arc::clone(&message);
            Box::pin(async move { Ok(Outcome::Commit(authenticate(tx, &message).await?)) })
        })
        .await
    }

    /// Replaces topic, token and magic together; the first one after an Authenticate enrolls.
    pub async fn token_update(&self, message: TokenUpdate) -> Result<TokenUpdated, StorageError> {
        let message = Arc::new(message);
        self.write(Class::Answer, move |tx| {
            let message = Arc::clone(&message);
            Box::pin(async move { Ok(Outcome::Commit(token_update(tx, &message).await?)) })
        })
        .await
    }

    /// Disables it (a device: with its users), emits `enrollment.checked-out`. `false`: unknown.
    pub async fn check_out(&self, tenant: &TenantId, id: &EnrollmentId, raw: Bytes, now: Timestamp) -> Result<bool, StorageError> {
        let (tenant, id) = (tenant.clone(), id.clone());
        self.write(Class::Answer, move |tx| {
            let (tenant, id, raw) = (tenant.clone(), id.clone(), raw.clone());
            Box::pin(async move { Ok(Outcome::Commit(check_out(tx, &tenant, &id, &raw, now).await?)) })
        })
        .await
    }

    /// Keeps a user's `UserAuthenticate`. `false`: the channel does not exist yet, and there is nowhere to keep it.
    pub async fn user_authenticated(&self, tenant: &TenantId, id: &EnrollmentId, raw: Bytes, now: Timestamp) -> Result<bool, StorageError> {
        let (tenant, id) = (tenant.clone(), id.clone());
        self.write(Class::Answer, move |tx| {
            let (tenant, id, raw) = (tenant.clone(), id.clone(), raw.clone());
            Box::pin(async move {
                let known = is_known(tx, &tenant, &id).await?;
                if known {
                    store_message(tx, &tenant, &id, "UserAuthenticate", &raw, now).await?;
                }
                Ok(Outcome::Commit(known))
            })
        })
        .await
    }

    /// `None` or an empty token deletes it. `false`: unknown enrollment.
    pub async fn set_bootstrap_token(
        &self,
        tenant: &TenantId,
        id: &EnrollmentId,
        token: Option<Bytes>,
        awaiting_configuration: Option<bool>,
        now: Timestamp,
    ) -> Result<bool, StorageError> {
        let (tenant, id) = (tenant.clone(), id.clone());
        let token = token.filter(|token| !token.is_empty());
        self.write(Class::Answer, move |tx| {
            let (tenant, id, token) = (tenant.clone(), id.clone(), token.clone());
            Box::pin(async move { Ok(Outcome::Commit(set_bootstrap_token(tx, &tenant, &id, token.as_deref(), awaiting_configuration, now).await?)) })
        })
        .await
    }

    /// The escrowed bootstrap token, if there is one.
    pub async fn bootstrap_token(&self, tenant: &TenantId, id: &EnrollmentId) -> Result<Option<Bytes>, StorageError> {
        self.token(tenant, id, BOOTSTRAP_TOKEN).await
    }

    /// What plugins decided about the enrollment's last Authenticate: a JSON array of `{plugin, digest, generation, verdict}`.
    pub async fn decisions(&self, id: &EnrollmentId) -> Result<Option<Value>, StorageError> {
        self.look_up(SELECT_DECISIONS, args![id.as_str()]).await?.map(|row| row.json(0)).transpose()
    }

    /// The device's latest unlock token, if there is one.
    pub async fn unlock_token(&self, tenant: &TenantId, id: &EnrollmentId) -> Result<Option<Bytes>, StorageError> {
        self.token(tenant, id, UNLOCK_TOKEN).await
    }

    async fn token(&self, tenant: &TenantId, id: &EnrollmentId, name: &str) -> Result<Option<Bytes>, StorageError> {
        let row = self.look_up(SELECT_TOKEN, args![id.as_str(), name, tenant.as_str()]).await?;
        row.map(|row| self.keyring().at(&sealed::TOKEN, tenant, &[id, &name]).open(row.blob(0)?)).transpose()
    }

    /// Ends a quarantine; `false`: there was none.
    pub async fn release_quarantine(&self, tenant: &TenantId, id: &EnrollmentId, now: Timestamp) -> Result<bool, StorageError> {
        let (tenant, id) = (tenant.clone(), id.clone());
        self.write(Class::Answer, move |tx| {
            let (tenant, id) = (tenant.clone(), id.clone());
            Box::pin(async move { Ok(Outcome::Commit(release(tx, &tenant, &id, now).await?)) })
        })
        .await
    }

    /// Devices of that serial number, at most 1,000, in the order of their ids.
    pub async fn enrollments_by_serial_number(&self, tenant: &TenantId, serial_number: &str) -> Result<Vec<EnrollmentRecord>, StorageError> {
        self.records(SELECT_BY_SERIAL_NUMBER, args![tenant.as_str(), serial_number]).await
    }

    /// In the order of ids, after `cursor` (the last id of the page before).
    pub async fn query_enrollments(
        &self,
        tenant: &TenantId,
        filter: &EnrollmentFilter,
        cursor: Option<&str>,
        limit: u32,
    ) -> Result<Vec<EnrollmentRecord>, StorageError> {
        let given = |field: &Option<String>| i64::from(field.is_some());
        let text = |field: &Option<String>| field.clone().unwrap_or_default();
        let args = args![
            tenant.as_str(),
            cursor.unwrap_or_default(),
            given(&filter.kind),
            text(&filter.kind),
            given(&filter.state),
            text(&filter.state),
            given(&filter.serial_number),
            text(&filter.serial_number),
            given(&filter.model),
            text(&filter.model),
            given(&filter.tag),
            text(&filter.tag),
            i64::from(limit),
        ];
        self.records(QUERY_RECORDS, args).await
    }

    /// Coalesced in memory, flushed every second or so. An unknown enrollment is ignored.
    pub fn touch(&self, id: &EnrollmentId, now: Timestamp) {
        self.inner.memory.touch(id, now);
    }

    /// Device and user channels, by state: for the metric.
    pub async fn count_enrollments(&self) -> Result<BTreeMap<String, u64>, StorageError> {
        let mut counts: BTreeMap<String, u64> = EnrollmentState::ALL.iter().map(|state| (state.as_str().to_owned(), 0)).collect();
        for row in self.read_all(COUNT_BY_STATE, args![]).await? {
            counts.insert(row.text(0)?, u64::from(row.count(1)?));
        }
        Ok(counts)
    }
}

/// All that are given must match.
#[derive(Debug, Clone, Default)]
pub struct EnrollmentFilter {
    /// `device`, `user`, …
    pub kind: Option<String>,
    /// `enrolling`, `enrolled`, `checked-out`.
    pub state: Option<String>,
    /// One of its tags.
    pub tag: Option<String>,
    /// The whole serial number.
    pub serial_number: Option<String>,
    /// The whole model.
    pub model: Option<String>,
}

const SELECT_DECISIONS: &str = "SELECT decisions FROM enrollments WHERE id = ?";
pub(crate) const UNLOCK_TOKEN: &str = "unlock-token";
pub(crate) const BOOTSTRAP_TOKEN: &str = "bootstrap-token";
/// The tag of an enrollment in quarantine.
const QUARANTINED: &str = "quarantined";

pub(crate) const COUNT_BY_STATE: &str = "SELECT state, COUNT(*) FROM enrollments GROUP BY state";
const SELECT_ENROLLMENT: &str = "SELECT tenant_id, kind, state, topic, tally, re_enrolling, awaiting_configuration, facts, push_magic, push_token, parent_id, \
    renewal_until, renewing, erase_command_uuid FROM enrollments WHERE id = ?";
const UPSERT_ENROLLMENT: &str = "INSERT INTO enrollments \
    (id, tenant_id, kind, topic, state, generation, tally, re_enrolling, quarantined_by, serial_number, model, facts, url_params, decisions, \
     authenticated_at, created_at, updated_at) \
    VALUES (?, ?, ?, ?, 'enrolling', 1, 0, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) \
    ON CONFLICT (id) DO UPDATE SET topic = excluded.topic, state = 'enrolling', generation = enrollments.generation + 1, tally = 0, \
     re_enrolling = excluded.re_enrolling, awaiting_configuration = NULL, quarantined_by = excluded.quarantined_by, \
     serial_number = excluded.serial_number, model = excluded.model, facts = excluded.facts, url_params = excluded.url_params, \
     decisions = excluded.decisions, push_magic = NULL, push_token = NULL, renewal_until = NULL, renewal_command_uuid = NULL, renewing = 0, \
     erase_command_uuid = NULL, authenticated_at = excluded.authenticated_at, enrolled_at = NULL, checked_out_at = NULL, updated_at = excluded.updated_at";
/// User channels of a device: far more than a Mac in a lab sees, and a bound to what one certificate can fill the database with.
pub(crate) const USERS: i64 = 10_000;
pub(crate) const COUNT_USERS: &str = "SELECT COUNT(*) FROM enrollments WHERE parent_id = ?";
pub(crate) const INSERT_USER: &str = "INSERT INTO enrollments \
    (id, tenant_id, parent_id, kind, topic, state, generation, tally, re_enrolling, facts, url_params, decisions, created_at, updated_at) \
    VALUES (?, ?, ?, ?, ?, 'enrolling', 1, 0, 0, '{}', ?, '[]', ?, ?)";
const UPDATE_ENROLLED: &str = "UPDATE enrollments SET state = 'enrolled', topic = ?, tally = ?, awaiting_configuration = ?, facts = ?, serial_number = ?, model = ?, \
    push_magic = ?, push_token = ?, enrolled_at = COALESCE(?, enrolled_at), checked_out_at = NULL, updated_at = ?, \
    renewal_until = CASE WHEN renewing = 1 THEN NULL ELSE renewal_until END, \
    renewal_command_uuid = CASE WHEN renewing = 1 THEN NULL ELSE renewal_command_uuid END, renewing = 0 WHERE id = ?";
const RENEW: &str = "UPDATE enrollments SET facts = ?, serial_number = ?, model = ?, url_params = ?, decisions = ?, \
    quarantined_by = COALESCE(?, quarantined_by), renewing = 1, updated_at = ? WHERE id = ?";
const BEGIN_ANEW: &str = "UPDATE enrollments SET generation = generation + 1, tally = 0, re_enrolling = 1, awaiting_configuration = NULL, \
    enrolled_at = NULL, erase_command_uuid = NULL, authenticated_at = ?, updated_at = ? WHERE id = ?";
const ERASE_BEGINS: &str = "UPDATE enrollments SET erase_command_uuid = ? WHERE id = (SELECT COALESCE(parent_id, id) FROM enrollments WHERE id = ?)";
const ERASE_FAILS: &str = "UPDATE enrollments SET erase_command_uuid = NULL WHERE erase_command_uuid = ? \
    AND id = (SELECT COALESCE(parent_id, id) FROM enrollments WHERE id = ?)";
const OPEN_RENEWAL: &str = "UPDATE enrollments SET renewal_until = ?, renewal_command_uuid = ? \
    WHERE id = (SELECT COALESCE(parent_id, id) FROM enrollments WHERE id = ?)";
const CLOSE_RENEWAL_OF: &str = "UPDATE enrollments SET renewal_until = NULL, renewal_command_uuid = NULL WHERE renewal_command_uuid = ? \
    AND id = (SELECT COALESCE(parent_id, id) FROM enrollments WHERE id = ?)";
// Its time goes on: the device may try again.
const PUT_RENEWAL_OFF: &str = "UPDATE enrollments SET renewing = 0 WHERE id = ?";
const RESUME_RENEWAL: &str = "UPDATE enrollments SET renewing = 1 WHERE id = ?";
const CLOSE_RENEWAL: &str = "UPDATE enrollments SET renewal_until = NULL, renewal_command_uuid = NULL, renewing = 0 WHERE id = ?";
const UPSERT_MESSAGE: &str = "INSERT INTO enrollment_messages (tenant_id, enrollment_id, message_type, raw, received_at) VALUES (?, ?, ?, ?, ?) \
    ON CONFLICT (enrollment_id, message_type) DO UPDATE SET raw = excluded.raw, received_at = excluded.received_at";
static STORE_AUTHENTICATE: LazyLock<String> = LazyLock::new(|| together(&[UPSERT_ENROLLMENT, UPSERT_MESSAGE]));
static STORE_RENEWAL: LazyLock<String> = LazyLock::new(|| together(&[RENEW, UPSERT_MESSAGE]));
static STORE_TOKEN_UPDATE: LazyLock<String> = LazyLock::new(|| together(&[UPDATE_ENROLLED, UPSERT_MESSAGE]));
pub(crate) const DELETE_TOKEN_UPDATE: &str = "DELETE FROM enrollment_messages WHERE enrollment_id = ? AND message_type = 'TokenUpdate'";
pub(crate) const UPSERT_TOKEN: &str = "INSERT INTO enrollment_tokens (tenant_id, enrollment_id, name, token, stored_at) VALUES (?, ?, ?, ?, ?) \
    ON CONFLICT (enrollment_id, name) DO UPDATE SET token = excluded.token, stored_at = excluded.stored_at";
pub(crate) const DELETE_TOKEN: &str = "DELETE FROM enrollment_tokens WHERE enrollment_id = ? AND name = ?";
const DELETE_TOKENS: &str = "DELETE FROM enrollment_tokens WHERE enrollment_id = ?";
pub(crate) const SELECT_TOKEN: &str = "SELECT token FROM enrollment_tokens WHERE enrollment_id = ? AND name = ? AND tenant_id = ?";
const DISABLE: &str = "UPDATE enrollments SET state = 'checked-out', tally = 0, push_magic = NULL, push_token = NULL, awaiting_configuration = NULL, \
    renewal_until = NULL, renewal_command_uuid = NULL, renewing = 0, checked_out_at = ?, updated_at = ? WHERE id = ?";
const DISABLE_USERS: &str = "UPDATE enrollments SET state = 'checked-out', tally = 0, push_magic = NULL, push_token = NULL, awaiting_configuration = NULL, \
    checked_out_at = ?, updated_at = ? WHERE parent_id = ? AND state <> 'checked-out'";
const SELECT_FAILING: &str =
    "SELECT enrollment_id FROM push_failures WHERE enrollment_id IN (SELECT id FROM enrollments WHERE id = ? OR parent_id = ?)";
const SET_AWAITING: &str = "UPDATE enrollments SET awaiting_configuration = ?, updated_at = ? WHERE id = ?";
const INSERT_TAG: &str =
    "INSERT INTO enrollment_tags (tenant_id, enrollment_id, tag, created_at) VALUES (?, ?, ?, ?) ON CONFLICT (enrollment_id, tag) DO NOTHING";
const DELETE_TAG: &str = "DELETE FROM enrollment_tags WHERE enrollment_id = ? AND tag = ?";
const RELEASE: &str = "UPDATE enrollments SET quarantined_by = NULL, updated_at = ? WHERE id = ? AND tenant_id = ? AND quarantined_by IS NOT NULL";

fn refused(reason: &str) -> Applied<Authenticated> {
    Applied::Done(Authenticated::Refused { reason: reason.to_owned() })
}

async fn authenticate(tx: &mut Tx, message: &Authenticate) -> Result<Applied<Authenticated>, StorageError> {
    let Authenticate { tenant, enrollment, now, .. } = message;
    let id = &enrollment.id;
    let identity = hex(&message.certificate.identity);

    let bound = tx.one(SELECT_BINDING, args![identity.as_str()]).await?.map(|row| binding(&row)).transpose()?;
    let is_shared = bound.as_ref().is_some_and(|bound| bound.enrollment != *id);
    match &bound {
        Some(_) if is_shared && !message.may_share_certificate => return Ok(refused("its certificate is bound to another enrollment")),
        Some(_) if is_shared => {}
        Some(bound) if bound.is_replaced() => return Ok(refused("its certificate was replaced by a later Authenticate")),
        _ => {}
    }
    let known = tx.one(SELECT_ENROLLMENT, args![id.as_str()]).await?;
    if let Some(known) = &known {
        if known.text(0)? != tenant.as_str() {
            return Ok(refused("it belongs to another tenant"));
        }
        if known.opt_text(10)?.is_some() {
            return Ok(refused("it is the channel of a user"));
        }
    }
    let sound = match effects::check_decision(tx, &message.effects, *now).await? {
        Applied::Done(sound) => sound,
        Applied::Conflict(what) => return Ok(Applied::Conflict(what)),
    };
    if let Some(known) = &known {
        if is_renewal(known, message)? {
            renew(tx, message, known, bound.as_ref().map(|bound| bound.standing), is_shared, sound).await?;
            return Ok(Applied::Done(Authenticated::Renewed));
        }
        if bound.is_none() && !message.may_change_certificate {
            return Ok(refused("it is known by another certificate, and may not come back with a new one"));
        }
    }
    let is_known = known.is_some();
    // A device whose first Authenticate was not answered sends it again, with the same certificate: it is as new as before.
    let re_enrolling = match &known {
        Some(known) => bound.is_none() || state(&known.text(2)?)? != EnrollmentState::Enrolling || known.flag(5)?,
        None => false,
    };

    let facts = json(&message.facts)?;
    let begun = args![
        id.as_str(),
        tenant.as_str(),
        enrollment.kind.as_str(),
        message.topic.as_str(),
        i64::from(re_enrolling),
        message.quarantined_by.as_deref(),
        message.facts.serial_number.as_deref(),
        message.facts.model.as_deref(),
        facts,
        tx.keyring.at(&sealed::URL_PARAMS, tenant, &[id]).seal(json(&message.url_params)?.as_bytes())?,
        without_reasons(&message.decisions),
        now.as_millis(),
        now.as_millis(),
        now.as_millis(),
    ];
    let begun = and_message(tx, begun, tenant, id, "Authenticate", &message.raw, *now)?;
    tx.run(&STORE_AUTHENTICATE, begun).await?;
    if is_known {
        tx.run(DELETE_TOKEN_UPDATE, args![id.as_str()]).await?;
        forget_secrets_and_users(tx, id, *now).await?;
        if !is_shared {
            replace_bindings(tx, id, &identity, *now).await?;
        }
    }
    if bound.is_none() {
        bind(tx, tenant, id, &message.certificate, Standing::Own, *now).await?;
    } else if !is_shared {
        let binding = Binding { tenant: tenant.clone(), enrollment: id.clone(), standing: Standing::Own };
        tx.after_commit(Change::Binding(message.certificate.identity, binding));
    }
    for tag in &message.tags {
        add_tag(tx, tenant, id, tag, *now).await?;
    }
    if message.quarantined_by.is_some() {
        add_tag(tx, tenant, id, QUARANTINED, *now).await?;
    } else if is_known {
        remove_tag(tx, id, QUARANTINED).await?;
    }
    tx.after_commit(Change::Seen(id.clone(), *now));

    if is_known {
        clear_queue(tx, tenant, id, &Cause::default(), *now).await?;
        forget_idempotency_keys(tx, id).await?;
    }
    for plugin in sound {
        effects::apply(tx, plugin, &effects::cause_of(plugin, 0), None, *now).await?;
    }
    for row in &message.audit {
        audit::insert(tx, row).await?;
    }
    let happened = Happened { tenant, topic: "enrollment.enrolling", request_type: None, at: *now, who: Some(id), cause: &Cause::default() };
    emit(tx, happened, || json!({ "message": redacted(&message.document), "re_enrolling": re_enrolling, "decisions": message.decisions })).await?;
    emit_check_in(tx, tenant, id, "checkin.Authenticate", *now, || redacted(&message.document)).await?;
    heard(tx, tenant, id, None, *now).await?;
    Ok(Applied::Done(Authenticated::Stored { re_enrolling }))
}

/// Whether the Authenticate is the renewal that a command asked for, and nothing else that happened within its day. A device that is being
/// wiped comes back as a new one.
fn is_renewal(known: &Row, message: &Authenticate) -> Result<bool, StorageError> {
    let is_open = message.may_renew && known.opt_time(11)?.is_some_and(|until| until > message.now);
    let is_being_erased = known.opt_text(13)?.is_some();
    Ok(is_open && !is_being_erased && state(&known.text(2)?)? == EnrollmentState::Enrolled && known.text(3)? == message.topic)
}

/// The enrollment goes on: its queue, its tokens, its users and its tally stay. Only what it says of itself is another, and its certificate,
/// as soon as the TokenUpdate behind is signed by it.
async fn renew(
    tx: &mut Tx,
    message: &Authenticate,
    known: &Row,
    standing: Option<Standing>,
    is_shared: bool,
    effects: Vec<&PluginEffects>,
) -> Result<(), StorageError> {
    let Authenticate { tenant, enrollment, now, .. } = message;
    let id = &enrollment.id;
    let facts = merged(&known.text(7)?, &message.facts)?;
    let renewing = args![
        json(&facts)?,
        facts.serial_number.as_deref(),
        facts.model.as_deref(),
        tx.keyring.at(&sealed::URL_PARAMS, tenant, &[id]).seal(json(&message.url_params)?.as_bytes())?,
        without_reasons(&message.decisions),
        message.quarantined_by.as_deref(),
        now.as_millis(),
        id.as_str(),
    ];
    let renewing = and_message(tx, renewing, tenant, id, "Authenticate", &message.raw, *now)?;
    tx.run(&STORE_RENEWAL, renewing).await?;
    let document = || redacted(&message.document);
    match standing {
        None if has_own(tx, id).await? => {
            forget_incoming(tx, id).await?;
            bind(tx, tenant, id, &message.certificate, Standing::Incoming, *now).await?;
        }
        None => {
            bind(tx, tenant, id, &message.certificate, Standing::Own, *now).await?;
            renewed(tx, tenant, id, "renewal", "", Some(document()), *now).await?;
        }
        // It begins once more with the certificate that it had: what the renewal has brought came to nothing.
        Some(Standing::Outgoing) if !is_shared => replace_bindings(tx, id, &hex(&message.certificate.identity), *now).await?,
        // The same certificate again: the answer to its Authenticate was lost, or the profile brought none.
        Some(_) => {}
    }
    for tag in &message.tags {
        add_tag(tx, tenant, id, tag, *now).await?;
    }
    if message.quarantined_by.is_some() {
        add_tag(tx, tenant, id, QUARANTINED, *now).await?;
    }
    tx.after_commit(Change::Seen(id.clone(), *now));
    for plugin in effects {
        effects::apply(tx, plugin, &effects::cause_of(plugin, 0), None, *now).await?;
    }
    for row in &message.audit {
        audit::insert(tx, row).await?;
    }
    emit_check_in(tx, tenant, id, "checkin.Authenticate", *now, document).await?;
    heard(tx, tenant, id, None, *now).await
}

/// What a device that begins anew does not have any more.
pub(crate) async fn forget_secrets_and_users(tx: &mut Tx, id: &EnrollmentId, now: Timestamp) -> Result<(), StorageError> {
    tx.run(DELETE_TOKENS, args![id.as_str()]).await?;
    tx.run(DISABLE_USERS, args![now.as_millis(), now.as_millis(), id.as_str()]).await?;
    forget_failing_pushes(tx, id).await
}

/// Nobody pushes to a channel that has left, nor to its users: that it could not be woken is of no interest any more.
async fn forget_failing_pushes(tx: &mut Tx, id: &EnrollmentId) -> Result<(), StorageError> {
    for row in tx.all(SELECT_FAILING, args![id.as_str(), id.as_str()]).await? {
        push_failures::forget(tx, &EnrollmentId::new(row.text(0)?)).await?;
    }
    Ok(())
}

/// What stands beside the enrollment in plain: a policy's words may say anything, and are kept where they are sealed.
fn without_reasons(decisions: &Value) -> String {
    let mut decisions = decisions.clone();
    for decision in decisions.as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
        decision.remove("reason");
    }
    decisions.to_string()
}

/// For so long after a command that renews the identity went out, an Authenticate of its device is the renewal.
const RENEWAL: Duration = Duration::from_hours(24);

/// A command that renews the identity goes out to a channel of the device.
pub(crate) async fn renewal_begins(tx: &mut Tx, channel: &EnrollmentId, command_uuid: &str, now: Timestamp) -> Result<(), StorageError> {
    tx.run(OPEN_RENEWAL, args![now.plus(RENEWAL).as_millis(), command_uuid, channel.as_str()]).await?;
    Ok(())
}

/// The device has not carried that command out, or not to the end: which certificate it goes on with, its next TokenUpdate tells.
pub(crate) async fn renewal_fails(tx: &mut Tx, channel: &EnrollmentId, command_uuid: &str) -> Result<(), StorageError> {
    tx.run(CLOSE_RENEWAL_OF, args![command_uuid, channel.as_str()]).await?;
    Ok(())
}

/// The device is wiped: whatever comes from it next is of a new one.
pub(crate) async fn renewal_ends(tx: &mut Tx, device: &EnrollmentId) -> Result<(), StorageError> {
    tx.run(CLOSE_RENEWAL, args![device.as_str()]).await?;
    Ok(())
}

/// A command that wipes the device goes out to one of its channels: unless it fails, what authenticates next is a new one, whatever becomes
/// of the command here.
pub(crate) async fn erase_begins(tx: &mut Tx, channel: &EnrollmentId, command_uuid: &str) -> Result<(), StorageError> {
    tx.run(ERASE_BEGINS, args![command_uuid, channel.as_str()]).await?;
    Ok(())
}

/// The device itself says that it was not wiped.
pub(crate) async fn erase_fails(tx: &mut Tx, channel: &EnrollmentId, command_uuid: &str) -> Result<(), StorageError> {
    tx.run(ERASE_FAILS, args![command_uuid, channel.as_str()]).await?;
    Ok(())
}

async fn token_update(tx: &mut Tx, message: &TokenUpdate) -> Result<TokenUpdated, StorageError> {
    let refused = |reason: &str| Ok(TokenUpdated::Refused { reason: reason.to_owned() });
    let TokenUpdate { tenant, enrollment, now, .. } = message;
    let id = &enrollment.id;
    if let Some(parent) = &enrollment.parent {
        let Some(device) = tx.one(SELECT_ENROLLMENT, args![parent.as_str()]).await? else {
            return refused("its device is unknown");
        };
        if device.text(0)? != tenant.as_str() {
            return refused("its device belongs to another tenant");
        }
        if state(&device.text(2)?)? != EnrollmentState::Enrolled {
            return refused("its device is not enrolled");
        }
        if device.text(3)? != message.topic {
            return refused("its topic is not that of its device");
        }
    }
    let known = tx.one(SELECT_ENROLLMENT, args![id.as_str()]).await?;
    let row = match (known, &enrollment.parent) {
        (Some(row), _) => row,
        (None, None) => return refused("it is unknown"),
        (None, Some(parent)) => {
            let users = tx.one(COUNT_USERS, args![parent.as_str()]).await?.map_or(Ok(0), |row| row.int(0))?;
            if users >= USERS {
                return refused("its device has too many user channels");
            }
            insert_user(tx, message, parent).await?
        }
    };
    if row.text(0)? != tenant.as_str() {
        return refused("it belongs to another tenant");
    }
    if row.opt_text(10)?.as_deref() != enrollment.parent.as_ref().map(EnrollmentId::as_str) {
        return refused("it is another kind of channel");
    }
    if enrollment.parent.is_none() && state(&row.text(2)?)? == EnrollmentState::CheckedOut {
        return refused("it has checked out");
    }
    // A user's topic is its device's, with which it was compared above; the device may have enrolled again with another one since.
    if enrollment.parent.is_none() && row.text(3)? != message.topic {
        return refused("its topic is not that of its Authenticate");
    }

    let is_device = enrollment.parent.is_none();
    // A TokenUpdate that was signed before has put it off, and now comes the one that was waited for.
    let is_resumed = is_device && !row.flag(12)? && row.count(4)? > 0 && is_incoming(tx, id, &message.identity).await?;
    if is_resumed {
        tx.run(RESUME_RENEWAL, args![id.as_str()]).await?;
    }
    let renewing = is_device && (row.flag(12)? || is_resumed);
    let settled = if renewing { settle(tx, id, &message.identity, *now).await? } else { Settled::Nothing };
    if settled == Settled::FellBack {
        tx.run(PUT_RENEWAL_OFF, args![id.as_str()]).await?;
    }
    // What looked like a renewal was a device in its Setup Assistant: somebody has wiped it meanwhile. The certificate that it had before
    // would not have outlived that.
    let begins_anew = renewing && settled != Settled::FellBack && message.awaiting_configuration == Some(true);
    if begins_anew {
        tx.run(BEGIN_ANEW, args![now.as_millis(), now.as_millis(), id.as_str()]).await?;
        forget_secrets_and_users(tx, id, *now).await?;
        clear_queue(tx, tenant, id, &Cause::default(), *now).await?;
        forget_idempotency_keys(tx, id).await?;
    }
    let tally = if begins_anew { 1 } else { row.count(4)?.saturating_add(1) };
    let re_enrolling = begins_anew || row.flag(5)?;
    let was_awaiting = if begins_anew { None } else { row.opt_int(6)? };
    let awaiting = message.awaiting_configuration.map(i64::from).or(was_awaiting);
    let facts = merged(&row.text(7)?, &message.facts)?;
    let rotated = tally > 1
        && (tx.keyring.at(&sealed::PUSH_MAGIC, tenant, &[id]).open_opt(row.opt_blob(8)?)?.as_deref() != Some(message.push_magic.as_bytes())
            || tx.keyring.at(&sealed::PUSH_TOKEN, tenant, &[id]).open_opt(row.opt_blob(9)?)?.as_deref() != Some(&*message.token));
    let enrolled = args![
        message.topic.as_str(),
        i64::from(tally),
        awaiting,
        json(&facts)?,
        facts.serial_number.as_deref(),
        facts.model.as_deref(),
        tx.keyring.at(&sealed::PUSH_MAGIC, tenant, &[id]).seal(message.push_magic.as_bytes())?,
        tx.keyring.at(&sealed::PUSH_TOKEN, tenant, &[id]).seal(&message.token)?,
        (tally == 1).then(|| now.as_millis()),
        now.as_millis(),
        id.as_str(),
    ];
    let enrolled = and_message(tx, enrolled, tenant, id, "TokenUpdate", &message.raw, *now)?;
    tx.run(&STORE_TOKEN_UPDATE, enrolled).await?;
    // Apple may have missed the very same token for a while.
    let was_failing = tx.is_push_failing(id);
    push_failures::forget(tx, id).await?;
    if tally == 1 || rotated || was_failing {
        wakes::can_be_woken(tx, tenant, id, *now).await?;
    }
    if let Some(token) = message.unlock_token.as_ref().filter(|_| may_have_unlock_token(enrollment.kind)) {
        upsert_token(tx, tenant, id, UNLOCK_TOKEN, token, *now).await?;
    }
    tx.after_commit(Change::Seen(id.clone(), *now));

    let outside = Cause::default();
    let happened = |topic| Happened { tenant, topic, request_type: None, at: *now, who: Some(id), cause: &outside };
    let data = || json!({ "message": redacted(&message.document) });
    if let (Settled::Renewed { previous }, false) = (&settled, begins_anew) {
        renewed(tx, tenant, id, "renewal", previous, Some(redacted(&message.document)), *now).await?;
    }
    if tally == 1 && enrollment.parent.is_none() {
        let data = || json!({ "message": redacted(&message.document), "re_enrolling": re_enrolling });
        emit(tx, happened("enrollment.enrolled"), data).await?;
    } else if tally == 1 {
        emit(tx, happened("user.enrolled"), data).await?;
    } else if rotated {
        emit(tx, happened("push-token.rotated"), data).await?;
    }
    if awaiting == Some(1) && was_awaiting != Some(1) {
        emit(tx, happened("configuration.awaiting"), data).await?;
    }
    emit(tx, happened("checkin.TokenUpdate"), data).await?;
    heard(tx, tenant, id, Some(tally), *now).await?;
    Ok(TokenUpdated::Stored { tally })
}

/// Answers the new row.
async fn insert_user(tx: &mut Tx, message: &TokenUpdate, parent: &EnrollmentId) -> Result<Row, StorageError> {
    let TokenUpdate { tenant, enrollment: Enrollment { id, kind, .. }, topic, now, .. } = message;
    let (no_params, now) = (tx.keyring.at(&sealed::URL_PARAMS, tenant, &[id]).seal(b"{}")?, now.as_millis());
    let args = args![id.as_str(), tenant.as_str(), parent.as_str(), kind.as_str(), topic.as_str(), no_params, now, now];
    tx.run(INSERT_USER, args).await?;
    let row = tx.one(SELECT_ENROLLMENT, args![id.as_str()]).await?;
    row.ok_or_else(|| StorageError::corrupt(format!("enrollment {id} is not there after it was inserted")))
}

async fn check_out(tx: &mut Tx, tenant: &TenantId, id: &EnrollmentId, raw: &Bytes, now: Timestamp) -> Result<bool, StorageError> {
    if !is_known(tx, tenant, id).await? {
        return Ok(false);
    }
    tx.run(DISABLE, args![now.as_millis(), now.as_millis(), id.as_str()]).await?;
    tx.run(DISABLE_USERS, args![now.as_millis(), now.as_millis(), id.as_str()]).await?;
    wakes::device_begins_anew(tx, id, now).await?;
    forget_failing_pushes(tx, id).await?;
    store_message(tx, tenant, id, "CheckOut", raw, now).await?;
    tx.after_commit(Change::Seen(id.clone(), now));
    let message = || wasmdm_protocol::plist::parse(raw).map_or_else(|_| json!({}), |document| redacted(&document));
    let happened = Happened { tenant, topic: "enrollment.checked-out", request_type: None, at: now, who: Some(id), cause: &Cause::default() };
    emit(tx, happened, || json!({ "message": message() })).await?;
    emit_check_in(tx, tenant, id, "checkin.CheckOut", now, message).await?;
    heard(tx, tenant, id, None, now).await?;
    Ok(true)
}

async fn set_bootstrap_token(
    tx: &mut Tx,
    tenant: &TenantId,
    id: &EnrollmentId,
    token: Option<&[u8]>,
    awaiting_configuration: Option<bool>,
    now: Timestamp,
) -> Result<bool, StorageError> {
    let Some(row) = tx.one(SELECT_ENROLLMENT, args![id.as_str()]).await? else {
        return Ok(false);
    };
    if row.text(0)? != tenant.as_str() {
        return Ok(false);
    }
    match token {
        Some(token) => upsert_token(tx, tenant, id, BOOTSTRAP_TOKEN, token, now).await?,
        None => {
            tx.run(DELETE_TOKEN, args![id.as_str(), BOOTSTRAP_TOKEN]).await?;
        }
    }
    if let Some(awaiting) = awaiting_configuration {
        tx.run(SET_AWAITING, args![i64::from(awaiting), now.as_millis(), id.as_str()]).await?;
    }
    tx.after_commit(Change::Seen(id.clone(), now));

    let message = || {
        let mut message = Map::new();
        message.insert("MessageType".to_owned(), "SetBootstrapToken".into());
        if token.is_some() {
            message.insert("BootstrapToken".to_owned(), json!({ "$redacted": true }));
        }
        if let Some(awaiting) = awaiting_configuration {
            message.insert("AwaitingConfiguration".to_owned(), awaiting.into());
        }
        Value::Object(message)
    };
    let outside = Cause::default();
    let happened = |topic| Happened { tenant, topic, request_type: None, at: now, who: Some(id), cause: &outside };
    if token.is_some() {
        emit(tx, happened("bootstrap-token.escrowed"), || json!({ "message": message() })).await?;
    }
    if awaiting_configuration == Some(true) && row.opt_int(6)? != Some(1) {
        emit(tx, happened("configuration.awaiting"), || json!({ "message": message() })).await?;
    }
    emit(tx, happened("checkin.SetBootstrapToken"), || json!({ "message": message() })).await?;
    heard(tx, tenant, id, None, now).await?;
    Ok(true)
}

/// Setup Assistant goes on: `DeviceConfigured` or `UserConfigured` was acknowledged.
pub(crate) async fn configuration_released(tx: &mut Tx, tenant: &TenantId, id: &EnrollmentId, now: Timestamp) -> Result<(), StorageError> {
    tx.run(SET_AWAITING, args![0_i64, now.as_millis(), id.as_str()]).await?;
    let happened = Happened { tenant, topic: "configuration.released", request_type: None, at: now, who: Some(id), cause: &Cause::default() };
    emit(tx, happened, || json!({})).await
}

/// Whether it is an enrollment of the tenant.
pub(crate) async fn is_known(tx: &mut Tx, tenant: &TenantId, id: &EnrollmentId) -> Result<bool, StorageError> {
    match tx.one("SELECT tenant_id FROM enrollments WHERE id = ?", args![id.as_str()]).await? {
        Some(row) => Ok(row.text(0)? == tenant.as_str()),
        None => Ok(false),
    }
}

/// Whether it is in quarantine.
pub(crate) async fn is_quarantined(tx: &mut Tx, tenant: &TenantId, id: &EnrollmentId) -> Result<bool, StorageError> {
    let sql = "SELECT 1 FROM enrollments WHERE id = ? AND tenant_id = ? AND quarantined_by IS NOT NULL";
    Ok(tx.one(sql, args![id.as_str(), tenant.as_str()]).await?.is_some())
}

/// Ends a quarantine; `false`: there was none.
pub(crate) async fn release(tx: &mut Tx, tenant: &TenantId, id: &EnrollmentId, now: Timestamp) -> Result<bool, StorageError> {
    if tx.run(RELEASE, args![now.as_millis(), id.as_str(), tenant.as_str()]).await? == 0 {
        return Ok(false);
    }
    remove_tag(tx, id, QUARANTINED).await?;
    Ok(true)
}

pub(crate) async fn add_tag(tx: &mut Tx, tenant: &TenantId, id: &EnrollmentId, tag: &str, now: Timestamp) -> Result<(), StorageError> {
    tx.run(INSERT_TAG, args![tenant.as_str(), id.as_str(), tag, now.as_millis()]).await?;
    Ok(())
}

pub(crate) async fn remove_tag(tx: &mut Tx, id: &EnrollmentId, tag: &str) -> Result<(), StorageError> {
    tx.run(DELETE_TAG, args![id.as_str(), tag]).await?;
    Ok(())
}

pub(crate) async fn store_message(
    tx: &mut Tx,
    tenant: &TenantId,
    id: &EnrollmentId,
    message_type: &str,
    raw: &[u8],
    now: Timestamp,
) -> Result<(), StorageError> {
    let message = and_message(tx, args![], tenant, id, message_type, raw, now)?;
    tx.run(UPSERT_MESSAGE, message).await?;
    Ok(())
}

/// The arguments of [`UPSERT_MESSAGE`], behind those of the statement that goes before it.
fn and_message(
    tx: &Tx,
    mut before: Args,
    tenant: &TenantId,
    id: &EnrollmentId,
    message_type: &str,
    raw: &[u8],
    now: Timestamp,
) -> Result<Args, StorageError> {
    before.add(tenant.as_str());
    before.add(id.as_str());
    before.add(message_type);
    before.add(tx.keyring.at(&sealed::MESSAGE, tenant, &[id, &message_type]).seal(raw)?);
    before.add(now.as_millis());
    Ok(before)
}

/// Apple forbids unlock tokens on Shared iPad and in User Enrollment, and what is a user's is never the device's (edge case 16).
pub(crate) fn may_have_unlock_token(kind: EnrollmentKind) -> bool {
    kind == EnrollmentKind::Device
}

pub(crate) async fn upsert_token(
    tx: &mut Tx,
    tenant: &TenantId,
    id: &EnrollmentId,
    name: &str,
    token: &[u8],
    now: Timestamp,
) -> Result<(), StorageError> {
    let token = tx.keyring.at(&sealed::TOKEN, tenant, &[id, &name]).seal(token)?;
    tx.run(UPSERT_TOKEN, args![tenant.as_str(), id.as_str(), name, token, now.as_millis()]).await?;
    Ok(())
}

fn json(value: &impl serde::Serialize) -> Result<String, StorageError> {
    serde_json::to_string(value).map_err(|error| StorageError::Invalid { field: "facts", problem: error.to_string() })
}

/// What a message does not say stays as it was.
pub(crate) fn merged(stored: &str, said: &DeviceFacts) -> Result<DeviceFacts, StorageError> {
    let known: DeviceFacts =
        serde_json::from_str(stored).map_err(|error| StorageError::corrupt(format!("the facts of an enrollment do not parse: {error}")))?;
    let pick = |said: &Option<String>, known: Option<String>| said.clone().or(known);
    Ok(DeviceFacts {
        serial_number: pick(&said.serial_number, known.serial_number),
        model: pick(&said.model, known.model),
        model_name: pick(&said.model_name, known.model_name),
        product_name: pick(&said.product_name, known.product_name),
        os_version: pick(&said.os_version, known.os_version),
        build_version: pick(&said.build_version, known.build_version),
        user_short_name: pick(&said.user_short_name, known.user_short_name),
        user_long_name: pick(&said.user_long_name, known.user_long_name),
    })
}
