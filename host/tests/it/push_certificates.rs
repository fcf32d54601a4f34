//! Push certificates: what operators upload and import, how they get one, and how they hear that one ends.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{Method, StatusCode};
use rcgen::{BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType, DnValue, IsCa, Issuer, KeyPair};
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_simulator::apns::{IssuedPushCertificate, PushAuthority, PushCertificateRequest};
use wasmdm_simulator::{Authority, Connection, Device};

use crate::api::{call, call_at, json, text};
use crate::in_process::Server;
use crate::process::{API_KEY, Home, ServerProcess, run};
use crate::schemas::{GRANT, MANIFEST, recorded, recorder};

/// The topic of the files in [`uploads`].
const TOPIC: &str = "com.apple.mgmt.External.0f0f0f0f-1111-2222-3333-444444444444";
const OTHER_TOPIC: &str = "com.apple.mgmt.External.other";

/// Files as OpenSSL makes them, under the password "secret".
fn uploads(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("crates/apns/tests/it/uploads").join(name)
}

fn upload(name: &str) -> String {
    std::fs::read_to_string(uploads(name)).unwrap()
}

fn both(issued: &IssuedPushCertificate) -> String {
    format!("{}{}", issued.certificate_pem, issued.private_key_pem)
}

/// A server with a device of that topic, whose certificate is stored.
struct InUse {
    home: Home,
    server: ServerProcess,
    push: PushAuthority,
    topic: String,
}

impl InUse {
    async fn start(seed: u64) -> Self {
        let (authority, push) = (Authority::new(seed).unwrap(), PushAuthority::new().unwrap());
        let home = Home::new(&authority.root_pem());
        std::fs::write(home.directory.path().join("api-key"), format!("{API_KEY}\n")).unwrap();
        let server = home.start();
        let topic = authority.topic().to_owned();
        let stored = call(&server, Method::PUT, "/v1/pushcert", both(&push.issue(&topic).unwrap())).await;
        assert_eq!(stored.status, StatusCode::OK, "{}", text(&stored));
        let mut device = Device::new(&authority, 1).unwrap();
        device.enroll(&mut Connection::to(&server.url()).unwrap()).await.unwrap();
        Self { home, server, push, topic }
    }

    /// What is stored of push certificates and of everything that they could change.
    fn stored(&self) -> BTreeMap<String, String> {
        let mut tables = self.home.fingerprint();
        tables.retain(|table, _| ["push_certificates", "push_topics", "audit", "events"].contains(&table.as_str()));
        assert!(tables.len() >= 3, "{tables:?}");
        tables
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.home.directory.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// `wasmdm push-certificate …` against the server.
    fn command(&self, arguments: &[&str]) -> (i32, String, String) {
        let key = self.home.directory.path().join("api-key");
        run(&[&["push-certificate"], arguments, &["--server", &self.server.url(), "--api-key-file", key.to_str().unwrap()]].concat())
    }
}

/// The uploads that are wrong whatever the form: what is said of each, and the PEM.
fn wrong(in_use: &InUse) -> Vec<(&'static str, &'static str, String)> {
    let InUse { push, topic, .. } = in_use;
    let good = push.issue(topic).unwrap();
    let issue = |request: PushCertificateRequest| both(&push.issue_as(&request).unwrap());
    let other = push.issue(OTHER_TOPIC).unwrap();
    let empty = |tag: &str| format!("-----BEGIN {tag}-----\nAAAA\n-----END {tag}-----\n");
    vec![
        ("another key", "not the certificate's", format!("{}{}", good.certificate_pem, push.issue(topic).unwrap().private_key_pem)),
        ("another kind of key", "not the certificate's", format!("{}{}", good.certificate_pem, upload("rsa-pkcs8.pem"))),
        ("another topic", OTHER_TOPIC, both(&other)),
        ("expired", "expired at 2020-01-01", issue(PushCertificateRequest::expired(topic))),
        ("not yet valid", "valid only from 2043", issue(PushCertificateRequest { not_before: (2043, 1, 1), ..PushCertificateRequest::new(topic) })),
        ("no UID", "user id", issue(PushCertificateRequest { topic: None, ..PushCertificateRequest::new("") })),
        ("a UID of something else", "com.apple.mgmt", issue(PushCertificateRequest::new("com.example.app"))),
        ("nothing", "no PEM block", String::new()),
        ("garbage", "no PEM block", "garbage".to_owned()),
        ("a certificate without its key", "add the key", good.certificate_pem.clone()),
        ("a key without its certificate", "add the certificate", good.private_key_pem.clone()),
        ("two certificates that could be meant", "several", format!("{}{}", both(&good), other.certificate_pem)),
        ("two keys", "there are 2", format!("{}{}", both(&good), other.private_key_pem)),
        ("a damaged certificate", "cannot be read", format!("{}{}", empty("CERTIFICATE"), good.private_key_pem)),
        ("a damaged key", "cannot be read", format!("{}{}", good.certificate_pem, empty("PRIVATE KEY"))),
        ("a request instead of a certificate", "CERTIFICATE REQUEST", format!("{}{}", both(&good), empty("CERTIFICATE REQUEST"))),
    ]
}

fn is_one_sentence(sentence: &str) -> bool {
    !sentence.is_empty() && !sentence.contains('\n') && !sentence.contains("PRIVATE KEY-----") && sentence.len() < 400
}

/// Edge case 31. A wrong certificate that is taken is noticed when no device of a fleet can be woken any more, days later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_upload_is_refused_in_one_sentence_and_changes_nothing() {
    let in_use = InUse::start(141).await;
    let before = in_use.stored();
    let mut cases: Vec<(&str, &str, Vec<u8>)> = wrong(&in_use).into_iter().map(|(case, says, body)| (case, says, body.into_bytes())).collect();
    let encrypted = format!("{}{}", upload("ec.pem"), upload("ec-aes256.pem"));
    cases.push(("an encrypted key", "wasmdm push-certificate import", encrypted.into_bytes()));
    let old_encryption = format!("{}{}", upload("rsa.pem"), upload("rsa-old-des3.pem"));
    cases.push(("a key in OpenSSL's old encryption", "wasmdm push-certificate import", old_encryption.into_bytes()));
    cases.push(("PKCS#12", "wasmdm push-certificate import", std::fs::read(uploads("new.p12")).unwrap()));
    let der = pem::parse(in_use.push.issue(&in_use.topic).unwrap().certificate_pem).unwrap().into_contents();
    cases.push(("a certificate in DER", "wasmdm push-certificate import", der.clone()));
    cases.push(("damaged DER", "wasmdm push-certificate import", der[..der.len() / 2].to_vec()));
    for (case, says, body) in cases {
        let answer = call(&in_use.server, Method::PUT, "/v1/pushcert", body).await;
        let expected = if case == "another topic" { StatusCode::CONFLICT } else { StatusCode::BAD_REQUEST };
        assert_eq!(answer.status, expected, "{case}: {}", text(&answer));
        let sentence = json(&answer)["error"].as_str().unwrap().to_owned();
        assert!(sentence.contains(says) && is_one_sentence(&sentence), "{case}: {sentence}");
    }
    // A good one that is not the one that was meant.
    let good = both(&in_use.push.issue(&in_use.topic).unwrap());
    let answer = call(&in_use.server, Method::PUT, &format!("/v1/pushcert?topic={OTHER_TOPIC}&new_topic=1"), good.clone()).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{}", text(&answer));
    assert_eq!(in_use.stored(), before);

    let answer = call(&in_use.server, Method::PUT, &format!("/v1/pushcert?topic={}", in_use.topic), good).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", text(&answer));
    assert_ne!(in_use.stored(), before);
    in_use.server.stop();
}

/// Edge case 31. A renewal of the wrong certificate in Apple's portal gives one of another topic; a second topic is still possible, when it is meant.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_further_topic_is_added_only_when_that_is_said() {
    let in_use = InUse::start(142).await;
    let other = in_use.push.issue(OTHER_TOPIC).unwrap();
    let refused = call(&in_use.server, Method::PUT, "/v1/pushcert", both(&other)).await;
    assert_eq!(refused.status, StatusCode::CONFLICT);
    let sentence = json(&refused)["error"].as_str().unwrap().to_owned();
    for word in [OTHER_TOPIC, in_use.topic.as_str(), "(1 channels)", "?new_topic=1"] {
        assert!(sentence.contains(word), "{word}: {sentence}");
    }
    let stored = call(&in_use.server, Method::PUT, "/v1/pushcert?new_topic=1", both(&other)).await;
    assert_eq!(stored.status, StatusCode::OK, "{}", text(&stored));
    // It is known from now on, and renewed like the other one.
    let renewed = call(&in_use.server, Method::PUT, "/v1/pushcert", both(&in_use.push.issue(OTHER_TOPIC).unwrap())).await;
    assert_eq!(renewed.status, StatusCode::OK, "{}", text(&renewed));
    let listed = json(&call(&in_use.server, Method::GET, "/api/v1/push-certificates", "").await);
    let listed: Vec<_> = listed["push_certificates"].as_array().unwrap().iter().collect();
    let of = |topic: &str| listed.iter().find(|one| one["topic"] == topic).unwrap();
    assert_eq!((listed.len(), &of(OTHER_TOPIC)["channels"], &of(OTHER_TOPIC)["version"]), (2, &0.into(), &2.into()));
    assert_eq!((&of(&in_use.topic)["channels"], &of(&in_use.topic)["version"]), (&1.into(), &1.into()));
    assert_eq!(of(OTHER_TOPIC)["not_after"], "2044-01-01T00:00:00Z");
    assert!(of(OTHER_TOPIC)["days_left"].as_i64().unwrap() > 300 && of(OTHER_TOPIC)["stored_at"].is_string());
    in_use.server.stop();
}

/// Edge case 31. The command refuses before the server is asked, with the same sentences, and also what only it could open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_import_command_refuses_what_is_wrong_in_one_sentence() {
    let in_use = InUse::start(143).await;
    let before = in_use.stored();
    let secret = in_use.file("password", "secret\n");
    let wrong_secret = in_use.file("wrong-password", "Secret\n");
    let (secret, wrong_secret) = (secret.to_str().unwrap(), wrong_secret.to_str().unwrap());
    let good = in_use.push.issue(&in_use.topic).unwrap();
    let good_file = in_use.file("good.pem", both(&good));
    let mut cases: Vec<(&str, &str, PathBuf, Vec<&str>)> = wrong(&in_use)
        .into_iter()
        .enumerate()
        .map(|(number, (case, says, pem))| (case, says, in_use.file(&format!("wrong-{number}.pem"), pem), vec![]))
        .collect();
    let encrypted = in_use.file("encrypted.pem", format!("{}{}", upload("ec.pem"), upload("ec-aes256.pem")));
    cases.push(("encrypted without password", "give its password", encrypted.clone(), vec![]));
    cases.push(("encrypted with another password", "does not open", encrypted, vec!["--password-file", wrong_secret]));
    let old_encryption = in_use.file("old-encryption.pem", format!("{}{}", upload("rsa.pem"), upload("rsa-old-des3.pem")));
    cases.push(("old encryption without password", "give its password", old_encryption.clone(), vec![]));
    cases.push(("old encryption with another password", "does not open", old_encryption, vec!["--password-file", wrong_secret]));
    cases.push(("PKCS#12 without password", "missing or wrong", uploads("old.p12"), vec![]));
    cases.push(("PKCS#12 with another password", "missing or wrong", uploads("new.p12"), vec!["--password-file", wrong_secret]));
    cases.push(("PKCS#12 without key", "export both", uploads("without-key.p12"), vec!["--password-file", secret]));
    cases.push(("damaged DER", "cannot be read", in_use.file("damaged.der", b"0\x82\x01\x00garbage"), vec![]));
    cases.push(("not the topic that was meant", "is expected", good_file.clone(), vec!["--topic", OTHER_TOPIC]));
    cases.push(("no file", "cannot be read", PathBuf::from("/nowhere/certificate.pem"), vec![]));
    for (case, says, file, more) in &cases {
        let (code, out, error) = in_use.command(&[&["import", file.to_str().unwrap()], more.as_slice()].concat());
        assert_eq!((code, out.as_str()), (1, ""), "{case}: {error}");
        let sentence = error.strip_suffix('\n').unwrap();
        assert!(sentence.starts_with("wasmdm: ") && sentence.contains(says) && is_one_sentence(sentence), "{case}: {sentence}");
    }
    // A server that is not there, and one that does not know us.
    let file = good_file.to_str().unwrap();
    let key = in_use.home.directory.path().join("api-key");
    let import = ["push-certificate", "import", file, "--api-key-file"];
    let (code, _, error) = run(&[import.as_slice(), &[key.to_str().unwrap(), "--server", "http://127.0.0.1:1"]].concat());
    assert!(code == 1 && error.starts_with("wasmdm: server: 127.0.0.1:1 does not answer"), "{error}");
    let (code, _, error) = run(&[import.as_slice(), &[secret, "--server", &in_use.server.url()]].concat());
    assert!(code == 1 && error.contains("does not take this API key"), "{error}");
    assert_eq!(in_use.stored(), before);

    let (code, out, error) = in_use.command(&["import", file]);
    assert_eq!(code, 0, "{error}");
    assert!(out.contains(&good.serial) && out.contains("for 1 channels"), "{out}");
    // The same topic that was refused, when it is meant.
    let other = in_use.file("other.pem", both(&in_use.push.issue(OTHER_TOPIC).unwrap()));
    let (code, out, error) = in_use.command(&["import", other.to_str().unwrap(), "--new-topic", "--topic", OTHER_TOPIC]);
    assert_eq!(code, 0, "{error}");
    assert!(out.contains("no device uses this topic yet"), "{out}");
    in_use.server.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_of_every_usual_form_are_imported() {
    let home = Home::without_authority();
    let folder = home.directory.path().to_owned();
    let server = home.start();
    let write = |name: &str, content: &[u8]| {
        std::fs::write(folder.join(name), content).unwrap();
        folder.join(name)
    };
    let (password, api_key) = (write("password", b"secret"), write("api-key", API_KEY.as_bytes()));
    let der = write("rsa.cer", pem::parse(upload("rsa.pem")).unwrap().contents());
    let whole = write("whole.pem", format!("{}{}", upload("ec-scrypt.pem"), upload("ec.pem")).as_bytes());
    let good: [(PathBuf, Option<&str>); 14] = [
        (uploads("rsa.pem"), Some("rsa-pkcs8.pem")),
        (uploads("rsa.pem"), Some("rsa-pkcs1.pem")),
        (der.clone(), Some("rsa-pkcs8.pem")),
        (uploads("ec.pem"), Some("ec-sec1.pem")),
        (uploads("ec.pem"), Some("ec-pkcs8.pem")),
        (uploads("ec.pem"), Some("ec-aes256.pem")),
        (uploads("ec.pem"), Some("ec-des3.pem")),
        (uploads("rsa.pem"), Some("rsa-old-des3.pem")),
        (uploads("ec.pem"), Some("ec-old-aes128.pem")),
        (whole, None),
        (uploads("new.p12"), None),
        (uploads("old.p12"), None),
        (uploads("oldest.p12"), None),
        (der, Some("oldest.p12")),
    ];
    let storage = wasmdm_storage::Storage::open_read_only(&format!("sqlite://{}", home.data().join("wasmdm.sqlite").display())).await.unwrap();
    for (version, (certificate, key)) in (1..).zip(&good) {
        let key = key.map(uploads);
        let mut arguments = vec!["push-certificate", "import", certificate.to_str().unwrap()];
        arguments.extend(key.iter().flat_map(|key| ["--key", key.to_str().unwrap()]));
        let url = server.url();
        arguments.extend(["--password-file", password.to_str().unwrap(), "--server", &url, "--api-key-file", api_key.to_str().unwrap()]);
        let (code, out, error) = run(&arguments);
        assert_eq!((code, error.as_str()), (0, ""), "{certificate:?} {key:?}");
        assert!(out.contains(TOPIC), "{out}");
        let stored = storage.push_certificate(&TenantId::default(), TOPIC).await.unwrap().unwrap();
        assert_eq!(stored.version, version, "{certificate:?} {key:?}");
        assert!(stored.private_key_pem.starts_with("-----BEGIN") && !stored.private_key_pem.contains("ENCRYPTED"));
        home.secrets.lock().unwrap().extend(stored.private_key_pem.lines().filter(|line| !line.starts_with('-')).map(str::to_owned));
    }
    storage.close().await.unwrap();
    server.stop();
}

/// Apple, as far as it makes a push certificate of that topic from a signing request.
fn apple(request: &str, topic: &str) -> String {
    let mut root = CertificateParams::default();
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let root = root.self_signed(&key).unwrap();
    let issuer = Issuer::from_ca_cert_der(root.der(), key).unwrap();
    let mut request = CertificateSigningRequestParams::from_pem(request).unwrap();
    request.params.distinguished_name = DistinguishedName::new();
    let user_id = DnType::CustomDnType(vec![0, 9, 2342, 19_200_300, 100, 1, 1]);
    request.params.distinguished_name.push(user_id, DnValue::Utf8String(topic.to_owned()));
    request.params.not_after = rcgen::date_time_ymd(2040, 1, 1);
    request.signed_by(&issuer).unwrap().pem()
}

/// All that an operator does, but for Apple's page.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_gets_from_nothing_to_a_certificate_that_the_server_uses() {
    use std::os::unix::fs::PermissionsExt as _;
    let home = Home::without_authority();
    let server = home.start();
    let folder = home.directory.path().join("push");
    let dir = folder.to_str().unwrap();
    let request = |more: &[&str]| run(&[&["push-certificate", "request", "--dir", dir, "--common-name", "Example Ltd"], more].concat());
    let (url, api_key) = (server.url(), home.directory.path().join("key"));
    std::fs::write(&api_key, API_KEY).unwrap();
    let server_options = ["--server", &url, "--api-key-file", api_key.to_str().unwrap()];
    let (code, out, _) = run(&[["push-certificate", "list"].as_slice(), &server_options].concat());
    assert!(code == 0 && out.contains("wasmdm push-certificate request"), "{out}");

    let (code, out, error) = request(&[]);
    assert_eq!(code, 0, "{error}");
    for step in ["Let an MDM vendor sign", "https://identity.apple.com/pushcert", "wasmdm push-certificate import MDM_certificate.pem --key"] {
        assert!(out.contains(step), "{step}: {out}");
    }
    let key = std::fs::read_to_string(folder.join("key.pem")).unwrap();
    assert_eq!(std::fs::metadata(folder.join("key.pem")).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(!out.contains(key.lines().nth(1).unwrap()));
    home.secrets.lock().unwrap().extend(key.lines().filter(|line| !line.starts_with('-')).map(str::to_owned));

    // Again, now as a vendor: with the same key. Any self-signed pair is a chain.
    let password = home.directory.path().join("password");
    std::fs::write(&password, "secret\n").unwrap();
    let vendor = uploads("oldest.p12");
    let (code, out, error) = request(&["--vendor-certificate", vendor.to_str().unwrap(), "--vendor-password-file", password.to_str().unwrap()]);
    assert_eq!(code, 0, "{error}");
    assert!(out.contains("used again") && out.contains("request-for-apple.txt"), "{out}");
    assert_eq!(std::fs::read_to_string(folder.join("key.pem")).unwrap(), key);
    let signed = STANDARD.decode(std::fs::read_to_string(folder.join("request-for-apple.txt")).unwrap()).unwrap();
    let signed: plist::Dictionary = plist::from_bytes(&signed).unwrap();
    assert_eq!(signed.keys().collect::<Vec<_>>(), ["PushCertRequestCSR", "PushCertCertificateChain", "PushCertSignature"]);
    let der = STANDARD.decode(signed["PushCertRequestCSR"].as_string().unwrap()).unwrap();
    let csr = std::fs::read_to_string(folder.join("request.csr")).unwrap();
    assert_eq!(pem::parse(&csr).unwrap().contents(), der);

    // What is wrong is said before anything is written.
    for (more, says) in [
        (vec!["--vendor-certificate", vendor.to_str().unwrap()], "password"),
        (vec!["--vendor-certificate", "/nowhere"], "vendor-certificate: /nowhere"),
        (vec!["--country", "Germany"], "country"),
    ] {
        let (code, _, error) = request(&more);
        assert!(code == 1 && error.contains(says) && error.lines().count() == 1, "{error}");
    }

    let certificate = home.directory.path().join("MDM_certificate.pem");
    std::fs::write(&certificate, apple(&csr, TOPIC)).unwrap();
    let import = ["push-certificate", "import", certificate.to_str().unwrap(), "--key", &format!("{dir}/key.pem")];
    let (code, out, error) = run(&[import.as_slice(), &server_options].concat());
    assert_eq!(code, 0, "{error}");
    assert!(out.contains(TOPIC) && out.contains("2040-01-01"), "{out}");
    let (code, out, _) = run(&[["push-certificate", "list"].as_slice(), &server_options].concat());
    let line = out.lines().nth(1).unwrap();
    assert!(code == 0 && line.starts_with(TOPIC) && line.contains("2040-01-01T00:00:00Z") && line.ends_with(" 0"), "{out}");
    let shown = call(&server, Method::GET, &format!("/v1/pushcert?topic={TOPIC}"), "").await;
    assert_eq!(json(&shown)["not_after"], "2040-01-01T00:00:00Z");

    // Next year somebody renews with another Apple account.
    std::fs::write(&certificate, apple(&csr, OTHER_TOPIC)).unwrap();
    let (code, _, error) = run(&[import.as_slice(), &server_options].concat());
    assert!(code == 1 && error.contains("renew the certificate that is in use") && error.contains("--new-topic"), "{error}");
    server.stop();
}

/// A certificate that ends silently is found out when not one device can be woken.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_a_certificate_is_told_ahead_once_for_each_of_its_days() {
    const TOPIC: &str = "com.apple.mgmt.External.ends-in-march";
    let authority = Authority::new(144).unwrap();
    let recorder = recorder();
    let server = Server::start(&authority, &[("recorder", MANIFEST, &recorder, GRANT)]).await;
    let request = PushCertificateRequest { not_after: (2027, 3, 1), ..PushCertificateRequest::new(TOPIC) };
    let issued = PushAuthority::new().unwrap().issue_as(&request).unwrap();
    assert_eq!(call_at(&server.url(), Method::PUT, "/v1/pushcert", both(&issued)).await.status, StatusCode::OK);
    let told = async || {
        let recorded = recorded(&server).await;
        let mut days: Vec<i64> = recorded
            .iter()
            .filter(|(key, _)| key.starts_with("event/push.certificate-expiring/"))
            .map(|(_, handed)| {
                assert_eq!(handed["data"]["certificate"]["topic"], TOPIC);
                handed["data"]["certificate"]["days_left"].as_i64().unwrap()
            })
            .collect();
        days.sort_unstable_by_key(|days| -days);
        days
    };
    let gauge = async || {
        let metrics = text(&call_at(&server.url(), Method::GET, "/metrics", "").await);
        let line = metrics.lines().find(|line| line.starts_with("wasmdm_push_certificate_expires_seconds{") && line.contains(TOPIC)).unwrap();
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    // The clock begins at 2027-01-15T08:00:00Z.
    let day = 24.0 * 3600.0;
    assert!((gauge().await - 44.0 * day - 16.0 * 3600.0).abs() < 1.0, "{}", gauge().await);
    let mut day_now = 45;
    for (count, days) in (1..).zip([30, 14, 7, 3, 1, 0]) {
        server.clock.advance(Duration::from_hours(24 * (day_now - days)));
        day_now = days;
        for _ in 0..3000 {
            if told().await.len() >= count {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let expected: Vec<i64> = [30, 14, 7, 3, 1, 0].into_iter().take(count).collect();
        assert_eq!(told().await, expected);
        // More looks on the same day.
        server.clock.advance(Duration::from_hours(1));
        server.clock.advance(Duration::from_hours(1));
        server.quiet().await;
        assert_eq!(told().await, expected);
    }
    assert!(gauge().await < 0.0);
    server.stop().await;
}
