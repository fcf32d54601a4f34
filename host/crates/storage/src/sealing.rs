//! Which keys a database is sealed under, and how its values come under another one.
//!
//! A database remembers the keys that its values need, each with a proof, and is not opened without them. When the first key of the key file is
//! another one than before, or there was none, every value is sealed anew: in small steps behind what devices wait for, from the beginning
//! again if the server ends meanwhile. What is sealed already is only looked at then.

use crate::keyring::{Key, Keyring};
use crate::sealed::{self, COLUMNS, Column, HEAD};
use crate::sql::{Columns as _, Db, Row, args};
use crate::writer::{Class, Outcome, Tx};
use crate::{OpenOptions, Storage, StorageError};
use sqlx::any::AnyConnectOptions;
use sqlx::{AnyConnection, ConnectOptions as _, Connection as _};
use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_protocol::time::Timestamp;

/// A key that the database needs, or needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealingKey {
    /// Made of the key.
    pub id: String,
    /// What the key file called it when it came.
    pub name: String,
    /// Every value is sealed under it.
    pub is_complete: bool,
    /// Free parts of the file hold no value from before.
    pub is_clean: bool,
}

/// How many values are in plain, and under each key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Census {
    /// As they are.
    pub plain: u64,
    /// By the id of the key.
    pub sealed: BTreeMap<String, u64>,
}

/// Rows that are looked at in one read.
const WINDOW: i64 = 256;
/// Values in one transaction, and their bytes; a longer value goes alone.
const STEP: usize = 32;
const STEP_BYTES: i64 = 256 * 1024;
/// Values between two lines of the log.
const PROGRESS: u64 = 10_000;
/// Until a step that could not be written is tried again.
const PAUSE: Duration = Duration::from_secs(1);

const SELECT_KEYS: &str = "SELECT id, name, proof, is_complete, is_clean FROM sealing_keys ORDER BY created_at, id";
// In a database that never had an enrollment there is nothing to seal, and nothing that was.
const INSERT_KEY: &str = "INSERT INTO sealing_keys (id, name, proof, is_complete, is_clean, created_at) SELECT ?, ?, ?, n.is_new, n.is_new, ? FROM \
    (SELECT CASE WHEN EXISTS (SELECT 1 FROM enrollments) OR EXISTS (SELECT 1 FROM push_certificates) OR EXISTS (SELECT 1 FROM plugin_key_values) \
    OR EXISTS (SELECT 1 FROM timers) OR EXISTS (SELECT 1 FROM events) OR EXISTS (SELECT 1 FROM audit) OR EXISTS (SELECT 1 FROM sealing_keys) \
    THEN 0 ELSE 1 END AS is_new) n";
const BEGIN_OTHERS: &str = "UPDATE sealing_keys SET is_complete = 0, is_clean = 0 WHERE id <> ? AND (is_complete <> 0 OR is_clean <> 0)";
const DELETE_OTHERS: &str = "DELETE FROM sealing_keys WHERE id <> ?";
const COMPLETE: &str = "UPDATE sealing_keys SET is_complete = 1 WHERE id = ?";
const CLEAN: &str = "UPDATE sealing_keys SET is_clean = 1 WHERE is_complete = 1";
const REPLACE_DIGEST: &str = "UPDATE commands SET body_sha256 = ? WHERE rowid = ?";
/// No key has it.
const NO_KEY: &str = "";

/// Where the proof of a key stands. It is no value of a tenant.
const PROOF: Column = Column { table: "sealing_keys", name: "proof", heads: "", value: "", keys: 1, replace: "", census: "" };
const PROVEN: &[u8] = b"wasmdm";

async fn keys(db: &mut Db<'_>) -> Result<Vec<(SealingKey, Vec<u8>)>, StorageError> {
    let row = |row: &Row| {
        let key = SealingKey { id: row.text(0)?, name: row.text(1)?, is_complete: row.flag(3)?, is_clean: row.flag(4)? };
        Ok((key, row.blob(2)?))
    };
    db.all(SELECT_KEYS, args![]).await?.iter().map(row).collect()
}

/// Whether the keyring has every key that the database needs.
pub(crate) async fn require_keys(db: &mut Db<'_>) -> Result<(), StorageError> {
    let keyring = db.keyring.clone();
    let nobody = TenantId::new("");
    let mut missing = Vec::new();
    for (key, proof) in keys(db).await? {
        let proven = keyring.contains(&key.id) && keyring.at(&PROOF, &nobody, &[&key.id]).open(proof).is_ok_and(|proven| proven == PROVEN);
        if !proven {
            missing.push(format!("`{}` ({})", key.name, key.id));
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let missing = missing.join(" and ");
    Err(StorageError::Key {
        reason: if keyring.is_empty() {
            format!("values of this database are sealed under the key {missing}: start with the key file that has it")
        } else {
            format!("values of this database are sealed under the key {missing}, which is not in the key file: put its line back, below the first")
        },
    })
}

/// Remembers the key that seals from now on. Answers whether there may be values that are not under it.
pub(crate) async fn begin(db: &mut Db<'_>, now: Timestamp) -> Result<bool, StorageError> {
    require_keys(db).await?;
    let keyring = db.keyring.clone();
    let known = keys(db).await?;
    let Some(key) = keyring.sealing() else {
        db.run(BEGIN_OTHERS, args![NO_KEY]).await?;
        return Ok(!known.is_empty());
    };
    let id = key.id_text();
    if !known.iter().any(|(known, _)| known.id == id) {
        let proof = keyring.at(&PROOF, &TenantId::new(""), &[&id]).seal(PROVEN)?;
        db.run(INSERT_KEY, args![id.as_str(), key.name(), proof, now.as_millis()]).await?;
    }
    db.run(BEGIN_OTHERS, args![id.as_str()]).await?;
    Ok(!keys(db).await?.iter().any(|(known, _)| known.id == id && known.is_complete))
}

impl Storage {
    /// The keys that the database needs.
    pub async fn sealing_keys(&self) -> Result<Vec<SealingKey>, StorageError> {
        Ok(keys(&mut self.reader().await?.db()).await?.into_iter().map(|(key, _)| key).collect())
    }

    /// Counts all values; needs no key.
    pub async fn sealing_census(&self) -> Result<Census, StorageError> {
        let mut census = Census::default();
        for column in COLUMNS {
            for row in self.read_all(column.census, args![]).await? {
                let (id, count) = (row.text(0)?, u64::from(row.count(1)?));
                if id.is_empty() {
                    census.plain += count;
                } else {
                    *census.sealed.entry(id).or_default() += count;
                }
            }
        }
        Ok(census)
    }

    /// Seals every value with the first key, or makes all of them plain (`to_plain`), and then writes the whole file anew, so that its free
    /// parts hold nothing from before. Answers how many values there were. No server may run; if it is interrupted, it is run again.
    ///
    /// # Errors
    /// [`StorageError::Owned`] when a server runs, [`StorageError::Key`] when a key is missing, [`StorageError::Corrupt`] when a value does not open.
    pub async fn reseal(options: OpenOptions, keyring: Keyring, to_plain: bool) -> Result<u64, StorageError> {
        let keyring = if to_plain { keyring.that_seals_nothing() } else { keyring };
        let (storage, connect, _) = Self::open_unsealed(options, keyring).await?;
        let done = async {
            let mut pass = Pass::default();
            pass.run(&storage).await?;
            if pass.failed > 0 {
                return Err(StorageError::corrupt(format!("{} values do not open: `wasmdm db check --key-file` names them", pass.failed)));
            }
            storage.complete_sealing().await?;
            rewrite(&connect).await?;
            storage
                .write(Class::Background, |tx| {
                    Box::pin(async move {
                        tx.run(CLEAN, args![]).await?;
                        Ok(Outcome::Commit(()))
                    })
                })
                .await?;
            Ok(pass.resealed)
        };
        let done = done.await;
        storage.close().await?;
        done
    }

    /// Until every value is as the first key wants it, or the database is closed.
    pub(crate) async fn reseal_in_background(self, connect: AnyConnectOptions) {
        tracing::info!("Values of the database are not all sealed under the first key: they are sealed anew, beside everything else");
        let mut pass = Pass::default();
        while let Err(error) = pass.run(&self).await {
            if self.is_closed() {
                return;
            }
            tracing::warn!("A step of sealing anew was not written, it is tried again: {error}");
            tokio::time::sleep(PAUSE).await;
        }
        if pass.failed > 0 {
            tracing::error!("{} values do not open and stay as they are; `wasmdm db check --key-file` names them", pass.failed);
            return;
        }
        while let Err(error) = self.complete_sealing().await {
            if self.is_closed() {
                return;
            }
            tracing::warn!("That all values are sealed was not written, it is tried again: {error}");
            tokio::time::sleep(PAUSE).await;
        }
        metrics::gauge!("wasmdm_storage_resealing").set(0);
        tracing::info!(
            values = pass.resealed,
            "All values of the database are sealed under the first key, {} of them anew; free parts of its file may still hold some as they were: \
             stop the server and run `wasmdm db reseal` to clear them",
            pass.resealed
        );
        // What stands in the log of writes would stay there until enough is written over it. Readers may be in the way; then the end of the
        // server empties it.
        if let Err(error) = empty_write_ahead_log(&connect).await {
            tracing::debug!("The write-ahead log was not emptied: {error}");
        }
    }

    fn is_closed(&self) -> bool {
        self.inner.queue.as_ref().is_none_or(|queue| queue.is_closed())
    }

    async fn complete_sealing(&self) -> Result<(), StorageError> {
        let id: Arc<str> = self.keyring().sealing().map_or_else(String::new, Key::id_text).into();
        self.write(Class::Background, move |tx| {
            let id = Arc::clone(&id);
            Box::pin(async move {
                tx.run(COMPLETE, args![&*id]).await?;
                tx.run(DELETE_OTHERS, args![&*id]).await?;
                Ok(Outcome::Commit(()))
            })
        })
        .await
    }
}

/// A walk over all values.
#[derive(Debug, Default)]
struct Pass {
    /// Where it goes on when it was interrupted by an error.
    column: usize,
    after: Option<i64>,
    resealed: u64,
    failed: u64,
}

impl Pass {
    async fn run(&mut self, storage: &Storage) -> Result<(), StorageError> {
        while let Some(column) = COLUMNS.get(self.column) {
            while self.window(storage, column).await? {}
            (self.column, self.after) = (self.column + 1, None);
        }
        Ok(())
    }

    /// `false`: there are no more rows.
    async fn window(&mut self, storage: &Storage, column: &'static Column) -> Result<bool, StorageError> {
        if storage.is_closed() {
            return Err(StorageError::unavailable("the database is closed"));
        }
        let (mut step, mut bytes, mut last) = (Vec::new(), 0, None);
        for row in storage.read_all(column.heads, args![self.after.unwrap_or(i64::MIN), WINDOW]).await? {
            let number = row.int(0)?;
            last = Some(number);
            if row.opt_blob(1)?.is_none_or(|head| sealed::is_current(storage.keyring(), &head)) {
                continue;
            }
            step.push(number);
            bytes += row.opt_int(2)?.unwrap_or(0);
            if step.len() >= STEP || bytes >= STEP_BYTES {
                self.step(storage, column, std::mem::take(&mut step)).await?;
                (bytes, self.after) = (0, last);
            }
        }
        if !step.is_empty() {
            self.step(storage, column, step).await?;
        }
        self.after = last.or(self.after);
        Ok(last.is_some())
    }

    async fn step(&mut self, storage: &Storage, column: &'static Column, rows: Vec<i64>) -> Result<(), StorageError> {
        let rows: Arc<[i64]> = rows.into();
        let work = storage.write(Class::Background, move |tx| {
            let rows = Arc::clone(&rows);
            Box::pin(async move {
                let (mut resealed, mut failed) = (0, 0);
                for &row in &*rows {
                    match reseal_value(tx, column, row).await {
                        Ok(true) => resealed += 1,
                        Ok(false) => {}
                        Err(error @ (StorageError::Corrupt { .. } | StorageError::Key { .. })) => {
                            tracing::warn!("A value cannot be sealed anew: {error}");
                            failed += 1;
                        }
                        Err(error) => return Err(error),
                    }
                }
                Ok(Outcome::Commit((resealed, failed)))
            })
        });
        let (resealed, failed): (u64, u64) = work.await?;
        metrics::counter!("wasmdm_storage_resealed_values_total").increment(resealed);
        if (self.resealed + resealed) / PROGRESS > self.resealed / PROGRESS {
            tracing::info!("{} values are sealed anew so far; now {}.{}", self.resealed + resealed, column.table, column.name);
        }
        self.resealed += resealed;
        self.failed += failed;
        Ok(())
    }
}

/// `false`: it is gone, or was written anew meanwhile.
async fn reseal_value(tx: &mut Tx, column: &'static Column, row: i64) -> Result<bool, StorageError> {
    let Some(found) = tx.one(column.value, args![row]).await? else {
        return Ok(false);
    };
    let Some(Value { tenant, blob, key }) = value_of(column, &found)? else {
        return Ok(false);
    };
    if sealed::is_current(&tx.keyring, blob.get(..HEAD.min(blob.len())).unwrap_or_default()) {
        return Ok(false);
    }
    let (sealed, digest) = {
        let key = parts(&key);
        let place = tx.keyring.at(column, &tenant, &key);
        let value = place.open(blob)?;
        (place.seal(&value)?, (column.table == sealed::COMMAND_BODY.table).then(|| tx.keyring.digest(&value)))
    };
    tx.run(column.replace, args![sealed, row]).await?;
    if let Some(digest) = digest {
        tx.run(REPLACE_DIGEST, args![digest, row]).await?;
    }
    Ok(true)
}

struct Value {
    tenant: TenantId,
    blob: Vec<u8>,
    key: Vec<String>,
}

fn parts(key: &[String]) -> Vec<&(dyn Display + Sync)> {
    key.iter().map(|part| part as &(dyn Display + Sync)).collect()
}

/// Of a row of [`Column::value`]; `None`: it is NULL.
fn value_of(column: &Column, row: &Row) -> Result<Option<Value>, StorageError> {
    let Some(blob) = row.opt_blob(1)? else {
        return Ok(None);
    };
    let key = (0..column.keys).map(|part| Ok(row.opt_text(part + 2)?.unwrap_or_default())).collect::<Result<_, StorageError>>()?;
    Ok(Some(Value { tenant: TenantId::new(row.text(0)?), blob, key }))
}

/// Values that do not open, each with where it stands; `limit` of them at most.
pub(crate) async fn unopened(db: &mut Db<'_>, limit: usize) -> Result<Vec<String>, StorageError> {
    let keyring = db.keyring.clone();
    let mut found = Vec::new();
    for column in COLUMNS {
        let mut after = i64::MIN;
        loop {
            let heads = db.all(column.heads, args![after, WINDOW]).await?;
            let Some(last) = heads.last() else { break };
            after = last.int(0)?;
            for row in &heads {
                let Some(row) = db.one(column.value, args![row.int(0)?]).await? else { continue };
                let Some(Value { tenant, blob, key }) = value_of(column, &row)? else { continue };
                if let Err(error) = keyring.at(column, &tenant, &parts(&key)).open(blob) {
                    found.push(format!("{} {}: {error}", tenant, key.join(" ")));
                    if found.len() >= limit {
                        return Ok(found);
                    }
                }
            }
        }
    }
    Ok(found)
}

/// The whole file, so that nothing of before is left in it.
async fn rewrite(connect: &AnyConnectOptions) -> Result<(), StorageError> {
    let mut connection = connect.connect().await?;
    // The copy that it makes on the way may be long.
    for statement in
        ["PRAGMA busy_timeout = 60000", "PRAGMA synchronous = FULL", "PRAGMA temp_store = FILE", "VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"]
    {
        sqlx::raw_sql(statement).execute(&mut connection).await?;
    }
    connection.close().await?;
    Ok(())
}

async fn empty_write_ahead_log(connect: &AnyConnectOptions) -> Result<(), StorageError> {
    let mut connection: AnyConnection = connect.connect().await?;
    // Who writes waits for it, so it waits for readers but shortly.
    for statement in ["PRAGMA busy_timeout = 100", "PRAGMA wal_checkpoint(TRUNCATE)"] {
        sqlx::raw_sql(statement).execute(&mut connection).await?;
    }
    connection.close().await?;
    Ok(())
}
