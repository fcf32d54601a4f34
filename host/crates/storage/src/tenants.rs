//! Tenants, and the push topics that are theirs.

use crate::sql::args;
use crate::writer::{Class, Outcome};
use crate::{Storage, StorageError};
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_protocol::time::Timestamp;

const INSERT_TENANT: &str = "INSERT INTO tenants (id, created_at) VALUES (?, ?) ON CONFLICT (id) DO NOTHING";
pub(crate) const SELECT_TOPIC: &str = "SELECT tenant_id FROM push_topics WHERE topic = ?";

impl Storage {
    /// Makes the tenant; one that is there already stays as it is. `default` always is.
    pub async fn create_tenant(&self, tenant: &TenantId, now: Timestamp) -> Result<(), StorageError> {
        let tenant = tenant.clone();
        self.write(Class::Answer, move |tx| {
            let tenant = tenant.clone();
            Box::pin(async move {
                tx.run(INSERT_TENANT, args![tenant.as_str(), now.as_millis()]).await?;
                Ok(Outcome::Commit(()))
            })
        })
        .await
    }
}
