//! What operators upload. The files in `uploads` are OpenSSL's.

use wasmdm_apns::ClientCertificate;
use wasmdm_apns::push_certificate::{FileForm, PushCertificateError, PushCertificatePair};
use wasmdm_protocol::time::Timestamp;
use wasmdm_simulator::apns::{PushAuthority, PushCertificateRequest};

const TOPIC: &str = "com.apple.mgmt.External.0f0f0f0f-1111-2222-3333-444444444444";
const RSA: &str = include_str!("uploads/rsa.pem");
const RSA_PKCS8: &str = include_str!("uploads/rsa-pkcs8.pem");
const RSA_PKCS1: &str = include_str!("uploads/rsa-pkcs1.pem");
const RSA_OLD_ENCRYPTION: &str = include_str!("uploads/rsa-old-encryption.pem");
const RSA_OLD_DES3: &str = include_str!("uploads/rsa-old-des3.pem");
const EC_OLD_AES128: &str = include_str!("uploads/ec-old-aes128.pem");
const EC: &str = include_str!("uploads/ec.pem");
const EC_SEC1: &str = include_str!("uploads/ec-sec1.pem");
const EC_PKCS8: &str = include_str!("uploads/ec-pkcs8.pem");
const EC_AES256: &str = include_str!("uploads/ec-aes256.pem");
const EC_DES3: &str = include_str!("uploads/ec-des3.pem");
const EC_SCRYPT: &str = include_str!("uploads/ec-scrypt.pem");
const EC_PBES1: &str = include_str!("uploads/ec-pbes1.pem");

fn read(upload: impl AsRef<[u8]>, password: Option<&str>) -> Result<PushCertificatePair, PushCertificateError> {
    PushCertificatePair::read(upload.as_ref(), password)
}

/// What was read can be used, and is no longer encrypted.
fn check(pair: &PushCertificatePair) {
    assert_eq!(pair.topic, TOPIC);
    assert!(!pair.private_key_pem.contains("ENCRYPTED"));
    let ready = ClientCertificate::new(&pair.certificate_pem, &pair.private_key_pem, 1).unwrap();
    assert_eq!((ready.topic(), ready.not_after()), (TOPIC, pair.not_after));
}

#[test]
fn keys_of_every_usual_form_are_read() {
    for (certificate, key) in [(RSA, RSA_PKCS8), (RSA, RSA_PKCS1), (EC, EC_SEC1), (EC, EC_PKCS8)] {
        check(&read(format!("{certificate}{key}"), None).unwrap());
        // In any order, and without a newline between.
        check(&read(format!("{}{certificate}", key.trim_end()), None).unwrap());
        check(&read(format!("Bag Attributes\n    friendlyName: APSP\n{certificate}Key Attributes\n{key}"), Some("not asked for")).unwrap());
    }
}

#[test]
fn keys_under_a_password_are_opened() {
    for key in [EC_AES256, EC_DES3, EC_SCRYPT] {
        let upload = format!("{EC}{key}");
        check(&read(&upload, Some("secret")).unwrap());
        assert_eq!(read(&upload, None).unwrap_err(), PushCertificateError::PasswordNeeded);
        assert_eq!(read(&upload, Some("Secret")).unwrap_err(), PushCertificateError::WrongPassword);
    }
}

/// Not only old: MicroMDM's `mdmctl` writes keys so to this day.
#[test]
fn keys_in_the_old_form_of_openssl_are_opened_too() {
    for key in [RSA_OLD_ENCRYPTION, RSA_OLD_DES3] {
        let upload = format!("{RSA}{key}");
        check(&read(&upload, Some("secret")).unwrap());
        assert_eq!(read(&upload, None).unwrap_err(), PushCertificateError::PasswordNeeded);
        assert_eq!(read(&upload, Some("Secret")).unwrap_err(), PushCertificateError::WrongPassword);
    }
    check(&read(format!("{EC}{EC_OLD_AES128}"), Some("secret")).unwrap());
}

#[test]
fn pkcs12_is_read_with_new_encryption_and_old() {
    for upload in [&include_bytes!("uploads/new.p12")[..], include_bytes!("uploads/old.p12"), include_bytes!("uploads/oldest.p12")] {
        check(&read(upload, Some("secret")).unwrap());
        for wrong in [None, Some("Secret")] {
            assert_eq!(read(upload, wrong).unwrap_err(), PushCertificateError::Pkcs12Password);
        }
        assert_eq!(read(&upload[..upload.len() - 1], Some("secret")).unwrap_err(), PushCertificateError::UnreadablePkcs12);
    }
    assert_eq!(read(include_bytes!("uploads/without-key.p12"), Some("secret")).unwrap_err(), PushCertificateError::EmptyPkcs12);
}

/// Some send the chain along, some what they renewed.
#[test]
fn of_several_certificates_the_one_that_fits_the_key_counts() {
    let authority = PushAuthority::new().unwrap();
    let issued = authority.issue(TOPIC).unwrap();
    for upload in [
        format!("{}{}{}", issued.certificate_pem, authority.root_pem(), issued.private_key_pem),
        format!("{}{EC}{}{}", authority.root_pem(), issued.certificate_pem, issued.private_key_pem),
    ] {
        let pair = read(upload, None).unwrap();
        assert_eq!((pair.certificate_pem.replace('\r', ""), pair.serial), (issued.certificate_pem.replace('\r', ""), issued.serial.clone()));
    }
}

/// A renewed certificate may have the key of the one before, and whoever sends both means the new one.
#[test]
fn of_two_certificates_of_one_key_the_one_that_ends_last_counts() {
    let key = rcgen::KeyPair::generate().unwrap();
    let made = |topic: &str, year| {
        let mut parameters = rcgen::CertificateParams::default();
        let topic = rcgen::DnValue::Utf8String(topic.to_owned());
        parameters.distinguished_name.push(rcgen::DnType::CustomDnType(vec![0, 9, 2342, 19_200_300, 100, 1, 1]), topic);
        parameters.not_after = rcgen::date_time_ymd(year, 1, 1);
        parameters.self_signed(&key).unwrap().pem()
    };
    let (old, new, pem) = (made(TOPIC, 2020), made(TOPIC, 2040), key.serialize_pem());
    for upload in [format!("{old}{new}{pem}"), format!("{new}{old}{pem}")] {
        assert!(read(upload, None).unwrap().not_after.to_string().starts_with("2040"));
    }
    let other = made("com.apple.mgmt.External.other", 2041);
    assert!(matches!(read(format!("{new}{other}{pem}"), None).unwrap_err(), PushCertificateError::SeveralTopics(..)));
}

/// What Apple's portal gave and the key that was made for it are two files, of any form.
#[test]
fn files_that_belong_together_are_read_together() {
    let der = pem::parse(RSA).unwrap().into_contents();
    assert_eq!((FileForm::of(&der), FileForm::of(RSA.as_bytes())), (FileForm::DerCertificate, FileForm::Text));
    assert_eq!(FileForm::of(include_bytes!("uploads/new.p12")), FileForm::Pkcs12);
    check(&PushCertificatePair::read_all(&[der.as_slice(), RSA_PKCS8.as_bytes()], None).unwrap());
    check(&PushCertificatePair::read_all(&[EC.as_bytes(), EC_AES256.as_bytes()], Some("secret")).unwrap());
    check(&PushCertificatePair::read_all(&[EC.as_bytes(), include_bytes!("uploads/new.p12")], Some("secret")).unwrap());
    assert_eq!(PushCertificatePair::read_all(&[&der], None).unwrap_err(), PushCertificateError::NoPrivateKey);
}

/// Edge case 31. Each wrong upload is refused in one sentence that says what is wrong and what to do.
#[test]
fn wrong_uploads_are_refused_with_the_reason() {
    let authority = PushAuthority::new().unwrap();
    let no_topic = authority.issue_as(&PushCertificateRequest { topic: None, ..PushCertificateRequest::new("") }).unwrap();
    let app_topic = authority.issue("com.example.app").unwrap();
    let header = authority.issue("com.apple.mgmt.\r\nx: y").unwrap();
    let both = |certificate: &str, key: &str| format!("{certificate}{key}");
    let costly = costly(EC_AES256);
    for (upload, password, begins, contains) in [
        (String::new(), None, "no PEM block", "PKCS#12"),
        ("garbage".into(), None, "no PEM block", "PKCS#12"),
        (EC.into(), None, "private key: ", "add the key"),
        (EC_SEC1.into(), None, "certificate: ", "add the certificate"),
        (both(EC, RSA_PKCS8), None, "private key: ", "not the certificate's"),
        (both(RSA, EC_SEC1), None, "private key: ", "not the certificate's"),
        (both(EC, &both(EC_SEC1, EC_PKCS8)), None, "private key: ", "there are 2"),
        (both(EC, "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"), None, "private key: ", "cannot be read"),
        (both("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", EC_SEC1), None, "certificate: ", "cannot be read"),
        (both(EC, "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"), None, "a PEM block", "CERTIFICATE REQUEST"),
        (both(RSA, &RSA_OLD_ENCRYPTION.replace("AES-256-CBC", "IDEA-CBC")), Some("secret"), "private key: ", "openssl pkcs8"),
        (both(RSA, &RSA_OLD_ENCRYPTION.replace("AES-256-CBC,", "AES-256-CBC,0")), Some("secret"), "private key: ", "openssl pkcs8"),
        (both(EC, EC_PBES1), Some("secret"), "private key: ", "openssl pkcs8"),
        (both(EC, &costly), Some("secret"), "private key: ", "fewer iterations"),
        (both(&no_topic.certificate_pem, &no_topic.private_key_pem), None, "certificate: ", "user id"),
        (both(&app_topic.certificate_pem, &app_topic.private_key_pem), None, "certificate: ", "com.apple.mgmt"),
        (both(&header.certificate_pem, &header.private_key_pem), None, "certificate: ", "user id"),
        ("0garbage".into(), Some("secret"), "PKCS#12: ", "cannot be read"),
    ] {
        let sentence = read(&upload, password).unwrap_err().to_string();
        assert!(sentence.starts_with(begins) && sentence.contains(contains) && !sentence.contains('\n'), "{sentence}");
    }
}

/// The same key, said to be encrypted with seventeen million rounds.
fn costly(key: &str) -> String {
    let mut block = pem::parse(key).unwrap().into_contents();
    // INTEGER 2048, the rounds.
    let rounds = block.windows(4).position(|window| window == [0x02, 0x02, 0x08, 0x00]).unwrap();
    block.splice(rounds..rounds + 4, [0x02, 0x04, 0x01, 0x00, 0x00, 0x00]);
    // Each enclosing sequence has become two bytes longer; all of them have lengths of one byte or of the form 81 nn.
    for at in 0..rounds {
        let (length, end) = match block[at..] {
            [0x30, 0x81, length, ..] => (at + 2, at + 3 + usize::from(length)),
            [0x30, length @ ..=0x7F, ..] => (at + 1, at + 2 + usize::from(length)),
            _ => continue,
        };
        if end > rounds {
            block[length] += 2;
        }
    }
    pem::encode(&pem::Pem::new("ENCRYPTED PRIVATE KEY", block))
}

#[test]
fn a_certificate_is_only_good_in_its_time_and_for_its_topic() {
    let authority = PushAuthority::new().unwrap();
    let expired = authority.issue_as(&PushCertificateRequest::expired(TOPIC)).unwrap();
    let pair = read(format!("{}{}", expired.certificate_pem, expired.private_key_pem), None).unwrap();
    let time = |text: &str| Timestamp::from_millis(text.parse::<jiff::Timestamp>().unwrap().as_millisecond());
    assert_eq!(pair.check_validity(time("2019-06-01T00:00:00Z")), Ok(()));
    let late = pair.check_validity(time("2026-06-01T00:00:00Z")).unwrap_err().to_string();
    assert!(late.contains("expired at 2020-01-01T00:00:00"), "{late}");
    let early = pair.check_validity(time("2018-06-01T00:00:00Z")).unwrap_err().to_string();
    assert!(early.contains("valid only from 2019-01-01T00:00:00"), "{early}");
    assert_eq!(pair.check_topic(TOPIC), Ok(()));
    let other = pair.check_topic("com.apple.mgmt.External.other").unwrap_err().to_string();
    assert!(other.contains(TOPIC) && other.contains("com.apple.mgmt.External.other"), "{other}");
}

/// Whatever arrives, the answer is a sentence.
#[test]
fn no_damaged_upload_is_more_than_refused() {
    let files = [format!("{EC}{EC_AES256}").into_bytes(), include_bytes!("uploads/new.p12").to_vec(), include_bytes!("uploads/old.p12").to_vec()];
    for file in files {
        for at in (0..file.len()).step_by(101) {
            let mut damaged = file.clone();
            damaged[at] ^= 0x41;
            if let Err(error) = read(&damaged[..], Some("secret")) {
                assert!(!error.to_string().is_empty());
            }
        }
    }
}
