//! Plugins for tests, built from source.

use std::path::{Path, PathBuf};
use std::process::Command;

use parking_lot::Mutex;

/// One build at a time in a process; between processes cargo's own lock does the same.
static BUILDING: Mutex<()> = Mutex::new(());

/// Builds the guest in `host/crates/testkit/guests/NAME` and answers its component. Built once: later calls find it fresh.
///
/// # Panics
///
/// When it does not build: a test cannot go on without it.
#[expect(clippy::panic, reason = "only tests call this, and a test ends here")]
pub fn build(name: &str) -> Vec<u8> {
    let path = component(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{} was built but cannot be read: {error}", path.display()))
}

/// Builds the guest like [`build`] and answers where its component is.
///
/// # Panics
///
/// When it does not build.
#[expect(clippy::expect_used, reason = "only tests call this, and a test ends here")]
pub fn component(name: &str) -> PathBuf {
    let _building = BUILDING.lock();
    let guests = Path::new(env!("CARGO_MANIFEST_DIR")).join("guests");
    let target = target_directory();
    let built = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--release", "--quiet", "--locked", "--target", "wasm32-wasip2", "--package", name])
        .arg("--target-dir")
        .arg(&target)
        .current_dir(&guests)
        // Flags of an instrumented build of the server (coverage, sanitizers) mean nothing to a guest.
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .output()
        .expect("cargo runs");
    assert!(built.status.success(), "guest {name} does not build:\n{}", String::from_utf8_lossy(&built.stderr));
    target.join("wasm32-wasip2/release").join(format!("{}.wasm", name.replace('-', "_")))
}

/// Beside what the server is built into, so that cleaning takes both.
fn target_directory() -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(3).unwrap_or_else(|| Path::new("."));
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), PathBuf::from).join("guests")
}
