//! Public keys and signatures as certificates and devices have them, old ones included.

use aws_lc_rs::digest::{self, Digest};
use aws_lc_rs::signature::{self as algorithms, UnparsedPublicKey, VerificationAlgorithm};
use bytes::Bytes;
use num_bigint::BigUint;

use crate::ber::{INTEGER, Reader, SEQUENCE};

/// Object identifiers, as their DER content.
pub(crate) mod oid {
    pub(crate) const RSA: &[u8] = b"\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01";
    pub(crate) const RSA_SHA1: &[u8] = b"\x2a\x86\x48\x86\xf7\x0d\x01\x01\x05";
    pub(crate) const RSA_SHA256: &[u8] = b"\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0b";
    pub(crate) const RSA_SHA384: &[u8] = b"\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0c";
    pub(crate) const RSA_SHA512: &[u8] = b"\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0d";
    pub(crate) const EC: &[u8] = b"\x2a\x86\x48\xce\x3d\x02\x01";
    pub(crate) const ECDSA_SHA1: &[u8] = b"\x2a\x86\x48\xce\x3d\x04\x01";
    pub(crate) const ECDSA_SHA256: &[u8] = b"\x2a\x86\x48\xce\x3d\x04\x03\x02";
    pub(crate) const ECDSA_SHA384: &[u8] = b"\x2a\x86\x48\xce\x3d\x04\x03\x03";
    pub(crate) const ECDSA_SHA512: &[u8] = b"\x2a\x86\x48\xce\x3d\x04\x03\x04";
    pub(crate) const ED25519: &[u8] = b"\x2b\x65\x70";
    pub(crate) const P256: &[u8] = b"\x2a\x86\x48\xce\x3d\x03\x01\x07";
    pub(crate) const P384: &[u8] = b"\x2b\x81\x04\x00\x22";
    pub(crate) const P521: &[u8] = b"\x2b\x81\x04\x00\x23";
    pub(crate) const SHA1: &[u8] = b"\x2b\x0e\x03\x02\x1a";
    pub(crate) const SHA256: &[u8] = b"\x60\x86\x48\x01\x65\x03\x04\x02\x01";
    pub(crate) const SHA384: &[u8] = b"\x60\x86\x48\x01\x65\x03\x04\x02\x02";
    pub(crate) const SHA512: &[u8] = b"\x60\x86\x48\x01\x65\x03\x04\x02\x03";
    /// The older `sha1WithRSASignature` of OIW.
    pub(crate) const OIW_RSA_SHA1: &[u8] = b"\x2b\x0e\x03\x02\x1d";
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hash {
    Sha1,
    Sha256,
    Sha384,
    Sha512,
}

impl Hash {
    /// From a digest's identifier.
    pub(crate) fn from_oid(oid: &[u8]) -> Option<Self> {
        Some(match oid {
            oid::SHA1 => Self::Sha1,
            oid::SHA256 => Self::Sha256,
            oid::SHA384 => Self::Sha384,
            oid::SHA512 => Self::Sha512,
            _ => return None,
        })
    }

    pub(crate) fn of(self, message: &[u8]) -> Digest {
        digest::digest(self.algorithm(), message)
    }

    /// For a message that comes in parts.
    pub(crate) fn begin(self) -> digest::Context {
        digest::Context::new(self.algorithm())
    }

    fn algorithm(self) -> &'static digest::Algorithm {
        match self {
            Self::Sha1 => &digest::SHA1_FOR_LEGACY_USE_ONLY,
            Self::Sha256 => &digest::SHA256,
            Self::Sha384 => &digest::SHA384,
            Self::Sha512 => &digest::SHA512,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// PKCS#1 v1.5.
    Rsa,
    Ecdsa,
    Ed25519,
}

/// The scheme and digest of a signature algorithm's identifier; some name only the scheme.
pub(crate) fn scheme(oid: &[u8]) -> Option<(Scheme, Option<Hash>)> {
    Some(match oid {
        oid::RSA => (Scheme::Rsa, None),
        oid::RSA_SHA1 | oid::OIW_RSA_SHA1 => (Scheme::Rsa, Some(Hash::Sha1)),
        oid::RSA_SHA256 => (Scheme::Rsa, Some(Hash::Sha256)),
        oid::RSA_SHA384 => (Scheme::Rsa, Some(Hash::Sha384)),
        oid::RSA_SHA512 => (Scheme::Rsa, Some(Hash::Sha512)),
        oid::EC => (Scheme::Ecdsa, None),
        oid::ECDSA_SHA1 => (Scheme::Ecdsa, Some(Hash::Sha1)),
        oid::ECDSA_SHA256 => (Scheme::Ecdsa, Some(Hash::Sha256)),
        oid::ECDSA_SHA384 => (Scheme::Ecdsa, Some(Hash::Sha384)),
        oid::ECDSA_SHA512 => (Scheme::Ecdsa, Some(Hash::Sha512)),
        oid::ED25519 => (Scheme::Ed25519, Some(Hash::Sha512)),
        _ => return None,
    })
}

/// A certificate's public key.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum PublicKey {
    /// `RSAPublicKey` in DER.
    Rsa(Bytes),
    /// A point.
    P256(Bytes),
    P384(Bytes),
    P521(Bytes),
    Ed25519(Bytes),
    /// One that signs nothing here.
    Other,
}

/// A signature that is not this key's over this message, or that is of a kind not understood.
#[derive(Debug)]
pub(crate) struct Unverified;

impl PublicKey {
    /// From the parts of `SubjectPublicKeyInfo`: algorithm, curve, bits.
    pub(crate) fn new(algorithm: &[u8], curve: Option<&[u8]>, bits: Bytes) -> Self {
        match (algorithm, curve) {
            (oid::RSA, _) => Self::Rsa(bits),
            (oid::EC, Some(oid::P256)) => Self::P256(bits),
            (oid::EC, Some(oid::P384)) => Self::P384(bits),
            (oid::EC, Some(oid::P521)) => Self::P521(bits),
            (oid::ED25519, _) => Self::Ed25519(bits),
            _ => Self::Other,
        }
    }

    /// Checks the signature of `message`. RSA keys need 1,024 to 8,192 bits.
    pub(crate) fn verify(&self, scheme: Scheme, hash: Hash, message: &[u8], signature: &[u8]) -> Result<(), Unverified> {
        match (self, scheme) {
            // It digests the message twice, so it needs all of it.
            (Self::Ed25519(key), Scheme::Ed25519) => {
                UnparsedPublicKey::new(&algorithms::ED25519, key).verify(message, signature).map_err(|_| Unverified)
            }
            _ => self.verify_digest(scheme, hash, &hash.of(message), signature),
        }
    }

    /// The same where the message is no longer at hand: `digest` is `hash` of it.
    pub(crate) fn verify_digest(&self, scheme: Scheme, hash: Hash, digest: &Digest, signature: &[u8]) -> Result<(), Unverified> {
        let (algorithm, key): (&'static dyn VerificationAlgorithm, &Bytes) = match (self, scheme, hash) {
            (Self::Rsa(key), Scheme::Rsa, Hash::Sha1) => (&algorithms::RSA_PKCS1_1024_8192_SHA1_FOR_LEGACY_USE_ONLY, key),
            (Self::Rsa(key), Scheme::Rsa, Hash::Sha256) => (&algorithms::RSA_PKCS1_1024_8192_SHA256_FOR_LEGACY_USE_ONLY, key),
            (Self::Rsa(key), Scheme::Rsa, Hash::Sha512) => (&algorithms::RSA_PKCS1_1024_8192_SHA512_FOR_LEGACY_USE_ONLY, key),
            (Self::Rsa(key), Scheme::Rsa, Hash::Sha384) => {
                if let Some(key) = SmallRsaKey::new(key) {
                    return key.verify_sha384(digest, signature);
                }
                (&algorithms::RSA_PKCS1_2048_8192_SHA384, key)
            }
            (Self::P256(key), Scheme::Ecdsa, Hash::Sha1) => (&algorithms::ECDSA_P256_SHA1_ASN1, key),
            (Self::P256(key), Scheme::Ecdsa, Hash::Sha256) => (&algorithms::ECDSA_P256_SHA256_ASN1, key),
            (Self::P256(key), Scheme::Ecdsa, Hash::Sha384) => (&algorithms::ECDSA_P256_SHA384_ASN1, key),
            (Self::P256(key), Scheme::Ecdsa, Hash::Sha512) => (&algorithms::ECDSA_P256_SHA512_ASN1, key),
            (Self::P384(key), Scheme::Ecdsa, Hash::Sha1) => return verify_p384_sha1(key, digest, signature),
            (Self::P384(key), Scheme::Ecdsa, Hash::Sha256) => (&algorithms::ECDSA_P384_SHA256_ASN1, key),
            (Self::P384(key), Scheme::Ecdsa, Hash::Sha384) => (&algorithms::ECDSA_P384_SHA384_ASN1, key),
            (Self::P384(key), Scheme::Ecdsa, Hash::Sha512) => (&algorithms::ECDSA_P384_SHA512_ASN1, key),
            (Self::P521(key), Scheme::Ecdsa, Hash::Sha1) => (&algorithms::ECDSA_P521_SHA1_ASN1, key),
            (Self::P521(key), Scheme::Ecdsa, Hash::Sha256) => (&algorithms::ECDSA_P521_SHA256_ASN1, key),
            (Self::P521(key), Scheme::Ecdsa, Hash::Sha384) => (&algorithms::ECDSA_P521_SHA384_ASN1, key),
            (Self::P521(key), Scheme::Ecdsa, Hash::Sha512) => (&algorithms::ECDSA_P521_SHA512_ASN1, key),
            _ => return Err(Unverified),
        };
        UnparsedPublicKey::new(algorithm, key).verify_digest(digest, signature).map_err(|_| Unverified)
    }
}

/// ECDSA takes the digest as a number, so a SHA-1 digest with zeros before it is the same to it as one of SHA-384's length.
fn verify_p384_sha1(key: &[u8], digest: &Digest, signature: &[u8]) -> Result<(), Unverified> {
    let mut padded = vec![0; 48_usize.saturating_sub(digest.as_ref().len())];
    padded.extend_from_slice(digest.as_ref());
    let padded = Digest::import_less_safe(&padded, &digest::SHA384).map_err(|_| Unverified)?;
    UnparsedPublicKey::new(&algorithms::ECDSA_P384_SHA384_ASN1, key).verify_digest(&padded, signature).map_err(|_| Unverified)
}

/// An RSA key of 1,024 to 2,047 bits. With SHA-384 `aws-lc-rs` verifies none; nothing here is secret, so plain arithmetic does.
struct SmallRsaKey {
    modulus: BigUint,
    exponent: BigUint,
    /// Of the modulus, in bytes.
    length: usize,
}

impl SmallRsaKey {
    /// `None` for keys of other lengths and for what is no key.
    fn new(key: &[u8]) -> Option<Self> {
        let mut fields = Reader::new(key).expect(SEQUENCE)?.reader();
        let modulus = BigUint::from_bytes_be(fields.expect(INTEGER)?.content);
        let exponent = fields.expect(INTEGER)?.content;
        // A longer exponent would only make the arithmetic slow.
        if !(1024..2048).contains(&modulus.bits()) || !modulus.bit(0) || exponent.len() > 5 {
            return None;
        }
        let length = usize::try_from(modulus.bits().div_ceil(8)).ok()?;
        let exponent = BigUint::from_bytes_be(exponent);
        (exponent.bit(0) && exponent.bits() > 1).then_some(Self { modulus, exponent, length })
    }

    /// RFC 8017, 8.2.2: the whole padded digest is built and compared, nothing of the signature is parsed.
    fn verify_sha384(&self, digest: &Digest, signature: &[u8]) -> Result<(), Unverified> {
        const DIGEST_INFO: &[u8] = b"\x30\x41\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x02\x05\x00\x04\x30";
        let mut expected = vec![0x00, 0x01];
        expected.resize(self.length.saturating_sub(1 + DIGEST_INFO.len() + digest.as_ref().len()), 0xff);
        expected.push(0x00);
        expected.extend_from_slice(DIGEST_INFO);
        expected.extend_from_slice(digest.as_ref());
        let signed = BigUint::from_bytes_be(signature);
        let whole = signature.len() == self.length && signed < self.modulus;
        if whole && signed.modpow(&self.exponent, &self.modulus) == BigUint::from_bytes_be(&expected) { Ok(()) } else { Err(Unverified) }
    }
}
