//! Outbound HTTP of plugins, behind rules that a plugin cannot get around.
//!
//! A request goes only to an origin that the operator granted. Its host is looked up once, every address found is judged, and the
//! connection goes to exactly those addresses. Redirects are not followed, proxies are not used, connections are not kept: each call
//! passes the checks again. Secrets are put in here, outside the guest, and never come back in an error.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, header};
use reqwest::Url;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

mod address;
mod resolver;
mod template;

pub use address::is_refused;
pub use resolver::{Resolve, Resolving, SystemResolver};

/// The most header fields of a request.
const HEADERS: usize = 64;
/// The most bytes of a request's header fields, and of its URL.
const HEAD_BYTES: usize = 32 * 1024;
/// More addresses than this behind one name are not judged but refused.
const ADDRESSES: usize = 64;

/// `scheme://host[:port]`, exactly: no wildcards, no paths.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Origin {
    /// `http` or `https`.
    pub scheme: String,
    /// A name in lower case, an IPv4 address, or an IPv6 address in brackets.
    pub host: String,
    /// The scheme's own port unless the text named another.
    pub port: u16,
}

impl Origin {
    /// Reads a request or a grant such as `https://hooks.example` or `http://127.0.0.1:9999`. The error says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let url = Url::parse(text).map_err(|error| format!("`{text}` is no URL: {error}"))?;
        let origin = Self::of(&url).ok_or_else(|| format!("`{text}` must begin with http:// or https:// and name a host"))?;
        if has_user(&url) {
            return Err(format!("`{text}` must not name a user"));
        }
        if url.path() != "/" || url.query().is_some() || url.fragment().is_some() {
            return Err(format!("`{text}` must end after the host or the port"));
        }
        Ok(origin)
    }

    fn of(url: &Url) -> Option<Self> {
        if !matches!(url.scheme(), "http" | "https") {
            return None;
        }
        Some(Self { scheme: url.scheme().into(), host: url.host_str().filter(|host| !host.is_empty())?.into(), port: url.port_or_known_default()? })
    }

    /// The address, where the origin names one instead of a name.
    fn address(&self) -> Option<IpAddr> {
        let host = self.host.trim_start_matches('[').trim_end_matches(']');
        host.parse().ok()
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme, self.host)?;
        match (self.scheme.as_str(), self.port) {
            ("http", 80) | ("https", 443) => Ok(()),
            (_, port) => write!(f, ":{port}"),
        }
    }
}

/// A secret that may be sent, and to whom.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretBinding {
    /// The only host that may receive it.
    pub host: String,
    /// What replaces `${name}`.
    pub value: String,
}

impl fmt::Debug for SecretBinding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretBinding").field("host", &self.host).finish_non_exhaustive()
    }
}

/// What one plugin may do.
#[derive(Debug, Clone)]
pub struct EgressPolicy {
    /// What it requested and the operator granted. An origin that names an address also lets that address and port be reached where it
    /// is in a range that is otherwise refused.
    pub allowed: Vec<Origin>,
    /// Secrets for headers and URLs, by name.
    pub secrets: BTreeMap<String, SecretBinding>,
    /// Calls of one invocation.
    pub max_calls: u32,
    /// Calls of one invocation at the same time.
    pub max_concurrent: u32,
    /// The longest body that is sent.
    pub max_request_bytes: usize,
    /// The longest body that is read.
    pub max_response_bytes: usize,
    /// From look-up to the last byte; a request may ask for less.
    pub timeout: Duration,
    /// This server's own listeners and its database: never reached, whatever is granted. An unspecified address stands for all
    /// addresses of this machine.
    pub refused: Vec<SocketAddr>,
}

impl Default for EgressPolicy {
    /// Nothing is allowed; the limits are the usual ones.
    fn default() -> Self {
        Self {
            allowed: Vec::new(),
            secrets: BTreeMap::new(),
            max_calls: 4,
            max_concurrent: 2,
            max_request_bytes: 1024 * 1024,
            max_response_bytes: 1024 * 1024,
            timeout: Duration::from_secs(5),
            refused: Vec::new(),
        }
    }
}

impl EgressPolicy {
    fn allows(&self, origin: &Origin) -> bool {
        self.allowed.contains(origin)
    }

    /// Why a connection to this address is refused, if it is.
    fn refusal(&self, address: IpAddr, port: u16) -> Option<&'static str> {
        let canonical = address::canonical(address);
        let is_own = self.refused.iter().any(|own| {
            own.port() == port && if own.ip().is_unspecified() { address::is_local(canonical) } else { address::canonical(own.ip()) == canonical }
        });
        if is_own {
            return Some("it belongs to this server");
        }
        let is_granted = self.allowed.iter().any(|origin| origin.port == port && origin.address() == Some(address));
        (is_refused(address) && !is_granted).then_some("its address is not public")
    }
}

/// One header field of a request.
#[derive(Debug, Clone)]
pub struct Header {
    /// The field's name.
    pub name: String,
    /// Its value.
    pub value: String,
    /// Whether `${name}` in the value stands for a secret.
    pub template: bool,
}

/// What a plugin wants to send.
#[derive(Debug, Clone)]
pub struct Request {
    /// `GET`, `POST`, …
    pub method: String,
    /// The whole URL.
    pub url: String,
    /// Whether `${name}` in the URL stands for a secret.
    pub url_template: bool,
    /// Header fields.
    pub headers: Vec<Header>,
    /// The body; absent is empty.
    pub body: Option<Bytes>,
    /// Less time than the policy allows.
    pub timeout: Option<Duration>,
}

/// What came back.
#[derive(Debug, Clone)]
pub struct Response {
    /// HTTP status, also one that redirects.
    pub status: u16,
    /// Header fields but those between neighbours (RFC 9110, 7.6.1).
    pub headers: Vec<(String, String)>,
    /// The body, complete.
    pub body: Bytes,
}

/// Why nothing came back, in the terms of the plugin contract. It names no secret and nothing that one was put into.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct EgressError {
    /// `denied`, `invalid`, `limit`, `too-large`, `timeout`, `unreachable`.
    pub code: &'static str,
    /// For a person.
    pub message: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
}

impl EgressError {
    fn denied(message: impl Into<String>) -> Self {
        Self::new("denied", message, false)
    }

    fn invalid(message: impl Into<String>) -> Self {
        Self::new("invalid", message, false)
    }

    fn new(code: &'static str, message: impl Into<String>, retryable: bool) -> Self {
        Self { code, message: message.into(), retryable }
    }
}

/// How many calls an invocation has left.
#[derive(Debug)]
pub struct CallBudget {
    left: AtomicU32,
    at_once: Arc<Semaphore>,
}

/// One call of the budget; held while the call runs.
#[derive(Debug)]
pub struct CallPermit {
    _permit: OwnedSemaphorePermit,
}

impl CallBudget {
    /// The budget of one invocation.
    pub fn new(policy: &EgressPolicy) -> Self {
        Self { left: AtomicU32::new(policy.max_calls), at_once: Arc::new(Semaphore::new(policy.max_concurrent as usize)) }
    }

    /// Takes one call; fails with `limit` when none is left or too many run.
    pub fn take(&self) -> Result<CallPermit, EgressError> {
        let permit = Arc::clone(&self.at_once).try_acquire_owned().map_err(|_| EgressError::new("limit", "too many requests at once", false))?;
        self.left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
            .map_err(|_| EgressError::new("limit", "no requests left in this call", false))?;
        Ok(CallPermit { _permit: permit })
    }
}

tokio::task_local! {
    /// The addresses that were judged for the request that this task is sending.
    static JUDGED: Vec<SocketAddr>;
}

/// Hands the connector what was judged; without a judgement there is no address. So no look-up can happen behind the rules.
struct JudgedAddresses;

impl reqwest::dns::Resolve for JudgedAddresses {
    fn resolve(&self, _name: reqwest::dns::Name) -> reqwest::dns::Resolving {
        let judged = JUDGED.try_with(Clone::clone);
        Box::pin(async move {
            match judged {
                Ok(addresses) => Ok(Box::new(addresses.into_iter()) as reqwest::dns::Addrs),
                Err(_) => Err("no address was judged for this request".into()),
            }
        })
    }
}

/// Sends plugins' requests.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    resolver: Arc<dyn Resolve>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

impl Client {
    /// A client that trusts what the operating system trusts and asks its resolver.
    pub fn new() -> Result<Self, EgressError> {
        Self::with_roots(&[])
    }

    /// A client that also trusts these authorities (PEM, any number of certificates in each).
    pub fn with_roots(roots: &[&[u8]]) -> Result<Self, EgressError> {
        let unusable = |error: reqwest::Error| EgressError::new("unreachable", format!("no HTTP client: {}", describe(error)), false);
        let mut certificates = Vec::new();
        for pem in roots {
            certificates.extend(reqwest::Certificate::from_pem_bundle(pem).map_err(unusable)?);
        }
        let mut builder = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .referer(false)
            .http1_only()
            .tcp_nodelay(true)
            // A kept connection would skip the judgement of its address.
            .pool_max_idle_per_host(0)
            .user_agent(concat!("wasmdm/", env!("CARGO_PKG_VERSION")))
            .dns_resolver(JudgedAddresses);
        if !certificates.is_empty() {
            builder = builder.tls_certs_merge(certificates);
        }
        Ok(Self { http: builder.build().map_err(unusable)?, resolver: Arc::new(SystemResolver) })
    }

    /// The same client, asking another resolver.
    #[must_use]
    pub fn with_resolver(mut self, resolver: impl Resolve + 'static) -> Self {
        self.resolver = Arc::new(resolver);
        self
    }

    /// Sends one request under a policy and reads the whole answer.
    pub async fn send(&self, policy: &EgressPolicy, request: Request) -> Result<Response, EgressError> {
        let limit = request.timeout.map_or(policy.timeout, |wish| wish.min(policy.timeout));
        tokio::time::timeout(limit, self.send_unhurried(policy, request))
            .await
            .map_err(|_| EgressError::new("timeout", format!("no whole answer within {limit:?}"), true))?
    }

    async fn send_unhurried(&self, policy: &EgressPolicy, request: Request) -> Result<Response, EgressError> {
        let outgoing = outgoing(policy, request)?;
        let addresses = self.judged_addresses(policy, &outgoing.origin).await?;

        let mut builder = self.http.request(outgoing.method, outgoing.url).headers(outgoing.headers);
        if let Some(body) = outgoing.body {
            builder = builder.body(body);
        }
        let response = JUDGED.scope(addresses, builder.send()).await.map_err(|error| unreachable(&outgoing.origin, error))?;
        read(response, &outgoing.origin, policy.max_response_bytes).await
    }

    /// Looks the host up, once, and judges every address.
    async fn judged_addresses(&self, policy: &EgressPolicy, origin: &Origin) -> Result<Vec<SocketAddr>, EgressError> {
        let found = match origin.address() {
            Some(address) => vec![address],
            None => self
                .resolver
                .resolve(&origin.host)
                .await
                .map_err(|error| EgressError::new("unreachable", format!("{} could not be looked up: {error}", origin.host), true))?,
        };
        if found.is_empty() {
            return Err(EgressError::new("unreachable", format!("{} has no address", origin.host), true));
        }
        if found.len() > ADDRESSES {
            return Err(EgressError::denied(format!("{} has more than {ADDRESSES} addresses", origin.host)));
        }
        for address in &found {
            if let Some(reason) = policy.refusal(*address, origin.port) {
                // The address itself stays here: it would tell the plugin about the network inside.
                return Err(EgressError::denied(format!("{origin} is refused: {reason}")));
            }
        }
        Ok(found.into_iter().map(|address| SocketAddr::new(address, origin.port)).collect())
    }
}

struct Outgoing {
    method: Method,
    url: Url,
    origin: Origin,
    headers: http::HeaderMap,
    body: Option<Bytes>,
}

/// Checks everything that can be checked without the network, and puts the secrets in.
fn outgoing(policy: &EgressPolicy, request: Request) -> Result<Outgoing, EgressError> {
    let method = match request.method.as_str() {
        "GET" | "HEAD" | "POST" | "PUT" | "PATCH" | "DELETE" | "OPTIONS" => {
            Method::from_bytes(request.method.as_bytes()).map_err(|_| EgressError::invalid("unusable method"))?
        }
        _ => return Err(EgressError::invalid("unusable method")),
    };
    if request.body.as_ref().is_some_and(|body| body.len() > policy.max_request_bytes) {
        return Err(EgressError::new("too-large", format!("the body is longer than {} bytes", policy.max_request_bytes), false));
    }

    let mut used = template::Used::default();
    let text = if request.url_template { template::fill(&request.url, &policy.secrets, &mut used)? } else { request.url };
    // The parser would drop some of these silently.
    if text.len() > HEAD_BYTES || text.bytes().any(|byte| byte <= b' ' || byte == 0x7F) {
        return Err(EgressError::invalid("the URL is too long, or holds spaces or control characters"));
    }
    let url = Url::parse(&text).map_err(|_| EgressError::invalid("the URL cannot be read"))?;
    if has_user(&url) {
        return Err(EgressError::denied("the URL names a user"));
    }
    let Some(origin) = Origin::of(&url) else {
        return Err(EgressError::denied("only http and https are spoken"));
    };
    // What was put together from a secret is not repeated to the plugin.
    if !policy.allows(&origin) {
        return Err(EgressError::denied(if used.is_empty() {
            format!("{origin} is not granted")
        } else {
            "the URL with its secrets leads to an origin that is not granted".into()
        }));
    }

    let headers = headers(policy, &request.headers, &mut used)?;
    used.only_for(&origin.host)?;
    Ok(Outgoing { method, url, origin, headers, body: request.body })
}

fn headers(policy: &EgressPolicy, wanted: &[Header], used: &mut template::Used) -> Result<http::HeaderMap, EgressError> {
    if wanted.len() > HEADERS {
        return Err(EgressError::invalid(format!("more than {HEADERS} header fields")));
    }
    let mut headers = http::HeaderMap::new();
    let mut bytes = 0;
    for field in wanted {
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| EgressError::invalid("unusable header name"))?;
        if is_ours(&name) {
            return Err(EgressError::invalid(format!("the header {name} is made by the server")));
        }
        let text = if field.template { template::fill(&field.value, &policy.secrets, used)? } else { field.value.clone() };
        bytes += name.as_str().len() + text.len();
        if bytes > HEAD_BYTES {
            return Err(EgressError::invalid(format!("more than {HEAD_BYTES} bytes of header fields")));
        }
        let mut value = HeaderValue::from_str(&text).map_err(|_| EgressError::invalid(format!("unusable value of the header {name}")))?;
        value.set_sensitive(field.template);
        headers.append(name, value);
    }
    Ok(headers)
}

/// Fields that decide how the message is framed or where it goes.
fn is_ours(name: &HeaderName) -> bool {
    matches!(*name, header::HOST | header::CONTENT_LENGTH | header::TRANSFER_ENCODING | header::EXPECT | header::PROXY_AUTHORIZATION)
        || is_between_neighbours(name)
}

fn is_between_neighbours(name: &HeaderName) -> bool {
    matches!(*name, header::CONNECTION | header::TE | header::TRAILER | header::TRANSFER_ENCODING | header::UPGRADE | header::PROXY_AUTHENTICATE)
        || matches!(name.as_str(), "keep-alive" | "proxy-connection")
}

async fn read(mut response: reqwest::Response, origin: &Origin, limit: usize) -> Result<Response, EgressError> {
    let too_large = || EgressError::new("too-large", format!("the answer is longer than {limit} bytes"), false);
    if response.content_length().is_some_and(|length| length > limit as u64) {
        return Err(too_large());
    }
    let status = response.status().as_u16();
    let headers = response
        .headers()
        .iter()
        .filter(|(name, _)| !is_between_neighbours(name))
        .map(|(name, value)| (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
        .collect();
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| unreachable(origin, error))? {
        if body.len() + chunk.len() > limit {
            return Err(too_large());
        }
        body.extend_from_slice(&chunk);
    }
    Ok(Response { status, headers, body: body.into() })
}

fn has_user(url: &Url) -> bool {
    !url.username().is_empty() || url.password().is_some()
}

fn unreachable(origin: &Origin, error: reqwest::Error) -> EgressError {
    EgressError::new("unreachable", format!("{origin}: {}", describe(error)), true)
}

/// The library's words without the URL, which may hold a secret.
fn describe(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
