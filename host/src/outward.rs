//! What the server's own calls to other servers have in common: no redirects, a time limit, and a proof of who calls.

use std::time::Duration;

use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, HeaderName, header};

/// A client whose every exchange ends within `timeout`. Redirects are not followed: the operator named the server, not what it points to.
///
/// # Errors
/// When the system's certificates cannot be read.
pub fn client(timeout: Duration) -> reqwest::Result<reqwest::Client> {
    builder().timeout(timeout).build()
}

/// The same for answers of any length, which may take their time but not pause for longer than `pause`.
///
/// # Errors
/// When the system's certificates cannot be read.
pub fn streaming_client(pause: Duration) -> reqwest::Result<reqwest::Client> {
    builder().connect_timeout(pause).read_timeout(pause).build()
}

/// [`client`] that shows a certificate of its own.
///
/// # Errors
/// When the system's certificates cannot be read, or the identity is none.
pub fn client_with_identity(timeout: Duration, identity: reqwest::Identity) -> reqwest::Result<reqwest::Client> {
    builder().timeout(timeout).identity(identity).build()
}

fn builder() -> reqwest::ClientBuilder {
    reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
        .tcp_nodelay(true)
        .user_agent(concat!("wasmdm/", env!("CARGO_PKG_VERSION")))
}

/// The status of an answer, for the log; of a redirect also where to, as somebody has to write that down in its place. The host alone: the
/// rest may hold a secret.
pub fn status(response: &reqwest::Response) -> String {
    let status = response.status().as_u16();
    if !response.status().is_redirection() {
        return status.to_string();
    }
    let location = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
    let url = location.and_then(|location| response.url().join(location).ok());
    match url.as_ref().and_then(|url| Some((url.scheme(), url.host_str()?, url.port()))) {
        Some((scheme, host, port)) => {
            let port = port.map(|port| format!(":{port}")).unwrap_or_default();
            format!("{status}, a redirect to {scheme}://{host}{port}, and redirects are not followed")
        }
        None => format!("{status}, a redirect to nowhere"),
    }
}

/// Between two neighbours only (RFC 9110, 7.6.1, and what is older).
const HOP_BY_HOP: [&str; 9] =
    ["connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"];

/// The headers of a message that go further when it is handed on.
pub fn end_to_end(headers: &HeaderMap) -> HeaderMap {
    let named = |name: &HeaderName| {
        headers
            .get_all(header::CONNECTION)
            .iter()
            .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
            .any(|option| option.trim_ascii().eq_ignore_ascii_case(name.as_str().as_bytes()))
    };
    let mut kept = HeaderMap::with_capacity(headers.len());
    for (name, value) in headers {
        if !HOP_BY_HOP.contains(&name.as_str()) && !named(name) {
            kept.append(name, value.clone());
        }
    }
    kept
}

/// The key of NanoMDM's `X-Hmac-Signature`.
pub fn hmac_key(key: &str) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, key.as_bytes())
}

/// The value of NanoMDM's `X-Hmac-Signature` for a body.
pub fn hmac_signature(key: &hmac::Key, body: &[u8]) -> String {
    STANDARD.encode(hmac::sign(key, body))
}
