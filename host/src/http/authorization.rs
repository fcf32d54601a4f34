//! Who may use the API.

use std::sync::Arc;

use aws_lc_rs::digest;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use subtle::ConstantTimeEq as _;

use super::{App, problem};

/// The names that clients of NanoMDM and MicroMDM send.
const USERS: [&str; 2] = ["nanomdm", "micromdm"];

/// The server's API key. Only its digest is kept, so that comparing takes the same time for every guess and length.
#[derive(Clone)]
pub struct ApiKey {
    sha256: [u8; 32],
}

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiKey")
    }
}

impl ApiKey {
    /// From the key's text.
    pub fn new(key: &str) -> Self {
        Self { sha256: sha256(key) }
    }

    fn is(&self, presented: &str) -> bool {
        self.sha256.ct_eq(&sha256(presented)).into()
    }

    fn accepts_basic(&self, headers: &HeaderMap) -> Option<&'static str> {
        let credentials = scheme(headers, "basic")?;
        let decoded = STANDARD.decode(credentials).ok()?;
        let (user, password) = std::str::from_utf8(&decoded).ok()?.split_once(':')?;
        let user = USERS.into_iter().find(|known| *known == user);
        // The key is compared for an unknown user too, so that the time tells nothing of the user.
        if self.is(password) { user } else { None }
    }

    fn accepts_bearer(&self, headers: &HeaderMap) -> Option<&'static str> {
        scheme(headers, "bearer").is_some_and(|token| self.is(token)).then_some("api-key")
    }
}

fn sha256(text: &str) -> [u8; 32] {
    let mut value = [0; 32];
    value.copy_from_slice(digest::digest(&digest::SHA256, text.as_bytes()).as_ref());
    value
}

/// The credentials behind that scheme, whose name's case does not matter (RFC 9110, 11.1).
fn scheme<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let (scheme, credentials) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case(name).then(|| credentials.trim())
}

/// Who called: the origin of what the call queues.
#[derive(Debug, Clone, Copy)]
pub struct Caller(pub &'static str);

/// Lets Basic authorization through, for `/v1`.
pub async fn basic(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    match app.api_key.accepts_basic(request.headers()) {
        Some(user) => {
            request.extensions_mut().insert(Caller(user));
            next.run(request).await
        }
        None => {
            let mut response = problem::plain(StatusCode::UNAUTHORIZED, "Unauthorized");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"nanomdm\""));
            response
        }
    }
}

/// Lets Bearer or Basic authorization through, for `/api/v1`.
pub async fn bearer_or_basic(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let accepted = app.api_key.accepts_bearer(request.headers()).or_else(|| app.api_key.accepts_basic(request.headers()));
    match accepted {
        Some(user) => {
            request.extensions_mut().insert(Caller(user));
            next.run(request).await
        }
        None => {
            let detail = "Send the API key as `Authorization: Bearer KEY`, or by Basic with user nanomdm.";
            let mut response = problem::document(StatusCode::UNAUTHORIZED, "Unauthorized", detail, None);
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"wasmdm\""));
            response
        }
    }
}
