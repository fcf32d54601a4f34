//! `runtime`: who am I, what may I take, what time is it.

use serde_json::json;

use crate::bindings::wasmdm::plugin::runtime::Host;
use crate::call::State;
use crate::contract;
use crate::hook::{CONTRACT_VERSION, Hook};

impl Host for State {
    async fn info(&mut self) -> wasmtime::Result<String> {
        self.enter()?;
        let identity = &self.shared.identity;
        let limits = &self.settings.limits;
        let wall = |hook: Hook| limits.wall(hook).as_millis();
        // The mode is not told: a monitored plugin behaves as if it counted.
        Ok(json!({
            "name": identity.name,
            "version": identity.version,
            "digest": identity.digest,
            "tenant": self.tenant.as_str(),
            "server_version": self.shared.services.server_version,
            "contract_version": CONTRACT_VERSION,
            "limits": {
                "memory_bytes": limits.memory,
                "cpu_ms": limits.cpu(self.hook).as_millis(),
                "wall_ms": wall(self.hook),
                "host_calls": limits.host_calls,
                "input_bytes": limits.input,
                "output_bytes": limits.output,
                "http_calls": limits.http_calls,
                "commands": limits.commands,
                "timers": limits.timers,
            },
        })
        .to_string())
    }

    async fn now(&mut self) -> wasmtime::Result<u64> {
        self.enter()?;
        Ok(contract::timestamp(State::now(self)))
    }
}
