//! Exports a hook that this version of the contract does not have.

wit_bindgen::generate!({
    inline: r"
        package wasmdm:plugin@0.1.0;
        interface command-policy { decide: func(command: string) -> bool; }
        world plugin { export command-policy; }
    ",
});

struct FromTheFuture;

impl exports::wasmdm::plugin::command_policy::Guest for FromTheFuture {
    fn decide(_: String) -> bool {
        true
    }
}

#[cfg(target_family = "wasm")]
export!(FromTheFuture);
