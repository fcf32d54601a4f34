use std::collections::BTreeMap;
use std::path::Path;

fn wit_files(folder: &Path) -> BTreeMap<String, String> {
    std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "wit"))
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, std::fs::read_to_string(path).unwrap())
        })
        .collect()
}

// `path: "../../wit"` would not survive packaging, so the SDK has a copy.
#[test]
fn the_copy_of_the_contract_is_the_contract() {
    let sdk = Path::new(env!("CARGO_MANIFEST_DIR"));
    let contract = wit_files(&sdk.join("../../wit"));
    assert!(!contract.is_empty());
    assert_eq!(wit_files(&sdk.join("wit")), contract, "copy wit/*.wit to sdk/rust/wit");
}

// The example is copied out of the repository, and has its own for the same reason.
#[test]
fn the_copy_of_the_example_is_the_contract() {
    let sdk = Path::new(env!("CARGO_MANIFEST_DIR"));
    let example = wit_files(&sdk.join("../../examples/quickstart/wit"));
    assert_eq!(example, wit_files(&sdk.join("../../wit")), "copy wit/*.wit to examples/quickstart/wit");
}
