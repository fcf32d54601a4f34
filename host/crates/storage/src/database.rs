//! The database file: where it is, who owns it, how connections to it are made.

use crate::StorageError;
use crate::dialect::Dialect;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use sqlx::ConnectOptions;
use sqlx::any::{AnyConnectOptions, AnyPoolOptions};
use std::fmt::Write as _;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;
use wasmdm_protocol::percent;

/// Connections that only read.
const READERS: u32 = 4;

/// A database URL that was understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Location {
    pub(crate) path: PathBuf,
}

impl Location {
    pub(crate) fn parse(url: &str) -> Result<Self, StorageError> {
        let invalid = |problem: String| StorageError::Invalid { field: "database", problem };
        let Some(rest) = url.strip_prefix("sqlite:") else {
            let scheme = url.split(':').next().unwrap_or_default();
            return Err(invalid(format!("`{scheme}` is not supported; use sqlite:///path/to/file")));
        };
        let path = rest.strip_prefix("//").unwrap_or(rest);
        if path.contains('?') {
            return Err(invalid("parameters after `?` are not supported".to_owned()));
        }
        let path = percent_decoded(path).ok_or_else(|| invalid("the path is not well percent-encoded".to_owned()))?;
        if path.is_empty() || path == ":memory:" {
            return Err(invalid("a file is needed: sqlite:///path/to/file".to_owned()));
        }
        let path = std::path::absolute(&path).map_err(|error| invalid(error.to_string()))?;
        Ok(Self { path })
    }

    /// Beside the database; it stays when the server ends.
    pub(crate) fn lock_path(&self) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(".lock");
        PathBuf::from(name)
    }

    /// Makes the file, readable by its owner only: it holds keys and tokens.
    pub(crate) fn create(&self) -> Result<(), StorageError> {
        File::options()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&self.path)
            .map_err(|error| StorageError::unavailable(format!("{}: {error}", self.path.display())))?;
        Ok(())
    }

    /// The same file under its own name: whoever comes by a link must meet the same lock.
    pub(crate) fn resolved(self) -> Result<Self, StorageError> {
        let path = self.path.canonicalize().map_err(|error| StorageError::unavailable(format!("{}: {error}", self.path.display())))?;
        Ok(Self { path })
    }

    pub(crate) fn connect_options(&self) -> Result<AnyConnectOptions, StorageError> {
        if !self.path.is_file() {
            return Err(StorageError::unavailable(format!("{}: no such file", self.path.display())));
        }
        let url = format!("sqlite://{}", percent_encoded(&self.path));
        Ok(AnyConnectOptions::from_str(&url)?.disable_statement_logging())
    }
}

/// The pool of connections that only read.
pub(crate) fn readers(options: AnyConnectOptions, dialect: Dialect) -> sqlx::AnyPool {
    AnyPoolOptions::new()
        .min_connections(1)
        .max_connections(READERS)
        .acquire_timeout(Duration::from_secs(5))
        .idle_timeout(None)
        .max_lifetime(None)
        .test_before_acquire(false)
        .after_connect(move |connection, _| {
            Box::pin(async move {
                for &statement in dialect.set_up_reader() {
                    sqlx::raw_sql(statement).execute(&mut *connection).await?;
                }
                Ok(())
            })
        })
        .connect_lazy_with(options)
}

/// The right to be the one server on a file. The kernel takes it back when the process ends, however it ends.
#[derive(Debug)]
pub(crate) struct Ownership {
    _lock: File,
}

impl Ownership {
    pub(crate) fn take(path: &Path) -> Result<Self, StorageError> {
        let unavailable = |error: std::io::Error| StorageError::unavailable(format!("{}: {error}", path.display()));
        let lock = File::options().create(true).append(true).mode(0o600).open(path).map_err(unavailable)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { _lock: lock }),
            Err(Errno::WOULDBLOCK) => Err(StorageError::Owned {
                reason: format!(
                    "another server uses this database: it holds the lock on {}; stop it first, or give this one another database",
                    path.display()
                ),
            }),
            Err(error) => Err(unavailable(error.into())),
        }
    }
}

fn percent_encoded(path: &Path) -> String {
    let mut encoded = String::new();
    for &byte in path.as_os_str().as_encoded_bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'-' | b'_' | b'.' | b'~') {
            encoded.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

fn percent_decoded(path: &str) -> Option<String> {
    String::from_utf8(percent::decoded(path)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_a_file() {
        assert_eq!(Location::parse("sqlite:///var/lib/a%20b.db").unwrap().path, Path::new("/var/lib/a b.db"));
        assert!(Location::parse("sqlite://data/a.db").unwrap().path.is_absolute());
        for wrong in ["postgres://host/x", "sqlite:", "sqlite://:memory:", "sqlite:///a?mode=ro", "sqlite:///a%2", "nonsense"] {
            assert!(matches!(Location::parse(wrong), Err(StorageError::Invalid { field: "database", .. })), "{wrong}");
        }
    }

    #[test]
    fn odd_paths_survive_the_way_to_the_driver() {
        let path = Path::new("/a b/ü?#%/x.db");
        assert_eq!(percent_decoded(&percent_encoded(path)).unwrap(), "/a b/ü?#%/x.db");
    }
}
