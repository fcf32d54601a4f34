//! Scene by scene what NanoMDM was seen to answer, and what is answered here. Where the two differ, docs/nanomdm.md has a row, and the
//! comment here says what NanoMDM answers. Its webhook, declarations, auth proxy, split check-in URL, `/migration` and unlocks have scenes in
//! `webhook.rs`, `declarative_management.rs`, `auth_proxy.rs`, `nanomdm.rs`, `migration.rs` and `escrow_key.rs`.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use rcgen::ExtendedKeyUsagePurpose;
use wasmdm_protocol::enrollment::EnrollmentKind;
use wasmdm_simulator::authority::CertificateRequest;
use wasmdm_simulator::message::{CHECK_IN_CONTENT_TYPE, command_document};
use wasmdm_simulator::signer::{self, SignatureForm};
use wasmdm_simulator::{Answer, Authority, Connection, Device, DeviceOptions, Identity, Message, Proof};

use crate::api::{call, json, text};
use crate::nanomdm::push_certificate;
use crate::process::{Home, ServerProcess};

#[track_caller]
fn is_empty(scene: &str, answer: &Answer) {
    assert_eq!((answer.status, answer.body.len()), (StatusCode::OK, 0), "{scene}: {}", answer.excerpt());
    assert!(!answer.headers.contains_key("content-type"), "{scene}");
    assert_eq!(answer.headers["content-length"], "0", "{scene}");
}

#[track_caller]
fn is_text(scene: &str, answer: &Answer, status: u16, body: &str) {
    assert_eq!((answer.status.as_u16(), text(answer).as_str()), (status, body), "{scene}");
    assert_eq!(answer.headers["content-type"], "text/plain; charset=utf-8", "{scene}");
    assert_eq!(answer.headers["x-content-type-options"], "nosniff", "{scene}");
}

#[track_caller]
fn is_bad_request(scene: &str, answer: &Answer) {
    is_text(scene, answer, 400, "Bad Request\n");
}

#[track_caller]
fn is_xml(scene: &str, answer: &Answer, part: &str) {
    assert_eq!(answer.status, StatusCode::OK, "{scene}");
    assert_eq!(answer.headers["content-type"], "text/xml; charset=utf-8", "{scene}");
    assert!(text(answer).starts_with("<?xml version=\"1.0\" encoding=\"UTF-8\"?>") && text(answer).contains(part), "{scene}: {}", text(answer));
}

fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
    pairs.iter().map(|(name, value)| (name.parse::<HeaderName>().unwrap(), HeaderValue::from_str(value).unwrap())).collect()
}

/// One request on a connection of its own.
async fn send(server: &ServerProcess, method: Method, path: &str, headers: HeaderMap, body: Bytes) -> Answer {
    Connection::to(&server.url()).unwrap().request(method, path.parse().unwrap(), headers, body).await.unwrap()
}

async fn check_in(server: &ServerProcess, proof: &[(&str, &str)], message: Message) -> Answer {
    let pairs = [proof, &[("content-type", CHECK_IN_CONTENT_TYPE)]].concat();
    send(server, Method::PUT, "/mdm", headers(&pairs), message.body).await
}

async fn report(server: &ServerProcess, proof: &[(&str, &str)], message: Message) -> Answer {
    send(server, Method::PUT, "/mdm", headers(proof), message.body).await
}

fn signed(identity: &Identity, body: &[u8], form: SignatureForm) -> String {
    signer::sign(identity, body, form).unwrap()
}

#[tokio::test]
async fn scenes_of_identity_by_signature() {
    let authority = Authority::new(101).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let device = Device::new(&authority, 1).unwrap();
    let authenticate = device.authenticate().unwrap();
    let body = authenticate.body.clone();
    let other_authority = Authority::new(102).unwrap().issue(1, "other").unwrap();
    let expired = CertificateRequest { not_after: (2025, 1, 1), ..CertificateRequest::device(50, "expired") };
    let of_a_server = CertificateRequest { usages: vec![ExtendedKeyUsagePurpose::ServerAuth], ..CertificateRequest::device(51, "server") };
    let without_usage = CertificateRequest { usages: Vec::new(), ..CertificateRequest::device(52, "no usage") };
    let issue = |request| authority.issue_as(&request).unwrap();
    for (scene, signature) in [
        ("garbage", "garbage!".to_owned()),
        ("over another body", signed(&device.identity, b"another", SignatureForm::MODERN)),
        ("wrong CA", signed(&other_authority, &body, SignatureForm::MODERN)),
        ("expired certificate", signed(&issue(expired), &body, SignatureForm::MODERN)),
        ("serverAuth only", signed(&issue(of_a_server), &body, SignatureForm::MODERN)),
    ] {
        is_bad_request(scene, &check_in(&server, &[("mdm-signature", &signature)], authenticate.clone()).await);
    }
    is_bad_request("none", &check_in(&server, &[], authenticate.clone()).await);
    let certificate = device.identity.rfc9440();
    is_bad_request("a Client-Cert header is ignored", &check_in(&server, &[("client-cert", &certificate)], authenticate.clone()).await);

    let no_usage = signed(&issue(without_usage), &body, SignatureForm::MODERN);
    is_empty("no extended key usage at all", &check_in(&server, &[("mdm-signature", &no_usage)], authenticate.clone()).await);
    for form in SignatureForm::all() {
        let signature = signed(&device.identity, &body, form);
        is_empty(&format!("{form:?}"), &check_in(&server, &[("mdm-signature", &signature)], authenticate.clone()).await);
    }
}

#[tokio::test]
async fn scenes_of_identity_by_header() {
    let authority = Authority::new(103).unwrap();
    let home = Home::new(&authority.root_pem()).with(&["--cert-header", "Client-Cert", "--trusted-proxy", "127.0.0.1"]);
    let server = home.start();
    let (one, two, three) = (Device::new(&authority, 1).unwrap(), Device::new(&authority, 2).unwrap(), Device::new(&authority, 3).unwrap());
    let [first, second, third] = [&one, &two, &three].map(|device| device.identity.rfc9440());
    let renewed = authority.issue(1001, "renewed").unwrap().rfc9440();
    let escaped: String = form_urlencoded::byte_serialize(one.identity.certificate_pem().as_bytes()).collect();
    let foreign = Device::new(&Authority::new(104).unwrap(), 1).unwrap().identity.rfc9440();
    let authenticate = |device: &Device| device.authenticate().unwrap();
    let update = |device: &Device| device.token_update().unwrap();

    is_bad_request("none", &check_in(&server, &[], authenticate(&one)).await);
    is_empty("RFC 9440", &check_in(&server, &[("client-cert", &first)], authenticate(&one)).await);
    is_empty("escaped PEM", &check_in(&server, &[("client-cert", &escaped)], authenticate(&one)).await);
    is_bad_request("bad RFC 9440", &check_in(&server, &[("client-cert", ":AAAA:")], authenticate(&one)).await);
    is_bad_request("wrong CA", &check_in(&server, &[("client-cert", &foreign)], authenticate(&one)).await);
    // NanoMDM: 500, for this and all others of a wrong association.
    is_bad_request("an enrolled device with another certificate", &report(&server, &[("client-cert", &second)], one.idle().unwrap()).await);
    is_bad_request("an Authenticate with another's certificate", &check_in(&server, &[("client-cert", &first)], authenticate(&two)).await);
    is_empty("Authenticate again, same certificate", &check_in(&server, &[("client-cert", &first)], authenticate(&one)).await);
    is_empty("Authenticate again, new certificate", &check_in(&server, &[("client-cert", &renewed)], authenticate(&one)).await);
    is_bad_request("TokenUpdate with the old certificate", &check_in(&server, &[("client-cert", &first)], update(&one)).await);
    is_empty("TokenUpdate with the new certificate", &check_in(&server, &[("client-cert", &renewed)], update(&one)).await);
    is_bad_request("TokenUpdate without Authenticate", &check_in(&server, &[("client-cert", &third)], update(&three)).await);
}

fn without_identity(message_type: &str) -> Message {
    Message::raw_check_in(format!("<plist version=\"1.0\"><dict><key>MessageType</key><string>{message_type}</string></dict></plist>"))
}

#[tokio::test]
async fn scenes_of_check_ins_and_reports() {
    let authority = Authority::new(105).unwrap();
    let home = Home::new(&authority.root_pem()).with(&["--cert-header", "Client-Cert", "--trusted-proxy", "127.0.0.1"]);
    let server = home.start();
    let of_kind = |number, kind| {
        let options = DeviceOptions { kind: Some(kind), proof: Proof::None, ..DeviceOptions::default() };
        Device::with_options(&authority, number, options).unwrap()
    };
    let device = of_kind(1, EnrollmentKind::Device);
    let mut user = of_kind(1, EnrollmentKind::User);
    let mut student = of_kind(1, EnrollmentKind::SharedIpad);
    user.udid.clone_from(&device.udid);
    student.udid.clone_from(&device.udid);
    let (byod, mut byod_user) = (of_kind(2, EnrollmentKind::UserEnrollmentDevice), of_kind(2, EnrollmentKind::UserEnrollment));
    byod_user.enrollment_id.clone_from(&byod.enrollment_id);
    let (certificate, byod_certificate) = (device.identity.rfc9440(), byod.identity.rfc9440());
    let (proof, byod_proof) = ([("client-cert", certificate.as_str())], [("client-cert", byod_certificate.as_str())]);
    let as_check_in = [proof[0], ("content-type", CHECK_IN_CONTENT_TYPE)];
    let with_charset = [proof[0], ("content-type", "application/x-apple-aspen-mdm-checkin; charset=UTF-8")];

    let authenticate = send(&server, Method::PUT, "/mdm?a=1&b=2&a=3", headers(&as_check_in), device.authenticate().unwrap().body).await;
    is_empty("Authenticate with query parameters", &authenticate);
    is_empty("Idle before TokenUpdate", &report(&server, &proof, device.idle().unwrap()).await);
    is_empty("TokenUpdate", &check_in(&server, &proof, device.token_update().unwrap()).await);
    is_empty("TokenUpdate again", &check_in(&server, &proof, device.token_update().unwrap()).await);
    is_empty("POST instead of PUT", &send(&server, Method::POST, "/mdm", headers(&proof), device.idle().unwrap().body).await);
    // NanoMDM: 400.
    is_text("GET", &send(&server, Method::GET, "/mdm", headers(&proof), Bytes::new()).await, 405, "Method Not Allowed\n");
    let update = device.token_update().unwrap();
    is_empty("a content type with a charset", &send(&server, Method::PUT, "/mdm", headers(&with_charset), update.body.clone()).await);
    is_bad_request("a check-in without a content type", &report(&server, &proof, update.clone()).await);
    is_empty("a binary TokenUpdate", &check_in(&server, &proof, update.into_binary().unwrap()).await);
    for (scene, message) in [
        ("unknown MessageType", Message::check_in("Surprise", wasmdm_simulator::message::Dictionary::new()).unwrap()),
        ("not a plist", Message::raw_check_in("not a plist")),
        ("empty body", Message::raw_check_in("")),
        ("no MessageType", Message::raw_check_in("<plist version=\"1.0\"><dict><key>UDID</key><string>A</string></dict></plist>")),
        // NanoMDM: 500.
        ("no identifiers", without_identity("CheckOut")),
        ("GetToken that nobody serves", device.get_token("com.apple.maid").unwrap()),
        ("GetToken without a TokenServiceType", device.get_token("").unwrap()),
    ] {
        is_bad_request(scene, &check_in(&server, &proof, message).await);
    }

    let get = || device.get_bootstrap_token().unwrap();
    is_empty("GetBootstrapToken, none there", &check_in(&server, &proof, get()).await);
    is_empty("SetBootstrapToken", &check_in(&server, &proof, device.set_bootstrap_token(Some(b"boot")).unwrap()).await);
    is_xml("GetBootstrapToken", &check_in(&server, &proof, get()).await, "<key>BootstrapToken</key>");
    // NanoMDM: 500.
    let mut users_get = get();
    let user_id = format!("<key>UserID</key><string>{}</string></dict>", user.user_id);
    users_get.body = text_of(&users_get).replacen("</dict>", &user_id, 1).into();
    is_empty("Idle of a user who never came", &report(&server, &proof, user.idle().unwrap()).await);
    is_empty("a user channel", &check_in(&server, &proof, user.token_update().unwrap()).await);
    is_xml("GetBootstrapToken of a user channel", &check_in(&server, &proof, users_get).await, "<key>BootstrapToken</key>");
    is_empty("SetBootstrapToken without a token", &check_in(&server, &proof, device.set_bootstrap_token(None).unwrap()).await);
    // NanoMDM's default store: a property list with empty data.
    is_empty("GetBootstrapToken after that", &check_in(&server, &proof, get()).await);
    // NanoMDM without -dm: 500.
    let tokens = check_in(&server, &proof, device.declarative_management("tokens", None).unwrap()).await;
    is_text("DeclarativeManagement that nobody serves", &tokens, 404, "Not Found\n");
    let status = check_in(&server, &proof, device.declarative_management("status", Some(b"{}")).unwrap()).await;
    is_empty("a status report that nobody reads", &status);
    is_text("UserAuthenticate", &check_in(&server, &proof, user.user_authenticate(None).unwrap()).await, 410, "Gone\n");
    is_empty("Idle of a user channel", &report(&server, &proof, user.idle().unwrap()).await);
    is_empty("a Shared iPad's user", &check_in(&server, &proof, student.token_update().unwrap()).await);
    is_empty("Authenticate of a User Enrollment", &check_in(&server, &byod_proof, byod.authenticate().unwrap()).await);
    is_empty("TokenUpdate of a User Enrollment", &check_in(&server, &byod_proof, byod.token_update().unwrap()).await);
    is_empty("its user", &check_in(&server, &byod_proof, byod_user.token_update().unwrap()).await);

    let command = command_document("CMD-1", "ProfileList", wasmdm_simulator::message::Dictionary::new()).unwrap();
    let ids = [&device, &user, &student, &byod].map(Device::id).join(",");
    let queued = call(&server, Method::PUT, &format!("/v1/enqueue/{ids}?nopush=1"), command.clone()).await;
    assert_eq!(text(&queued), "{\n\t\"no_push\": true,\n\t\"command_uuid\": \"CMD-1\",\n\t\"request_type\": \"ProfileList\"\n}\n");
    let delivered = report(&server, &proof, device.idle().unwrap()).await;
    is_xml("Idle, a command", &delivered, "CMD-1");
    assert_eq!(delivered.body, command);
    is_empty("Acknowledged", &report(&server, &proof, device.report("Acknowledged", "CMD-1").unwrap()).await);
    is_xml("Idle of the user", &report(&server, &proof, user.idle().unwrap()).await, "CMD-1");
    is_empty("Error of the user", &report(&server, &proof, user.error_report("CMD-1").unwrap()).await);
    // The user's own channel only; 500 in NanoMDM's SQL stores.
    is_empty("CheckOut of a user channel", &check_in(&server, &proof, user.check_out().unwrap()).await);
    is_empty("the device goes on", &report(&server, &proof, device.idle().unwrap()).await);

    let no_status = Message::raw_report(text_of(&device.idle().unwrap()).replace("<key>Status</key>", "<key>Other</key>"));
    is_bad_request("a report without Status", &report(&server, &proof, no_status).await);
    let no_uuid = Message::raw_report(text_of(&device.idle().unwrap()).replace("<string>Idle</string>", "<string>Acknowledged</string>"));
    // NanoMDM: 500.
    is_bad_request("Acknowledged without a CommandUUID", &report(&server, &proof, no_uuid).await);
    is_empty("an unknown status of an unknown command", &report(&server, &proof, device.report("Purple", "NOPE").unwrap()).await);

    let left = command_document("CMD-2", "ProfileList", wasmdm_simulator::message::Dictionary::new()).unwrap();
    call(&server, Method::PUT, &format!("/v1/enqueue/{}?nopush=1", device.id()), left).await;
    is_empty("CheckOut", &check_in(&server, &proof, device.check_out().unwrap()).await);
    // NanoMDM delivers what is left in the queue.
    is_empty("Idle after CheckOut", &report(&server, &proof, device.idle().unwrap()).await);
    home.check(&[]);
}

fn text_of(message: &Message) -> String {
    String::from_utf8(message.body.to_vec()).unwrap()
}

#[tokio::test]
async fn scenes_of_the_api() {
    let authority = Authority::new(106).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let (mut one, mut two) = (Device::new(&authority, 1).unwrap(), Device::new(&authority, 2).unwrap());
    let mut connection = Connection::to(&server.url()).unwrap();
    one.enroll(&mut connection).await.unwrap();
    two.enroll(&mut connection).await.unwrap();
    let (first, both) = (one.id(), format!("{},{}", one.id(), two.id()));
    let command = |uuid: &str| command_document(uuid, "ProfileList", wasmdm_simulator::message::Dictionary::new()).unwrap();
    let ask = async |method: Method, path: &str, body: Bytes| call(&server, method, path, body).await;

    is_text("unknown path", &ask(Method::GET, "/v1/nope", Bytes::new()).await, 404, "404 page not found\n");
    for (scene, path) in [("push without a certificate", format!("/v1/push/{first}")), ("push to two", format!("/v1/push/{both}"))] {
        let answer = ask(Method::GET, &path, Bytes::new()).await;
        assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR, "{scene}");
        // NanoMDM: one `push_error` at the top, and no word of the ids.
        assert!(json(&answer)["status"][&first]["push_error"].is_string(), "{scene}: {}", text(&answer));
    }
    let unknown = ask(Method::GET, "/v1/push/NOPE", Bytes::new()).await;
    assert_eq!(
        (unknown.status, &unknown.headers["content-type"]),
        (StatusCode::INTERNAL_SERVER_ERROR, &HeaderValue::from_static("application/json"))
    );
    assert!(json(&unknown)["status"]["NOPE"]["push_error"].is_string());

    // In NanoMDM's SQL stores an unknown id or one that stands twice fails all, with 500.
    for (scene, method, path, body, status) in [
        ("enqueue, push fails", Method::PUT, format!("/v1/enqueue/{first}"), command("C-1"), 207),
        ("two, nopush", Method::PUT, format!("/v1/enqueue/{both}?nopush=1"), command("C-2"), 200),
        ("nopush without a value", Method::PUT, format!("/v1/enqueue/{first}?nopush="), command("C-3"), 207),
        ("nopush=0", Method::PUT, format!("/v1/enqueue/{first}?nopush=0"), command("C-4"), 207),
        ("the same command again", Method::PUT, format!("/v1/enqueue/{first}?nopush=1"), command("C-2"), 200),
        ("unknown id", Method::PUT, "/v1/enqueue/NOPE?nopush=1".to_owned(), command("C-5"), 500),
        ("known and unknown id", Method::PUT, format!("/v1/enqueue/{first},NOPE?nopush=1"), command("C-6"), 207),
        ("an id twice", Method::PUT, format!("/v1/enqueue/{first},{first}?nopush=1"), command("C-7"), 200),
        ("no ids", Method::PUT, "/v1/enqueue/?nopush=1".to_owned(), command("C-8"), 400),
        ("empty body", Method::PUT, format!("/v1/enqueue/{first}"), Bytes::new(), 500),
        ("empty body, nopush", Method::PUT, format!("/v1/enqueue/{first}?nopush=1"), Bytes::new(), 400),
        ("not a plist", Method::PUT, format!("/v1/enqueue/{first}?nopush=1"), Bytes::from_static(b"not a plist"), 400),
        ("a newline before", Method::PUT, format!("/v1/enqueue/{first}?nopush=1"), [b"\n", &command("C-9")[..]].concat().into(), 200),
        ("POST", Method::POST, format!("/v1/enqueue/{first}?nopush=1"), command("C-10"), 200),
        ("GET with a body", Method::GET, format!("/v1/enqueue/{first}?nopush=1"), command("C-11"), 200),
        ("DELETE", Method::DELETE, format!("/v1/enqueue/{first}?nopush=1"), command("C-12"), 200),
    ] {
        let answer = ask(method, &path, body).await;
        assert_eq!(answer.status.as_u16(), status, "{scene}: {}", text(&answer));
        assert_eq!(answer.headers["content-type"], "application/json", "{scene}");
        assert!(text(&answer).starts_with("{\n\t\"") && text(&answer).ends_with("\n}\n"), "{scene}: {}", text(&answer));
    }
    let mut binary = Vec::new();
    plist::Value::from_reader(std::io::Cursor::new(command("BIN-1"))).unwrap().to_writer_binary(&mut binary).unwrap();
    let binary = ask(Method::PUT, &format!("/v1/enqueue/{first}?nopush=1"), binary.into()).await;
    assert_eq!(binary.status, StatusCode::OK, "500 in NanoMDM's SQL stores: {}", text(&binary));

    let (certificate, key) = push_certificate(Some(&one.topic), 2040);
    let request = "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n";
    for (scene, body, status) in [
        ("garbage", "garbage".to_owned(), 400),
        ("a certificate only", certificate.clone(), 400),
        ("a request among them", format!("{certificate}{request}{key}"), 400),
        ("good", format!("{certificate}{key}"), 200),
        ("without a newline between", format!("{}{}", certificate.trim_end(), key), 200),
    ] {
        let answer = ask(Method::PUT, "/v1/pushcert", body.into()).await;
        assert_eq!(answer.status.as_u16(), status, "{scene}: {}", text(&answer));
        assert_eq!(answer.headers["content-type"], "application/json", "{scene}");
    }
    is_text("pushcert, POST", &ask(Method::POST, "/v1/pushcert", Bytes::new()).await, 405, "Method Not Allowed\n");
}
