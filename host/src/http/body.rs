//! Bodies with a bound: each one, and all that are in flight together.

use std::io::Read as _;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;

use super::problem;

/// Check-ins (edge case 5).
pub const CHECK_IN_LIMIT: usize = 1 << 20;
/// Reports: an application list of a full Mac has many hundreds of kilobytes.
pub const REPORT_LIMIT: usize = 32 << 20;
/// Commands, which may carry a profile with pictures.
pub const COMMAND_LIMIT: usize = 16 << 20;
/// All bodies in flight together.
const BUDGET_KIB: usize = 256 << 10;
/// How long a body may pause.
const PAUSE: Duration = Duration::from_secs(20);
/// A whole body must have arrived by then: 32 MiB at the rate of a slow mobile connection.
const PATIENCE: Duration = Duration::from_mins(10);
/// A body that is thrown away must end by then.
const DRAIN_PATIENCE: Duration = Duration::from_mins(1);
/// Room for small bodies that large ones cannot take: check-ins and polls go on whatever else is in flight.
const RESERVED_KIB: usize = 32 << 10;
/// What counts as small.
const SMALL: usize = 64 << 10;
/// How much of a refused body is read and thrown away, so that the client can read the answer.
const DRAIN_LIMIT: usize = 1 << 30;
/// How a body of unknown length grows.
const SEGMENT: usize = 64 << 10;
/// How much larger than its compressed form a body may be.
const RATIO: usize = 100;

/// The memory that bodies may take together; clones share it.
#[derive(Debug, Clone)]
pub struct BodyBudget {
    kibibytes: Arc<Semaphore>,
    reserved: Arc<Semaphore>,
    drains: TaskTracker,
}

impl BodyBudget {
    /// A full budget; `tracker` waits at shutdown for bodies that are being thrown away.
    pub fn new(tracker: TaskTracker) -> Self {
        Self { kibibytes: Arc::new(Semaphore::new(BUDGET_KIB - RESERVED_KIB)), reserved: Arc::new(Semaphore::new(RESERVED_KIB)), drains: tracker }
    }

    fn take(&self, bytes: usize) -> Result<OwnedSemaphorePermit, BodyError> {
        let kibibytes = u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX);
        Arc::clone(&self.kibibytes).try_acquire_many_owned(kibibytes).map_err(|_| BodyError::Budget)
    }

    /// The share of a body that is still small.
    fn take_small(&self) -> Result<OwnedSemaphorePermit, BodyError> {
        let kibibytes = u32::try_from(SMALL / 1024).unwrap_or(u32::MAX);
        Arc::clone(&self.reserved).try_acquire_many_owned(kibibytes).or_else(|_| self.take(SMALL))
    }

    /// Reads and discards what is left of a body after the answer is on its way: a client that is still sending would otherwise lose
    /// its connection before it has read why it was refused.
    pub fn drain(&self, mut body: Body) {
        self.drains.spawn(async move {
            let discard = async {
                let mut left = DRAIN_LIMIT;
                while let Some(Ok(frame)) = body.frame().await {
                    left = match left.checked_sub(frame.data_ref().map_or(0, Bytes::len)) {
                        Some(left) => left,
                        None => return,
                    };
                }
            };
            // Whether it ended or not: the connection is closed after this.
            drop(tokio::time::timeout(DRAIN_PATIENCE, discard).await);
        });
    }
}

/// A body, and its share of the budget for as long as it is held.
#[derive(Debug)]
pub struct HeldBody {
    /// Decoded.
    pub bytes: Bytes,
    _share: Share,
}

/// What a body takes of the budget: a small part of its own, and as much more as it has really sent.
#[derive(Debug)]
struct Share {
    _small: OwnedSemaphorePermit,
    large: Option<OwnedSemaphorePermit>,
}

impl Share {
    /// Room for `length` bytes that are there; what was only announced takes nothing.
    fn grow(&mut self, budget: &BodyBudget, length: usize) -> Result<(), BodyError> {
        let held = self.large.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let missing = length.saturating_sub(SMALL).div_ceil(1024).saturating_sub(held);
        if missing == 0 {
            return Ok(());
        }
        // Whole segments, so that a body of many small frames does not ask for each.
        let more = budget.take(missing.saturating_mul(1024).max(SEGMENT))?;
        match &mut self.large {
            Some(large) => large.merge(more),
            None => self.large = Some(more),
        }
        Ok(())
    }
}

/// Why a body was not read.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// 413.
    #[error("the body is larger than {limit} bytes")]
    TooLarge {
        /// In bytes.
        limit: usize,
    },
    /// 503.
    #[error("too many large bodies are in flight")]
    Budget,
    /// 408 would be the client's word; the connection is of no more use.
    #[error("the body paused for {PAUSE:?}, or did not end within {PATIENCE:?}")]
    Slow,
    /// 400.
    #[error("{0}")]
    Broken(String),
    /// 415.
    #[error("Content-Encoding `{0}` is not supported: send gzip, deflate or none")]
    Encoding(String),
}

impl BodyError {
    /// The answer, the same for devices and the API.
    pub fn response(&self) -> Response {
        match self {
            Self::TooLarge { .. } => problem::plain(StatusCode::PAYLOAD_TOO_LARGE, "Request Entity Too Large"),
            Self::Budget => problem::unavailable("try again later", Duration::from_secs(5)),
            Self::Slow | Self::Broken(_) => problem::plain(StatusCode::BAD_REQUEST, "Bad Request"),
            Self::Encoding(_) => problem::plain(StatusCode::UNSUPPORTED_MEDIA_TYPE, "Unsupported Media Type"),
        }
    }
}

/// Reads a body of at most `limit` bytes, decoded. With a Content-Length beyond it nothing is read; what is left is drained.
pub async fn read(budget: &BodyBudget, headers: &HeaderMap, mut body: Body, limit: usize) -> Result<HeldBody, BodyError> {
    let outcome = receive(budget, headers, &mut body, limit).await;
    if outcome.is_err() {
        budget.drain(body);
    }
    let (bytes, share) = outcome?;
    decode(budget, headers, bytes, share, limit).await
}

/// Takes in and throws away the body of a request that is refused in any case. A body that is too large is told so whoever sends it, and
/// no client finds its connection gone before it has read the answer.
pub async fn discard(budget: &BodyBudget, headers: &HeaderMap, mut body: Body, limit: usize) -> Result<(), BodyError> {
    let outcome = if announced(headers).is_some_and(|length| length > limit) {
        Err(BodyError::TooLarge { limit })
    } else {
        let discard = async {
            let mut length = 0_usize;
            while let Some(frame) = tokio::time::timeout(PAUSE, body.frame()).await.map_err(|_| BodyError::Slow)? {
                let frame = frame.map_err(|error| BodyError::Broken(format!("the body broke off: {error}")))?;
                length = length.saturating_add(frame.data_ref().map_or(0, Bytes::len));
                if length > limit {
                    return Err(BodyError::TooLarge { limit });
                }
            }
            Ok(())
        };
        tokio::time::timeout(DRAIN_PATIENCE, discard).await.unwrap_or(Err(BodyError::Slow))
    };
    if outcome.is_err() {
        budget.drain(body);
    }
    outcome
}

fn announced(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()).and_then(|value| value.parse().ok())
}

async fn receive(budget: &BodyBudget, headers: &HeaderMap, body: &mut Body, limit: usize) -> Result<(Bytes, Share), BodyError> {
    let announced = announced(headers);
    if announced.is_some_and(|length| length > limit) {
        return Err(BodyError::TooLarge { limit });
    }
    let mut share = Share { _small: budget.take_small()?, large: None };
    let receive = async {
        // Grown by segments: doubling a buffer takes three times the memory of the body.
        let mut segments = Vec::new();
        let mut segment = BytesMut::with_capacity(announced.unwrap_or(SEGMENT).min(SEGMENT));
        let mut length = 0;
        while let Some(frame) = tokio::time::timeout(PAUSE, body.frame()).await.map_err(|_| BodyError::Slow)? {
            let frame = frame.map_err(|error| BodyError::Broken(format!("the body broke off: {error}")))?;
            let Ok(data) = frame.into_data() else { continue };
            length += data.len();
            if length > limit {
                return Err(BodyError::TooLarge { limit });
            }
            share.grow(budget, length)?;
            if segment.len() + data.len() > segment.capacity() {
                segments.push(std::mem::replace(&mut segment, BytesMut::with_capacity(SEGMENT.max(data.len()))).freeze());
            }
            segment.extend_from_slice(&data);
        }
        if segments.is_empty() {
            return Ok(segment.freeze());
        }
        segments.push(segment.freeze());
        Ok(segments.concat().into())
    };
    let bytes = tokio::time::timeout(PATIENCE, receive).await.map_err(|_| BodyError::Slow)??;
    Ok((bytes, share))
}

/// Undoes a Content-Encoding; a device signs what it encoded, so everything after this sees only the decoded bytes (edge case 6).
async fn decode(budget: &BodyBudget, headers: &HeaderMap, bytes: Bytes, mut share: Share, limit: usize) -> Result<HeldBody, BodyError> {
    let encoding = headers.get(header::CONTENT_ENCODING).map(|value| String::from_utf8_lossy(value.as_bytes()).trim().to_ascii_lowercase());
    let reader: fn(&[u8]) -> Box<dyn std::io::Read + '_> = match encoding.as_deref() {
        None | Some("" | "identity") => return Ok(HeldBody { bytes, _share: share }),
        Some("gzip" | "x-gzip") => |bytes| Box::new(flate2::read::MultiGzDecoder::new(bytes)),
        Some("deflate") => |bytes| Box::new(flate2::read::ZlibDecoder::new(bytes)),
        Some(other) => return Err(BodyError::Encoding(other.chars().take(40).collect())),
    };
    let most = limit.min(bytes.len().saturating_mul(RATIO));
    share.grow(budget, most)?;
    let decoded = tokio::task::spawn_blocking(move || {
        let mut decoded = Vec::new();
        reader(&bytes)
            .take(u64::try_from(most).unwrap_or(u64::MAX).saturating_add(1))
            .read_to_end(&mut decoded)
            .map_err(|error| BodyError::Broken(format!("the body could not be decompressed: {error}")))?;
        if decoded.len() > most { Err(BodyError::TooLarge { limit: most }) } else { Ok(decoded) }
    })
    .await
    .map_err(|_| BodyError::Broken("the body could not be decompressed".to_owned()))??;
    Ok(HeldBody { bytes: decoded.into(), _share: share })
}
