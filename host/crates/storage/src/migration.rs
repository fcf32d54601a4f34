//! What another server knew of a device, brought here by a client of the API (NanoMDM's `/migration`).
//!
//! The device itself has not spoken: nothing is emitted as if it had, and no certificate is bound. Whatever it says here itself counts for
//! more than what was brought, so that a message that comes late, or again, takes nothing from a device that has come in the meantime.

use crate::audit::{self, AuditRow};
use crate::commands::{clear_queue, forget_idempotency_keys};
use crate::enrollments::{
    BOOTSTRAP_TOKEN, COUNT_USERS, DELETE_TOKEN, DELETE_TOKEN_UPDATE, INSERT_USER, SELECT_TOKEN, UNLOCK_TOKEN, USERS, forget_secrets_and_users,
    may_have_unlock_token, merged, store_message, upsert_token,
};
use crate::events::{Cause, EnrollmentState, state};
use crate::keyring::Keyring;
use crate::sql::{Columns, Row, args};
use crate::writer::{Class, Outcome, Tx};
use crate::{Storage, StorageError, push_failures, sealed, wakes};
use bytes::Bytes;
use serde_json::json;
use std::sync::Arc;
use wasmdm_protocol::checkin::{Authenticate, CheckIn, CheckInMessage, SetBootstrapToken, TokenUpdate};
use wasmdm_protocol::enrollment::{DeviceFacts, EnrollmentId, TenantId};
use wasmdm_protocol::time::Timestamp;

/// What became of a message that was brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Migrated {
    /// It counts now.
    Stored,
    /// It was here already.
    Unchanged,
    /// Nothing was written.
    Refused {
        /// For the client of the API.
        reason: String,
    },
}

impl Storage {
    /// Takes an Authenticate, a TokenUpdate or a `SetBootstrapToken` that a device once sent to another server. The tenant is the owner of
    /// the topic. `actor` is for the audit.
    pub async fn migrate(&self, message: CheckInMessage, actor: &str, now: Timestamp) -> Result<Migrated, StorageError> {
        let brought = Arc::new((message, actor.to_owned()));
        self.write(Class::Answer, move |tx| {
            let brought = Arc::clone(&brought);
            Box::pin(async move { Ok(Outcome::Commit(migrate(tx, &brought.0, &brought.1, now).await?)) })
        })
        .await
    }
}

/// What is here already.
#[derive(Clone)]
struct Known {
    tenant: TenantId,
    parent: Option<String>,
    state: EnrollmentState,
    topic: String,
    tally: u32,
    facts: String,
    push_magic: Option<Bytes>,
    push_token: Option<Bytes>,
    /// A certificate is or was bound to the device: it has come here.
    has_come: bool,
    /// It came with an Authenticate, so that its enrollment with the other server is over.
    enrolled_itself: bool,
}

const SELECT_KNOWN: &str = "SELECT e.tenant_id, e.parent_id, e.state, e.topic, e.tally, e.facts, e.push_magic, e.push_token, \
    EXISTS (SELECT 1 FROM certificate_bindings b WHERE b.enrollment_id = e.id), \
    EXISTS (SELECT 1 FROM certificate_bindings b WHERE b.enrollment_id = e.id AND b.created_at <= e.authenticated_at) \
    FROM enrollments e WHERE e.id = ?";
const SELECT_MESSAGE: &str = "SELECT raw FROM enrollment_messages WHERE enrollment_id = ? AND message_type = ?";
const SELECT_TOPIC: &str = "SELECT tenant_id FROM push_topics WHERE topic = ?";
// A quarantine stays: it is this server's own.
const BEGIN: &str = "INSERT INTO enrollments \
    (id, tenant_id, kind, topic, state, generation, tally, re_enrolling, serial_number, model, facts, url_params, decisions, \
     authenticated_at, created_at, updated_at) \
    VALUES (?, ?, ?, ?, 'enrolling', 1, 0, 0, ?, ?, ?, ?, '[]', ?, ?, ?) \
    ON CONFLICT (id) DO UPDATE SET topic = excluded.topic, state = 'enrolling', generation = enrollments.generation + 1, tally = 0, \
     re_enrolling = 0, awaiting_configuration = NULL, serial_number = excluded.serial_number, model = excluded.model, \
     facts = excluded.facts, url_params = excluded.url_params, decisions = excluded.decisions, push_magic = NULL, push_token = NULL, \
     renewal_until = NULL, renewal_command_uuid = NULL, renewing = 0, erase_command_uuid = NULL, authenticated_at = excluded.authenticated_at, enrolled_at = NULL, \
     checked_out_at = NULL, updated_at = excluded.updated_at";
// Whether the device waits for its configuration is not taken over: that was said once, and is usually long over.
const ENROLL: &str = "UPDATE enrollments SET state = 'enrolled', topic = ?, tally = ?, facts = ?, serial_number = ?, model = ?, push_magic = ?, \
    push_token = ?, enrolled_at = COALESCE(enrolled_at, ?), checked_out_at = NULL, updated_at = ? WHERE id = ?";

async fn migrate(tx: &mut Tx, message: &CheckInMessage, actor: &str, now: Timestamp) -> Result<Migrated, StorageError> {
    let (outcome, tenant) = match &message.check_in {
        CheckIn::Authenticate(authenticate) => begin(tx, message, authenticate, now).await?,
        CheckIn::TokenUpdate(update) => enroll(tx, message, update, now).await?,
        CheckIn::SetBootstrapToken(set) => escrow(tx, message.enrollment.device(), set, now).await?,
        other => {
            return Ok(Migrated::Refused {
                reason: format!("MessageType: nothing is kept of {}; send Authenticate, TokenUpdate or SetBootstrapToken", other.message_type()),
            });
        }
    };
    if outcome == Migrated::Stored {
        let row = AuditRow {
            tenant,
            actor: actor.to_owned(),
            action: "enrollment.migrated".to_owned(),
            target: Some(message.enrollment.id.clone()),
            detail: json!({ "message": message.check_in.message_type() }),
            at: now,
        };
        audit::insert(tx, &row).await?;
    }
    Ok(outcome)
}

/// With whose audit it belongs to.
type Done = (Migrated, TenantId);

fn refused(reason: &str) -> Done {
    (Migrated::Refused { reason: reason.to_owned() }, TenantId::default())
}

const HAS_COME: &str = "it has come here itself, and what it said counts";

async fn begin(tx: &mut Tx, message: &CheckInMessage, authenticate: &Authenticate, now: Timestamp) -> Result<Done, StorageError> {
    let id = &message.enrollment.id;
    if !message.enrollment.kind.is_device_channel() {
        return Ok(refused("Authenticate belongs to the device channel"));
    }
    let tenant = tx.one(SELECT_TOPIC, args![authenticate.topic.as_str()]).await?.map(|row| crate::tenant(&row, 0)).transpose()?.unwrap_or_default();
    let known = known(tx, id).await?;
    if let Some(known) = &known {
        if known.tenant != tenant {
            return Ok(refused("it belongs to another tenant"));
        }
        if known.parent.is_some() {
            return Ok(refused("it is the channel of a user"));
        }
        if is_stored(tx, &tenant, message).await? {
            return Ok((Migrated::Unchanged, tenant));
        }
        if known.has_come {
            return Ok(refused(HAS_COME));
        }
        // It enrolled anew with the other server since it was brought the first time.
        tx.run(DELETE_TOKEN_UPDATE, args![id.as_str()]).await?;
        forget_secrets_and_users(tx, id, now).await?;
        clear_queue(tx, &tenant, id, &Cause::default(), now).await?;
        forget_idempotency_keys(tx, id).await?;
    }
    let facts = &message.facts;
    tx.run(
        BEGIN,
        args![
            id.as_str(),
            tenant.as_str(),
            message.enrollment.kind.as_str(),
            authenticate.topic.as_str(),
            facts.serial_number.as_deref(),
            facts.model.as_deref(),
            facts_json(facts)?,
            tx.keyring.at(&sealed::URL_PARAMS, &tenant, &[id]).seal(b"{}")?,
            now.as_millis(),
            now.as_millis(),
            now.as_millis(),
        ],
    )
    .await?;
    store_message(tx, &tenant, id, "Authenticate", &message.raw, now).await?;
    Ok((Migrated::Stored, tenant))
}

async fn enroll(tx: &mut Tx, message: &CheckInMessage, update: &TokenUpdate, now: Timestamp) -> Result<Done, StorageError> {
    let id = &message.enrollment.id;
    let Some(device) = known(tx, message.enrollment.device()).await? else {
        return Ok(refused("its device is unknown here: send the Authenticate first"));
    };
    let tenant = device.tenant.clone();
    if device.parent.is_some() {
        return Ok(refused("its device is the channel of a user"));
    }
    if device.topic != update.topic {
        return Ok(refused("its Topic is not that of its device's Authenticate"));
    }
    let (channel, is_new) = match &message.enrollment.parent {
        None => (device.clone(), false),
        Some(_) if device.state != EnrollmentState::Enrolled => {
            return Ok(refused("its device is not enrolled: send the device's TokenUpdate first"));
        }
        Some(parent) => match known(tx, id).await? {
            Some(channel) => (channel, false),
            None => (new_user(&device, parent)?, true),
        },
    };
    if channel.tenant != tenant || channel.parent.as_deref() != message.enrollment.parent.as_ref().map(EnrollmentId::as_str) {
        return Ok(refused("it is another channel here"));
    }
    let is_same = channel.state == EnrollmentState::Enrolled
        && channel.topic == update.topic
        && channel.push_magic.as_deref() == Some(update.push_magic.as_bytes())
        && channel.push_token.as_deref() == Some(&*update.token);
    if device.has_come {
        if is_same {
            return Ok((Migrated::Unchanged, tenant));
        }
        // Who came with the certificate of the old enrollment may have come before all of that was brought; what is missing is welcome.
        if device.enrolled_itself || channel.state != EnrollmentState::Enrolling {
            return Ok(refused(HAS_COME));
        }
    } else if is_same && is_stored(tx, &tenant, message).await? {
        return Ok((Migrated::Unchanged, tenant));
    }
    if let Some(parent) = &message.enrollment.parent
        && is_new
    {
        if tx.one(COUNT_USERS, args![parent.as_str()]).await?.map_or(Ok(0), |row| row.int(0))? >= USERS {
            return Ok(refused("its device has too many user channels"));
        }
        let (kind, topic, at) = (message.enrollment.kind.as_str(), update.topic.as_str(), now.as_millis());
        let no_params = tx.keyring.at(&sealed::URL_PARAMS, &tenant, &[id]).seal(b"{}")?;
        tx.run(INSERT_USER, args![id.as_str(), tenant.as_str(), parent.as_str(), kind, topic, no_params, at, at]).await?;
    }
    let facts = merged(&channel.facts, &message.facts)?;
    tx.run(
        ENROLL,
        args![
            update.topic.as_str(),
            i64::from(channel.tally.saturating_add(1)),
            facts_json(&facts)?,
            facts.serial_number.as_deref(),
            facts.model.as_deref(),
            tx.keyring.at(&sealed::PUSH_MAGIC, &tenant, &[id]).seal(update.push_magic.as_bytes())?,
            tx.keyring.at(&sealed::PUSH_TOKEN, &tenant, &[id]).seal(&update.token)?,
            now.as_millis(),
            now.as_millis(),
            id.as_str(),
        ],
    )
    .await?;
    store_message(tx, &tenant, id, "TokenUpdate", &message.raw, now).await?;
    push_failures::forget(tx, id).await?;
    wakes::can_be_woken(tx, &tenant, id, now).await?;
    if let Some(token) = update.unlock_token.as_ref().filter(|_| may_have_unlock_token(message.enrollment.kind)) {
        upsert_token(tx, &tenant, id, UNLOCK_TOKEN, token, now).await?;
    }
    Ok((Migrated::Stored, tenant))
}

async fn escrow(tx: &mut Tx, id: &EnrollmentId, set: &SetBootstrapToken, now: Timestamp) -> Result<Done, StorageError> {
    let Some(device) = known(tx, id).await? else {
        return Ok(refused("its device is unknown here: send the Authenticate first"));
    };
    let tenant = device.tenant;
    let stored = tx.one(SELECT_TOKEN, args![id.as_str(), BOOTSTRAP_TOKEN, tenant.as_str()]).await?.map(|row| row.blob(0)).transpose()?;
    let stored = tx.keyring.at(&sealed::TOKEN, &tenant, &[id, &BOOTSTRAP_TOKEN]).open_opt(stored)?;
    if stored == set.bootstrap_token {
        return Ok((Migrated::Unchanged, tenant));
    }
    if device.has_come && (device.enrolled_itself || stored.is_some()) {
        return Ok(refused(HAS_COME));
    }
    match &set.bootstrap_token {
        Some(token) => upsert_token(tx, &tenant, id, BOOTSTRAP_TOKEN, token, now).await?,
        None => {
            tx.run(DELETE_TOKEN, args![id.as_str(), BOOTSTRAP_TOKEN]).await?;
        }
    }
    Ok((Migrated::Stored, tenant))
}

async fn known(tx: &mut Tx, id: &EnrollmentId) -> Result<Option<Known>, StorageError> {
    tx.one(SELECT_KNOWN, args![id.as_str()]).await?.map(|row| Known::of(&row, id, &tx.keyring)).transpose()
}

impl Known {
    fn of(row: &Row, id: &EnrollmentId, keyring: &Keyring) -> Result<Self, StorageError> {
        let tenant = crate::tenant(row, 0)?;
        Ok(Self {
            push_magic: keyring.at(&sealed::PUSH_MAGIC, &tenant, &[id]).open_opt(row.opt_blob(6)?)?,
            push_token: keyring.at(&sealed::PUSH_TOKEN, &tenant, &[id]).open_opt(row.opt_blob(7)?)?,
            tenant,
            parent: row.opt_text(1)?,
            state: state(&row.text(2)?)?,
            topic: row.text(3)?,
            tally: row.count(4)?,
            facts: row.text(5)?,
            has_come: row.flag(8)?,
            enrolled_itself: row.flag(9)?,
        })
    }
}

/// A user's channel before anything is known of it.
fn new_user(device: &Known, parent: &EnrollmentId) -> Result<Known, StorageError> {
    Ok(Known {
        tenant: device.tenant.clone(),
        parent: Some(parent.as_str().to_owned()),
        state: EnrollmentState::Enrolling,
        topic: device.topic.clone(),
        tally: 0,
        facts: facts_json(&DeviceFacts::default())?,
        push_magic: None,
        push_token: None,
        has_come: false,
        enrolled_itself: false,
    })
}

/// Whether the latest message of its type is the same, to the byte.
async fn is_stored(tx: &mut Tx, tenant: &TenantId, message: &CheckInMessage) -> Result<bool, StorageError> {
    let (id, message_type) = (&message.enrollment.id, message.check_in.message_type());
    let stored = tx.one(SELECT_MESSAGE, args![id.as_str(), message_type]).await?.map(|row| row.blob(0)).transpose()?;
    let stored = tx.keyring.at(&sealed::MESSAGE, tenant, &[id, &message_type]).open_opt(stored)?;
    Ok(stored.is_some_and(|stored| stored == message.raw))
}

fn facts_json(facts: &DeviceFacts) -> Result<String, StorageError> {
    serde_json::to_string(facts).map_err(|error| StorageError::Invalid { field: "facts", problem: error.to_string() })
}
