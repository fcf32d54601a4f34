//! The plugins that the program carries, built from `plugins/` with it.

/// A plugin as it lies in a plugin directory.
#[derive(Debug, Clone, Copy)]
pub struct BundledPlugin {
    pub name: &'static str,
    /// Its `plugin.toml`.
    pub manifest: &'static str,
    /// Its `plugin.wasm`.
    pub component: &'static [u8],
}

macro_rules! bundled {
    ($name:literal) => {
        BundledPlugin {
            name: $name,
            manifest: include_str!(concat!("../../plugins/", $name, "/plugin.toml")),
            component: include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".wasm")),
        }
    };
}

/// Decides by serial number who may enroll.
pub const SERIAL_ALLOW_LIST: BundledPlugin = bundled!("serial-allow-list");
/// Sends the first commands, and releases a device when all are final.
pub const ENROLLMENT_BASELINE: BundledPlugin = bundled!("enrollment-baseline");
/// Posts events to a chat room.
pub const CHAT_NOTIFY: BundledPlugin = bundled!("chat-notify");
