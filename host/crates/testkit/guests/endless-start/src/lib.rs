//! Never gets as far as its first function: it loops while the instance is made.

wit_bindgen::generate!({ path: "../../../../../wit", world: "policy", generate_all });

use exports::wasmdm::plugin::enrollment_policy::{CallInfo, Decision, Enrollment, Failure, Guest, Input};

struct EndlessStart;

impl Guest for EndlessStart {
    fn decide(_: CallInfo, _: Enrollment, _: Input, _: bool) -> Result<Decision, Failure> {
        Ok(Decision { verdict: "allow".to_owned(), reason: None, detail: None })
    }
}

/// What a component calls while it is instantiated.
#[cfg(target_family = "wasm")]
#[unsafe(export_name = "_initialize")]
extern "C" fn initialize() {
    let mut n = 0_u64;
    loop {
        n = std::hint::black_box(n.wrapping_add(1));
    }
}

#[cfg(target_family = "wasm")]
export!(EndlessStart);
