//! One target under libFuzzer, chosen by `WASMDM_FUZZ_TARGET`. `host/ci/fuzz` builds it with counters of what was executed and runs it.

#![no_main]
#![expect(clippy::panic, reason = "without its target and its corpus it cannot begin")]

use std::collections::HashSet;
use std::io::Write as _;
use std::sync::{LazyLock, Mutex};

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use wasmdm_fuzz::{Target, mutation};

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("WASMDM_FUZZ_TARGET").unwrap_or_default();
    Target::from_name(&name).unwrap_or_else(|| panic!("WASMDM_FUZZ_TARGET: there is no target `{name}`"))
});
static OUTCOMES: LazyLock<Mutex<HashSet<String>>> = LazyLock::new(Mutex::default);
/// What inputs are changed with parts of.
static SEEDS: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let folder = wasmdm_fuzz::corpus_folder(*TARGET);
    let files = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    files.filter_map(|file| std::fs::read(file.ok()?.path()).ok()).collect()
});

fuzz_target!(
    init: { install_signal_stack(); },
    |input: &[u8]| {
        let outcome = TARGET.check(input);
        let mut outcomes = OUTCOMES.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !outcomes.contains(&outcome) {
            note(&outcome);
            outcomes.insert(outcome);
        }
    }
);

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    // libFuzzer's own changes follow comparisons that were seen to fail; ours keep the form.
    if seed % 2 == 0 {
        return fuzzer_mutate(data, size, max_size);
    }
    let other = SEEDS.get(seed as usize / 2 % SEEDS.len().max(1)).map(Vec::as_slice).unwrap_or_default();
    let changed = mutation::mutate(*TARGET, data.get(..size).unwrap_or_default(), other, seed.into());
    let length = changed.len().min(max_size).min(data.len());
    if let (Some(place), Some(changed)) = (data.get_mut(..length), changed.get(..length)) {
        place.copy_from_slice(changed);
    }
    length
});

/// Appends to the file named by `WASMDM_FUZZ_OUTCOMES`: the process may end at any time.
fn note(outcome: &str) {
    let Ok(path) = std::env::var("WASMDM_FUZZ_OUTCOMES") else { return };
    if let Ok(mut file) = std::fs::OpenOptions::new().append(true).create(true).open(path) {
        let _ = writeln!(file, "{outcome}");
    }
}

/// libFuzzer says which input it was when the stack overflows; it needs another stack to say it on, which Rust's own `main` would have made.
fn install_signal_stack() {
    const SIZE: usize = 1 << 20;
    let stack = Box::leak(vec![0_u8; SIZE].into_boxed_slice());
    let stack = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: SIZE };
    #[expect(unsafe_code, reason = "there is no safe function for it")]
    // SAFETY: the memory is never given back, and nothing but the kernel uses it.
    let done = unsafe { libc::sigaltstack(&raw const stack, std::ptr::null_mut()) };
    assert_eq!(done, 0, "sigaltstack failed");
}
