//! The committed corpus is the maker's.

use std::collections::BTreeSet;

use wasmdm_fuzz::{Target, corpus, corpus_folder};

#[test]
fn the_corpus_is_what_the_simulators_devices_send() {
    const REMEDY: &str = "run `cargo run -p wasmdm-fuzz -- corpus`";
    let seeds = corpus::make().unwrap();
    let mut committed = BTreeSet::new();
    for target in Target::ALL {
        for file in std::fs::read_dir(corpus_folder(target)).unwrap() {
            committed.insert((target.name(), file.unwrap().file_name().into_string().unwrap()));
        }
    }
    let made: BTreeSet<_> = seeds.iter().map(|seed| (seed.target.name(), seed.name.clone())).collect();
    assert_eq!(committed, made, "{REMEDY}");
    for seed in &seeds {
        let path = corpus_folder(seed.target).join(&seed.name);
        let bytes = std::fs::read(&path).unwrap();
        if seed.reproducible {
            assert!(bytes == seed.bytes, "{}: {REMEDY}", path.display());
        }
        assert_eq!(seed.target.check(&bytes), seed.target.check(&seed.bytes), "{}: {REMEDY}", path.display());
    }
}
