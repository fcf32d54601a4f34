//! A client of the server's API.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use wasmdm_simulator::{Answer, Connection};

use crate::process::{API_KEY, ServerProcess};

/// One call with Basic authorization.
pub(crate) async fn call(server: &ServerProcess, method: Method, path: &str, body: impl Into<Bytes>) -> Answer {
    call_as(server, method, path, body, &basic("nanomdm", API_KEY)).await
}

/// One call with that `Authorization`; none if it is empty.
pub(crate) async fn call_as(server: &ServerProcess, method: Method, path: &str, body: impl Into<Bytes>, authorization: &str) -> Answer {
    let mut headers = HeaderMap::new();
    if !authorization.is_empty() {
        headers.insert(http::header::AUTHORIZATION, HeaderValue::from_str(authorization).unwrap());
    }
    Connection::to(&server.url()).unwrap().request(method, path.parse().unwrap(), headers, body.into()).await.unwrap()
}

pub(crate) fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

/// Queues a command without a push; it must be accepted.
pub(crate) async fn enqueue(server: &ServerProcess, ids: &str, uuid: &str, request_type: &str) {
    enqueue_at(&server.url(), ids, uuid, request_type).await;
}

/// [`enqueue`] at whichever server has that address.
pub(crate) async fn enqueue_at(url: &str, ids: &str, uuid: &str, request_type: &str) {
    enqueue_with(url, ids, uuid, request_type, "nopush=1").await;
}

pub(crate) async fn enqueue_with(url: &str, ids: &str, uuid: &str, request_type: &str, query: &str) {
    let document = wasmdm_simulator::message::command_document(uuid, request_type, plist::Dictionary::new()).unwrap();
    let mut headers = HeaderMap::new();
    headers.insert(http::header::AUTHORIZATION, HeaderValue::from_str(&basic("nanomdm", API_KEY)).unwrap());
    let path = format!("/v1/enqueue/{ids}?{query}").parse().unwrap();
    let answer = Connection::to(url).unwrap().request(Method::PUT, path, headers, document).await.unwrap();
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.excerpt());
}

pub(crate) fn text(answer: &Answer) -> String {
    String::from_utf8_lossy(&answer.body).into_owned()
}

pub(crate) fn json(answer: &Answer) -> serde_json::Value {
    serde_json::from_slice(&answer.body).unwrap()
}
