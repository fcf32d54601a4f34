//! Who issues the push service's own certificate, and push certificates.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, DnValue, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_RSA_SHA256, RsaKeySize, SerialNumber, date_time_ymd,
};
use rustls::RootCertStore;
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;

use crate::authority::{first_block, write, write_private};
use crate::error::SimulatorError;

/// `userId`, 0.9.2342.19200300.100.1.1: a push certificate's topic.
const USER_ID: [u64; 7] = [0, 9, 2342, 19_200_300, 100, 1, 1];

const ROOT: &str = "push-root.pem";
const ROOT_KEY: &str = "push-root-key.pem";

/// A throw-away authority.
pub struct PushAuthority {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
    root_pem: String,
}

impl std::fmt::Debug for PushAuthority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PushAuthority").finish_non_exhaustive()
    }
}

/// What a push certificate is to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PushCertificateRequest {
    /// The subject's user id; none makes a certificate that is no push certificate.
    pub topic: Option<String>,
    /// Year, month and day of the beginning.
    pub not_before: (i32, u8, u8),
    /// Year, month and day of the end.
    pub not_after: (i32, u8, u8),
    /// RSA of 2048 bits, as Apple's are, instead of P-256, which is quick to make.
    pub rsa: bool,
}

impl PushCertificateRequest {
    /// A valid one.
    pub fn new(topic: impl Into<String>) -> Self {
        Self { topic: Some(topic.into()), not_before: (2024, 1, 1), not_after: (2044, 1, 1), rsa: false }
    }

    /// One that is over.
    pub fn expired(topic: impl Into<String>) -> Self {
        Self { not_before: (2019, 1, 1), not_after: (2020, 1, 1), ..Self::new(topic) }
    }
}

/// What an operator gets from Apple.
#[derive(Clone)]
pub struct IssuedPushCertificate {
    /// The certificate.
    pub certificate_pem: String,
    /// Its key, PKCS#8.
    pub private_key_pem: String,
    /// The serial number, upper-case hexadecimal, as [`crate::apns::Received`] shows it.
    pub serial: String,
}

impl std::fmt::Debug for IssuedPushCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IssuedPushCertificate").field("serial", &self.serial).finish_non_exhaustive()
    }
}

impl PushAuthority {
    /// A new one, whose key nobody else has.
    pub fn new() -> Result<Self, SimulatorError> {
        let failed = |error: rcgen::Error| SimulatorError::cryptography("push authority", error);
        let key = KeyPair::generate().map_err(failed)?;
        // A name of its own: of two authorities of one name only a broken signature would tell that the other was meant.
        let name = format!("Simulated push authority {}", hexadecimal(&serial_number()?));
        let mut parameters = parameters(&name, ((2024, 1, 1), (2044, 1, 1)));
        parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let root = parameters.self_signed(&key).map_err(failed)?;
        Self::assemble(root.der().clone(), key)
    }

    /// The one in that directory (`push-root.pem`, `push-root-key.pem`), made if there is none.
    pub fn load_or_create(directory: &Path) -> Result<Self, SimulatorError> {
        let (root_path, key_path) = (directory.join(ROOT), directory.join(ROOT_KEY));
        if root_path.exists() && key_path.exists() {
            let failed = |error| SimulatorError::cryptography("push authority", error);
            let key = KeyPair::try_from(first_block(&key_path)?).map_err(failed)?;
            return Self::assemble(first_block(&root_path)?.into(), key);
        }
        std::fs::create_dir_all(directory).map_err(|error| SimulatorError::io(directory, error))?;
        let new = Self::new()?;
        write_private(&key_path, &new.issuer.key().serialize_pem())?;
        write(&root_path, &new.root_pem)?;
        Ok(new)
    }

    fn assemble(root: CertificateDer<'static>, key: KeyPair) -> Result<Self, SimulatorError> {
        let issuer = Issuer::from_ca_cert_der(&root, key).map_err(|error| SimulatorError::cryptography("push authority", error))?;
        let root_pem = pem::encode(&pem::Pem::new("CERTIFICATE", root.to_vec()));
        Ok(Self { issuer, root, root_pem })
    }

    /// Its own certificate.
    pub fn root_pem(&self) -> String {
        self.root_pem.clone()
    }

    /// A valid push certificate.
    pub fn issue(&self, topic: &str) -> Result<IssuedPushCertificate, SimulatorError> {
        self.issue_as(&PushCertificateRequest::new(topic))
    }

    /// A push certificate that says what `request` says.
    pub fn issue_as(&self, request: &PushCertificateRequest) -> Result<IssuedPushCertificate, SimulatorError> {
        let failed = |error: rcgen::Error| SimulatorError::cryptography("push certificate", error);
        let key = if request.rsa { KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048) } else { KeyPair::generate() }.map_err(failed)?;
        let mut parameters = parameters("APSP:simulated", (request.not_before, request.not_after));
        if let Some(topic) = &request.topic {
            parameters.distinguished_name.push(DnType::CustomDnType(USER_ID.to_vec()), DnValue::Utf8String(topic.clone()));
        }
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let serial = serial_number()?;
        parameters.serial_number = Some(SerialNumber::from_slice(&serial));
        let certificate = parameters.signed_by(&key, &self.issuer).map_err(failed)?;
        Ok(IssuedPushCertificate { certificate_pem: certificate.pem(), private_key_pem: key.serialize_pem(), serial: hexadecimal(&serial) })
    }

    /// TLS for a push service of these names. A client without a certificate is let in: what Apple says to it, it says over HTTP.
    pub(super) fn server_config(&self, names: &[String]) -> Result<Arc<ServerConfig>, SimulatorError> {
        let failed = |error: rcgen::Error| SimulatorError::cryptography("push service's certificate", error);
        let tls = |error: rustls::Error| SimulatorError::cryptography("push service's TLS", error);
        let key = KeyPair::generate().map_err(failed)?;
        let mut parameters = CertificateParams::new(names.to_vec()).map_err(failed)?;
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = parameters.signed_by(&key, &self.issuer).map_err(failed)?;
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(|error| SimulatorError::cryptography("push service's key", error))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(self.root.clone()).map_err(tls)?;
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .allow_unauthenticated()
            .build()
            .map_err(|error| SimulatorError::cryptography("push service's TLS", error))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(tls)?
            .with_client_cert_verifier(clients)
            .with_single_cert(vec![certificate.der().clone()], key)
            .map_err(tls)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }
}

fn serial_number() -> Result<[u8; 8], SimulatorError> {
    let mut serial = [0; 8];
    aws_lc_rs::rand::fill(&mut serial).map_err(|_| SimulatorError::cryptography("serial number", "no randomness is to be had"))?;
    // Positive and of full length, whatever chance says.
    serial[0] = (serial[0] & 0x7F) | 0x40;
    Ok(serial)
}

/// Upper case, as tools print serial numbers.
pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02X}");
        text
    })
}

fn parameters(name: &str, (begin, end): ((i32, u8, u8), (i32, u8, u8))) -> CertificateParams {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = DistinguishedName::new();
    parameters.distinguished_name.push(DnType::CommonName, name);
    parameters.not_before = date_time_ymd(begin.0, begin.1, begin.2);
    parameters.not_after = date_time_ymd(end.0, end.1, end.2);
    parameters
}
