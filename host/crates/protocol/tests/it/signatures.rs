//! `Mdm-Signature` headers.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use proptest::prelude::*;
use wasmdm_protocol::mdm_signature::{DetachedSignature, SignatureError, verify};

use crate::signer::{Certificate, Cms, Form, Hash, Key, P256, P384, RSA_1024, RSA_2048, SUBJECT_KEY_ID, tlv};

const BODY: &[u8] = b"<plist><dict><key>Status</key><string>Idle</string></dict></plist>";

fn leaf(key: &Key) -> Vec<u8> {
    Certificate::leaf("device").issue(key, "authority", &P256)
}

#[test]
fn every_key_digest_and_form_of_devices_verifies() {
    for key in [&P256, &P384, &RSA_2048, &RSA_1024] {
        let certificate = leaf(key);
        for hash in Hash::ALL {
            if matches!(**key, Key::Rsa2048(_)) && hash == Hash::Sha1 {
                continue;
            }
            for form in Form::ALL {
                let header = Cms { hash, form, ..Cms::new(key, "authority", &certificate) }.header(BODY);
                let signer = verify(header.as_bytes(), BODY).unwrap();
                assert_eq!(signer.der, certificate, "{hash:?} {form:?}");
                assert_eq!(
                    verify(header.as_bytes(), b"another body").unwrap_err(),
                    if form == Form::Attributes { SignatureError::OtherBody } else { SignatureError::False }
                );
            }
        }
    }
}

#[test]
fn every_flipped_byte_of_body_or_signature_fails() {
    for key in [&P256, &RSA_1024] {
        for form in [Form::Attributes, Form::Plain] {
            let der = Cms { form, ..Cms::new(key, "authority", &leaf(key)) }.der(BODY);
            verify(STANDARD.encode(&der).as_bytes(), BODY).unwrap();
            for index in 0..BODY.len() {
                let mut body = BODY.to_vec();
                body[index] ^= 1;
                assert!(verify(STANDARD.encode(&der).as_bytes(), &body).is_err(), "body byte {index}");
            }
            // The signature is the last of a signer's fields. Elliptic ones are about 70 bytes, RSA's 128.
            for index in der.len() - 64..der.len() {
                let mut der = der.clone();
                der[index] ^= 1;
                assert!(verify(STANDARD.encode(&der).as_bytes(), BODY).is_err(), "byte {index}");
            }
        }
    }
}

#[test]
fn a_signer_named_by_key_id_is_found() {
    let key = &*P256;
    let certificate = Certificate::leaf("device").with(SUBJECT_KEY_ID, false, tlv(4, &[b"key id"])).issue(key, "authority", key);
    let other = leaf(&P384);
    let cms = Cms { signer: Err(b"key id"), certificates: vec![other.clone(), certificate.clone()], ..Cms::new(key, "", &[]) };
    assert_eq!(verify(cms.header(BODY).as_bytes(), BODY).unwrap().der, certificate);
    let cms = Cms { signer: Err(b"key id"), certificates: vec![other], ..Cms::new(key, "", &[]) };
    assert_eq!(verify(cms.header(BODY).as_bytes(), BODY), Err(SignatureError::NoCertificate));
}

#[test]
fn the_signer_is_the_one_that_issuer_and_serial_number_name() {
    let key = &*P256;
    let other = Certificate { serial: 9, ..Certificate::leaf("other") }.issue(&P384, "authority", key);
    let cms = Cms { certificates: vec![other.clone(), leaf(key)], ..Cms::new(key, "authority", &[]) };
    assert_eq!(verify(cms.header(BODY).as_bytes(), BODY).unwrap().subject, "CN=device");
    let cms = Cms { certificates: vec![other], ..Cms::new(key, "authority", &[]) };
    assert_eq!(verify(cms.header(BODY).as_bytes(), BODY), Err(SignatureError::NoCertificate));
}

#[test]
fn one_signer_is_needed_and_no_more() {
    let certificate = leaf(&P256);
    for signers in [0, 2] {
        let cms = Cms { signers, ..Cms::new(&P256, "authority", &certificate) };
        assert_eq!(verify(cms.header(BODY).as_bytes(), BODY), Err(SignatureError::Signers));
    }
}

#[test]
fn attributes_of_another_body_fail_although_their_signature_holds() {
    let certificate = leaf(&P256);
    let cms = Cms { form: Form::Attributes, other_body: Some(b"other"), ..Cms::new(&P256, "authority", &certificate) };
    assert_eq!(verify(cms.header(BODY).as_bytes(), BODY), Err(SignatureError::OtherBody));
}

/// A device whose identity had expired could not fetch its renewal, nor one whose clock was behind its new certificate say anything: the time
/// that the signer claims was held against the certificate. Edge case 22.
#[test]
fn the_time_that_a_signer_claims_decides_nothing() {
    let certificate = leaf(&P256);
    // In its validity, two seconds before it, years behind it, and no time at all.
    for time in ["250101000000Z", "241231235958Z", "350101000000Z", "991332000000Z"] {
        let cms = Cms { form: Form::Attributes, signing_time: Some(time), ..Cms::new(&P256, "authority", &certificate) };
        assert_eq!(verify(cms.header(BODY).as_bytes(), BODY).unwrap().der, certificate, "{time}");
    }
}

#[test]
fn a_body_in_parts_is_the_body() {
    for key in [&P256, &P384, &RSA_2048, &RSA_1024] {
        let certificate = leaf(key);
        for hash in Hash::ALL {
            if matches!(**key, Key::Rsa2048(_)) && hash == Hash::Sha1 {
                continue;
            }
            for form in Form::ALL {
                let header = Cms { hash, form, ..Cms::new(key, "authority", &certificate) }.header(BODY);
                let check = |parts: &[&[u8]]| {
                    let mut check = DetachedSignature::read(header.as_bytes())?.begin()?;
                    for part in parts {
                        check.update(part);
                    }
                    check.finish().map(|signer| signer.der)
                };
                assert_eq!(check(&[&BODY[..7], b"", &BODY[7..]]).unwrap(), certificate, "{hash:?} {form:?}");
                assert!(check(&[&BODY[..7]]).is_err() && check(&[BODY, b"x"]).is_err(), "{hash:?} {form:?}");
            }
        }
    }
}

#[test]
fn another_certificates_key_does_not_verify() {
    let cms = Cms::new(&P256, "authority", &leaf(&Key::p256())).header(BODY);
    assert_eq!(verify(cms.as_bytes(), BODY), Err(SignatureError::False));
}

#[test]
fn headers_that_are_no_signature_are_malformed() {
    let valid = Cms::new(&P256, "authority", &leaf(&P256)).der(BODY);
    let trailing = STANDARD.encode([valid.as_slice(), &[0]].concat());
    let long = "A".repeat(70_000);
    for header in ["", "?", "AAAA", "MAA=", trailing.as_str(), long.as_str()] {
        assert!(matches!(verify(header.as_bytes(), BODY), Err(SignatureError::Malformed(_))), "{header:.20}");
    }
}

#[test]
fn lengths_without_end_in_each_other_are_refused_in_time() {
    let nested = STANDARD.encode([0x30, 0x80].repeat(20_000));
    assert!(matches!(verify(nested.as_bytes(), BODY), Err(SignatureError::Malformed(_))));
    // Pieces of pieces of a string.
    let closed = STANDARD.encode([[0x24, 0x80].repeat(10), [0, 0].repeat(10)].concat());
    assert!(verify(closed.as_bytes(), BODY).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn changed_signatures_never_panic_and_never_name_another_signer(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4), cut in any::<prop::sample::Index>()) {
        static DER: std::sync::LazyLock<(Vec<u8>, Vec<u8>)> = std::sync::LazyLock::new(|| {
            let certificate = leaf(&P256);
            (Cms { form: Form::Ber, ..Cms::new(&P256, "authority", &certificate) }.der(BODY), certificate)
        });
        let mut der = DER.0.clone();
        for (index, byte) in changes {
            let index = index.index(der.len());
            der[index] = byte;
        }
        let _ = verify(STANDARD.encode(&der[..cut.index(der.len())]).as_bytes(), BODY);
        if let Ok(signer) = verify(STANDARD.encode(&der).as_bytes(), BODY) {
            // The certificate is not covered by the signature, but its key is.
            prop_assert_eq!(signer.der.len(), DER.1.len());
        }
    }

    #[test]
    fn random_headers_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(verify(STANDARD.encode(&bytes).as_bytes(), BODY).is_err());
    }
}

/// Fuzzing found that a signer written as a number was read like any other.
#[test]
fn a_signer_that_is_no_sequence_is_malformed() {
    let der = Cms { form: Form::Ber, ..Cms::new(&P256, "authority", &leaf(&P256)) }.der(BODY);
    // The signer's part is the only one that begins so.
    let start = der.windows(5).rposition(|window| window == [0x30, 0x80, 2, 1, 1]).unwrap();
    assert!(verify(STANDARD.encode(&der).as_bytes(), BODY).is_ok());
    let mut other = der;
    other[start] = 0x24;
    assert!(matches!(verify(STANDARD.encode(&other).as_bytes(), BODY), Err(SignatureError::Malformed(_))));
}

/// Fuzzing found that more could follow in a signature, a second list of signers for instance, which another reader would take for the one.
#[test]
fn nothing_may_follow_what_a_signature_has() {
    let der = Cms { form: Form::Ber, ..Cms::new(&P256, "authority", &leaf(&P256)) }.der(BODY);
    assert!(verify(STANDARD.encode(&der).as_bytes(), BODY).is_ok());
    // All of it is of indefinite length: the marks of the ends stand at its end, the outermost last.
    for depth in 0..=5 {
        let mut longer = der.clone();
        let at = longer.len() - 2 * depth;
        longer.splice(at..at, [0x31, 0x00]);
        assert!(verify(STANDARD.encode(&longer).as_bytes(), BODY).is_err(), "at depth {depth}");
    }
    let mut with_unsigned_attributes = der.clone();
    let at = der.len() - 10;
    with_unsigned_attributes.splice(at..at, [0xA1, 0x00]);
    assert!(verify(STANDARD.encode(&with_unsigned_attributes).as_bytes(), BODY).is_ok());
}
