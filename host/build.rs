//! Builds the plugins that `wasmdm demo` carries, from their sources in this repository, so that an installed `wasmdm` needs no
//! toolchain to show them.

#![expect(clippy::expect_used, clippy::panic, reason = "a build that cannot go on says why and ends")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const PLUGINS: [&str; 3] = ["serial-allow-list", "enrollment-baseline", "chat-notify"];

/// What plugins are built for; rust-toolchain.toml names it too.
const GUEST: &str = "wasm32-wasip2";

fn main() {
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    let root = Path::new(&env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR")).join("..");
    for source in ["plugins", "sdk/rust", "wit", "Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", root.join(source).display());
    }
    // One target directory for all profiles of the server, apart from its own: that one is locked by the cargo that runs this.
    let target = out.ancestors().nth(4).expect("OUT_DIR lies in a target directory").join("plugins");
    add_guest_target(&root);
    let mut cargo = Command::new(env::var("CARGO").expect("cargo sets CARGO"));
    cargo.current_dir(&root).args(["build", "--quiet", "--profile", "plugin", "--target", GUEST, "--target-dir"]).arg(&target);
    for plugin in PLUGINS {
        cargo.args(["--package", plugin]);
    }
    // What is meant for the server's own target does not fit a guest.
    for variable in ["CARGO_ENCODED_RUSTFLAGS", "RUSTFLAGS", "CARGO_BUILD_RUSTFLAGS", "RUSTC_WORKSPACE_WRAPPER", "CARGO_BUILD_TARGET"] {
        cargo.env_remove(variable);
    }
    let status = cargo.status().expect("cargo starts");
    assert!(status.success(), "the plugins could not be built: is the target there? rustup target add {GUEST}");
    for plugin in PLUGINS {
        let built = target.join(GUEST).join("plugin").join(format!("{}.wasm", plugin.replace('-', "_")));
        fs::copy(&built, out.join(format!("{plugin}.wasm"))).unwrap_or_else(|error| panic!("{}: {error}", built.display()));
    }
}

/// rustup adds the target by itself only to a toolchain that it installs, so on a machine that has the toolchain already it may be missing.
fn add_guest_target(root: &Path) {
    let rustc = env::var("RUSTC").expect("cargo sets RUSTC");
    let library = Command::new(rustc).args(["--print", "target-libdir", "--target", GUEST]).output();
    let is_there = library.is_ok_and(|output| Path::new(String::from_utf8_lossy(&output.stdout).trim()).is_dir());
    if !is_there {
        // Without rustup, or without a network, the build of the plugins says what is missing.
        drop(Command::new("rustup").current_dir(root).args(["target", "add", GUEST]).status());
    }
}
