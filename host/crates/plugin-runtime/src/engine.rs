//! The engine that runs plugins, and its twin without a pool that compiles them in a child process.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::num::NonZeroUsize;
use std::time::Duration;

use wasmtime::component::Component;
use wasmtime::{Config, Enabled, Engine, InstanceAllocationStrategy, PoolingAllocationConfig, WasmBacktraceDetails};

use crate::effective::MAX_MEMORY;

/// How often running guests are interrupted, to be charged and to let others run.
pub const TICK: Duration = Duration::from_millis(10);

/// Recursion of a guest ends here.
const GUEST_STACK: usize = 512 << 10;
/// The fiber that a call runs on: the guest's stack, and what host functions need above it.
const FIBER_STACK: usize = 1 << 20;

/// The engine did not start.
#[derive(Debug, thiserror::Error)]
#[error("the WebAssembly engine does not start: {0}")]
pub struct EngineError(String);

impl From<wasmtime::Error> for EngineError {
    fn from(error: wasmtime::Error) -> Self {
        Self(format!("{error:#}"))
    }
}

/// The engine of all calls, with its clock. Clones share it; the clock stops with the last.
#[derive(Debug, Clone)]
pub struct Engines {
    engine: Engine,
    pooled: bool,
}

impl Engines {
    /// Starts the engine and its clock. Where the pool's address space is not to be had, instances are allocated one by one: slower, and a
    /// warning says so.
    pub fn new() -> Result<Self, EngineError> {
        let (engine, pooled) = match Engine::new(config().allocation_strategy(pool())) {
            Ok(engine) => (engine, true),
            Err(error) => {
                tracing::warn!("No pool for plugin instances, every call allocates its own memory: {error:#}");
                (compile_engine()?, false)
            }
        };
        start_clock(&engine)?;
        Ok(Self { engine, pooled })
    }

    /// The engine.
    pub const fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Whether instances come from a pool.
    pub const fn pooled(&self) -> bool {
        self.pooled
    }

    /// Compiles here, in this process: for tools and tests. The server compiles what it finds in a child process, whose memory and time are
    /// limited.
    pub fn compile(&self, component: &[u8]) -> Result<Component, wasmtime::Error> {
        Component::from_binary(&self.engine, component)
    }

    /// Makes a component of what [`Engine::precompile_component`] of a [`compile_engine`] returned.
    ///
    /// # Safety
    ///
    /// Loading the artifact is running native code. It must come from this program's own compiling child, either just now or through a cache
    /// whose entries were authenticated with a key that only this program can read.
    #[expect(unsafe_code, reason = "an artifact is native code; the caller vouches for where it comes from")]
    pub unsafe fn deserialize(&self, artifact: &[u8]) -> Result<Component, wasmtime::Error> {
        // SAFETY: by this function's own contract the bytes are an unchanged artifact of this program's compiler.
        unsafe { Component::deserialize(&self.engine, artifact) }
    }

    /// Changes whenever artifacts of another build, configuration or processor would not be accepted by this engine.
    pub fn compatibility_hash(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.engine.precompile_compatibility_hash().hash(&mut hasher);
        hasher.finish()
    }
}

/// An engine that compiles for [`Engines`], without a pool and without a clock: it never runs anything.
pub fn compile_engine() -> Result<Engine, EngineError> {
    Ok(Engine::new(&config())?)
}

/// All that decides about compiled code, the same for both. Threads, garbage collection, stack switching and asynchronous components are not
/// even built in.
fn config() -> Config {
    let mut config = Config::new();
    config
        .epoch_interruption(true)
        .max_wasm_stack(GUEST_STACK)
        .async_stack_size(FIBER_STACK)
        .memory_init_cow(true)
        .concurrency_support(false)
        .wasm_memory64(false)
        .wasm_backtrace_max_frames(NonZeroUsize::new(32))
        // Names of functions come from the name section. File and line would need DWARF, which doubles the artifacts.
        .wasm_backtrace_details(WasmBacktraceDetails::Disable);
    config
}

fn pool() -> InstanceAllocationStrategy {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(256)
        .max_component_instance_size(4 << 20)
        .max_core_instances_per_component(64)
        .max_memories_per_component(8)
        .max_tables_per_component(64)
        .total_core_instances(1024)
        .max_core_instance_size(4 << 20)
        .total_memories(512)
        .max_memory_size(MAX_MEMORY)
        .total_tables(1024)
        .table_elements(100_000)
        .total_stacks(256)
        .max_unused_warm_slots(64)
        // What a guest wrote to is found by asking the kernel, and put back; without (before Linux 6.7) the first bytes are, where Rust's
        // stack ends and nothing was written, and the rest is given back: interrupts of all processors, and a fault for each page of the
        // next call.
        .pagemap_scan(Enabled::Auto)
        .linear_memory_keep_resident(256 << 10)
        .table_keep_resident(16 << 10);
    InstanceAllocationStrategy::Pooling(pool)
}

/// A thread of the operating system, not a task: a worker that a guest holds must not stop the clock that interrupts the guest.
fn start_clock(engine: &Engine) -> Result<(), EngineError> {
    let engine = engine.weak();
    std::thread::Builder::new()
        .name(String::from("plugin-epoch"))
        .spawn(move || {
            while let Some(engine) = engine.upgrade() {
                engine.increment_epoch();
                drop(engine);
                std::thread::park_timeout(TICK);
            }
        })
        .map(drop)
        .map_err(|error| EngineError(format!("no thread for the clock: {error}")))
}
