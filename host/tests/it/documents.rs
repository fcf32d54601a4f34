//! What the documents say of tests is true.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The rows of a table in which each number from 1 to `last` stands in the first cell of one, and in the last cell the names of tests.
fn check_table(document: &str, last: u32, sources: &str) {
    let mut missing = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    for row in document.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").collect();
        if !cells[0].trim().starts_with(|first: char| first.is_ascii_digit()) {
            continue;
        }
        for part in cells[0].split(',') {
            let mut ends = part.trim().split('–').map(|number| number.trim().parse::<u32>().unwrap());
            let first = ends.next().unwrap();
            numbers.extend(first..=ends.next().unwrap_or(first));
        }
        for name in cells.last().unwrap().split('`').filter(|name| name.contains('_') && !name.contains(' ')) {
            if !sources.contains(&format!("fn {name}(")) {
                missing.insert(name);
            }
        }
    }
    assert_eq!(numbers, (1..=last).collect(), "each number stands in the table");
    assert!(missing.is_empty(), "there are no such tests: {missing:#?}");
}

#[test]
fn every_test_that_the_tables_of_mistakes_name_is_there() {
    let host = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for folder in ["src", "tests/it", "crates"] {
        rust_files(&host.join(folder), &mut files);
    }
    let sources: String = files.iter().map(|file| std::fs::read_to_string(file).unwrap()).collect();
    let document = |name: &str| std::fs::read_to_string(host.join("../docs").join(name)).unwrap();
    check_table(&document("edge-cases.md"), 68, &sources);
    check_table(&document("nanomdm.md"), 22, &sources);
}

/// README's first command is `cargo run -- demo`: cargo must know which program that is.
#[test]
fn cargo_run_means_the_server() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let output =
        std::process::Command::new(env!("CARGO")).args(["metadata", "--no-deps", "--offline", "--format-version", "1"]).current_dir(root).output();
    let metadata: serde_json::Value = serde_json::from_slice(&output.unwrap().stdout).unwrap();
    let members = metadata["workspace_default_members"].as_array().unwrap();
    let packages = metadata["packages"].as_array().unwrap().iter().filter(|package| members.contains(&package["id"]));
    let targets = packages.flat_map(|package| package["targets"].as_array().unwrap());
    let programs: Vec<_> = targets.filter(|target| target["kind"][0] == "bin").map(|target| target["name"].as_str().unwrap()).collect();
    assert_eq!(programs, ["wasmdm"]);
}
