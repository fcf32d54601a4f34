//! The configuration.

use serde::Deserialize;
use wasmdm_plugin::{Decision, Failure, config};

use crate::serial_number;

/// HTTP requests that the host allows in one call.
const MOST_URLS: usize = 4;

/// The table `[config]` of the grant file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    serial_numbers: Option<Vec<String>>,
    url: Option<Urls>,
    refresh_minutes: Option<u32>,
    #[expect(dead_code, reason = "read on its own in the policy; here its form is checked")]
    without_serial: Option<WithoutSerial>,
}

/// One address or several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Urls {
    One(String),
    Several(Vec<String>),
}

/// What becomes of a device that tells no serial number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum WithoutSerial {
    #[default]
    Deny,
    Allow,
    Quarantine,
}

impl WithoutSerial {
    pub(crate) fn decision(self) -> Decision {
        const REASON: &str = "this device tells no serial number";
        match self {
            Self::Deny => Decision::deny(REASON),
            Self::Allow => Decision::allow(),
            Self::Quarantine => Decision::quarantine(REASON),
        }
    }
}

/// Checks a whole configuration.
pub(crate) fn validate(document: &str) -> Result<(), Failure> {
    let settings: Settings = config::parse(document)?;
    if settings.serial_numbers.is_none() && settings.url.is_none() {
        return Err(Failure::invalid("configuration: `serial_numbers` or `url` is needed"));
    }
    for text in settings.serial_numbers.iter().flatten() {
        if serial_number::listed(text).is_none() {
            return Err(Failure::invalid(format!("serial_numbers: `{text}` is no serial number")));
        }
    }
    if settings.refresh_minutes == Some(0) {
        return Err(Failure::invalid("refresh_minutes: at least 1"));
    }
    check_urls(&settings.url.map(Urls::into_vec).unwrap_or_default())
}

fn check_urls(urls: &[String]) -> Result<(), Failure> {
    if urls.len() > MOST_URLS {
        return Err(Failure::invalid(format!("url: at most {MOST_URLS}")));
    }
    for url in urls {
        if !url.starts_with("https://") && !url.starts_with("http://") {
            return Err(Failure::invalid(format!("url: `{url}` is no http or https address")));
        }
    }
    Ok(())
}

impl Urls {
    fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(url) => vec![url],
            Self::Several(urls) => urls,
        }
    }
}

/// The addresses of lists.
pub(crate) fn urls() -> Result<Vec<String>, Failure> {
    let urls = config::key::<Urls>("url")?.map(Urls::into_vec).unwrap_or_default();
    check_urls(&urls)?;
    Ok(urls)
}

/// Milliseconds between two fetches of a list.
pub(crate) fn refresh_interval_ms() -> Result<u64, Failure> {
    let minutes = config::key::<u32>("refresh_minutes")?.unwrap_or(15).max(1);
    Ok(u64::from(minutes) * 60_000)
}

/// What becomes of a device that tells no serial number.
pub(crate) fn without_serial() -> Result<WithoutSerial, Failure> {
    Ok(config::key("without_serial")?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::validate;
    use serde_json::json;

    fn problem(document: &serde_json::Value) -> Option<String> {
        validate(&document.to_string()).err().map(|failure| failure.message)
    }

    #[test]
    fn good_configurations_pass() {
        for document in [
            json!({ "serial_numbers": [] }),
            json!({ "serial_numbers": ["C02AAA"], "without_serial": "quarantine" }),
            json!({ "url": "https://lists.example/a", "refresh_minutes": 1 }),
            json!({ "url": ["https://lists.example/a", "https://lists.example/b"] }),
        ] {
            assert_eq!(problem(&document), None, "{document}");
        }
    }

    #[test]
    fn wrong_configurations_name_the_key() {
        for (document, key) in [
            (json!({}), "serial_numbers"),
            (json!({ "serial_numbers": ["two words"] }), "serial_numbers"),
            (json!({ "serial_numbers": ["A"], "serials": [] }), "serials"),
            (json!({ "serial_numbers": ["A"], "without_serial": "perhaps" }), "perhaps"),
            (json!({ "url": "ftp://lists.example" }), "url"),
            (json!({ "url": ["https://a", "https://b", "https://c", "https://d", "https://e"] }), "url"),
            (json!({ "url": "https://a", "refresh_minutes": 0 }), "refresh_minutes"),
        ] {
            let message = problem(&document).unwrap_or_default();
            assert!(message.contains(key), "{document}: {message}");
        }
    }
}
