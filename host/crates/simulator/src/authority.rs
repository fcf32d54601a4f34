//! A test authority: the certificate that a server trusts, and one identity certificate for each simulated device.
//!
//! Making RSA keys is slow, so that devices share a small pool of keys; each still has a certificate of its own. Everything that can be
//! follows from the seed: the same seed makes the same devices. The validity is fixed, so that nothing here reads a clock.

use std::path::Path;
use std::sync::Arc;

use aws_lc_rs::encoding::AsDer as _;
use aws_lc_rs::{digest, rsa};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SerialNumber,
    date_time_ymd,
};

use crate::der;
use crate::error::SimulatorError;
use crate::signer::{DeviceKey, RsaKey};

/// The keys of simulated devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum KeyType {
    /// What most devices have.
    #[default]
    #[value(name = "rsa2048")]
    Rsa2048,
    /// Quick to make.
    #[value(name = "p256")]
    P256,
}

/// Who a device is: its certificate and its private key.
#[derive(Debug, Clone)]
pub struct Identity {
    /// DER.
    pub certificate: Bytes,
    /// The key that signs messages.
    pub key: Arc<DeviceKey>,
}

impl Identity {
    /// The certificate as RFC 9440 writes it in a header.
    pub fn rfc9440(&self) -> String {
        format!(":{}:", STANDARD.encode(&self.certificate))
    }

    /// The certificate as PEM.
    pub fn certificate_pem(&self) -> String {
        pem::encode(&pem::Pem::new("CERTIFICATE", self.certificate.to_vec()))
    }
}

/// What a certificate is to say; the defaults are a device's.
#[derive(Debug, Clone)]
pub struct CertificateRequest {
    /// The subject's common name; an empty subject without.
    pub common_name: Option<String>,
    /// Year, month and day of the beginning.
    pub not_before: (i32, u8, u8),
    /// Year, month and day of the end.
    pub not_after: (i32, u8, u8),
    /// Extended key usages: client authentication unless changed.
    pub usages: Vec<ExtendedKeyUsagePurpose>,
    /// Which certificate of its kind this is: the serial number and the key follow from it.
    pub number: u64,
}

impl CertificateRequest {
    /// A valid device certificate.
    pub fn device(number: u64, common_name: impl Into<String>) -> Self {
        Self {
            common_name: Some(common_name.into()),
            not_before: NOT_BEFORE,
            not_after: NOT_AFTER,
            usages: vec![ExtendedKeyUsagePurpose::ClientAuth],
            number,
        }
    }
}

const NOT_BEFORE: (i32, u8, u8) = (2024, 1, 1);
const NOT_AFTER: (i32, u8, u8) = (2044, 1, 1);
const ROOT_KEY: &str = "root-key.pem";
const ROOT: &str = "root.pem";
const DEVICE_KEYS: &str = "device-keys.pem";

/// A root, and the keys of the devices it vouches for.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root: Bytes,
    keys: Vec<PooledKey>,
    seed: u64,
    topic: String,
}

struct PooledKey {
    signer: Arc<DeviceKey>,
    certified: KeyPair,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("seed", &self.seed).field("keys", &self.keys.len()).finish_non_exhaustive()
    }
}

impl Authority {
    /// An authority for tests: four P-256 keys, all of it following from the seed but the signatures.
    pub fn new(seed: u64) -> Result<Self, SimulatorError> {
        Self::with_keys(seed, KeyType::P256, 4)
    }

    /// An authority whose devices share `count` keys of one type.
    pub fn with_keys(seed: u64, key_type: KeyType, count: usize) -> Result<Self, SimulatorError> {
        let root_key = make_key(seed, "root", 0, key_type)?;
        let keys = make_pool(seed, key_type, count)?;
        let root = make_root(seed, key_type, &root_key)?;
        Self::assemble(seed, key_type, &root_key, root, &keys)
    }

    /// Reads the authority of `directory`, or makes one and leaves it there: `root.pem` is what a server is started with. Keys of
    /// devices are kept too, so that the same seed means the same devices again.
    pub fn load_or_create(directory: &Path, seed: u64, key_type: KeyType, count: usize) -> Result<Self, SimulatorError> {
        std::fs::create_dir_all(directory).map_err(|error| SimulatorError::io(directory, error))?;
        let root_key_path = directory.join(ROOT_KEY);
        let root_path = directory.join(ROOT);
        let pool_path = directory.join(DEVICE_KEYS);

        let (root_key, root) = if root_key_path.exists() && root_path.exists() {
            (first_block(&root_key_path)?, first_block(&root_path)?)
        } else {
            let key = make_key(seed, "root", 0, key_type)?;
            let root = make_root(seed, key_type, &key)?;
            write_private(&root_key_path, &pem::encode(&pem::Pem::new("PRIVATE KEY", key.clone())))?;
            write(&root_path, &pem::encode(&pem::Pem::new("CERTIFICATE", root.clone())))?;
            (key, root)
        };

        let mut pool = if pool_path.exists() { blocks(&pool_path)? } else { Vec::new() };
        // Keys of another type make way: the pool holds one type.
        pool.retain(|key| signer(key, key_type).is_ok());
        if pool.len() < count {
            for number in pool.len()..count {
                pool.push(make_key(seed, "device", number as u64, key_type)?);
            }
            let blocks: Vec<pem::Pem> = pool.iter().map(|key| pem::Pem::new("PRIVATE KEY", key.clone())).collect();
            write_private(&pool_path, &pem::encode_many(&blocks))?;
        }
        pool.truncate(count.max(1));
        Self::assemble(seed, key_type, &root_key, root, &pool)
    }

    fn assemble(seed: u64, key_type: KeyType, root_key: &[u8], root: Vec<u8>, keys: &[Vec<u8>]) -> Result<Self, SimulatorError> {
        if keys.is_empty() {
            return Err(SimulatorError::Argument { name: "keys", problem: "at least one key is needed".into() });
        }
        let failed = |error| SimulatorError::cryptography("root certificate", error);
        let root_key = KeyPair::try_from(root_key).map_err(failed)?;
        let issuer = Issuer::from_ca_cert_der(&root.as_slice().into(), root_key).map_err(failed)?;
        let keys = keys
            .iter()
            .map(|key| {
                Ok(PooledKey {
                    signer: Arc::new(signer(key, key_type)?),
                    certified: KeyPair::try_from(key.as_slice()).map_err(|error| SimulatorError::cryptography("device key", error))?,
                })
            })
            .collect::<Result<Vec<_>, SimulatorError>>()?;
        let topic = format!("com.apple.mgmt.External.{}", derive_uuid(seed, "topic", 0).hyphenated());
        Ok(Self { issuer, root: root.into(), keys, seed, topic })
    }

    /// The root certificate, DER.
    pub fn root_der(&self) -> &Bytes {
        &self.root
    }

    /// The root certificate as PEM: what a server is given as its authority.
    pub fn root_pem(&self) -> String {
        pem::encode(&pem::Pem::new("CERTIFICATE", self.root.to_vec()))
    }

    /// What everything of this authority follows from.
    pub const fn seed(&self) -> u64 {
        self.seed
    }

    /// The push topic of its devices.
    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// A device's certificate with a key of the pool.
    pub fn issue(&self, number: u64, common_name: impl Into<String>) -> Result<Identity, SimulatorError> {
        self.issue_as(&CertificateRequest::device(number, common_name))
    }

    /// A certificate that says what `request` says: also one that a server must refuse.
    pub fn issue_as(&self, request: &CertificateRequest) -> Result<Identity, SimulatorError> {
        let pool_size = self.keys.len() as u64;
        let key = usize::try_from(request.number % pool_size)
            .ok()
            .and_then(|index| self.keys.get(index))
            .ok_or_else(|| SimulatorError::cryptography("device key", "the pool is empty"))?;

        let mut parameters = CertificateParams::default();
        parameters.distinguished_name = DistinguishedName::new();
        if let Some(name) = &request.common_name {
            parameters.distinguished_name.push(DnType::CommonName, name.as_str());
        }
        let (year, month, day) = request.not_before;
        parameters.not_before = date_time_ymd(year, month, day);
        let (year, month, day) = request.not_after;
        parameters.not_after = date_time_ymd(year, month, day);
        parameters.serial_number = Some(serial_number(self.seed, "device", request.number));
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages.clone_from(&request.usages);
        parameters.use_authority_key_identifier_extension = true;

        let certificate =
            parameters.signed_by(&key.certified, &self.issuer).map_err(|error| SimulatorError::cryptography("device certificate", error))?;
        Ok(Identity { certificate: Bytes::copy_from_slice(certificate.der()), key: Arc::clone(&key.signer) })
    }
}

fn make_root(seed: u64, key_type: KeyType, key: &[u8]) -> Result<Vec<u8>, SimulatorError> {
    let failed = |error| SimulatorError::cryptography("root certificate", error);
    let key = KeyPair::try_from(key).map_err(failed)?;
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = DistinguishedName::new();
    parameters.distinguished_name.push(DnType::OrganizationName, "wasmdm simulator");
    parameters.distinguished_name.push(
        DnType::CommonName,
        match key_type {
            KeyType::Rsa2048 => "Simulated devices, RSA",
            KeyType::P256 => "Simulated devices, P-256",
        },
    );
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    let (year, month, day) = NOT_BEFORE;
    parameters.not_before = date_time_ymd(year, month, day);
    let (year, month, day) = NOT_AFTER;
    parameters.not_after = date_time_ymd(year, month, day);
    parameters.serial_number = Some(serial_number(seed, "root", 0));
    Ok(parameters.self_signed(&key).map_err(failed)?.der().to_vec())
}

fn make_pool(seed: u64, key_type: KeyType, count: usize) -> Result<Vec<Vec<u8>>, SimulatorError> {
    (0..count).map(|number| make_key(seed, "device", number as u64, key_type)).collect()
}

/// A private key, PKCS#8. RSA keys are random: the library makes them from no seed.
fn make_key(seed: u64, label: &str, number: u64, key_type: KeyType) -> Result<Vec<u8>, SimulatorError> {
    match key_type {
        KeyType::Rsa2048 => {
            let failed = |_| SimulatorError::cryptography("RSA key", "could not be made");
            let key = rsa::KeyPair::generate(rsa::KeySize::Rsa2048).map_err(failed)?;
            let pkcs8: aws_lc_rs::encoding::Pkcs8V1Der<'static> = key.as_der().map_err(failed)?;
            Ok(pkcs8.as_ref().to_vec())
        }
        KeyType::P256 => {
            const EC_PUBLIC_KEY: &[u8] = &[0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x02, 0x01];
            const P256: &[u8] = &[0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x03, 0x01, 0x07];
            // Any number below the curve's order is a key; a digest is not below it once in four thousand million times.
            let scalar = derive(seed, &format!("{label} p256"), number);
            let without_public_key = der::element(
                der::SEQUENCE,
                &[
                    &der::element(der::INTEGER, &[&[0]]),
                    &der::element(
                        der::SEQUENCE,
                        &[&der::element(der::OBJECT_IDENTIFIER, &[EC_PUBLIC_KEY]), &der::element(der::OBJECT_IDENTIFIER, &[P256])],
                    ),
                    &der::element(
                        der::OCTET_STRING,
                        &[&der::element(der::SEQUENCE, &[&der::element(der::INTEGER, &[&[1]]), &der::element(der::OCTET_STRING, &[&scalar])])],
                    ),
                ],
            );
            let DeviceKey::P256(key) = DeviceKey::p256(&without_public_key)? else {
                return Err(SimulatorError::cryptography("P-256 key", "another type"));
            };
            // Written again with its public key, which other libraries insist on.
            let pkcs8 = key.to_pkcs8v1().map_err(|_| SimulatorError::cryptography("P-256 key", "could not be written"))?;
            Ok(pkcs8.as_ref().to_vec())
        }
    }
}

fn signer(pkcs8: &[u8], key_type: KeyType) -> Result<DeviceKey, SimulatorError> {
    match key_type {
        KeyType::Rsa2048 => RsaKey::from_pkcs8(pkcs8).map(DeviceKey::Rsa),
        KeyType::P256 => DeviceKey::p256(pkcs8),
    }
}

fn serial_number(seed: u64, label: &str, number: u64) -> SerialNumber {
    let mut bytes = derive(seed, &format!("{label} serial number"), number).first_chunk::<16>().copied().unwrap_or_default();
    // Positive and of full length, whatever the digest says.
    if let Some(first) = bytes.first_mut() {
        *first = (*first & 0x7F) | 0x40;
    }
    SerialNumber::from_slice(&bytes)
}

/// 32 bytes that follow from a seed, for one purpose and one number.
pub(crate) fn derive(seed: u64, label: &str, number: u64) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(&seed.to_be_bytes());
    context.update(label.as_bytes());
    context.update(&[0]);
    context.update(&number.to_be_bytes());
    let mut out = [0; 32];
    out.copy_from_slice(context.finish().as_ref());
    out
}

/// A version 4 UUID that follows from a seed.
pub(crate) fn derive_uuid(seed: u64, label: &str, number: u64) -> uuid::Uuid {
    let bytes = derive(seed, label, number).first_chunk::<16>().copied().unwrap_or_default();
    uuid::Builder::from_random_bytes(bytes).into_uuid()
}

fn blocks(path: &Path) -> Result<Vec<Vec<u8>>, SimulatorError> {
    let text = std::fs::read(path).map_err(|error| SimulatorError::io(path, error))?;
    let blocks =
        pem::parse_many(text).map_err(|error| SimulatorError::Argument { name: "ca-dir", problem: format!("{}: {error}", path.display()) })?;
    Ok(blocks.into_iter().map(pem::Pem::into_contents).collect())
}

pub(crate) fn first_block(path: &Path) -> Result<Vec<u8>, SimulatorError> {
    blocks(path)?
        .into_iter()
        .next()
        .ok_or_else(|| SimulatorError::Argument { name: "ca-dir", problem: format!("{} holds no PEM block", path.display()) })
}

pub(crate) fn write(path: &Path, text: &str) -> Result<(), SimulatorError> {
    std::fs::write(path, text).map_err(|error| SimulatorError::io(path, error))
}

pub(crate) fn write_private(path: &Path, text: &str) -> Result<(), SimulatorError> {
    use std::io::Write as _;
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path).map_err(|error| SimulatorError::io(path, error))?;
    file.write_all(text.as_bytes()).map_err(|error| SimulatorError::io(path, error))
}
