//! Refuses to enroll devices whose operating system is older than `minimum_os` of the configuration.

wit_bindgen::generate!({
    path: "wit",
    // What the plugin asks of the server, and what the server calls.
    inline: "package example:quickstart;
        world plugin {
            import wasmdm:plugin/config@0.1.0;
            export wasmdm:plugin/enrollment-policy@0.1.0;
        }",
    world: "example:quickstart/plugin",
    generate_all,
});

use exports::wasmdm::plugin::enrollment_policy::{
    CallInfo, Decision, Enrollment, Failure, Guest, Input,
};
use wasmdm::plugin::config;

struct MinimumOs;

impl Guest for MinimumOs {
    /// Called when a device asks to enroll. A decision ends the matter; a failure makes the device come again later.
    fn decide(
        _call: CallInfo,
        candidate: Enrollment,
        _message: Input,
        _re_enrolling: bool,
    ) -> Result<Decision, Failure> {
        let Some(minimum) = config::get("minimum_os") else {
            return Ok(decision("abstain", None));
        };
        let minimum: String = serde_json::from_str(&minimum).map_err(invalid)?;
        let facts: Facts = serde_json::from_str(&candidate.facts).map_err(invalid)?;
        let version = facts.os_version.unwrap_or_default();
        if numbers(&version) < numbers(&minimum) {
            let reason = format!("{minimum} is needed to enroll, this device has {version}");
            return Ok(decision("deny", Some(reason)));
        }
        Ok(decision("allow", None))
    }
}

/// What is known of the device; there is more, see docs/contract.md of wasmdm.
#[derive(serde::Deserialize)]
struct Facts {
    os_version: Option<String>,
}

/// `26.1` is `[26, 1]`, which is more than `[26]` and less than `[26, 1, 1]`. Zeros at the end say nothing.
fn numbers(version: &str) -> Vec<u32> {
    let parts = version.split('.').map_while(|part| part.parse().ok());
    let mut numbers: Vec<u32> = parts.collect();
    while numbers.last() == Some(&0) {
        numbers.pop();
    }
    numbers
}

fn decision(verdict: &str, reason: Option<String>) -> Decision {
    Decision {
        verdict: verdict.to_owned(),
        reason,
        detail: None,
    }
}

fn invalid(error: serde_json::Error) -> Failure {
    Failure {
        code: "invalid".to_owned(),
        message: error.to_string(),
        retryable: false,
        retry_after_ms: None,
        detail: None,
    }
}

export!(MinimumOs);
