//! How identities end and begin, as devices and operators see it.

use std::time::Duration;

use http::StatusCode;
use wasmdm::config::ServeOptions;
use wasmdm_simulator::authority::CertificateRequest;
use wasmdm_simulator::signer::{Attributes, SignatureForm};
use wasmdm_simulator::{Authority, Connection, Device, Proof};

use crate::api::{enqueue, enqueue_at, enqueue_with};
use crate::in_process::Server;
use crate::process::{Home, run};

/// The certificate after a device's first one, which is of 2024.
fn next(number: u64, common_name: &str) -> CertificateRequest {
    CertificateRequest { not_before: (2025, 1, 1), ..CertificateRequest::device(9000 + number, common_name) }
}

/// Edge case 19. The enrollment profile with a new identity is a command like any other; what the device sends then is no new enrollment.
#[tokio::test]
async fn a_fleets_identities_are_renewed_without_losing_anything() {
    let authority = Authority::new(81).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let mut connection = Connection::to(&server.url()).unwrap();
    let mut device = Device::new(&authority, 1).unwrap();
    device.enroll(&mut connection).await.unwrap();
    device.escrow_bootstrap_token(&mut connection).await.unwrap();
    enqueue_with(&server.url(), &device.id(), "RENEW", "InstallProfile", "nopush=1&renews_identity=1").await;
    enqueue(&server, &device.id(), "WAITS", "ProfileList").await;
    let idle = device.idle().unwrap();
    device.insist(&mut connection, idle.clone()).await.unwrap();
    let (old, new) = (device.identity.clone(), authority.issue_as(&next(1, "a subject that all share")).unwrap());
    device.replace_identity(new.clone());
    let mut enrolling = device.enrollment_messages().unwrap();
    let token_update = enrolling.remove(1);
    device.insist(&mut connection, enrolling.remove(0)).await.unwrap();
    // The report of the profile is still signed as before, and its answer is lost.
    device.replace_identity(old.clone());
    let report = device.report("Acknowledged", "RENEW").unwrap();
    assert!(String::from_utf8_lossy(&device.insist(&mut connection, report).await.unwrap()).contains("WAITS"));
    home.check(&[]);
    device.replace_identity(new.clone());
    device.insist(&mut connection, token_update).await.unwrap();
    device.replace_identity(old);
    assert_eq!(device.send(&mut connection, idle).await.unwrap().status, StatusCode::BAD_REQUEST);
    device.replace_identity(new);
    let session = device.poll_until_idle(&mut connection).await.unwrap();
    let uuids: Vec<&str> = session.commands.iter().map(|command| command.uuid.as_str()).collect();
    assert_eq!(uuids, ["WAITS"]);
    let get = device.get_bootstrap_token().unwrap();
    assert!(!device.insist(&mut connection, get).await.unwrap().is_empty(), "the bootstrap token is still there");
    home.check(&[]);
}

/// Edge case 20. The system of the device has renewed its certificate; NanoMDM answers 500 until somebody enrolls it again.
#[tokio::test]
async fn a_silently_renewed_identity_is_taken_if_it_names_the_device() {
    let authority = Authority::new(82).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let mut connection = Connection::to(&server.url()).unwrap();
    let mut device = Device::new(&authority, 1).unwrap();
    device.enroll(&mut connection).await.unwrap();
    let old = device.identity.clone();
    let idle = device.idle().unwrap();
    device.replace_identity(authority.issue_as(&next(2, "a subject that all share")).unwrap());
    assert_eq!(device.send(&mut connection, idle.clone()).await.unwrap().status, StatusCode::BAD_REQUEST);
    device.replace_identity(authority.issue_as(&next(3, &device.id())).unwrap());
    assert_eq!(device.send(&mut connection, idle.clone()).await.unwrap().status, StatusCode::OK);
    device.replace_identity(old);
    assert_eq!(device.send(&mut connection, idle).await.unwrap().status, StatusCode::BAD_REQUEST);
    home.check(&[]);
}

/// Edge case 22. Devices keep calling with an identity that has expired.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_identity_is_let_in_for_as_long_as_the_operator_says() {
    let authority = Authority::new(83).unwrap();
    for (days, status) in [(None, StatusCode::BAD_REQUEST), (Some(30), StatusCode::OK)] {
        let server = Server::start_with(&authority, &[], ServeOptions { identity_grace: days, ..ServeOptions::default() }).await;
        let mut connection = Connection::to(&server.url()).unwrap();
        let mut device = Device::new(&authority, 1).unwrap();
        // The server's clock stands in January 2027.
        device.replace_identity(authority.issue_as(&CertificateRequest { not_after: (2027, 2, 1), ..next(4, &device.id()) }).unwrap());
        device.enroll(&mut connection).await.unwrap();
        enqueue_at(&server.url(), &device.id(), "C1", "ProfileList").await;
        enqueue_with(&server.url(), &device.id(), "RENEW", "InstallProfile", "nopush=1&renews_identity=1").await;
        server.clock.advance(Duration::from_hours(24 * 30));
        // It says truly when it signs, which is after the certificate's end.
        let attributes = Attributes::Signed { signing_time: Some(*b"270214000000Z") };
        device.proof = Proof::Signature(SignatureForm { attributes, ..SignatureForm::MODERN });
        let idle = device.idle().unwrap();
        let answer = device.send(&mut connection, idle.clone()).await.unwrap();
        assert_eq!(answer.status, status, "{days:?}");
        if status == StatusCode::OK {
            assert!(String::from_utf8_lossy(&answer.body).contains("RENEW"), "nothing but the renewal");
            let update = device.token_update().unwrap();
            assert_eq!(device.send(&mut connection, update).await.unwrap().status, StatusCode::BAD_REQUEST);
            server.clock.advance(Duration::from_hours(24 * 30));
            assert_eq!(device.send(&mut connection, idle).await.unwrap().status, StatusCode::BAD_REQUEST, "the grace is over");
        }
        server.stop().await;
    }
}

#[test]
fn a_grace_of_centuries_is_refused_in_words() {
    let (code, _, error) = run(&["serve", "--identity-grace", "99999"]);
    assert_eq!(code, 1);
    assert!(error.contains("identity-grace"), "{error}");
}
