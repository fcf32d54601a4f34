//! Certificates, the headers that carry them, and chains. The verdicts are those of Go's verifier for client authentication.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use wasmdm_protocol::certificate::{Certificate, ChainError, TrustAnchors};
use wasmdm_protocol::time::Timestamp;

use crate::signer::{
    self, ALTERNATIVE_NAME, BASIC_CONSTRAINTS, CLIENT_AUTH, EXTENDED_KEY_USAGE, Hash, KEY_USAGE, Key, NAME_CONSTRAINTS, NOW, P256, P384, RSA_1024,
    SERVER_AUTH, pem, tlv,
};

const UNKNOWN_EXTENSION: &str = "1.3.6.1.4.1.99999.1";

fn read(der: Vec<u8>) -> Certificate {
    Certificate::from_der(der).unwrap()
}

fn root() -> Vec<u8> {
    signer::Certificate::authority("root").self_signed(&P256)
}

/// The verdict on a leaf for another key that the root signed.
fn verdict(leaf: &signer::Certificate) -> Result<Timestamp, ChainError> {
    let anchors = TrustAnchors::from_pem(&pem(&[&root()]), b"").unwrap();
    anchors.verify(&read(leaf.issue(&P384, "root", &P256)), NOW)
}

/// The verdict on a leaf below authorities, the first of them signed by the root.
fn verdict_below(authorities: &[signer::Certificate]) -> Result<Timestamp, ChainError> {
    let mut issuer = ("root".to_owned(), Key::p256());
    let root = signer::Certificate::authority("root").self_signed(&issuer.1);
    let mut chain = Vec::new();
    for authority in authorities {
        let key = Key::p256();
        chain.push(authority.issue(&key, &issuer.0, &issuer.1));
        issuer = (authority.subject.clone(), key);
    }
    let chain: Vec<&[u8]> = chain.iter().map(Vec::as_slice).collect();
    let leaf = read(signer::Certificate::leaf("device").issue(&P384, &issuer.0, &issuer.1));
    TrustAnchors::from_pem(&pem(&[&root]), &pem(&chain)).unwrap().verify(&leaf, NOW)
}

#[test]
fn a_certificate_is_read_into_what_others_show_of_it() {
    let certificate = read(signer::Certificate::leaf("a, b").issue(&P384, "root", &P256));
    assert_eq!((certificate.subject.as_str(), certificate.issuer.as_str()), ("CN=a\\, b", "CN=root"));
    assert_eq!(
        (certificate.not_before.to_string(), certificate.not_after.to_string()),
        ("2025-01-01T00:00:00.000Z".into(), "2030-01-01T00:00:00.000Z".into())
    );
    assert_eq!(certificate.fingerprint().len(), 64);
    assert!(certificate.fingerprint().starts_with(&format!("{:02x}", certificate.sha256[0])));
    assert!(!format!("{certificate:?}").contains("der"), "logs show no whole certificates");
}

#[test]
fn names_are_written_so_that_no_two_read_alike() {
    for (name, text) in [("", ""), (" a ", "CN=\\ a\\ "), ("#1", "CN=\\#1"), ("a\nb", "CN=a\\0ab"), ("a+b", "CN=a\\+b"), ("ü", "CN=ü")] {
        assert_eq!(read(signer::Certificate::leaf(name).issue(&P384, "root", &P256)).subject, text);
    }
}

#[test]
fn what_is_no_certificate_is_refused() {
    let der = root();
    assert!(Certificate::from_der(Vec::new()).is_err());
    assert!(Certificate::from_der(der[..der.len() - 1].to_vec()).is_err());
    assert!(Certificate::from_der([der.as_slice(), &[0]].concat()).is_err());
}

/// Each extension is compared with those before it, so ten thousand of them kept a thread busy for whoever had made them up.
#[test]
fn a_certificate_with_very_many_extensions_is_refused() {
    let with = |count: usize| {
        let extensions = (0..count).map(|number| (&*format!("1.3.6.1.4.1.99999.{number}").leak(), false, vec![5, 0])).collect();
        Certificate::from_der(signer::Certificate { extensions, ..signer::Certificate::leaf("device") }.issue(&P384, "root", &P256))
    };
    assert!(with(64).is_ok());
    assert_eq!(with(65).unwrap_err().to_string(), "the certificate cannot be read: it has more than 64 extensions");
}

/// Edge case 24.
#[test]
fn headers_of_proxies_are_read_in_both_forms() {
    let der = root();
    let text = String::from_utf8(pem(&[&der])).unwrap();
    let escape = |text: &str| {
        text.bytes().map(|byte| if byte.is_ascii_alphanumeric() { (byte as char).to_string() } else { format!("%{byte:02X}") }).collect::<String>()
    };
    // Some proxies leave all but spaces and plus signs as they are.
    let lax = text.replace('+', "%2B").replace(' ', "+").replace('\n', "%0A").replace('\r', "%0D");
    for header in [format!(":{}:", STANDARD.encode(&der)), escape(&text), lax] {
        assert_eq!(Certificate::from_header(header.as_bytes()).unwrap().der, der);
    }
    let key = escape(&text.replace("CERTIFICATE", "PRIVATE KEY"));
    for header in ["", ":", "::", ":AAAA:", ":AA", "%", "%zz", "abc", key.as_str(), &"A".repeat(70_000)] {
        assert!(Certificate::from_header(header.as_bytes()).is_err(), "{header:.40}");
    }
}

#[test]
fn certificates_of_odd_but_working_devices_are_accepted() {
    let leaf = || signer::Certificate::leaf("device");
    let end = Timestamp::from_millis(1_893_456_000_000);
    let without = |oid| {
        let mut certificate = leaf();
        certificate.extensions.retain(|(known, ..)| *known != oid);
        certificate
    };
    for (case, certificate) in [
        ("usual", leaf()),
        ("no purpose", without(EXTENDED_KEY_USAGE)),
        ("several purposes", leaf().purposes(&[SERVER_AUTH, CLIENT_AUTH])),
        ("any purpose", leaf().purposes(&["2.5.29.37.0"])),
        ("empty subject", signer::Certificate::leaf("")),
        ("serial number 0", signer::Certificate { serial: 0, ..leaf() }),
        ("version 1", signer::Certificate { version_1: true, ..leaf() }),
        ("calls itself an authority", leaf().with(BASIC_CONSTRAINTS, true, tlv(0x30, &[&[1, 1, 0xff]]))),
        ("critical alternative name", signer::Certificate::leaf("").with(ALTERNATIVE_NAME, true, tlv(0x30, &[&tlv(0x82, &[b"device"])]))),
        ("unknown extension", leaf().with(UNKNOWN_EXTENSION, false, vec![5, 0])),
        ("signed with SHA-512", signer::Certificate { hash: Hash::Sha512, ..leaf() }),
    ] {
        assert_eq!(verdict(&certificate), Ok(end), "{case}");
    }
    let anchors = TrustAnchors::from_pem(&pem(&[&root()]), b"").unwrap();
    assert_eq!(anchors.verify(&read(leaf().issue(&RSA_1024, "root", &P256)), NOW), Ok(end), "RSA of 1024 bits");
}

#[test]
fn certificates_that_nobody_vouches_for_are_refused() {
    let leaf = || signer::Certificate::leaf("device");
    assert_eq!(verdict(&leaf().purposes(&[SERVER_AUTH])), Err(ChainError::NotForClients));
    assert_eq!(verdict(&signer::Certificate { hash: Hash::Sha1, ..leaf() }), Err(ChainError::SignatureAlgorithm));
    assert_eq!(
        verdict(&leaf().with(UNKNOWN_EXTENSION, true, vec![5, 0])),
        Err(ChainError::UnknownCriticalExtension { oid: UNKNOWN_EXTENSION.into() })
    );
    assert_eq!(
        verdict(&leaf().with(KEY_USAGE, false, vec![5, 0])),
        Err(ChainError::UnknownCriticalExtension { oid: KEY_USAGE.into() }),
        "an unreadable one"
    );
    assert!(matches!(verdict(&signer::Certificate { not_after: "251231235959Z", ..leaf() }), Err(ChainError::Expired { .. })));
    assert!(matches!(verdict(&signer::Certificate { not_before: "260101000001Z", ..leaf() }), Err(ChainError::NotYetValid { .. })));
    let anchors = TrustAnchors::from_pem(&pem(&[&root()]), b"").unwrap();
    assert_eq!(anchors.verify(&read(leaf().self_signed(&P384)), NOW), Err(ChainError::UnknownAuthority), "self-signed");
    assert_eq!(anchors.verify(&read(leaf().issue(&P384, "root", &P384)), NOW), Err(ChainError::UnknownAuthority), "another root of the same name");
    assert_eq!(
        anchors.verify(&read(signer::Certificate::leaf("root").self_signed(&P384)), NOW),
        Err(ChainError::UnknownAuthority),
        "the root's name"
    );
}

#[test]
fn validity_includes_its_first_and_last_moment() {
    let anchors = TrustAnchors::from_pem(&pem(&[&root()]), b"").unwrap();
    let leaf = read(signer::Certificate::leaf("device").issue(&P384, "root", &P256));
    assert!(anchors.verify(&leaf, leaf.not_before).is_ok() && anchors.verify(&leaf, leaf.not_after).is_ok());
    assert!(anchors.verify(&leaf, Timestamp::from_millis(leaf.not_after.as_millis() + 1)).is_err());
    assert!(anchors.verify(&leaf, Timestamp::from_millis(leaf.not_before.as_millis() - 1)).is_err());
}

#[test]
fn a_leaf_that_the_operator_trusts_is_its_own_root() {
    let leaf = signer::Certificate::leaf("device").self_signed(&P384);
    let anchors = TrustAnchors::from_pem(&pem(&[&root(), &leaf]), b"").unwrap();
    assert!(anchors.verify(&read(leaf), NOW).is_ok());
}

#[test]
fn intermediates_lead_to_a_root_if_they_are_given_and_may() {
    let authority = |name| signer::Certificate::authority(name);
    assert!(verdict_below(&[authority("one")]).is_ok());
    assert!(verdict_below(&[authority("one"), authority("two"), authority("three")]).is_ok());
    assert!(verdict_below(&[signer::Certificate::authority_over("one", 1), authority("two")]).is_ok());
    assert!(verdict_below(&[signer::Certificate::authority_over("one", 0)]).is_ok());
    // Bit 5 of key usage is keyCertSign.
    assert!(verdict_below(&[authority("one").with(KEY_USAGE, true, vec![3, 2, 2, 0x04])]).is_ok());
    let refused = |authorities: &[signer::Certificate]| matches!(verdict_below(authorities), Err(ChainError::Refused(_)));
    assert!(refused(&[signer::Certificate::authority_over("one", 0), authority("two")]), "path length");
    assert!(refused(&[signer::Certificate::leaf("one")]), "no authority");
    assert!(refused(&[signer::Certificate { version_1: true, ..authority("one") }]), "version 1");
    assert!(refused(&[authority("one").with(KEY_USAGE, true, vec![3, 2, 7, 0x80])]), "may not sign certificates");
    assert!(refused(&[authority("one").purposes(&[SERVER_AUTH])]), "for servers");
    assert!(refused(&[authority("one").with(UNKNOWN_EXTENSION, true, vec![5, 0])]), "unknown critical extension");
    assert!(refused(&[signer::Certificate { not_after: "251231235959Z", ..authority("one") }]), "expired");
    assert!(refused(&[signer::Certificate { not_before: "260101000001Z", ..authority("one") }]), "not yet valid");
    assert_eq!(verdict_below(&[signer::Certificate { hash: Hash::Sha1, ..authority("one") }]), Err(ChainError::SignatureAlgorithm));

    let intermediate = authority("one").issue(&P384, "root", &P256);
    let leaf = read(signer::Certificate::leaf("device").issue(&RSA_1024, "one", &P384));
    let anchors = TrustAnchors::from_pem(&pem(&[&root()]), b"").unwrap();
    assert_eq!(anchors.verify(&leaf, NOW), Err(ChainError::UnknownAuthority), "the intermediate is missing");
    let anchors = TrustAnchors::from_pem(&pem(&[&intermediate]), b"").unwrap();
    assert!(anchors.verify(&leaf, NOW).is_ok(), "an intermediate can be trusted itself");
}

#[test]
fn the_verdict_holds_until_the_first_certificate_of_the_chain_ends() {
    let short = signer::Certificate { not_after: "270101000000Z", ..signer::Certificate::authority("one") };
    assert_eq!(verdict_below(&[short]).unwrap().to_string(), "2027-01-01T00:00:00.000Z");
}

#[test]
fn of_roots_with_one_name_the_key_decides() {
    let (one, two) = (Key::p256(), Key::p256());
    let roots = pem(&[&signer::Certificate::authority("root").self_signed(&one), &signer::Certificate::authority("root").self_signed(&two)]);
    let anchors = TrustAnchors::from_pem(&roots, b"").unwrap();
    for key in [&one, &two] {
        assert!(anchors.verify(&read(signer::Certificate::leaf("device").issue(&P384, "root", key)), NOW).is_ok());
    }
}

#[test]
fn an_expired_root_does_not_hide_its_renewal() {
    let key = Key::p256();
    let expired = signer::Certificate { not_after: "251231235959Z", ..signer::Certificate::authority("root") }.self_signed(&key);
    let renewed = signer::Certificate { serial: 8, ..signer::Certificate::authority("root") }.self_signed(&key);
    let leaf = read(signer::Certificate::leaf("device").issue(&P384, "root", &key));
    let anchors = TrustAnchors::from_pem(&pem(&[&expired, &renewed]), b"").unwrap();
    assert!(anchors.verify(&leaf, NOW).is_ok());
    let anchors = TrustAnchors::from_pem(&pem(&[&expired]), b"").unwrap();
    assert!(matches!(anchors.verify(&leaf, NOW), Err(ChainError::Refused(_))));
}

#[test]
fn authorities_that_sign_each_other_are_walked_once() {
    let (one, two) = (Key::p256(), Key::p256());
    let authority = |name| signer::Certificate::authority(name);
    let circle = pem(&[&authority("one").issue(&one, "two", &two), &authority("two").issue(&two, "one", &one)]);
    let leaf = read(signer::Certificate::leaf("device").issue(&P384, "one", &one));
    assert_eq!(TrustAnchors::from_pem(&pem(&[&root()]), &circle).unwrap().verify(&leaf, NOW), Err(ChainError::UnknownAuthority));
}

#[test]
fn a_version_1_root_and_a_root_that_is_no_authority() {
    let verdict = |root: signer::Certificate| {
        let key = Key::p256();
        let leaf = read(signer::Certificate::leaf("device").issue(&P384, "root", &key));
        TrustAnchors::from_pem(&pem(&[&root.self_signed(&key)]), b"").unwrap().verify(&leaf, NOW)
    };
    assert!(verdict(signer::Certificate { version_1: true, ..signer::Certificate::authority("root") }).is_ok());
    assert!(matches!(verdict(signer::Certificate::leaf("root")), Err(ChainError::Refused(_))));
}

#[test]
fn files_of_authorities_are_refused_with_a_reason() {
    let key = pem::encode(&pem::Pem::new("PRIVATE KEY", vec![1]));
    for (roots, reason) in
        [(b"".as_slice(), "no CERTIFICATE"), (b"no pem", "no CERTIFICATE"), (key.as_bytes(), "PRIVATE KEY"), (&pem(&[b"x"]), "no X.509")]
    {
        let error = TrustAnchors::from_pem(roots, b"").unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
}

mod name_constraints {
    use super::*;

    fn below(constraints: Vec<u8>, leaf: &signer::Certificate) -> Result<Timestamp, ChainError> {
        let (root_key, key) = (Key::p256(), Key::p256());
        let root = signer::Certificate::authority("root").self_signed(&root_key);
        let authority = signer::Certificate::authority("one").with(NAME_CONSTRAINTS, true, constraints).issue(&key, "root", &root_key);
        let leaf = read(leaf.issue(&P384, "one", &key));
        TrustAnchors::from_pem(&pem(&[&root]), &pem(&[&authority])).unwrap().verify(&leaf, NOW)
    }

    fn dns(name: &str) -> signer::Certificate {
        signer::Certificate::leaf("").with(ALTERNATIVE_NAME, false, tlv(0x30, &[&tlv(0x82, &[name.as_bytes()])]))
    }

    fn subtree(name: &[u8]) -> Vec<u8> {
        tlv(0x30, &[name])
    }

    fn permitted(name: &[u8]) -> Vec<u8> {
        tlv(0x30, &[&tlv(0xa0, &[&subtree(name)])])
    }

    fn excluded(name: &[u8]) -> Vec<u8> {
        tlv(0x30, &[&tlv(0xa1, &[&subtree(name)])])
    }

    #[test]
    fn host_names_have_to_lie_within() {
        let zone = tlv(0x82, &[b"acme.example"]);
        for name in ["acme.example", "mac.acme.example", "MAC.Acme.Example"] {
            assert!(below(permitted(&zone), &dns(name)).is_ok(), "{name}");
            assert!(below(excluded(&zone), &dns(name)).is_err(), "{name}");
        }
        for name in ["example", "notacme.example", "acme.example.org"] {
            assert!(below(permitted(&zone), &dns(name)).is_err(), "{name}");
            assert!(below(excluded(&zone), &dns(name)).is_ok(), "{name}");
        }
        assert!(below(permitted(&zone), &signer::Certificate::leaf("device")).is_ok(), "a leaf without host names");
    }

    #[test]
    fn subjects_have_to_lie_within() {
        let name = tlv(0xa4, &[&signer::name("device")]);
        assert!(below(permitted(&name), &signer::Certificate::leaf("device")).is_ok());
        assert!(below(permitted(&name), &signer::Certificate::leaf("other")).is_err());
        assert!(below(excluded(&name), &signer::Certificate::leaf("device")).is_err());
        assert!(below(excluded(&name), &signer::Certificate::leaf("other")).is_ok());
    }

    #[test]
    fn names_of_kinds_that_are_not_compared_are_refused_where_they_are_constrained() {
        let mail = tlv(0x81, &[b"acme.example"]);
        let leaf = signer::Certificate::leaf("").with(ALTERNATIVE_NAME, false, tlv(0x30, &[&tlv(0x81, &[b"a@acme.example"])]));
        assert!(below(permitted(&mail), &leaf).is_err());
        assert!(below(permitted(&mail), &dns("acme.example")).is_ok());
    }
}

/// Edge case 20. Whoever may speak for an enrollment by a new certificate is named in it by the authority, as a whole.
#[test]
fn a_certificate_names_its_holder_in_subject_alternative_names_and_permanent_identifiers() {
    let dns = tlv(0x82, &[b"UDID-DNS"]);
    let uri = tlv(0x86, &[b"UDID-URI"]);
    let email = tlv(0x81, &[b"UDID-MAIL"]);
    let identifier = tlv(0x30, &[&tlv(0x0C, &[b"C02SERIAL"])]);
    let permanent = tlv(0xA0, &[&signer::oid("1.3.6.1.5.5.7.8.3"), &tlv(0xA0, &[&identifier])]);
    let other = tlv(0xA0, &[&signer::oid("1.3.6.1.4.1.99999.2"), &tlv(0xA0, &[&tlv(0x0C, &[b"STRANGER"])])]);
    let alternative = tlv(0x30, &[&dns, &uri, &email, &permanent, &other]);
    let leaf = signer::Certificate::leaf("UDID-CN").with(ALTERNATIVE_NAME, false, alternative);
    let certificate = read(leaf.issue(&P384, "root", &P256));
    for name in ["UDID-CN", "udid-cn", "UDID-DNS", "UDID-URI", "UDID-MAIL", "C02SERIAL"] {
        assert!(certificate.names_one_of([name]), "{name} in {:?}", certificate.names());
    }
    for stranger in ["", "UDID", "UDID-CN2", "root", "STRANGER"] {
        assert!(!certificate.names_one_of([stranger]), "{stranger}");
    }
    assert!(!read(signer::Certificate::leaf("").issue(&P384, "root", &P256)).names_one_of([""]), "an empty subject names nobody");
}
