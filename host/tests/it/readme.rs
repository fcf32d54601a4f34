//! The tour of the README, command for command as it stands there.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};

/// The shell blocks of "Five minutes", in their order.
fn tour(readme: &str) -> Vec<&str> {
    let (_, section) = readme.split_once("\n## Five minutes\n").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    section.split("```sh\n").skip(1).map(|block| block.split_once("```").unwrap().0).collect()
}

#[test]
fn the_tour_of_the_readme_works_when_it_is_pasted_into_a_shell() {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let readme = std::fs::read_to_string(repository.join("README.md")).unwrap();
    let blocks = tour(&readme);
    assert!(blocks.len() >= 4, "{blocks:#?}");

    let elsewhere = tempfile::tempdir().unwrap();
    let home = elsewhere.path().join("checkout");
    std::fs::create_dir(&home).unwrap();
    std::os::unix::fs::symlink(repository.join("examples"), home.join("examples")).unwrap();
    // Another test, or a developer's own server, may have 9000.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    // What a reader's own pace does: the server listens before the next block is pasted.
    let listening = format!("curl -sf --retry 100 --retry-delay 1 --retry-connrefused http://127.0.0.1:{port}/healthz >/dev/null\n");
    let mut script = "set -euxo pipefail\ntrap 'kill $(jobs -p)' EXIT\n".to_owned();
    for block in &blocks {
        script.push_str(block);
        if block.contains("wasmdm serve") {
            script.push_str(&listening);
        }
    }
    let minimum_os = elsewhere.path().join("minimum-os");
    let script = script.replace("127.0.0.1:9000", &format!("127.0.0.1:{port}")).replace("/tmp/minimum-os", &minimum_os.to_string_lossy());
    // Built already, or this would not run.
    let built = script.replace("\ncargo build\n", "\n");
    assert_ne!(built, script, "the tour begins with a build");

    let programs = Path::new(env!("CARGO_BIN_EXE_wasmdm")).parent().unwrap();
    let mut shell = Command::new("bash");
    shell.arg("-c").arg(&built).current_dir(&home).stdin(Stdio::null());
    shell.env("PATH", format!("{}:{}", programs.display(), std::env::var("PATH").unwrap()));
    for variable in ["CARGO_ENCODED_RUSTFLAGS", "RUSTFLAGS", "CARGO_TARGET_DIR"] {
        shell.env_remove(variable);
    }
    let output = shell.output().unwrap();
    let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{error}");
    assert!(out.contains("enrollment-policy"), "plugin check names the hook: {out}");
    assert!(error.contains("A device was refused"), "the last command was about the policy: {error}");
}
