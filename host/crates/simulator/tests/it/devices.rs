//! What one device says and does.

use plist::{Dictionary, Value};
use wasmdm_protocol::checkin::{CheckIn, CheckInMessage};
use wasmdm_protocol::enrollment::EnrollmentKind;
use wasmdm_protocol::report::{Report, Status};
use wasmdm_simulator::message::{ReceivedCommand, command_document};
use wasmdm_simulator::{Answering, Authority, Behaviour, Connection, Device, DeviceOptions, Product, Proof, SimulatorError};

use crate::server::Server;

fn device(authority: &Authority, kind: EnrollmentKind) -> Device {
    Device::with_options(authority, 7, DeviceOptions { kind: Some(kind), ..DeviceOptions::default() }).unwrap()
}

fn command(uuid: &str, request_type: &str) -> bytes::Bytes {
    command_document(uuid, request_type, Dictionary::new()).unwrap()
}

#[test]
fn the_server_reads_every_kind_of_enrollment_from_the_messages() {
    let authority = Authority::new(1).unwrap();
    for kind in EnrollmentKind::ALL {
        let device = device(&authority, kind);
        let update = CheckInMessage::parse(device.token_update().unwrap().body).unwrap();
        assert_eq!(update.enrollment.kind, kind);
        assert_eq!(update.enrollment.id.as_str(), device.id());
        assert_eq!(update.enrollment.device().as_str(), device.device_id());
        let CheckIn::TokenUpdate(update) = update.check_in else {
            panic!("not a TokenUpdate");
        };
        assert_eq!(update.topic, authority.topic());
        assert_eq!(update.push_magic, device.push_magic);
        assert_eq!(update.token, device.token);

        let idle = Report::parse(device.idle().unwrap().body).unwrap();
        assert_eq!(idle.status, Status::Idle);
        assert_eq!(idle.enrollment.id.as_str(), device.id());

        let authenticate = CheckInMessage::parse(device.authenticate().unwrap().body).unwrap();
        assert!(matches!(authenticate.check_in, CheckIn::Authenticate(_)));
        assert_eq!(authenticate.enrollment.id.as_str(), device.device_id());
    }
}

#[test]
fn the_server_reads_every_check_in() {
    let authority = Authority::new(1).unwrap();
    let device = device(&authority, EnrollmentKind::Device);
    let token = device.bootstrap_token();
    for (message, expected) in [
        (device.check_out(), "CheckOut"),
        (device.set_bootstrap_token(Some(&token)), "SetBootstrapToken"),
        (device.set_bootstrap_token(None), "SetBootstrapToken"),
        (device.get_bootstrap_token(), "GetBootstrapToken"),
        (device.declarative_management("status", Some(b"{}")), "DeclarativeManagement"),
        (device.declarative_management("tokens", None), "DeclarativeManagement"),
        (device.get_token("com.apple.maid"), "GetToken"),
        (device.return_to_service(), "ReturnToService"),
    ] {
        let message = message.unwrap();
        assert_eq!(message.name(), expected);
        let parsed = CheckInMessage::parse(message.body.clone()).unwrap();
        assert_eq!(parsed.check_in.message_type(), expected);
        let binary = CheckInMessage::parse(message.into_binary().unwrap().body).unwrap();
        assert_eq!(binary.check_in.message_type(), expected);
    }
    let user = self::device(&authority, EnrollmentKind::User);
    let parsed = CheckInMessage::parse(user.user_authenticate(None).unwrap().body).unwrap();
    assert!(matches!(parsed.check_in, CheckIn::UserAuthenticate(_)));
}

#[test]
fn a_malformed_report_names_what_it_is_told_to() {
    let authority = Authority::new(1).unwrap();
    let device = device(&authority, EnrollmentKind::Device);
    let message = device.malformed_report("SOMEBODY-ELSE", "COMMAND-1");
    let malformed = Report::parse(message.body).unwrap_err();
    assert_eq!(malformed.command_uuid.as_deref(), Some("COMMAND-1"));
    assert_eq!(malformed.enrollment.unwrap().id.as_str(), "SOMEBODY-ELSE");
}

#[test]
fn messages_look_as_devices_write_them() {
    let authority = Authority::new(1).unwrap();
    let device = device(&authority, EnrollmentKind::Device);
    let body = String::from_utf8(device.idle().unwrap().body.to_vec()).unwrap();
    let expected = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
         <!DOCTYPE plist PUBLIC \"-//Apple//DTD PLIST 1.0//EN\" \"http://www.apple.com/DTDs/PropertyList-1.0.dtd\">\n\
         <plist version=\"1.0\">\n<dict>\n\t<key>Status</key>\n\t<string>Idle</string>\n\t<key>UDID</key>\n\t\
         <string>{}</string>\n</dict>\n</plist>\n",
        device.udid
    );
    assert_eq!(body, expected);
}

#[test]
fn only_devices_that_can_be_unlocked_have_an_unlock_token() {
    let authority = Authority::new(1).unwrap();
    for (kind, product, has) in [
        (EnrollmentKind::Device, Product::Iphone, true),
        (EnrollmentKind::Device, Product::Mac, false),
        (EnrollmentKind::UserEnrollmentDevice, Product::Iphone, false),
        (EnrollmentKind::SharedIpad, Product::Ipad, false),
    ] {
        let device =
            Device::with_options(&authority, 1, DeviceOptions { kind: Some(kind), product: Some(product), ..DeviceOptions::default() }).unwrap();
        let body = device.token_update().unwrap().body;
        let text = String::from_utf8_lossy(&body);
        assert_eq!(text.contains("UnlockToken"), has, "{kind:?} {product:?}");
    }
}

/// Edge case 11.
#[test]
fn a_user_enrollment_says_neither_udid_nor_serial_number() {
    let authority = Authority::new(1).unwrap();
    let device = device(&authority, EnrollmentKind::UserEnrollment);
    for message in device.enrollment_messages().unwrap() {
        let text = String::from_utf8_lossy(&message.body).into_owned();
        assert!(!text.contains(&device.udid), "{text}");
        assert!(!text.contains(&device.serial_number), "{text}");
    }
}

/// Edge case 1.
#[tokio::test]
async fn enrolling_sends_authenticate_and_token_update_with_a_content_type() {
    let server = Server::start().await;
    let authority = Authority::new(1).unwrap();
    let mut connection = Connection::to(&server.url()).unwrap();
    device(&authority, EnrollmentKind::User).enroll(&mut connection).await.unwrap();
    let seen = server.seen();
    let types: Vec<String> = seen.iter().map(|one| one.text("MessageType").unwrap()).collect();
    assert_eq!(types, ["Authenticate", "TokenUpdate", "TokenUpdate"]);
    assert!(seen[1].text("UserID").is_none() && seen[2].text("UserID").is_some());
    for one in &seen {
        assert_eq!(one.headers["content-type"], "application/x-apple-aspen-mdm-checkin");
        assert!(one.headers.contains_key("mdm-signature"));
    }
    assert_eq!(connection.opened(), 1);
}

#[tokio::test]
async fn a_denied_device_learns_status_and_reason() {
    let server = Server::start().await;
    let authority = Authority::new(1).unwrap();
    let mut device = device(&authority, EnrollmentKind::Device);
    server.deny(&device.serial_number);
    let mut connection = Connection::to(&server.url()).unwrap();
    match device.enroll(&mut connection).await.unwrap_err() {
        SimulatorError::Refused { status, body, what, .. } => {
            assert_eq!((status, &*body, &*what), (403, "not listed", "Authenticate"));
        }
        other => panic!("{other}"),
    }
    assert_eq!(server.seen().len(), 1);
}

/// Edge case 7. Edge case 9.
#[tokio::test]
async fn a_session_answers_every_command_and_ends_with_the_empty_answer() {
    let server = Server::start().await;
    let authority = Authority::new(1).unwrap();
    let mut device = device(&authority, EnrollmentKind::Device);
    device.behaviour = Behaviour::acknowledging().with("EraseDevice", Answering::Error).with("Nonsense", Answering::CommandFormatError);
    let mut queries = Dictionary::new();
    queries.insert("Queries".into(), Value::Array(vec!["SerialNumber".into(), "Unheard".into()]));
    let information = command_document("1", "DeviceInformation", queries).unwrap();
    server.queue(&device.id(), information);
    for (uuid, request_type) in [("2", "EraseDevice"), ("3", "Nonsense"), ("4", "ProfileList")] {
        server.queue(&device.id(), command(uuid, request_type));
    }

    let mut connection = Connection::to(&server.url()).unwrap();
    let session = device.poll_until_idle(&mut connection).await.unwrap();

    let statuses: Vec<&str> = session.commands.iter().map(|command| command.status.as_deref().unwrap()).collect();
    assert_eq!(statuses, ["Acknowledged", "Error", "CommandFormatError", "Acknowledged"]);
    assert_eq!(session.requests, 5);
    let seen = server.seen();
    assert!(seen.iter().all(|one| !one.headers.contains_key("content-type")));
    let responses = seen[1].document();
    let responses = responses.get("QueryResponses").unwrap().as_dictionary().unwrap();
    assert_eq!(responses.len(), 1);
    assert_eq!(responses.get("SerialNumber").unwrap().as_string(), Some(&*device.serial_number));
    assert!(seen[2].document().contains_key("ErrorChain"));
    assert_eq!(connection.opened(), 1);
}

/// Edge case 36.
#[tokio::test]
async fn not_now_twice_takes_three_sessions() {
    let server = Server::start().await;
    let authority = Authority::new(1).unwrap();
    let mut device = device(&authority, EnrollmentKind::Device);
    device.behaviour.not_now_first = 2;
    for uuid in ["1", "2"] {
        server.queue(&device.id(), command(uuid, "SecurityInfo"));
    }
    let mut connection = Connection::to(&server.url()).unwrap();
    let sessions = device.poll_until_done(&mut connection, 10).await.unwrap();
    let told: Vec<Vec<(&str, &str)>> = sessions
        .iter()
        .map(|session| session.commands.iter().map(|command| (&*command.uuid, command.status.as_deref().unwrap())).collect())
        .collect();
    assert_eq!(told, [vec![("1", "NotNow"), ("2", "Acknowledged")], vec![("1", "NotNow")], vec![("1", "Acknowledged")], vec![],]);
    assert!(sessions[1].ended_with_not_now() && !sessions[0].ended_with_not_now());
    assert_eq!(device.received, ["1", "2"]);
    assert_eq!(device.deliveries()["1"], 3);
}

#[tokio::test]
async fn a_silent_device_leaves_the_command_unanswered() {
    let server = Server::start().await;
    let authority = Authority::new(1).unwrap();
    let mut device = device(&authority, EnrollmentKind::Device);
    device.behaviour = Behaviour::acknowledging().with("InstallProfile", Answering::Never);
    server.queue(&device.id(), command("1", "InstallProfile"));
    let mut connection = Connection::to(&server.url()).unwrap();
    let session = device.poll_until_idle(&mut connection).await.unwrap();
    assert_eq!(session.commands[0].status, None);
    assert_eq!(server.seen().len(), 1);
}

#[tokio::test]
async fn device_configured_ends_the_waiting() {
    let server = Server::start().await;
    let authority = Authority::new(1).unwrap();
    let mut device = device(&authority, EnrollmentKind::Device);
    device.awaiting_configuration = Some(true);
    server.queue(&device.id(), command("1", "DeviceConfigured"));
    let mut connection = Connection::to(&server.url()).unwrap();
    device.poll_until_idle(&mut connection).await.unwrap();
    assert_eq!(device.awaiting_configuration, Some(false));
}

#[tokio::test]
async fn a_lost_answer_is_asked_for_again_within_the_patience() {
    let server = Server::start().await;
    let authority = Authority::new(1).unwrap();
    let mut patient = Device::with_options(
        &authority,
        1,
        DeviceOptions { retry: wasmdm_simulator::device::RetryPolicy { patience: std::time::Duration::from_secs(30) }, ..DeviceOptions::default() },
    )
    .unwrap();
    server.drop_next(2);
    let mut connection = Connection::to(&server.url()).unwrap();
    connection.measure();
    patient.poll_until_idle(&mut connection).await.unwrap();
    assert_eq!(patient.transport_errors, 2);
    let tally = connection.measure();
    assert_eq!((tally.transport_errors, tally.requests()), (2, 1));

    let mut hasty = Device::new(&authority, 2).unwrap();
    server.drop_next(1);
    let error = hasty.poll_until_idle(&mut connection).await.unwrap_err();
    assert!(error.is_transport(), "{error}");
}

#[tokio::test]
async fn a_proxy_passes_the_certificate_in_its_header() {
    let server = Server::start().await;
    let authority = Authority::new(1).unwrap();
    let mut device = device(&authority, EnrollmentKind::Device);
    device.proof = Proof::CertificateHeader(http::HeaderName::from_static("client-cert"));
    let mut connection = Connection::to(&server.url()).unwrap();
    device.enroll(&mut connection).await.unwrap();
    let seen = server.seen();
    assert_eq!(seen[0].headers["client-cert"], device.identity.rfc9440().as_str());
    assert!(!seen[0].headers.contains_key("mdm-signature"));
}

#[test]
fn the_same_seed_makes_the_same_device() {
    let facts = |seed| {
        let device = Device::new(&Authority::new(seed).unwrap(), 3).unwrap();
        (device.udid.clone(), device.push_magic.clone(), device.token.clone(), device.topic)
    };
    assert_eq!(facts(5), facts(5));
    assert_ne!(facts(5), facts(6));
}

#[test]
fn installed_profiles_are_listed() {
    let authority = Authority::new(1).unwrap();
    let mut device = device(&authority, EnrollmentKind::Device);
    let profile = "<plist version=\"1.0\"><dict><key>PayloadIdentifier</key><string>example.wifi</string></dict></plist>";
    let mut keys = Dictionary::new();
    keys.insert("Payload".into(), Value::Data(profile.into()));
    let install = command_document("1", "InstallProfile", keys).unwrap();
    device.answer(&ReceivedCommand::parse(&install).unwrap()).unwrap();
    assert_eq!(device.profiles, ["example.wifi"]);
    let list = ReceivedCommand::parse(&command("2", "ProfileList")).unwrap();
    let report = device.acknowledgement(&list).unwrap();
    assert!(String::from_utf8_lossy(&report.body).contains("example.wifi"));
}
