//! Which certificate is whose.

use crate::sql::{Columns, args};
use crate::{Storage, StorageError, tenant};
use std::fmt::Write as _;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};

/// Which enrollment a certificate belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// The enrollment's tenant.
    pub tenant: TenantId,
    /// The device's channel.
    pub enrollment: EnrollmentId,
    /// A later Authenticate brought another certificate: this one is no longer accepted.
    pub replaced: bool,
}

pub(crate) const SELECT_BINDING: &str = "SELECT tenant_id, enrollment_id, replaced FROM certificate_bindings WHERE identity = ?";

impl Storage {
    /// By the certificate's `identity`. Cached with a bound; the cache follows commits.
    pub async fn certificate_binding(&self, identity: &[u8; 32]) -> Result<Option<Binding>, StorageError> {
        let (cached, changes) = self.inner.memory.cached_binding(identity);
        if cached.is_some() {
            return Ok(cached);
        }
        let Some(row) = self.read_one(SELECT_BINDING, args![hex(identity)]).await? else {
            return Ok(None);
        };
        let binding = binding(&row)?;
        self.inner.memory.cache_binding(*identity, binding.clone(), changes);
        Ok(Some(binding))
    }
}

pub(crate) fn binding(row: &sqlx::any::AnyRow) -> Result<Binding, StorageError> {
    Ok(Binding { tenant: tenant(row, 0)?, enrollment: EnrollmentId::new(row.text(1)?), replaced: row.flag(2)? })
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
