//! `kv`: the plugin's own memory. Reads are noted with their versions and checked again when the call's writes are committed.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use wasmdm_storage::plugin_key_values::KvPair;

use crate::bindings::wasmdm::plugin::kv::{Host, Page, Pair, Precondition};
use crate::call::State;
use crate::capabilities::{Denied, failure, invalid, not_granted, not_here, quota, unavailable};
use crate::effective::KvGrant;

const MAX_KEY: usize = 512;
const MAX_PAGE: u32 = 1_000;
/// Pairs that are read at once for a page, so that large values cannot fill the host's memory.
const CHUNK: u32 = 32;
/// Reads that one call can have checked again.
const MAX_READS: usize = 10_000;

impl State {
    fn kv(&self) -> Result<KvGrant, Denied> {
        self.settings.capabilities.kv.ok_or_else(|| not_granted("kv"))
    }

    fn kv_writable(&self) -> Result<KvGrant, Denied> {
        let grant = self.kv()?;
        if self.permissions.kv_write { Ok(grant) } else { Err(not_here("writing key-values", self.hook)) }
    }

    fn note_read(&mut self, key: &str, version: Option<&str>) -> Result<(), Denied> {
        let reads = &mut self.buffer.reads;
        if reads.contains_key(key) {
            return Ok(());
        }
        if reads.len() >= MAX_READS {
            return Err(quota(format!("a call can read {MAX_READS} keys")));
        }
        reads.insert(key.to_owned(), version.map(str::to_owned));
        Ok(())
    }

    /// The pair as this call sees it.
    async fn kv_current(&mut self, key: &str) -> Result<Option<Pair>, Denied> {
        check_key(key)?;
        if let Some(written) = self.buffer.writes.get(key) {
            return Ok(written.value.as_ref().map(|value| pair(key, value, &written.version)));
        }
        let storage = self.storage()?;
        let now = self.now();
        if self.shadow {
            let shadow = storage.kv_get(&self.tenant, &self.shadow_name_space(), key, now).await.map_err(|error| unavailable(&error))?;
            if let Some(found) = shadow {
                return Ok(Some(pair(key, &found.value, &found.version)));
            }
        }
        let found = storage.kv_get(&self.tenant, self.name_space(), key, now).await.map_err(|error| unavailable(&error))?;
        self.note_read(key, found.as_ref().map(|found| found.version.as_str()))?;
        Ok(found.map(|found| pair(key, &found.value, &found.version)))
    }

    async fn kv_meets(&mut self, key: &str, expected: Precondition) -> Result<(), Denied> {
        let conflict = |found: &str| Err(failure("conflict", format!("`{key}` {found}")));
        match expected {
            Precondition::Anything => Ok(()),
            Precondition::Absent => match self.kv_current(key).await? {
                None => Ok(()),
                Some(_) => conflict("is there already"),
            },
            Precondition::Version(version) => match self.kv_current(key).await? {
                Some(found) if found.version == version => Ok(()),
                Some(_) => conflict("has another version"),
                None => conflict("is absent"),
            },
        }
    }

    fn kv_write(&mut self, grant: KvGrant, key: &str, value: Option<Bytes>, ttl: Option<u32>) -> Result<String, Denied> {
        if value.as_ref().is_some_and(|value| value.len() > grant.value_bytes) {
            return Err(quota(format!("a value can have {} bytes", grant.value_bytes)));
        }
        let expires_at = ttl.map(|seconds| self.now().plus(Duration::from_secs(u64::from(seconds))));
        let version = self.buffer.write(key, value, expires_at);
        // The commit counts exactly; this only keeps the buffer from growing beyond what could ever be committed.
        if u64::try_from(self.buffer.written_bytes).unwrap_or(u64::MAX) > grant.bytes {
            return Err(quota(format!("this plugin's key-values can have {} bytes", grant.bytes)));
        }
        Ok(version)
    }

    async fn kv_put(&mut self, key: &str, value: Vec<u8>, expected: Precondition, ttl: Option<u32>) -> Result<String, Denied> {
        let grant = self.kv_writable()?;
        check_key(key)?;
        self.kv_meets(key, expected).await?;
        self.kv_write(grant, key, Some(value.into()), ttl)
    }

    async fn kv_remove(&mut self, key: &str, expected: Precondition) -> Result<bool, Denied> {
        let grant = self.kv_writable()?;
        let existed = self.kv_current(key).await?.is_some();
        self.kv_meets(key, expected).await?;
        if existed {
            self.kv_write(grant, key, None, None)?;
        }
        Ok(existed)
    }

    async fn kv_add(&mut self, key: &str, delta: i64) -> Result<i64, Denied> {
        let grant = self.kv_writable()?;
        let before = match self.kv_current(key).await? {
            None => 0,
            Some(found) => std::str::from_utf8(&found.value)
                .ok()
                .and_then(|digits| digits.parse::<i64>().ok())
                .ok_or_else(|| invalid(format!("`{key}` is no counter")))?,
        };
        let sum = before.checked_add(delta).ok_or_else(|| invalid(format!("`{key}` would overflow")))?;
        self.kv_write(grant, key, Some(sum.to_string().into()), None)?;
        Ok(sum)
    }

    /// A page of what is stored, with what this call wrote.
    async fn kv_scan(&mut self, prefix: &str, cursor: Option<String>, limit: u32) -> Result<Page, Denied> {
        self.kv()?;
        let wanted = usize::try_from(limit.clamp(1, MAX_PAGE)).unwrap_or(1);
        let room = self.settings.limits.output;
        let mut after = cursor;
        let mut pairs = Vec::new();
        let mut bytes: usize = 0;
        loop {
            let (chunk, more) = self.kv_chunk(prefix, after.as_deref()).await?;
            for found in chunk {
                if pairs.len() >= wanted || bytes > room {
                    let cursor = pairs.last().map(|last: &Pair| last.key.clone());
                    return Ok(Page { pairs, cursor });
                }
                bytes = bytes.saturating_add(found.key.len()).saturating_add(found.value.len());
                if !self.buffer.writes.contains_key(&found.key) && !self.shadow {
                    self.note_read(&found.key, Some(&found.version))?;
                }
                pairs.push(found);
            }
            let Some(last) = more else { return Ok(Page { pairs, cursor: None }) };
            after = Some(last);
        }
    }

    /// The next pairs, and where to go on: `None` at the end.
    async fn kv_chunk(&self, prefix: &str, after: Option<&str>) -> Result<(Vec<Pair>, Option<String>), Denied> {
        let storage = self.storage()?;
        let now = self.now();
        let mut stored = storage.kv_scan(&self.tenant, self.name_space(), prefix, after, CHUNK, now).await.map_err(|error| unavailable(&error))?;
        let full = |pairs: &[KvPair]| u32::try_from(pairs.len()).is_ok_and(|len| len >= CHUNK);
        let mut end = if full(&stored) { stored.last().map(|last| last.key.clone()) } else { None };
        if self.shadow {
            let name = self.shadow_name_space();
            let shadow = storage.kv_scan(&self.tenant, &name, prefix, after, CHUNK, now).await.map_err(|error| unavailable(&error))?;
            if full(&shadow)
                && let Some(last) = shadow.last()
            {
                end = Some(end.map_or_else(|| last.key.clone(), |end| end.min(last.key.clone())));
            }
            stored.extend(shadow);
        }
        let within = |key: &str| end.as_deref().is_none_or(|end| key <= end);
        let mut merged: BTreeMap<String, Option<Pair>> = stored
            .into_iter()
            .filter(|found| within(&found.key))
            .map(|found| (found.key.clone(), Some(pair(&found.key, &found.value, &found.version))))
            .collect();
        for (key, write) in &self.buffer.writes {
            if key.starts_with(prefix) && after.is_none_or(|after| key.as_str() > after) && within(key) {
                merged.insert(key.clone(), write.value.as_ref().map(|value| pair(key, value, &write.version)));
            }
        }
        Ok((merged.into_values().flatten().collect(), end))
    }
}

fn check_key(key: &str) -> Result<(), Denied> {
    if key.is_empty() || key.len() > MAX_KEY || key.contains('\0') {
        return Err(invalid(format!("a key has 1 to {MAX_KEY} bytes, and no zero byte")));
    }
    Ok(())
}

fn pair(key: &str, value: &Bytes, version: &str) -> Pair {
    Pair { key: key.to_owned(), value: value.to_vec(), version: version.to_owned() }
}

impl Host for State {
    async fn get(&mut self, key: String) -> wasmtime::Result<Result<Option<Pair>, Denied>> {
        self.enter()?;
        if let Err(denied) = self.kv() {
            return Ok(Err(denied));
        }
        Ok(self.kv_current(&key).await)
    }

    async fn put(
        &mut self,
        key: String,
        value: Vec<u8>,
        expected: Precondition,
        ttl_seconds: Option<u32>,
    ) -> wasmtime::Result<Result<String, Denied>> {
        self.enter()?;
        Ok(self.kv_put(&key, value, expected, ttl_seconds).await)
    }

    async fn remove(&mut self, key: String, expected: Precondition) -> wasmtime::Result<Result<bool, Denied>> {
        self.enter()?;
        Ok(self.kv_remove(&key, expected).await)
    }

    async fn scan(&mut self, prefix: String, cursor: Option<String>, limit: u32) -> wasmtime::Result<Result<Page, Denied>> {
        self.enter()?;
        Ok(self.kv_scan(&prefix, cursor, limit).await)
    }

    async fn add(&mut self, key: String, delta: i64) -> wasmtime::Result<Result<i64, Denied>> {
        self.enter()?;
        Ok(self.kv_add(&key, delta).await)
    }
}
