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

/// A row of a table: the numbers in its first cell, the names of tests in its last.
struct Row<'a> {
    numbers: Vec<u32>,
    tests: Vec<&'a str>,
}

fn rows(document: &str) -> Vec<Row<'_>> {
    let mut rows = Vec::new();
    for row in document.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").collect();
        if !cells[0].trim().starts_with(|first: char| first.is_ascii_digit()) {
            continue;
        }
        let mut numbers = Vec::new();
        for part in cells[0].split(',') {
            let mut ends = part.trim().split('–').map(|number| number.trim().parse::<u32>().unwrap());
            let first = ends.next().unwrap();
            numbers.extend(first..=ends.next().unwrap_or(first));
        }
        let tests = cells.last().unwrap().split('`').filter(|name| name.contains('_') && !name.contains(' ')).collect();
        rows.push(Row { numbers, tests });
    }
    rows
}

fn sources() -> String {
    let host = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for folder in ["src", "tests/it", "crates", "../plugins", "../sdk/rust"] {
        rust_files(&host.join(folder), &mut files);
    }
    files.iter().map(|file| std::fs::read_to_string(file).unwrap()).collect()
}

fn document(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name)).unwrap()
}

/// The comment above the function of that name, `None` where there is no such function.
fn comment_of(sources: &str, name: &str) -> Option<String> {
    let start = sources.find(&format!("fn {name}("))?;
    let before = sources[..start].rsplit_once('\n').map_or("", |(before, _)| before);
    let above = before.lines().rev().take_while(|line| line.trim_start().starts_with("///") || line.trim_start().starts_with("#["));
    Some(above.filter_map(|line| line.trim_start().strip_prefix("///")).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n"))
}

/// The numbers behind a word in comments: `Edge case 4.`, `Edge cases 16 and 17:`.
fn numbers_behind(word: &str, comments: &str) -> BTreeSet<u32> {
    let mut found = BTreeSet::new();
    for rest in comments.split(word).skip(1) {
        let rest = rest.strip_prefix('s').unwrap_or(rest);
        let list = rest.split(|other: char| !(other.is_ascii_digit() || " ,and–".contains(other))).next().unwrap_or_default();
        found.extend(list.split(|other: char| !other.is_ascii_digit()).filter_map(|number| number.parse::<u32>().ok()));
    }
    found
}

/// Each number from 1 to `last` stands in one row, the tests of each row exist, and say which number they are about.
fn check_table(document: &str, last: u32, sources: &str, word: &str) {
    let rows = rows(document);
    let numbers: BTreeSet<u32> = rows.iter().flat_map(|row| row.numbers.iter().copied()).collect();
    assert_eq!(numbers, (1..=last).collect(), "each number stands in the table");
    let mut wrong = BTreeSet::new();
    for row in &rows {
        for name in &row.tests {
            match comment_of(sources, name) {
                None => {
                    wrong.insert(format!("there is no test {name}"));
                }
                Some(comment) => {
                    let said = numbers_behind(word, &comment);
                    if word == EDGE_CASE && !row.numbers.iter().any(|number| said.contains(number)) {
                        wrong.insert(format!("the comment of {name} does not say `{word} {}`", row.numbers[0]));
                    }
                }
            }
        }
    }
    let comments: String = sources.lines().filter(|line| line.trim_start().starts_with("//")).fold(String::new(), |all, line| all + line + "\n");
    wrong.extend(numbers_behind(word, &comments).difference(&numbers).map(|number| format!("`{word} {number}` stands in a comment and in no table")));
    assert!(wrong.is_empty(), "{wrong:#?}");
}

const EDGE_CASE: &str = "Edge case";
const DEFECT: &str = "NanoMDM defect";

/// Edge cases have a test or a reason, and the tests say which case they are.
#[test]
fn every_test_that_the_tables_of_mistakes_name_is_there() {
    let sources = sources();
    check_table(&document("edge-cases.md"), 68, &sources, EDGE_CASE);
    check_table(&document("nanomdm.md"), 22, &sources, DEFECT);
}

#[test]
fn every_defect_of_nanomdm_has_a_test_that_tells_its_story() {
    let (document, sources) = (document("nanomdm.md"), sources());
    let mut told: BTreeSet<u32> = BTreeSet::new();
    for row in rows(&document) {
        for test in &row.tests {
            told.extend(numbers_behind(DEFECT, &comment_of(&sources, test).unwrap_or_default()).intersection(&row.numbers.iter().copied().collect()));
        }
    }
    let untold: Vec<u32> = (1..=22).filter(|number| !told.contains(number)).collect();
    assert!(untold.is_empty(), "{untold:?}: of each defect a test that the table names carries `{DEFECT} N` in its comment");
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
