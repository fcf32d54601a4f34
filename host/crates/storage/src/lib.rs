//! All state of the server, in a database. The only crate that names sqlx and rusqlite.
//!
//! A method is one transaction: the state change, the events that follow from it, and what plugins wrote with it, together or not at all.
//! It answers after the commit returned. Start at [`Storage::open`]; `writer.rs` says how commits are shared, `events.rs` how a state
//! change becomes deliveries, `check.rs` which invariants hold.

pub mod audit;
pub mod backup;
pub mod certificate_bindings;
pub mod check;
pub mod commands;
pub mod device_messages;
pub mod effects;
pub mod enrollments;
pub mod error;
pub mod events;
pub mod fingerprint;
pub mod keyring;
pub mod mass_pushes;
pub mod migration;
pub mod outbox;
pub mod plugin_key_values;
pub mod push_certificate_expiry;
pub mod push_certificates;
pub mod push_failures;
pub mod sealing;
pub mod tenants;
pub mod timers;
pub mod user_verdicts;
pub mod wakes;

mod database;
mod dialect;
mod direct;
mod maintenance;
mod memory;
mod quick_readers;
mod sealed;
mod sql;
mod writer;

#[cfg(test)]
mod query_plans;

pub use error::StorageError;

use crate::database::{Location, Ownership};
use crate::dialect::Dialect;
use crate::keyring::Keyring;
use crate::memory::Memory;
use crate::quick_readers::{Borrowed, QuickReaders};
use crate::sql::{Columns, Db, args};
use crate::writer::{Class, Tx, WriteQueue, Writer, Written};
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use sqlx::any::{Any, AnyConnectOptions};
use sqlx::migrate::MigrateError;
use sqlx::pool::PoolConnection;
use sqlx::{AnyConnection, AnyPool, ConnectOptions as _, Connection as _};
use std::sync::{Arc, Once};
use tokio::sync::Notify;
use tokio_util::task::TaskTracker;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_protocol::time::Timestamp;

/// A handle on the database; clones share it.
#[derive(Debug, Clone)]
pub struct Storage {
    inner: Arc<Inner>,
    /// What the writes of this handle are on behalf of.
    message: Option<Arc<device_messages::HeardMessage>>,
}

#[derive(Debug)]
struct Inner {
    readers: AnyPool,
    quick_readers: QuickReaders,
    dialect: Dialect,
    memory: Arc<Memory>,
    keyring: Keyring,
    /// `None`: opened for reading only.
    queue: Option<Arc<WriteQueue>>,
    tasks: TaskTracker,
    stopping: Arc<Notify>,
    /// Given back at the end of [`Storage::close`].
    ownership: Mutex<Option<Ownership>>,
}

/// Where the state is, and how it is opened.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// `sqlite:///path/to/file`, percent-encoded.
    pub url: String,
    /// The time of the opening.
    pub now: Timestamp,
}

impl Storage {
    /// Opens, migrates, takes the ownership lock, rebuilds what is kept in memory.
    ///
    /// # Errors
    /// [`StorageError::Owned`] when another server has the file; [`StorageError::Corrupt`] when its schema is newer than this version.
    pub async fn open(options: OpenOptions) -> Result<Self, StorageError> {
        Self::open_with_keys(options, Keyring::default()).await
    }

    /// As [`Self::open`], with keys: what can hold a secret is sealed with the first of them.
    ///
    /// # Errors
    /// [`StorageError::Key`] when values are sealed under a key that is not among them.
    pub async fn open_with_keys(options: OpenOptions, keyring: Keyring) -> Result<Self, StorageError> {
        let (storage, connect, is_sealed) = Self::open_unsealed(options, keyring).await?;
        if !storage.keyring().is_empty() {
            metrics::gauge!("wasmdm_storage_resealing").set(if is_sealed { 0.0 } else { 1.0 });
        }
        if !is_sealed {
            storage.inner.tasks.spawn(storage.clone().reseal_in_background(connect));
        }
        Ok(storage)
    }

    /// Also answers whether every value is as the keys want it.
    async fn open_unsealed(options: OpenOptions, keyring: Keyring) -> Result<(Self, AnyConnectOptions, bool), StorageError> {
        install_drivers();
        let location = Location::parse(&options.url)?;
        location.create()?;
        let location = location.resolved()?;
        let ownership = Ownership::take(&location.lock_path())?;
        let connect = location.connect_options()?;
        let dialect = Dialect::Sqlite;
        let memory = Arc::new(Memory::default());
        let queue = Arc::new(WriteQueue::default());
        migrate(&connect, dialect).await?;
        let mut writer = Writer::connect(location.path.clone(), dialect, Arc::clone(&memory), keyring.clone(), Arc::clone(&queue))?;
        let mut db = writer.db();
        let is_sealed = !sealing::begin(&mut db, options.now).await?;
        outbox::free_leases(&mut db, options.now).await?;
        wakes::free_taken(&mut db, options.now).await?;
        rebuild(&mut db, &memory).await?;
        let tasks = TaskTracker::new();
        let stopping = Arc::new(Notify::new());
        writer.start(&tasks)?;
        let storage = Self {
            message: None,
            inner: Arc::new(Inner {
                readers: database::readers(connect.clone(), dialect),
                quick_readers: QuickReaders::new(location.path.clone(), dialect),
                dialect,
                memory: Arc::clone(&memory),
                keyring,
                queue: Some(Arc::clone(&queue)),
                tasks: tasks.clone(),
                stopping: Arc::clone(&stopping),
                ownership: Mutex::new(Some(ownership)),
            }),
        };
        tasks.spawn(flush_last_seen(memory, queue, stopping));
        tracing::debug!(path = %location.path.display(), at = %options.now, "The database is open");
        Ok((storage, connect, is_sealed))
    }

    /// Opens for reading only, beside a server or without one: takes no lock, migrates nothing; every write answers `Unavailable`.
    ///
    /// # Errors
    /// [`StorageError::Unavailable`] when there is no such file, [`StorageError::Corrupt`] when its schema is of another version.
    pub async fn open_read_only(url: &str) -> Result<Self, StorageError> {
        Self::open_read_only_with_keys(url, Keyring::default()).await
    }

    /// As [`Self::open_read_only`], with keys. Without any, whatever needs no look into a sealed value can be had all the same.
    ///
    /// # Errors
    /// [`StorageError::Key`] when keys are given, and values are sealed under one that is not among them.
    pub async fn open_read_only_with_keys(url: &str, keyring: Keyring) -> Result<Self, StorageError> {
        install_drivers();
        let location = Location::parse(url)?;
        let connect = location.connect_options()?;
        let dialect = Dialect::Sqlite;
        let readers = database::readers(connect, dialect);
        let storage = Self {
            message: None,
            inner: Arc::new(Inner {
                readers,
                quick_readers: QuickReaders::new(location.path, dialect),
                dialect,
                memory: Arc::new(Memory::default()),
                keyring,
                queue: None,
                tasks: TaskTracker::new(),
                stopping: Arc::new(Notify::new()),
                ownership: Mutex::new(None),
            }),
        };
        storage.require_schema().await?;
        let mut reader = storage.reader().await?;
        if !storage.keyring().is_empty() {
            sealing::require_keys(&mut reader.db()).await?;
        }
        rebuild(&mut reader.db(), &storage.inner.memory).await?;
        drop(reader);
        Ok(storage)
    }

    /// Flushes what is coalesced and closes; the handle is of no use afterwards. Writes that wait are still committed.
    pub async fn close(&self) -> Result<(), StorageError> {
        if let Some(queue) = &self.inner.queue {
            let flushed = flush(&self.inner.memory, queue).await;
            self.inner.stopping.notify_one();
            queue.close();
            self.inner.tasks.close();
            self.inner.tasks.wait().await;
            self.close_readers().await;
            self.inner.ownership.lock().take();
            return flushed;
        }
        self.close_readers().await;
        Ok(())
    }

    async fn close_readers(&self) {
        self.inner.quick_readers.close();
        self.inner.readers.close().await;
    }

    /// One cheap read, and whether anybody writes, for `/readyz`.
    pub async fn ping(&self) -> Result<(), StorageError> {
        if self.inner.queue.as_ref().is_some_and(|queue| queue.is_closed()) {
            return Err(StorageError::unavailable("nobody writes to it any more"));
        }
        self.look_up("SELECT 1", args![]).await?;
        Ok(())
    }

    async fn write<T, F>(&self, class: Class, work: F) -> Result<T, StorageError>
    where
        T: Send + 'static,
        F: for<'t> Fn(&'t mut Tx) -> BoxFuture<'t, Written<T>> + Send + 'static,
    {
        match &self.inner.queue {
            Some(queue) => match self.message.clone() {
                None => queue.write(class, work).await,
                Some(message) => {
                    queue
                        .write(class, move |tx| {
                            tx.message = Some(Arc::clone(&message));
                            work(tx)
                        })
                        .await
                }
            },
            None => Err(StorageError::unavailable("it is open for reading only")),
        }
    }

    async fn reader(&self) -> Result<Reader, StorageError> {
        let connection = ReaderConnection::Driven(self.inner.readers.acquire().await?);
        Ok(Reader { connection, dialect: self.inner.dialect, keyring: self.inner.keyring.clone() })
    }

    /// For look-ups by an index, which run on the caller's own thread: futures of its statements are ready at once.
    fn quick_reader(&self) -> Result<Reader, StorageError> {
        let connection = ReaderConnection::Quick(self.inner.quick_readers.borrow()?);
        Ok(Reader { connection, dialect: self.inner.dialect, keyring: self.inner.keyring.clone() })
    }

    /// The first row of a look-up by an index.
    async fn look_up(&self, sql: &'static str, args: sql::Args) -> Result<Option<sql::Row>, StorageError> {
        self.quick_reader()?.db().one(sql, args).await
    }

    fn keyring(&self) -> &Keyring {
        &self.inner.keyring
    }

    async fn read_one(&self, sql: &'static str, args: sql::Args) -> Result<Option<sql::Row>, StorageError> {
        self.reader().await?.db().one(sql, args).await
    }

    async fn read_all(&self, sql: &'static str, args: sql::Args) -> Result<Vec<sql::Row>, StorageError> {
        self.reader().await?.db().all(sql, args).await
    }

    async fn require_schema(&self) -> Result<(), StorageError> {
        let known = self.inner.dialect.migrator().iter().map(|migration| migration.version).max().unwrap_or(0);
        let found = match self.read_one("SELECT MAX(version) FROM _sqlx_migrations", args![]).await {
            Ok(row) => row.map_or(Ok(None), |row| row.opt_int(0))?,
            Err(error) => return Err(StorageError::corrupt(format!("it is no database of this server ({error})"))),
        };
        if found == Some(known) {
            return Ok(());
        }
        Err(StorageError::corrupt(format!("its schema has version {}, this version reads {known}", found.unwrap_or(0))))
    }
}

/// A connection that only reads.
struct Reader {
    connection: ReaderConnection,
    dialect: Dialect,
    keyring: Keyring,
}

enum ReaderConnection {
    Driven(PoolConnection<Any>),
    Quick(Borrowed),
}

impl Reader {
    fn db(&mut self) -> Db<'_> {
        match &mut self.connection {
            ReaderConnection::Driven(connection) => {
                let connection: &mut AnyConnection = connection;
                Db::driven(connection, self.dialect, &self.keyring)
            }
            ReaderConnection::Quick(connection) => Db::direct(connection, self.dialect, &self.keyring),
        }
    }
}

/// The writer's thread ends with the last handle, closed or not.
impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(queue) = &self.queue {
            queue.close();
        }
    }
}

/// Migrations go through the driver, which remembers them.
async fn migrate(connect: &AnyConnectOptions, dialect: Dialect) -> Result<(), StorageError> {
    let mut connection = connect.connect().await?;
    for &statement in dialect.set_up_writer() {
        sqlx::raw_sql(statement).execute(&mut connection).await?;
    }
    dialect.migrator().run(&mut connection).await.map_err(migration_error)?;
    Ok(connection.close().await?)
}

fn install_drivers() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // Fails only where somebody else installed them first, and then they are there.
        drop(sqlx::any::install_drivers(&[sqlx::sqlite::any::DRIVER]));
    });
}

fn migration_error(error: MigrateError) -> StorageError {
    match error {
        MigrateError::VersionMissing(version) => StorageError::corrupt(format!(
            "its schema has version {version}, which this version of the server does not know: it was written by a newer one"
        )),
        MigrateError::VersionMismatch(version) => StorageError::corrupt(format!("migration {version} was another one when it ran")),
        other => StorageError::unavailable(format!("the migration failed: {other}")),
    }
}

const SELECT_PENDING: &str = "SELECT DISTINCT enrollment_id FROM command_queue WHERE is_open = 1";

async fn rebuild(db: &mut Db<'_>, memory: &Memory) -> Result<(), StorageError> {
    let mut changes = Vec::new();
    for row in db.all(SELECT_PENDING, args![]).await? {
        changes.push(memory::Change::Pending(EnrollmentId::new(row.text(0)?), true));
    }
    for row in db.all(wakes::SELECT_ALL, args![]).await? {
        changes.push(memory::Change::Wake(EnrollmentId::new(row.text(0)?), memory::WakeState::Waits));
    }
    for row in db.all(push_failures::SELECT_ALL, args![]).await? {
        changes.push(memory::Change::PushFailing(EnrollmentId::new(row.text(0)?), true));
    }
    memory.apply(changes.into_iter());
    for (tenant, subscriber, subscriptions) in outbox::all_subscriptions(db).await? {
        memory.set_subscriptions(&tenant, &subscriber, subscriptions);
    }
    Ok(())
}

/// Times of contact in one transaction, at most.
const FLUSH_CHUNK: usize = 1000;

const UPSERT_PRESENCE: &str = "INSERT INTO enrollment_presence (enrollment_id, tenant_id, last_seen_at) \
    SELECT id, tenant_id, ? FROM enrollments WHERE id = ? \
    ON CONFLICT (enrollment_id) DO UPDATE SET last_seen_at = excluded.last_seen_at \
    WHERE enrollment_presence.last_seen_at < excluded.last_seen_at";

async fn flush_last_seen(memory: Arc<Memory>, queue: Arc<WriteQueue>, stopping: Arc<Notify>) {
    let mut ticks = tokio::time::interval(writer::FLUSH_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stopping.notified() => return,
            _ = ticks.tick() => {
                if let Err(error) = flush(&memory, &queue).await {
                    tracing::warn!("The times of last contact were not written, they are tried again: {error}");
                }
            }
        }
    }
}

/// Writes the times of last contact that wait.
async fn flush(memory: &Memory, queue: &WriteQueue) -> Result<(), StorageError> {
    // One flush at a time: what is taken is remembered in one place.
    let _one = memory.flush.lock().await;
    let taken = memory.begin_flush();
    let mut result = Ok(());
    for chunk in taken.chunks(FLUSH_CHUNK) {
        let chunk: Arc<[(EnrollmentId, Timestamp)]> = chunk.into();
        result = queue
            .write(Class::Background, move |tx| {
                let chunk = Arc::clone(&chunk);
                Box::pin(async move {
                    for (id, at) in chunk.iter() {
                        tx.run(UPSERT_PRESENCE, args![at.as_millis(), id.as_str()]).await?;
                    }
                    Ok(writer::Outcome::Commit(()))
                })
            })
            .await;
        if result.is_err() {
            break;
        }
    }
    memory.end_flush(result.is_ok());
    result
}

/// A time as a column holds it.
fn millis(time: Option<Timestamp>) -> Option<i64> {
    time.map(Timestamp::as_millis)
}

fn tenant(row: &sql::Row, column: usize) -> Result<TenantId, StorageError> {
    Ok(TenantId::new(row.text(column)?))
}
