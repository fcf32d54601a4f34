//! The one writer, and its groups.
//!
//! Each write is a member: a function over [`Tx`] that can be run again. The writer takes the members that wait, runs them one after
//! the other in one transaction, commits, and only then lets their answers go. Members do not see each other's failures: one that fails
//! is taken out and run alone, and the others run again without it. Most groups have no failure, so members carry no savepoint each.

use crate::StorageError;
use crate::device_messages::HeardMessage;
use crate::dialect::Dialect;
use crate::direct::DirectConnection;
use crate::keyring::Keyring;
use crate::memory::{Change, Memory};
use crate::sql::{Args, Db, Row};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot};
use tokio_util::task::TaskTracker;
use wasmdm_protocol::enrollment::EnrollmentId;

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
    connection: DirectConnection,
    dialect: Dialect,
    pub(crate) memory: Arc<Memory>,
    pub(crate) keyring: Keyring,
    /// What the member that runs is on behalf of.
    pub(crate) message: Option<Arc<HeardMessage>>,
    /// Which transaction this is, counted since the start.
    number: i64,
    /// Statements that may have changed something, in this transaction.
    writes: usize,
    /// What is kept in memory follows when the commit has returned.
    changes: Vec<Change>,
}

impl Tx {
    pub(crate) fn db(&mut self) -> Db<'_> {
        Db::direct(&mut self.connection, self.dialect, &self.keyring)
    }

    pub(crate) async fn one(&mut self, sql: &'static str, args: Args) -> Result<Option<Row>, StorageError> {
        self.db().one(sql, args).await
    }

    pub(crate) async fn all(&mut self, sql: &'static str, args: Args) -> Result<Vec<Row>, StorageError> {
        self.db().all(sql, args).await
    }

    /// How many rows it changed.
    pub(crate) async fn run(&mut self, sql: &'static str, args: Args) -> Result<u64, StorageError> {
        self.writes += 1;
        self.db().run(sql, args).await
    }

    /// Higher with each transaction: [`Memory::committed`] says which of them have committed.
    pub(crate) const fn number(&self) -> i64 {
        self.number
    }

    /// Changes what is kept in memory once the transaction is committed.
    pub(crate) fn after_commit(&mut self, change: Change) {
        self.changes.push(change);
    }

    /// Whether the enrollment's last push failed: memory hears of what was written in this transaction only when it is committed.
    pub(crate) fn is_push_failing(&self, id: &EnrollmentId) -> bool {
        let written = self.changes.iter().rev().find_map(|change| match change {
            Change::PushFailing(of, failing) if of == id => Some(*failing),
            _ => None,
        });
        written.unwrap_or_else(|| self.memory.is_push_failing(id))
    }

    fn control(&mut self, sql: &'static str) -> Result<(), StorageError> {
        self.connection.control(sql)
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

    /// Nobody writes any more: whoever waits is told so.
    fn abandon(&self) {
        let mut waiting = self.waiting.lock();
        waiting.closed = true;
        let left: Vec<_> = waiting.answers.drain(..).collect::<Vec<_>>().into_iter().chain(waiting.background.drain(..)).collect();
        drop(waiting);
        // Their callers see that nobody can answer.
        drop(left);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.waiting.lock().closed
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

/// The thread behind a [`WriteQueue`]. A thread and not a task, because statements and commits block.
pub(crate) struct Writer {
    queue: Arc<WriteQueue>,
    path: PathBuf,
    tx: Tx,
    /// A transaction could neither be committed nor rolled back: the connection is replaced before the next.
    broken: bool,
}

impl Writer {
    pub(crate) fn connect(
        path: PathBuf,
        dialect: Dialect,
        memory: Arc<Memory>,
        keyring: Keyring,
        queue: Arc<WriteQueue>,
    ) -> Result<Self, StorageError> {
        let connection = connect(&path, dialect, &keyring)?;
        Ok(Self {
            queue,
            path,
            tx: Tx { connection, dialect, memory, keyring, message: None, number: 0, writes: 0, changes: Vec::new() },
            broken: false,
        })
    }

    /// Before the thread runs: what is kept in memory.
    pub(crate) fn db(&mut self) -> Db<'_> {
        self.tx.db()
    }

    /// Runs until the queue is closed and empty; the tracker waits for that.
    pub(crate) fn start(self, tasks: &TaskTracker) -> Result<(), StorageError> {
        let runtime = Handle::current();
        let (ends, ended) = oneshot::channel::<()>();
        std::thread::Builder::new()
            .name(String::from("database-writer"))
            .spawn(move || {
                runtime.block_on(self.run());
                drop(ends);
            })
            .map_err(|error| StorageError::unavailable(format!("no thread for the writer: {error}")))?;
        tasks.spawn(ended);
        Ok(())
    }

    async fn run(mut self) {
        // However this ends: a caller that waits for ever would be worse than one that is refused.
        let _end = Abandon(Arc::clone(&self.queue));
        while let Some(group) = self.queue.next_group().await {
            self.write_group(group).await;
        }
        if let Err(error) = self.tx.connection.close() {
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
        self.begin().map_err(Failed::Transaction)?;
        for (index, member) in group.iter_mut().enumerate() {
            let (writes, changes) = (self.tx.writes, self.tx.changes.len());
            match run(member, &mut self.tx).await {
                Ok(Ran::Keep) => {}
                Ok(Ran::Discard) if self.tx.writes == writes => self.tx.changes.truncate(changes),
                Ok(Ran::Discard) | Err(_) => {
                    self.rollback();
                    return Err(Failed::Member(index));
                }
            }
        }
        #[cfg(test)]
        drop(self.queue.commit_gate.read().await);
        self.commit(group.len()).map_err(Failed::Transaction)
    }

    async fn write_alone(&mut self, mut member: Box<dyn Member>) {
        let end = match self.begin() {
            Err(error) => Err(error),
            Ok(()) => match run(&mut member, &mut self.tx).await {
                Ok(Ran::Keep) => {
                    #[cfg(test)]
                    drop(self.queue.commit_gate.read().await);
                    self.commit(1)
                }
                Ok(Ran::Discard) => {
                    self.rollback();
                    Ok(())
                }
                Err(error) => {
                    self.rollback();
                    Err(error)
                }
            },
        };
        member.finish(end);
    }

    fn begin(&mut self) -> Result<(), StorageError> {
        if self.broken {
            self.tx.connection = connect(&self.path, self.tx.dialect, &self.tx.keyring)?;
            self.broken = false;
        }
        self.tx.number += 1;
        self.tx.writes = 0;
        self.tx.changes.clear();
        self.tx.control(self.tx.dialect.begin())
    }

    fn commit(&mut self, members: usize) -> Result<(), StorageError> {
        if let Err(error) = self.tx.control("COMMIT") {
            tracing::error!("A commit of {members} writes failed: {error}");
            metrics::counter!("wasmdm_storage_failed_commits_total").increment(1);
            self.rollback();
            return Err(StorageError::unavailable(format!("the commit failed: {error}")));
        }
        metrics::counter!("wasmdm_storage_commits_total").increment(1);
        metrics::counter!("wasmdm_storage_committed_writes_total").increment(u64::try_from(members).unwrap_or(u64::MAX));
        let memory = Arc::clone(&self.tx.memory);
        memory.follow(self.tx.number, self.tx.changes.drain(..));
        Ok(())
    }

    fn rollback(&mut self) {
        self.tx.changes.clear();
        if let Err(error) = self.tx.control("ROLLBACK") {
            // After some errors the database has rolled back by itself, and says that there is no transaction. A new connection is
            // right in both cases.
            tracing::warn!("A transaction did not roll back, the connection is replaced: {error}");
            self.broken = true;
        }
    }
}

struct Abandon(Arc<WriteQueue>);

impl Drop for Abandon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("The writer of the database has stopped: nothing can be written until the server is restarted");
        }
        self.0.abandon();
    }
}

enum Failed {
    /// Rolled back because of this one.
    Member(usize),
    Transaction(StorageError),
}

/// A member that panics is a bug of ours; it must not take the writer with it.
async fn run(member: &mut Box<dyn Member>, tx: &mut Tx) -> Result<Ran, StorageError> {
    tx.message = None;
    // Also what it does before its first await.
    match AssertUnwindSafe(async { member.run(tx).await }).catch_unwind().await {
        Ok(ran) => ran,
        Err(_) => Err(StorageError::unavailable("the write panicked")),
    }
}

fn connect(path: &Path, dialect: Dialect, keyring: &Keyring) -> Result<DirectConnection, StorageError> {
    let mut connection = DirectConnection::open(path)?;
    for &statement in dialect.set_up_writer() {
        connection.control(statement)?;
    }
    if !keyring.is_empty() {
        connection.control(dialect.set_up_sealing_writer())?;
    }
    Ok(connection)
}

/// How long a flush of coalesced times is put off.
pub(crate) const FLUSH_EVERY: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::{Columns, args};
    use crate::{OpenOptions, Storage};
    use wasmdm_protocol::enrollment::TenantId;
    use wasmdm_protocol::time::Timestamp;

    async fn storage() -> (tempfile::TempDir, Storage) {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}/test.db", directory.path().display());
        let storage = Storage::open(OpenOptions { url, now: Timestamp::from_millis(0) }).await.unwrap();
        (directory, storage)
    }

    const INSERT: &str = "INSERT INTO tenants (id, created_at) VALUES (?, 0)";
    const COUNT: &str = "SELECT COUNT(*) FROM tenants WHERE id <> 'default'";

    async fn insert(queue: Arc<WriteQueue>, name: String) -> Result<String, StorageError> {
        queue
            .write(Class::Answer, move |tx| {
                let name = name.clone();
                Box::pin(async move {
                    tx.run(INSERT, args![name.as_str()]).await?;
                    Ok(Outcome::Commit(name))
                })
            })
            .await
    }

    async fn count(storage: &Storage) -> i64 {
        storage.read_one(COUNT, args![]).await.unwrap().unwrap().int(0).unwrap()
    }

    /// Members that are all waiting before the writer sees the first of them, because it is held in a commit.
    async fn together<T: Send + 'static>(
        queue: &Arc<WriteQueue>,
        members: Vec<impl Future<Output = T> + Send + 'static>,
    ) -> Vec<tokio::task::JoinHandle<T>> {
        let tracker = TaskTracker::new();
        let held = queue.commit_gate.write().await;
        let (runs, mut running) = tokio::sync::mpsc::unbounded_channel();
        let first = Arc::clone(queue);
        let first = tracker.spawn(async move {
            let work = first.write(Class::Answer, move |tx| {
                let runs = runs.clone();
                Box::pin(async move {
                    runs.send(()).unwrap();
                    tx.run(INSERT, args!["first"]).await?;
                    Ok(Outcome::Commit(()))
                })
            });
            work.await
        });
        // It runs, so its group is closed, and stays before its commit.
        running.recv().await.unwrap();
        let handles: Vec<_> = members.into_iter().map(|member| tracker.spawn(member)).collect();
        while count_waiting(queue) < handles.len() {
            tokio::task::yield_now().await;
        }
        drop(held);
        first.await.unwrap().unwrap();
        handles
    }

    fn count_waiting(queue: &WriteQueue) -> usize {
        let waiting = queue.waiting.lock();
        waiting.answers.len() + waiting.background.len()
    }

    #[tokio::test]
    async fn the_writer_uses_a_write_ahead_log_and_full_synchronisation() {
        let (_directory, storage) = storage().await;
        let read = async |sql: &'static str| {
            let read = storage.write(Class::Answer, move |tx| {
                Box::pin(async move {
                    let row = tx.one(sql, args![]).await?.unwrap();
                    Ok(Outcome::Commit(row.text(0).or_else(|_| row.int(0).map(|number| number.to_string()))?))
                })
            });
            read.await.unwrap()
        };
        assert_eq!(read("PRAGMA journal_mode").await, "wal");
        assert_eq!(read("PRAGMA synchronous").await, "2");
        assert_eq!(read("PRAGMA foreign_keys").await, "1");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_reply_leaves_before_the_commit_has_returned() {
        let (_directory, storage) = storage().await;
        let queue = Arc::clone(storage.inner.queue.as_ref().unwrap());
        let held = queue.commit_gate.write().await;
        let tenant = TenantId::new("a");
        let mut answer = std::pin::pin!(storage.create_tenant(&tenant, Timestamp::from_millis(0)));
        // The writer has taken it and stands before its commit, or will; either way it cannot answer.
        for _ in 0..1000 {
            assert!(answer.as_mut().now_or_never().is_none());
            tokio::task::yield_now().await;
        }
        assert_eq!(count(&storage).await, 0);
        drop(held);
        answer.await.unwrap();
        assert_eq!(count(&storage).await, 1);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn members_share_a_commit_and_a_failing_one_does_not_fail_its_neighbours() {
        let (_directory, storage) = storage().await;
        let queue = Arc::clone(storage.inner.queue.as_ref().unwrap());
        let names = ["a", "b", "a", "c", "default", "d"];
        let members = names.map(|name| insert(Arc::clone(&queue), name.to_owned())).into_iter().collect();
        let mut outcomes = Vec::new();
        for handle in together(&queue, members).await {
            outcomes.push(handle.await.unwrap().map_err(|error| matches!(error, StorageError::Corrupt { .. })));
        }
        let stored = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
        assert_eq!(stored, 4, "{outcomes:?}");
        assert_eq!(outcomes[4], Err(true));
        assert!(outcomes[0].is_ok() != outcomes[2].is_ok());
        assert_eq!(count(&storage).await, 5);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_failed_commit_answers_unavailable_to_all() {
        let (_directory, storage) = storage().await;
        let queue = Arc::clone(storage.inner.queue.as_ref().unwrap());
        let mut members: Vec<BoxFuture<'static, Result<String, StorageError>>> = Vec::new();
        for name in ["a", "b"] {
            members.push(Box::pin(insert(Arc::clone(&queue), name.to_owned())));
        }
        // A reference that is looked at by the commit only, and leads nowhere then.
        let breaking = Arc::clone(&queue);
        members.push(Box::pin(async move {
            breaking
                .write(Class::Background, |tx| {
                    Box::pin(async move {
                        tx.run("PRAGMA defer_foreign_keys = ON", args![]).await?;
                        tx.run("INSERT INTO push_topics (topic, tenant_id, created_at) VALUES ('t', 'nobody', 0)", args![]).await?;
                        Ok(Outcome::Commit("broken".to_owned()))
                    })
                })
                .await
        }));
        for handle in together(&queue, members).await {
            let answer = handle.await.unwrap();
            assert!(matches!(&answer, Err(StorageError::Unavailable { reason }) if reason.contains("commit")), "{answer:?}");
        }
        assert_eq!(count(&storage).await, 1, "only what came before");
        insert(queue, "after".to_owned()).await.unwrap();
        assert_eq!(count(&storage).await, 2);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_a_member_rolls_back_is_gone_and_its_answer_stands() {
        let (_directory, storage) = storage().await;
        let queue = Arc::clone(storage.inner.queue.as_ref().unwrap());
        let undone = Arc::clone(&queue);
        let mut members: Vec<BoxFuture<'static, Result<String, StorageError>>> = vec![Box::pin(async move {
            undone
                .write(Class::Answer, |tx| {
                    Box::pin(async move {
                        tx.run(INSERT, args!["undone"]).await?;
                        tx.after_commit(Change::Seen(EnrollmentId::new("undone"), Timestamp::from_millis(1)));
                        Ok(Outcome::Rollback("answer".to_owned()))
                    })
                })
                .await
        })];
        members.push(Box::pin(insert(Arc::clone(&queue), "kept".to_owned())));
        let mut answers = Vec::new();
        for handle in together(&queue, members).await {
            answers.push(handle.await.unwrap().unwrap());
        }
        assert_eq!(answers, ["answer", "kept"]);
        assert_eq!(count(&storage).await, 2);
        assert_eq!(storage.inner.memory.last_seen(&EnrollmentId::new("undone")), None);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_member_that_panics_fails_alone() {
        let (_directory, storage) = storage().await;
        let queue = Arc::clone(storage.inner.queue.as_ref().unwrap());
        let bad = Arc::clone(&queue);
        let panicking: BoxFuture<'static, Result<String, StorageError>> =
            Box::pin(async move { bad.write(Class::Answer, |_| Box::pin(async { panic!("a bug") })).await });
        let members = vec![panicking, Box::pin(insert(Arc::clone(&queue), "kept".to_owned()))];
        let mut answers = Vec::new();
        for handle in together(&queue, members).await {
            answers.push(handle.await.unwrap().is_ok());
        }
        assert_eq!(answers, [false, true]);
        assert_eq!(count(&storage).await, 2);
    }

    /// The panic came before the first await, went past the guard, and every later write waited for ever.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_member_that_panics_before_it_begins_fails_alone_too() {
        let (_directory, storage) = storage().await;
        let queue = Arc::clone(storage.inner.queue.as_ref().unwrap());
        let panicking: Result<(), _> = queue.write(Class::Answer, |_| panic!("a bug")).await;
        assert!(panicking.is_err());
        insert(queue, "kept".to_owned()).await.unwrap();
        storage.ping().await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn whoever_waits_for_a_writer_that_is_gone_is_told_so() {
        let (_directory, storage) = storage().await;
        let queue = Arc::clone(storage.inner.queue.as_ref().unwrap());
        let held = queue.commit_gate.write().await;
        let mut waiting = Box::pin(insert(Arc::clone(&queue), "first".to_owned()));
        assert!(waiting.as_mut().now_or_never().is_none());
        let mut second = Box::pin(insert(Arc::clone(&queue), "second".to_owned()));
        assert!(second.as_mut().now_or_never().is_none());
        drop(Abandon(Arc::clone(&queue)));
        drop(held);
        assert!(waiting.await.is_ok() || second.await.is_err());
        assert!(matches!(insert(queue, "later".to_owned()).await, Err(StorageError::Unavailable { .. })));
        assert!(storage.ping().await.is_err());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_full_queue_answers_unavailable_at_once() {
        let (_directory, storage) = storage().await;
        let queue = Arc::clone(storage.inner.queue.as_ref().unwrap());
        let held = queue.commit_gate.write().await;
        let mut waiting = Vec::new();
        let refused = loop {
            let mut next = Box::pin(insert(Arc::clone(&queue), format!("t{}", waiting.len())));
            match next.as_mut().now_or_never() {
                None => waiting.push(next),
                Some(answer) => break answer,
            }
        };
        assert!(matches!(refused, Err(StorageError::Unavailable { .. })));
        assert!(waiting.len() >= WAITING);
        // The other class still has room.
        let mut other = Box::pin(queue.write(Class::Background, |_| Box::pin(async { Ok(Outcome::Commit(())) })));
        assert!(other.as_mut().now_or_never().is_none());
        drop(held);
        other.await.unwrap();
        for answer in waiting {
            answer.await.unwrap();
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn answers_go_ahead_of_background_work_but_do_not_starve_it() {
        let queue = WriteQueue::default();
        let mut waiting: Vec<BoxFuture<'_, Result<usize, StorageError>>> = Vec::new();
        for number in 0..200 {
            let class = if number < 100 { Class::Background } else { Class::Answer };
            let mut member: BoxFuture<'_, _> = Box::pin(queue.write(class, move |_| Box::pin(async move { Ok(Outcome::Commit(number)) })));
            assert!(member.as_mut().now_or_never().is_none());
            waiting.push(member);
        }
        let first = queue.next_group().await.unwrap();
        assert_eq!(first.len(), GROUP);
        let left = |queue: &WriteQueue| {
            let waiting = queue.waiting.lock();
            (waiting.answers.len(), waiting.background.len())
        };
        assert_eq!(left(&queue), (100 - (GROUP - BACKGROUND_SHARE), 100 - BACKGROUND_SHARE));
        queue.next_group().await.unwrap();
        assert_eq!(left(&queue).0, 0);
    }

    /// The database is locked by somebody else: the writer waits for it, and gives up with an answer rather than for ever.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_database_that_somebody_else_locks_answers_when_it_is_free() {
        let (directory, storage) = storage().await;
        let url = format!("sqlite://{}/test.db", directory.path().display());
        let mut other = <sqlx::AnyConnection as sqlx::Connection>::connect(&url).await.unwrap();
        sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut other).await.unwrap();
        let tenant = TenantId::new("a");
        let mut answer = Box::pin(storage.create_tenant(&tenant, Timestamp::from_millis(0)));
        for _ in 0..1000 {
            assert!(answer.as_mut().now_or_never().is_none());
            tokio::task::yield_now().await;
        }
        sqlx::raw_sql("COMMIT").execute(&mut other).await.unwrap();
        answer.await.unwrap();
        assert_eq!(count(&storage).await, 1);
    }
}
