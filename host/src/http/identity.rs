//! Which certificate a device's request comes with, and whether an authority of the operator's issued it.

use std::net::IpAddr;
use std::time::Duration;

use axum::http::{HeaderMap, HeaderName};
use ipnet::IpNet;
use moka::sync::Cache;
use wasmdm_protocol::certificate::{Certificate, TrustAnchors};
use wasmdm_protocol::mdm_signature::{DetachedSignature, SignatureError};
use wasmdm_protocol::time::Timestamp;
use wasmdm_service::reply::Refusal;

use super::body::Refused;

/// Chains whose verdict is remembered.
const VERIFIED_CHAINS: u64 = 100_000;
/// A verdict is looked at again after this, whatever the certificate says.
const VERDICT_AGE: Duration = Duration::from_hours(1);
/// As Apple's devices send it.
const SIGNATURE: HeaderName = HeaderName::from_static("mdm-signature");

/// Finds and verifies identities.
#[derive(Debug)]
pub struct Identity {
    anchors: TrustAnchors,
    source: Source,
    /// For so long after its end a certificate still counts; what its holder may do is the service's rule (edge case 22).
    grace: Duration,
    /// SHA-256 of a verified certificate, and until when its chain is valid.
    verified: Cache<[u8; 32], Timestamp>,
}

/// Where the certificate comes from; exactly one per server.
#[derive(Debug)]
pub enum Source {
    /// The device's `Mdm-Signature` over the body.
    Signature,
    /// A header that a proxy of those addresses sets after it verified the client's TLS certificate.
    Header {
        /// For instance `client-cert` (RFC 9440).
        name: HeaderName,
        /// Nobody else is believed.
        proxies: Vec<IpNet>,
    },
}

/// What can be said before the body is read.
#[derive(Debug)]
pub enum Presented {
    /// Verified by the proxy and by its chain.
    Certificate(Box<Certificate>),
    /// A signature that still waits for the body it covers. The chain of its certificate is verified: who has never
    /// seen one of the authority's cannot make the server hold a body.
    Signature(Box<DetachedSignature>),
}

impl Presented {
    /// Whose it is, or is said to be.
    pub fn certificate(&self) -> &Certificate {
        match self {
            Self::Certificate(certificate) => certificate,
            Self::Signature(signature) => signature.claimed_certificate(),
        }
    }

    /// The identity of who sends a body that is not kept. A certificate that was only claimed proves nothing before all of what it signs has
    /// come, so that it is waited for.
    pub async fn identify_refused(self, refused: &mut Refused) -> Option<Certificate> {
        let signature = match self {
            Self::Certificate(certificate) => return Some(*certificate),
            Self::Signature(signature) => signature,
        };
        let mut check = signature.begin().ok()?;
        if !refused.to_end(|part| check.update(part)).await {
            return None;
        }
        check.finish().ok()
    }
}

impl Identity {
    /// Identities that `anchors` vouch for, and for `grace` longer.
    pub fn new(anchors: TrustAnchors, source: Source, grace: Duration) -> Self {
        Self { anchors, source, grace, verified: Cache::builder().max_capacity(VERIFIED_CHAINS).time_to_live(VERDICT_AGE).build() }
    }

    /// Judges the headers, before anything large is read.
    pub fn present(&self, headers: &HeaderMap, peer: IpAddr, now: Timestamp) -> Result<Presented, Refusal> {
        match &self.source {
            Source::Signature => {
                let signature = DetachedSignature::read(single(headers, &SIGNATURE)?).map_err(|error| refused(&error))?;
                self.verify_chain(signature.claimed_certificate(), now)?;
                Ok(Presented::Signature(Box::new(signature)))
            }
            Source::Header { name, proxies } => {
                let peer = peer.to_canonical();
                if !proxies.iter().any(|proxy| proxy.contains(&peer)) {
                    return Err(Refusal::bad_request(format!("{peer} is no trusted proxy, so its `{name}` header is not believed")));
                }
                let certificate =
                    Certificate::from_header(single(headers, name)?).map_err(|error| Refusal::bad_request(format!("{name}: {error}")))?;
                self.verify_chain(&certificate, now)?;
                Ok(Presented::Certificate(Box::new(certificate)))
            }
        }
    }

    /// The identity, once the body is there.
    pub fn identify(presented: Presented, body: &[u8]) -> Result<Certificate, Refusal> {
        match presented {
            Presented::Certificate(certificate) => Ok(*certificate),
            Presented::Signature(signature) => signature.verify(body).map_err(|error| refused(&error)),
        }
    }

    fn verify_chain(&self, certificate: &Certificate, now: Timestamp) -> Result<(), Refusal> {
        if self.verified.get(&certificate.sha256).is_some_and(|until| now <= until) && now >= certificate.not_before {
            return Ok(());
        }
        // An expired one is judged as of its last moment.
        let as_of = if certificate.not_after < now && now <= certificate.not_after.plus(self.grace) { certificate.not_after } else { now };
        let until = self.anchors.verify(certificate, as_of).map_err(|error| Refusal::bad_request(format!("identity certificate: {error}")))?;
        self.verified.insert(certificate.sha256, until);
        Ok(())
    }
}

fn refused(error: &SignatureError) -> Refusal {
    Refusal::bad_request(format!("Mdm-Signature: {error}"))
}

/// A header that must be there exactly once: a second one may be a client's own, smuggled past a proxy.
fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<&'a [u8], Refusal> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => Ok(value.as_bytes()),
        (None, _) => Err(Refusal::bad_request(format!("the {name} header is missing"))),
        (Some(_), Some(_)) => Err(Refusal::bad_request(format!("the {name} header is there more than once"))),
    }
}
