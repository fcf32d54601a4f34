//! Clearing away what nobody needs any more, in steps that no device notices.

use crate::plugin_key_values::clear_expired;
use crate::sql::{Columns, args};
use crate::writer::{Class, Outcome, Tx};
use crate::{Storage, StorageError, tenant};
use std::time::Duration;
use wasmdm_protocol::time::Timestamp;

/// How long a finished delivery stays, so that one can see which version of a plugin handled what.
const HISTORY: Duration = Duration::from_hours(7 * 24);
/// Rows in one step.
const STEP: i64 = 200;
/// Steps in one call.
const STEPS: u32 = 20;

// Dead letters stay until somebody looks at them.
pub(crate) const SELECT_OLD: &str = "SELECT sequence, event_id, tenant_id, subscriber, interface, partition_key FROM deliveries \
    WHERE is_open = 0 AND finished_at <= ? AND state <> 'dead' ORDER BY finished_at LIMIT ?";
const DELETE_DELIVERY: &str = "DELETE FROM deliveries WHERE sequence = ?";
const DELETE_EVENT: &str = "DELETE FROM events WHERE id = ? AND NOT EXISTS (SELECT 1 FROM deliveries d WHERE d.event_id = events.id)";
const DELETE_PARTITION: &str = "DELETE FROM partitions WHERE tenant_id = ? AND subscriber = ? AND interface = ? AND partition_key = ? \
    AND ready_at IS NULL AND NOT EXISTS (SELECT 1 FROM deliveries d WHERE d.tenant_id = partitions.tenant_id \
    AND d.subscriber = partitions.subscriber AND d.interface = partitions.interface AND d.partition_key = partitions.partition_key)";
pub(crate) const SELECT_EXPIRED_PAIR: &str = "SELECT tenant_id, plugin FROM plugin_key_values WHERE expires_at <= ? LIMIT 1";

impl Storage {
    pub(crate) async fn clear_away(&self, now: Timestamp) -> Result<(), StorageError> {
        let before = now.minus(HISTORY).as_millis();
        for _ in 0..STEPS {
            if self.read_one(SELECT_OLD, args![before, 1_i64]).await?.is_none() {
                break;
            }
            self.write(Class::Background, move |tx| {
                Box::pin(async move {
                    clear_deliveries(tx, before).await?;
                    Ok(Outcome::Commit(()))
                })
            })
            .await?;
        }
        for _ in 0..STEPS {
            if self.read_one(SELECT_EXPIRED_PAIR, args![now.as_millis()]).await?.is_none() {
                break;
            }
            self.write(Class::Background, move |tx| {
                Box::pin(async move {
                    if let Some(row) = tx.one(SELECT_EXPIRED_PAIR, args![now.as_millis()]).await? {
                        clear_expired(tx, &tenant(&row, 0)?, &row.text(1)?, now, STEP).await?;
                    }
                    Ok(Outcome::Commit(()))
                })
            })
            .await?;
        }
        for _ in 0..STEPS {
            if !self.clear_mass_pushes(now).await? {
                break;
            }
        }
        Ok(())
    }
}

async fn clear_deliveries(tx: &mut Tx, before: i64) -> Result<(), StorageError> {
    for row in tx.all(SELECT_OLD, args![before, STEP]).await? {
        tx.run(DELETE_DELIVERY, args![row.int(0)?]).await?;
        tx.run(DELETE_EVENT, args![row.text(1)?]).await?;
        tx.run(DELETE_PARTITION, args![row.text(2)?, row.text(3)?, row.text(4)?, row.text(5)?]).await?;
    }
    Ok(())
}
