//! Whoever answers declarative management, behind a trait.

use bytes::Bytes;
use futures_util::future::BoxFuture;
use wasmdm_protocol::declarative_management::EndpointPath;
use wasmdm_protocol::enrollment::Enrollment;

use crate::reply::Refusal;

/// A server of declarations.
pub trait DeclarativeManagement: std::fmt::Debug + Send + Sync + 'static {
    /// Answers one request. Whatever is wrong on the way is [`Refusal::Unavailable`]: the device asks again.
    fn answer<'a>(&'a self, request: &'a EndpointRequest) -> BoxFuture<'a, Result<Answer, Refusal>>;
}

/// What a device asks.
#[derive(Debug)]
pub struct EndpointRequest {
    /// Of the device or the user.
    pub enrollment: Enrollment,
    /// Where.
    pub path: EndpointPath,
    /// The JSON of a status report; without it the device wants to read.
    pub data: Option<Bytes>,
    /// Of the device's request: the same in all logs.
    pub request_id: String,
}

/// What the device is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// JSON.
    Document(Bytes),
    /// 204.
    NoContent,
    /// 404: there is no such declaration.
    NotFound,
}
