//! `Mdm-Signature` as devices make it: a detached CMS signature over the request's body.
//!
//! Real devices write BER with indefinite lengths, SHA-1 and no signed attributes; other programs write DER, SHA-256 and signed
//! attributes. All of these forms are made here.

use aws_lc_rs::digest;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::authority::Identity;
use crate::der;
use crate::error::SimulatorError;

const SIGNED_DATA: &[u8] = &[0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x07, 0x02];
const DATA: &[u8] = &[0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x07, 0x01];
const SHA1: &[u8] = &[0x2B, 0x0E, 0x03, 0x02, 0x1A];
const SHA256: &[u8] = &[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01];
const SHA1_WITH_RSA: &[u8] = &[0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01, 0x05];
const SHA256_WITH_RSA: &[u8] = &[0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01, 0x0B];
const ECDSA_WITH_SHA1: &[u8] = &[0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x04, 0x01];
const ECDSA_WITH_SHA256: &[u8] = &[0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x04, 0x03, 0x02];
const CONTENT_TYPE: &[u8] = &[0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x09, 0x03];
const MESSAGE_DIGEST: &[u8] = &[0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x09, 0x04];
const SIGNING_TIME: &[u8] = &[0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x09, 0x05];

/// The digest that is signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DigestAlgorithm {
    /// What devices use.
    Sha1,
    /// What other signers use.
    Sha256,
}

impl DigestAlgorithm {
    fn digest(self, data: &[u8]) -> digest::Digest {
        let algorithm = match self {
            Self::Sha1 => &digest::SHA1_FOR_LEGACY_USE_ONLY,
            Self::Sha256 => &digest::SHA256,
        };
        digest::digest(algorithm, data)
    }

    const fn identifier(self) -> &'static [u8] {
        match self {
            Self::Sha1 => SHA1,
            Self::Sha256 => SHA256,
        }
    }
}

/// How the outer structures are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// Definite lengths.
    Der,
    /// Indefinite lengths, as devices write them.
    BerIndefinite,
}

/// Whether the signature covers the body itself, or attributes that hold its digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attributes {
    /// The signature covers the body's digest.
    None,
    /// Content type and message digest, with a signing time (`YYMMDDhhmmssZ`) if one is given.
    Signed {
        /// The time to claim.
        signing_time: Option<[u8; 13]>,
    },
}

/// One of the forms that an `Mdm-Signature` comes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SignatureForm {
    /// The digest that is signed.
    pub digest: DigestAlgorithm,
    /// What the signature covers.
    pub attributes: Attributes,
    /// How it is written.
    pub encoding: Encoding,
}

impl SignatureForm {
    /// A real device's: BER, SHA-1, no signed attributes.
    pub const APPLE: Self = Self { digest: DigestAlgorithm::Sha1, attributes: Attributes::None, encoding: Encoding::BerIndefinite };

    /// DER, SHA-256, signed attributes: what a general CMS library makes.
    pub const MODERN: Self = Self { digest: DigestAlgorithm::Sha256, attributes: Attributes::Signed { signing_time: None }, encoding: Encoding::Der };

    /// All eight forms without a signing time.
    pub fn all() -> Vec<Self> {
        let mut forms = Vec::new();
        for digest in [DigestAlgorithm::Sha1, DigestAlgorithm::Sha256] {
            for attributes in [Attributes::None, Attributes::Signed { signing_time: None }] {
                for encoding in [Encoding::Der, Encoding::BerIndefinite] {
                    forms.push(Self { digest, attributes, encoding });
                }
            }
        }
        forms
    }
}

impl Default for SignatureForm {
    fn default() -> Self {
        Self::APPLE
    }
}

/// Signs `body`; answers the header's value.
pub fn sign(identity: &Identity, body: &[u8], form: SignatureForm) -> Result<String, SimulatorError> {
    Ok(STANDARD.encode(sign_der(identity, body, form)?))
}

/// Signs `body`; answers the CMS structure.
pub fn sign_der(identity: &Identity, body: &[u8], form: SignatureForm) -> Result<Vec<u8>, SimulatorError> {
    let signer =
        der::issuer_and_serial(&identity.certificate).ok_or_else(|| SimulatorError::cryptography("signature", "the certificate names no issuer"))?;
    let (attributes, signature) = match form.attributes {
        Attributes::None => {
            let signature = identity.key.sign(form.digest, body)?;
            (None, signature)
        }
        Attributes::Signed { signing_time } => {
            let content = attributes(form.digest.digest(body).as_ref(), signing_time);
            // What is signed is the set itself; what is written carries the implicit tag.
            let signature = identity.key.sign(form.digest, &der::element(der::SET, &[&content]))?;
            (Some(der::element(der::CONTEXT_0, &[&content])), signature)
        }
    };

    let digest_algorithm = der::element(der::SEQUENCE, &[&der::element(der::OBJECT_IDENTIFIER, &[form.digest.identifier()]), der::NULL]);
    let signer_info = der::element(
        der::SEQUENCE,
        &[
            &der::element(der::INTEGER, &[&[1]]),
            &der::element(der::SEQUENCE, &[signer.issuer, signer.serial]),
            &digest_algorithm,
            attributes.as_deref().unwrap_or_default(),
            &identity.key.signature_algorithm(form.digest),
            &der::element(der::OCTET_STRING, &[&signature]),
        ],
    );

    let outer = match form.encoding {
        Encoding::Der => der::element,
        Encoding::BerIndefinite => der::indefinite,
    };
    let signed_data = outer(
        der::SEQUENCE,
        &[
            &der::element(der::INTEGER, &[&[1]]),
            &der::element(der::SET, &[&digest_algorithm]),
            &outer(der::SEQUENCE, &[&der::element(der::OBJECT_IDENTIFIER, &[DATA])]),
            &der::element(der::CONTEXT_0, &[&identity.certificate]),
            &der::element(der::SET, &[&signer_info]),
        ],
    );
    Ok(outer(der::SEQUENCE, &[&der::element(der::OBJECT_IDENTIFIER, &[SIGNED_DATA]), &outer(der::CONTEXT_0, &[&signed_data])]))
}

/// The attributes in the order that DER asks of a set.
fn attributes(body_digest: &[u8], signing_time: Option<[u8; 13]>) -> Vec<u8> {
    let attribute = |identifier: &[u8], value: &[u8]| {
        der::element(der::SEQUENCE, &[&der::element(der::OBJECT_IDENTIFIER, &[identifier]), &der::element(der::SET, &[value])])
    };
    let mut attributes = vec![
        attribute(CONTENT_TYPE, &der::element(der::OBJECT_IDENTIFIER, &[DATA])),
        attribute(MESSAGE_DIGEST, &der::element(der::OCTET_STRING, &[body_digest])),
    ];
    if let Some(time) = signing_time {
        attributes.push(attribute(SIGNING_TIME, &der::element(der::UTC_TIME, &[&time])));
    }
    attributes.sort();
    attributes.concat()
}

/// A device's private key.
#[derive(Debug)]
pub enum DeviceKey {
    /// RSA, PKCS#1 v1.5.
    Rsa(RsaKey),
    /// ECDSA on P-256.
    P256(EcdsaKeyPair),
}

impl DeviceKey {
    pub(crate) fn p256(pkcs8: &[u8]) -> Result<Self, SimulatorError> {
        EcdsaKeyPair::from_private_key_der(&ECDSA_P256_SHA256_ASN1_SIGNING, pkcs8)
            .map(Self::P256)
            .map_err(|error| SimulatorError::cryptography("P-256 key", error))
    }

    fn sign(&self, algorithm: DigestAlgorithm, data: &[u8]) -> Result<Vec<u8>, SimulatorError> {
        let failed = |_| SimulatorError::cryptography("signature", "the library refused to sign");
        match (self, algorithm) {
            (Self::Rsa(key), _) => key.sign(algorithm, algorithm.digest(data).as_ref()),
            (Self::P256(key), DigestAlgorithm::Sha256) => Ok(key.sign(&SystemRandom::new(), data).map_err(failed)?.as_ref().to_vec()),
            (Self::P256(key), DigestAlgorithm::Sha1) => {
                // ECDSA takes the digest as a number: a short one, padded on the left, is the same number.
                let mut padded = [0u8; 32];
                if let Some(tail) = padded.last_chunk_mut::<20>() {
                    tail.copy_from_slice(algorithm.digest(data).as_ref());
                }
                let digest = digest::Digest::import_less_safe(&padded, &digest::SHA256).map_err(failed)?;
                Ok(key.sign_digest(&digest).map_err(failed)?.as_ref().to_vec())
            }
        }
    }

    fn signature_algorithm(&self, digest: DigestAlgorithm) -> Vec<u8> {
        // RSA algorithms carry a NULL parameter, ECDSA ones carry none (RFC 3279, RFC 5758).
        let (identifier, parameters) = match (self, digest) {
            (Self::Rsa(_), DigestAlgorithm::Sha1) => (SHA1_WITH_RSA, der::NULL),
            (Self::Rsa(_), DigestAlgorithm::Sha256) => (SHA256_WITH_RSA, der::NULL),
            (Self::P256(_), DigestAlgorithm::Sha1) => (ECDSA_WITH_SHA1, [].as_slice()),
            (Self::P256(_), DigestAlgorithm::Sha256) => (ECDSA_WITH_SHA256, [].as_slice()),
        };
        der::element(der::SEQUENCE, &[&der::element(der::OBJECT_IDENTIFIER, &[identifier]), parameters])
    }
}

/// An RSA key that signs with SHA-1 too: `aws-lc-rs` itself only verifies such signatures, devices make them.
#[derive(Debug)]
pub struct RsaKey {
    key: std::ptr::NonNull<aws_lc_sys::RSA>,
    signature_length: usize,
}

#[expect(unsafe_code, reason = "the safe library has no RSA signature with SHA-1")]
// SAFETY: the key is never changed after it was made, and `RSA_sign` on one key may be called from several threads at once (the
// library locks what it caches inside).
unsafe impl Send for RsaKey {}

#[expect(unsafe_code, reason = "the safe library has no RSA signature with SHA-1")]
// SAFETY: as for `Send`.
unsafe impl Sync for RsaKey {}

impl RsaKey {
    /// Reads a PKCS#8 private key.
    pub(crate) fn from_pkcs8(pkcs8: &[u8]) -> Result<Self, SimulatorError> {
        #[expect(unsafe_code, reason = "the safe library has no RSA signature with SHA-1")]
        // SAFETY: `CBS_init` only stores the pointer and length of `pkcs8`, which outlives the reader; a null pointer is what each
        // call answers on failure and is checked before it is used; the key that `EVP_parse_private_key` made is freed once, and
        // `EVP_PKEY_get1_RSA` took its own reference to the part that stays.
        let (key, signature_length) = unsafe {
            let mut reader = std::mem::MaybeUninit::<aws_lc_sys::CBS>::uninit();
            aws_lc_sys::CBS_init(reader.as_mut_ptr(), pkcs8.as_ptr(), pkcs8.len());
            let outer = aws_lc_sys::EVP_parse_private_key(reader.as_mut_ptr());
            if outer.is_null() {
                return Err(SimulatorError::cryptography("RSA key", "not PKCS#8"));
            }
            let key = aws_lc_sys::EVP_PKEY_get1_RSA(outer);
            aws_lc_sys::EVP_PKEY_free(outer);
            let Some(key) = std::ptr::NonNull::new(key) else {
                return Err(SimulatorError::cryptography("RSA key", "not an RSA key"));
            };
            (key, aws_lc_sys::RSA_size(key.as_ptr()) as usize)
        };
        Ok(Self { key, signature_length })
    }

    fn sign(&self, algorithm: DigestAlgorithm, digest: &[u8]) -> Result<Vec<u8>, SimulatorError> {
        let identifier = match algorithm {
            DigestAlgorithm::Sha1 => aws_lc_sys::NID_sha1,
            DigestAlgorithm::Sha256 => aws_lc_sys::NID_sha256,
        };
        let mut signature = vec![0u8; self.signature_length];
        let mut written = 0;
        #[expect(unsafe_code, reason = "the safe library has no RSA signature with SHA-1")]
        // SAFETY: the key is alive as long as `self`; `signature` has `RSA_size` bytes, which is what `RSA_sign` may write; `digest`
        // is read for its own length.
        let signed =
            unsafe { aws_lc_sys::RSA_sign(identifier, digest.as_ptr(), digest.len(), signature.as_mut_ptr(), &raw mut written, self.key.as_ptr()) };
        if signed != 1 {
            return Err(SimulatorError::cryptography("signature", "the library refused to sign"));
        }
        signature.truncate(written as usize);
        Ok(signature)
    }
}

impl Drop for RsaKey {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "the safe library has no RSA signature with SHA-1")]
        // SAFETY: the reference was taken in `from_pkcs8` and is given back once.
        unsafe {
            aws_lc_sys::RSA_free(self.key.as_ptr());
        }
    }
}
