//! Forgot to export anything.

wit_bindgen::generate!({ path: "../../../../../wit", world: "capabilities", generate_all });

/// Keeps an import alive, as a plugin with hooks would.
#[unsafe(no_mangle)]
pub extern "C" fn unused() {
    wasmdm::plugin::log::write(wasmdm::plugin::log::Level::Info, "never called", &[]);
}
