//! Who the plugin is, and what time it is. Always granted.

use serde::Deserialize;
use serde_json::Value;

use crate::{Failure, Timestamp, host};

/// The plugin as the server knows it.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Info {
    /// The plugin's name.
    pub name: String,
    /// The version of its manifest.
    pub version: Option<String>,
    /// The SHA-256 of the component that runs.
    pub digest: String,
    /// The tenant that the call is for.
    pub tenant: String,
    /// The version of the server.
    pub server_version: String,
    /// The limits in force, by name.
    pub limits: Value,
}

/// Asks the server who this is.
pub fn info() -> Result<Info, Failure> {
    Ok(serde_json::from_str(&host::runtime::info())?)
}

/// The server's clock.
pub fn now() -> Timestamp {
    host::runtime::now()
}
