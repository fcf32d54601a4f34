//! Check-ins as devices send them.

use plist::{Dictionary, Value};
use wasmdm_protocol::checkin::{CheckIn, CheckInError, CheckInMessage, bootstrap_token_document};
use wasmdm_protocol::enrollment::EnrollmentKind;
use wasmdm_protocol::plist as ours;

fn message(kind: &str, entries: &[(&str, Value)]) -> Dictionary {
    let mut message = Dictionary::new();
    message.insert("MessageType".into(), kind.into());
    message.insert("UDID".into(), "U1".into());
    for (key, value) in entries {
        message.insert((*key).into(), value.clone());
    }
    message
}

fn read(message: &Dictionary) -> Result<CheckInMessage, CheckInError> {
    CheckInMessage::parse(ours::to_xml(&Value::Dictionary(message.clone())))
}

fn invalid(message: &Dictionary) -> (&'static str, String) {
    match read(message) {
        Err(CheckInError::Invalid { key, problem }) => (key, problem),
        other => panic!("{other:?}"),
    }
}

fn token_update() -> Dictionary {
    message("TokenUpdate", &[("Topic", "com.apple.mgmt.1".into()), ("PushMagic", "magic".into()), ("Token", Value::Data(vec![1; 32]))])
}

#[test]
fn an_authenticate_says_what_the_device_is() {
    let names = ["SerialNumber", "Model", "ModelName", "ProductName", "OSVersion", "BuildVersion"];
    let entries: Vec<(&str, Value)> =
        names.into_iter().map(|name| (name, name.to_lowercase().into())).chain([("Topic", "com.apple.mgmt.1".into())]).collect();
    let raw = ours::to_xml(&Value::Dictionary(message("Authenticate", &entries)));
    let message = CheckInMessage::parse(raw.clone()).unwrap();
    let CheckIn::Authenticate(authenticate) = &message.check_in else { panic!("{message:?}") };
    assert_eq!(authenticate.topic, "com.apple.mgmt.1");
    assert_eq!((message.enrollment.id.as_str(), message.enrollment.kind), ("U1", EnrollmentKind::Device));
    let facts = &message.facts;
    let read = [&facts.serial_number, &facts.model, &facts.model_name, &facts.product_name, &facts.os_version, &facts.build_version];
    assert_eq!(read.map(|fact| fact.clone().unwrap()), names.map(str::to_lowercase));
    assert_eq!(facts.user_short_name, None);
    assert_eq!(message.raw, raw);
}

#[test]
fn facts_that_cannot_be_names_are_left_out() {
    let message = message(
        "Authenticate",
        &[
            ("Topic", "t".into()),
            ("SerialNumber", "a\nb".into()),
            ("Model", 7.into()),
            ("OSVersion", "".into()),
            ("ModelName", "m".repeat(256).into()),
        ],
    );
    assert_eq!(read(&message).unwrap().facts, wasmdm_protocol::enrollment::DeviceFacts::default());
}

/// Edge case 15.
#[test]
fn a_token_update_brings_topic_token_and_magic() {
    let mut message = token_update();
    message.insert("UnlockToken".into(), Value::Data(vec![7]));
    message.insert("AwaitingConfiguration".into(), false.into());
    let CheckIn::TokenUpdate(update) = read(&message).unwrap().check_in else { panic!() };
    assert_eq!((update.topic.as_str(), update.push_magic.as_str(), update.token.as_ref()), ("com.apple.mgmt.1", "magic", &[1; 32][..]));
    assert_eq!((update.unlock_token.as_deref(), update.awaiting_configuration), (Some(&[7][..]), Some(false)));
}

/// Edge cases 16 and 17: absent keeps the old unlock token, and is not the same as not awaiting configuration.
#[test]
fn absent_is_neither_empty_nor_false() {
    let CheckIn::TokenUpdate(update) = read(&token_update()).unwrap().check_in else { panic!() };
    assert_eq!((update.unlock_token, update.awaiting_configuration), (None, None));
    let mut message = token_update();
    message.insert("UnlockToken".into(), Value::Data(Vec::new()));
    let CheckIn::TokenUpdate(update) = read(&message).unwrap().check_in else { panic!() };
    assert_eq!(update.unlock_token, None);
}

#[test]
fn the_key_that_is_missing_or_wrong_is_named() {
    assert_eq!(invalid(&message("Authenticate", &[])), ("Topic", "is missing".into()));
    for (key, wrong) in [
        ("Topic", Value::from("")),
        ("Topic", "t".repeat(256).into()),
        ("Topic", "a\nb".into()),
        ("Topic", 1.into()),
        ("PushMagic", "".into()),
        ("PushMagic", "m".repeat(256).into()),
        ("Token", Value::Data(Vec::new())),
        ("Token", Value::Data(vec![1; 1025])),
        ("Token", "text".into()),
        ("UnlockToken", "text".into()),
        ("AwaitingConfiguration", "true".into()),
        ("UDID", 1.into()),
        ("UDID", "".into()),
        ("UserID", false.into()),
    ] {
        let mut message = token_update();
        message.insert(key.into(), wrong.clone());
        assert_eq!(invalid(&message).0, key, "{wrong:?}");
    }
    for key in ["Topic", "PushMagic", "Token", "UDID"] {
        let mut message = token_update();
        message.remove(key);
        assert_eq!(invalid(&message).0, key);
    }
    assert_eq!(invalid(&message("DeclarativeManagement", &[])).0, "Endpoint");
    assert_eq!(invalid(&message("GetToken", &[])).0, "TokenServiceType");
    assert_eq!(invalid(&message("GetToken", &[("TokenServiceType", "a".into()), ("TokenParameters", "b".into())])).0, "TokenParameters");
    assert_eq!(invalid(&message("SetBootstrapToken", &[("BootstrapToken", "text".into())])).0, "BootstrapToken");
    let mut without_type = token_update();
    without_type.remove("MessageType");
    assert_eq!(invalid(&without_type).0, "MessageType");
}

/// Edge case 2.
#[test]
fn a_check_in_of_an_unknown_kind_is_none() {
    assert!(matches!(read(&message("Coffee", &[])), Err(CheckInError::UnknownMessageType(kind)) if kind == "Coffee"));
    assert!(matches!(read(&message("authenticate", &[])), Err(CheckInError::UnknownMessageType(_))));
    assert!(matches!(CheckInMessage::parse(b"<array/>".as_slice().into()), Err(CheckInError::Plist(_))));
    assert!(matches!(CheckInMessage::parse(b"<dict".as_slice().into()), Err(CheckInError::Plist(_))));
}

#[test]
fn the_other_check_ins_are_read() {
    let kind = |name: &str, entries: &[(&str, Value)]| read(&message(name, entries)).unwrap().check_in;
    assert!(matches!(kind("CheckOut", &[]), CheckIn::CheckOut));
    assert!(matches!(kind("GetBootstrapToken", &[]), CheckIn::GetBootstrapToken));
    assert!(matches!(kind("ReturnToService", &[]), CheckIn::ReturnToService));
    assert!(matches!(kind("UserAuthenticate", &[]), CheckIn::UserAuthenticate(it) if it.digest_response.is_none()));
    assert!(matches!(kind("UserAuthenticate", &[("DigestResponse", "".into())]), CheckIn::UserAuthenticate(it) if it.digest_response.is_none()));
    assert!(
        matches!(kind("UserAuthenticate", &[("DigestResponse", "d".into())]), CheckIn::UserAuthenticate(it) if it.digest_response.as_deref() == Some("d"))
    );
    let token = |data: &[u8]| [("BootstrapToken", Value::Data(data.to_vec())), ("AwaitingConfiguration", true.into())];
    assert!(
        matches!(kind("SetBootstrapToken", &token(b"t")), CheckIn::SetBootstrapToken(it) if it.bootstrap_token.as_deref() == Some(b"t") && it.awaiting_configuration == Some(true))
    );
    // Edge case 47: empty and missing delete.
    assert!(matches!(kind("SetBootstrapToken", &token(b"")), CheckIn::SetBootstrapToken(it) if it.bootstrap_token.is_none()));
    assert!(matches!(kind("SetBootstrapToken", &[]), CheckIn::SetBootstrapToken(it) if it.bootstrap_token.is_none()));
    assert!(matches!(kind("DeclarativeManagement", &[("Endpoint", "status".into()), ("Data", Value::Data(b"{}".to_vec()))]),
        CheckIn::DeclarativeManagement(it) if it.endpoint == "status" && it.data.as_deref() == Some(b"{}")));
    assert!(
        matches!(kind("GetToken", &[("TokenServiceType", "com.apple.maid".into())]), CheckIn::GetToken(it) if it.service_type == "com.apple.maid" && it.parameters.is_none())
    );
}

/// Whoever looked for secrets in the document found none, and took the raw message for one without any.
#[test]
fn a_status_report_says_that_its_document_lacks_what_is_secret() {
    let status =
        |data: &[u8]| read(&message("DeclarativeManagement", &[("Endpoint", "status".into()), ("Data", Value::Data(data.to_vec()))])).unwrap();
    let data = |message: &CheckInMessage| message.document.as_dictionary().unwrap()["Data"].as_data().unwrap().to_vec();
    let secret = status(br#"{"StatusItems":{"mdm":{"push-magic":"hush"}}}"#);
    assert!(secret.is_cleaned);
    assert_eq!(data(&secret), br#"{"StatusItems":{"mdm":{"push-magic":null}}}"#);
    let harmless = status(b"{ }");
    assert!(!harmless.is_cleaned);
    assert_eq!(data(&harmless), b"{ }");
    assert!(status(b"{").is_cleaned, "what cannot be read could hold anything");
}

#[test]
fn every_kind_gives_its_message_type_back() {
    let all = [
        ("Topic", "t".into()),
        ("PushMagic", "m".into()),
        ("Token", Value::Data(vec![1])),
        ("Endpoint", "tokens".into()),
        ("TokenServiceType", "s".into()),
    ];
    for kind in [
        "Authenticate",
        "TokenUpdate",
        "CheckOut",
        "UserAuthenticate",
        "SetBootstrapToken",
        "GetBootstrapToken",
        "DeclarativeManagement",
        "GetToken",
        "ReturnToService",
    ] {
        assert_eq!(read(&message(kind, &all)).unwrap().check_in.message_type(), kind);
    }
}

/// Edge case 3.
#[test]
fn binary_check_ins_are_read() {
    let mut binary = Vec::new();
    Value::Dictionary(token_update()).to_writer_binary(&mut binary).unwrap();
    let message = CheckInMessage::parse(binary.clone().into()).unwrap();
    assert!(matches!(message.check_in, CheckIn::TokenUpdate(_)));
    assert_eq!(message.raw, binary);
}

/// Edge case 47.
#[test]
fn a_bootstrap_token_is_answered_as_nanomdm_does() {
    let answer = ours::parse(&bootstrap_token_document(b"token")).unwrap();
    assert_eq!(answer.as_dictionary().unwrap().get("BootstrapToken"), Some(&Value::Data(b"token".to_vec())));
    assert_eq!(answer.as_dictionary().unwrap().len(), 1);
}

#[test]
fn secrets_do_not_show_in_logs() {
    let mut update = token_update();
    update.insert("PushMagic".into(), "hush".into());
    update.insert("UnlockToken".into(), Value::Data(b"hush".to_vec()));
    let messages = [
        update,
        message("SetBootstrapToken", &[("BootstrapToken", Value::Data(b"hush".to_vec()))]),
        message("UserAuthenticate", &[("DigestResponse", "hush".into())]),
        message(
            "GetToken",
            &[
                ("TokenServiceType", "s".into()),
                ("TokenParameters", Value::Dictionary(message("SecurityToken", &[("SecurityToken", "hush".into())]))),
            ],
        ),
    ];
    for message in &messages {
        let shown = format!("{:?}", read(message).unwrap());
        assert!(!shown.contains("hush") && !shown.contains("104, 117"), "{shown}");
    }
}
