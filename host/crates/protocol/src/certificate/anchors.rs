//! The operator's authorities, and the walk from a device's certificate to one of them.
//!
//! The verdicts are those of Go's verifier for client authentication, which NanoMDM uses, so that no device is turned away that it took:
//! version 1 certificates, leaves that call themselves authorities, leaves without names and RSA keys of 1,024 bits pass. Certificates
//! signed with SHA-1 do not.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use super::constraints::Constraints;
use super::{Certificate, CertificateError};
use crate::signature::Hash;
use crate::time::Timestamp;

/// How many authorities may lie between a device and the end of its chain, that included.
const MAX_PATH: usize = 8;
/// How many ways from an authority to an anchor are kept. Two authorities that sign each other's several certificates have a handful.
const MAX_PATHS: usize = 1000;
/// How many certificates the files may hold.
const MAX_CERTIFICATES: usize = 1000;

/// Why no authority vouches for a certificate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// It is not yet valid.
    #[error("the certificate is not valid before {not_before}")]
    NotYetValid {
        /// When it will be.
        not_before: Timestamp,
    },
    /// Its time is over.
    #[error("the certificate expired on {not_after}")]
    Expired {
        /// When it was.
        not_after: Timestamp,
    },
    /// None of the operator's authorities signed it.
    #[error("the certificate was signed by no known authority")]
    UnknownAuthority,
    /// It is for something else than authenticating clients.
    #[error("the certificate is not for client authentication")]
    NotForClients,
    /// It says something that may not be ignored and is not understood.
    #[error("the certificate has the critical extension {oid}, which is not understood")]
    UnknownCriticalExtension {
        /// Which one.
        oid: String,
    },
    /// It is signed with SHA-1 or something as weak or unknown.
    #[error("the certificate is signed with an algorithm that is not accepted")]
    SignatureAlgorithm,
    /// An authority on the way may not vouch for it.
    #[error("{0}")]
    Refused(String),
}

/// The operator's authorities: certificates that are trusted, and others that lead to them.
#[derive(Debug)]
pub struct TrustAnchors {
    authorities: Vec<Authority>,
    /// Places in `authorities`, by subject.
    by_subject: HashMap<Bytes, Vec<usize>>,
}

#[derive(Debug)]
struct Authority {
    certificate: Certificate,
    anchor: bool,
    /// The ways from here to an anchor.
    paths: Vec<Path>,
}

/// All that is known of a way without looking at the clock.
#[derive(Debug)]
struct Path {
    not_before: Timestamp,
    not_after: Timestamp,
    verdict: Result<(), ChainError>,
    /// What authorities on the way allow the leaf to be called.
    constraints: Vec<Arc<Constraints>>,
}

impl TrustAnchors {
    /// From PEM files' contents; `intermediates` may be empty.
    ///
    /// Fails where a block is no certificate or cannot be read, and where there is no root at all.
    pub fn from_pem(roots: &[u8], intermediates: &[u8]) -> Result<Self, CertificateError> {
        let mut authorities: Vec<Authority> = Vec::new();
        for (text, anchor) in [(roots, true), (intermediates, false)] {
            for certificate in certificates(text)? {
                if !authorities.iter().any(|known| known.certificate == certificate) {
                    authorities.push(Authority { certificate, anchor, paths: Vec::new() });
                }
            }
            if authorities.is_empty() {
                return Err(CertificateError::new("there is no CERTIFICATE block"));
            }
        }
        if authorities.len() > MAX_CERTIFICATES {
            return Err(CertificateError::new(format!("there are more than {MAX_CERTIFICATES} certificates")));
        }
        let mut by_subject: HashMap<Bytes, Vec<usize>> = HashMap::new();
        for (index, authority) in authorities.iter().enumerate() {
            by_subject.entry(authority.certificate.details.subject.clone()).or_default().push(index);
        }
        let paths: Vec<Vec<Path>> = authorities
            .iter()
            .map(|authority| {
                let mut paths = Vec::new();
                walk(&authorities, &by_subject, &mut vec![authority], &mut paths);
                paths
            })
            .collect();
        for (authority, paths) in authorities.iter_mut().zip(paths) {
            authority.paths = paths;
        }
        Ok(Self { authorities, by_subject })
    }

    /// Checks the chain for client authentication at `now`; answers until when the verdict holds (the earliest end of a certificate of the chain).
    pub fn verify(&self, certificate: &Certificate, now: Timestamp) -> Result<Timestamp, ChainError> {
        check_time(certificate, now)?;
        check_leaf(certificate)?;
        if self.authorities.iter().any(|authority| authority.anchor && authority.certificate == *certificate) {
            return Ok(certificate.not_after);
        }
        let mut verdict = Err(ChainError::UnknownAuthority);
        for authority in self.by_subject.get(&certificate.details.issuer).into_iter().flatten().filter_map(|index| self.authorities.get(*index)) {
            // Another authority can have the same name, so the key decides.
            match check_signature(certificate, &authority.certificate) {
                Ok(()) => {}
                Err(ChainError::UnknownAuthority) => continue,
                Err(error) => return Err(error),
            }
            for path in &authority.paths {
                verdict = best(verdict, path.verdict_on(certificate, now));
            }
        }
        verdict.map(|until| until.min(certificate.not_after))
    }
}

impl Path {
    /// Until when the way holds for a leaf at its start.
    fn verdict_on(&self, leaf: &Certificate, now: Timestamp) -> Result<Timestamp, ChainError> {
        self.verdict.clone()?;
        if now < self.not_before {
            return Err(ChainError::Refused(format!("an authority of the certificate is not valid before {}", self.not_before)));
        }
        if now > self.not_after {
            return Err(ChainError::Refused(format!("an authority of the certificate expired on {}", self.not_after)));
        }
        if !self.constraints.iter().all(|constraints| constraints.allow(leaf)) {
            return Err(ChainError::Refused("an authority of the certificate does not allow its name".into()));
        }
        Ok(self.not_after)
    }
}

/// The longer of two good verdicts, else the good one, else the one that says more.
fn best(one: Result<Timestamp, ChainError>, other: Result<Timestamp, ChainError>) -> Result<Timestamp, ChainError> {
    match (one, other) {
        (Ok(one), Ok(other)) => Ok(one.max(other)),
        (Ok(until), Err(_)) | (Err(_), Ok(until)) => Ok(until),
        (Err(ChainError::UnknownAuthority), Err(error)) | (Err(error), Err(_)) => Err(error),
    }
}

fn certificates(text: &[u8]) -> Result<Vec<Certificate>, CertificateError> {
    let blocks = pem::parse_many(text).map_err(|_| CertificateError::new("the file is not PEM"))?;
    let read = |block: pem::Pem| {
        if block.tag() != "CERTIFICATE" {
            return Err(CertificateError::new(format!("the file has a block of type `{}`", block.tag().escape_debug())));
        }
        Certificate::from_der(block.into_contents())
    };
    blocks.into_iter().map(read).collect()
}

/// Follows every signature upwards from the last of `chain`, which begins at the authority whose ways are wanted.
fn walk<'a>(authorities: &'a [Authority], by_subject: &HashMap<Bytes, Vec<usize>>, chain: &mut Vec<&'a Authority>, paths: &mut Vec<Path>) {
    let Some(last) = chain.last().copied() else { return };
    if last.anchor {
        paths.push(Path {
            not_before: chain.iter().map(|authority| authority.certificate.not_before).max().unwrap_or_default(),
            not_after: chain.iter().map(|authority| authority.certificate.not_after).min().unwrap_or_default(),
            verdict: check_chain(chain),
            constraints: chain.iter().filter_map(|authority| authority.certificate.details.name_constraints.clone()).collect(),
        });
        return;
    }
    for index in by_subject.get(&last.certificate.details.issuer).into_iter().flatten() {
        let Some(issuer) = authorities.get(*index) else { continue };
        let is_new = !chain.iter().any(|known| known.certificate == issuer.certificate);
        // One with a weak signature counts as a way, so that the refusal can say why.
        let signed = || check_signature(&last.certificate, &issuer.certificate) != Err(ChainError::UnknownAuthority);
        if is_new && chain.len() < MAX_PATH && paths.len() < MAX_PATHS && signed() {
            chain.push(issuer);
            walk(authorities, by_subject, chain, paths);
            chain.pop();
        }
    }
}

/// What can be said of authorities, first the one that signed the leaf, without looking at the clock.
fn check_chain(chain: &[&Authority]) -> Result<(), ChainError> {
    let mut below = 0_u32;
    for (index, authority) in chain.iter().enumerate() {
        let details = &authority.certificate.details;
        let refuse = |problem: &str| {
            let name: String = authority.certificate.subject.chars().take(120).collect();
            Err(ChainError::Refused(format!("the authority `{name}` {problem}")))
        };
        match details.basic_constraints {
            Some((true, Some(limit))) if below > limit => return refuse("has more authorities below it than it allows"),
            Some((true, _)) => {}
            // Version 1 could not say. The operator says it of an anchor, nobody of an intermediate.
            None if authority.anchor && !details.version_3 => {}
            Some((false, _)) | None => return refuse("is not an authority"),
        }
        if details.key_cert_sign == Some(false) {
            return refuse("may not sign certificates");
        }
        if details.client_auth == Some(false) {
            return refuse("is not for client authentication");
        }
        let below_it = chain.get(..index).unwrap_or_default();
        if let Some(constraints) = &details.name_constraints
            && !below_it.iter().all(|authority| constraints.allow(&authority.certificate))
        {
            return refuse("does not allow the name of an authority below it");
        }
        if let Some(oid) = &details.unknown_critical {
            return refuse(&format!("has the critical extension {oid}, which is not understood"));
        }
        if let Some(issuer) = chain.get(index + 1) {
            check_signature(&authority.certificate, &issuer.certificate)?;
        }
        // RFC 5280, 4.2.1.9: one that only continues itself under a new key is not counted.
        if details.subject != details.issuer {
            below = below.saturating_add(1);
        }
    }
    Ok(())
}

fn check_time(certificate: &Certificate, now: Timestamp) -> Result<(), ChainError> {
    if now < certificate.not_before {
        return Err(ChainError::NotYetValid { not_before: certificate.not_before });
    }
    if now > certificate.not_after {
        return Err(ChainError::Expired { not_after: certificate.not_after });
    }
    Ok(())
}

fn check_leaf(certificate: &Certificate) -> Result<(), ChainError> {
    let details = &certificate.details;
    if let Some(oid) = &details.unknown_critical {
        return Err(ChainError::UnknownCriticalExtension { oid: oid.clone() });
    }
    if details.client_auth == Some(false) {
        return Err(ChainError::NotForClients);
    }
    Ok(())
}

/// Whether the issuer's key signed the certificate; not being signed by it is `UnknownAuthority`.
fn check_signature(certificate: &Certificate, issuer: &Certificate) -> Result<(), ChainError> {
    let details = &certificate.details;
    let Some((scheme, hash)) = details.algorithm.filter(|(_, hash)| *hash != Hash::Sha1) else {
        return Err(ChainError::SignatureAlgorithm);
    };
    issuer.verify(scheme, hash, &details.signed, &details.signature).map_err(|_| ChainError::UnknownAuthority)
}
