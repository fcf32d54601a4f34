//! Check-ins to which a server may have an answer of its own: tokens of services, users who log in, a device that returns to service.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use plist::{Dictionary, Value};
use serde_json::json;

use super::Device;
use crate::canary::MARK;
use crate::connection::Connection;
use crate::error::SimulatorError;
use crate::message::Message;

impl Device {
    /// `GetToken` for a service, with `TokenParameters`.
    pub fn get_token_with(&self, service_type: &str, parameters: Dictionary) -> Result<Message, SimulatorError> {
        let mut keys = self.identifiers();
        keys.insert("TokenServiceType".into(), service_type.into());
        keys.insert("TokenParameters".into(), Value::Dictionary(parameters));
        Message::check_in("GetToken", keys)
    }

    /// A status report of declarative management with the secrets that Apple's status items have; both push items are the channel's own.
    pub fn status_report(&self) -> Result<Message, SimulatorError> {
        let report = json!({
            "StatusItems": {
                "device": { "model": { "family": "Mac" }, "operating-system": { "version": self.os_version() } },
                "enhanced-logging": { "applecare-token": format!("{MARK}-applecare") },
                "mdm": { "app": [], "push-magic": self.push_magic, "push-token": STANDARD.encode(&self.token) },
            },
            "Errors": [],
        });
        self.declarative_management("status", Some(report.to_string().as_bytes()))
    }

    /// Asks for a token; anything but 200 with one is an error.
    pub async fn fetch_token(&mut self, connection: &mut Connection, service_type: &str) -> Result<Vec<u8>, SimulatorError> {
        let message = self.get_token(service_type)?;
        let body = self.insist(connection, message).await?;
        let answer = self.dictionary("GetToken", &body)?;
        match answer.get("TokenData") {
            Some(Value::Data(token)) => Ok(token.clone()),
            _ => Err(self.unusable("GetToken", "TokenData is missing, or is no data")),
        }
    }

    /// Asks how to return to service; anything but 200 with a configuration is an error.
    pub async fn fetch_return_to_service(&mut self, connection: &mut Connection) -> Result<Dictionary, SimulatorError> {
        let message = self.return_to_service()?;
        let body = self.insist(connection, message).await?;
        let mut answer = self.dictionary("ReturnToService", &body)?;
        match answer.remove("ReturnToService") {
            Some(Value::Dictionary(configuration)) => Ok(configuration),
            _ => Err(self.unusable("ReturnToService", "ReturnToService is missing, or is no dictionary")),
        }
    }

    /// Logs a user in: both steps, with what `digest` makes of the challenge. The token that the server gives; empty if it asks for no proof
    /// or rejects it.
    pub async fn log_in(&mut self, connection: &mut Connection, digest: impl FnOnce(&str) -> String) -> Result<String, SimulatorError> {
        let message = self.user_authenticate(None)?;
        let body = self.insist(connection, message).await?;
        let challenge = self.text("UserAuthenticate", &body, "DigestChallenge")?;
        if challenge.is_empty() {
            return Ok(String::new());
        }
        let message = self.user_authenticate(Some(&digest(&challenge)))?;
        let body = self.insist(connection, message).await?;
        self.text("UserAuthenticate", &body, "AuthToken")
    }

    fn text(&self, what: &str, body: &[u8], key: &str) -> Result<String, SimulatorError> {
        let answer = self.dictionary(what, body)?;
        let text = answer.get(key).and_then(Value::as_string);
        text.map(str::to_owned).ok_or_else(|| self.unusable(what, &format!("{key} is missing, or is no string")))
    }

    fn dictionary(&self, what: &str, body: &[u8]) -> Result<Dictionary, SimulatorError> {
        match Value::from_reader_xml(body) {
            Ok(Value::Dictionary(answer)) => Ok(answer),
            _ => Err(self.unusable(what, "the answer is no property list with a dictionary")),
        }
    }

    fn unusable(&self, what: &str, problem: &str) -> SimulatorError {
        SimulatorError::Answer { device: self.id(), what: what.to_owned(), problem: problem.to_owned() }
    }
}
