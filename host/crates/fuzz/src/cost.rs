//! What a parser takes of a thread's time and memory for one input.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// How much an input may cost. Linear in its length, or a longer one would bring a server down.
#[derive(Debug, Clone, Copy)]
pub struct Bound {
    /// Bytes allocated at one time, whatever the length.
    pub bytes: usize,
    /// More for each byte of the input.
    pub bytes_per_byte: usize,
}

/// Far above what any input takes, even unoptimised; a loop over the input within a loop over the input exceeds it soon.
const TIME: Duration = Duration::from_millis(100);
const TIME_PER_BYTE: Duration = Duration::from_micros(5);

/// Runs `parse`.
///
/// # Panics
///
/// If it cost more than an input of that length may.
pub fn bounded<T>(bound: Bound, length: usize, parse: impl Fn() -> T) -> T {
    let limit = TIME + TIME_PER_BYTE * u32::try_from(length).unwrap_or(u32::MAX);
    let start = cpu_time();
    let (parsed, peak) = memory_of(&parse);
    let mut taken = cpu_time().saturating_sub(start);
    // The machine may have been slow for once.
    for _ in 0..2 {
        if taken > limit {
            let start = cpu_time();
            let _ = parse();
            taken = taken.min(cpu_time().saturating_sub(start));
        }
    }
    assert!(taken <= limit, "{length} bytes took {taken:?}");
    let allowed = bound.bytes + bound.bytes_per_byte * length;
    assert!(peak <= allowed, "{length} bytes took {peak} bytes of memory, more than {allowed}");
    parsed
}

/// The most that was allocated at one time while `work` ran, beyond what was before.
pub fn memory_of<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let held = HELD.get();
    let before = PEAK.replace(held);
    let done = work();
    let peak = PEAK.get();
    PEAK.set(before.max(peak));
    (done, peak.saturating_sub(held).max(0).unsigned_abs())
}

fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or_default())
}

thread_local! {
    /// By this thread, less what it gave back; what another thread allocated counts against it.
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn took(size: usize) {
    HELD.set(HELD.get().wrapping_add_unsigned(size));
    PEAK.set(PEAK.get().max(HELD.get()));
}

fn gave_back(size: usize) {
    HELD.set(HELD.get().wrapping_sub_unsigned(size));
}

/// The system's allocator, and a count beside it.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[expect(unsafe_code, reason = "an allocator is asked through unsafe functions")]
// SAFETY: every call is handed to the system's allocator as it came; the counters are plain cells without destructors, which allocate
// nothing themselves.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: the caller's promises are those that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        gave_back(layout.size());
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both exist while the content moves.
        took(size);
        gave_back(layout.size());
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}
