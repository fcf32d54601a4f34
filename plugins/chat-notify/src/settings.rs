//! The configuration.

use std::collections::BTreeMap;

use serde::Deserialize;
use wasmdm_plugin::{Failure, config};

use crate::message;

/// The table `[config]` of the grant file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Settings {
    /// The template of topics that have none of their own.
    message: String,
    /// Templates by topic.
    messages: BTreeMap<String, String>,
    /// Whether `&`, `<` and `>` in what devices say are written as entities, as Slack wants it.
    pub(crate) escape: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { message: "{topic}: {device}".to_owned(), messages: BTreeMap::new(), escape: true }
    }
}

impl Settings {
    /// The template of a topic.
    pub(crate) fn template(&self, topic: &str) -> &str {
        self.messages.get(topic).unwrap_or(&self.message)
    }
}

/// The operator's configuration.
pub(crate) fn read() -> Result<Settings, Failure> {
    config::read()
}

/// Checks a whole configuration.
pub(crate) fn validate(document: &str) -> Result<(), Failure> {
    let settings: Settings = config::parse(document)?;
    let check = |key: &str, template: &str| message::check(template).map_err(|problem| Failure::invalid(format!("{key}: {problem}")));
    check("message", &settings.message)?;
    for (topic, template) in &settings.messages {
        check(&format!("messages.\"{topic}\""), template)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::validate;
    use serde_json::json;

    #[test]
    fn good_configurations_pass() {
        for document in [
            json!({}),
            json!({ "message": "{{{topic}}}", "escape": false }),
            json!({ "messages": { "command.errored": "{request_type}: {status} {error}" } }),
        ] {
            assert_eq!(validate(&document.to_string()), Ok(()), "{document}");
        }
    }

    #[test]
    fn wrong_configurations_name_the_key() {
        for (document, key) in [
            (json!({ "message": "{serial}" }), "message: `{serial}`"),
            (json!({ "message": "{topic" }), "message"),
            (json!({ "messages": { "command.errored": "{what}" } }), "command.errored"),
            (json!({ "url": "https://hooks.example" }), "url"),
        ] {
            let message = validate(&document.to_string()).unwrap_err().message;
            assert!(message.contains(key), "{document}: {message}");
        }
    }
}
