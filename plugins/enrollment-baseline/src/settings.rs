//! The configuration.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::Value;
use wasmdm_plugin::{Failure, config};

use crate::baseline;

/// What is asked of a device if nothing else is configured: keys that every enrolled device may answer.
const QUERIES: [&str; 9] = ["UDID", "SerialNumber", "DeviceName", "OSVersion", "BuildVersion", "Model", "ModelName", "ProductName", "IsSupervised"];

/// Commands that one call may answer.
const MOST_COMMANDS: usize = 100;

/// Setup Assistant shows no way out while it waits: a day is surely a mistake.
const LONGEST_WAIT_MS: u64 = 24 * 60 * 60 * 1000;

/// The table `[config]` of the grant file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Settings {
    /// `Queries` of the `DeviceInformation` command; none: no such command.
    pub(crate) device_information: Vec<String>,
    /// Profiles in base64.
    pub(crate) profiles: Vec<String>,
    /// Further commands: `Command` dictionaries in the contract's JSON.
    pub(crate) commands: Vec<Value>,
    /// How long a device that awaits its configuration is held at most: `90s`, `15m`, `1h`.
    release_after: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self { device_information: QUERIES.map(str::to_owned).to_vec(), profiles: Vec::new(), commands: Vec::new(), release_after: "15m".to_owned() }
    }
}

impl Settings {
    /// How long a device that awaits its configuration is held at most.
    pub(crate) fn release_after_ms(&self) -> Result<u64, Failure> {
        duration_ms(&self.release_after)
            .filter(|&milliseconds| (1000..=LONGEST_WAIT_MS).contains(&milliseconds))
            .ok_or_else(|| Failure::invalid(format!("release_after: `{}` is no time like 90s, 15m or 1h, at most a day", self.release_after)))
    }
}

fn duration_ms(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|unit: char| unit.is_ascii_alphabetic());
    let unit = match text.get(digits.len()..)? {
        "s" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

/// The operator's configuration.
pub(crate) fn read() -> Result<Settings, Failure> {
    config::read()
}

/// Checks a whole configuration.
pub(crate) fn validate(document: &str) -> Result<(), Failure> {
    let settings: Settings = config::parse(document)?;
    settings.release_after_ms()?;
    for (number, profile) in settings.profiles.iter().enumerate() {
        let bytes = STANDARD
            .decode(baseline::without_white_space(profile))
            .map_err(|error| Failure::invalid(format!("profiles: element {number} is no base64: {error}")))?;
        if bytes.is_empty() {
            return Err(Failure::invalid(format!("profiles: element {number} is empty")));
        }
    }
    for (number, command) in settings.commands.iter().enumerate() {
        match command.get("RequestType").and_then(Value::as_str) {
            None => {
                return Err(Failure::invalid(format!("commands: element {number} has no RequestType")));
            }
            // It would end the wait that this plugin is to end in time.
            Some("DeviceConfigured") => {
                return Err(Failure::invalid("commands: DeviceConfigured is sent by this plugin"));
            }
            Some(_) => {}
        }
    }
    let count = baseline::commands(&settings).len();
    if count > MOST_COMMANDS {
        return Err(Failure::invalid(format!("{count} commands; at most {MOST_COMMANDS}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Settings, duration_ms, validate};
    use serde_json::json;

    #[test]
    fn good_configurations_pass() {
        for document in [
            json!({}),
            json!({ "device_information": [], "release_after": "90s" }),
            json!({ "profiles": ["AAAA\n BBBB", "AA=="], "release_after": "24h" }),
            json!({ "commands": [{ "RequestType": "SecurityInfo" }] }),
        ] {
            assert_eq!(validate(&document.to_string()), Ok(()), "{document}");
        }
        assert_eq!(Settings::default().release_after_ms(), Ok(900_000));
    }

    #[test]
    fn wrong_configurations_name_the_key() {
        for (document, key) in [
            (json!({ "profiles": ["%%%"] }), "profiles: element 0"),
            (json!({ "profiles": ["AAAA", ""] }), "profiles: element 1"),
            (json!({ "commands": [{}] }), "commands: element 0"),
            (json!({ "commands": [{ "RequestType": "DeviceConfigured" }] }), "DeviceConfigured"),
            (json!({ "release_after": "soon" }), "release_after"),
            (json!({ "release_after": "0s" }), "release_after"),
            (json!({ "release_after": "25h" }), "release_after"),
            (json!({ "release": "1m" }), "release"),
            (json!({ "commands": vec![json!({ "RequestType": "SecurityInfo" }); 100] }), "at most 100"),
        ] {
            let message = validate(&document.to_string()).unwrap_err().message;
            assert!(message.contains(key), "{document}: {message}");
        }
    }

    #[test]
    fn times_are_read() {
        assert_eq!(duration_ms("90s"), Some(90_000));
        assert_eq!(duration_ms("2h"), Some(7_200_000));
        for wrong in ["", "m", "15", "15 m", "-1m", "99999999999999999999h", "18446744073709551615h"] {
            assert_eq!(duration_ms(wrong), None, "{wrong}");
        }
    }
}
