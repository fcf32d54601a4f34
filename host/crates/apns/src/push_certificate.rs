//! A push certificate with its key, as an operator uploads them: PEM or PKCS#12, the key under a password or not.

use std::fmt::Write as _;

use aws_lc_rs::rsa;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, ECDSA_P521_SHA512_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _,
};
use p12_keystore::KeyStore;
use pem::Pem;
use pkcs8::EncryptedPrivateKeyInfo;
use pkcs8::pkcs5::{EncryptionScheme, pbes2::Kdf};
use wasmdm_protocol::time::Timestamp;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::old_encryption;

/// The subject attribute that names the topic.
const USER_ID: &str = "0.9.2342.19200300.100.1.1";
/// Topics of Apple's push certificates for MDM begin so.
const TOPIC_PREFIX: &str = "com.apple.mgmt";
/// The longest topic; Apple's have about sixty letters.
const LONGEST_TOPIC: usize = 255;
/// How much work a file may ask of us before its password is even known to be right: some seconds at most.
const MOST_ITERATIONS: u32 = 10_000_000;
/// The same for scrypt, which takes memory.
const MOST_MEMORY: u64 = 256 << 20;

/// A certificate whose key fits.
#[derive(Clone)]
pub struct PushCertificatePair {
    /// The subject's user id, `com.apple.mgmt.…`.
    pub topic: String,
    /// When the certificate begins; [`Self::check_validity`] compares it.
    pub not_before: Timestamp,
    /// When the certificate ends; [`Self::check_validity`] compares it.
    pub not_after: Timestamp,
    /// The certificate's serial number, upper-case hexadecimal, for people to compare.
    pub serial: String,
    /// The certificate alone.
    pub certificate_pem: String,
    /// The key alone, without a password. A secret.
    pub private_key_pem: String,
}

impl std::fmt::Debug for PushCertificatePair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PushCertificatePair").field("topic", &self.topic).field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

/// Why an upload was refused: what is wrong, and what to do, in one sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the sentences say it")]
pub enum PushCertificateError {
    #[error("no PEM block was found: send the certificate and its private key, both PEM, in one body, or a PKCS#12 file")]
    NoPem,
    #[error("certificate: there is no CERTIFICATE block: add the certificate that Apple's portal gave you")]
    NoCertificate,
    #[error("private key: there is no PRIVATE KEY block: add the key that the certificate was requested with")]
    NoPrivateKey,
    #[error("private key: there are {0} of them: send only the one that the certificate was requested with")]
    SeveralKeys(usize),
    #[error("private key: it is encrypted: give its password, or decrypt it first")]
    PasswordNeeded,
    #[error("password: it does not open the private key: give the one that the key was encrypted with")]
    WrongPassword,
    #[error("private key: its encryption is not understood: convert it with `openssl pkcs8 -topk8 -v2 aes-256-cbc` first")]
    UnknownEncryption,
    #[error("private key: its encryption asks for too much work: encrypt it again with fewer iterations")]
    CostlyEncryption,
    #[error("a PEM block of type `{0}` does not belong here: send a CERTIFICATE and a PRIVATE KEY")]
    ForeignBlock(String),
    #[error("certificate: it cannot be read: send the file that Apple's portal gave you, unchanged")]
    UnreadableCertificate,
    #[error("private key: it cannot be read: RSA keys of 2048 bits or more and elliptic-curve keys (P-256, P-384, P-521) are understood")]
    UnreadableKey,
    #[error("private key: it is not the certificate's: send the key that this certificate was requested with")]
    OtherKey,
    #[error(
        "certificate: its subject has no user id that begins with `{TOPIC_PREFIX}`, so it is no push certificate for MDM: request one at https://identity.apple.com/pushcert"
    )]
    NoTopic,
    #[error("PKCS#12: its password is missing or wrong: give the one that the file was exported with")]
    Pkcs12Password,
    #[error("PKCS#12: the file cannot be read: export certificate and key again, or send both as PEM")]
    UnreadablePkcs12,
    #[error("PKCS#12: there is no certificate with its private key in it: export both together")]
    EmptyPkcs12,
    #[error("certificate: there are several, of the topics `{0}` and `{1}`: send only the one that is to be used")]
    SeveralTopics(String, String),
    #[error("certificate: it expired at {0}: renew it in Apple's portal and send the new one")]
    Expired(Timestamp),
    #[error("certificate: it is valid only from {0}: check the clock of this server")]
    NotYetValid(Timestamp),
    #[error(
        "certificate: its topic is `{found}` where `{expected}` is expected: renew the certificate that is in use (another topic reaches none of its devices)"
    )]
    OtherTopic { expected: String, found: String },
}

/// What a file is, as its first bytes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileForm {
    /// Text; whether there are PEM blocks in it is another question.
    Text,
    /// One certificate in DER, as some of Apple's pages give them.
    DerCertificate,
    /// Anything else that is binary: PKCS#12, if it is of use at all.
    Pkcs12,
}

impl FileForm {
    /// Looks at the file.
    pub fn of(file: &[u8]) -> Self {
        // A DER sequence; no PEM file begins with `0`.
        if file.first() != Some(&0x30) {
            return Self::Text;
        }
        if X509Certificate::from_der(file).is_ok() { Self::DerCertificate } else { Self::Pkcs12 }
    }
}

impl PushCertificatePair {
    /// Reads a file: PKCS#12 if it begins like one, else PEM. For the command line, as [`Self::from_pkcs12`] says.
    pub fn read(file: &[u8], password: Option<&str>) -> Result<Self, PushCertificateError> {
        Self::read_all(&[file], password)
    }

    /// Reads files that belong together, such as the certificate as Apple's portal gave it (PEM or DER) and its key. For the command line, as
    /// [`Self::from_pkcs12`] says.
    pub fn read_all<F: AsRef<[u8]>>(files: &[F], password: Option<&str>) -> Result<Self, PushCertificateError> {
        let mut text = Vec::new();
        for file in files.iter().map(AsRef::as_ref) {
            match FileForm::of(file) {
                FileForm::Text => text.extend_from_slice(file),
                FileForm::DerCertificate => text.extend_from_slice(pem::encode(&Pem::new("CERTIFICATE", file)).as_bytes()),
                FileForm::Pkcs12 => text.extend_from_slice(pem::encode_many(&opened(file, password)?).as_bytes()),
            }
            text.push(b'\n');
        }
        Self::from_pem(&text, password)
    }

    /// Reads certificate and key from PEM blocks in any order. Of several certificates the one that fits the key counts, and of these the one
    /// that ends last: some send the chain along, some the expired one. The password is only looked at where the key is encrypted.
    pub fn from_pem(text: &[u8], password: Option<&str>) -> Result<Self, PushCertificateError> {
        // Files put together without a newline between are common enough that NanoMDM takes them.
        let text = String::from_utf8_lossy(text).replace("----------", "-----\n-----");
        let blocks = pem::parse_many(&text).map_err(|_| PushCertificateError::NoPem)?;
        if blocks.is_empty() {
            return Err(PushCertificateError::NoPem);
        }
        let (mut certificates, mut keys) = (Vec::new(), Vec::new());
        for block in blocks {
            match block.tag() {
                "CERTIFICATE" => certificates.push(block.into_contents()),
                // `openssl ecparam -genkey` writes them before the key, which says the same.
                "EC PARAMETERS" => {}
                tag if tag.ends_with("PRIVATE KEY") => keys.push(block),
                other => return Err(PushCertificateError::ForeignBlock(other.chars().take(60).collect())),
            }
        }
        if certificates.is_empty() {
            return Err(PushCertificateError::NoCertificate);
        }
        let count = keys.len();
        let key = keys.pop().ok_or(PushCertificateError::NoPrivateKey)?;
        if count > 1 {
            return Err(PushCertificateError::SeveralKeys(count));
        }
        Self::new(&certificates, &decrypted(key, password)?)
    }

    /// Reads a PKCS#12 file, of old encryption or new.
    ///
    /// Only for files that an operator has at hand, on the command line: its parts are encrypted, so nothing bounds beforehand what a
    /// hostile one asks for, and the library follows a circle of issuers without end. What comes over the network is PEM.
    pub fn from_pkcs12(der: &[u8], password: Option<&str>) -> Result<Self, PushCertificateError> {
        let blocks = opened(der, password)?;
        let (keys, certificates): (Vec<Pem>, Vec<Pem>) = blocks.into_iter().partition(|block| block.tag() == PRIVATE_KEY);
        let key = keys.first().ok_or(PushCertificateError::EmptyPkcs12)?;
        Self::new(&certificates.into_iter().map(Pem::into_contents).collect::<Vec<_>>(), key)
    }

    fn new(certificates: &[Vec<u8>], key: &Pem) -> Result<Self, PushCertificateError> {
        let public = public_key(key.contents())?;
        let mut fitting: Option<(&Vec<u8>, X509Certificate<'_>)> = None;
        let mut topics = Vec::new();
        for der in certificates {
            let (_, certificate) = X509Certificate::from_der(der).map_err(|_| PushCertificateError::UnreadableCertificate)?;
            topics.extend(topic(&certificate));
            let fits = *certificate.public_key().subject_public_key.data == *public;
            let ends = |certificate: &X509Certificate<'_>| certificate.validity().not_after.timestamp();
            if fits && fitting.as_ref().is_none_or(|(_, other)| ends(other) <= ends(&certificate)) {
                fitting = Some((der, certificate));
            }
        }
        let (der, certificate) = fitting.ok_or(PushCertificateError::OtherKey)?;
        let topic = topic(&certificate).ok_or(PushCertificateError::NoTopic)?;
        // Which one is meant would be a guess, and a wrong one loses a fleet.
        if let Some(other) = topics.into_iter().find(|other| *other != topic) {
            return Err(PushCertificateError::SeveralTopics(topic, other));
        }
        let time = |seconds: i64| Timestamp::from_millis(seconds.saturating_mul(1000));
        Ok(Self {
            topic,
            not_before: time(certificate.validity().not_before.timestamp()),
            not_after: time(certificate.validity().not_after.timestamp()),
            serial: serial(certificate.raw_serial()),
            certificate_pem: pem::encode(&Pem::new("CERTIFICATE", der.clone())),
            private_key_pem: pem::encode(key),
        })
    }

    /// Refuses a certificate that is not valid now.
    pub fn check_validity(&self, now: Timestamp) -> Result<(), PushCertificateError> {
        if self.not_after < now {
            return Err(PushCertificateError::Expired(self.not_after));
        }
        if now < self.not_before {
            return Err(PushCertificateError::NotYetValid(self.not_before));
        }
        Ok(())
    }

    /// Refuses a certificate that could not take the place of that of `topic`.
    pub fn check_topic(&self, topic: &str) -> Result<(), PushCertificateError> {
        if self.topic == topic {
            return Ok(());
        }
        Err(PushCertificateError::OtherTopic { expected: topic.to_owned(), found: self.topic.clone() })
    }
}

/// The tag of a key's PEM block.
const PRIVATE_KEY: &str = "PRIVATE KEY";

/// What is in a PKCS#12 file: a key, and its certificate with the issuers that are in the file too.
pub(crate) fn opened(der: &[u8], password: Option<&str>) -> Result<Vec<Pem>, PushCertificateError> {
    let store = KeyStore::from_pkcs12(der, password.unwrap_or_default()).map_err(|error| match error {
        p12_keystore::error::Error::MacError(_) => PushCertificateError::Pkcs12Password,
        _ => PushCertificateError::UnreadablePkcs12,
    })?;
    let (_, chain) = store.private_key_chain().ok_or(PushCertificateError::EmptyPkcs12)?;
    let certificates = chain.chain().iter().map(|certificate| Pem::new("CERTIFICATE", certificate.as_der()));
    Ok(std::iter::once(Pem::new(PRIVATE_KEY, chain.key())).chain(certificates).collect())
}

/// The topic that a certificate is for, if it is one for MDM.
fn topic(certificate: &X509Certificate<'_>) -> Option<String> {
    certificate
        .subject()
        .iter_attributes()
        .filter(|attribute| attribute.attr_type().to_id_string() == USER_ID)
        .find_map(|attribute| attribute.as_str().ok())
        .filter(|topic| topic.starts_with(TOPIC_PREFIX) && topic.len() <= LONGEST_TOPIC)
        // It becomes a header.
        .filter(|topic| topic.bytes().all(|byte| byte.is_ascii_graphic()))
        .map(str::to_owned)
}

/// As tools print it.
fn serial(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02X}");
        text
    })
}

/// The key without its password.
pub(crate) fn decrypted(key: Pem, password: Option<&str>) -> Result<Pem, PushCertificateError> {
    if old_encryption::is_old(&key) {
        return old_encryption::decrypted(&key, password.ok_or(PushCertificateError::PasswordNeeded)?);
    }
    if key.tag() != "ENCRYPTED PRIVATE KEY" {
        return Ok(key);
    }
    let password = password.ok_or(PushCertificateError::PasswordNeeded)?;
    let encrypted = EncryptedPrivateKeyInfo::try_from(key.contents()).map_err(|_| PushCertificateError::UnknownEncryption)?;
    let EncryptionScheme::Pbes2(parameters) = &encrypted.encryption_algorithm else {
        return Err(PushCertificateError::UnknownEncryption);
    };
    let affordable = match &parameters.kdf {
        Kdf::Pbkdf2(pbkdf2) => pbkdf2.iteration_count <= MOST_ITERATIONS,
        Kdf::Scrypt(scrypt) => {
            let memory = scrypt.cost_parameter.saturating_mul(u64::from(scrypt.block_size)).saturating_mul(128);
            memory <= MOST_MEMORY && scrypt.parallelization <= 16
        }
        _ => return Err(PushCertificateError::UnknownEncryption),
    };
    if !affordable {
        return Err(PushCertificateError::CostlyEncryption);
    }
    let plain = encrypted.decrypt(password).map_err(|_| PushCertificateError::WrongPassword)?;
    Ok(Pem::new(PRIVATE_KEY, plain.as_bytes()))
}

/// The public half, in the form in which a certificate holds it.
fn public_key(private_key: &[u8]) -> Result<Vec<u8>, PushCertificateError> {
    if let Ok(pair) = rsa::KeyPair::from_pkcs8(private_key).or_else(|_| rsa::KeyPair::from_der(private_key)) {
        return Ok(pair.public_key().as_ref().to_vec());
    }
    for algorithm in [&ECDSA_P256_SHA256_ASN1_SIGNING, &ECDSA_P384_SHA384_ASN1_SIGNING, &ECDSA_P521_SHA512_ASN1_SIGNING] {
        if let Ok(pair) = EcdsaKeyPair::from_pkcs8(algorithm, private_key).or_else(|_| EcdsaKeyPair::from_private_key_der(algorithm, private_key)) {
            return Ok(pair.public_key().as_ref().to_vec());
        }
    }
    Err(PushCertificateError::UnreadableKey)
}
