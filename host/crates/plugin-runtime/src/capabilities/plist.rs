//! `plist`: property lists from and to JSON, so that no guest needs a library for them.

use wasmdm_protocol::{json, plist};

use crate::bindings::wasmdm::plugin::plist::Host;
use crate::call::State;
use crate::capabilities::{Denied, invalid, quota};

impl Host for State {
    async fn to_json(&mut self, document: Vec<u8>) -> wasmtime::Result<Result<String, Denied>> {
        self.enter()?;
        // Parsing is the host's work on the guest's account and cannot be interrupted: it is bounded by the size.
        let limit = self.settings.limits.input;
        if document.len() > limit {
            return Ok(Err(quota(format!("the document is longer than {limit} bytes"))));
        }
        Ok(plist::parse(&document).map(|value| json::to_json(&value).to_string()).map_err(|error| invalid(error.to_string())))
    }

    async fn from_json(&mut self, document: String) -> wasmtime::Result<Result<Vec<u8>, Denied>> {
        self.enter()?;
        let limit = self.settings.limits.input;
        if document.len() > limit {
            return Ok(Err(quota(format!("the document is longer than {limit} bytes"))));
        }
        let value = match serde_json::from_str(&document) {
            Ok(value) => value,
            Err(error) => return Ok(Err(invalid(format!("the document is no JSON: {error}")))),
        };
        Ok(json::from_json(&value).map(|value| plist::to_xml(&value).to_vec()).map_err(|error| invalid(error.to_string())))
    }
}
