//! A push certificate with its key, as an operator uploads them.

use aws_lc_rs::rsa;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::time::Timestamp;

/// The subject attribute that names the topic.
const USER_ID: &str = "0.9.2342.19200300.100.1.1";
/// Topics of Apple's push certificates for MDM begin so.
const TOPIC_PREFIX: &str = "com.apple.mgmt";

/// A certificate whose key fits.
#[derive(Clone)]
pub struct PushCertificatePair {
    /// The subject's user id, `com.apple.mgmt.…`.
    pub topic: String,
    /// When the certificate ends; whether that is over is the caller's question.
    pub not_after: Timestamp,
    /// The certificate alone.
    pub certificate_pem: String,
    /// The key alone. A secret.
    pub private_key_pem: String,
}

impl std::fmt::Debug for PushCertificatePair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PushCertificatePair").field("topic", &self.topic).field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

/// Why an upload was refused, in a sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PushCertificateError {
    #[error("no PEM block was found: send the certificate and its private key, both PEM, in one body")]
    NoPem,
    #[error("certificate: there is no CERTIFICATE block")]
    NoCertificate,
    #[error("private key: there is no PRIVATE KEY block")]
    NoPrivateKey,
    #[error("private key: it is encrypted; decrypt it first")]
    EncryptedKey,
    #[error("a PEM block of type `{0}` does not belong here: send a CERTIFICATE and a PRIVATE KEY")]
    ForeignBlock(String),
    #[error("certificate: it cannot be read")]
    UnreadableCertificate,
    #[error("private key: it cannot be read; RSA and elliptic-curve keys (P-256, P-384) are understood")]
    UnreadableKey,
    #[error("private key: it is not the certificate's")]
    OtherKey,
    #[error("certificate: its subject has no user id that begins with `{TOPIC_PREFIX}`, so it is no push certificate for MDM")]
    NoTopic,
}

impl PushCertificatePair {
    /// Reads certificate and key from PEM blocks in any order; of several of a kind the last counts, as in NanoMDM.
    pub fn from_pem(text: &[u8]) -> Result<Self, PushCertificateError> {
        // Files put together without a newline between are common enough that NanoMDM takes them.
        let text = String::from_utf8_lossy(text).replace("----------", "-----\n-----");
        let blocks = pem::parse_many(&text).map_err(|_| PushCertificateError::NoPem)?;
        let (mut certificate, mut key) = (None, None);
        for block in &blocks {
            match block.tag() {
                "CERTIFICATE" => certificate = Some(block),
                "ENCRYPTED PRIVATE KEY" => return Err(PushCertificateError::EncryptedKey),
                tag if tag.ends_with("PRIVATE KEY") => {
                    if block.headers().get("Proc-Type").is_some_and(|value| value.contains("ENCRYPTED")) {
                        return Err(PushCertificateError::EncryptedKey);
                    }
                    key = Some(block);
                }
                other => return Err(PushCertificateError::ForeignBlock(other.chars().take(60).collect())),
            }
        }
        if blocks.is_empty() {
            return Err(PushCertificateError::NoPem);
        }
        let certificate = certificate.ok_or(PushCertificateError::NoCertificate)?;
        let key = key.ok_or(PushCertificateError::NoPrivateKey)?;
        let (_, parsed) = X509Certificate::from_der(certificate.contents()).map_err(|_| PushCertificateError::UnreadableCertificate)?;
        if public_key(key.contents())? != *parsed.public_key().subject_public_key.data {
            return Err(PushCertificateError::OtherKey);
        }
        let topic = parsed
            .subject()
            .iter_attributes()
            .filter(|attribute| attribute.attr_type().to_id_string() == USER_ID)
            .find_map(|attribute| attribute.as_str().ok())
            .filter(|topic| topic.starts_with(TOPIC_PREFIX))
            .ok_or(PushCertificateError::NoTopic)?
            .to_owned();
        Ok(Self {
            topic,
            not_after: Timestamp::from_millis(parsed.validity().not_after.timestamp().saturating_mul(1000)),
            certificate_pem: pem::encode(certificate),
            private_key_pem: pem::encode(key),
        })
    }
}

/// The public half, in the form in which a certificate holds it.
fn public_key(private_key: &[u8]) -> Result<Vec<u8>, PushCertificateError> {
    if let Ok(pair) = rsa::KeyPair::from_pkcs8(private_key).or_else(|_| rsa::KeyPair::from_der(private_key)) {
        return Ok(pair.public_key().as_ref().to_vec());
    }
    for algorithm in [&ECDSA_P256_SHA256_ASN1_SIGNING, &ECDSA_P384_SHA384_ASN1_SIGNING] {
        if let Ok(pair) = EcdsaKeyPair::from_pkcs8(algorithm, private_key).or_else(|_| EcdsaKeyPair::from_private_key_der(algorithm, private_key)) {
            return Ok(pair.public_key().as_ref().to_vec());
        }
    }
    Err(PushCertificateError::UnreadableKey)
}
