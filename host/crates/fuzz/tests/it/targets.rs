//! Each target, bounded and repeatable. `host/ci/fuzz` looks for longer, and with coverage as its guide.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use wasmdm_fuzz::{Target, corpus, corpus_folder, mutation};

/// Of a thread that serves devices; what is built for tests needs more of it than what is shipped.
const STACK: usize = 2 << 20;

/// Runs the target over that many changes on a server's stack; the answer is the number of different outcomes.
fn run(target: Target, changes: u64) -> usize {
    std::thread::Builder::new().stack_size(STACK).spawn(move || run_here(target, changes)).unwrap().join().unwrap()
}

fn run_here(target: Target, changes: u64) -> usize {
    let mut seeds: Vec<_> = corpus::make().unwrap().into_iter().filter(|seed| seed.target == target).collect();
    for seed in &mut seeds {
        seed.bytes = std::fs::read(corpus_folder(target).join(&seed.name)).unwrap().into();
    }
    let mut outcomes: BTreeSet<String> = seeds.iter().map(|seed| target.check(&seed.bytes)).collect();
    // What led somewhere new is changed further.
    let mut inputs: Vec<Vec<u8>> = seeds.iter().map(|seed| seed.bytes.to_vec()).collect();
    for number in 0..changes {
        let at = |number: u64| &inputs[usize::try_from(number % inputs.len() as u64).unwrap()];
        let input = mutation::mutate(target, at(number), at(number.wrapping_mul(0x9e37_79b9) >> 7), number);
        match catch_unwind(AssertUnwindSafe(|| target.check(&input))) {
            Ok(outcome) => {
                if outcomes.insert(outcome) && input.len() < 4096 {
                    inputs.push(input);
                }
            }
            Err(_) => {
                let path = std::env::temp_dir().join(format!("wasmdm-fuzz-{}-{number}", target.name()));
                std::fs::write(&path, &input).unwrap();
                panic!("change {number}; repeat it with: cargo run -p wasmdm-fuzz -- repeat {} {}", target.name(), path.display());
            }
        }
    }
    outcomes.len()
}

/// Edge case 8.
#[test]
fn property_lists_in_all_their_forms_are_one_value() {
    assert!(run(Target::PropertyList, 2000) > 40);
}

#[test]
fn json_stands_for_the_property_list_that_it_was_made_of() {
    assert!(run(Target::Json, 2000) > 20);
}

#[test]
fn no_changed_signature_and_no_changed_body_verifies() {
    assert!(run(Target::Signature, 300) > 10);
}

#[test]
fn the_authority_vouches_for_no_changed_certificate() {
    assert!(run(Target::Certificate, 1000) > 10);
}

#[test]
fn check_ins_name_enrollments_that_fit_wherever_they_go() {
    assert!(run(Target::CheckIn, 2000) > 30);
}

#[test]
fn what_is_salvaged_of_a_broken_report_is_what_the_whole_one_says() {
    assert!(run(Target::Report, 1500) > 30);
}
