//! A GOAWAY that names the last stream and means it. The HTTP/2 library only announces the end and then serves everything that arrives;
//! Apple does not. So the frames are watched between TLS and the library: the GOAWAY is put in between two frames, and the requests behind
//! it never reach the library.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BufMut as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;

const PREFACE: usize = 24;
const HEADER: usize = 9;
const HEADERS: u8 = 1;
const GO_AWAY: u8 = 7;

/// Ends a connection by GOAWAY.
#[derive(Debug)]
pub(super) struct Ending {
    /// So many requests more.
    left: AtomicU32,
    /// The last request that came through.
    last: AtomicU32,
    begun: AtomicBool,
    announced: AtomicBool,
    announcement: Notify,
    dismissal: OnceLock<String>,
}

impl Ending {
    pub(super) fn after(requests: Option<u32>) -> Self {
        Self {
            left: AtomicU32::new(requests.unwrap_or(u32::MAX)),
            last: AtomicU32::new(0),
            begun: AtomicBool::new(false),
            announced: AtomicBool::new(false),
            announcement: Notify::new(),
            dismissal: OnceLock::new(),
        }
    }

    /// Lets no further request through.
    pub(super) fn begin(&self) {
        self.begun.store(true, Ordering::Relaxed);
    }

    /// Lets no further request through, and disowns those that came.
    pub(super) fn dismiss(&self, reason: String) {
        // The first reason stays.
        let _ = self.dismissal.set(reason);
        self.begin();
    }

    /// Whether the client has been told.
    pub(super) fn is_announced(&self) -> bool {
        self.announced.load(Ordering::Relaxed)
    }

    /// Returns when the client is told, once.
    pub(super) async fn announcement(&self) {
        self.announcement.notified().await;
    }

    /// Whether this frame's stream is served.
    fn admits(&self, kind: u8, stream: u32) -> bool {
        let last = self.last.load(Ordering::Relaxed);
        if stream == 0 || stream <= last {
            return true;
        }
        if self.begun.load(Ordering::Relaxed) {
            return false;
        }
        if kind == HEADERS {
            self.last.store(stream, Ordering::Relaxed);
            if self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
                self.begin();
            }
        }
        true
    }
}

/// Finds the frames in a stream of bytes.
#[derive(Debug, Default)]
struct Boundaries {
    header: BytesMut,
    /// What is left of the current frame.
    left: usize,
}

impl Boundaries {
    /// How many of these bytes belong to the current frame; the header of the next one once it is whole.
    fn step<'a>(&mut self, bytes: &mut &'a [u8]) -> Step<'a> {
        if self.left > 0 {
            let (frame, rest) = bytes.split_at(self.left.min(bytes.len()));
            self.left -= frame.len();
            *bytes = rest;
            return Step::Payload(frame);
        }
        let (part, rest) = bytes.split_at((HEADER - self.header.len()).min(bytes.len()));
        self.header.extend_from_slice(part);
        *bytes = rest;
        if self.header.len() < HEADER {
            return Step::Nothing;
        }
        let mut header = self.header.split();
        let whole = header.clone();
        let (high, low) = (header.get_u8(), header.get_u16());
        self.left = (usize::from(high) << 16) | usize::from(low);
        let kind = header.get_u8();
        let _flags = header.get_u8();
        Step::Header { bytes: whole, kind, stream: header.get_u32() & 0x7FFF_FFFF }
    }

    fn is_between(&self) -> bool {
        self.left == 0 && self.header.is_empty()
    }
}

enum Step<'a> {
    Nothing,
    Header { bytes: BytesMut, kind: u8, stream: u32 },
    Payload(&'a [u8]),
}

/// A TLS stream whose frames are watched.
#[derive(Debug)]
pub(super) struct Frames<S> {
    inner: S,
    ending: Arc<Ending>,
    preface: usize,
    incoming: Boundaries,
    admitted: bool,
    ready: BytesMut,
    outgoing: Boundaries,
    notice: BytesMut,
}

impl<S> Frames<S> {
    pub(super) fn new(inner: S, ending: Arc<Ending>) -> Self {
        Self {
            inner,
            ending,
            preface: PREFACE,
            incoming: Boundaries::default(),
            admitted: true,
            ready: BytesMut::new(),
            outgoing: Boundaries::default(),
            notice: BytesMut::new(),
        }
    }

    fn take(&mut self, mut bytes: &[u8]) {
        let (preface, rest) = bytes.split_at(self.preface.min(bytes.len()));
        self.preface -= preface.len();
        self.ready.extend_from_slice(preface);
        bytes = rest;
        while !bytes.is_empty() {
            match self.incoming.step(&mut bytes) {
                Step::Header { bytes: header, kind, stream } => {
                    self.admitted = self.ending.admits(kind, stream);
                    if self.admitted {
                        self.ready.extend_from_slice(&header);
                    }
                }
                Step::Payload(part) if self.admitted => self.ready.extend_from_slice(part),
                Step::Payload(_) | Step::Nothing => {}
            }
        }
    }

    /// Makes the notice ready, once.
    fn announce(&mut self) {
        if self.ending.begun.load(Ordering::Relaxed) && self.outgoing.is_between() && !self.ending.announced.swap(true, Ordering::Relaxed) {
            let dismissal = self.ending.dismissal.get();
            let last = if dismissal.is_some() { 0 } else { self.ending.last.load(Ordering::Relaxed) };
            let data = serde_json::json!({ "reason": dismissal.map_or("Shutdown", String::as_str) }).to_string();
            let length = u16::try_from(8 + data.len()).unwrap_or_default();
            self.notice.put_u8(0);
            self.notice.put_u16(length);
            self.notice.put_slice(&[GO_AWAY, 0, 0, 0, 0, 0]);
            self.notice.put_u32(last);
            self.notice.put_u32(0);
            self.notice.put_slice(data.as_bytes());
            self.ending.announcement.notify_one();
        }
    }
}

impl<S: AsyncWrite + Unpin> Frames<S> {
    fn poll_notice(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.announce();
        while !self.notice.is_empty() {
            let written = ready!(Pin::new(&mut self.inner).poll_write(context, &self.notice))?;
            self.notice.advance(written);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Frames<S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.ready.is_empty() {
            let mut space = [0; 8192];
            let mut read = ReadBuf::new(&mut space);
            ready!(Pin::new(&mut this.inner).poll_read(context, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.take(read.filled());
        }
        let part = this.ready.split_to(buffer.remaining().min(this.ready.len()));
        buffer.put_slice(&part);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Frames<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_notice(context))?;
        let written = ready!(Pin::new(&mut this.inner).poll_write(context, bytes))?;
        let mut passed = bytes.get(..written).unwrap_or(bytes);
        while !passed.is_empty() {
            this.outgoing.step(&mut passed);
        }
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_notice(context))?;
        Pin::new(&mut this.inner).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(context)
    }
}
