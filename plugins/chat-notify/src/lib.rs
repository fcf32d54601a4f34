//! Tells a chat room what happens: posts `{"text": …}` to an address that is a secret.
//!
//! Which events are told is decided by the topics in the manifest; what is said, by the templates of the configuration.

mod message;
mod settings;

use serde_json::json;
use wasmdm_plugin::{CallInfo, Event, EventSink, Failure, Lifecycle, http};

/// The plugin.
#[derive(Debug)]
pub struct ChatNotify;

impl Lifecycle for ChatNotify {
    fn validate_config(_: CallInfo, document: String) -> Result<(), Failure> {
        settings::validate(&document)
    }
}

impl EventSink for ChatNotify {
    /// A room that is overloaded or away is told again later; one that refuses the message is not.
    fn handle(_: CallInfo, occurrence: Event) -> Result<(), Failure> {
        let settings = settings::read()?;
        let text = message::text(&settings, &occurrence)?;
        http::post("${chat_url}")
            .secret_url()
            // Rooms that know the header show a message once, however often its delivery had to be repeated.
            .header("idempotency-key", occurrence.id)
            .json(&json!({ "text": text }))?
            .send()?
            .success()
            .map_err(|failure| failure.context("the chat"))?;
        Ok(())
    }
}

wasmdm_plugin::export!(ChatNotify: Lifecycle, EventSink);
