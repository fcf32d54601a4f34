//! Types and traits generated from the contract. One set for all plugins: a plugin exports any subset of the hooks, so the generated type
//! for the whole world is used for its imports alone, and each exported interface by its own indices.

wasmtime::component::bindgen!({
    path: "../../../wit",
    world: "everything",
    imports: { default: async | trappable },
    exports: { default: async },
    additional_derives: [Clone],
});
