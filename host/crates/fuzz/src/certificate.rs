//! Certificates, in the headers of proxies and in DER, and whether the authority vouches for them.

use std::collections::HashSet;
use std::path::Path;
use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use wasmdm_protocol::certificate::{Certificate, TrustAnchors};
use wasmdm_protocol::time::Timestamp;

use crate::cost::{Bound, bounded};
use crate::{Target, corpus_folder, kind_of};

const BOUND: Bound = Bound { bytes: 1 << 20, bytes_per_byte: 64 };
/// Within the validity of the simulator's certificates.
const NOW: Timestamp = Timestamp::from_millis(1_800_000_000_000);

struct Authority {
    anchors: TrustAnchors,
    /// What it issued.
    issued: HashSet<[u8; 32]>,
}

/// The corpus's. Its files are what the simulator's authority issues at every time, but for their signatures.
static AUTHORITY: LazyLock<Authority> = LazyLock::new(|| {
    let folder = corpus_folder(Target::Certificate);
    let read = |path: &Path| std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let root = format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", STANDARD.encode(read(&folder.join("p256-root.der"))));
    let files = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let issued = files.filter_map(|file| Certificate::from_der(read(&file.ok()?.path())).ok());
    Authority {
        anchors: TrustAnchors::from_pem(root.as_bytes(), b"").unwrap_or_else(|error| panic!("{error}")),
        issued: issued.map(|certificate| certificate.identity).collect(),
    }
});

pub(crate) fn check(input: &[u8]) -> String {
    let der = if input.first() == Some(&0x30) {
        Certificate::from_der(input.to_vec())
    } else {
        bounded(BOUND, input.len(), || Certificate::from_header(input))
    };
    let certificate = match der {
        Err(error) => return kind_of(&error),
        Ok(certificate) => certificate,
    };
    let again = bounded(BOUND, certificate.der.len(), || Certificate::from_der(certificate.der.clone()));
    assert_eq!(again.as_ref(), Ok(&certificate), "read again it is another certificate");
    for name in [&certificate.subject, &certificate.issuer] {
        assert!(!name.chars().any(char::is_control), "a name goes into a log as a line: {name:?}");
    }
    let rfc9440 = format!(":{}:", STANDARD.encode(&certificate.der));
    let pem = format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", STANDARD.encode(&certificate.der));
    let escaped: String = url::form_urlencoded::byte_serialize(pem.as_bytes()).collect();
    for header in [rfc9440, escaped] {
        // Beyond this a header is refused, whatever it holds.
        if header.len() <= 64 << 10 {
            assert_eq!(Certificate::from_header(header.as_bytes()).as_ref(), Ok(&certificate), "as a header it is another certificate");
        }
    }
    match bounded(BOUND, certificate.der.len(), || AUTHORITY.anchors.verify(&certificate, NOW)) {
        Err(error) => kind_of(&error),
        Ok(until) => {
            assert!(until >= NOW && until <= certificate.not_after, "the verdict holds until {until}");
            assert!(AUTHORITY.issued.contains(&certificate.identity), "the authority vouches for what it never issued: {certificate:?}");
            "vouched for".into()
        }
    }
}
