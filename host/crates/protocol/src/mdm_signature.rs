//! The `Mdm-Signature` header: a detached CMS signature (RFC 5652) over the request's body.
//!
//! Real devices write BER with indefinite lengths, sign with SHA-1 and without signed attributes, and have certificates with empty subjects.
//! General libraries refuse some of that, so the few structures are read here. The signature does not cover the certificate that comes
//! with it: whether an authority vouches for that one is [`TrustAnchors::verify`](crate::certificate::TrustAnchors::verify)'s question.

use std::fmt;

use aws_lc_rs::digest::{self, Digest};
use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bytes::Bytes;

use crate::ber::{self, CONSTRUCTED, Element, INTEGER, OCTET_STRING, OID, Reader, SEQUENCE, SET};
use crate::certificate::{Certificate, CertificateError};
use crate::signature::{self, Hash};

/// Devices send three to six thousand bytes: one certificate, sometimes with its authority's.
const MAX_HEADER: usize = 64 * 1024;
/// How many certificates are looked at.
const MAX_CERTIFICATES: usize = 16;
const BASE64: GeneralPurpose =
    GeneralPurpose::new(&alphabet::STANDARD, GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent));

const SIGNED_DATA: &[u8] = b"\x2a\x86\x48\x86\xf7\x0d\x01\x07\x02";
const CONTENT_TYPE: &[u8] = b"\x2a\x86\x48\x86\xf7\x0d\x01\x09\x03";
const MESSAGE_DIGEST: &[u8] = b"\x2a\x86\x48\x86\xf7\x0d\x01\x09\x04";

/// `[0]` with elements within.
const CONTEXT_0: u8 = 0xa0;
const CONTEXT_1: u8 = 0xa1;
/// `[0]` with bytes within.
const CONTEXT_0_BYTES: u8 = 0x80;

/// Why a header does not prove that the body is its signer's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// It cannot be read.
    #[error("the signature cannot be read: {0}")]
    Malformed(String),
    /// It is made with something that is not supported.
    #[error("the signature is made with an unknown {0}")]
    Unsupported(&'static str),
    /// There has to be exactly one signer.
    #[error("the signature has none or several signers")]
    Signers,
    /// The signer's certificate is not with it.
    #[error("the signer's certificate is missing")]
    NoCertificate,
    /// The signer's certificate cannot be read.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// It is a signature of something else.
    #[error("the signature is of another body")]
    OtherBody,
    /// It is not the certificate's key's.
    #[error("the signature is false")]
    False,
}

fn malformed(what: &str) -> SignatureError {
    SignatureError::Malformed(what.to_owned())
}

/// A header whose signature still waits for the body that it covers. Whom it claims to be of is known before a byte of the body was read.
#[derive(Debug, Clone)]
pub struct DetachedSignature {
    cms: Vec<u8>,
    certificate: Certificate,
}

impl DetachedSignature {
    /// Reads the header's value (base64).
    pub fn read(header: &[u8]) -> Result<Self, SignatureError> {
        if header.len() > MAX_HEADER {
            return Err(malformed("the header is too long"));
        }
        let cms = BASE64.decode(header.trim_ascii()).map_err(|_| malformed("the header is not base64"))?;
        let data = SignedData::read(&cms)?;
        let certificate = data.signer.certificate(data.certificates)?;
        Ok(Self { cms, certificate })
    }

    /// The certificate of the claimed signer. Neither its chain nor the signature is verified.
    pub fn claimed_certificate(&self) -> &Certificate {
        &self.certificate
    }

    /// Checks that the signer's key signed `body`; answers the signer's certificate, whose chain is still to be verified.
    ///
    /// Understood are RSA (PKCS#1 v1.5, from 1,024 bits) and ECDSA (P-256, P-384, P-521) with SHA-1, SHA-256, SHA-384 and SHA-512, with signed
    /// attributes and without. Content within the header is ignored.
    pub fn verify(self, body: &[u8]) -> Result<Certificate, SignatureError> {
        // Not by parts, which would read the header once more.
        let data = SignedData::read(&self.cms)?;
        let digest = data.signer.hash()?.of(body);
        data.signer.check(&self.certificate, data.content_type, &digest)?;
        Ok(self.certificate)
    }

    /// [`Self::verify`] of a body that comes in parts, none of which has to be kept.
    ///
    /// ```no_run
    /// # use wasmdm_protocol::mdm_signature::DetachedSignature;
    /// # fn verified(header: &[u8], parts: &[&[u8]]) -> Result<(), wasmdm_protocol::mdm_signature::SignatureError> {
    /// let mut check = DetachedSignature::read(header)?.begin()?;
    /// for part in parts {
    ///     check.update(part);
    /// }
    /// let signer = check.finish()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn begin(self) -> Result<BodyCheck, SignatureError> {
        let hash = SignedData::read(&self.cms)?.signer.hash()?;
        Ok(BodyCheck { signature: self, digest: hash.begin() })
    }
}

/// A signature and the digest of as much of the body as has come.
pub struct BodyCheck {
    signature: DetachedSignature,
    digest: digest::Context,
}

impl fmt::Debug for BodyCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BodyCheck").field("signature", &self.signature).finish_non_exhaustive()
    }
}

impl BodyCheck {
    /// The next part.
    pub fn update(&mut self, part: &[u8]) {
        self.digest.update(part);
    }

    /// As [`DetachedSignature::verify`], once all of the body has come.
    pub fn finish(self) -> Result<Certificate, SignatureError> {
        let DetachedSignature { cms, certificate } = self.signature;
        let data = SignedData::read(&cms)?;
        data.signer.check(&certificate, data.content_type, &self.digest.finish())?;
        Ok(certificate)
    }
}

/// [`DetachedSignature::read`] and [`DetachedSignature::verify`] in one.
pub fn verify(header: &[u8], body: &[u8]) -> Result<Certificate, SignatureError> {
    DetachedSignature::read(header)?.verify(body)
}

struct SignedData<'a> {
    content_type: &'a [u8],
    certificates: Reader<'a>,
    signer: Signer<'a>,
}

impl<'a> SignedData<'a> {
    fn read(cms: &'a [u8]) -> Result<Self, SignatureError> {
        let mut whole = Reader::new(cms);
        let mut content_info = whole.expect(SEQUENCE).filter(|_| whole.is_empty()).ok_or_else(|| malformed("it is no CMS"))?.reader();
        if content_info.expect(OID).is_none_or(|content_type| content_type.content != SIGNED_DATA) {
            return Err(malformed("it is no signed data"));
        }
        // Nothing may follow what the standard has: a second list of signers, say, which another reader would take for the one.
        let mut fields = || {
            let mut content = content_info.expect(CONTEXT_0).filter(|_| content_info.is_empty())?.reader();
            let mut fields = content.expect(SEQUENCE).filter(|_| content.is_empty())?.reader();
            fields.expect(INTEGER)?;
            fields.expect(SET)?;
            let content_type = fields.expect(SEQUENCE)?.reader().expect(OID)?.content;
            let certificates = fields.optional(CONTEXT_0).map_or(Reader::new(&[]), Element::reader);
            fields.optional(CONTEXT_1);
            let signers = fields.expect(SET).filter(|_| fields.is_empty())?;
            Some((content_type, certificates, signers.reader()))
        };
        let (content_type, certificates, mut signers) = fields().ok_or_else(|| malformed("its signed data is incomplete"))?;
        let Some(signer) = signers.next().filter(|_| signers.is_empty()) else { return Err(SignatureError::Signers) };
        let signer = Signer::read(signer).ok_or_else(|| malformed("its signer's part is incomplete"))?;
        Ok(Self { content_type, certificates, signer })
    }
}

struct Signer<'a> {
    /// `IssuerAndSerialNumber`, or a key id.
    id: Element<'a>,
    /// Identifier of the digest.
    digest: &'a [u8],
    attributes: Option<Element<'a>>,
    /// Identifier of the signature algorithm.
    algorithm: &'a [u8],
    signature: Element<'a>,
}

impl<'a> Signer<'a> {
    fn read(signer: Element<'a>) -> Option<Self> {
        if signer.tag != SEQUENCE {
            return None;
        }
        let mut fields = signer.reader();
        fields.expect(INTEGER)?;
        let signer = Self {
            id: fields.next()?,
            digest: fields.expect(SEQUENCE)?.reader().expect(OID)?.content,
            attributes: fields.optional(CONTEXT_0),
            algorithm: fields.expect(SEQUENCE)?.reader().expect(OID)?.content,
            signature: fields.next().filter(|signature| signature.tag & !CONSTRUCTED == OCTET_STRING)?,
        };
        // Attributes that nobody signed say nothing.
        fields.optional(CONTEXT_1);
        fields.is_empty().then_some(signer)
    }

    /// The certificate that the signer names.
    fn certificate(&self, mut certificates: Reader<'_>) -> Result<Certificate, SignatureError> {
        let mut looked_at = 0;
        while let Some(certificate) = certificates.next() {
            looked_at += 1;
            if looked_at > MAX_CERTIFICATES {
                break;
            }
            if certificate.tag != SEQUENCE {
                continue;
            }
            match self.id.tag {
                SEQUENCE => {
                    if self.names(certificate) == Some(true) {
                        return Ok(Certificate::from_der(Bytes::copy_from_slice(certificate.whole))?);
                    }
                }
                CONTEXT_0_BYTES | CONTEXT_0 => {
                    let wanted = self.id.octets().ok_or_else(|| malformed("its key id cannot be read"))?;
                    let Ok(certificate) = Certificate::from_der(Bytes::copy_from_slice(certificate.whole)) else { continue };
                    if certificate.subject_key_id() == Some(&wanted) {
                        return Ok(certificate);
                    }
                }
                _ => return Err(malformed("its signer's id is of an unknown kind")),
            }
        }
        Err(SignatureError::NoCertificate)
    }

    /// Whether issuer and serial number are this certificate's. Only its first fields are read.
    fn names(&self, certificate: Element<'_>) -> Option<bool> {
        let mut id = self.id.reader();
        let (issuer, serial) = (id.expect(SEQUENCE)?, id.expect(INTEGER)?);
        let mut fields = certificate.reader().expect(SEQUENCE)?.reader();
        fields.optional(CONTEXT_0);
        let same_serial = fields.expect(INTEGER)?.content == serial.content;
        fields.expect(SEQUENCE)?;
        Some(same_serial && fields.expect(SEQUENCE)?.whole == issuer.whole)
    }

    fn hash(&self) -> Result<Hash, SignatureError> {
        Hash::from_oid(self.digest).ok_or(SignatureError::Unsupported("digest"))
    }

    fn check(&self, certificate: &Certificate, content_type: &[u8], body: &Digest) -> Result<(), SignatureError> {
        let hash = self.hash()?;
        let (scheme, named) = signature::scheme(self.algorithm).ok_or(SignatureError::Unsupported("algorithm"))?;
        if named.is_some_and(|named| named != hash) {
            return Err(SignatureError::Unsupported("pair of digests"));
        }
        let value = self.signature.octets().ok_or_else(|| malformed("its value cannot be read"))?;
        let verified = match self.attributes {
            None => certificate.verify_digest(scheme, hash, body, &value),
            Some(attributes) => {
                Attributes::read(attributes)?.check(content_type, body.as_ref())?;
                // RFC 5652, 5.4: signed as a SET, sent as [0].
                certificate.verify(scheme, hash, &ber::der(SET, attributes.content), &value)
            }
        };
        verified.map_err(|_| SignatureError::False)
    }
}

/// The signed attributes that say something about the body. The time of signing is not among them: it is what the signer wants it to be, a
/// device's clock may be wrong, and whether a certificate is still good is judged by the server's own clock.
#[derive(Default)]
struct Attributes<'a> {
    content_type: Option<&'a [u8]>,
    digest: Option<Element<'a>>,
}

impl<'a> Attributes<'a> {
    fn read(set: Element<'a>) -> Result<Self, SignatureError> {
        let mut attributes = set.reader();
        let mut found = Self::default();
        while !attributes.is_empty() {
            let (kind, value) = Self::read_one(&mut attributes).ok_or_else(|| malformed("its signed attributes cannot be read"))?;
            let repeated = match kind {
                CONTENT_TYPE => found.content_type.replace(value.content).is_some(),
                MESSAGE_DIGEST => found.digest.replace(value).is_some(),
                _ => false,
            };
            if repeated {
                return Err(malformed("it has a signed attribute twice"));
            }
        }
        Ok(found)
    }

    /// The attribute's kind and its first value; those that count have only one.
    fn read_one(attributes: &mut Reader<'a>) -> Option<(&'a [u8], Element<'a>)> {
        let mut attribute = attributes.expect(SEQUENCE)?.reader();
        let kind = attribute.expect(OID)?.content;
        let mut values = attribute.expect(SET)?.reader();
        let value = values.next()?;
        let single = values.is_empty() || !matches!(kind, CONTENT_TYPE | MESSAGE_DIGEST);
        single.then_some((kind, value))
    }

    fn check(&self, content_type: &[u8], digest: &[u8]) -> Result<(), SignatureError> {
        if self.content_type.is_some_and(|signed| signed != content_type) {
            return Err(malformed("its signed content type is another"));
        }
        let signed = self.digest.ok_or_else(|| malformed("its signed attributes have no digest"))?;
        let signed = signed.octets().filter(|_| signed.tag & !CONSTRUCTED == OCTET_STRING).ok_or_else(|| malformed("its digest cannot be read"))?;
        if *signed == *digest { Ok(()) } else { Err(SignatureError::OtherBody) }
    }
}
