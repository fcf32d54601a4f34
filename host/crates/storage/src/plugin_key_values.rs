//! Plugins' own memory. Writes come with a plugin's effects only (`effects.rs`).

use crate::keyring::Keyring;
use crate::sql::{Columns, Db, Row, args};
use crate::writer::Tx;
use crate::{Storage, StorageError, sealed};
use bytes::Bytes;
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_protocol::time::Timestamp;

/// A key with its value.
#[derive(Clone, PartialEq, Eq)]
pub struct KvPair {
    /// The key.
    pub key: String,
    /// What the plugin put.
    pub value: Bytes,
    /// Changes with every write.
    pub version: String,
}

/// Without the value: a plugin may keep secrets there.
impl std::fmt::Debug for KvPair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvPair").field("key", &self.key).field("version", &self.version).finish_non_exhaustive()
    }
}

pub(crate) const SELECT_PAIR: &str = "SELECT item_key, item_value, version FROM plugin_key_values \
    WHERE tenant_id = ? AND plugin = ? AND item_key = ? AND (expires_at IS NULL OR expires_at > ?)";
pub(crate) const SCAN_PAIRS: &str = "SELECT item_key, item_value, version FROM plugin_key_values \
    WHERE tenant_id = ? AND plugin = ? AND item_key >= ? AND item_key > ? AND (expires_at IS NULL OR expires_at > ?) ORDER BY item_key LIMIT ?";
const SELECT_USAGE: &str = "SELECT bytes, pairs FROM plugin_key_value_usage WHERE tenant_id = ? AND plugin = ?";
const UPSERT_USAGE: &str = "INSERT INTO plugin_key_value_usage (tenant_id, plugin, bytes, pairs) VALUES (?, ?, ?, ?) \
    ON CONFLICT (tenant_id, plugin) DO UPDATE SET bytes = plugin_key_value_usage.bytes + excluded.bytes, \
    pairs = plugin_key_value_usage.pairs + excluded.pairs";
const SELECT_EXPIRED_OF: &str =
    "SELECT item_key, size FROM plugin_key_values WHERE tenant_id = ? AND plugin = ? AND expires_at IS NOT NULL AND expires_at <= ? LIMIT ?";
pub(crate) const DELETE_PAIR: &str = "DELETE FROM plugin_key_values WHERE tenant_id = ? AND plugin = ? AND item_key = ?";

impl Storage {
    /// Expired pairs are absent.
    pub async fn kv_get(&self, tenant: &TenantId, plugin: &str, key: &str, now: Timestamp) -> Result<Option<KvPair>, StorageError> {
        let row = self.look_up(SELECT_PAIR, args![tenant.as_str(), plugin, key, now.as_millis()]).await?;
        row.map(|row| pair(self.keyring(), tenant, plugin, &row)).transpose()
    }

    /// In the order of the keys' bytes, after `after` (exclusive).
    pub async fn kv_scan(
        &self,
        tenant: &TenantId,
        plugin: &str,
        prefix: &str,
        after: Option<&str>,
        limit: u32,
        now: Timestamp,
    ) -> Result<Vec<KvPair>, StorageError> {
        // Keys with the prefix stand together and begin at the prefix itself. There is no portable way to say where they end.
        let after = match after {
            Some(after) => after.to_owned(),
            None if prefix.is_empty() => String::new(),
            None => before(prefix),
        };
        let rows = self.read_all(SCAN_PAIRS, args![tenant.as_str(), plugin, prefix, after, now.as_millis(), i64::from(limit)]).await?;
        let mut pairs = Vec::with_capacity(rows.len());
        for row in rows {
            let pair = pair(self.keyring(), tenant, plugin, &row)?;
            if !pair.key.starts_with(prefix) {
                break;
            }
            pairs.push(pair);
        }
        Ok(pairs)
    }

    /// Bytes and keys that the plugin holds, as they count for its quota (expired pairs count until they are cleared away).
    pub async fn kv_usage(&self, tenant: &TenantId, plugin: &str) -> Result<(u64, u64), StorageError> {
        usage(&mut self.quick_reader()?.db(), tenant, plugin).await
    }
}

/// A key that sorts before `prefix`, and after which `prefix` itself is still found.
fn before(prefix: &str) -> String {
    let mut shorter = prefix.to_owned();
    shorter.pop();
    shorter
}

fn pair(keyring: &Keyring, tenant: &TenantId, plugin: &str, row: &Row) -> Result<KvPair, StorageError> {
    let key = row.text(0)?;
    let value = keyring.at(&sealed::KEY_VALUE, tenant, &[&plugin, &key]).open(row.blob(1)?)?;
    Ok(KvPair { key, value, version: row.text(2)? })
}

pub(crate) async fn usage(db: &mut Db<'_>, tenant: &TenantId, plugin: &str) -> Result<(u64, u64), StorageError> {
    let Some(row) = db.one(SELECT_USAGE, args![tenant.as_str(), plugin]).await? else {
        return Ok((0, 0));
    };
    let number = |column| u64::try_from(row.int(column)?).map_err(|_| StorageError::corrupt("a key-value usage is negative"));
    Ok((number(0)?, number(1)?))
}

pub(crate) async fn add_usage(tx: &mut Tx, tenant: &TenantId, plugin: &str, bytes: i64, pairs: i64) -> Result<(), StorageError> {
    if bytes != 0 || pairs != 0 {
        tx.run(UPSERT_USAGE, args![tenant.as_str(), plugin, bytes, pairs]).await?;
    }
    Ok(())
}

/// Removes up to `limit` expired pairs of a plugin.
pub(crate) async fn clear_expired(tx: &mut Tx, tenant: &TenantId, plugin: &str, now: Timestamp, limit: i64) -> Result<(), StorageError> {
    let rows = tx.all(SELECT_EXPIRED_OF, args![tenant.as_str(), plugin, now.as_millis(), limit]).await?;
    let (mut bytes, mut pairs) = (0, 0);
    for row in rows {
        tx.run(DELETE_PAIR, args![tenant.as_str(), plugin, row.text(0)?]).await?;
        bytes -= row.int(1)?;
        pairs -= 1;
    }
    add_usage(tx, tenant, plugin, bytes, pairs).await
}

/// What a pair counts for the quota.
pub(crate) fn size(key: &str, value: &[u8]) -> i64 {
    i64::try_from(key.len() + value.len()).unwrap_or(i64::MAX)
}
