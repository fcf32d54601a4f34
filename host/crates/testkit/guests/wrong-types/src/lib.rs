//! Exports a hook of the right name and version with other types.

wit_bindgen::generate!({
    inline: r"
        package wasmdm:plugin@0.1.0;
        interface event-sink { handle: func(occurrence: string) -> bool; }
        world plugin { export event-sink; }
    ",
});

struct WrongTypes;

impl exports::wasmdm::plugin::event_sink::Guest for WrongTypes {
    fn handle(_: String) -> bool {
        true
    }
}

#[cfg(target_family = "wasm")]
export!(WrongTypes);
