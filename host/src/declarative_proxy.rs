//! Hands declarative management to a server of declarations, as NanoMDM does (`-dm`).
//!
//! Both sides may prove with an HMAC of the body that they know a key. The other server's words are not trusted to be short, quick or
//! even an answer: whatever is wrong with them, the device is asked to come again.

use std::time::Duration;

use anyhow::Context as _;
use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use reqwest::Url;
use wasmdm_service::declarative_management::{Answer, DeclarativeManagement, EndpointRequest};
use wasmdm_service::reply::Refusal;

use crate::outward;
use crate::places::Places;

const SIGNATURE: HeaderName = HeaderName::from_static("x-hmac-signature");
const ENROLLMENT_ID: HeaderName = HeaderName::from_static("x-enrollment-id");
const ENROLLMENT_TYPE: HeaderName = HeaderName::from_static("x-enrollment-type");
const PARENT_ID: HeaderName = HeaderName::from_static("x-enrollment-parentid");
const TRACE_ID: HeaderName = HeaderName::from_static("x-trace-id");
/// The whole exchange. Devices wait for a minute.
const TIMEOUT: Duration = Duration::from_secs(20);
/// A large organization's list of declarations has a few hundred kilobytes.
const LONGEST_ANSWER: usize = 8 << 20;
/// Exchanges at once, and of one device with its users; who is beyond is asked to come again. A device asks for one document after the other.
const AT_ONCE: usize = 256;
const AT_ONCE_PER_DEVICE: usize = 4;

/// How the other server is reached.
#[derive(Clone)]
pub struct DeclarativeProxyOptions {
    /// Endpoints are resolved against it, so it should end in a slash.
    pub url: Url,
    /// Our requests carry an HMAC of this key.
    pub send_hmac_key: Option<String>,
    /// Answers without an HMAC of this key are not believed.
    pub receive_hmac_key: Option<String>,
}

/// The client of the other server.
#[derive(Debug)]
pub struct DeclarativeProxy {
    http: reqwest::Client,
    url: Url,
    send: Option<hmac::Key>,
    receive: Option<hmac::Key>,
    places: Places,
}

impl DeclarativeProxy {
    /// A client; the other server need not be there yet.
    pub fn new(options: &DeclarativeProxyOptions) -> anyhow::Result<Self> {
        let http = outward::client(TIMEOUT).context("dm")?;
        let key = |key: &Option<String>| key.as_deref().map(outward::hmac_key);
        Ok(Self {
            http,
            url: options.url.clone(),
            send: key(&options.send_hmac_key),
            receive: key(&options.receive_hmac_key),
            places: Places::new(AT_ONCE, AT_ONCE_PER_DEVICE),
        })
    }

    async fn ask(&self, asked: &EndpointRequest) -> Result<Answer, Refusal> {
        let _place =
            self.places.take(asked.enrollment.device()).ok_or_else(|| unavailable("too many requests wait for the server of declarations"))?;
        // An empty document says nothing, so that it would be nothing to put anywhere.
        let data = asked.data.as_ref().filter(|data| !data.is_empty());
        let url = self.url.join(asked.path.as_str()).map_err(|error| unavailable(format!("its address: {error}")))?;
        let mut headers = HeaderMap::new();
        let enrollment = &asked.enrollment;
        insert(&mut headers, ENROLLMENT_ID, enrollment.id.as_str())?;
        insert(&mut headers, ENROLLMENT_TYPE, enrollment.kind.nanomdm_name())?;
        if let Some(parent) = &enrollment.parent {
            insert(&mut headers, PARENT_ID, parent.as_str())?;
        }
        insert(&mut headers, TRACE_ID, &asked.request_id)?;
        if let Some(key) = &self.send {
            let body = data.map(AsRef::as_ref).unwrap_or_default();
            insert(&mut headers, SIGNATURE, &outward::hmac_signature(key, body))?;
        }
        let request = match data {
            None => self.http.get(url),
            Some(data) => self.http.put(url).header(header::CONTENT_TYPE, "application/json").body(data.clone()),
        };
        let response = request.headers(headers).send().await.map_err(failed)?;
        let (status, signature) = (response.status(), response.headers().get(SIGNATURE).cloned());
        let said = outward::status(&response);
        let body = read(response).await?;
        if let Some(key) = &self.receive
            && !is_signed(key, signature.as_ref(), &body)
        {
            return Err(unavailable(format!("its answer ({said}) has no valid {SIGNATURE}")));
        }
        match status {
            StatusCode::OK => Ok(Answer::Document(body)),
            StatusCode::NO_CONTENT => Ok(Answer::NoContent),
            StatusCode::NOT_FOUND => Ok(Answer::NotFound),
            // The other server says that the device's words are wrong: they would be wrong again.
            StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE | StatusCode::UNPROCESSABLE_ENTITY => {
                Err(Refusal::bad_request(format!("the server of declarations answered {said}")))
            }
            _ => Err(unavailable(format!("it answered {said}"))),
        }
    }
}

impl DeclarativeManagement for DeclarativeProxy {
    fn answer<'a>(&'a self, request: &'a EndpointRequest) -> BoxFuture<'a, Result<Answer, Refusal>> {
        Box::pin(async move {
            let answer = self.ask(request).await;
            let outcome = match &answer {
                Ok(Answer::NotFound) => "not-found",
                Ok(_) => "ok",
                Err(Refusal::BadRequest { .. }) => "bad-request",
                Err(_) => "unavailable",
            };
            metrics::counter!("wasmdm_declarative_requests_total", "outcome" => outcome).increment(1);
            answer
        })
    }
}

fn insert(headers: &mut HeaderMap, name: HeaderName, value: &str) -> Result<(), Refusal> {
    // An enrollment's id is a device's word.
    let value = HeaderValue::from_bytes(value.as_bytes()).map_err(|_| Refusal::bad_request("the enrollment's id is no header's value"))?;
    headers.insert(name, value);
    Ok(())
}

async fn read(mut response: reqwest::Response) -> Result<Bytes, Refusal> {
    let mut body = BytesMut::new();
    while let Some(chunk) = response.chunk().await.map_err(failed)? {
        if body.len().saturating_add(chunk.len()) > LONGEST_ANSWER {
            return Err(unavailable(format!("its answer is longer than {LONGEST_ANSWER} bytes")));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body.freeze())
}

fn is_signed(key: &hmac::Key, signature: Option<&HeaderValue>, body: &[u8]) -> bool {
    // Compares in constant time.
    signature.and_then(|value| STANDARD.decode(value.as_bytes()).ok()).is_some_and(|tag| hmac::verify(key, body, &tag).is_ok())
}

/// Without the URL, which may hold a password.
fn failed(error: reqwest::Error) -> Refusal {
    unavailable(if error.is_timeout() { "it took too long".to_owned() } else { error.without_url().to_string() })
}

fn unavailable(reason: impl std::fmt::Display) -> Refusal {
    Refusal::unavailable(format!("declarative management: {reason}"))
}
