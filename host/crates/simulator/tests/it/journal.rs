//! What the journal says afterwards.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use plist::Dictionary;
use wasmdm_protocol::enrollment::EnrollmentKind;
use wasmdm_simulator::journal::{EnrollmentState, JournalWriter, Known, read_journal, sha256};
use wasmdm_simulator::message::command_document;
use wasmdm_simulator::{Answer, Authority, Connection, Device, DeviceOptions};

use crate::server::Server;

fn writer(path: &Path) -> JournalWriter {
    JournalWriter::open(path, || 42).unwrap()
}

fn answer(status: u16, body: &Bytes) -> Answer {
    Answer { status: StatusCode::from_u16(status).unwrap(), headers: HeaderMap::new(), body: body.clone() }
}

fn empty(status: u16) -> Answer {
    answer(status, &Bytes::new())
}

#[tokio::test]
async fn a_devices_life_can_be_read_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    let server = Server::start().await;
    let authority = Authority::new(1).unwrap();
    let mut device =
        Device::with_options(&authority, 1, DeviceOptions { journal: Some(Arc::new(writer(&path))), ..DeviceOptions::default() }).unwrap();
    let mut connection = Connection::to(&server.url()).unwrap();
    device.enroll(&mut connection).await.unwrap();
    device.escrow_bootstrap_token(&mut connection).await.unwrap();
    server.queue(&device.id(), command_document("C1", "SecurityInfo", Dictionary::new()).unwrap());
    device.poll_until_idle(&mut connection).await.unwrap();

    let journal = read_journal(&path).unwrap();
    assert_eq!(journal.enrolled().collect::<Vec<_>>(), [device.id()]);
    assert_eq!(journal.bootstrap_tokens[&device.id()], Known::Confirmed(Some(sha256(&device.bootstrap_token()))));
    let results: Vec<_> = journal.confirmed_results().collect();
    assert_eq!(results.len(), 1);
    assert_eq!((results[0].1, &*results[0].2.status), ("C1", "Acknowledged"));
    let report = server.seen().pop().unwrap();
    assert_eq!(results[0].2.sha256, sha256(&report.body));
    assert_eq!(journal.deliveries.len(), 1);
    assert_eq!(journal.unanswered, 0);
    assert!(journal.deliveries_after_confirmed_result().is_empty());

    device.leave(&mut connection).await.unwrap();
    let journal = read_journal(&path).unwrap();
    assert_eq!(journal.checked_out().count(), 1);
    assert_eq!(journal.enrolled().count(), 0);
}

#[test]
fn what_was_not_answered_is_uncertain_and_what_was_refused_did_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    let journal = writer(&path);
    let device = Device::new(&Authority::new(1).unwrap(), 1).unwrap();
    let id = device.id();
    let n = journal.record_request(&id, &device.authenticate().unwrap()).unwrap();
    journal.record_answer(n, &id, &empty(200)).unwrap();
    // Never answered.
    journal.record_request(&id, &device.token_update().unwrap()).unwrap();
    assert_eq!(
        read_journal(&path).unwrap().enrollments[&id],
        Known::Uncertain { before: Some(EnrollmentState::Authenticated), attempted: vec![EnrollmentState::Enrolled] }
    );
    // Sent again, and answered.
    let n = journal.record_request(&id, &device.token_update().unwrap()).unwrap();
    journal.record_answer(n, &id, &empty(200)).unwrap();
    let n = journal.record_request(&id, &device.check_out().unwrap()).unwrap();
    journal.record_answer(n, &id, &empty(503)).unwrap();
    let read = read_journal(&path).unwrap();
    assert_eq!(read.enrollments[&id], Known::Confirmed(EnrollmentState::Enrolled));
    assert_eq!(read.unanswered, 1);
}

#[tokio::test]
async fn messages_on_the_device_channel_are_the_devices_own_and_end_its_users_channels() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    let server = Server::start().await;
    let mut user = Device::with_options(
        &Authority::new(1).unwrap(),
        1,
        DeviceOptions { kind: Some(EnrollmentKind::User), journal: Some(Arc::new(writer(&path))), ..DeviceOptions::default() },
    )
    .unwrap();
    let mut connection = Connection::to(&server.url()).unwrap();
    user.enroll(&mut connection).await.unwrap();
    let enrolled: Vec<String> = read_journal(&path).unwrap().enrolled().map(Into::into).collect();
    assert_eq!(enrolled, [user.device_id().to_owned(), user.id()]);

    let message = user.authenticate().unwrap();
    user.send(&mut connection, message).await.unwrap();
    let journal = read_journal(&path).unwrap();
    assert_eq!(journal.enrolled().count(), 0);
    assert_eq!(journal.checked_out().collect::<Vec<_>>(), [user.id()]);
}

#[test]
fn a_delivery_after_the_confirmed_result_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    let journal = writer(&path);
    let device = Device::new(&Authority::new(1).unwrap(), 1).unwrap();
    let id = device.id();
    let document = command_document("C1", "SecurityInfo", Dictionary::new()).unwrap();
    let queued = journal.record_enqueue(&id, "C1", &document).unwrap();
    journal.record_enqueued(queued, &id, "C1").unwrap();
    journal.record_enqueue(&id, "C2", &document).unwrap();
    for _ in 0..2 {
        let n = journal.record_request(&id, &device.idle().unwrap()).unwrap();
        journal.record_answer(n, &id, &answer(200, &document)).unwrap();
        let report = device.report("Acknowledged", "C1").unwrap();
        let n = journal.record_request(&id, &report).unwrap();
        journal.record_answer(n, &id, &empty(200)).unwrap();
    }
    let read = read_journal(&path).unwrap();
    assert_eq!(read.enqueued[&id], ["C1"]);
    assert!(read.uncertain_enqueues.contains(&(id.clone(), "C2".into())));
    assert_eq!(read.deliveries.len(), 2);
    assert_eq!(read.deliveries_after_confirmed_result().len(), 1);
}

#[test]
fn the_first_confirmed_result_stays() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    let journal = writer(&path);
    let device = Device::new(&Authority::new(1).unwrap(), 1).unwrap();
    let id = device.id();
    for (status, http_status) in [("Error", None), ("Acknowledged", Some(200)), ("Error", Some(200))] {
        let n = journal.record_request(&id, &device.report(status, "C1").unwrap()).unwrap();
        if let Some(http_status) = http_status {
            journal.record_answer(n, &id, &empty(http_status)).unwrap();
        }
    }
    let read = read_journal(&path).unwrap();
    let result = &read.results[&(id, "C1".to_owned())];
    assert_eq!((&*result.status, result.confirmed), ("Acknowledged", true));
}

#[test]
fn a_cut_off_line_is_dropped_and_the_journal_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    let device = Device::new(&Authority::new(1).unwrap(), 1).unwrap();
    let idle = device.idle().unwrap();
    writer(&path).record_request(&device.id(), &idle).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.extend_from_slice(b"{\"n\":2,\"at\":42,\"dev");
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(read_journal(&path).unwrap().entries.len(), 1);

    assert_eq!(writer(&path).record_request(&device.id(), &idle).unwrap(), 2);
    assert_eq!(read_journal(&path).unwrap().entries.len(), 2);
}

#[test]
fn a_damaged_line_in_the_middle_is_an_error_that_names_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    let device = Device::new(&Authority::new(1).unwrap(), 1).unwrap();
    writer(&path).record_request(&device.id(), &device.idle().unwrap()).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.extend_from_slice(b"garbage\n");
    std::fs::write(&path, bytes).unwrap();
    assert!(read_journal(&path).unwrap_err().to_string().contains("line 2"));
}

#[test]
fn the_journal_never_holds_a_bootstrap_token() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    let device = Device::new(&Authority::new(1).unwrap(), 1).unwrap();
    let token = device.bootstrap_token();
    let message = device.set_bootstrap_token(Some(&token)).unwrap();
    writer(&path).record_request(&device.id(), &message).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    let encoded = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, &token);
    assert!(!text.contains(&encoded) && text.contains(&sha256(&token)));
}

#[test]
fn a_renewed_identity_leaves_users_and_the_bootstrap_token() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    let journal = writer(&path);
    let user =
        Device::with_options(&Authority::new(1).unwrap(), 1, DeviceOptions { kind: Some(EnrollmentKind::User), ..DeviceOptions::default() }).unwrap();
    let device = user.device_id().to_owned();
    let confirmed = |speaker: &str, message: wasmdm_simulator::Message| {
        let n = journal.record_request(speaker, &message).unwrap();
        assert!(journal.in_flight().contains(&n));
        journal.record_answer(n, speaker, &empty(200)).unwrap();
        assert!(journal.in_flight().is_empty());
    };
    confirmed(&device, user.authenticate().unwrap());
    confirmed(&device, user.set_bootstrap_token(Some(b"token")).unwrap());
    confirmed(&user.id(), user.token_update().unwrap());
    confirmed(&device, user.authenticate().unwrap().as_renewal());
    let read = read_journal(&path).unwrap();
    assert_eq!(read.enrollments[&user.id()], Known::Confirmed(EnrollmentState::Enrolled));
    assert_eq!(read.bootstrap_tokens[&device], Known::Confirmed(Some(sha256(b"token"))));
    // Any other Authenticate ends both.
    confirmed(&device, user.authenticate().unwrap());
    let read = read_journal(&path).unwrap();
    assert_eq!(read.enrollments[&user.id()], Known::Confirmed(EnrollmentState::CheckedOut));
    assert_eq!(read.bootstrap_tokens[&device], Known::Confirmed(None));
    // What nobody waits for any more is lost.
    let n = journal.record_request(&device, &user.get_bootstrap_token().unwrap()).unwrap();
    let waiting = journal.in_flight();
    journal.record_lost(n);
    assert_eq!((journal.lost_of(&waiting), journal.in_flight().len()), (1, 0));
}
