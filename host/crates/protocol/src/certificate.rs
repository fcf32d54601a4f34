//! Identity certificates: reading, header forms, chains.
use crate::time::Timestamp;
use bytes::Bytes;
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    pub der: Bytes,
    pub sha256: [u8; 32],
    /// RFC 4514 text.
    pub subject: String,
    pub issuer: String,
    pub not_before: Timestamp,
    pub not_after: Timestamp,
}
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    #[error("{0}")]
    Malformed(String),
}
impl Certificate {
    pub fn from_der(_der: impl Into<Bytes>) -> Result<Self, CertificateError> {
        todo!()
    }
    /// From a proxy's header: RFC 9440 (`:base64:`) or URL-escaped PEM.
    pub fn from_header(_value: &[u8]) -> Result<Self, CertificateError> {
        todo!()
    }
    /// Lower-case hex of `sha256`.
    pub fn fingerprint(&self) -> String {
        todo!()
    }
}
/// The operator's authorities.
#[derive(Debug)]
pub struct TrustAnchors {}
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    #[error("{0}")]
    Refused(String),
}
impl TrustAnchors {
    /// From PEM files' contents; `intermediates` may be empty.
    pub fn from_pem(_roots: &[u8], _intermediates: &[u8]) -> Result<Self, CertificateError> {
        todo!()
    }
    /// Checks the chain for client authentication at `now`; answers until when the verdict holds (the earliest end of a certificate of the chain).
    pub fn verify(
        &self,
        _certificate: &Certificate,
        _now: Timestamp,
    ) -> Result<Timestamp, ChainError> {
        todo!()
    }
}
