//! The move of a fleet from NanoMDM, as its `nano2nano` makes it.

use http::{Method, StatusCode};
use wasmdm_protocol::enrollment::EnrollmentKind;
use wasmdm_simulator::{Answer, Authority, Connection, Device, DeviceOptions, Message, Product};

use crate::api::{call, call_as, enqueue, text};
use crate::process::{Home, ServerProcess};

async fn put(server: &ServerProcess, message: Message) -> Answer {
    call(server, Method::PUT, "/migration", message.body).await
}

/// Everything of each device, then the users: one raw property list a call, without a certificate and without a content type. Errors
/// are only logged there.
async fn nano2nano(server: &ServerProcess, devices: &[Device], users: &[Device]) -> Vec<Answer> {
    let mut answers = Vec::new();
    for device in devices {
        let messages = [device.authenticate(), device.token_update(), device.set_bootstrap_token(Some(&device.bootstrap_token()))];
        for message in messages {
            answers.push(put(server, message.unwrap()).await);
        }
    }
    for user in users {
        answers.push(put(server, user.token_update().unwrap()).await);
    }
    answers
}

fn fleet(authority: &Authority) -> (Vec<Device>, Vec<Device>) {
    let device = |number, kind, product| {
        let options = DeviceOptions { kind: Some(kind), product, ..DeviceOptions::default() };
        Device::with_options(authority, number, options).unwrap()
    };
    let devices = vec![
        device(1, EnrollmentKind::Device, None),
        device(2, EnrollmentKind::UserEnrollmentDevice, None),
        device(3, EnrollmentKind::Device, Some(Product::Ipad)),
    ];
    let users = vec![
        device(1, EnrollmentKind::User, None),
        device(2, EnrollmentKind::UserEnrollment, None),
        // A Shared iPad is told from other iPads by its users.
        device(3, EnrollmentKind::SharedIpad, None),
    ];
    (devices, users)
}

#[tokio::test]
async fn a_fleet_of_nanomdm_is_brought_twice_and_the_database_is_sound() {
    let authority = Authority::new(81).unwrap();
    let home = Home::new(&authority.root_pem()).with(&["--migration"]);
    let server = home.start();
    let (mut devices, mut users) = fleet(&authority);
    for (device, user) in devices.iter_mut().zip(&mut users) {
        user.udid.clone_from(&device.udid);
        user.enrollment_id.clone_from(&device.enrollment_id);
    }
    for round in 0..2 {
        for answer in nano2nano(&server, &devices, &users).await {
            assert_eq!((answer.status, answer.body.len()), (StatusCode::OK, 0), "round {round}: {}", answer.excerpt());
            assert!(!answer.headers.contains_key("content-type"));
        }
    }
    home.check(&[]);
    // Commands wait for the devices.
    let ids: Vec<String> = devices.iter().chain(&users).map(Device::id).collect();
    enqueue(&server, &ids.join(","), "after-the-move", "ProfileList").await;
    // No certificate is bound by what an API client says.
    let mut connection = Connection::to(&server.url()).unwrap();
    let idle = devices[0].idle().unwrap();
    assert_eq!(devices[0].send(&mut connection, idle).await.unwrap().status, StatusCode::BAD_REQUEST);
    // A device that enrolls anew is nobody's to overwrite.
    devices[0].enroll(&mut connection).await.unwrap();
    let late = Device::with_options(&authority, 1, DeviceOptions { topic: Some("com.apple.mgmt.other".to_owned()), ..DeviceOptions::default() });
    let late = put(&server, late.unwrap().authenticate().unwrap()).await;
    assert_eq!(late.status, StatusCode::BAD_REQUEST);
    assert!(text(&late).contains("it has come here itself"), "{}", text(&late));
    home.check(&[]);
    assert!(server.log().iter().any(|line| line.contains("was migrated: SetBootstrapToken")));
}

/// The way that docs/operations.md describes, to its end: the devices come with the certificates that they have, fetch what waits for them and
/// are not enrolled anew; then the doors are shut, and a stranger's certificate is taken by none of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migrated_fleet_comes_with_its_old_certificates_and_goes_on() {
    let authority = Authority::new(84).unwrap();
    let home = Home::new(&authority.root_pem()).with(&["--migration", "--retro"]);
    let server = home.start();
    let (mut devices, mut users) = fleet(&authority);
    for (device, user) in devices.iter_mut().zip(&mut users) {
        user.udid.clone_from(&device.udid);
        user.enrollment_id.clone_from(&device.enrollment_id);
    }
    for answer in nano2nano(&server, &devices, &users).await {
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.excerpt());
    }
    let ids: Vec<String> = devices.iter().map(Device::id).collect();
    enqueue(&server, &ids.join(","), "after-the-move", "ProfileList").await;
    let mut connection = Connection::to(&server.url()).unwrap();
    for device in &mut devices {
        let session = device.poll_until_idle(&mut connection).await.unwrap();
        assert_eq!(session.commands.iter().map(|command| command.uuid.as_str()).collect::<Vec<_>>(), ["after-the-move"]);
    }
    // The bootstrap token came with them.
    let asked = devices[0].get_bootstrap_token().unwrap();
    let answer = devices[0].send(&mut connection, asked).await.unwrap();
    let answer: plist::Dictionary = plist::from_bytes(&answer.body).unwrap();
    assert_eq!(answer["BootstrapToken"].as_data(), Some(devices[0].bootstrap_token().as_slice()));
    server.stop();

    let home = home.without(&["--migration", "--retro"]);
    let server = home.start();
    let mut connection = Connection::to(&server.url()).unwrap();
    for device in &mut devices {
        assert_eq!(device.poll_until_idle(&mut connection).await.unwrap().commands.len(), 0);
    }
    let mut thief = Device::new(&authority, 9).unwrap();
    thief.udid.clone_from(&devices[0].udid);
    let idle = thief.idle().unwrap();
    assert_eq!(thief.send(&mut connection, idle).await.unwrap().status, StatusCode::BAD_REQUEST);
    home.check(&[]);
    assert!(!server.log().iter().any(|line| line.contains("authenticated")), "nobody enrolled");
}

#[tokio::test]
async fn what_cannot_be_brought_is_a_400_with_a_sentence() {
    let authority = Authority::new(82).unwrap();
    let home = Home::new(&authority.root_pem()).with(&["--migration"]);
    let server = home.start();
    let device = Device::new(&authority, 1).unwrap();
    let stranger = Message::raw_check_in("<plist version=\"1.0\"><dict><key>MessageType</key><string>Surprise</string></dict></plist>");
    for (message, sentence) in [
        (device.token_update().unwrap(), "its device is unknown here: send the Authenticate first"),
        (device.check_out().unwrap(), "MessageType: nothing is kept of CheckOut; send Authenticate, TokenUpdate or SetBootstrapToken"),
        (stranger, "MessageType `Surprise` is unknown"),
        (device.idle().unwrap(), "MessageType: is missing"),
        (Message::raw_check_in("secret"), ""),
    ] {
        let answer = put(&server, message).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{sentence}");
        assert!(text(&answer).contains(sentence) && text(&answer).len() > 10, "{}", text(&answer));
    }
    let too_large = call(&server, Method::PUT, "/migration", vec![b' '; 2 << 20]).await;
    assert_eq!(too_large.status, StatusCode::PAYLOAD_TOO_LARGE);
}

#[tokio::test]
async fn the_door_of_the_move_is_shut_unless_it_is_opened_and_asks_for_the_key() {
    let authority = Authority::new(83).unwrap();
    let body = Device::new(&authority, 1).unwrap().authenticate().unwrap().body;
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let shut = call(&server, Method::PUT, "/migration", body.clone()).await;
    assert_eq!((shut.status, text(&shut).as_str()), (StatusCode::NOT_FOUND, "404 page not found\n"));
    drop(server);
    let home = home.with(&["--migration"]);
    let server = home.start();
    let without_key = call_as(&server, Method::PUT, "/migration", body.clone(), "").await;
    assert_eq!(without_key.status, StatusCode::UNAUTHORIZED);
    assert_eq!(without_key.headers["www-authenticate"], "Basic realm=\"nanomdm\"");
    // Any method, as in NanoMDM.
    assert_eq!(call(&server, Method::POST, "/migration", body).await.status, StatusCode::OK);
}
