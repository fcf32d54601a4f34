//! Which certificate speaks for an enrollment, and how another one becomes its own.

use std::time::Duration;

use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_protocol::plist::{Dictionary, Value, to_xml};
use wasmdm_service::certificate_binding::BindingRules;
use wasmdm_service::clock::Clock as _;
use wasmdm_service::core::{Options, ReEnroll};
use wasmdm_service::enrollment_policy::Verdict;
use wasmdm_service::reply::{Refusal, Reply};
use wasmdm_simulator::Device;
use wasmdm_simulator::authority::CertificateRequest;
use wasmdm_storage::commands::{CommandOptions, Enqueue};

use crate::stage::{Stage, answer};

/// The device's next certificate, valid a year later than the one it has.
fn renewed(stage: &Stage, number: u64, common_name: &str) -> Device {
    identified(stage, number, &CertificateRequest { not_before: (2025, 1, 1), ..CertificateRequest::device(9000, common_name) })
}

/// That device with another identity.
fn identified(stage: &Stage, number: u64, request: &CertificateRequest) -> Device {
    let mut device = stage.device(number);
    device.replace_identity(stage.authority.issue_as(request).unwrap());
    device
}

async fn polls(stage: &Stage, device: &Device) -> bool {
    match stage.send(device, device.idle().unwrap()).await {
        Ok(_) => true,
        Err(Refusal::BadRequest { .. }) => false,
        Err(other) => panic!("{other}"),
    }
}

async fn audit(stage: &Stage) -> Vec<String> {
    stage.storage.audit(&TenantId::default(), 100).await.unwrap().into_iter().map(|row| row.action).collect()
}

pub(crate) async fn queue(stage: &Stage, device: &Device, uuid: &str, renews_identity: bool) {
    let mut command = Dictionary::new();
    command.insert("RequestType".to_owned(), Value::from("InstallProfile"));
    let mut document = Dictionary::new();
    document.insert("CommandUUID".to_owned(), Value::from(uuid));
    document.insert("Command".to_owned(), Value::Dictionary(command));
    let command = wasmdm_protocol::command::Command::parse(to_xml(&Value::Dictionary(document))).unwrap();
    let enqueue = Enqueue {
        tenant: TenantId::default(),
        targets: vec![EnrollmentId::new(device.id())],
        command,
        options: CommandOptions { renews_identity, ..CommandOptions::default() },
        origin: "api:test".to_owned(),
        now: stage.clock.now(),
    };
    stage.storage.enqueue(enqueue).await.unwrap();
}

async fn fetches(stage: &Stage, device: &Device) -> Option<String> {
    match stage.send(device, device.idle().unwrap()).await.unwrap() {
        Reply::Command { uuid, .. } => Some(uuid),
        _ => None,
    }
}

/// Edge case 20. NanoMDM answers 500 from then on, until the device is enrolled again by hand.
#[tokio::test]
async fn a_device_whose_system_renews_its_identity_goes_on_if_the_certificate_names_it() {
    let stage = Stage::new().await;
    let device = stage.device(1);
    stage.enroll(&device).await;
    queue(&stage, &device, "C1", false).await;
    let id = device.id();
    for stranger in ["", "shared subject", "another-device"] {
        assert!(!polls(&stage, &renewed(&stage, 1, stranger)).await, "{stranger}");
    }
    let older = CertificateRequest { not_before: (2023, 1, 1), ..CertificateRequest::device(9001, id.as_str()) };
    assert!(!polls(&stage, &identified(&stage, 1, &older)).await, "an older one is not a renewal");
    let renewed = renewed(&stage, 1, &id);
    assert_eq!(fetches(&stage, &renewed).await.as_deref(), Some("C1"));
    assert!(!polls(&stage, &device).await, "the old one has ended");
    assert_eq!(audit(&stage).await, ["identity.renewed"]);
}

/// Edge case 20. By the serial number that the device has given, too; but never another enrollment's.
#[tokio::test]
async fn a_certificate_that_names_another_device_speaks_for_that_one_only() {
    let stage = Stage::new().await;
    let (one, two) = (stage.device(1), stage.device(2));
    stage.enroll(&one).await;
    stage.enroll(&two).await;
    let serial = stage.storage.enrollment(&EnrollmentId::new(one.id())).await.unwrap().unwrap().facts["serial_number"].clone();
    let request = CertificateRequest { not_before: (2025, 1, 1), ..CertificateRequest::device(9100, serial.as_str().unwrap()) };
    assert!(!polls(&stage, &identified(&stage, 2, &request)).await);
    assert!(polls(&stage, &identified(&stage, 1, &request)).await);
    assert!(polls(&stage, &two).await);
}

/// Edge case 19. With the default, any certificate of the authority enrolls a known device anew, as in NanoMDM; it is written down.
#[tokio::test]
async fn re_enrolling_with_a_new_certificate_is_allowed_and_written_down() {
    let stage = Stage::new().await;
    let device = stage.device(1);
    stage.enroll(&device).await;
    let again = renewed(&stage, 1, "whoever");
    assert_eq!(stage.send(&again, again.authenticate().unwrap()).await, Ok(Reply::Empty));
    assert_eq!(audit(&stage).await, ["enrollment.new-certificate"]);
    assert!(!polls(&stage, &device).await, "the old certificate has ended");
}

/// Edge case 19. Any holder of a certificate of the same authority could take over a device.
#[tokio::test]
async fn where_only_the_same_identity_may_re_enroll_a_stranger_is_refused() {
    let stage = Stage::with(Options { re_enroll: ReEnroll::SameIdentity, ..Options::default() }, BindingRules::default()).await;
    let device = stage.device(1);
    stage.enroll(&device).await;
    let stranger = renewed(&stage, 1, "whoever");
    for _ in 0..3 {
        assert!(matches!(stage.send(&stranger, stranger.authenticate().unwrap()).await, Err(Refusal::BadRequest { .. })));
    }
    assert_eq!(audit(&stage).await, ["enrollment.new-certificate-refused"], "written down once a minute");
    assert_eq!(stage.policy.asked.lock().len(), 1, "no plugin is asked about it");
    assert!(polls(&stage, &device).await);
    // With its own, or one that names it, it may.
    assert_eq!(stage.send(&device, device.authenticate().unwrap()).await, Ok(Reply::Empty));
    let renewed = renewed(&stage, 1, &device.id());
    assert_eq!(stage.send(&renewed, renewed.authenticate().unwrap()).await, Ok(Reply::Empty));
}

/// Edge case 19.
#[tokio::test]
async fn where_a_policy_decides_about_re_enrolling_silence_is_no() {
    let stage = Stage::with(Options { re_enroll: ReEnroll::Policy, ..Options::default() }, BindingRules::default()).await;
    let device = stage.device(1);
    stage.enroll(&device).await;
    let again = renewed(&stage, 1, "whoever");
    assert!(matches!(stage.send(&again, again.authenticate().unwrap()).await, Err(Refusal::BadRequest { .. })));
    let mut monitored = answer(Verdict::Allow { tags: Vec::new() });
    monitored.decisions = serde_json::json!([{ "plugin": "p", "verdict": "allow", "mode": "monitor" }, { "plugin": "q", "verdict": "abstain" }]);
    stage.policy.answers.lock().push(monitored);
    assert!(matches!(stage.send(&again, again.authenticate().unwrap()).await, Err(Refusal::BadRequest { .. })));
    assert!(polls(&stage, &device).await);
    let mut allowed = answer(Verdict::Allow { tags: Vec::new() });
    allowed.decisions = serde_json::json!([{ "plugin": "p", "verdict": "allow" }]);
    stage.policy.answers.lock().push(allowed);
    assert_eq!(stage.send(&again, again.authenticate().unwrap()).await, Ok(Reply::Empty));
}

/// Edge case 19. The profile that the server itself has sent is no re-enrollment; nor is a policy needed for it.
#[tokio::test]
async fn a_renewal_that_a_command_asked_for_keeps_the_queue() {
    let stage = Stage::with(Options { re_enroll: ReEnroll::Policy, ..Options::default() }, BindingRules::default()).await;
    let (device, other) = (stage.device(1), stage.device(2));
    stage.enroll(&device).await;
    stage.enroll(&other).await;
    queue(&stage, &device, "RENEW", true).await;
    queue(&stage, &device, "C1", false).await;
    assert_eq!(fetches(&stage, &device).await.as_deref(), Some("RENEW"));
    // Not with a certificate that names somebody else.
    let thief = renewed(&stage, 1, &other.id());
    assert!(matches!(stage.send(&thief, thief.authenticate().unwrap()).await, Err(Refusal::BadRequest { .. })));
    let again = renewed(&stage, 1, "a subject that all share");
    for message in again.enrollment_messages().unwrap() {
        assert_eq!(stage.send(&again, message).await, Ok(Reply::Empty));
    }
    assert!(stage.policy.asked.lock().last().unwrap().renewing);
    assert_eq!(fetches(&stage, &again).await.as_deref(), Some("RENEW"), "it was not answered yet");
    assert_eq!(stage.storage.pending_commands(&TenantId::default(), &EnrollmentId::new(device.id())).await.unwrap().len(), 2);
}

/// A thief with a certificate of the same authority that names another device sent the Authenticate of a device whose renewal was awaited, and got
/// its tokens and its queue. Edge case 19.
#[tokio::test]
async fn a_certificate_that_names_another_device_renews_nothing_and_gets_nothing() {
    for named_by in ["id", "id in small letters", "serial number"] {
        let stage = Stage::new().await;
        let (device, other) = (stage.device(1), stage.device(2));
        stage.enroll(&device).await;
        stage.enroll(&other).await;
        let (tenant, id) = (TenantId::default(), EnrollmentId::new(device.id()));
        stage.send(&device, device.set_bootstrap_token(Some(b"escrowed")).unwrap()).await.unwrap();
        queue(&stage, &device, "RENEW", true).await;
        queue(&stage, &device, "C1", false).await;
        assert_eq!(fetches(&stage, &device).await.as_deref(), Some("RENEW"));
        let name = match named_by {
            "id" => other.id(),
            "id in small letters" => other.id().to_lowercase(),
            _ => other.serial_number.clone(),
        };
        let thief = renewed(&stage, 1, &name);
        for message in thief.enrollment_messages().unwrap() {
            assert_eq!(stage.send(&thief, message).await, Ok(Reply::Empty), "the default lets it enroll, as in NanoMDM");
        }
        assert!(!stage.policy.asked.lock().last().unwrap().renewing, "{named_by}");
        assert_eq!(stage.storage.bootstrap_token(&tenant, &id).await.unwrap(), None, "{named_by}");
        assert_eq!(fetches(&stage, &thief).await, None, "{named_by}");
    }
}

/// An enrolled device with a bootstrap token, to which a command that renews its identity went out, and itself with the next one, which has
/// authenticated.
async fn in_renewal(stage: &Stage) -> (Device, Device) {
    let device = stage.device(1);
    stage.enroll(&device).await;
    stage.send(&device, device.set_bootstrap_token(Some(b"escrowed")).unwrap()).await.unwrap();
    queue(stage, &device, "RENEW", true).await;
    queue(stage, &device, "C1", false).await;
    assert_eq!(fetches(stage, &device).await.as_deref(), Some("RENEW"));
    let again = renewed(stage, 1, "a subject that all share");
    assert_eq!(stage.send(&again, again.authenticate().unwrap()).await, Ok(Reply::Empty));
    (device, again)
}

async fn gets_its_token(stage: &Stage, device: &Device) -> bool {
    match stage.send(device, device.get_bootstrap_token().unwrap()).await {
        Ok(Reply::Plist(_)) => true,
        Err(Refusal::BadRequest { .. }) => false,
        other => panic!("{other:?}"),
    }
}

/// The acknowledgement of the profile that was still signed as before was answered 400, and the renewal was offered once more. Edge case 19.
#[tokio::test]
async fn until_a_renewal_is_complete_the_certificate_before_polls_and_reports() {
    let stage = Stage::new().await;
    let (device, again) = in_renewal(&stage).await;
    assert!(polls(&stage, &device).await);
    let reply = stage.send(&device, device.report("Acknowledged", "RENEW").unwrap()).await.unwrap();
    assert!(matches!(reply, Reply::Command { uuid, .. } if uuid == "C1"));
    // Whoever has stolen the old identity gets nothing that the new one is for.
    assert!(!gets_its_token(&stage, &device).await);
    assert!(gets_its_token(&stage, &again).await);
    let certificate = wasmdm_protocol::certificate::Certificate::from_der(device.identity.certificate.clone()).unwrap();
    let fetched = wasmdm_service::auth_proxy::enrollment_of(&stage.storage, &certificate, stage.clock.now()).await;
    assert!(matches!(fetched, Err(Refusal::BadRequest { .. })));
    assert_eq!(stage.send(&again, again.token_update().unwrap()).await, Ok(Reply::Empty));
    assert!(!polls(&stage, &device).await);
    assert!(matches!(stage.send(&device, device.authenticate().unwrap()).await, Err(Refusal::BadRequest { .. })));
    assert!(polls(&stage, &again).await);
}

/// A device whose TokenUpdate never came through, and which fell back to the certificate that it had, was answered 400 for ever. Edge case 19.
#[tokio::test]
async fn a_device_that_falls_back_for_good_is_served_as_before() {
    for says in ["TokenUpdate", "Authenticate", "Error", "nothing, for a day"] {
        let stage = Stage::new().await;
        let (device, again) = in_renewal(&stage).await;
        match says {
            "TokenUpdate" => assert_eq!(stage.send(&device, device.token_update().unwrap()).await, Ok(Reply::Empty)),
            "Authenticate" => stage.enroll(&device).await,
            "Error" => assert!(stage.send(&device, device.error_report("RENEW").unwrap()).await.is_ok()),
            _ => stage.clock.advance(Duration::from_hours(25)),
        }
        assert!(gets_its_token(&stage, &device).await, "{says}");
        assert!(polls(&stage, &device).await, "{says}");
        let record = stage.storage.enrollment(&EnrollmentId::new(device.id())).await.unwrap().unwrap();
        assert!(!record.re_enrolling, "{says}: it goes on as it was");
        if says == "TokenUpdate" {
            // The day is not over: the same profile may be installed once more.
            for message in again.enrollment_messages().unwrap() {
                assert_eq!(stage.send(&again, message).await, Ok(Reply::Empty));
            }
            assert!(stage.policy.asked.lock().last().unwrap().renewing);
            assert!(polls(&stage, &again).await && !polls(&stage, &device).await);
        }
    }
}

/// Edge case 22. Devices go on with an expired identity; those that the operator lets in get what renews it, and can do nothing else.
#[tokio::test]
async fn an_expired_identity_gets_a_renewal_and_nothing_else() {
    let stage = Stage::new().await;
    let device = identified(&stage, 1, &CertificateRequest { not_after: (2028, 1, 1), ..CertificateRequest::device(9000, "device") });
    stage.enroll(&device).await;
    queue(&stage, &device, "C1", false).await;
    stage.clock.advance(Duration::from_hours(24 * 365 * 2));
    assert_eq!(fetches(&stage, &device).await, None);
    for message in [device.authenticate().unwrap(), device.token_update().unwrap(), device.get_bootstrap_token().unwrap()] {
        assert!(matches!(stage.send(&device, message).await, Err(Refusal::BadRequest { .. })));
    }
    queue(&stage, &device, "RENEW", true).await;
    assert_eq!(fetches(&stage, &device).await.as_deref(), Some("RENEW"));
    let again = renewed(&stage, 1, "device");
    assert_eq!(stage.send(&again, again.authenticate().unwrap()).await, Ok(Reply::Empty));
    assert_eq!(fetches(&stage, &again).await.as_deref(), Some("RENEW"));
}

/// What NanoMDM's dead code `warnOnly` was for: a look at a fleet after a move, before mismatches are refused.
#[tokio::test]
async fn where_bindings_are_only_watched_a_mismatch_is_served() {
    let options = Options { certificates_may_be_shared: true, ..Options::default() };
    let stage = Stage::with(options, BindingRules { only_warn: true, retroactive: false }).await;
    let (one, two) = (stage.device(1), stage.device(2));
    stage.enroll(&one).await;
    let mut clone = stage.device(2);
    clone.replace_identity(one.identity.clone());
    stage.enroll(&clone).await;
    queue(&stage, &two, "C2", false).await;
    assert_eq!(fetches(&stage, &clone).await.as_deref(), Some("C2"), "each gets its own queue");
    assert_eq!(fetches(&stage, &one).await, None);
    assert_eq!(fetches(&stage, &renewed(&stage, 2, "nobody")).await.as_deref(), Some("C2"));
}

/// A device whose row was moved here is known by no certificate.
#[tokio::test]
async fn a_device_without_a_certificate_takes_one_only_where_that_is_wanted() {
    for retroactive in [false, true] {
        let stage =
            Stage::with(Options { certificates_may_be_shared: true, ..Options::default() }, BindingRules { only_warn: false, retroactive }).await;
        let (one, two) = (stage.device(1), stage.device(2));
        stage.enroll(&one).await;
        // A second device that shares the first one's certificate has none of its own.
        let message = wasmdm_storage::enrollments::Authenticate {
            tenant: TenantId::default(),
            enrollment: wasmdm_protocol::enrollment::Enrollment {
                id: EnrollmentId::new(two.id()),
                parent: None,
                kind: wasmdm_protocol::enrollment::EnrollmentKind::Device,
            },
            topic: stage.authority.topic().to_owned(),
            facts: wasmdm_protocol::enrollment::DeviceFacts::default(),
            raw: bytes::Bytes::new(),
            document: Value::Dictionary(Dictionary::new()),
            certificate: wasmdm_protocol::certificate::Certificate::from_der(one.identity.certificate.clone()).unwrap(),
            may_change_certificate: true,
            may_renew: false,
            may_share_certificate: true,
            url_params: std::collections::BTreeMap::new(),
            tags: Vec::new(),
            quarantined_by: None,
            decisions: serde_json::json!([]),
            effects: Vec::new(),
            audit: Vec::new(),
            now: stage.clock.now(),
        };
        stage.storage.authenticate(message).await.unwrap();
        assert_eq!(polls(&stage, &two).await, retroactive);
        assert!(!polls(&stage, &renewed(&stage, 2, "whoever")).await, "one is enough");
        assert!(polls(&stage, &one).await);
    }
}
