//! One HTTP/1.1 connection of a device, kept alive between messages as devices keep theirs.
//!
//! hyper is used directly and driven by the caller's own task: no pool, no further tasks, little CPU of its own beside the server
//! that is measured.

use std::future::{Future as _, poll_fn};
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::canary;
use crate::error::SimulatorError;
use crate::measure::Tally;

/// The largest answer that is read.
const ANSWER_LIMIT: usize = 64 * 1024 * 1024;

/// Where a server listens, and the paths that devices use there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    authority: String,
    host: HeaderValue,
    reports: Uri,
    check_ins: Uri,
}

impl Target {
    /// Reads `http://HOST[:PORT][/PATH][?QUERY]`; without a path it is `/mdm`. Both kinds of message go to the same path, as they do
    /// for a profile without `CheckInURL`.
    ///
    /// There is no TLS here: devices meet the server's own listener.
    pub fn parse(url: &str) -> Result<Self, SimulatorError> {
        let wrong = |problem: String| SimulatorError::Argument { name: "url", problem };
        let uri: Uri = url.parse().map_err(|error| wrong(format!("`{url}` is no URL: {error}")))?;
        if uri.scheme_str() != Some("http") {
            return Err(wrong(format!("`{url}` must begin with http:// (simulated devices speak without TLS)")));
        }
        let authority = uri.authority().ok_or_else(|| wrong(format!("`{url}` names no host")))?;
        if authority.as_str().contains('@') {
            return Err(wrong("a user in the URL is not supported".into()));
        }
        let host = HeaderValue::from_str(authority.as_str()).map_err(|error| wrong(error.to_string()))?;
        let path = match uri.path_and_query() {
            Some(path) if path.as_str() != "/" => path.as_str(),
            _ => "/mdm",
        };
        let path: Uri = path.parse().map_err(|_| wrong("unusable path".into()))?;
        let port = authority.port_u16().unwrap_or(80);
        Ok(Self { authority: format!("{}:{port}", authority.host()), host, reports: path.clone(), check_ins: path })
    }

    /// The same server, with check-ins at another path (`CheckInURL`).
    pub fn with_check_in_path(mut self, path: &str) -> Result<Self, SimulatorError> {
        self.check_ins = path.parse().map_err(|error| SimulatorError::Argument { name: "check-in path", problem: format!("`{path}`: {error}") })?;
        Ok(self)
    }

    /// Host and port.
    pub fn server(&self) -> &str {
        &self.authority
    }

    /// The path of check-ins, or that of reports.
    pub fn path(&self, is_check_in: bool) -> &Uri {
        if is_check_in { &self.check_ins } else { &self.reports }
    }
}

/// A whole answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// HTTP status.
    pub status: StatusCode,
    /// Header fields.
    pub headers: HeaderMap,
    /// The body, complete.
    pub body: Bytes,
}

impl Answer {
    /// The beginning of the body, for a message to a person.
    pub fn excerpt(&self) -> String {
        let text = String::from_utf8_lossy(self.body.get(..200).unwrap_or(&self.body)).into_owned();
        text.trim_end().to_owned()
    }
}

struct Open {
    sender: http1::SendRequest<Full<Bytes>>,
    driver: Pin<Box<http1::Connection<TokioIo<TcpStream>, Full<Bytes>>>>,
}

/// A connection that opens itself when it is needed, and again after it broke.
pub struct Connection {
    target: Target,
    timeout: Duration,
    open: Option<Open>,
    opened: u64,
    tally: Option<Box<Tally>>,
    due: Option<Instant>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("server", &self.target.authority).field("open", &self.open.is_some()).finish_non_exhaustive()
    }
}

impl Connection {
    /// A connection to `target`; nothing is opened yet. An answer may take a minute.
    pub fn new(target: Target) -> Self {
        Self { target, timeout: Duration::from_mins(1), open: None, opened: 0, tally: None, due: None }
    }

    /// A connection to the server at this URL.
    pub fn to(url: &str) -> Result<Self, SimulatorError> {
        Ok(Self::new(Target::parse(url)?))
    }

    /// The same connection, with another limit for one exchange.
    #[must_use]
    pub const fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Where it leads.
    pub const fn target(&self) -> &Target {
        &self.target
    }

    /// How many times it was opened.
    pub const fn opened(&self) -> u64 {
        self.opened
    }

    /// Begins to measure anew; answers what was measured so far.
    pub fn measure(&mut self) -> Tally {
        self.tally.replace(Box::default()).map_or_else(Tally::default, |tally| *tally)
    }

    /// The next request was due at this moment: its latency counts from then, so that a slow server does not hide the requests that it
    /// kept from being sent.
    pub const fn due(&mut self, moment: Instant) {
        self.due = Some(moment);
    }

    /// Closes it; the next request opens it again.
    pub fn close(&mut self) {
        self.open = None;
    }

    /// Sends one request and reads the whole answer. `Host` is added; after any failure the connection is closed.
    ///
    /// A request that meets a kept-alive connection which the server has just closed is not sent again: whether the server saw it is
    /// not known. The caller decides.
    pub async fn request(&mut self, method: Method, path: Uri, mut headers: HeaderMap, body: Bytes) -> Result<Answer, SimulatorError> {
        headers.insert(http::header::HOST, self.target.host.clone());
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = path;
        *request.headers_mut() = headers;

        let limit = self.timeout;
        let begin = self.due.take().unwrap_or_else(Instant::now);
        let outcome = match tokio::time::timeout(limit, self.exchange(request)).await {
            Ok(Ok(answer)) => without_secrets(answer),
            Ok(Err(problem)) => Err(SimulatorError::Transport { server: self.target.authority.clone(), problem }),
            Err(_) => Err(SimulatorError::TimedOut { server: self.target.authority.clone(), limit }),
        };
        if outcome.is_err() {
            self.open = None;
        }
        if let Some(tally) = &mut self.tally {
            match &outcome {
                Ok(answer) => tally.record(begin.elapsed(), answer.status.as_u16()),
                Err(_) => tally.transport_errors += 1,
            }
        }
        outcome
    }

    /// Sends one request and hangs up before anything of the answer was read. Comes back when the server has closed its side too, so that
    /// whatever it made of the request goes before what is sent next. Whether it took the request is not known, and whether it was
    /// reached does not matter.
    pub async fn abandon(&mut self, method: &Method, path: &Uri, headers: &HeaderMap, body: &[u8]) {
        self.open = None;
        let mut head = format!("{method} {path} HTTP/1.1\r\n").into_bytes();
        let length = HeaderValue::from(body.len());
        let own = [(http::header::HOST, &self.target.host), (http::header::CONTENT_LENGTH, &length)];
        for (name, value) in headers.iter().chain(own.iter().map(|(name, value)| (name, *value))) {
            head.extend_from_slice(name.as_str().as_bytes());
            head.extend_from_slice(b": ");
            head.extend_from_slice(value.as_bytes());
            head.extend_from_slice(b"\r\n");
        }
        head.extend_from_slice(b"\r\n");
        let exchange = async {
            let mut stream = TcpStream::connect(&self.target.authority).await?;
            stream.write_all(&head).await?;
            stream.write_all(body).await?;
            stream.shutdown().await?;
            tokio::io::copy(&mut stream, &mut tokio::io::sink()).await
        };
        // Nobody reads the answer, whatever it is.
        let _ = tokio::time::timeout(self.timeout, exchange).await;
    }

    async fn exchange(&mut self, request: Request<Full<Bytes>>) -> Result<Answer, String> {
        self.drop_if_closed().await;
        // It is taken out: whatever ends this in the middle has closed the connection.
        let mut open = if let Some(open) = self.open.take() {
            open
        } else {
            let open = self.connect().await?;
            self.opened += 1;
            open
        };
        let (answer, driver_done) = converse(&mut open, request).await.map_err(|error| describe(error.as_ref()))?;
        let closes = driver_done || answer.headers.get(http::header::CONNECTION).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"close"));
        if !closes {
            self.open = Some(open);
        }
        Ok(answer)
    }

    /// Lets the driver see whether the server has closed in the meantime.
    async fn drop_if_closed(&mut self) {
        let Some(open) = self.open.as_mut() else {
            return;
        };
        let closed = poll_fn(|context| Poll::Ready(open.driver.as_mut().poll(context).is_ready())).await;
        if closed || open.sender.is_closed() {
            self.open = None;
        }
    }

    async fn connect(&self) -> Result<Open, String> {
        let stream = TcpStream::connect(&self.target.authority).await.map_err(|error| error.to_string())?;
        // Without it, small requests wait for the other side's delayed acknowledgement.
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        let (sender, driver) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
        Ok(Open { sender, driver: Box::pin(driver) })
    }
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// One exchange on an open connection; also answers whether the connection ended with it.
async fn converse(open: &mut Open, request: Request<Full<Bytes>>) -> Result<(Answer, bool), Failure> {
    let Open { sender, driver } = open;
    let mut answering = pin!(async {
        let response = sender.send_request(request).await?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, ANSWER_LIMIT).collect().await?.to_bytes();
        Ok::<_, Failure>(Answer { status: head.status, headers: head.headers, body })
    });
    let mut driver_done = false;
    let answer = poll_fn(|context| {
        // The request is handed over, the driver writes and reads, and what it read is taken.
        if let Poll::Ready(answer) = answering.as_mut().poll(context) {
            return Poll::Ready(answer);
        }
        if !driver_done {
            driver_done = driver.as_mut().poll(context).is_ready();
        }
        answering.as_mut().poll(context)
    })
    .await?;
    Ok((answer, driver_done))
}

/// Errors are read by people and kept in logs: none may repeat what a device has said in confidence.
fn without_secrets(answer: Answer) -> Result<Answer, SimulatorError> {
    let is_error = answer.status.is_client_error() || answer.status.is_server_error();
    match is_error.then(|| canary::found_in(&answer.body)).flatten() {
        Some(secret) => Err(SimulatorError::Leak { status: answer.status.as_u16(), secret }),
        None => Ok(answer),
    }
}

fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// The header in which devices sign.
pub const MDM_SIGNATURE: HeaderName = HeaderName::from_static("mdm-signature");
