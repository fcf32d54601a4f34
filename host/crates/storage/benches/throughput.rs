//! What the storage does in a second, committing to the disk each time: `cargo bench -p wasmdm-storage`.
//!
//! The database lies in `TMPDIR`; on a file system in memory the figures say nothing of commits.

#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark prints, and ends at the first error")]

use bytes::Bytes;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tokio_util::task::TaskTracker;
use wasmdm_protocol::certificate::Certificate;
use wasmdm_protocol::command::Command;
use wasmdm_protocol::enrollment::{DeviceFacts, Enrollment, EnrollmentId, EnrollmentKind, TenantId};
use wasmdm_protocol::plist::{Dictionary, Value, to_xml};
use wasmdm_protocol::report::Status;
use wasmdm_protocol::time::Timestamp;
use wasmdm_storage::commands::{CommandOptions, Enqueue, Offer, ReportInput};
use wasmdm_storage::enrollments::{Authenticate, TokenUpdate};
use wasmdm_storage::{OpenOptions, Storage};

const NOW: Timestamp = Timestamp::from_millis(1_000_000);
const CALLERS: usize = 32;
const DEVICES: usize = 40;
const COMMANDS: usize = 10;

fn main() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}/bench.db", directory.path().display());
    runtime.block_on(async {
        let storage = Storage::open(OpenOptions { url, now: NOW }).await.unwrap();
        println!("{CALLERS} callers at once, {} devices, SQLite, write-ahead log, synchronous=FULL", CALLERS * DEVICES);
        let key = rcgen::KeyPair::generate().unwrap();
        let signed = rcgen::CertificateParams::new(vec![]).unwrap().self_signed(&key).unwrap();
        let certificate = Certificate::from_der(signed.der().to_vec()).unwrap();

        let of = certificate.clone();
        each("Authenticate", 1, &storage, move |storage, device| {
            let mut certificate = of.clone();
            certificate.sha256.fill(0);
            certificate.sha256.get_mut(..8).unwrap().copy_from_slice(&device.to_le_bytes());
            async move {
                storage.authenticate(authenticate(device, certificate)).await.unwrap();
            }
        })
        .await;
        each("TokenUpdate", 1, &storage, |storage, device| async move {
            storage.token_update(token_update(device)).await.unwrap();
        })
        .await;
        each("enqueue", COMMANDS, &storage, |storage, device| async move {
            for number in 0..COMMANDS {
                storage.enqueue(enqueue(device, number)).await.unwrap();
            }
        })
        .await;
        each("poll, then report with the next command", COMMANDS + 1, &storage, |storage, device| async move {
            let mut next = storage.poll(&TenantId::default(), &id(device), Offer { reoffer_sent: true, only_renewals: false }, NOW).await.unwrap();
            while let Some(command) = next {
                next = storage.report(report(device, &command.uuid), false).await.unwrap().1;
            }
        })
        .await;
        each("idle poll with nothing pending", 1000, &storage, |storage, device| async move {
            for _ in 0..1000 {
                assert!(
                    storage.poll(&TenantId::default(), &id(device), Offer { reoffer_sent: true, only_renewals: false }, NOW).await.unwrap().is_none()
                );
            }
        })
        .await;
        each("certificate binding, cached", 1000, &storage, move |storage, device| {
            let mut sha256 = [0; 32];
            sha256.get_mut(..8).unwrap().copy_from_slice(&device.to_le_bytes());
            async move {
                for _ in 0..1000 {
                    assert!(storage.certificate_binding(&sha256).await.unwrap().is_some());
                }
            }
        })
        .await;
        storage.close().await.unwrap();
    });
}

/// Each caller goes through devices of its own; `operations` is how many each device stands for.
async fn each<F>(what: &str, operations: usize, storage: &Storage, work: impl Fn(Storage, usize) -> F + Clone + Send + 'static)
where
    F: Future<Output = ()> + Send,
{
    let callers = TaskTracker::new();
    let start = Instant::now();
    let handles: Vec<_> = (0..CALLERS)
        .map(|caller| {
            let (storage, work) = (storage.clone(), work.clone());
            callers.spawn(async move {
                let mut worst = Duration::ZERO;
                for device in 0..DEVICES {
                    let start = Instant::now();
                    work(storage.clone(), caller * DEVICES + device).await;
                    worst = worst.max(start.elapsed());
                }
                worst
            })
        })
        .collect();
    let mut worst = Duration::ZERO;
    for handle in handles {
        worst = worst.max(handle.await.unwrap());
    }
    let total = u32::try_from(CALLERS * DEVICES * operations).unwrap();
    let rate = f64::from(total) / start.elapsed().as_secs_f64();
    println!("{what:42} {rate:>12.0}/s   worst device {worst:>9.1?}");
}

fn id(device: usize) -> EnrollmentId {
    EnrollmentId::new(format!("00008030-{device:012X}"))
}

fn document(device: usize, pairs: &[(&str, &str)]) -> Value {
    let mut dictionary = Dictionary::new();
    dictionary.insert("UDID".to_owned(), id(device).as_str().into());
    for &(key, value) in pairs {
        dictionary.insert(key.to_owned(), value.into());
    }
    Value::Dictionary(dictionary)
}

fn enrollment(device: usize) -> Enrollment {
    Enrollment { id: id(device), parent: None, kind: EnrollmentKind::Device }
}

fn authenticate(device: usize, certificate: Certificate) -> Authenticate {
    let document = document(device, &[("MessageType", "Authenticate"), ("SerialNumber", "C02XXXXXXXXX"), ("Topic", "com.apple.mgmt.x")]);
    Authenticate {
        tenant: TenantId::default(),
        enrollment: enrollment(device),
        topic: "com.apple.mgmt.x".to_owned(),
        facts: DeviceFacts { serial_number: Some(format!("C{device}")), ..DeviceFacts::default() },
        raw: to_xml(&document),
        document,
        certificate,
        may_change_certificate: true,
        may_renew: true,
        may_share_certificate: false,
        url_params: BTreeMap::new(),
        tags: Vec::new(),
        quarantined_by: None,
        decisions: serde_json::json!([]),
        effects: Vec::new(),
        audit: Vec::new(),
        now: NOW,
    }
}

fn token_update(device: usize) -> TokenUpdate {
    let document = document(device, &[("MessageType", "TokenUpdate"), ("Topic", "com.apple.mgmt.x")]);
    TokenUpdate {
        tenant: TenantId::default(),
        enrollment: enrollment(device),
        identity: [0; 32],
        facts: DeviceFacts::default(),
        topic: "com.apple.mgmt.x".to_owned(),
        push_magic: "magic".to_owned(),
        token: Bytes::from_static(&[7; 32]),
        unlock_token: None,
        awaiting_configuration: None,
        raw: to_xml(&document),
        document,
        now: NOW,
    }
}

fn enqueue(device: usize, number: usize) -> Enqueue {
    let uuid = format!("{device}-{number}");
    let raw = to_xml(&document(device, &[("CommandUUID", &uuid), ("RequestType", "DeviceInformation")]));
    Enqueue {
        tenant: TenantId::default(),
        targets: vec![id(device)],
        command: Command { uuid, request_type: "DeviceInformation".to_owned(), raw },
        options: CommandOptions::default(),
        origin: "api:bench".to_owned(),
        now: NOW,
    }
}

fn report(device: usize, uuid: &str) -> ReportInput {
    let document = document(device, &[("CommandUUID", uuid), ("Status", "Acknowledged")]);
    ReportInput {
        tenant: TenantId::default(),
        id: id(device),
        status: Some(Status::Acknowledged),
        command_uuid: uuid.to_owned(),
        raw: to_xml(&document),
        document: Some(document),
        now: NOW,
    }
}
