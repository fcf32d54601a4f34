//! What differs between databases. Statements are written once, with `?`, in what all of them understand; everything else is decided here.

use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::{SqlSafeStr, SqlStr};

/// The kind of database behind the connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    Sqlite,
}

impl Dialect {
    /// The statement as the database wants it.
    pub(crate) fn statement(self, sql: &'static str) -> SqlStr {
        match self {
            Self::Sqlite => sql.into_sql_str(),
        }
    }

    /// Begins a transaction that will write: it waits for other writers now rather than failing at its first write.
    pub(crate) const fn begin(self) -> &'static str {
        match self {
            Self::Sqlite => "BEGIN IMMEDIATE",
        }
    }

    /// Run once on each new connection that may write.
    pub(crate) const fn set_up_writer(self) -> &'static [&'static str] {
        match self {
            // FULL, because a confirmed answer must survive a power loss; WAL alone would only be consistent.
            Self::Sqlite => &[
                "PRAGMA busy_timeout = 5000",
                "PRAGMA journal_mode = WAL",
                "PRAGMA synchronous = FULL",
                "PRAGMA foreign_keys = ON",
                "PRAGMA cache_size = -32768",
                "PRAGMA temp_store = MEMORY",
            ],
        }
    }

    /// Run also on each new connection that may write while values are sealed: what is deleted or sealed anew leaves nothing in the file.
    pub(crate) const fn set_up_sealing_writer(self) -> &'static str {
        match self {
            Self::Sqlite => "PRAGMA secure_delete = ON",
        }
    }

    /// Run once on each new connection that only reads.
    pub(crate) const fn set_up_reader(self) -> &'static [&'static str] {
        match self {
            Self::Sqlite => &["PRAGMA busy_timeout = 5000", "PRAGMA query_only = ON", "PRAGMA cache_size = -8192", "PRAGMA temp_store = MEMORY"],
        }
    }

    /// Run once on each new connection for look-ups, of which there may be as many as threads.
    pub(crate) const fn set_up_quick_reader(self) -> &'static [&'static str] {
        match self {
            Self::Sqlite => &["PRAGMA busy_timeout = 5000", "PRAGMA query_only = ON", "PRAGMA cache_size = -2048", "PRAGMA temp_store = MEMORY"],
        }
    }

    /// Names of all tables but the database's and the migrations' own.
    pub(crate) const fn tables(self) -> &'static str {
        match self {
            Self::Sqlite => {
                "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' AND name NOT LIKE '_sqlx_%' ORDER BY name"
            }
        }
    }

    /// All migrations, embedded. Files are only ever added.
    pub(crate) fn migrator(self) -> Migrator {
        let files: &[(i64, &'static str, &'static str)] = match self {
            Self::Sqlite => &[
                (1, "initial", include_str!("../migrations/sqlite/0001_initial.sql")),
                (2, "sealing keys", include_str!("../migrations/sqlite/0002_sealing_keys.sql")),
                (3, "renewal and wakes", include_str!("../migrations/sqlite/0003_renewal_and_wakes.sql")),
                (4, "push failures", include_str!("../migrations/sqlite/0004_push_failures.sql")),
                (5, "mass pushes", include_str!("../migrations/sqlite/0005_mass_pushes.sql")),
                (6, "push certificate expiry", include_str!("../migrations/sqlite/0006_push_certificate_expiry.sql")),
                (7, "wakes", include_str!("../migrations/sqlite/0007_wakes.sql")),
                (8, "mass push pages", include_str!("../migrations/sqlite/0008_mass_push_pages.sql")),
                (9, "orphans by device", include_str!("../migrations/sqlite/0009_orphans_by_device.sql")),
                (10, "renewals, erasures and users", include_str!("../migrations/sqlite/0010_renewals_erasures_and_users.sql")),
            ],
        };
        let migrations = files
            .iter()
            .map(|&(version, description, sql)| Migration::new(version, description.into(), MigrationType::Simple, sql.into_sql_str(), false))
            .collect();
        Migrator::with_migrations(migrations)
    }
}
