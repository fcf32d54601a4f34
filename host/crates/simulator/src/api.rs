//! The least of an API client: queueing commands and pushing, for runs that need devices to have something to do.

use base64::Engine as _;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use serde_json::Value;

use crate::connection::{Answer, Connection, Target};
use crate::device::basic;
use crate::error::SimulatorError;
use crate::journal::hex;

/// The most ids that go into one request, so that its first line stays short.
pub const IDS_PER_REQUEST: usize = 50;

/// A client of `/v1/enqueue` and `/v1/push`, as NanoMDM has them.
pub struct ApiClient {
    connection: Connection,
    authorization: HeaderValue,
}

impl std::fmt::Debug for ApiClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiClient").finish_non_exhaustive()
    }
}

/// What the API says about one call.
#[derive(Debug, Clone)]
pub struct ApiAnswer {
    /// HTTP status.
    pub status: StatusCode,
    /// The JSON in the body; null if there is none.
    pub json: Value,
}

impl ApiAnswer {
    /// What went wrong with the command for this enrollment, if anything did. Failed pushes do not count: the command is queued.
    pub fn command_error(&self, id: &str) -> Option<String> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        if let Some(error) = self.json.get("command_error").and_then(text) {
            return Some(error);
        }
        if let Some(status) = self.json.get("status").and_then(|all| all.get(id)) {
            return status.get("command_error").and_then(text);
        }
        if self.status.is_success() {
            return None;
        }
        Some(format!("HTTP status {}", self.status.as_u16()))
    }
}

impl ApiClient {
    /// A client for the server at `url` (its path does not matter); the user is `nanomdm`.
    pub fn new(url: &str, key: &str) -> Result<Self, SimulatorError> {
        Ok(Self { connection: Connection::new(Target::parse(url)?), authorization: basic("nanomdm", key)? })
    }

    /// Another client with the same key, over a connection of its own.
    #[must_use]
    pub fn another(&self) -> Self {
        Self { connection: Connection::new(self.connection.target().clone()), authorization: self.authorization.clone() }
    }

    /// Queues a command document for these enrollments. `push` tells the server to wake them.
    pub async fn enqueue(&mut self, ids: &[&str], document: Bytes, push: bool) -> Result<ApiAnswer, SimulatorError> {
        let query = if push { "" } else { "?nopush=1" };
        self.call("enqueue", ids, query, document).await
    }

    /// Queues a command whose acknowledgement begins the renewal of these devices' identities.
    pub async fn enqueue_renewal(&mut self, ids: &[&str], document: Bytes) -> Result<ApiAnswer, SimulatorError> {
        self.call("enqueue", ids, "?nopush=1&renews_identity=1", document).await
    }

    /// Wakes these enrollments.
    pub async fn push(&mut self, ids: &[&str]) -> Result<ApiAnswer, SimulatorError> {
        self.call("push", ids, "", Bytes::new()).await
    }

    /// Stores a push certificate with its key, both PEM.
    pub async fn store_push_certificate(&mut self, pem: String) -> Result<(), SimulatorError> {
        let answer = self.send(Uri::from_static("/v1/pushcert"), pem.into()).await?;
        if answer.status.is_success() {
            return Ok(());
        }
        let problem =
            answer.json.get("error").and_then(Value::as_str).map_or_else(|| format!("HTTP status {}", answer.status.as_u16()), str::to_owned);
        Err(SimulatorError::Argument { name: "push", problem: format!("the server does not take the push certificate: {problem}") })
    }

    async fn call(&mut self, what: &str, ids: &[&str], query: &str, body: Bytes) -> Result<ApiAnswer, SimulatorError> {
        let ids: Vec<String> = ids.iter().map(|id| escape(id)).collect();
        let path: Uri = format!("/v1/{what}/{}{query}", ids.join(","))
            .parse()
            .map_err(|error| SimulatorError::Argument { name: "enrollment ids", problem: format!("{error}") })?;
        self.send(path, body).await
    }

    async fn send(&mut self, path: Uri, body: Bytes) -> Result<ApiAnswer, SimulatorError> {
        let mut headers = HeaderMap::new();
        headers.insert(http::header::AUTHORIZATION, self.authorization.clone());
        let Answer { status, body, .. } = self.connection.request(Method::PUT, path, headers, body).await?;
        if status == StatusCode::UNAUTHORIZED {
            return Err(SimulatorError::Argument { name: "api-key", problem: "the server does not know this key".into() });
        }
        Ok(ApiAnswer { status, json: serde_json::from_slice(&body).unwrap_or(Value::Null) })
    }
}

/// Escapes what would end or divide the path.
fn escape(id: &str) -> String {
    let mut out = String::with_capacity(id.len());
    for byte in id.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b':' | b'@' => {
                out.push(char::from(byte));
            }
            _ => {
                out.push('%');
                out.push_str(&hex(&[byte]).to_uppercase());
            }
        }
    }
    out
}

/// The header value of Basic credentials, for callers with their own client.
pub fn basic_authorization(user: &str, key: &str) -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{key}")))
}
