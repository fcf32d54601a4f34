//! Why the storage did not do something.

/// Why the storage did not do it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StorageError {
    /// Busy, full, or the commit failed: nothing of it is stored as far as is known; try again.
    #[error("the database is unavailable: {reason}")]
    Unavailable {
        /// What the database said.
        reason: String,
    },
    /// The database file is used by another server.
    #[error("{reason}")]
    Owned {
        /// Names the lock file.
        reason: String,
    },
    /// A row, or the schema, is not what this version writes.
    #[error("the database holds something unexpected: {reason}")]
    Corrupt {
        /// What, and where as far as is known.
        reason: String,
    },
    /// A value is sealed under a key that is not given, or the keys are of no use.
    #[error("key-file: {reason}")]
    Key {
        /// What, and what to do; never a key.
        reason: String,
    },
    /// An argument that can never be stored.
    #[error("{field}: {problem}")]
    Invalid {
        /// The argument.
        field: &'static str,
        /// Why not.
        problem: String,
    },
}

impl StorageError {
    pub(crate) fn corrupt(reason: impl Into<String>) -> Self {
        Self::Corrupt { reason: reason.into() }
    }

    pub(crate) fn unavailable(reason: impl Into<String>) -> Self {
        Self::Unavailable { reason: reason.into() }
    }
}

impl From<sqlx::Error> for StorageError {
    fn from(error: sqlx::Error) -> Self {
        match error {
            sqlx::Error::ColumnDecode { .. }
            | sqlx::Error::Decode(_)
            | sqlx::Error::ColumnIndexOutOfBounds { .. }
            | sqlx::Error::ColumnNotFound(_)
            | sqlx::Error::TypeNotFound { .. } => Self::corrupt(error.to_string()),
            sqlx::Error::Database(ref database)
                if database.is_unique_violation() || database.is_foreign_key_violation() || database.is_check_violation() =>
            {
                Self::corrupt(error.to_string())
            }
            other => Self::unavailable(other.to_string()),
        }
    }
}

impl From<rusqlite::Error> for StorageError {
    fn from(error: rusqlite::Error) -> Self {
        use rusqlite::ffi;
        match error.sqlite_error().map(|error| error.extended_code) {
            Some(
                ffi::SQLITE_CONSTRAINT_UNIQUE
                | ffi::SQLITE_CONSTRAINT_PRIMARYKEY
                | ffi::SQLITE_CONSTRAINT_ROWID
                | ffi::SQLITE_CONSTRAINT_FOREIGNKEY
                | ffi::SQLITE_CONSTRAINT_TRIGGER
                | ffi::SQLITE_CONSTRAINT_CHECK,
            ) => Self::corrupt(error.to_string()),
            _ => Self::unavailable(error.to_string()),
        }
    }
}
