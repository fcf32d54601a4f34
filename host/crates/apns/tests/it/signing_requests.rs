//! Asking Apple for a push certificate.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, PKCS_RSA_SHA256, RsaKeySize};
use wasmdm_apns::signing_request::{SigningRequestError, Subject, Vendor, signing_request, signing_request_of, vendor_signed};
use x509_parser::prelude::{FromDer as _, X509Certificate, X509CertificationRequest};

fn subject() -> Subject {
    Subject { common_name: "Example Ltd".into(), email: Some("mdm@example.com".into()), country: Some("DE".into()) }
}

/// A vendor as Apple makes them: its certificate, the intermediate, the root, and the vendor's key.
struct Signer {
    chain: [String; 3],
    key: String,
}

fn signer(vendor_key: &KeyPair) -> Signer {
    let authority = |name: &str| {
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name.push(DnType::CommonName, name);
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        (parameters, KeyPair::generate().unwrap())
    };
    let (root, root_key) = authority("Root");
    let root_certificate = root.self_signed(&root_key).unwrap();
    let root_issuer = Issuer::from_ca_cert_der(root_certificate.der(), root_key).unwrap();
    let (intermediate, intermediate_key) = authority("Intermediate");
    let intermediate_certificate = intermediate.signed_by(&intermediate_key, &root_issuer).unwrap();
    let issuer = Issuer::from_ca_cert_der(intermediate_certificate.der(), intermediate_key).unwrap();
    let mut vendor = CertificateParams::default();
    vendor.distinguished_name.push(DnType::CommonName, "MDM Vendor: Example");
    let vendor = vendor.signed_by(vendor_key, &issuer).unwrap();
    Signer { chain: [vendor.pem(), intermediate_certificate.pem(), root_certificate.pem()], key: vendor_key.serialize_pem() }
}

#[test]
fn a_request_names_who_asks_and_is_signed_with_its_own_key() {
    let made = signing_request(&subject()).unwrap();
    let block = pem::parse(&made.request_pem).unwrap();
    assert_eq!(block.tag(), "CERTIFICATE REQUEST");
    let (_, request) = X509CertificationRequest::from_der(block.contents()).unwrap();
    request.verify_signature().unwrap();
    assert_eq!(request.certification_request_info.subject.to_string(), "C=DE, CN=Example Ltd, Email=mdm@example.com");
    let key = aws_lc_rs::rsa::KeyPair::from_pkcs8(pem::parse(&made.private_key_pem).unwrap().contents()).unwrap();
    assert_eq!(key.public_modulus_len(), 256);
    assert_eq!(request.certification_request_info.subject_pki.subject_public_key.data, aws_lc_rs::signature::KeyPair::public_key(&key).as_ref());
    assert!(!format!("{made:?}").contains("PRIVATE"));

    for (subject, field) in [
        (Subject { common_name: " ".into(), ..subject() }, "common name"),
        (Subject { country: Some("Germany".into()), ..subject() }, "country"),
        (Subject { country: Some("de".into()), ..subject() }, "country"),
        (Subject { email: Some("mäil@example.com".into()), ..subject() }, "email"),
    ] {
        assert!(signing_request(&subject).unwrap_err().to_string().starts_with(field));
    }
}

#[test]
fn a_key_that_was_made_before_is_asked_for_again() {
    let made = signing_request(&subject()).unwrap();
    let again = signing_request_of(&subject(), &made.private_key_pem).unwrap();
    assert_eq!(again.request_pem, made.request_pem);
    let ec = KeyPair::generate().unwrap().serialize_pem();
    for unusable in ["", "garbage", &ec, include_str!("uploads/ec-aes256.pem")] {
        assert_eq!(signing_request_of(&subject(), unusable).unwrap_err(), SigningRequestError::UnusableKey);
    }
}

#[test]
fn what_the_vendor_signed_is_what_apples_portal_takes() {
    let made = signing_request(&subject()).unwrap();
    let vendor_key = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap();
    let signer = signer(&vendor_key);
    let chain = signer.chain.concat();
    let vendor = Vendor { chain_pem: chain.as_bytes(), private_key_pem: signer.key.as_bytes(), password: None };
    let signed = vendor_signed(made.request_pem.as_bytes(), &vendor).unwrap();
    let request = pem::parse(&made.request_pem).unwrap().into_contents();
    assert_eq!(vendor_signed(&request, &vendor).unwrap(), signed, "PEM or DER");

    let xml = STANDARD.decode(signed).unwrap();
    assert!(xml.starts_with(b"<?xml"));
    let list: plist::Dictionary = plist::from_bytes(&xml).unwrap();
    let text = |key: &str| list.get(key).unwrap().as_string().unwrap();
    assert_eq!(list.keys().collect::<Vec<_>>(), ["PushCertRequestCSR", "PushCertCertificateChain", "PushCertSignature"]);
    assert_eq!(STANDARD.decode(text("PushCertRequestCSR")).unwrap(), request);
    let written = text("PushCertCertificateChain");
    assert!(!written.contains('\r') && written.lines().all(|line| line.len() <= 64));
    let expected: Vec<_> = signer.chain.iter().map(|one| pem::parse(one).unwrap().into_contents()).collect();
    let found: Vec<_> = pem::parse_many(written).unwrap().into_iter().map(pem::Pem::into_contents).collect();
    assert_eq!(found, expected);
    let (_, certificate) = X509Certificate::from_der(&found[0]).unwrap();
    let public = &certificate.public_key().subject_public_key.data;
    aws_lc_rs::signature::UnparsedPublicKey::new(&aws_lc_rs::signature::RSA_PKCS1_2048_8192_SHA256, public)
        .verify(&request, &STANDARD.decode(text("PushCertSignature")).unwrap())
        .unwrap();
}

#[test]
fn a_vendor_that_apple_would_not_believe_is_refused_with_the_reason() {
    let made = signing_request(&subject()).unwrap();
    let request = made.request_pem.as_bytes();
    let vendor_key = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap();
    let signer = signer(&vendor_key);
    let [vendor, intermediate, root] = &signer.chain;
    let whole = signer.chain.concat();
    let ec_key = KeyPair::generate().unwrap().serialize_pem();
    let sign = |request: &[u8], chain: &str, key: &str| {
        vendor_signed(request, &Vendor { chain_pem: chain.as_bytes(), private_key_pem: key.as_bytes(), password: None }).unwrap_err()
    };
    assert_eq!(sign(request, "", &signer.key), SigningRequestError::NoChain);
    assert_eq!(sign(request, vendor, &signer.key), SigningRequestError::NoRoot);
    assert_eq!(sign(request, &format!("{vendor}{intermediate}"), &signer.key), SigningRequestError::NoRoot);
    assert_eq!(sign(request, &format!("{vendor}{root}{intermediate}"), &signer.key), SigningRequestError::BrokenChain(2));
    assert_eq!(sign(request, &whole, &made.private_key_pem), SigningRequestError::OtherVendorKey);
    assert_eq!(sign(request, &whole, &ec_key), SigningRequestError::VendorKeyType);
    assert_eq!(sign(request, &whole, ""), SigningRequestError::NoVendorKey);
    assert_eq!(sign(b"garbage", &whole, &signer.key), SigningRequestError::UnreadableRequest);
    let mut forged = pem::parse(request).unwrap().into_contents();
    *forged.last_mut().unwrap() ^= 1;
    assert_eq!(sign(&forged, &whole, &signer.key), SigningRequestError::ForgedRequest);
}
