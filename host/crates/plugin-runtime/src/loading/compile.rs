//! Compiling in a child process, and keeping what it made.
//!
//! A component can be written so that compiling it takes for ever or eats all memory. The child dies of that; the server does not.
//! The artifact is native code: it comes from the child just now, or from the cache, whose entries carry a code that only this server can make.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use aws_lc_rs::hmac;
use aws_lc_rs::rand;
use bytes::Bytes;
use rustix::process::{Resource, Rlimit, setrlimit};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use tokio::sync::Semaphore;
use tracing::warn;
use wasmtime::component::Component;

use crate::engine::{Engines, compile_engine};
use crate::plugin::explain_compile_error;

use super::candidate::{MAX_COMPONENT, Rejection, Stage};
use super::files::{make_private_dir, read_bounded, write_whole};

/// Processor time of a compilation, over all its threads.
const CPU_SECONDS: u64 = 90;
/// Address space of the compiling process. Reservations count; the compiling engine makes none.
const ADDRESS_SPACE: u64 = 1_536 << 20;
/// The child's own limit is processor time; this one is for a child that sleeps.
const WALL: Duration = Duration::from_mins(3);
/// Largest artifact. A component of 18 MB becomes 39 MB.
const MAX_ARTIFACT: u64 = 512 << 20;
/// What of the child's error text is kept.
const MAX_ERROR: u64 = 16 * 1024;
/// Compilations at once, each with several threads.
const AT_ONCE: usize = 2;
/// Threads of one compilation.
const MAX_THREADS: usize = 4;
/// Artifacts kept; of more the oldest go.
const MAX_ENTRIES: usize = 64;
/// The child says with this that the component is at fault; its error text says why.
const COMPONENT_AT_FAULT: u8 = 2;

const TAG_LENGTH: usize = 32;

/// How to start the process that compiles: it must call [`compile_child_main`].
#[derive(Debug, Clone)]
pub struct CompilerCommand {
    pub program: PathBuf,
    pub args: Vec<OsString>,
}

/// The compiling process: a component on standard input becomes an artifact on standard output. Exit code 0, or the reason on standard error.
///
/// It first limits itself to 90 s of processor time and 1.5 GiB of address space.
pub fn compile_child_main() -> ExitCode {
    match limit_itself().and_then(|()| compile_stdin()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(ChildError::Component(problem)) => {
            // Nobody reads a complaint about standard error.
            drop(writeln!(io::stderr(), "{problem}"));
            ExitCode::from(COMPONENT_AT_FAULT)
        }
        Err(ChildError::Io(error)) => {
            drop(writeln!(io::stderr(), "{error}"));
            ExitCode::FAILURE
        }
    }
}

enum ChildError {
    Component(String),
    Io(io::Error),
}

impl From<io::Error> for ChildError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn limit_itself() -> Result<(), ChildError> {
    let limit = |resource, value| setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) }).map_err(io::Error::from);
    limit(Resource::Cpu, CPU_SECONDS)?;
    limit(Resource::As, ADDRESS_SPACE)?;
    limit(Resource::Core, 0)?;
    // Devices are served meanwhile. Without the right to be nice it is merely less polite.
    let _ = rustix::process::nice(5);
    Ok(())
}

fn compile_stdin() -> Result<(), ChildError> {
    let mut wasm = Vec::new();
    io::stdin().lock().take(MAX_COMPONENT + 1).read_to_end(&mut wasm)?;
    let engine = compile_engine().map_err(|error| ChildError::Io(io::Error::other(error.to_string())))?;
    let artifact = engine.precompile_component(&wasm).map_err(|error| ChildError::Component(format!("{error:#}")))?;
    let mut stdout = io::stdout().lock();
    stdout.write_all(&artifact)?;
    stdout.flush()?;
    Ok(())
}

/// Compiles components, through the cache.
#[derive(Debug)]
pub(super) struct Compiler {
    command: CompilerCommand,
    cache: Cache,
    at_once: Semaphore,
    started: AtomicU64,
}

impl Compiler {
    /// `data_dir` gets the cache and, apart from it, its key.
    pub(super) fn new(command: CompilerCommand, data_dir: &Path, engines: &Engines) -> io::Result<Self> {
        let cache = Cache::open(data_dir, engines.compatibility_hash())?;
        Ok(Self { command, cache, at_once: Semaphore::new(AT_ONCE), started: AtomicU64::new(0) })
    }

    /// How many compiling processes were started.
    pub(super) fn started(&self) -> u64 {
        self.started.load(Ordering::Relaxed)
    }

    /// The component of these bytes, whose SHA-256 is `digest`.
    pub(super) async fn component(&self, engines: &Engines, digest: &str, wasm: &Bytes) -> Result<Component, Rejection> {
        let broken = |problem: String| Rejection::transient(Stage::Compiled, problem);
        if let Some(component) = self.cached(engines, digest).await {
            return Ok(component);
        }
        let artifact = {
            let _permit = self.at_once.acquire().await.map_err(|error| broken(error.to_string()))?;
            self.compile(wasm).await?
        };
        let (cache, digest) = (self.cache.clone(), digest.to_owned());
        let engines = engines.clone();
        blocking(move || {
            if let Err(error) = cache.store(&digest, &artifact) {
                warn!("The compiled plugin {digest} is not kept: {error}");
            }
            deserialize(&engines, &artifact)
        })
        .await
        .and_then(|component| component)
        .map_err(broken)
    }

    async fn cached(&self, engines: &Engines, digest: &str) -> Option<Component> {
        let (cache, digest, engines) = (self.cache.clone(), digest.to_owned(), engines.clone());
        blocking(move || {
            let artifact = cache.load(&digest)?;
            // An artifact of another build is replaced, no more.
            deserialize(&engines, &artifact).inspect_err(|problem| warn!("The compiled plugin {digest} is made anew: {problem}")).ok()
        })
        .await
        .ok()
        .flatten()
    }

    /// Runs the child. It is killed when this future is dropped.
    async fn compile(&self, wasm: &Bytes) -> Result<Vec<u8>, Rejection> {
        let broken = |problem: String| Rejection::transient(Stage::Compiled, format!("the compiling process does not work: {problem}"));
        self.started.fetch_add(1, Ordering::Relaxed);
        metrics::counter!("wasmdm_plugin_compilations_total").increment(1);
        let mut child = Command::new(&self.command.program)
            .args(&self.command.args)
            .env_clear()
            // A thread reserves address space, and a large machine would make hundreds.
            .env("RAYON_NUM_THREADS", threads().to_string())
            .env("MALLOC_ARENA_MAX", "2")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| broken(format!("{} does not start: {error}", self.command.program.display())))?;
        let (Some(mut stdin), Some(stdout), Some(stderr)) = (child.stdin.take(), child.stdout.take(), child.stderr.take()) else {
            return Err(broken("it has no pipes".to_owned()));
        };
        let wasm = wasm.clone();
        let feed = async move {
            // A child that ends early closes the pipe; its exit code says why.
            drop(stdin.write_all(&wasm).await);
            drop(stdin);
        };
        let (mut artifact, mut complaint) = (Vec::new(), Vec::new());
        let read_artifact = async { stdout.take(MAX_ARTIFACT + 1).read_to_end(&mut artifact).await };
        let read_complaint = async {
            let mut stderr = stderr.take(MAX_ERROR);
            stderr.read_to_end(&mut complaint).await?;
            // Above the limit it is drained, or the child would wait for a reader.
            tokio::io::copy(stderr.get_mut(), &mut tokio::io::sink()).await.map(drop)
        };
        let whole = async {
            let ((), read, complained) = tokio::join!(feed, read_artifact, read_complaint);
            read.map(drop).and(complained)?;
            child.wait().await
        };
        let status = match tokio::time::timeout(WALL, whole).await {
            Err(_) => return Err(Rejection::new(Stage::Compiled, format!("compiling took longer than {} s", WALL.as_secs()))),
            Ok(Err(error)) => return Err(broken(error.to_string())),
            Ok(Ok(status)) => status,
        };
        if status.success() && artifact.len() as u64 <= MAX_ARTIFACT && !artifact.is_empty() {
            return Ok(artifact);
        }
        let complaint = String::from_utf8_lossy(&complaint);
        let complaint = complaint.trim();
        if status.code() == Some(i32::from(COMPONENT_AT_FAULT)) {
            return Err(Rejection::new(
                Stage::Compiled,
                format!("it is not a component that this server can run: {}", explain_compile_error(complaint)),
            ));
        }
        Err(died(status, complaint))
    }
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS)
}

/// Why a child that said nothing about the component is gone.
fn died(status: std::process::ExitStatus, complaint: &str) -> Rejection {
    use std::os::unix::process::ExitStatusExt as _;
    let limits = format!("compiling it needs more than {CPU_SECONDS} s of processor time or {} MiB of memory", ADDRESS_SPACE >> 20);
    match status.signal() {
        // SIGXCPU and the SIGKILL after it; SIGABRT when an allocation failed; SIGSEGV when a stack overflowed.
        Some(24 | 9 | 6 | 11) => Rejection::new(Stage::Compiled, limits),
        _ if complaint.contains("memory") => Rejection::new(Stage::Compiled, limits),
        _ => Rejection::transient(Stage::Compiled, format!("the compiling process ended with {status}: {complaint}")),
    }
}

#[expect(unsafe_code, reason = "loading an artifact is running native code")]
fn deserialize(engines: &Engines, artifact: &[u8]) -> Result<Component, String> {
    // SAFETY: the only callers are `component`, with what this program's own compiling child just wrote, and `cached`, with bytes whose
    // authentication code was checked after they were read into memory.
    unsafe { engines.deserialize(artifact) }.map_err(|error| format!("{error:#}"))
}

/// Runs blocking work apart from the requests.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|error| error.to_string())
}

/// Artifacts by the digest of their component.
#[derive(Debug, Clone)]
struct Cache {
    directory: PathBuf,
    key: hmac::Key,
    compatibility: u64,
}

impl Cache {
    fn open(data_dir: &Path, compatibility: u64) -> io::Result<Self> {
        let directory = data_dir.join("plugin-cache");
        make_private_dir(&directory)?;
        Ok(Self { directory, key: hmac::Key::new(hmac::HMAC_SHA256, &secret_key(data_dir)?), compatibility })
    }

    fn path(&self, digest: &str) -> PathBuf {
        self.directory.join(format!("{digest}-{:016x}", self.compatibility))
    }

    /// Binds an artifact to its component and engine, so that entries cannot change places.
    fn tag(&self, digest: &str, artifact: &[u8]) -> hmac::Tag {
        let mut context = hmac::Context::with_key(&self.key);
        context.update(b"wasmdm compiled plugin 1\0");
        context.update(digest.as_bytes());
        context.update(&self.compatibility.to_le_bytes());
        context.update(artifact);
        context.sign()
    }

    /// The artifact, if there is one that this server wrote. It is read once; the checked bytes are the answer.
    fn load(&self, digest: &str) -> Option<Bytes> {
        let path = self.path(digest);
        if !path.try_exists().unwrap_or(false) {
            return None;
        }
        let entry = Bytes::from(read_bounded(&path, MAX_ARTIFACT + TAG_LENGTH as u64).ok()?.bytes);
        let (tag, artifact) = entry.split_at_checked(TAG_LENGTH)?;
        if aws_lc_rs::constant_time::verify_slices_are_equal(tag, self.tag(digest, artifact).as_ref()).is_err() {
            warn!("The entry {digest} of the plugin cache was not written by this server, or has changed: it is not used");
            metrics::counter!("wasmdm_plugin_cache_refused_total").increment(1);
            drop(fs::remove_file(&path));
            return None;
        }
        Some(entry.slice(TAG_LENGTH..))
    }

    fn store(&self, digest: &str, artifact: &[u8]) -> io::Result<()> {
        write_whole(&self.path(digest), &[self.tag(digest, artifact).as_ref(), artifact], false)?;
        self.prune()
    }

    fn prune(&self) -> io::Result<()> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            entries.push((entry.metadata()?.modified()?, entry.path()));
        }
        entries.sort();
        let superfluous = entries.len().saturating_sub(MAX_ENTRIES);
        for (_, path) in entries.into_iter().take(superfluous) {
            fs::remove_file(path)?;
        }
        Ok(())
    }
}

/// The key of the cache, made at the first start. Apart from the cache, so that a copy of one does not bring the other.
fn secret_key(data_dir: &Path) -> io::Result<Vec<u8>> {
    let path = data_dir.join("plugin-cache.key");
    match read_bounded(&path, 1024) {
        Ok(content) if content.bytes.len() == 32 && !content.readable_by_all => return Ok(content.bytes),
        // Made anew: all entries are compiled again, no more.
        Ok(_) => warn!("{} is not as this server wrote it: it is made anew, and plugins are compiled again", path.display()),
        Err(_) => {}
    }
    let mut key = vec![0; 32];
    rand::fill(&mut key).map_err(|_| io::Error::other("no randomness is to be had"))?;
    write_whole(&path, &[&key], true)?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn entry(cache: &Cache, digest: &str) -> PathBuf {
        cache.path(digest)
    }

    #[test]
    fn an_entry_comes_back_only_as_it_was_written_and_in_its_place() {
        let data = tempfile::tempdir().unwrap();
        let cache = Cache::open(data.path(), 1).unwrap();
        cache.store("aa", b"artifact").unwrap();
        assert_eq!(cache.load("aa").unwrap(), b"artifact"[..]);
        assert_eq!(Cache::open(data.path(), 1).unwrap().load("aa").unwrap(), b"artifact"[..], "the key outlives a restart");
        assert!(Cache::open(data.path(), 2).unwrap().load("aa").is_none(), "another engine, another entry");

        fs::copy(entry(&cache, "aa"), entry(&cache, "bb")).unwrap();
        assert!(cache.load("bb").is_none(), "an entry in another's place");

        let mut bytes = fs::read(entry(&cache, "aa")).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(entry(&cache, "aa"), bytes).unwrap();
        assert!(cache.load("aa").is_none(), "a flipped bit");
        assert!(!entry(&cache, "aa").exists());
        fs::write(entry(&cache, "aa"), b"short").unwrap();
        assert!(cache.load("aa").is_none());
    }

    #[test]
    fn cache_and_key_are_private_and_apart() {
        let data = tempfile::tempdir().unwrap();
        let cache = Cache::open(data.path(), 1).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&cache.directory), 0o700);
        assert_eq!(mode(&data.path().join("plugin-cache.key")), 0o600);
    }

    #[test]
    fn the_oldest_entries_go() {
        let data = tempfile::tempdir().unwrap();
        let cache = Cache::open(data.path(), 1).unwrap();
        for number in 0..MAX_ENTRIES + 5 {
            cache.store(&format!("{number:03}"), b"x").unwrap();
        }
        assert_eq!(fs::read_dir(&cache.directory).unwrap().count(), MAX_ENTRIES);
    }
}
