//! Requests to the hosts that the operator granted. Needs the grant `http`; for asynchronous hooks only.
//!
//! A secret never enters the plugin: where a URL or a header is marked as a template, the host puts it in place of
//! `${name}`.
//!
//! ```
//! # use wasmdm_plugin::{http, mock, Failure};
//! # fn main() -> Result<(), Failure> {
//! let host = mock::Host::new();
//! host.respond(mock::response(200, "{}"));
//! let answer = http::post("https://hooks.example/events")
//!     .secret_header("authorization", "Bearer ${hook_token}")
//!     .json(&serde_json::json!({ "text": "hello" }))?
//!     .send()?
//!     .success()?;
//! assert_eq!(answer.status, 200);
//! # Ok(())
//! # }
//! ```

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Failure, host};

pub use crate::host::types::http::{Header, Request, Response};

/// A GET request.
pub fn get(url: impl Into<String>) -> Request {
    request("GET", url)
}

/// A POST request.
pub fn post(url: impl Into<String>) -> Request {
    request("POST", url)
}

/// A request of any method.
pub fn request(method: impl Into<String>, url: impl Into<String>) -> Request {
    Request { method: method.into(), url: url.into(), url_template: false, headers: Vec::new(), body: None, timeout_ms: None }
}

impl Request {
    /// The URL contains `${name}`, for which the host puts the secret of that name.
    #[must_use]
    pub fn secret_url(mut self) -> Self {
        self.url_template = true;
        self
    }

    /// Adds a header.
    #[must_use]
    pub fn header(self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.add_header(name.into(), value.into(), false)
    }

    /// Adds a header whose value contains `${name}`, for which the host puts the secret of that name.
    #[must_use]
    pub fn secret_header(self, name: impl Into<String>, template: impl Into<String>) -> Self {
        self.add_header(name.into(), template.into(), true)
    }

    fn add_header(mut self, name: String, value: String, template: bool) -> Self {
        self.headers.push(Header { name, value, template });
        self
    }

    /// Sets the body.
    #[must_use]
    pub fn with_body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = Some(body.into());
        self
    }

    /// Sets the body to a JSON document, and its content type.
    pub fn json<T: Serialize>(self, document: &T) -> Result<Self, Failure> {
        let body = serde_json::to_vec(document)?;
        Ok(self.header("content-type", "application/json").with_body(body))
    }

    /// Gives up after so many milliseconds, if the host's limit is not shorter.
    #[must_use]
    pub fn within_ms(mut self, milliseconds: u32) -> Self {
        self.timeout_ms = Some(milliseconds);
        self
    }

    /// Sends it. Any status is an answer; a failure means that there was none.
    pub fn send(&self) -> Result<Response, Failure> {
        host::http::send(self)
    }
}

impl Response {
    /// The first header of that name, in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// The body as text; `invalid` if it is no UTF-8.
    pub fn text(&self) -> Result<&str, Failure> {
        std::str::from_utf8(&self.body).map_err(|error| Failure::invalid(format!("answer is no UTF-8: {error}")))
    }

    /// The body as a type, from JSON.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        serde_json::from_slice(&self.body).map_err(|error| Failure::from(error).context("reading the answer"))
    }

    /// The answer if its status is 2xx, else a failure: worth another attempt after 408, 425, 429 and 5xx (honouring
    /// `Retry-After` in seconds), and not otherwise.
    pub fn success(self) -> Result<Self, Failure> {
        if (200..300).contains(&self.status) {
            return Ok(self);
        }
        let message = format!("answered with status {}", self.status);
        if !matches!(self.status, 408 | 425 | 429 | 500..) {
            return Err(Failure::new("refused", message));
        }
        let failure = Failure::unavailable(message);
        Err(match self.retry_after_ms() {
            Some(milliseconds) => failure.retry_after_ms(milliseconds),
            None => failure,
        })
    }

    /// `Retry-After`, where it is a number of seconds.
    fn retry_after_ms(&self) -> Option<u32> {
        let seconds: u32 = self.header("retry-after")?.trim().parse().ok()?;
        Some(seconds.saturating_mul(1000))
    }
}
