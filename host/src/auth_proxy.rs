//! Hands requests of devices to a server that does not know devices' certificates, as NanoMDM does (`-auth-proxy-url`): declarations
//! lead devices to files with `Authentication` of type `MDM` (edge case 62).
//!
//! Who asks is proved before anything gets here. The path cannot leave the configured address, nothing that a device says about
//! enrollments goes on, and the other server's answer streams through without being held.

use std::future::Future as _;
use std::net::IpAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use anyhow::Context as _;
use axum::body::Body;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, header};
use hyper::body::Frame;
use reqwest::Url;
use tokio::time::Sleep;
use wasmdm_protocol::enrollment::EnrollmentId;
use wasmdm_protocol::relative_path::RelativePath;

use crate::outward;
use crate::places::{Place, Places};

const ENROLLMENT_ID: HeaderName = HeaderName::from_static("x-enrollment-id");
const TRACE_ID: HeaderName = HeaderName::from_static("x-trace-id");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// How long the other server may say nothing.
const PAUSE: Duration = Duration::from_secs(30);
/// A whole answer: a large package over a slow line.
const PATIENCE: Duration = Duration::from_hours(2);
/// Nothing is held, so this only ends what would never end.
const LONGEST_ANSWER: u64 = 16 << 30;
/// Exchanges at once, and of one device: one that reads slowly must not keep the others out.
const AT_ONCE: usize = 512;
const AT_ONCE_PER_DEVICE: usize = 8;

/// What a device asked for.
#[derive(Debug)]
pub struct Asked {
    pub method: Method,
    /// Behind the proxy's own prefix.
    pub path: RelativePath,
    pub query: Option<String>,
    /// As they came.
    pub headers: HeaderMap,
    /// Complete and decoded: the device's signature covers all of it.
    pub body: Bytes,
    pub peer: IpAddr,
    /// Proved.
    pub enrollment: EnrollmentId,
    pub request_id: String,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Unanswered {
    /// 503.
    #[error("too many requests wait for the server behind the authentication proxy")]
    Busy,
    /// 502.
    #[error("the server behind the authentication proxy: {0}")]
    Failed(String),
}

/// The client of the other server.
#[derive(Debug)]
pub struct AuthProxy {
    http: reqwest::Client,
    url: Url,
    places: Places,
    /// Proofs of identity of this server's own, which are nobody else's.
    proofs: Vec<HeaderName>,
}

impl AuthProxy {
    /// A client; the other server need not be there yet. `certificate_header` is the one that a trusted proxy sets.
    pub fn new(url: &Url, certificate_header: Option<&HeaderName>) -> anyhow::Result<Self> {
        Self::with_pause(url, certificate_header, PAUSE)
    }

    fn with_pause(url: &Url, certificate_header: Option<&HeaderName>, pause: Duration) -> anyhow::Result<Self> {
        let http = outward::streaming_client(pause).context("auth-proxy-url")?;
        let mut proofs = vec![HeaderName::from_static("mdm-signature")];
        proofs.extend(certificate_header.cloned());
        Ok(Self { http, url: url.clone(), places: Places::new(AT_ONCE, AT_ONCE_PER_DEVICE), proofs })
    }

    /// Asks, and answers the beginning of the answer; the rest follows as it comes.
    pub async fn forward(&self, asked: Asked) -> Result<Response<Body>, Unanswered> {
        let place = self.places.take(&asked.enrollment).ok_or(Unanswered::Busy)?;
        let headers = self.headers_of(&asked)?;
        let request = self.http.request(asked.method, self.url_of(&asked.path, asked.query.as_deref())).headers(headers).body(asked.body);
        // Without the URL, which may hold a password.
        let response = request.send().await.map_err(|error| Unanswered::Failed(error.without_url().to_string()))?;
        if response.content_length().is_some_and(|length| length > LONGEST_ANSWER) {
            return Err(Unanswered::Failed(format!("its answer is longer than {LONGEST_ANSWER} bytes")));
        }
        let (head, body) = Response::from(response).into_parts();
        let Some(status) = status_for_device(head.status) else {
            return Err(Unanswered::Failed(format!("it answered {}", head.status.as_u16())));
        };
        let is_theirs = status == head.status;
        let body = if is_theirs { Body::new(Streamed::new(body, place)) } else { Body::empty() };
        let mut answer = Response::new(body);
        *answer.status_mut() = status;
        if is_theirs {
            *answer.headers_mut() = outward::end_to_end(&head.headers);
            answer.headers_mut().remove(header::WWW_AUTHENTICATE);
        }
        Ok(answer)
    }

    fn url_of(&self, path: &RelativePath, query: Option<&str>) -> Url {
        let mut url = self.url.clone();
        // Not `join`, for which a colon in the first part would be a scheme's.
        url.set_path(&format!("{}/{}", self.url.path().trim_end_matches('/'), path.as_str()));
        match (self.url.query().filter(|own| !own.is_empty()), query) {
            (Some(own), Some(query)) => url.set_query(Some(&format!("{own}&{query}"))),
            (None, Some(query)) => url.set_query(Some(query)),
            (_, None) => {}
        }
        url
    }

    fn headers_of(&self, asked: &Asked) -> Result<HeaderMap, Unanswered> {
        let mut headers = outward::end_to_end(&asked.headers);
        let is_ours = |name: &HeaderName| {
            // Some servers take an underscore for a dash.
            let name = name.as_str().replace('_', "-");
            name.starts_with("x-enrollment-")
                || name == TRACE_ID.as_str()
                || self.proofs.iter().any(|proof| proof.as_str().replace('_', "-") == name)
                // Of the connection or of the encoded body.
                || matches!(name.as_str(), "host" | "content-length" | "content-encoding" | "expect")
        };
        let ours: Vec<HeaderName> = headers.keys().filter(|name| is_ours(name)).cloned().collect();
        for name in ours {
            headers.remove(name);
        }
        if !self.url.username().is_empty() || self.url.password().is_some() {
            // What stands in the operator's URL counts.
            headers.remove(header::AUTHORIZATION);
        }
        let value = |text: &str| HeaderValue::from_bytes(text.as_bytes()).map_err(|_| Unanswered::Failed("an id is no header's value".to_owned()));
        headers.insert(ENROLLMENT_ID, value(asked.enrollment.as_str())?);
        headers.insert(TRACE_ID, value(&asked.request_id)?);
        let mut hops: Vec<&[u8]> = asked.headers.get_all(FORWARDED_FOR).iter().map(HeaderValue::as_bytes).collect();
        let peer = asked.peer.to_canonical().to_string();
        hops.push(peer.as_bytes());
        if let Ok(hops) = HeaderValue::from_bytes(&hops.join(&b", "[..])) {
            headers.insert(FORWARDED_FOR, hops);
        }
        Ok(headers)
    }
}

/// What a device is told for the other server's status; `None`: that the other server failed.
///
/// 401 and 407 ask for credentials that a device has not got, and a 401 makes an MDM client remove its management when it comes from
/// where it talks MDM; the device loses nothing when it is told that the file is not to be had now. In the same way 403, which this server
/// says for a policy only, is told as 404. All else passes, redirects as well: a device may be sent to a file by a signed URL.
fn status_for_device(status: StatusCode) -> Option<StatusCode> {
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::PROXY_AUTHENTICATION_REQUIRED | StatusCode::SWITCHING_PROTOCOLS => None,
        StatusCode::FORBIDDEN => Some(StatusCode::NOT_FOUND),
        status => Some(status),
    }
}

/// The other server's body on its way, with its bounds. An error ends the device's connection, so that it does not take a part for the whole.
struct Streamed {
    body: reqwest::Body,
    left: u64,
    deadline: Pin<Box<Sleep>>,
    _place: Place,
}

impl Streamed {
    fn new(body: reqwest::Body, place: Place) -> Self {
        Self { body, left: LONGEST_ANSWER, deadline: Box::pin(tokio::time::sleep(PATIENCE)), _place: place }
    }
}

impl hyper::body::Body for Streamed {
    type Data = Bytes;
    type Error = Unanswered;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Unanswered>>> {
        if self.deadline.as_mut().poll(context).is_ready() {
            return Poll::Ready(Some(Err(Unanswered::Failed(format!("its answer did not end within {PATIENCE:?}")))));
        }
        let frame = match ready!(Pin::new(&mut self.body).poll_frame(context)) {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => return Poll::Ready(Some(Err(Unanswered::Failed(error.without_url().to_string())))),
            None => return Poll::Ready(None),
        };
        let length = u64::try_from(frame.data_ref().map_or(0, Bytes::len)).unwrap_or(u64::MAX);
        match self.left.checked_sub(length) {
            Some(left) => self.left = left,
            None => return Poll::Ready(Some(Err(Unanswered::Failed(format!("its answer is longer than {LONGEST_ANSWER} bytes"))))),
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(base: &str, path: &str, query: Option<&str>) -> String {
        let proxy = AuthProxy::new(&base.parse().unwrap(), None).unwrap();
        proxy.url_of(&RelativePath::parse(path).unwrap(), query).to_string()
    }

    #[test]
    fn paths_are_put_behind_the_base_and_queries_behind_its_own() {
        assert_eq!(url("http://files/base", "foo/bar", Some("q=1")), "http://files/base/foo/bar?q=1");
        assert_eq!(url("http://files/base/", "foo/", None), "http://files/base/foo/");
        assert_eq!(url("http://files", "", None), "http://files/");
        assert_eq!(url("http://files/?key=1", "a", Some("b=2")), "http://files/a?key=1&b=2");
        assert_eq!(url("http://files/base", "http:elsewhere/x", None), "http://files/base/http:elsewhere/x");
        assert_eq!(url("http://files/base", "@elsewhere", Some("u=//x#y")), "http://files/base/@elsewhere?u=//x%23y");
    }

    fn asked() -> Asked {
        Asked {
            method: Method::GET,
            path: RelativePath::parse("file").unwrap(),
            query: None,
            headers: HeaderMap::new(),
            body: Bytes::new(),
            peer: IpAddr::from([127, 0, 0, 1]),
            enrollment: EnrollmentId::new("A"),
            request_id: "r".to_owned(),
        }
    }

    #[tokio::test]
    async fn a_server_that_falls_silent_before_or_within_its_answer_is_given_up_and_its_place_is_free() {
        use http_body_util::BodyExt as _;
        use tokio::io::AsyncWriteExt as _;
        for beginning in ["", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\na part"] {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}/", listener.local_addr().unwrap()).parse().unwrap();
            let proxy = AuthProxy::with_pause(&url, None, Duration::from_millis(200)).unwrap();
            let silent = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                stream.write_all(beginning.as_bytes()).await.unwrap();
                std::future::pending::<()>().await;
            };
            let outcome = async {
                match proxy.forward(asked()).await {
                    Ok(answer) => answer.into_body().collect().await.map(|_| ()).map_err(|error| error.to_string()),
                    Err(error) => Err(error.to_string()),
                }
            };
            let outcome = tokio::select! {
                outcome = outcome => outcome,
                () = silent => unreachable!("it is silent for ever"),
            };
            assert!(outcome.is_err(), "{beginning}");
            assert!(proxy.places.are_free());
        }
    }
}
