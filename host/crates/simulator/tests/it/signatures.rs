//! What devices sign, the server's own reader verifies.

use wasmdm_protocol::certificate::{Certificate, TrustAnchors};
use wasmdm_protocol::mdm_signature;
use wasmdm_protocol::time::Timestamp;
use wasmdm_simulator::authority::CertificateRequest;
use wasmdm_simulator::signer::{self, Attributes};
use wasmdm_simulator::{Authority, KeyType, SignatureForm};

/// 2026-06-01T00:00:00Z
const NOW: i64 = 1_780_272_000_000;

#[test]
fn every_form_of_signature_with_either_type_of_key_verifies() {
    for key_type in [KeyType::P256, KeyType::Rsa2048] {
        let authority = Authority::with_keys(1, key_type, 1).unwrap();
        let identity = authority.issue(1, "SIM0000001").unwrap();
        let mut forms = SignatureForm::all();
        forms.push(SignatureForm { attributes: Attributes::Signed { signing_time: Some(*b"260601000000Z") }, ..SignatureForm::MODERN });
        for form in forms {
            let body = b"<plist>\xC3\xA4</plist>";
            let header = signer::sign(&identity, body, form).unwrap();
            let signer = mdm_signature::verify(header.as_bytes(), body).unwrap_or_else(|error| panic!("{key_type:?} {form:?}: {error}"));
            assert_eq!(signer.der, identity.certificate);
            assert!(mdm_signature::verify(header.as_bytes(), b"<plist>other</plist>").is_err(), "{key_type:?} {form:?}");
        }
    }
}

/// Edge case 22.
#[test]
fn certificates_lead_to_the_root_for_as_long_as_they_are_valid() {
    for key_type in [KeyType::P256, KeyType::Rsa2048] {
        let authority = Authority::with_keys(1, key_type, 2).unwrap();
        let anchors = TrustAnchors::from_pem(authority.root_pem().as_bytes(), b"").unwrap();
        let now = Timestamp::from_millis(NOW);
        let valid = authority.issue(1, "SIM0000001").unwrap();
        let valid = Certificate::from_der(valid.certificate).unwrap();
        assert!(anchors.verify(&valid, now).is_ok());

        let mut expired = CertificateRequest::device(2, "SIM0000002");
        expired.not_after = (2025, 1, 1);
        let expired = authority.issue_as(&expired).unwrap();
        let expired = Certificate::from_der(expired.certificate).unwrap();
        assert!(anchors.verify(&expired, now).is_err());

        let stranger = Authority::with_keys(2, key_type, 1).unwrap();
        let stranger = stranger.issue(1, "SIM0000001").unwrap();
        let stranger = Certificate::from_der(stranger.certificate).unwrap();
        assert!(anchors.verify(&stranger, now).is_err());
    }
}

#[test]
fn an_authority_that_is_loaded_again_issues_the_same_certificates() {
    let directory = tempfile::tempdir().unwrap();
    let load = |keys| Authority::load_or_create(directory.path(), 1, KeyType::Rsa2048, keys).unwrap();
    let first = load(1);
    let again = load(1);
    assert_eq!(first.root_der(), again.root_der());
    assert_eq!(std::fs::read_to_string(directory.path().join("root.pem")).unwrap(), first.root_pem());
    assert_eq!(first.issue(5, "x").unwrap().certificate, again.issue(5, "x").unwrap().certificate);
    // A larger pool keeps the keys that were there.
    let larger = load(2);
    assert_eq!(first.issue(2, "x").unwrap().certificate, larger.issue(2, "x").unwrap().certificate);
}
