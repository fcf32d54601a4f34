//! Identity certificates: reading them, the headers that carry them, and whether an authority of the operator vouches for them.
//!
//! A certificate is parsed once, in [`Certificate::from_der`], into everything that later checks need. [`TrustAnchors`] does the same for
//! the operator's authorities, so that one verdict costs one signature.

mod anchors;
mod constraints;
mod header;
mod names;

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::digest::{self, Digest};
use bytes::Bytes;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::FromDer as _;
use x509_parser::x509::X509Version;

pub use anchors::{ChainError, TrustAnchors};
use constraints::Constraints;

use crate::ber::{self, Reader};
use crate::signature::{self, Hash, PublicKey, Scheme};
use crate::time::Timestamp;

/// Certificates have about ten. Each is compared with all before it, and that before anybody has vouched for one of them.
const MAX_EXTENSIONS: usize = 64;

/// A certificate of X.509, any version. That it can be read says nothing of whether it can be trusted.
#[derive(Clone)]
pub struct Certificate {
    /// The certificate as it came.
    pub der: Bytes,
    /// Of `der`.
    pub sha256: [u8; 32],
    /// RFC 4514 text, which can be empty.
    pub subject: String,
    /// RFC 4514 text.
    pub issuer: String,
    /// The first moment at which it is valid.
    pub not_before: Timestamp,
    /// The last moment at which it is valid.
    pub not_after: Timestamp,
    /// SHA-256 of what the issuer signed. Unlike `sha256` it cannot be changed by whoever holds the certificate: an elliptic-curve
    /// signature has a second valid form, so the same certificate can be written in two ways.
    pub identity: [u8; 32],
    details: Details,
}

/// What chains and signatures need. All are parts of `der`.
#[derive(Clone)]
pub(crate) struct Details {
    /// What the issuer signed.
    signed: Bytes,
    /// `None`: one that is not understood.
    algorithm: Option<(Scheme, Hash)>,
    signature: Bytes,
    issuer: Bytes,
    subject: Bytes,
    key: PublicKey,
    version_3: bool,
    /// Whether it is an authority, and how many may follow it.
    basic_constraints: Option<(bool, Option<u32>)>,
    /// Whether its key may sign certificates, if it says.
    key_cert_sign: Option<bool>,
    /// Whether it may authenticate clients, if it says what it is for.
    client_auth: Option<bool>,
    subject_key_id: Option<Bytes>,
    name_constraints: Option<Arc<Constraints>>,
    /// An extension that may not be ignored and is not understood.
    unknown_critical: Option<String>,
}

/// Why bytes are no certificate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// They cannot be read.
    #[error("the certificate cannot be read: {0}")]
    Malformed(String),
}

impl CertificateError {
    fn new(problem: impl Into<String>) -> Self {
        Self::Malformed(problem.into())
    }
}

/// Certificates are equal if their bytes are.
impl PartialEq for Certificate {
    fn eq(&self, other: &Self) -> bool {
        self.der == other.der
    }
}

impl Eq for Certificate {}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate")
            .field("sha256", &self.fingerprint())
            .field("subject", &self.subject)
            .field("issuer", &self.issuer)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

impl Certificate {
    /// Reads one certificate in DER and nothing behind it.
    pub fn from_der(der: impl Into<Bytes>) -> Result<Self, CertificateError> {
        let der = der.into();
        let (rest, certificate) = X509Certificate::from_der(&der).map_err(|_| CertificateError::new("it is no X.509 certificate in DER"))?;
        if !rest.is_empty() {
            return Err(CertificateError::new("something follows it"));
        }
        if certificate.signature_algorithm != certificate.tbs_certificate.signature {
            return Err(CertificateError::new("it names two signature algorithms"));
        }
        if !is_canonical(&der) {
            return Err(CertificateError::new("it is not written in DER"));
        }
        let details = Details::of(&der, &certificate)?;
        let sha256 = sha256_of(&der);
        let identity = sha256_of(&details.signed);
        let validity = certificate.validity();
        Ok(Self {
            sha256,
            identity,
            subject: names::rfc4514(certificate.subject()),
            issuer: names::rfc4514(certificate.issuer()),
            not_before: seconds(validity.not_before.timestamp()),
            not_after: seconds(validity.not_after.timestamp()),
            details,
            der,
        })
    }

    /// From a proxy's header: RFC 9440 (`:base64:`) or URL-escaped PEM, in which `+` stands for a space.
    pub fn from_header(value: &[u8]) -> Result<Self, CertificateError> {
        Self::from_der(header::decode(value)?)
    }

    /// Lower-case hex of `sha256`.
    pub fn fingerprint(&self) -> String {
        const DIGITS: [char; 16] = ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'];
        self.sha256.iter().flat_map(|byte| [byte >> 4, byte & 0x0f]).filter_map(|digit| DIGITS.get(usize::from(digit))).collect()
    }

    /// Whether its issuer says that it is the holder of one of those names: by common name, serial number or user id of its subject, or by an
    /// alternative name (permanent identifiers included). The whole name, whatever the case of its ASCII letters; an empty one names nobody.
    ///
    /// A subject that many devices share, or an empty one, names none of them.
    pub fn names_one_of<'n>(&self, wanted: impl IntoIterator<Item = &'n str>) -> bool {
        let names = self.names();
        wanted.into_iter().any(|wanted| !wanted.is_empty() && names.iter().any(|name| name.eq_ignore_ascii_case(wanted)))
    }

    /// What its issuer calls its holder; see [`Self::names_one_of`].
    pub fn names(&self) -> Vec<String> {
        // Parsed again: asked for only when a device comes with a certificate that nobody knows.
        X509Certificate::from_der(&self.der).map(|(_, certificate)| names::of_holder(&certificate)).unwrap_or_default()
    }

    /// Checks a signature of this certificate's key.
    pub(crate) fn verify(&self, scheme: Scheme, hash: Hash, message: &[u8], signature: &[u8]) -> Result<(), signature::Unverified> {
        self.details.key.verify(scheme, hash, message, signature)
    }

    /// The same of a message that came in parts.
    pub(crate) fn verify_digest(&self, scheme: Scheme, hash: Hash, digest: &Digest, signature: &[u8]) -> Result<(), signature::Unverified> {
        self.details.key.verify_digest(scheme, hash, digest, signature)
    }

    pub(crate) fn subject_key_id(&self) -> Option<&[u8]> {
        self.details.subject_key_id.as_deref()
    }
}

fn seconds(seconds: i64) -> Timestamp {
    Timestamp::from_millis(seconds.saturating_mul(1000))
}

impl Details {
    fn of(der: &Bytes, certificate: &X509Certificate<'_>) -> Result<Self, CertificateError> {
        let tbs = &certificate.tbs_certificate;
        let info = tbs.public_key();
        let curve = info.algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
        let mut details = Self {
            signed: part(der, tbs.as_ref()),
            algorithm: match signature::scheme(certificate.signature_algorithm.algorithm.as_bytes()) {
                Some((scheme, Some(hash))) => Some((scheme, hash)),
                _ => None,
            },
            signature: part(der, &certificate.signature_value.data),
            issuer: part(der, tbs.issuer().as_raw()),
            subject: part(der, tbs.subject().as_raw()),
            key: PublicKey::new(
                info.algorithm.algorithm.as_bytes(),
                curve.as_ref().map(x509_parser::asn1_rs::Oid::as_bytes),
                part(der, &info.subject_public_key.data),
            ),
            version_3: tbs.version() == X509Version::V3,
            basic_constraints: None,
            key_cert_sign: None,
            client_auth: None,
            subject_key_id: None,
            name_constraints: None,
            unknown_critical: None,
        };
        if tbs.extensions().len() > MAX_EXTENSIONS {
            return Err(CertificateError::new(format!("it has more than {MAX_EXTENSIONS} extensions")));
        }
        let mut seen = Vec::new();
        for extension in tbs.extensions() {
            if seen.contains(&extension.oid.as_bytes()) {
                return Err(CertificateError::new(format!("it has the extension {} twice", extension.oid)));
            }
            seen.push(extension.oid.as_bytes());
            match extension.parsed_extension() {
                ParsedExtension::BasicConstraints(constraints) => details.basic_constraints = Some((constraints.ca, constraints.path_len_constraint)),
                ParsedExtension::KeyUsage(usage) => details.key_cert_sign = Some(usage.key_cert_sign()),
                ParsedExtension::ExtendedKeyUsage(usage) => details.client_auth = Some(usage.client_auth || usage.any),
                ParsedExtension::NameConstraints(constraints) => details.name_constraints = Some(Arc::new(Constraints::new(constraints))),
                ParsedExtension::SubjectKeyIdentifier(id) => details.subject_key_id = Some(part(der, id.0)),
                ParsedExtension::SubjectAlternativeName(_)
                | ParsedExtension::IssuerAlternativeName(_)
                | ParsedExtension::AuthorityKeyIdentifier(_)
                | ParsedExtension::CertificatePolicies(_)
                | ParsedExtension::CRLDistributionPoints(_)
                | ParsedExtension::AuthorityInfoAccess(_) => {}
                // One that should say what the certificate is for, and cannot be read, is as good as critical.
                ParsedExtension::ParseError { .. } => details.unknown_critical = Some(extension.oid.to_string()),
                _ if extension.critical => details.unknown_critical = Some(extension.oid.to_string()),
                _ => {}
            }
        }
        Ok(details)
    }
}

/// A part of the certificate, shared with it where it lies within.
fn part(der: &Bytes, part: &[u8]) -> Bytes {
    let start = (part.as_ptr() as usize).wrapping_sub(der.as_ptr() as usize);
    match start.checked_add(part.len()) {
        Some(end) if end <= der.len() => der.slice(start..end),
        _ => Bytes::copy_from_slice(part),
    }
}

fn sha256_of(bytes: &[u8]) -> [u8; 32] {
    let mut sha256 = [0; 32];
    sha256.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    sha256
}

/// Whether nothing outside of what the issuer signed could be written in another way: no further element, no longer length, no other name
/// for the algorithm. Otherwise the holder of a certificate could make new ones of it, each with a fingerprint of its own.
fn is_canonical(der: &[u8]) -> bool {
    const BIT_STRING: u8 = 0x03;
    const VERSION: u8 = 0xA0;
    let parts = || {
        let mut outer = Reader::new(der).expect(ber::SEQUENCE)?.reader();
        let signed = outer.expect(ber::SEQUENCE)?;
        let algorithm = outer.expect(ber::SEQUENCE)?;
        let signature = outer.expect(BIT_STRING)?;
        let mut fields = signed.reader();
        fields.optional(VERSION);
        fields.expect(ber::INTEGER)?;
        let signed_algorithm = fields.expect(ber::SEQUENCE)?;
        Some((signed, algorithm, signature, signed_algorithm))
    };
    let Some((signed, algorithm, signature, signed_algorithm)) = parts() else { return false };
    let content = [signed.whole, &ber::der(ber::SEQUENCE, algorithm.content), &ber::der(BIT_STRING, signature.content)].concat();
    algorithm.whole == signed_algorithm.whole && signature.content.first() == Some(&0) && ber::der(ber::SEQUENCE, &content) == der
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written_otherwise(certificate: &[u8]) -> Vec<Vec<u8>> {
        let outer = Reader::new(certificate).next().unwrap();
        let mut parts = outer.reader();
        let (signed, algorithm, signature) = (parts.next().unwrap().whole, parts.next().unwrap(), parts.next().unwrap());
        let long = |tag: u8, content: &[u8]| {
            [&[tag, 0x84, 0, 0, u8::try_from(content.len() >> 8).unwrap(), u8::try_from(content.len() & 0xFF).unwrap()], content].concat()
        };
        let longer_algorithm = long(ber::SEQUENCE, algorithm.content);
        let longer_signature = long(0x03, signature.content);
        vec![
            ber::der(ber::SEQUENCE, &[outer.content, &[0x05, 0x00]].concat()),
            long(ber::SEQUENCE, outer.content),
            ber::der(ber::SEQUENCE, &[signed, &longer_algorithm, signature.whole].concat()),
            ber::der(ber::SEQUENCE, &[signed, algorithm.whole, &longer_signature].concat()),
        ]
    }

    /// With such a copy an enrolled device could have passed for one that was never bound, and taken over any other.
    #[test]
    fn a_certificate_cannot_be_written_in_another_way_by_its_holder() {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(vec![]).unwrap().self_signed(&key).unwrap();
        let original = Certificate::from_der(certificate.der().to_vec()).unwrap();
        for (number, copy) in written_otherwise(certificate.der()).into_iter().enumerate() {
            assert_ne!(copy, certificate.der().to_vec());
            assert!(Certificate::from_der(copy).is_err(), "copy {number}");
        }
        assert_ne!(original.identity, original.sha256);
    }
}
