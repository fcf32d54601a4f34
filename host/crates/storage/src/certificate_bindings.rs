//! Which certificate is whose.

use crate::audit::{self, AuditRow};
use crate::events::{Cause, EnrollmentRecord, Happened, SELECT_RECORD, emit};
use crate::memory::Change;
use crate::sql::{Columns, Row, args, together};
use crate::tenants::SELECT_TOPIC;
use crate::writer::{Class, Outcome, Tx};
use crate::{Storage, StorageError, sealed, tenant};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::sync::{Arc, LazyLock};
use wasmdm_protocol::certificate::Certificate;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_protocol::time::Timestamp;

/// Which enrollment a certificate belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// The enrollment's tenant.
    pub tenant: TenantId,
    /// The device's channel.
    pub enrollment: EnrollmentId,
    /// How it stands to the enrollment's other certificates.
    pub standing: Standing,
}

/// How a certificate stands to the others of its enrollment.
///
/// An Authenticate that renews does not end the certificate before: if the TokenUpdate behind it never comes, the device may fall back to
/// what it had. Whichever of the two signs the next TokenUpdate stays, and the other one ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It is the enrollment's.
    Own,
    /// It is the enrollment's, but a renewal is under way that has brought another one.
    Outgoing,
    /// A renewal has brought it, and is under way.
    Incoming,
    /// Another one has taken its place: it is no longer accepted.
    Replaced,
}

impl Binding {
    /// Whether it is no longer accepted.
    pub fn is_replaced(&self) -> bool {
        self.standing == Standing::Replaced
    }
}

/// Whose the certificate is that an Authenticate comes with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CertificateOwner {
    /// It is bound.
    Enrollment(Binding),
    /// It is not, so the tenant is the owner of the push topic, if there is one.
    Nobody {
        /// `None` before a push certificate of the topic was stored.
        topic_owner: Option<TenantId>,
    },
}

/// Why a certificate becomes an enrollment's without an Authenticate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The device's system renewed its identity by itself; the caller has seen that the certificate names the enrollment (edge case 20).
    Rotation,
    /// The enrollment was moved here from another server and has no certificate yet.
    Retroactive,
}

impl Reason {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Rotation => "rotation",
            Self::Retroactive => "retroactive",
        }
    }
}

/// A certificate that a device spoke with and that nobody is known by.
#[derive(Debug, Clone)]
pub struct Association {
    /// The device's channel.
    pub enrollment: EnrollmentId,
    /// Whom it spoke as; the chain was verified.
    pub certificate: Certificate,
    /// Why it may be the enrollment's.
    pub reason: Reason,
    /// Of the device's request.
    pub request_id: String,
    /// When it spoke.
    pub now: Timestamp,
}

/// What became of an [`Association`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Associated {
    /// It is the enrollment's certificate from now on, and its only one.
    Bound(Binding),
    /// Nothing was written.
    Refused {
        /// For the log.
        reason: String,
    },
}

pub(crate) const SELECT_BINDING: &str = "SELECT b.tenant_id, b.enrollment_id, b.replaced, b.pending, \
    EXISTS (SELECT 1 FROM certificate_bindings p WHERE p.enrollment_id = b.enrollment_id AND p.replaced = 0 AND p.pending = 1) \
    FROM certificate_bindings b WHERE b.identity = ?";

static SELECT_BINDING_AND_TOPIC: LazyLock<String> = LazyLock::new(|| together(&[SELECT_BINDING, SELECT_TOPIC]));
static SELECT_BINDING_AND_RECORD: LazyLock<String> = LazyLock::new(|| together(&[SELECT_BINDING, SELECT_RECORD]));
/// Columns of a binding: rows of statements that went together are told apart by theirs.
const BINDING_WIDTH: usize = 5;

impl Storage {
    /// By the certificate's `identity`. Cached with a bound; the cache follows commits.
    pub async fn certificate_binding(&self, identity: &[u8; 32]) -> Result<Option<Binding>, StorageError> {
        let (cached, changes) = self.inner.memory.cached_binding(identity);
        if cached.is_some() {
            return Ok(cached);
        }
        let Some(row) = self.look_up(SELECT_BINDING, args![hex(identity)]).await? else {
            return Ok(None);
        };
        let binding = binding(&row)?;
        self.inner.memory.cache_binding(*identity, binding.clone(), changes);
        Ok(Some(binding))
    }

    /// What an Authenticate asks first: whose the certificate is, and if nobody's, whose its topic is.
    pub async fn certificate_owner(&self, identity: &[u8; 32], topic: &str) -> Result<CertificateOwner, StorageError> {
        let (cached, changes) = self.inner.memory.cached_binding(identity);
        if let Some(binding) = cached {
            return Ok(CertificateOwner::Enrollment(binding));
        }
        let rows = self.quick_reader()?.db().all(&SELECT_BINDING_AND_TOPIC, args![hex(identity), topic]).await?;
        let (bindings, owners): (Vec<_>, Vec<_>) = rows.into_iter().partition(|row| row.width() == BINDING_WIDTH);
        if let Some(row) = bindings.first() {
            let binding = binding(row)?;
            self.inner.memory.cache_binding(*identity, binding.clone(), changes);
            return Ok(CertificateOwner::Enrollment(binding));
        }
        Ok(CertificateOwner::Nobody { topic_owner: owners.first().map(|row| tenant(row, 0)).transpose()? })
    }

    /// What an Authenticate asks next: what is known of the enrollment, and whose the certificate is.
    pub async fn enrollment_and_binding(
        &self,
        id: &EnrollmentId,
        identity: &[u8; 32],
    ) -> Result<(Option<EnrollmentRecord>, Option<Binding>), StorageError> {
        let (cached, changes) = self.inner.memory.cached_binding(identity);
        if cached.is_some() {
            return Ok((self.enrollment(id).await?, cached));
        }
        let mut reader = self.quick_reader()?;
        let rows = reader.db().all(&SELECT_BINDING_AND_RECORD, args![hex(identity), id.as_str()]).await?;
        let (bindings, records): (Vec<_>, Vec<_>) = rows.into_iter().partition(|row| row.width() == BINDING_WIDTH);
        let binding = bindings.first().map(binding).transpose()?;
        if let Some(binding) = &binding {
            self.inner.memory.cache_binding(*identity, binding.clone(), changes);
        }
        Ok((self.records_of(&mut reader, records).await?.pop(), binding))
    }

    /// Binds a certificate to an enrollment that is known, and replaces the one it had. Everything but what the certificate says of its
    /// holder is checked here: it is bound nowhere, the enrollment is a device's, has a certificate (a rotation, and not a later one) or
    /// has never had one (retroactively).
    pub async fn associate_certificate(&self, association: Association) -> Result<Associated, StorageError> {
        let association = Arc::new(association);
        self.write(Class::Answer, move |tx| {
            let association = Arc::clone(&association);
            Box::pin(async move { Ok(Outcome::Commit(associate(tx, &association).await?)) })
        })
        .await
    }
}

const SELECT_DEVICE: &str = "SELECT tenant_id, parent_id FROM enrollments WHERE id = ?";
const SELECT_NEWEST: &str =
    "SELECT replaced, not_before, sha256 FROM certificate_bindings WHERE enrollment_id = ? ORDER BY replaced, pending, created_at DESC LIMIT 1";
// It never became the enrollment's: should the device bring it again, it is as new as the first time.
const FORGET_PENDING: &str = "DELETE FROM certificate_bindings WHERE enrollment_id = ? AND pending = 1 AND identity <> ?";
const REPLACE_BINDINGS: &str =
    "UPDATE certificate_bindings SET replaced = 1, replaced_at = ? WHERE enrollment_id = ? AND replaced = 0 AND identity <> ?";
const NO_LONGER_PENDING: &str = "UPDATE certificate_bindings SET pending = 0 WHERE identity = ? AND pending = 1";
static KEEP_ONE: LazyLock<String> = LazyLock::new(|| together(&[FORGET_PENDING, REPLACE_BINDINGS, NO_LONGER_PENDING]));
const INSERT_BINDING: &str = "INSERT INTO certificate_bindings \
    (identity, sha256, tenant_id, enrollment_id, certificate, subject, issuer, not_before, not_after, replaced, pending, created_at) \
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 0, ?, ?)";

async fn associate(tx: &mut Tx, association: &Association) -> Result<Associated, StorageError> {
    let refused = |reason: &str| Ok(Associated::Refused { reason: reason.to_owned() });
    let Association { enrollment: id, certificate, reason, request_id, now } = association;
    if let Some(row) = tx.one(SELECT_BINDING, args![hex(&certificate.identity)]).await? {
        let bound = binding(&row)?;
        // Two requests of the device at once: the other one has done it.
        return if bound.enrollment == *id && !bound.is_replaced() {
            Ok(Associated::Bound(bound))
        } else {
            refused("its certificate is bound already")
        };
    }
    let Some(device) = tx.one(SELECT_DEVICE, args![id.as_str()]).await? else {
        return refused("it is unknown");
    };
    if device.opt_text(1)?.is_some() {
        return refused("it is the channel of a user");
    }
    let tenant = TenantId::new(device.text(0)?);
    let newest = tx.one(SELECT_NEWEST, args![id.as_str()]).await?;
    let previous = match (reason, &newest) {
        (Reason::Retroactive, Some(_)) => return refused("it has a certificate already"),
        (Reason::Retroactive, None) => None,
        (Reason::Rotation, None) => return refused("it has no certificate that this one could follow"),
        (Reason::Rotation, Some(newest)) => {
            if newest.flag(0)? {
                return refused("it has no certificate that this one could follow");
            }
            // Otherwise an older certificate that somebody kept would come back to life.
            if certificate.not_before < newest.time(1)? {
                return refused("its certificate is older than the one that it is known by");
            }
            Some(newest.text(2)?)
        }
    };
    replace_bindings(tx, id, &hex(&certificate.identity), *now).await?;
    let bound = bind(tx, &tenant, id, certificate, Standing::Own, *now).await?;
    let mut detail = json!({ "how": reason.as_str(), "certificate": certificate.fingerprint(), "request": request_id });
    if let (Some(previous), Value::Object(detail)) = (&previous, &mut detail) {
        detail.insert("previous_certificate".to_owned(), previous.as_str().into());
    }
    let action = if previous.is_some() { "identity.renewed" } else { "identity.associated" };
    let row = AuditRow { tenant: tenant.clone(), actor: "server".to_owned(), action: action.to_owned(), target: Some(id.clone()), detail, at: *now };
    audit::insert(tx, &row).await?;
    if let Some(previous) = previous {
        renewed(tx, &tenant, id, reason.as_str(), &previous, None, *now).await?;
    }
    Ok(Associated::Bound(bound))
}

/// The event `identity.renewed`: an enrollment goes on under another certificate.
pub(crate) async fn renewed(
    tx: &mut Tx,
    tenant: &TenantId,
    id: &EnrollmentId,
    how: &str,
    previous: &str,
    message: Option<Value>,
    now: Timestamp,
) -> Result<(), StorageError> {
    let happened = Happened { tenant, topic: "identity.renewed", request_type: None, at: now, who: Some(id), cause: &Cause::default() };
    emit(tx, happened, || {
        let mut data = json!({ "how": how, "previous_certificate": previous });
        if let (Some(message), Value::Object(data)) = (message, &mut data) {
            data.insert("message".to_owned(), message);
        }
        data
    })
    .await
}

/// Makes it the enrollment's, or [`Standing::Incoming`]. That it is bound to no other is the caller's to see, and that the one before is
/// [replaced](replace_bindings), or the one that another renewal has brought [forgotten](forget_incoming).
pub(crate) async fn bind(
    tx: &mut Tx,
    tenant: &TenantId,
    id: &EnrollmentId,
    certificate: &Certificate,
    standing: Standing,
    now: Timestamp,
) -> Result<Binding, StorageError> {
    let identity = hex(&certificate.identity);
    tx.run(
        INSERT_BINDING,
        args![
            identity.as_str(),
            hex(&certificate.sha256),
            tenant.as_str(),
            id.as_str(),
            tx.keyring.at(&sealed::CERTIFICATE, tenant, &[&identity]).seal(&certificate.der)?,
            certificate.subject.as_str(),
            certificate.issuer.as_str(),
            certificate.not_before.as_millis(),
            certificate.not_after.as_millis(),
            i64::from(standing == Standing::Incoming),
            now.as_millis(),
        ],
    )
    .await?;
    let binding = Binding { tenant: tenant.clone(), enrollment: id.clone(), standing };
    tx.after_commit(Change::Binding(certificate.identity, binding.clone()));
    Ok(binding)
}

/// Ends what the enrollment was known by, but for that certificate.
pub(crate) async fn replace_bindings(tx: &mut Tx, id: &EnrollmentId, but: &str, now: Timestamp) -> Result<(), StorageError> {
    tx.run(&KEEP_ONE, args![id.as_str(), but, now.as_millis(), id.as_str(), but, but]).await?;
    tx.after_commit(Change::BindingsOf(id.clone()));
    Ok(())
}

/// What a renewal that is under way has brought is forgotten: another one comes.
pub(crate) async fn forget_incoming(tx: &mut Tx, id: &EnrollmentId) -> Result<(), StorageError> {
    tx.run(FORGET_PENDING, args![id.as_str(), ""]).await?;
    // What the cache says of the certificate before is old too: it is outgoing now.
    tx.after_commit(Change::BindingsOf(id.clone()));
    Ok(())
}

/// What a TokenUpdate means for a renewal that is under way.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    /// No other certificate was brought, or this one is neither.
    Nothing,
    /// The certificate that was brought is the enrollment's.
    Renewed {
        /// The fingerprint of the one that has ended.
        previous: String,
    },
    /// The device goes on with the certificate that it had, at least for now.
    FellBack,
}

const SELECT_NOT_REPLACED: &str =
    "SELECT identity, sha256, pending FROM certificate_bindings WHERE enrollment_id = ? AND replaced = 0 ORDER BY pending";

/// The device signed a TokenUpdate with that certificate: of the two that a renewal knows, the new one ends the other.
pub(crate) async fn settle(tx: &mut Tx, id: &EnrollmentId, identity: &[u8; 32], now: Timestamp) -> Result<Settled, StorageError> {
    let rows = tx.all(SELECT_NOT_REPLACED, args![id.as_str()]).await?;
    let [own, incoming] = rows.as_slice() else { return Ok(Settled::Nothing) };
    let identity = hex(identity);
    let settled = if incoming.text(0)? == identity {
        Settled::Renewed { previous: own.text(1)? }
    } else if own.text(0)? == identity {
        // It may have been on its way since before the renewal: the other certificate may still be what the device goes on with.
        return Ok(Settled::FellBack);
    } else {
        return Ok(Settled::Nothing);
    };
    replace_bindings(tx, id, &identity, now).await?;
    Ok(settled)
}

const IS_INCOMING: &str = "SELECT 1 FROM certificate_bindings WHERE identity = ? AND enrollment_id = ? AND replaced = 0 AND pending = 1";

/// Whether a renewal has brought that certificate, and no TokenUpdate has come with it yet.
pub(crate) async fn is_incoming(tx: &mut Tx, id: &EnrollmentId, identity: &[u8; 32]) -> Result<bool, StorageError> {
    Ok(tx.one(IS_INCOMING, args![hex(identity), id.as_str()]).await?.is_some())
}

const HAS_OWN: &str = "SELECT 1 FROM certificate_bindings WHERE enrollment_id = ? AND replaced = 0 AND pending = 0";

/// Whether there is a certificate that the enrollment is known by.
pub(crate) async fn has_own(tx: &mut Tx, id: &EnrollmentId) -> Result<bool, StorageError> {
    Ok(tx.one(HAS_OWN, args![id.as_str()]).await?.is_some())
}

pub(crate) fn binding(row: &Row) -> Result<Binding, StorageError> {
    let standing = match (row.flag(2)?, row.flag(3)?, row.flag(4)?) {
        (true, _, _) => Standing::Replaced,
        (false, true, _) => Standing::Incoming,
        (false, false, true) => Standing::Outgoing,
        (false, false, false) => Standing::Own,
    };
    Ok(Binding { tenant: tenant(row, 0)?, enrollment: EnrollmentId::new(row.text(1)?), standing })
}

/// Lower-case hex, as keys are kept.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}
