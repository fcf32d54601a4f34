//! What is counted of every call of a plugin. Looked up once: finding a series by its name and labels costs as much as counting in ten.

use std::sync::OnceLock;

use metrics::{Counter, Histogram, counter, histogram};

use crate::hook::Hook;

/// The series of decisions.
pub(crate) const DECISIONS: &str = "wasmdm_plugin_decisions_total";

/// The series of a plugin's hooks.
#[derive(Default)]
pub(crate) struct CallMetrics {
    hooks: [OnceLock<HookMetrics>; Hook::ALL.len()],
    /// For a hook that [`Hook::ALL`] does not name.
    other: OnceLock<HookMetrics>,
}

/// The series of one hook.
pub(crate) struct HookMetrics {
    /// Calls that were answered; other outcomes are rare.
    pub(crate) ok: Counter,
    pub(crate) seconds: Histogram,
    pub(crate) cpu_seconds: Histogram,
    pub(crate) peak_memory: Histogram,
    pub(crate) host_calls: Counter,
    /// Decisions to allow that counted; the others are rare.
    allowed: OnceLock<Counter>,
}

impl CallMetrics {
    pub(crate) fn of(&self, plugin: &str, hook: Hook) -> &HookMetrics {
        let place = Hook::ALL.iter().position(|one| *one == hook).and_then(|place| self.hooks.get(place));
        place.unwrap_or(&self.other).get_or_init(|| HookMetrics::new(plugin, hook.as_str()))
    }
}

impl HookMetrics {
    fn new(plugin: &str, hook: &'static str) -> Self {
        let plugin = || plugin.to_owned();
        Self {
            ok: counter!("wasmdm_plugin_calls_total", "plugin" => plugin(), "hook" => hook, "outcome" => "ok"),
            seconds: histogram!("wasmdm_plugin_call_seconds", "plugin" => plugin(), "hook" => hook),
            cpu_seconds: histogram!("wasmdm_plugin_call_cpu_seconds", "plugin" => plugin(), "hook" => hook),
            peak_memory: histogram!("wasmdm_plugin_peak_memory_bytes", "plugin" => plugin()),
            host_calls: counter!("wasmdm_plugin_host_calls_total", "plugin" => plugin()),
            allowed: OnceLock::new(),
        }
    }

    /// A decision to allow that counts.
    pub(crate) fn allowed(&self, plugin: &str, hook: Hook) {
        let series = || counter!(DECISIONS, "plugin" => plugin.to_owned(), "hook" => hook.as_str(), "verdict" => "allow", "mode" => "enforce");
        self.allowed.get_or_init(series).increment(1);
    }
}

impl std::fmt::Debug for CallMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CallMetrics").finish_non_exhaustive()
    }
}
