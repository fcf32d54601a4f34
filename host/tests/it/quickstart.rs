//! What a newcomer does with examples/quickstart: copy it, build it with the one command of its README, check it, drop it in.

use std::path::Path;
use std::process::Command;

use http::StatusCode;
use wasmdm_simulator::{Authority, Connection, Device};

use crate::plugins::{is_active, until};
use crate::process::{Home, install, run};

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name() == "target" {
            continue;
        }
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[tokio::test]
async fn copied_out_of_the_repository_it_builds_passes_the_check_and_decides_in_a_server() {
    let elsewhere = tempfile::tempdir().unwrap();
    let copied = elsewhere.path().join("minimum-os");
    copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/quickstart"), &copied);
    let readme = std::fs::read_to_string(copied.join("README.md")).unwrap();
    assert!(readme.contains("cargo build --release"), "the README's one command");
    let mut build = Command::new("cargo");
    build.args(["build", "--release"]).current_dir(&copied);
    for variable in ["CARGO_ENCODED_RUSTFLAGS", "RUSTFLAGS", "CARGO_TARGET_DIR"] {
        build.env_remove(variable);
    }
    let output = build.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let manifest = std::fs::read_to_string(copied.join("plugin.toml")).unwrap();
    let built = walk(&copied.join("target/wasm32-wasip2/release"));
    let (code, report, error) = run(&["plugin", "check", &built.to_string_lossy()]);
    assert_eq!(code, 0, "{report}{error}");
    assert!(report.contains("enrollment-policy"), "{report}");

    let authority = Authority::new(81).unwrap();
    let home = Home::new(&authority.root_pem());
    let name = manifest.lines().find_map(|line| line.strip_prefix("name = ")).unwrap().trim_matches('"').to_owned();
    let grant = |minimum: &str| {
        let path = home.grants().join(format!("{name}.toml"));
        std::fs::write(path, format!("enabled = true\n[config]\nminimum_os = \"{minimum}\"\n")).unwrap();
    };
    grant("99.0");
    install(&home.plugins(), &name, &manifest, &std::fs::read(built).unwrap());
    let server = home.start();
    let status = until(&server, &name, is_active).await;
    let mut device = Device::new(&authority, 1).unwrap();
    let mut connection = Connection::to(&server.url()).unwrap();
    let authenticate = device.authenticate().unwrap();
    let refused = device.send(&mut connection, authenticate.clone()).await.unwrap();
    assert_eq!(refused.status, StatusCode::FORBIDDEN, "{}", refused.excerpt());
    grant("1.0");
    until(&server, &name, |now| now["generation"] != status["generation"]).await;
    assert_eq!(device.send(&mut connection, authenticate).await.unwrap().status, StatusCode::OK);
}

fn walk(folder: &Path) -> std::path::PathBuf {
    std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|extension| extension == "wasm"))
        .unwrap()
}
