//! A small authority and CMS writer, so that certificates and signatures can be made that no library makes.

use std::sync::LazyLock;

use aws_lc_rs::digest::{self, Digest};
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};
use aws_lc_rs::{rand, rsa};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use num_bigint::BigUint;
use wasmdm_protocol::time::Timestamp;

/// The start of 2026, at which the tests' certificates are valid.
pub(crate) const NOW: Timestamp = Timestamp::from_millis(1_767_225_600_000);

pub(crate) const COMMON_NAME: &str = "2.5.4.3";
pub(crate) const SUBJECT_KEY_ID: &str = "2.5.29.14";
pub(crate) const KEY_USAGE: &str = "2.5.29.15";
pub(crate) const ALTERNATIVE_NAME: &str = "2.5.29.17";
pub(crate) const BASIC_CONSTRAINTS: &str = "2.5.29.19";
pub(crate) const NAME_CONSTRAINTS: &str = "2.5.29.30";
pub(crate) const EXTENDED_KEY_USAGE: &str = "2.5.29.37";
pub(crate) const SERVER_AUTH: &str = "1.3.6.1.5.5.7.3.1";
pub(crate) const CLIENT_AUTH: &str = "1.3.6.1.5.5.7.3.2";

pub(crate) fn tlv(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let content = parts.concat();
    let mut whole = vec![tag];
    match content.len() {
        0..=0x7f => whole.push(content.len() as u8),
        0x80..=0xff => whole.extend([0x81, content.len() as u8]),
        _ => whole.extend([0x82, (content.len() >> 8) as u8, content.len() as u8]),
    }
    whole.extend(content);
    whole
}

/// The same with an indefinite length.
fn open(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    [&[tag, 0x80], parts.concat().as_slice(), &[0, 0]].concat()
}

pub(crate) fn oid(text: &str) -> Vec<u8> {
    let numbers: Vec<u32> = text.split('.').map(|part| part.parse().unwrap()).collect();
    let mut content = vec![(numbers[0] * 40 + numbers[1]) as u8];
    for number in &numbers[2..] {
        let septets: Vec<u8> = (0..5).rev().map(|index| (number >> (7 * index) & 0x7f) as u8).skip_while(|septet| *septet == 0).collect();
        for (index, septet) in septets.iter().enumerate() {
            content.push(if index + 1 < septets.len() { septet | 0x80 } else { *septet });
        }
        if *number == 0 {
            content.push(0);
        }
    }
    tlv(0x06, &[&content])
}

fn sequence(parts: &[&[u8]]) -> Vec<u8> {
    tlv(0x30, parts)
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Hash {
    Sha1,
    Sha256,
    Sha384,
    Sha512,
}

impl Hash {
    pub(crate) const ALL: [Self; 4] = [Self::Sha1, Self::Sha256, Self::Sha384, Self::Sha512];

    fn of(self, message: &[u8]) -> Vec<u8> {
        let algorithm = match self {
            Self::Sha1 => &digest::SHA1_FOR_LEGACY_USE_ONLY,
            Self::Sha256 => &digest::SHA256,
            Self::Sha384 => &digest::SHA384,
            Self::Sha512 => &digest::SHA512,
        };
        digest::digest(algorithm, message).as_ref().to_vec()
    }

    fn oid(self) -> Vec<u8> {
        oid(match self {
            Self::Sha1 => "1.3.14.3.2.26",
            Self::Sha256 => "2.16.840.1.101.3.4.2.1",
            Self::Sha384 => "2.16.840.1.101.3.4.2.2",
            Self::Sha512 => "2.16.840.1.101.3.4.2.3",
        })
    }
}

pub(crate) enum Key {
    P256(EcdsaKeyPair),
    P384(EcdsaKeyPair),
    Rsa2048(rsa::KeyPair),
    /// Too short for the library to sign with, so the arithmetic is done here.
    Rsa1024 {
        modulus: BigUint,
        exponent: BigUint,
    },
}

/// Made once: some take a while.
pub(crate) static P256: LazyLock<Key> = LazyLock::new(Key::p256);
pub(crate) static P384: LazyLock<Key> = LazyLock::new(|| Key::P384(EcdsaKeyPair::generate(&ECDSA_P384_SHA384_ASN1_SIGNING).unwrap()));
pub(crate) static RSA_2048: LazyLock<Key> = LazyLock::new(|| Key::Rsa2048(rsa::KeyPair::generate(KeySize::Rsa2048).unwrap()));
/// Numbers of a key that is used nowhere else.
pub(crate) static RSA_1024: LazyLock<Key> = LazyLock::new(|| Key::Rsa1024 {
    modulus: number(
        "e759724f8cfe7668a8cc94397deeb41c8f3f20e2fcdd27d0fa4dd3293bd95792c8a36d9e1e5771053f9e4fea14f3c566f852f107543fc9be089c4f3ebd647894\
         07bc4fbd77485a18ab051983f69123ac93e3ef448948c292fd10f7e792a67cb376cc170dc0d364e483c7f7e554bb40df9db8b4e7263c5fed5f8ebd81076457e7",
    ),
    exponent: number(
        "62450e57582ea6a16242341c0fb01b759e2b548ed6962259945906 7f175b04e5e6aff4da1b4d4d46cb7535c0dad1896269cce171198a56e98fc2c5ae82c870a6b1\
         adde8a18ce2b278b772f3ab38cb2646e9a5439dd1f94c1137f11ed7dfc7dac6a010a048a947875419e82849532d835240ac630512e36b9e4327ada252472b1",
    ),
});

fn number(hex: &str) -> BigUint {
    let hex: String = hex.split_whitespace().collect();
    BigUint::parse_bytes(hex.as_bytes(), 16).unwrap()
}

fn integer(number: &BigUint) -> Vec<u8> {
    tlv(0x02, &[&[0], &number.to_bytes_be()])
}

impl Key {
    pub(crate) fn p256() -> Self {
        Self::P256(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).unwrap())
    }

    /// `SubjectPublicKeyInfo`.
    fn info(&self) -> Vec<u8> {
        let elliptic = |curve: &str, pair: &EcdsaKeyPair| {
            let point = pair.public_key().as_ref().to_vec();
            sequence(&[&sequence(&[&oid("1.2.840.10045.2.1"), &oid(curve)]), &tlv(0x03, &[&[0], &point])])
        };
        let rsa = |key: &[u8]| sequence(&[&sequence(&[&oid("1.2.840.113549.1.1.1"), &[5, 0]]), &tlv(0x03, &[&[0], key])]);
        match self {
            Self::P256(pair) => elliptic("1.2.840.10045.3.1.7", pair),
            Self::P384(pair) => elliptic("1.3.132.0.34", pair),
            Self::Rsa2048(pair) => rsa(pair.public_key().as_ref()),
            Self::Rsa1024 { modulus, .. } => rsa(&sequence(&[&integer(modulus), &[2, 3, 1, 0, 1]])),
        }
    }

    /// `AlgorithmIdentifier` of a signature.
    fn algorithm(&self, hash: Hash) -> Vec<u8> {
        let elliptic = matches!(self, Self::P256(_) | Self::P384(_));
        let name = match (elliptic, hash) {
            (true, Hash::Sha1) => "1.2.840.10045.4.1",
            (true, Hash::Sha256) => "1.2.840.10045.4.3.2",
            (true, Hash::Sha384) => "1.2.840.10045.4.3.3",
            (true, Hash::Sha512) => "1.2.840.10045.4.3.4",
            (false, Hash::Sha1) => "1.2.840.113549.1.1.5",
            (false, Hash::Sha256) => "1.2.840.113549.1.1.11",
            (false, Hash::Sha384) => "1.2.840.113549.1.1.12",
            (false, Hash::Sha512) => "1.2.840.113549.1.1.13",
        };
        if elliptic { sequence(&[&oid(name)]) } else { sequence(&[&oid(name), &[5, 0]]) }
    }

    pub(crate) fn sign(&self, hash: Hash, message: &[u8]) -> Vec<u8> {
        let digest = hash.of(message);
        match self {
            Self::P256(pair) => pair.sign_digest(&fit(&digest, &digest::SHA256)).unwrap().as_ref().to_vec(),
            Self::P384(pair) => pair.sign_digest(&fit(&digest, &digest::SHA384)).unwrap().as_ref().to_vec(),
            Self::Rsa2048(pair) => {
                use aws_lc_rs::signature::{RSA_PKCS1_SHA256, RSA_PKCS1_SHA384, RSA_PKCS1_SHA512};
                let encoding = match hash {
                    Hash::Sha1 => panic!("the library signs nothing with SHA-1"),
                    Hash::Sha256 => &RSA_PKCS1_SHA256,
                    Hash::Sha384 => &RSA_PKCS1_SHA384,
                    Hash::Sha512 => &RSA_PKCS1_SHA512,
                };
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(encoding, &rand::SystemRandom::new(), message, &mut signature).unwrap();
                signature
            }
            Self::Rsa1024 { modulus, exponent } => {
                let info = sequence(&[&sequence(&[&hash.oid(), &[5, 0]]), &tlv(0x04, &[&digest])]);
                let mut padded = vec![0, 1];
                padded.resize(127 - info.len(), 0xff);
                padded.push(0);
                padded.extend(info);
                let signature = BigUint::from_bytes_be(&padded).modpow(exponent, modulus).to_bytes_be();
                [vec![0; 128 - signature.len()], signature].concat()
            }
        }
    }
}

/// A digest as ECDSA takes it: the leftmost bits of a long one, a short one as the number that it is.
fn fit(digest: &[u8], algorithm: &'static digest::Algorithm) -> Digest {
    let length = algorithm.output_len();
    let mut fitted = vec![0; length.saturating_sub(digest.len())];
    fitted.extend(&digest[..digest.len().min(length)]);
    Digest::import_less_safe(&fitted, algorithm).unwrap()
}

pub(crate) fn name(common_name: &str) -> Vec<u8> {
    if common_name.is_empty() {
        return sequence(&[]);
    }
    sequence(&[&tlv(0x31, &[&sequence(&[&oid(COMMON_NAME), &tlv(0x0c, &[common_name.as_bytes()])])])])
}

/// What a certificate says.
#[derive(Clone)]
pub(crate) struct Certificate {
    pub(crate) version_1: bool,
    pub(crate) serial: u8,
    pub(crate) subject: String,
    pub(crate) not_before: &'static str,
    pub(crate) not_after: &'static str,
    pub(crate) extensions: Vec<(&'static str, bool, Vec<u8>)>,
    pub(crate) hash: Hash,
}

impl Certificate {
    pub(crate) fn leaf(subject: &str) -> Self {
        Self {
            version_1: false,
            serial: 7,
            subject: subject.into(),
            not_before: "250101000000Z",
            not_after: "300101000000Z",
            extensions: vec![(EXTENDED_KEY_USAGE, false, sequence(&[&oid(CLIENT_AUTH)]))],
            hash: Hash::Sha256,
        }
    }

    pub(crate) fn authority(subject: &str) -> Self {
        Self { extensions: vec![(BASIC_CONSTRAINTS, true, sequence(&[&[1, 1, 0xff]]))], ..Self::leaf(subject) }
    }

    /// One that allows that many authorities below it.
    pub(crate) fn authority_over(subject: &str, below: u8) -> Self {
        Self { extensions: vec![(BASIC_CONSTRAINTS, true, sequence(&[&[1, 1, 0xff], &[2, 1, below]]))], ..Self::leaf(subject) }
    }

    pub(crate) fn with(mut self, oid: &'static str, critical: bool, value: Vec<u8>) -> Self {
        self.extensions.retain(|(known, ..)| *known != oid);
        self.extensions.push((oid, critical, value));
        self
    }

    pub(crate) fn purposes(self, purposes: &[&str]) -> Self {
        let purposes: Vec<u8> = purposes.iter().flat_map(|purpose| oid(purpose)).collect();
        self.with(EXTENDED_KEY_USAGE, false, sequence(&[&purposes]))
    }

    /// The DER of it for `key`, signed by `issuer`.
    pub(crate) fn issue(&self, key: &Key, issuer: &str, issuer_key: &Key) -> Vec<u8> {
        let algorithm = issuer_key.algorithm(self.hash);
        let extensions: Vec<u8> = self
            .extensions
            .iter()
            .flat_map(|(id, critical, value)| {
                let critical: &[u8] = if *critical { &[1, 1, 0xff] } else { &[] };
                sequence(&[&oid(id), critical, &tlv(0x04, &[value])])
            })
            .collect();
        let (version, extensions) = if self.version_1 {
            (Vec::new(), Vec::new())
        } else {
            (tlv(0xa0, &[&[2, 1, 2]]), if extensions.is_empty() { Vec::new() } else { tlv(0xa3, &[&sequence(&[&extensions])]) })
        };
        let signed = sequence(&[
            &version,
            &[2, 1, self.serial],
            &algorithm,
            &name(issuer),
            &sequence(&[&tlv(0x17, &[self.not_before.as_bytes()]), &tlv(0x17, &[self.not_after.as_bytes()])]),
            &name(&self.subject),
            &key.info(),
            &extensions,
        ]);
        let signature = issuer_key.sign(self.hash, &signed);
        sequence(&[&signed, &algorithm, &tlv(0x03, &[&[0], &signature])])
    }

    pub(crate) fn self_signed(&self, key: &Key) -> Vec<u8> {
        self.issue(key, &self.subject, key)
    }
}

pub(crate) fn pem(certificates: &[&[u8]]) -> Vec<u8> {
    certificates.iter().map(|der| pem::encode(&pem::Pem::new("CERTIFICATE", der.to_vec()))).collect::<String>().into_bytes()
}

/// How a signature is written.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Form {
    /// Signed attributes, definite lengths.
    Attributes,
    /// No signed attributes, definite lengths.
    Plain,
    /// No signed attributes, indefinite lengths, the signature in two pieces.
    Ber,
}

impl Form {
    pub(crate) const ALL: [Self; 3] = [Self::Attributes, Self::Plain, Self::Ber];
}

/// A signed message and all that can be wrong with it.
pub(crate) struct Cms<'a> {
    pub(crate) key: &'a Key,
    pub(crate) hash: Hash,
    pub(crate) form: Form,
    /// Issuer's name and serial number by which the certificate is named, or its key id.
    pub(crate) signer: Result<(&'a str, u8), &'a [u8]>,
    pub(crate) certificates: Vec<Vec<u8>>,
    pub(crate) signing_time: Option<&'a str>,
    /// Digested into the attributes instead of the body.
    pub(crate) other_body: Option<&'a [u8]>,
    pub(crate) signers: usize,
}

impl<'a> Cms<'a> {
    /// By the certificate with serial number 7 of an issuer of that name.
    pub(crate) fn new(key: &'a Key, issuer: &'a str, certificate: &[u8]) -> Self {
        Self {
            key,
            hash: Hash::Sha256,
            form: Form::Plain,
            signer: Ok((issuer, 7)),
            certificates: vec![certificate.to_vec()],
            signing_time: None,
            other_body: None,
            signers: 1,
        }
    }

    /// The header's value, and where in its bytes the signature's last byte is.
    pub(crate) fn header(&self, body: &[u8]) -> String {
        STANDARD.encode(self.der(body))
    }

    pub(crate) fn der(&self, body: &[u8]) -> Vec<u8> {
        let (attributes, signature) = if self.form == Form::Attributes {
            let attribute = |kind: &str, value: &[u8]| sequence(&[&oid(kind), &tlv(0x31, &[value])]);
            let mut attributes = attribute("1.2.840.113549.1.9.3", &oid("1.2.840.113549.1.7.1"));
            if let Some(time) = self.signing_time {
                attributes.extend(attribute("1.2.840.113549.1.9.5", &tlv(0x17, &[time.as_bytes()])));
            }
            attributes.extend(attribute("1.2.840.113549.1.9.4", &tlv(0x04, &[&self.hash.of(self.other_body.unwrap_or(body))])));
            let signature = self.key.sign(self.hash, &tlv(0x31, &[&attributes]));
            (tlv(0xa0, &[&attributes]), signature)
        } else {
            (Vec::new(), self.key.sign(self.hash, body))
        };
        let write = if self.form == Form::Ber { open } else { tlv };
        let (first, second) = signature.split_at(signature.len() / 2);
        let signature = if self.form == Form::Ber { open(0x24, &[&tlv(4, &[first]), &tlv(4, &[second])]) } else { tlv(4, &[&signature]) };
        let digest = sequence(&[&self.hash.oid(), &[5, 0]]);
        let id = match self.signer {
            Ok((issuer, serial)) => sequence(&[&name(issuer), &[2, 1, serial]]),
            Err(key_id) => tlv(0x80, &[key_id]),
        };
        let signer = write(0x30, &[&[2, 1, 1], &id, &digest, &attributes, &self.key.algorithm(self.hash), &signature]);
        let signed_data = write(
            0x30,
            &[
                &[2, 1, 1],
                &tlv(0x31, &[&digest]),
                &write(0x30, &[&oid("1.2.840.113549.1.7.1")]),
                &write(0xa0, &[&self.certificates.concat()]),
                &write(0x31, &[&signer.repeat(self.signers)]),
            ],
        );
        write(0x30, &[&oid("1.2.840.113549.1.7.2"), &write(0xa0, &[&signed_data])])
    }
}
