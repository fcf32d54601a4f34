//! What devices see.

use http::StatusCode;
use wasmdm_protocol::enrollment::{EnrollmentId, EnrollmentKind};
use wasmdm_simulator::{Answering, Authority, Behaviour, Connection, Device, DeviceOptions, Proof};

use crate::api::enqueue;
use crate::process::{Home, ServerProcess};

fn with_behaviour(authority: &Authority, number: u64, behaviour: Behaviour) -> Device {
    Device::with_options(authority, number, DeviceOptions { behaviour, ..DeviceOptions::default() }).unwrap()
}

fn connect(server: &ServerProcess) -> Connection {
    Connection::to(&server.url()).unwrap()
}

#[tokio::test]
async fn a_device_of_each_kind_enrolls_and_answers_a_command() {
    let authority = Authority::new(1).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    for (number, kind) in EnrollmentKind::ALL.into_iter().enumerate() {
        let options = DeviceOptions { kind: Some(kind), ..DeviceOptions::default() };
        let mut device = Device::with_options(&authority, number as u64, options).unwrap();
        let mut connection = connect(&server);
        device.enroll(&mut connection).await.unwrap();
        enqueue(&server, &device.id(), &format!("command-{number}"), "DeviceInformation").await;
        let session = device.poll_until_idle(&mut connection).await.unwrap();
        assert_eq!(session.commands.len(), 1, "{kind:?}");
        assert_eq!(session.commands[0].status.as_deref(), Some("Acknowledged"), "{kind:?}");
        assert_eq!(connection.opened(), 1, "{kind:?}: one connection for the whole life");
    }
}

/// Commands that were queued within one second came in any order (MySQL), or in that of the alphabet (files). NanoMDM defect 5. Edge case 40.
#[tokio::test]
async fn commands_arrive_in_the_order_of_enqueueing_and_once() {
    let authority = Authority::new(2).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let mut device = Device::new(&authority, 1).unwrap();
    let mut connection = connect(&server);
    device.enroll(&mut connection).await.unwrap();
    let uuids: Vec<String> = (0..20).map(|n| format!("{:02}-{n}", 20 - n)).collect();
    for uuid in &uuids {
        enqueue(&server, &device.id(), uuid, "ProfileList").await;
    }
    device.poll_until_idle(&mut connection).await.unwrap();
    assert_eq!(device.received, uuids);
    assert!(device.poll_until_idle(&mut connection).await.unwrap().commands.is_empty());
}

/// In its default store a command that was acknowledged after another's `NotNow` came again at every later connection, a wipe too. NanoMDM defect 1.
/// Edge case 36.
#[tokio::test]
async fn a_deferred_command_waits_for_the_next_idle_while_others_go_ahead() {
    let authority = Authority::new(3).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let mut device = with_behaviour(&authority, 1, Behaviour::acknowledging().with("InstallProfile", Answering::NotNow { times: 2 }));
    let mut connection = connect(&server);
    device.enroll(&mut connection).await.unwrap();
    enqueue(&server, &device.id(), "A", "InstallProfile").await;
    enqueue(&server, &device.id(), "B", "ProfileList").await;
    let mut seen = Vec::new();
    for _ in 0..4 {
        let session = device.poll_until_idle(&mut connection).await.unwrap();
        seen.push(session.commands.iter().map(|command| format!("{} {}", command.uuid, command.status.clone().unwrap())).collect::<Vec<_>>());
    }
    let expected: Vec<Vec<String>> = [vec!["A NotNow", "B Acknowledged"], vec!["A NotNow"], vec!["A Acknowledged"], vec![]]
        .map(|session| session.into_iter().map(str::to_owned).collect())
        .into();
    assert_eq!(seen, expected);
}

/// A report that was sent again after a lost answer, or one of a command that nobody queued, emptied the whole queue with a 200. NanoMDM defect 2.
/// Edge case 39.
#[tokio::test]
async fn a_repeated_report_changes_nothing_and_the_queue_goes_on() {
    let authority = Authority::new(4).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let mut device = Device::new(&authority, 1).unwrap();
    let mut connection = connect(&server);
    device.enroll(&mut connection).await.unwrap();
    enqueue(&server, &device.id(), "A", "ProfileList").await;
    device.poll_until_idle(&mut connection).await.unwrap();
    enqueue(&server, &device.id(), "B", "ProfileList").await;
    for (status, uuid) in [("Acknowledged", "A"), ("Error", "A"), ("Acknowledged", "never-sent"), ("NotNow", "A")] {
        let report = device.report(status, uuid).unwrap();
        assert_eq!(device.send(&mut connection, report).await.unwrap().status, StatusCode::OK, "{status} {uuid}");
    }
    let session = device.poll_until_idle(&mut connection).await.unwrap();
    assert_eq!(session.commands.iter().map(|command| command.uuid.as_str()).collect::<Vec<_>>(), ["B"]);
    assert!(device.poll_until_idle(&mut connection).await.unwrap().commands.is_empty());
}

/// The second of two polls made the server forget the queue with its acknowledgement. NanoMDM defect 22. Edge case 10.
#[tokio::test]
async fn two_polls_that_get_the_same_command_and_both_answer_it_leave_the_queue_whole() {
    let authority = Authority::new(12).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let mut device = Device::new(&authority, 1).unwrap();
    let mut connections = [connect(&server), connect(&server)];
    device.enroll(&mut connections[0]).await.unwrap();
    for uuid in ["A", "B", "C"] {
        enqueue(&server, &device.id(), uuid, "ProfileList").await;
    }
    for (message, next) in [
        (device.idle(), Some("A")),
        (device.report("Acknowledged", "A"), Some("B")),
        (device.report("Acknowledged", "B"), Some("C")),
        (device.report("Acknowledged", "C"), None),
    ] {
        let message = message.unwrap();
        for connection in &mut connections {
            let answer = device.insist(connection, message.clone()).await.unwrap();
            let text = String::from_utf8_lossy(&answer);
            match next {
                Some(uuid) => assert!(text.contains(&format!("<string>{uuid}</string>")), "{uuid}: {text}"),
                None => assert_eq!(text, ""),
            }
        }
    }
    enqueue(&server, &device.id(), "D", "ProfileList").await;
    let session = device.poll_until_idle(&mut connections[1]).await.unwrap();
    assert_eq!(session.commands.iter().map(|command| command.uuid.as_str()).collect::<Vec<_>>(), ["D"]);
    home.check(&[]);
}

/// Edge case 7. Edge case 9.
#[tokio::test]
async fn a_session_is_one_connection_and_its_end_is_a_200_without_a_body() {
    let authority = Authority::new(13).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let mut device = Device::new(&authority, 1).unwrap();
    device.enroll(&mut connect(&server)).await.unwrap();
    for uuid in ["A", "B"] {
        enqueue(&server, &device.id(), uuid, "ProfileList").await;
    }
    let mut connection = connect(&server);
    for (message, has_body) in [(device.idle(), true), (device.report("Acknowledged", "A"), true), (device.report("Error", "B"), false)] {
        let answer = device.send(&mut connection, message.unwrap()).await.unwrap();
        assert_eq!((answer.status, !answer.body.is_empty()), (StatusCode::OK, has_body));
        assert_eq!(answer.headers["content-length"], answer.body.len().to_string().as_str());
        assert_eq!(answer.headers.contains_key("content-type"), has_body);
        assert!(!answer.headers.contains_key("connection"));
    }
    assert_eq!(connection.opened(), 1);
}

/// Edge case 32.
#[tokio::test]
async fn a_user_of_a_device_has_a_queue_of_their_own() {
    let authority = Authority::new(14).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let mut device = Device::new(&authority, 1).unwrap();
    let mut connection = connect(&server);
    device.enroll(&mut connection).await.unwrap();
    let mut user = user_of(&authority, &device);
    let update = user.token_update().unwrap();
    user.insist(&mut connection, update).await.unwrap();
    for (id, uuid) in [(device.id(), "device-1"), (user.id(), "user-1"), (device.id(), "device-2"), (user.id(), "user-2")] {
        enqueue(&server, &id, uuid, "ProfileList").await;
    }
    for (channel, expected) in [(&mut user, ["user-1", "user-2"]), (&mut device, ["device-1", "device-2"])] {
        channel.poll_until_idle(&mut connection).await.unwrap();
        assert_eq!(channel.received, expected);
    }
}

fn user_of(authority: &Authority, device: &Device) -> Device {
    let options = DeviceOptions { kind: Some(EnrollmentKind::User), ..DeviceOptions::default() };
    let mut user = Device::with_options(authority, device.number, options).unwrap();
    user.replace_identity(device.identity.clone());
    user
}

/// A Mac polls for each user who logs in, also for those who are not managed, and was told again and again that its request was bad.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_poll_for_a_user_who_never_came_gets_nothing_and_leaves_nothing() {
    let authority = Authority::new(15).unwrap();
    let server = crate::in_process::Server::start(&authority, &[]).await;
    let mut device = Device::new(&authority, 1).unwrap();
    let mut connection = Connection::to(&server.url()).unwrap();
    device.enroll(&mut connection).await.unwrap();
    let mut user = user_of(&authority, &device);
    for (message, expected) in [(user.idle(), StatusCode::OK), (user.report("Acknowledged", "A"), StatusCode::BAD_REQUEST)] {
        let answer = user.send(&mut connection, message.unwrap()).await.unwrap();
        assert!(answer.status == expected && (expected != StatusCode::OK || answer.body.is_empty()), "{}", answer.excerpt());
    }
    assert!(server.running.storage.enrollment(&EnrollmentId::new(user.id())).await.unwrap().is_none());
    assert_eq!(server.running.storage.check().await.unwrap(), []);
    server.stop().await;
}

/// Edge case 37.
#[tokio::test]
async fn a_status_that_nobody_knows_ends_its_command_and_stands_in_the_log() {
    let authority = Authority::new(16).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let mut device = Device::new(&authority, 1).unwrap();
    let mut connection = connect(&server);
    device.enroll(&mut connection).await.unwrap();
    enqueue(&server, &device.id(), "A", "ProfileList").await;
    for message in [device.idle(), device.report("Purple", "A")] {
        device.insist(&mut connection, message.unwrap()).await.unwrap();
    }
    server.logs(&["WARN", &device.id(), "reported the unknown status `Purple`"]).await;
    assert!(device.poll_until_idle(&mut connection).await.unwrap().commands.is_empty());
}

/// Edge case 46.
#[tokio::test]
async fn bootstrap_tokens_are_kept_given_back_and_deleted() {
    let authority = Authority::new(5).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let mut device = Device::new(&authority, 1).unwrap();
    let mut connection = connect(&server);
    device.enroll(&mut connection).await.unwrap();
    let get = device.get_bootstrap_token().unwrap();
    assert!(device.insist(&mut connection, get.clone()).await.unwrap().is_empty());
    device.escrow_bootstrap_token(&mut connection).await.unwrap();
    let kept = device.insist(&mut connection, get.clone()).await.unwrap();
    let value = plist::Value::from_reader_xml(kept.as_ref()).unwrap();
    let token = value.as_dictionary().unwrap().get("BootstrapToken").unwrap().as_data().unwrap();
    assert_eq!(token, device.bootstrap_token());
    let delete = device.set_bootstrap_token(None).unwrap();
    device.insist(&mut connection, delete).await.unwrap();
    assert!(device.insist(&mut connection, get).await.unwrap().is_empty());
}

/// Edge case 4.
#[tokio::test]
async fn a_malformed_report_finishes_its_own_command_and_nobody_elses() {
    let authority = Authority::new(6).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let (mut victim, mut attacker) = (Device::new(&authority, 1).unwrap(), Device::new(&authority, 2).unwrap());
    let (mut victims, mut attackers) = (connect(&server), connect(&server));
    victim.enroll(&mut victims).await.unwrap();
    attacker.enroll(&mut attackers).await.unwrap();
    enqueue(&server, &victim.id(), "erase", "ProfileList").await;
    enqueue(&server, &attacker.id(), "own", "ProfileList").await;
    enqueue(&server, &attacker.id(), "next", "ProfileList").await;

    // With the other's UDID and CommandUUID; with its own UDID and the other's CommandUUID; with a command never sent.
    for (udid, uuid) in [(victim.udid.clone(), "erase"), (attacker.udid.clone(), "erase"), (attacker.udid.clone(), "own")] {
        let forged = attacker.malformed_report(&udid, uuid);
        let answer = attacker.send(&mut attackers, forged).await.unwrap();
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{udid} {uuid}");
    }
    let session = victim.poll_until_idle(&mut victims).await.unwrap();
    assert_eq!(session.commands.len(), 1, "the victim still gets its command");

    // Once it was sent, a malformed report about it errors it, and the queue goes on.
    let idle = attacker.idle().unwrap();
    let first = attacker.insist(&mut attackers, idle).await.unwrap();
    assert!(String::from_utf8_lossy(&first).contains("<string>own</string>"));
    let own = attacker.malformed_report(&attacker.udid.clone(), "own");
    let next = attacker.insist(&mut attackers, own).await.unwrap();
    assert!(String::from_utf8_lossy(&next).contains("<string>next</string>"));
}

/// Edge case 20. Edge case 23.
#[tokio::test]
async fn a_certificate_speaks_for_its_own_enrollment_only() {
    let authority = Authority::new(7).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let (mut one, mut other) = (Device::new(&authority, 1).unwrap(), Device::new(&authority, 2).unwrap());
    let mut connection = connect(&server);
    one.enroll(&mut connection).await.unwrap();
    // Not enrolled at all.
    let stray = other.idle().unwrap();
    assert_eq!(other.send(&mut connection, stray).await.unwrap().status, StatusCode::BAD_REQUEST);
    other.enroll(&mut connection).await.unwrap();
    // Signed by one, about the other, for every kind of message.
    let messages =
        [other.idle(), other.report("Acknowledged", "x"), other.check_out(), other.authenticate(), other.token_update(), other.get_bootstrap_token()];
    for message in messages {
        let message = message.unwrap();
        let name = message.name().to_owned();
        assert_eq!(one.send(&mut connection, message).await.unwrap().status, StatusCode::BAD_REQUEST, "{name}");
    }
    let idle = other.idle().unwrap();
    assert_eq!(other.send(&mut connection, idle).await.unwrap().status, StatusCode::OK);
}

/// In its SQL stores the certificate of an earlier enrollment stayed good. NanoMDM defect 18. Edge case 19.
#[tokio::test]
async fn after_a_re_enrollment_the_old_certificate_is_refused_and_the_queue_is_new() {
    let authority = Authority::new(8).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let mut device = Device::new(&authority, 1).unwrap();
    let mut connection = connect(&server);
    device.enroll(&mut connection).await.unwrap();
    enqueue(&server, &device.id(), "old", "ProfileList").await;
    let before = device.identity.clone();
    let again = Device::new(&authority, 1001).unwrap();
    device.replace_identity(again.identity.clone());
    device.enroll(&mut connection).await.unwrap();
    assert!(device.poll_until_idle(&mut connection).await.unwrap().commands.is_empty());
    device.replace_identity(before);
    let idle = device.idle().unwrap();
    assert_eq!(device.send(&mut connection, idle).await.unwrap().status, StatusCode::BAD_REQUEST);
}

/// Edge case 13.
#[tokio::test]
async fn between_authenticate_and_token_update_and_after_check_out_nothing_is_delivered() {
    let authority = Authority::new(9).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let mut device = Device::new(&authority, 1).unwrap();
    let mut connection = connect(&server);
    let authenticate = device.authenticate().unwrap();
    device.insist(&mut connection, authenticate).await.unwrap();
    enqueue(&server, &device.id(), "early", "ProfileList").await;
    assert!(device.poll_until_idle(&mut connection).await.unwrap().commands.is_empty());
    let update = device.token_update().unwrap();
    device.insist(&mut connection, update).await.unwrap();
    assert_eq!(device.poll_until_idle(&mut connection).await.unwrap().commands.len(), 1);
    device.leave(&mut connection).await.unwrap();
    enqueue(&server, &device.id(), "late", "ProfileList").await;
    assert!(device.poll_until_idle(&mut connection).await.unwrap().commands.is_empty());
}

/// Edge case 1. Edge case 2. Edge case 48. Edge case 49.
#[tokio::test]
async fn what_nobody_serves_yet_is_answered_by_the_table() {
    let authority = Authority::new(10).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let options = DeviceOptions { kind: Some(EnrollmentKind::User), ..DeviceOptions::default() };
    let mut user = Device::with_options(&authority, 1, options.clone()).unwrap();
    let mut connection = connect(&server);
    user.enroll(&mut connection).await.unwrap();
    let expected = [
        (user.user_authenticate(None), StatusCode::GONE),
        (user.get_token("com.apple.maid"), StatusCode::BAD_REQUEST),
        (user.return_to_service(), StatusCode::BAD_REQUEST),
        (user.declarative_management("tokens", None), StatusCode::NOT_FOUND),
        (user.declarative_management("status", Some(b"{}")), StatusCode::OK),
    ];
    for (message, status) in expected {
        let message = message.unwrap();
        let name = message.name().to_owned();
        assert_eq!(user.send(&mut connection, message).await.unwrap().status, status, "{name}");
    }
}

/// With a certificate header anybody who reached the server could be any device. NanoMDM defect 18. Edge case 24.
#[tokio::test]
async fn a_certificate_header_is_believed_only_from_a_trusted_proxy() {
    let authority = Authority::new(11).unwrap();
    let header = http::HeaderName::from_static("client-cert");
    let options = DeviceOptions { proof: Proof::CertificateHeader(header), ..DeviceOptions::default() };
    for (proxy, status) in [("127.0.0.1", StatusCode::OK), ("10.0.0.0/8", StatusCode::BAD_REQUEST)] {
        let home = Home::new(&authority.root_pem()).with(&["--cert-header", "Client-Cert", "--trusted-proxy", proxy]);
        let server = home.start();
        let mut device = Device::with_options(&authority, 1, options.clone()).unwrap();
        let authenticate = device.authenticate().unwrap();
        let mut connection = connect(&server);
        assert_eq!(device.send(&mut connection, authenticate).await.unwrap().status, status, "{proxy}");
    }
}

#[tokio::test]
async fn without_an_authority_devices_are_asked_to_come_again_and_readiness_says_why() {
    let authority = Authority::new(12).unwrap();
    let home = Home::without_authority();
    let server = home.start();
    let mut device = Device::new(&authority, 1).unwrap();
    let mut connection = connect(&server);
    let authenticate = device.authenticate().unwrap();
    let answer = device.send(&mut connection, authenticate).await.unwrap();
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(answer.headers.contains_key(http::header::RETRY_AFTER));
    let ready = crate::api::call_as(&server, http::Method::GET, "/readyz", "", "").await;
    assert_eq!(ready.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(crate::api::text(&ready).contains("--ca"));
}
