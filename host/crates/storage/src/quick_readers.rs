//! Connections for look-ups by an index, on the caller's own thread.
//!
//! Such a look-up takes ten microseconds. Through the driver it costs several times as much, because the driver has a thread for each
//! connection: what devices wait for, and what plugins ask during a call, goes this way. Whatever may take long (lists, counts, whole
//! tables) goes through the driver, and holds up nobody else's work meanwhile.

use crate::StorageError;
use crate::dialect::Dialect;
use crate::direct::DirectConnection;
use parking_lot::Mutex;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// Connections that are kept. No more are in use at once than there are threads; beyond, one is opened for the moment.
const KEPT: usize = 8;

/// A connection for as long as it is held.
pub(crate) type Borrowed = OwnedMutexGuard<DirectConnection>;

pub(crate) struct QuickReaders {
    path: PathBuf,
    dialect: Dialect,
    /// `None`: closed.
    kept: Mutex<Option<Vec<Arc<AsyncMutex<DirectConnection>>>>>,
}

impl std::fmt::Debug for QuickReaders {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QuickReaders").field("path", &self.path).finish_non_exhaustive()
    }
}

impl QuickReaders {
    pub(crate) fn new(path: PathBuf, dialect: Dialect) -> Self {
        Self { path, dialect, kept: Mutex::new(Some(Vec::new())) }
    }

    /// Never waits for another look-up.
    pub(crate) fn borrow(&self) -> Result<Borrowed, StorageError> {
        let closed = || StorageError::unavailable("the database is closed");
        let free = self.kept.lock().as_ref().ok_or_else(closed)?.iter().find_map(|kept| Arc::clone(kept).try_lock_owned().ok());
        if let Some(connection) = free {
            return Ok(connection);
        }
        let connection = Arc::new(AsyncMutex::new(self.open()?));
        let borrowed = Arc::clone(&connection).try_lock_owned().map_err(|_| StorageError::unavailable("a new connection is in use"))?;
        if let Some(kept) = self.kept.lock().as_mut().filter(|kept| kept.len() < KEPT) {
            kept.push(connection);
        }
        Ok(borrowed)
    }

    fn open(&self) -> Result<DirectConnection, StorageError> {
        let mut connection = DirectConnection::open(&self.path)?;
        for &statement in self.dialect.set_up_quick_reader() {
            connection.control(statement)?;
        }
        Ok(connection)
    }

    pub(crate) fn close(&self) {
        drop(self.kept.lock().take());
    }
}
