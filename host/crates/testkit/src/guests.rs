//! Guests built from source, once per process and cached by cargo.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Builds `guests/NAME` and answers the component's bytes.
///
/// # Panics
/// When the guest does not build: a test cannot go on without it.
#[expect(clippy::panic, reason = "a test cannot go on without its guest")]
pub fn build(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("guests").join(name);
    let target: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../target/guests");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(&folder).args(["build", "--quiet", "--release", "--target", "wasm32-wasip2", "--target-dir"]).arg(&target);
    for variable in ["CARGO_ENCODED_RUSTFLAGS", "RUSTFLAGS", "RUSTC_WORKSPACE_WRAPPER"] {
        cargo.env_remove(variable);
    }
    match cargo.output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => panic!("guest {name} does not build: {}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => panic!("cargo does not start: {error}"),
    }
    let built = target.join("wasm32-wasip2/release").join(format!("{}.wasm", name.replace('-', "_")));
    std::fs::read(&built).unwrap_or_else(|error| panic!("{}: {error}", built.display()))
}
