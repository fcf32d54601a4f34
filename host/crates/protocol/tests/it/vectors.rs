//! Signatures and chains that other programs made. Their folder is named by `WASMDM_VECTORS`; without it these tests say so and pass.

use std::fs;
use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use wasmdm_protocol::certificate::{Certificate, TrustAnchors};
use wasmdm_protocol::mdm_signature::{SignatureError, verify};

use crate::signer::NOW;

fn folder(name: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("WASMDM_VECTORS").map(|folder| PathBuf::from(folder).join(name));
    if folder.is_none() {
        println!("skipped: WASMDM_VECTORS is not set");
    }
    folder
}

#[test]
fn signatures_of_devices_and_other_programs_verify() {
    let Some(folder) = folder("mdm-signature") else { return };
    let body = |name: &str| fs::read(folder.join(name)).unwrap();
    let (apple, small) = (body("apple-body.plist"), body("body_small.plist"));
    let authority = TrustAnchors::from_pem(&body("ca.pem"), b"").unwrap();
    let mut seen = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if path.extension().is_none_or(|extension| extension != "p7") {
            continue;
        }
        seen += 1;
        let header = STANDARD.encode(fs::read(&path).unwrap());
        let body = if name.starts_with("apple") { &apple } else { &small };
        let verdict = verify(header.as_bytes(), body);
        match name.as_str() {
            "two-signers.p7" => assert_eq!(verdict, Err(SignatureError::Signers)),
            // Its body is not here, so all that can be seen is that everything else was read.
            "apple-signature-without-body.p7" => assert!(matches!(verdict, Err(SignatureError::False | SignatureError::OtherBody))),
            "apple-signature.p7" => assert!(verdict.is_ok(), "{name}: {verdict:?}"),
            _ => {
                let certificate = verdict.unwrap_or_else(|error| panic!("{name}: {error}"));
                assert!(authority.verify(&certificate, NOW).is_ok() || authority.verify(&certificate, certificate.not_before).is_ok(), "{name}");
                assert!(verify(header.as_bytes(), b"another").is_err(), "{name}");
            }
        }
    }
    assert!(seen > 60, "{seen}");
}

#[test]
fn every_flipped_byte_of_a_real_devices_body_or_signature_fails() {
    let Some(folder) = folder("mdm-signature") else { return };
    let body = fs::read(folder.join("apple-body.plist")).unwrap();
    let cms = fs::read(folder.join("apple-signature.p7")).unwrap();
    let header = STANDARD.encode(&cms);
    for index in 0..body.len() {
        let mut body = body.clone();
        body[index] ^= 0x20;
        assert!(verify(header.as_bytes(), &body).is_err(), "body byte {index}");
    }
    // The RSA signature of 2,048 bits is the last string in it, before the marks that end six indefinite lengths.
    let end = cms.iter().rposition(|byte| *byte != 0).unwrap();
    for index in end - 255..=end {
        let mut cms = cms.clone();
        cms[index] ^= 1;
        assert!(verify(STANDARD.encode(&cms).as_bytes(), &body).is_err(), "signature byte {index}");
    }
}

/// Edge case 25.
#[test]
fn chains_have_the_verdicts_of_go() {
    let Some(folder) = folder("chains") else { return };
    let read = |name: &str| fs::read(folder.join(format!("{name}.pem"))).unwrap();
    let anchors = TrustAnchors::from_pem(&read("root"), b"").unwrap();
    for (name, accepted) in [
        ("nosan", true),
        ("emptysubj", true),
        ("noeku", true),
        ("caleaf", true),
        ("nullserial", true),
        ("rsa1024", true),
        ("int", true),
        ("critunk", false),
        ("sha1", false),
        ("selfleaf", false),
        ("other", false),
    ] {
        let certificate = Certificate::from_der(pem::parse(read(name)).unwrap().into_contents()).unwrap();
        let now = NOW.max(certificate.not_before);
        let verdict = anchors.verify(&certificate, now);
        assert_eq!(verdict.is_ok(), accepted, "{name}: {verdict:?}");
        println!("{name}: {verdict:?}");
    }
}
