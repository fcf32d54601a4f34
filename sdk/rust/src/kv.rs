//! The plugin's own memory: keys and values, one name space per tenant. Needs the grant `kv`.
//!
//! Writes commit together with the call's outcome. What was read is checked again then: if another call changed it, the
//! host discards this call's effects and calls again.
//!
//! ```
//! # use wasmdm_plugin::{kv, mock, Failure};
//! # fn main() -> Result<(), Failure> {
//! let host = mock::Host::new();
//! kv::put("greeting", b"hello")?;
//! assert_eq!(kv::get("greeting")?.as_deref(), Some(&b"hello"[..]));
//! kv::put_json("count", &3)?;
//! assert_eq!(kv::get_json::<u32>("count")?, Some(3));
//! # Ok(())
//! # }
//! ```

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Failure, host};

pub use crate::host::types::kv::{Pair, Precondition};

/// The value of a key.
pub fn get(key: &str) -> Result<Option<Vec<u8>>, Failure> {
    Ok(pair(key)?.map(|pair| pair.value))
}

/// The value of a key with its version, for a later [`put_if`].
pub fn pair(key: &str) -> Result<Option<Pair>, Failure> {
    host::kv::get(key)
}

/// The value of a key, from JSON.
pub fn get_json<T: DeserializeOwned>(key: &str) -> Result<Option<T>, Failure> {
    get(key)?
        .map(|value| serde_json::from_slice(&value))
        .transpose()
        .map_err(|error| Failure::from(error).context(format_args!("value of key `{key}`")))
}

/// Sets a value; at most 64 KiB. Returns its version.
pub fn put(key: &str, value: &[u8]) -> Result<String, Failure> {
    put_if(key, value, &Precondition::Anything, None)
}

/// Sets a value, as JSON.
pub fn put_json<T: Serialize>(key: &str, value: &T) -> Result<String, Failure> {
    put(key, &serde_json::to_vec(value)?)
}

/// Sets a value that is forgotten after so many seconds.
pub fn put_for(key: &str, value: &[u8], ttl_seconds: u32) -> Result<String, Failure> {
    put_if(key, value, &Precondition::Anything, Some(ttl_seconds))
}

/// Sets a value under a condition; `conflict` if it does not hold. Returns the new version.
pub fn put_if(key: &str, value: &[u8], expected: &Precondition, ttl_seconds: Option<u32>) -> Result<String, Failure> {
    host::kv::put(key, value, expected, ttl_seconds)
}

/// Removes a key. Whether there was one.
pub fn remove(key: &str) -> Result<bool, Failure> {
    host::kv::remove(key, &Precondition::Anything)
}

/// All pairs whose keys begin with `prefix`, in the order of the keys. Asks page by page (1,000 a page).
pub fn scan(prefix: &str) -> Scan<'_> {
    Scan { prefix, page: Vec::new().into_iter(), cursor: None, finished: false }
}

/// Adds to a counter, which begins at 0. Returns the new value; keep it below 2^53.
pub fn add(key: &str, delta: i64) -> Result<i64, Failure> {
    host::kv::add(key, delta)
}

/// The pairs of [`scan`].
#[derive(Debug)]
pub struct Scan<'a> {
    prefix: &'a str,
    page: std::vec::IntoIter<Pair>,
    cursor: Option<String>,
    finished: bool,
}

impl Scan<'_> {
    fn fetch(&mut self) -> Result<(), Failure> {
        let page = host::kv::scan(self.prefix, self.cursor.as_deref(), 1000)?;
        self.page = page.pairs.into_iter();
        self.finished = page.cursor.is_none();
        self.cursor = page.cursor;
        Ok(())
    }
}

impl Iterator for Scan<'_> {
    type Item = Result<Pair, Failure>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(pair) = self.page.next() {
                return Some(Ok(pair));
            }
            if self.finished {
                return None;
            }
            if let Err(failure) = self.fetch() {
                self.finished = true;
                return Some(Err(failure));
            }
        }
    }
}
