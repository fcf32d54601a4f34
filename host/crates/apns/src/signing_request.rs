//! Asking Apple for a push certificate: the operator's key and signing request, and the request that an MDM vendor has signed, which is
//! what Apple's portal takes.
//!
//! Only an organization with Apple's MDM vendor certificate can sign; others let a vendor do it.

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa;
use aws_lc_rs::signature::{KeyPair as _, RSA_PKCS1_SHA256};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use pem::{EncodeConfig, LineEnding, Pem};
use rcgen::string::{Ia5String, PrintableString};
use rcgen::{CertificateParams, DistinguishedName, DnType, DnValue, KeyPair, PKCS_RSA_SHA256, RsaKeySize};
use x509_parser::prelude::{FromDer as _, X509Certificate, X509CertificationRequest};

use crate::push_certificate::{FileForm, PushCertificateError, decrypted, opened};

/// `emailAddress`, 1.2.840.113549.1.9.1.
const EMAIL_ADDRESS: [u64; 7] = [1, 2, 840, 113_549, 1, 9, 1];

/// Who asks. Apple replaces it by its own words in the certificate; it is for the vendor to see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// Any name, such as that of the organization.
    pub common_name: String,
    /// Where the vendor answers.
    pub email: Option<String>,
    /// Two letters.
    pub country: Option<String>,
}

/// A new key, and the request for its certificate.
#[derive(Clone)]
pub struct SigningRequest {
    /// PKCS#8. A secret; the certificate is of no use without it.
    pub private_key_pem: String,
    /// PKCS#10.
    pub request_pem: String,
}

impl std::fmt::Debug for SigningRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SigningRequest").finish_non_exhaustive()
    }
}

/// What the vendor has from Apple.
#[derive(Clone, Copy)]
pub struct Vendor<'a> {
    /// The vendor's certificate, that of its issuer (Apple's Worldwide Developer Relations authority), and so on up to Apple's root.
    pub chain_pem: &'a [u8],
    /// The key of the first of them.
    pub private_key_pem: &'a [u8],
    /// Of the key, where it has one.
    pub password: Option<&'a str>,
}

impl std::fmt::Debug for Vendor<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vendor").finish_non_exhaustive()
    }
}

/// Why there is no request, in a sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the sentences say it")]
pub enum SigningRequestError {
    #[error("common name: it is empty")]
    NoCommonName,
    #[error("country: `{0}` is not a code of two letters, such as US")]
    Country(String),
    #[error("email: `{0}` has letters that an e-mail address in a certificate cannot have")]
    Email(String),
    #[error(
        "private key: it cannot be read as an RSA key without a password, of which a request could be made: move the file away, and a new key is made"
    )]
    UnusableKey,
    #[error("the key or the request could not be made: {0}")]
    Library(String),
    #[error("signing request: it cannot be read: give the file that was made by `push-certificate request`, unchanged")]
    UnreadableRequest,
    #[error("signing request: its signature is not that of its key: make a new one")]
    ForgedRequest,
    #[error("vendor chain: there is no CERTIFICATE block in it")]
    NoChain,
    #[error("vendor chain: certificate {0} cannot be read")]
    UnreadableChain(usize),
    #[error("vendor chain: certificate {0} did not issue the one before it: put the vendor's certificate first, then its issuer, then Apple's root")]
    BrokenChain(usize),
    #[error("vendor chain: it does not end with a root: add Apple's intermediate and root certificates (https://www.apple.com/certificateauthority)")]
    NoRoot,
    #[error("vendor key: {0}")]
    VendorKey(#[source] PushCertificateError),
    #[error("vendor key: there is no PRIVATE KEY block in it")]
    NoVendorKey,
    #[error("vendor key: it is no RSA key, and Apple takes no other")]
    VendorKeyType,
    #[error("vendor key: it is not that of the chain's first certificate")]
    OtherVendorKey,
}

/// Makes an RSA key of 2048 bits, which is what Apple takes, and the request for its certificate.
pub fn signing_request(subject: &Subject) -> Result<SigningRequest, SigningRequestError> {
    let parameters = request_parameters(subject)?;
    let key = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).map_err(library)?;
    request_with(&parameters, &key)
}

/// The request for the certificate of a key that was made before, PKCS#8.
pub fn signing_request_of(subject: &Subject, private_key_pem: &str) -> Result<SigningRequest, SigningRequestError> {
    let parameters = request_parameters(subject)?;
    let key = KeyPair::from_pkcs8_pem_and_sign_algo(private_key_pem, &PKCS_RSA_SHA256).map_err(|_| SigningRequestError::UnusableKey)?;
    request_with(&parameters, &key)
}

fn request_with(parameters: &CertificateParams, key: &KeyPair) -> Result<SigningRequest, SigningRequestError> {
    let request = parameters.serialize_request(key).map_err(library)?;
    Ok(SigningRequest { private_key_pem: key.serialize_pem(), request_pem: request.pem().map_err(library)? })
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn library(error: rcgen::Error) -> SigningRequestError {
    SigningRequestError::Library(error.to_string())
}

fn request_parameters(subject: &Subject) -> Result<CertificateParams, SigningRequestError> {
    if subject.common_name.trim().is_empty() {
        return Err(SigningRequestError::NoCommonName);
    }
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = DistinguishedName::new();
    if let Some(country) = &subject.country {
        let wrong = || SigningRequestError::Country(country.chars().take(20).collect());
        if country.len() != 2 || !country.bytes().all(|byte| byte.is_ascii_uppercase()) {
            return Err(wrong());
        }
        let value = PrintableString::try_from(country.as_str()).map_err(|_| wrong())?;
        parameters.distinguished_name.push(DnType::CountryName, DnValue::PrintableString(value));
    }
    parameters.distinguished_name.push(DnType::CommonName, subject.common_name.trim());
    if let Some(email) = &subject.email {
        let value = Ia5String::try_from(email.as_str()).map_err(|_| SigningRequestError::Email(email.chars().take(60).collect()))?;
        parameters.distinguished_name.push(DnType::CustomDnType(EMAIL_ADDRESS.to_vec()), DnValue::Ia5String(value));
    }
    Ok(parameters)
}

/// The vendor's files as PEM, for [`Vendor`]: certificates may be DER, as Apple's pages give them, and any file may be PKCS#12. For the command
/// line, as [`crate::push_certificate::PushCertificatePair::from_pkcs12`] says.
pub fn vendor_file(file: &[u8], password: Option<&str>) -> Result<String, SigningRequestError> {
    Ok(match FileForm::of(file) {
        FileForm::Text => String::from_utf8_lossy(file).into_owned(),
        FileForm::DerCertificate => pem::encode(&Pem::new("CERTIFICATE", file)),
        FileForm::Pkcs12 => pem::encode_many(&opened(file, password).map_err(SigningRequestError::VendorKey)?),
    })
}

/// What is uploaded to Apple's portal: the request, signed by the vendor, as the base64 of a property list. The request may be PEM or DER.
pub fn vendor_signed(request: &[u8], vendor: &Vendor<'_>) -> Result<String, SigningRequestError> {
    let request = match pem::parse(request) {
        Ok(block) => block.into_contents(),
        Err(_) => request.to_vec(),
    };
    let (rest, parsed) = X509CertificationRequest::from_der(&request).map_err(|_| SigningRequestError::UnreadableRequest)?;
    if !rest.is_empty() {
        return Err(SigningRequestError::UnreadableRequest);
    }
    parsed.verify_signature().map_err(|_| SigningRequestError::ForgedRequest)?;

    let chain: Vec<Pem> = pem::parse_many(vendor.chain_pem).unwrap_or_default().into_iter().filter(|block| block.tag() == "CERTIFICATE").collect();
    let public_key = check_chain(&chain)?;
    let key = vendor_key(vendor)?;
    if key.public_key().as_ref() != public_key {
        return Err(SigningRequestError::OtherVendorKey);
    }
    let mut signature = vec![0; key.public_modulus_len()];
    key.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), &request, &mut signature)
        .map_err(|_| SigningRequestError::Library("the vendor's key does not sign".into()))?;

    // Lines of 64 letters that end in a line feed: Apple is strict here.
    let chain = pem::encode_many_config(&chain, EncodeConfig::new().set_line_ending(LineEnding::LF));
    let mut list = plist::Dictionary::new();
    list.insert("PushCertRequestCSR".into(), STANDARD.encode(&request).into());
    list.insert("PushCertCertificateChain".into(), chain.into());
    list.insert("PushCertSignature".into(), STANDARD.encode(&signature).into());
    let mut xml = Vec::new();
    plist::Value::Dictionary(list).to_writer_xml(&mut xml).map_err(|error| SigningRequestError::Library(error.to_string()))?;
    Ok(STANDARD.encode(xml))
}

/// The first certificate's public key, if each is issued by the next up to a root.
fn check_chain(chain: &[Pem]) -> Result<Vec<u8>, SigningRequestError> {
    let certificates = chain
        .iter()
        .enumerate()
        .map(|(index, block)| {
            X509Certificate::from_der(block.contents())
                .map(|(_, certificate)| certificate)
                .map_err(|_| SigningRequestError::UnreadableChain(index + 1))
        })
        .collect::<Result<Vec<_>, _>>()?;
    for (index, (issued, issuer)) in certificates.iter().zip(certificates.iter().skip(1)).enumerate() {
        if issued.issuer() != issuer.subject() || issued.verify_signature(Some(issuer.public_key())).is_err() {
            return Err(SigningRequestError::BrokenChain(index + 2));
        }
    }
    let (Some(first), Some(last)) = (certificates.first(), certificates.last()) else {
        return Err(SigningRequestError::NoChain);
    };
    if last.issuer() != last.subject() {
        return Err(SigningRequestError::NoRoot);
    }
    Ok(first.public_key().subject_public_key.data.to_vec())
}

fn vendor_key(vendor: &Vendor<'_>) -> Result<rsa::KeyPair, SigningRequestError> {
    let block = pem::parse_many(vendor.private_key_pem)
        .unwrap_or_default()
        .into_iter()
        .find(|block| block.tag().ends_with("PRIVATE KEY"))
        .ok_or(SigningRequestError::NoVendorKey)?;
    let key = decrypted(block, vendor.password).map_err(SigningRequestError::VendorKey)?;
    rsa::KeyPair::from_pkcs8(key.contents()).or_else(|_| rsa::KeyPair::from_der(key.contents())).map_err(|_| SigningRequestError::VendorKeyType)
}
