//! The one writer, and its groups.
//!
//! Each write is a member: a function over [`Tx`] that can be run again. The writer takes the members that wait, runs them one after
//! the other in one transaction, commits, and only then lets their answers go. Members do not see each other's failures: one that fails
//! is taken out and run alone, and the others run again without it. Most groups have no failure, so members carry no savepoint each.

use crate::StorageError;
use crate::dialect::Dialect;
use crate::memory::{Change, Memory};
use crate::sql::{Args, Db};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use sqlx::any::{AnyConnectOptions, AnyRow};
use sqlx::{AnyConnection, ConnectOptions, Connection};
use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, oneshot};

/// Members of one commit, at most.
const GROUP: usize = 64;
/// Places of a full group that background work gets even while devices wait, so that the outbox moves under load.
const BACKGROUND_SHARE: usize = 8;
/// Waiting members of each class, at most; beyond, callers are told to come again.
const WAITING: usize = 4096;
/// How often a group is tried again without its failing members, before all of them run alone.
const RETRIES: usize = 4;

/// Who goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// A device or an administrator waits for the answer.
    Answer,
    /// Outbox, timers, coalesced times.
    Background,
}

/// What a member wants done with what it wrote.
pub(crate) enum Outcome<T> {
    Commit(T),
    /// The answer stands, but nothing of the member is kept.
    #[cfg_attr(not(test), expect(dead_code, reason = "members check everything before they write; the writer allows for those that cannot"))]
    Rollback(T),
}

pub(crate) type Written<T> = Result<Outcome<T>, StorageError>;

/// The transaction that members run in.
pub(crate) struct Tx {
    connection: AnyConnection,
    dialect: Dialect,
    pub(crate) memory: Arc<Memory>,
    /// Statements that may have changed something, in this transaction.
    writes: usize,
    /// What is kept in memory follows when the commit has returned.
    changes: Vec<Change>,
}

impl Tx {
    pub(crate) fn db(&mut self) -> Db<'_> {
        Db::new(&mut self.connection, self.dialect)
    }

    pub(crate) async fn one(&mut self, sql: &'static str, args: Args) -> Result<Option<AnyRow>, StorageError> {
        self.db().one(sql, args).await
    }

    pub(crate) async fn all(&mut self, sql: &'static str, args: Args) -> Result<Vec<AnyRow>, StorageError> {
        self.db().all(sql, args).await
    }

    /// How many rows it changed.
    pub(crate) async fn run(&mut self, sql: &'static str, args: Args) -> Result<u64, StorageError> {
        self.writes += 1;
        self.db().run(sql, args).await
    }

    /// Changes what is kept in memory once the transaction is committed.
    pub(crate) fn after_commit(&mut self, change: Change) {
        self.changes.push(change);
    }

    async fn control(&mut self, sql: &'static str) -> Result<(), StorageError> {
        sqlx::raw_sql(sql).execute(&mut self.connection).await?;
        Ok(())
    }
}

/// What a member that ran says of its writes.
enum Ran {
    Keep,
    Discard,
}

trait Member: Send {
    fn run<'a>(&'a mut self, tx: &'a mut Tx) -> BoxFuture<'a, Result<Ran, StorageError>>;
    /// Lets the answer go.
    fn finish(self: Box<Self>, end: Result<(), StorageError>);
}

struct Job<T, F> {
    work: F,
    result: Option<T>,
    reply: oneshot::Sender<Result<T, StorageError>>,
}

impl<T, F> Member for Job<T, F>
where
    T: Send + 'static,
    F: for<'t> Fn(&'t mut Tx) -> BoxFuture<'t, Written<T>> + Send + 'static,
{
    fn run<'a>(&'a mut self, tx: &'a mut Tx) -> BoxFuture<'a, Result<Ran, StorageError>> {
        let work = (self.work)(tx);
        let result = &mut self.result;
        Box::pin(async move {
            match work.await? {
                Outcome::Commit(value) => {
                    *result = Some(value);
                    Ok(Ran::Keep)
                }
                Outcome::Rollback(value) => {
                    *result = Some(value);
                    Ok(Ran::Discard)
                }
            }
        })
    }

    fn finish(self: Box<Self>, end: Result<(), StorageError>) {
        let Self { result, reply, .. } = *self;
        let answer = end.and_then(|()| result.ok_or_else(|| StorageError::unavailable("the write did not run")));
        // A caller that has gone does not need its answer.
        drop(reply.send(answer));
    }
}

#[derive(Default)]
struct Waiting {
    answers: VecDeque<Box<dyn Member>>,
    background: VecDeque<Box<dyn Member>>,
    closed: bool,
}

/// Where members wait for the writer.
#[derive(Default)]
pub(crate) struct WriteQueue {
    waiting: Mutex<Waiting>,
    arrived: Notify,
    /// A test that holds this sees what happens while a commit does not return.
    #[cfg(test)]
    pub(crate) commit_gate: tokio::sync::RwLock<()>,
}

impl std::fmt::Debug for WriteQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WriteQueue").finish_non_exhaustive()
    }
}

impl WriteQueue {
    /// Runs `work` in a transaction and answers when that is committed. `work` may run more than once.
    pub(crate) async fn write<T, F>(&self, class: Class, work: F) -> Result<T, StorageError>
    where
        T: Send + 'static,
        F: for<'t> Fn(&'t mut Tx) -> BoxFuture<'t, Written<T>> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        self.push(class, Box::new(Job { work, result: None, reply }))?;
        answer.await.unwrap_or_else(|_| Err(StorageError::unavailable("the writer has stopped")))
    }

    fn push(&self, class: Class, member: Box<dyn Member>) -> Result<(), StorageError> {
        let mut waiting = self.waiting.lock();
        if waiting.closed {
            return Err(StorageError::unavailable("the database is closed"));
        }
        let queue = match class {
            Class::Answer => &mut waiting.answers,
            Class::Background => &mut waiting.background,
        };
        if queue.len() >= WAITING {
            metrics::counter!("wasmdm_storage_refused_writes_total").increment(1);
            return Err(StorageError::unavailable("too many writes wait"));
        }
        queue.push_back(member);
        drop(waiting);
        self.arrived.notify_one();
        Ok(())
    }

    /// No more members; those that wait are still written.
    pub(crate) fn close(&self) {
        self.waiting.lock().closed = true;
        self.arrived.notify_one();
    }

    /// The next group; `None` when closed and empty.
    async fn next_group(&self) -> Option<Vec<Box<dyn Member>>> {
        loop {
            {
                let mut waiting = self.waiting.lock();
                let answers = waiting.answers.len().min(GROUP - BACKGROUND_SHARE.min(waiting.background.len()));
                let background = waiting.background.len().min(GROUP - answers);
                if answers + background > 0 {
                    let mut group: Vec<_> = waiting.answers.drain(..answers).collect();
                    group.extend(waiting.background.drain(..background));
                    return Some(group);
                }
                if waiting.closed {
                    return None;
                }
            }
            self.arrived.notified().await;
        }
    }
}

/// The task behind a [`WriteQueue`].
pub(crate) struct Writer {
    queue: Arc<WriteQueue>,
    options: AnyConnectOptions,
    tx: Tx,
    /// A transaction could neither be committed nor rolled back: the connection is replaced before the next.
    broken: bool,
}

impl Writer {
    pub(crate) async fn connect(
        options: AnyConnectOptions,
        dialect: Dialect,
        memory: Arc<Memory>,
        queue: Arc<WriteQueue>,
    ) -> Result<Self, StorageError> {
        let connection = connect(&options, dialect).await?;
        Ok(Self { queue, options, tx: Tx { connection, dialect, memory, writes: 0, changes: Vec::new() }, broken: false })
    }

    /// Before the task runs: migrations, and what is kept in memory.
    pub(crate) fn connection(&mut self) -> &mut AnyConnection {
        &mut self.tx.connection
    }

    /// Until the queue is closed and empty.
    pub(crate) async fn run(mut self) {
        while let Some(group) = self.queue.next_group().await {
            self.write_group(group).await;
        }
        if let Err(error) = self.tx.connection.close().await {
            tracing::warn!("The writer's connection did not close cleanly: {error}");
        }
    }

    async fn write_group(&mut self, mut group: Vec<Box<dyn Member>>) {
        for _ in 0..RETRIES {
            if group.len() <= 1 {
                break;
            }
            match self.try_group(&mut group).await {
                Ok(()) => {
                    for member in group {
                        member.finish(Ok(()));
                    }
                    return;
                }
                Err(Failed::Member(index)) => {
                    let member = group.remove(index);
                    self.write_alone(member).await;
                }
                Err(Failed::Transaction(error)) => {
                    for member in group {
                        member.finish(Err(error.clone()));
                    }
                    return;
                }
            }
        }
        for member in group {
            self.write_alone(member).await;
        }
    }

    async fn try_group(&mut self, group: &mut [Box<dyn Member>]) -> Result<(), Failed> {
        self.begin().await.map_err(Failed::Transaction)?;
        for (index, member) in group.iter_mut().enumerate() {
            let (writes, changes) = (self.tx.writes, self.tx.changes.len());
            match run(member, &mut self.tx).await {
                Ok(Ran::Keep) => {}
                Ok(Ran::Discard) if self.tx.writes == writes => self.tx.changes.truncate(changes),
                Ok(Ran::Discard) | Err(_) => {
                    self.rollback().await;
                    return Err(Failed::Member(index));
                }
            }
        }
        self.commit(group.len()).await.map_err(Failed::Transaction)
    }

    async fn write_alone(&mut self, mut member: Box<dyn Member>) {
        let end = match self.begin().await {
            Err(error) => Err(error),
            Ok(()) => match run(&mut member, &mut self.tx).await {
                Ok(Ran::Keep) => self.commit(1).await,
                Ok(Ran::Discard) => {
                    self.rollback().await;
                    Ok(())
                }
                Err(error) => {
                    self.rollback().await;
                    Err(error)
                }
            },
        };
        member.finish(end);
    }

    async fn begin(&mut self) -> Result<(), StorageError> {
        if self.broken {
            self.tx.connection = connect(&self.options, self.tx.dialect).await?;
            self.broken = false;
        }
        self.tx.writes = 0;
        self.tx.changes.clear();
        self.tx.control(self.tx.dialect.begin()).await
    }

    async fn commit(&mut self, members: usize) -> Result<(), StorageError> {
        #[cfg(test)]
        let queue = Arc::clone(&self.queue);
        #[cfg(test)]
        let _open = queue.commit_gate.read().await;
        if let Err(error) = self.tx.control("COMMIT").await {
            tracing::error!("A commit of {members} writes failed: {error}");
            metrics::counter!("wasmdm_storage_failed_commits_total").increment(1);
            self.rollback().await;
            return Err(StorageError::unavailable(format!("the commit failed: {error}")));
        }
        metrics::counter!("wasmdm_storage_commits_total").increment(1);
        metrics::counter!("wasmdm_storage_committed_writes_total").increment(u64::try_from(members).unwrap_or(u64::MAX));
        let memory = Arc::clone(&self.tx.memory);
        memory.apply(self.tx.changes.drain(..));
        Ok(())
    }

    async fn rollback(&mut self) {
        self.tx.changes.clear();
        if let Err(error) = self.tx.control("ROLLBACK").await {
            // After some errors the database has rolled back by itself, and says that there is no transaction. A new connection is
            // right in both cases.
            tracing::warn!("A transaction did not roll back, the connection is replaced: {error}");
            self.broken = true;
        }
    }
}

enum Failed {
    /// Rolled back because of this one.
    Member(usize),
    Transaction(StorageError),
}

/// A member that panics is a bug of ours; it must not take the writer with it.
async fn run(member: &mut Box<dyn Member>, tx: &mut Tx) -> Result<Ran, StorageError> {
    match AssertUnwindSafe(member.run(tx)).catch_unwind().await {
        Ok(ran) => ran,
        Err(_) => Err(StorageError::unavailable("the write panicked")),
    }
}

async fn connect(options: &AnyConnectOptions, dialect: Dialect) -> Result<AnyConnection, StorageError> {
    let mut connection = options.connect().await?;
    for &statement in dialect.set_up_writer() {
        sqlx::raw_sql(statement).execute(&mut connection).await?;
    }
    Ok(connection)
}

/// How long a flush of coalesced times is put off.
pub(crate) const FLUSH_EVERY: Duration = Duration::from_secs(1);
