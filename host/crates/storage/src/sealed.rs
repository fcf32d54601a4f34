//! Columns that can hold a secret. Each is a blob whose first byte says how the rest is kept: 0 is plain, 1 is sealed with a key of the
//! [`Keyring`]; another format is refused rather than guessed.
//!
//! A sealed value is bound to its place: table, column, tenant and row are part of what its seal covers, so that a value that was moved
//! does not open. The names in [`COLUMNS`] are therefore part of the format: a table that is renamed keeps its name here.

use crate::StorageError;
use crate::keyring::{KEY_ID, Key, Keyring};
use aws_lc_rs::aead::{Aad, Nonce};
use bytes::Bytes;
use std::fmt::{self, Write as _};
use wasmdm_protocol::enrollment::TenantId;

/// As it is.
const PLAIN: u8 = 0;
/// AES-256-GCM: the id of the key, the nonce, the sealed value, the tag.
const SEALED: u8 = 1;
const NONCE: usize = 12;
const TAG: usize = 16;
/// Format byte and key id: what tells under which key a value is.
pub(crate) const HEAD: usize = 1 + KEY_ID;
const OVERHEAD: usize = HEAD + NONCE + TAG;

/// A column that can hold a secret, with the statements that look at it whatever it holds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Column {
    pub(crate) table: &'static str,
    pub(crate) name: &'static str,
    /// Row numbers after the first argument, each with the head of its value and the value's length.
    pub(crate) heads: &'static str,
    /// The tenant, the value and the row's key of a row number.
    pub(crate) value: &'static str,
    /// How many columns the row's key has.
    pub(crate) keys: usize,
    /// Replaces the value of a row number.
    pub(crate) replace: &'static str,
    /// How many values there are under each key (in hex; empty for plain).
    pub(crate) census: &'static str,
}

macro_rules! columns {
    ($($(#[$doc:meta])* $constant:ident: $table:literal . $name:literal [$($key:literal),+];)+) => {
        $($(#[$doc])*
        pub(crate) const $constant: Column = Column {
            table: $table,
            name: $name,
            heads: concat!("SELECT rowid, SUBSTR(", $name, ", 1, 9), LENGTH(", $name, ") FROM ", $table, " WHERE rowid > ? ORDER BY rowid LIMIT ?"),
            value: concat!("SELECT tenant_id, ", $name, $(", CAST(", $key, " AS TEXT)",)+ " FROM ", $table, " WHERE rowid = ?"),
            keys: [$($key),+].len(),
            replace: concat!("UPDATE ", $table, " SET ", $name, " = ? WHERE rowid = ?"),
            census: concat!(
                "SELECT CASE WHEN SUBSTR(", $name, ", 1, 1) = x'01' THEN LOWER(HEX(SUBSTR(", $name, ", 2, 8))) ELSE '' END AS key_id, COUNT(*) FROM ",
                $table, " WHERE ", $name, " IS NOT NULL GROUP BY key_id"
            ),
        };)+
        /// All of them.
        pub(crate) const COLUMNS: &[Column] = &[$($constant),+];
    };
}

// In brackets: what tells the row from others of its tenant, and is known when the value is written as well as when it is read.
columns! {
    PUSH_CERTIFICATE: "push_certificates"."certificate_pem" ["topic"];
    PUSH_CERTIFICATE_KEY: "push_certificates"."private_key_pem" ["topic"];
    URL_PARAMS: "enrollments"."url_params" ["id"];
    PUSH_MAGIC: "enrollments"."push_magic" ["id"];
    PUSH_TOKEN: "enrollments"."push_token" ["id"];
    MESSAGE: "enrollment_messages"."raw" ["enrollment_id", "message_type"];
    TOKEN: "enrollment_tokens"."token" ["enrollment_id", "name"];
    USER_AUTH_TOKEN: "user_verdicts"."auth_token" ["device_id", "enrollment_id"];
    CERTIFICATE: "certificate_bindings"."certificate" ["identity"];
    COMMAND_BODY: "commands"."body" ["uuid"];
    REPORT: "command_results"."report" ["enrollment_id", "command_uuid"];
    ORPHAN_REPORT: "orphan_reports"."report" ["enrollment_id", "command_uuid", "received_at"];
    KEY_VALUE: "plugin_key_values"."item_value" ["plugin", "item_key"];
    EVENT_WHO: "events"."who" ["id"];
    EVENT_DATA: "events"."data" ["id"];
    LAST_ERROR: "deliveries"."last_error" ["sequence"];
    TIMER_DATA: "timers"."data" ["plugin", "name", "enrollment_id"];
    AUDIT_DETAIL: "audit"."detail" ["actor", "action", "target", "at"];
}

/// Where a value stands, and the keys that it may be sealed with.
pub(crate) struct Place<'a> {
    keyring: &'a Keyring,
    column: &'static Column,
    tenant: &'a str,
    row: &'a [&'a (dyn fmt::Display + Sync)],
}

impl Keyring {
    /// `keyring.at(&sealed::TOKEN, tenant, &[id, &name])`: the row's key as [`COLUMNS`] lists it. NULL is said as "".
    pub(crate) fn at<'a>(&'a self, column: &'static Column, tenant: &'a TenantId, row: &'a [&'a (dyn fmt::Display + Sync)]) -> Place<'a> {
        debug_assert_eq!(row.len(), column.keys, "{}.{}", column.table, column.name);
        Place { keyring: self, column, tenant: tenant.as_str(), row }
    }
}

impl Place<'_> {
    /// The blob for a value.
    pub(crate) fn seal(&self, value: &[u8]) -> Result<Vec<u8>, StorageError> {
        match self.keyring.sealing() {
            None => Ok(plain(value)),
            Some(key) => self.seal_with(key, value),
        }
    }

    fn seal_with(&self, key: &Key, value: &[u8]) -> Result<Vec<u8>, StorageError> {
        let mut blob = Vec::with_capacity(value.len() + OVERHEAD);
        blob.push(SEALED);
        blob.extend_from_slice(key.id());
        blob.extend_from_slice(&[0; NONCE]);
        blob.extend_from_slice(value);
        let (head, sealed) = blob.split_at_mut(HEAD + NONCE);
        let (nonce, tag) = key
            .cipher()
            .seal_in_place_separate_tag(Aad::from(self.associated_data()), sealed)
            .map_err(|_| StorageError::unavailable(format!("a value of {}.{} could not be sealed", self.column.table, self.column.name)))?;
        for (byte, random) in head.iter_mut().skip(HEAD).zip(nonce.as_ref()) {
            *byte = *random;
        }
        blob.extend_from_slice(tag.as_ref());
        Ok(blob)
    }

    /// The value of a blob.
    pub(crate) fn open(&self, mut blob: Vec<u8>) -> Result<Bytes, StorageError> {
        match blob.first() {
            Some(&PLAIN) => Ok(Bytes::from(blob).slice(1..)),
            Some(&SEALED) => {
                let end = blob.len().saturating_sub(TAG);
                self.unseal(&mut blob)?;
                Ok(Bytes::from(blob).slice(HEAD + NONCE..end))
            }
            Some(format) => Err(self.corrupt(&format!("is kept in the unknown format {format}"))),
            None => Err(self.corrupt("has no format byte")),
        }
    }

    /// In place.
    fn unseal(&self, blob: &mut [u8]) -> Result<(), StorageError> {
        let Some((head, sealed)) = blob.split_at_mut_checked(HEAD + NONCE) else {
            return Err(self.corrupt("is too short for its format"));
        };
        let (head, nonce) = head.split_at(HEAD);
        let id = head.get(1..).unwrap_or_default();
        let Some(key) = self.keyring.find(id) else {
            let id = crate::certificate_bindings::hex(id);
            return Err(StorageError::Key {
                reason: format!("a value of {}.{} is sealed under the key {id}, which is not given", self.column.table, self.column.name),
            });
        };
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| self.corrupt("has no nonce"))?;
        key.cipher()
            .open_in_place(nonce, Aad::from(self.associated_data()), sealed)
            .map_err(|_| self.corrupt("does not open with its key: it was changed, or comes from another row"))?;
        Ok(())
    }

    /// The value of a column that may be NULL.
    pub(crate) fn open_opt(&self, blob: Option<Vec<u8>>) -> Result<Option<Bytes>, StorageError> {
        blob.map(|blob| self.open(blob)).transpose()
    }

    /// The text of a blob.
    pub(crate) fn open_text(&self, blob: Vec<u8>) -> Result<String, StorageError> {
        String::from_utf8(self.open(blob)?.into()).map_err(|_| self.corrupt("is no UTF-8"))
    }

    /// The JSON of a blob.
    pub(crate) fn open_json(&self, blob: Vec<u8>) -> Result<serde_json::Value, StorageError> {
        crate::sql::parse_json(&self.open(blob)?)
    }

    fn corrupt(&self, problem: &str) -> StorageError {
        StorageError::corrupt(format!("a value of {}.{} {problem}", self.column.table, self.column.name))
    }

    /// Each part with its length before it, so that no two places have the same.
    fn associated_data(&self) -> Vec<u8> {
        let mut data = Parts(Vec::with_capacity(160));
        data.add(&self.column.table);
        data.add(&self.column.name);
        data.add(&self.tenant);
        for part in self.row {
            data.add(part);
        }
        data.0
    }
}

struct Parts(Vec<u8>);

impl Parts {
    fn add(&mut self, part: &dyn fmt::Display) {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 4]);
        // Writing to memory cannot fail.
        let _ = write!(self, "{part}");
        let length = u32::try_from(self.0.len() - start - 4).unwrap_or(u32::MAX).to_be_bytes();
        for (byte, of_length) in self.0.iter_mut().skip(start).zip(length) {
            *byte = of_length;
        }
    }
}

impl fmt::Write for Parts {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.extend_from_slice(text.as_bytes());
        Ok(())
    }
}

fn plain(value: &[u8]) -> Vec<u8> {
    let mut blob = Vec::with_capacity(value.len() + 1);
    blob.push(PLAIN);
    blob.extend_from_slice(value);
    blob
}

/// Whether a value with this head is as the keyring would write it now.
pub(crate) fn is_current(keyring: &Keyring, head: &[u8]) -> bool {
    match keyring.sealing() {
        None => head.first() == Some(&PLAIN),
        Some(key) => head.split_first().is_some_and(|(format, id)| *format == SEALED && id == key.id()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant() -> TenantId {
        TenantId::default()
    }

    fn keyring(names: &[&str]) -> Keyring {
        let lines: Vec<String> = names.iter().map(|name| Keyring::line_for_tests(name)).collect();
        Keyring::parse(&lines.join("\n")).unwrap()
    }

    #[test]
    fn a_value_comes_back_to_the_byte_and_stands_nowhere_in_its_blob() {
        for keyring in [Keyring::default(), keyring(&["a"]), keyring(&["a", "b"])] {
            let tenant = tenant();
            for value in [&b"\x00\xffsecret"[..], b""] {
                let blob = keyring.at(&PUSH_MAGIC, &tenant, &[&"id"]).seal(value).unwrap();
                assert_eq!(keyring.at(&PUSH_MAGIC, &tenant, &[&"id"]).open(blob.clone()).unwrap(), Bytes::copy_from_slice(value));
                let stands_there = blob.windows(6).any(|window| window == b"secret");
                assert_eq!(stands_there, keyring.sealing().is_none() && !value.is_empty());
                assert!(is_current(&keyring, &blob[..HEAD.min(blob.len())]));
            }
        }
    }

    #[test]
    fn the_same_value_is_sealed_differently_each_time() {
        let (keyring, tenant) = (keyring(&["a"]), tenant());
        let seal = || keyring.at(&PUSH_MAGIC, &tenant, &[&"id"]).seal(b"secret").unwrap();
        assert_ne!(seal(), seal());
    }

    /// Whoever can write to the database but has no key cannot give one device the token of another.
    #[test]
    fn a_value_that_was_moved_does_not_open() {
        let (keyring, tenant) = (keyring(&["a"]), tenant());
        let blob = keyring.at(&MESSAGE, &tenant, &[&"id", &"TokenUpdate"]).seal(b"secret").unwrap();
        let opens = |column: &'static Column, tenant: &TenantId, row: &[&(dyn fmt::Display + Sync)]| {
            keyring.at(column, tenant, row).open(blob.clone()).is_ok()
        };
        assert!(opens(&MESSAGE, &tenant, &[&"id", &"TokenUpdate"]));
        assert!(!opens(&TOKEN, &tenant, &[&"id", &"TokenUpdate"]), "another table and column");
        assert!(!opens(&MESSAGE, &TenantId::new("other"), &[&"id", &"TokenUpdate"]), "another tenant");
        assert!(!opens(&MESSAGE, &tenant, &[&"id2", &"TokenUpdate"]), "another row");
        assert!(!opens(&MESSAGE, &tenant, &[&"idT", &"okenUpdate"]), "the parts of a key are kept apart");
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        let (keyring, tenant) = (keyring(&["a"]), tenant());
        let place = keyring.at(&PUSH_MAGIC, &tenant, &[&"id"]);
        let blob = place.seal(b"secret").unwrap();
        for changed in 0..blob.len() {
            let mut other = blob.clone();
            // The format byte 1 becomes 3: never plain.
            other[changed] ^= 2;
            assert!(place.open(other).is_err(), "{changed}");
        }
        for length in 0..blob.len() {
            assert!(place.open(blob[..length].to_vec()).is_err(), "{length}");
        }
    }

    #[test]
    fn any_key_opens_and_the_first_one_seals() {
        let (old, tenant) = (keyring(&["a"]), tenant());
        let both = keyring(&["b", "a"]);
        let new = keyring(&["b"]);
        let blob = old.at(&PUSH_MAGIC, &tenant, &[&"id"]).seal(b"secret").unwrap();
        assert!(both.at(&PUSH_MAGIC, &tenant, &[&"id"]).open(blob.clone()).is_ok());
        assert!(!is_current(&both, &blob[..HEAD]));
        let error = new.at(&PUSH_MAGIC, &tenant, &[&"id"]).open(blob).unwrap_err();
        assert!(matches!(&error, StorageError::Key { reason } if reason.contains("enrollments.push_magic")), "{error}");
        let blob = both.at(&PUSH_MAGIC, &tenant, &[&"id"]).seal(b"secret").unwrap();
        assert!(new.at(&PUSH_MAGIC, &tenant, &[&"id"]).open(blob).is_ok());
    }

    #[test]
    fn an_unknown_format_is_refused() {
        for keyring in [Keyring::default(), keyring(&["a"])] {
            let tenant = tenant();
            let place = keyring.at(&PUSH_MAGIC, &tenant, &[&"id"]);
            assert!(matches!(place.open(vec![2, 2, 3]), Err(StorageError::Corrupt { .. })));
            assert!(matches!(place.open(Vec::new()), Err(StorageError::Corrupt { .. })));
        }
    }
}
