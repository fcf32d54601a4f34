//! What the plugin with the hook `user-authentication` last said of a user of a Mac (edge case 33).
//!
//! A Mac that was told not to manage a user could do so all the same. So the verdict is kept, also of a user who has no channel yet, and whoever
//! asks is told whether a message of that user may be served. Of a token that was given, only a digest is kept.

use crate::enrollments::USERS;
use crate::sql::{Columns, args};
use crate::writer::{Class, Outcome, Tx};
use crate::{Storage, StorageError, sealed};
use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest;
use bytes::Bytes;
use std::fmt;
use std::sync::Arc;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_protocol::time::Timestamp;

/// What is to be kept of a user who logs in.
#[derive(Clone)]
pub struct KeepUserVerdict {
    /// Whose device it is.
    pub tenant: TenantId,
    /// The user's device, which is known.
    pub device: EnrollmentId,
    /// The user's channel, which need not exist yet.
    pub user: EnrollmentId,
    /// The verdict's name in the contract, or `failure`.
    pub verdict: &'static str,
    /// Whether messages of the user are served from now on.
    pub is_managed: bool,
    /// The token that the Mac is given. A secret.
    pub auth_token: Option<String>,
    /// When it was decided.
    pub now: Timestamp,
}

/// Without the token.
impl fmt::Debug for KeepUserVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeepUserVerdict").field("user", &self.user).field("verdict", &self.verdict).finish_non_exhaustive()
    }
}

/// What was last said of a user.
pub struct UserStanding {
    verdict: String,
    is_managed: bool,
    /// SHA-256.
    auth_token: Option<Bytes>,
}

/// Without the digest.
impl fmt::Debug for UserStanding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UserStanding").field("verdict", &self.verdict).finish_non_exhaustive()
    }
}

impl UserStanding {
    /// Why a message of the user that brings this token is refused, if it is. Apple's schema lists the token as a key of no message, so one that
    /// brings none is served.
    pub fn refusal(&self, auth_token: Option<&str>) -> Option<String> {
        if !self.is_managed {
            return Some(format!("its user is not to be managed: the last verdict about them is `{}`", self.verdict));
        }
        let (Some(expected), Some(brought)) = (&self.auth_token, auth_token) else { return None };
        let is_right = verify_slices_are_equal(expected, digest::digest(&digest::SHA256, brought.as_bytes()).as_ref()).is_ok();
        (!is_right).then(|| "its AuthToken is not the one that the user was given".to_owned())
    }
}

const SELECT: &str = "SELECT verdict, is_managed, auth_token FROM user_verdicts WHERE device_id = ? AND enrollment_id = ? AND tenant_id = ?";
const COUNT: &str = "SELECT COUNT(*) FROM user_verdicts WHERE device_id = ?";
const UPSERT: &str = "INSERT INTO user_verdicts (device_id, enrollment_id, tenant_id, verdict, is_managed, auth_token, decided_at) \
    VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (device_id, enrollment_id) DO UPDATE SET verdict = excluded.verdict, \
    is_managed = excluded.is_managed, auth_token = excluded.auth_token, decided_at = excluded.decided_at";
const DELETE: &str = "DELETE FROM user_verdicts WHERE device_id = ? AND enrollment_id = ? AND tenant_id = ?";

impl Storage {
    /// Takes the place of what was said before. `false`: too many users of the device stand here already, and nothing was kept.
    pub async fn keep_user_verdict(&self, verdict: KeepUserVerdict) -> Result<bool, StorageError> {
        let verdict = Arc::new(verdict);
        self.write(Class::Answer, move |tx| {
            let verdict = Arc::clone(&verdict);
            Box::pin(async move { Ok(Outcome::Commit(keep(tx, &verdict).await?)) })
        })
        .await
    }

    /// Nobody has said anything of the user. Costs a look if so it is already.
    pub async fn forget_user_verdict(&self, tenant: &TenantId, device: &EnrollmentId, user: &EnrollmentId) -> Result<(), StorageError> {
        if self.user_standing(tenant, device, user).await?.is_none() {
            return Ok(());
        }
        let (tenant, device, user) = (tenant.clone(), device.clone(), user.clone());
        self.write(Class::Answer, move |tx| {
            let (tenant, device, user) = (tenant.clone(), device.clone(), user.clone());
            Box::pin(async move {
                tx.run(DELETE, args![device.as_str(), user.as_str(), tenant.as_str()]).await?;
                Ok(Outcome::Commit(()))
            })
        })
        .await
    }

    /// `None`: nobody has said anything of the user.
    pub async fn user_standing(&self, tenant: &TenantId, device: &EnrollmentId, user: &EnrollmentId) -> Result<Option<UserStanding>, StorageError> {
        let Some(row) = self.look_up(SELECT, args![device.as_str(), user.as_str(), tenant.as_str()]).await? else { return Ok(None) };
        let auth_token = self.keyring().at(&sealed::USER_AUTH_TOKEN, tenant, &[device, user]).open_opt(row.opt_blob(2)?)?;
        Ok(Some(UserStanding { verdict: row.text(0)?, is_managed: row.flag(1)?, auth_token }))
    }
}

async fn keep(tx: &mut Tx, new: &KeepUserVerdict) -> Result<bool, StorageError> {
    let KeepUserVerdict { tenant, device, user, .. } = new;
    // A device can make up users without end. What stands stays: otherwise enough of them would make one be forgotten who was turned away.
    let is_new = tx.one(SELECT, args![device.as_str(), user.as_str(), tenant.as_str()]).await?.is_none();
    if is_new && tx.one(COUNT, args![device.as_str()]).await?.map_or(Ok(0), |row| row.int(0))? >= USERS {
        return Ok(false);
    }
    let auth_token = match &new.auth_token {
        Some(token) => {
            let digest = digest::digest(&digest::SHA256, token.as_bytes());
            Some(tx.keyring.at(&sealed::USER_AUTH_TOKEN, tenant, &[device, user]).seal(digest.as_ref())?)
        }
        None => None,
    };
    let args = args![device.as_str(), user.as_str(), tenant.as_str(), new.verdict, i64::from(new.is_managed), auth_token, new.now.as_millis(),];
    tx.run(UPSERT, args).await?;
    Ok(true)
}
