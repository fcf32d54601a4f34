//! Bodies with a bound: each one, and all that are in flight together.

use std::collections::HashMap;
use std::io::Read as _;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
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
/// As on a slow mobile connection, on which a body of 32 MiB takes 68 minutes.
const PACE: Pace = Pace { pause: Duration::from_secs(20), start: Duration::from_secs(15), rate: 8 << 10, lead: Duration::from_mins(10) };
/// Bodies of one certificate that are on their way. A certificate is no secret: whoever has a copy of one could otherwise let bodies
/// trickle in until there is no room for anybody's.
const OF_A_CERTIFICATE: usize = 16;
/// A body that is not kept, but seen to its end, must end by then.
const TO_END: Duration = Duration::from_hours(4);
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

/// How fast a body must come.
#[derive(Debug, Clone, Copy)]
struct Pace {
    /// Between two parts of it.
    pause: Duration,
    /// A small body must be there by then; a longer one has a second more for each `rate` bytes that have come.
    start: Duration,
    rate: u32,
    /// No more than this is earned ahead: whoever sends nearly all of a long body at once would otherwise hold its room for an hour.
    lead: Duration,
}

/// How a body comes.
#[derive(Debug)]
struct Arrival {
    pace: Pace,
    /// When it is too slow, if nothing more comes.
    due: Mutex<Instant>,
    /// It has given way to others.
    over: CancellationToken,
}

impl Arrival {
    fn begin(pace: Pace, now: Instant) -> Self {
        Self { pace, due: Mutex::new(now + pace.start), over: CancellationToken::new() }
    }

    fn came(&self, bytes: usize, now: Instant) {
        let earned = Duration::from_secs(u64::try_from(bytes).unwrap_or(u64::MAX)) / self.pace.rate;
        let mut due = self.due.lock();
        *due = due.checked_add(earned).map_or(now + self.pace.lead, |due| due.min(now + self.pace.lead));
    }

    fn due(&self) -> Instant {
        *self.due.lock()
    }

    /// Until when the next part must come.
    fn deadline(&self, now: Instant) -> Instant {
        self.due().min(now + self.pace.pause)
    }
}

/// The memory that bodies may take together; clones share it.
#[derive(Debug, Clone)]
pub struct BodyBudget {
    kibibytes: Arc<Semaphore>,
    reserved: Arc<Semaphore>,
    drains: TaskTracker,
    pace: Pace,
    /// By the SHA-256 of their certificate, the oldest first; holds only those that are on their way.
    turns: Arc<Mutex<HashMap<[u8; 32], Turns>>>,
}

impl BodyBudget {
    /// A full budget; `tracker` waits at shutdown for bodies that are being thrown away.
    pub fn new(tracker: TaskTracker) -> Self {
        Self {
            kibibytes: Arc::new(Semaphore::new(BUDGET_KIB - RESERVED_KIB)),
            reserved: Arc::new(Semaphore::new(RESERVED_KIB)),
            drains: tracker,
            pace: PACE,
            turns: Arc::default(),
        }
    }

    /// A place among the bodies of that certificate. Not the newest gives way, but the one that is the next to be too slow: a device whose
    /// certificate somebody has copied is served all the same, as its small bodies take no time and its long ones keep coming.
    fn turn(&self, certificate: [u8; 32]) -> Turn {
        let arrival = Arc::new(Arrival::begin(self.pace, Instant::now()));
        let mut turns = self.turns.lock();
        let of_it = turns.entry(certificate).or_default();
        if of_it.len() >= OF_A_CERTIFICATE
            && let Some(slowest) = of_it.iter().enumerate().min_by_key(|(_, other)| other.due()).map(|(place, _)| place)
        {
            of_it.remove(slowest).over.cancel();
        }
        of_it.push(Arc::clone(&arrival));
        Turn { certificate, arrival, budget: self.clone() }
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

/// The bodies of a certificate.
type Turns = Vec<Arc<Arrival>>;

/// One body's place among those of its certificate.
#[derive(Debug)]
struct Turn {
    certificate: [u8; 32],
    arrival: Arc<Arrival>,
    budget: BodyBudget,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut turns = self.budget.turns.lock();
        if let Some(of_it) = turns.get_mut(&self.certificate) {
            of_it.retain(|other| !Arc::ptr_eq(other, &self.arrival));
            if of_it.is_empty() {
                turns.remove(&self.certificate);
            }
        }
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
    #[error("the body paused for too long, or came too slowly")]
    Slow,
    /// 503.
    #[error("more than {OF_A_CERTIFICATE} bodies of the certificate were on their way, and this was the slowest")]
    GaveWay,
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
            Self::Budget | Self::GaveWay => problem::unavailable("try again later", Duration::from_secs(5)),
            Self::Slow | Self::Broken(_) => problem::plain(StatusCode::BAD_REQUEST, "Bad Request"),
            Self::Encoding(_) => problem::plain(StatusCode::UNSUPPORTED_MEDIA_TYPE, "Unsupported Media Type"),
        }
    }
}

/// A body that was not taken, and why.
#[derive(Debug)]
pub struct Refused {
    pub error: BodyError,
    unread: Option<Unread>,
}

/// What has come of a body, and its share of the budget for as long as that is held.
#[derive(Debug, Default)]
struct Received {
    parts: Vec<Bytes>,
    share: Option<Share>,
}

/// What came of it, and the rest.
#[derive(Debug)]
struct Unread {
    received: Received,
    body: Body,
    arrival: Arc<Arrival>,
    _turn: Option<Turn>,
}

impl Refused {
    /// Hands on the body that is not kept, in the parts in which it comes, and as it is on the wire. `false`: it did not come to its end in
    /// time, or is longer than anything that is waited for.
    pub async fn to_end(&mut self, mut each: impl FnMut(&[u8])) -> bool {
        let Some(Unread { received, body, arrival, .. }) = &mut self.unread else { return false };
        let mut length = 0_usize;
        for part in received.parts.drain(..) {
            each(&part);
            length = length.saturating_add(part.len());
            // Together they may be many megabytes.
            tokio::task::yield_now().await;
        }
        received.share = None;
        let rest = async {
            while let Ok(frame) = next(body, arrival).await {
                let Some(data) = frame else { return true };
                length = length.saturating_add(data.len());
                if length > DRAIN_LIMIT {
                    break;
                }
                each(&data);
            }
            false
        };
        tokio::select! {
            whole = tokio::time::timeout(TO_END, rest) => whole.unwrap_or(false),
            () = arrival.over.cancelled() => false,
        }
    }

    /// Leaves it to be thrown away.
    pub fn drain(self, budget: &BodyBudget) -> BodyError {
        if let Some(unread) = self.unread {
            budget.drain(unread.body);
        }
        self.error
    }
}

/// Reads a body of at most `limit` bytes, decoded. With a Content-Length beyond it nothing is read; what is left is drained.
pub async fn read(budget: &BodyBudget, headers: &HeaderMap, body: Body, limit: usize) -> Result<HeldBody, BodyError> {
    take(budget, headers, body, limit, None).await.map_err(|refused| refused.drain(budget))
}

/// The same for who has a certificate, proved or only claimed. What is refused can still be looked at.
pub async fn read_of(budget: &BodyBudget, certificate: &[u8; 32], headers: &HeaderMap, body: Body, limit: usize) -> Result<HeldBody, Refused> {
    take(budget, headers, body, limit, Some(budget.turn(*certificate))).await
}

async fn take(budget: &BodyBudget, headers: &HeaderMap, mut body: Body, limit: usize, turn: Option<Turn>) -> Result<HeldBody, Refused> {
    let mut received = Received::default();
    let arrival = turn.as_ref().map_or_else(|| Arc::new(Arrival::begin(budget.pace, Instant::now())), |turn| Arc::clone(&turn.arrival));
    let outcome = tokio::select! {
        outcome = receive(budget, headers, &mut body, &arrival, limit, &mut received) => outcome,
        () = arrival.over.cancelled() => Err(BodyError::GaveWay),
    };
    let (mut parts, share) = match (outcome, received) {
        (Ok(()), Received { parts, share: Some(share) }) => (parts, share),
        // What was received has a share.
        (Ok(()), Received { share: None, .. }) => return Err(Refused { error: BodyError::Budget, unread: None }),
        (Err(error), received) => return Err(Refused { error, unread: Some(Unread { received, body, arrival, _turn: turn }) }),
    };
    drop(turn);
    let bytes = if parts.len() > 1 { parts.concat().into() } else { parts.pop().unwrap_or_default() };
    decode(budget, headers, bytes, share, limit).await.map_err(|error| Refused { error, unread: None })
}

/// The next part of a body.
async fn next(body: &mut Body, arrival: &Arrival) -> Result<Option<Bytes>, BodyError> {
    let deadline = arrival.deadline(Instant::now());
    loop {
        match tokio::time::timeout_at(deadline, body.frame()).await.map_err(|_| BodyError::Slow)? {
            None => return Ok(None),
            Some(Err(error)) => return Err(BodyError::Broken(format!("the body broke off: {error}"))),
            // Trailers say nothing here.
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    arrival.came(data.len(), Instant::now());
                    return Ok(Some(data));
                }
            }
        }
    }
}

/// Takes in and throws away the body of a request that is refused in any case. A body that is too large is told so whoever sends it, and
/// no client finds its connection gone before it has read the answer.
pub async fn discard(budget: &BodyBudget, headers: &HeaderMap, mut body: Body, limit: usize) -> Result<(), BodyError> {
    let outcome = if announced(headers).is_some_and(|length| length > limit) {
        Err(BodyError::TooLarge { limit })
    } else {
        let discard = async {
            let mut length = 0_usize;
            while let Some(frame) = tokio::time::timeout(PACE.pause, body.frame()).await.map_err(|_| BodyError::Slow)? {
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

/// Puts what comes into `received`, also what is too much. Grown by segments: doubling a buffer takes three times the memory of the body.
async fn receive(
    budget: &BodyBudget,
    headers: &HeaderMap,
    body: &mut Body,
    arrival: &Arrival,
    limit: usize,
    received: &mut Received,
) -> Result<(), BodyError> {
    let announced = announced(headers);
    if announced.is_some_and(|length| length > limit) {
        return Err(BodyError::TooLarge { limit });
    }
    let Received { parts, share } = received;
    let share = share.insert(Share { _small: budget.take_small()?, large: None });
    let mut segment = BytesMut::with_capacity(announced.unwrap_or(SEGMENT).min(SEGMENT));
    let mut length = 0;
    while let Some(data) = next(body, arrival).await? {
        length += data.len();
        if length <= limit {
            share.grow(budget, length)?;
        }
        if segment.len() + data.len() > segment.capacity() {
            parts.push(std::mem::replace(&mut segment, BytesMut::with_capacity(SEGMENT.max(data.len()))).freeze());
        }
        segment.extend_from_slice(&data);
        if length > limit {
            parts.push(segment.freeze());
            return Err(BodyError::TooLarge { limit });
        }
    }
    parts.push(segment.freeze());
    Ok(())
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

#[cfg(test)]
mod tests {
    use futures_util::stream::{self, FuturesUnordered, StreamExt as _};

    use super::*;

    /// Whatever takes longer than this does not come at all.
    const LONG: Duration = Duration::from_secs(20);

    fn budget(start: Duration) -> BodyBudget {
        BodyBudget { pace: Pace { start, ..PACE }, ..BodyBudget::new(TaskTracker::new()) }
    }

    /// A body whose first part comes, and no other.
    fn unfinished(part: &'static [u8]) -> Body {
        Body::from_stream(stream::once(async move { Ok::<_, std::io::Error>(Bytes::from_static(part)) }).chain(stream::pending()))
    }

    /// A few thousand slow bodies took all the room there is for ten minutes.
    #[tokio::test]
    async fn a_small_body_that_does_not_come_is_given_up_soon() {
        let budget = budget(Duration::from_millis(100));
        let outcome = tokio::time::timeout(LONG, read(&budget, &HeaderMap::new(), unfinished(b"x"), CHECK_IN_LIMIT)).await;
        assert!(matches!(outcome.expect("it is still waited for"), Err(BodyError::Slow)));
        assert_eq!(budget.reserved.available_permits(), RESERVED_KIB);
    }

    /// Nothing had more than ten minutes, so that a report which was too large for them came again for ever.
    #[test]
    fn a_long_body_has_the_time_that_it_needs() {
        const PART: usize = 8 << 10;
        let begin = Instant::now();
        let arrival = Arrival::begin(PACE, begin);
        let after = |seconds: u64| begin + Duration::from_secs(seconds);
        assert_eq!(arrival.deadline(begin), after(15));
        // As slow as may be, as long as what is kept and longer.
        for second in 1..=(2 * REPORT_LIMIT / PART) as u64 {
            assert!(after(second) < arrival.deadline(after(second - 1)), "given up after {second} s");
            arrival.came(PART, after(second));
        }
        // What comes at once is not enough to be silent, nor to trickle for as long as all of it may take.
        let fast = Arrival::begin(PACE, begin);
        fast.came(REPORT_LIMIT, begin);
        assert_eq!((fast.deadline(begin), fast.due()), (after(20), after(600)));
    }

    /// Whoever had a copy of one certificate, which is no secret, could hold the room of the whole fleet.
    #[tokio::test]
    async fn of_very_many_bodies_of_one_certificate_the_slowest_gives_way() {
        let budget = budget(LONG * 2);
        let headers = HeaderMap::new();
        let mut slow: FuturesUnordered<_> =
            (0..OF_A_CERTIFICATE).map(|_| read_of(&budget, &[1; 32], &headers, unfinished(b"x"), CHECK_IN_LIMIT)).collect();
        let mut anothers: FuturesUnordered<_> = [read_of(&budget, &[2; 32], &headers, unfinished(b"x"), CHECK_IN_LIMIT)].into_iter().collect();
        tokio::select! {
            biased;
            _ = slow.next() => panic!("there is room for all of them"),
            _ = anothers.next() => panic!("it is not there yet"),
            () = async {} => {}
        }
        // The device itself, whose body is there at once.
        let whole = read_of(&budget, &[1; 32], &headers, Body::from("whole"), CHECK_IN_LIMIT).await;
        assert_eq!(whole.unwrap().bytes, "whole");
        let first = tokio::time::timeout(LONG, slow.next()).await.expect("none gave way").unwrap();
        assert!(matches!(first, Err(Refused { error: BodyError::GaveWay, .. })));
        tokio::select! {
            biased;
            _ = slow.next() => panic!("one is enough"),
            _ = anothers.next() => panic!("another certificate has nothing to do with it"),
            () = async {} => {}
        }
        drop((first, slow, anothers));
        assert!(budget.turns.lock().is_empty());
    }

    /// Sixteen newer requests with a copied certificate, each with one byte and then silent, ended the device's long report again and again.
    #[tokio::test]
    async fn a_long_body_that_keeps_coming_does_not_give_way_to_newer_ones_that_do_not() {
        let budget = budget(LONG * 2);
        let headers = HeaderMap::new();
        let (sender, parts) = tokio::sync::mpsc::channel::<Result<Bytes, std::io::Error>>(4);
        let parts = stream::unfold(parts, async |mut parts| parts.recv().await.map(|part| (part, parts)));
        let mut report = Box::pin(read_of(&budget, &[1; 32], &headers, Body::from_stream(parts), REPORT_LIMIT));
        for _ in 0..3 {
            sender.send(Ok(Bytes::from(vec![b'x'; SEGMENT]))).await.unwrap();
        }
        assert!(futures_util::poll!(&mut report).is_pending());
        let mut silent = FuturesUnordered::new();
        for newer in 0..3 * OF_A_CERTIFICATE {
            silent.push(read_of(&budget, &[1; 32], &headers, unfinished(b"x"), CHECK_IN_LIMIT));
            // Those that give way are done with.
            while let std::task::Poll::Ready(Some(outcome)) = futures_util::poll!(silent.next()) {
                assert!(matches!(outcome, Err(Refused { error: BodyError::GaveWay, .. })));
            }
            assert!(futures_util::poll!(&mut report).is_pending(), "it gave way to {newer} newer ones");
        }
        assert_eq!(silent.len(), OF_A_CERTIFICATE - 1);
        sender.send(Ok(Bytes::from_static(b"end"))).await.unwrap();
        drop(sender);
        assert_eq!(report.await.unwrap().bytes.len(), 3 * SEGMENT + 3);
    }

    #[tokio::test]
    async fn a_body_that_is_too_large_can_be_seen_to_its_end() {
        let budget = budget(LONG);
        for announced in [None, Some("13")] {
            let mut headers = HeaderMap::new();
            headers.extend(announced.map(|length| (header::CONTENT_LENGTH, header::HeaderValue::from_static(length))));
            let parts = ["one ", "two ", "three"].map(Ok::<_, std::io::Error>);
            let body = Body::from_stream(stream::iter(parts));
            let mut refused = read_of(&budget, &[1; 32], &headers, body, 6).await.unwrap_err();
            assert!(matches!(refused.error, BodyError::TooLarge { limit: 6 }));
            let mut seen = Vec::new();
            assert!(refused.to_end(|part| seen.extend_from_slice(part)).await);
            assert_eq!(seen, b"one two three", "{announced:?}");
        }
    }
}
