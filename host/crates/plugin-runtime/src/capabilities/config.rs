//! `config`: the operator's configuration for this tenant.

use crate::bindings::wasmdm::plugin::config::Host;
use crate::call::State;

impl Host for State {
    async fn get(&mut self, key: String) -> wasmtime::Result<Option<String>> {
        self.enter()?;
        Ok(self.settings.config.text(&key).map(str::to_owned))
    }

    async fn document(&mut self) -> wasmtime::Result<String> {
        self.enter()?;
        Ok(serde_json::to_string(&**self.settings.config)?)
    }
}
