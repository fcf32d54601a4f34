//! The answer of [`ReturnToService`](crate::ReturnToService): with what a device returns.
//!
//! ```
//! use wasmdm_plugin::return_to_service::Configuration;
//! use wasmdm_plugin::{CallInfo, Enrollment, Failure, ReturnToService};
//!
//! struct Kiosks;
//!
//! impl ReturnToService for Kiosks {
//!     fn configuration(_: CallInfo, who: Enrollment) -> Result<Option<String>, Failure> {
//!         if !who.read_facts()?.tags.iter().any(|tag| tag == "kiosk") {
//!             return Ok(None);
//!         }
//!         let wifi = b"<plist>...</plist>";
//!         Ok(Some(Configuration::new().wifi_profile(wifi).bootstrap_token().to_json()))
//!     }
//! }
//!
//! wasmdm_plugin::export!(Kiosks: ReturnToService);
//! # fn main() {}
//! ```

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

/// Apple's dictionary `ReturnToService`.
#[derive(Debug, Clone, PartialEq)]
pub struct Configuration {
    keys: Map<String, Value>,
}

impl Default for Configuration {
    fn default() -> Self {
        Self::new()
    }
}

impl Configuration {
    /// The device erases itself and enrolls again.
    pub fn new() -> Self {
        Self { keys: Map::new() }.key("Enabled", json!(true))
    }

    /// The device is told not to.
    pub fn disabled() -> Self {
        Self { keys: Map::new() }.key("Enabled", json!(false))
    }

    /// The Wi-Fi profile that is installed after the erase.
    #[must_use]
    pub fn wifi_profile(self, profile: &[u8]) -> Self {
        self.key("WiFiProfileData", json!({ "$data": STANDARD.encode(profile) }))
    }

    /// The enrollment profile that is installed after the erase.
    #[must_use]
    pub fn mdm_profile(self, profile: &[u8]) -> Self {
        self.key("MDMProfileData", json!({ "$data": STANDARD.encode(profile) }))
    }

    /// The server puts the escrowed bootstrap token in, if there is one, so that apps can be preserved.
    #[must_use]
    pub fn bootstrap_token(self) -> Self {
        self.key("BootstrapToken", json!(true))
    }

    /// Another key of Apple's, as it is.
    ///
    /// ```
    /// use wasmdm_plugin::return_to_service::Configuration;
    /// let retrying = Configuration::new().key("ShouldRetryEnrollment", true.into());
    /// assert_eq!(retrying.to_json(), r#"{"Enabled":true,"ShouldRetryEnrollment":true}"#);
    /// ```
    #[must_use]
    pub fn key(mut self, name: impl Into<String>, value: Value) -> Self {
        self.keys.insert(name.into(), value);
        self
    }

    /// As the hook answers it.
    pub fn to_json(&self) -> String {
        Value::Object(self.keys.clone()).to_string()
    }
}
