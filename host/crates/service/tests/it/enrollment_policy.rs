//! What the core makes of a policy's verdict.

use std::time::Duration;

use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_service::clock::Clock as _;
use wasmdm_service::enrollment_policy::Verdict;
use wasmdm_service::reply::{Refusal, Reply};
use wasmdm_storage::effects::{DecisionEffects, KvQuota, KvWrite, PluginEffects};

use crate::stage::{Stage, answer};

fn effects(reads: Vec<(String, Option<String>)>) -> DecisionEffects {
    let effects = PluginEffects {
        tenant: TenantId::default(),
        plugin: "policy".to_owned(),
        reads,
        writes: vec![KvWrite { key: "asked".to_owned(), value: Some("yes".into()), version: "v1".to_owned(), expires_at: None }],
        quota: KvQuota { bytes: 1024, keys: 10 },
        commands: Vec::new(),
        cancels: Vec::new(),
        tags: Vec::new(),
        releases: Vec::new(),
        timers: Vec::new(),
        pushes: vec![],
    };
    DecisionEffects { effects, required: true }
}

#[tokio::test]
async fn a_denied_device_is_not_stored_but_what_the_policy_wrote_is() {
    let stage = Stage::new().await;
    let device = stage.device(1);
    let mut denied = answer(Verdict::Deny { reason: "not on the list".to_owned() });
    denied.effects.push(effects(Vec::new()));
    stage.policy.answers.lock().push(denied);
    let refused = stage.send(&device, device.authenticate().unwrap()).await;
    assert_eq!(refused, Err(Refusal::Denied { reason: "not on the list".to_owned() }));
    assert!(stage.storage.enrollment(&EnrollmentId::new(device.id())).await.unwrap().is_none());
    let kept = stage.storage.kv_get(&TenantId::default(), "policy", "asked", stage.clock.now()).await.unwrap();
    assert_eq!(kept.unwrap().value, "yes");
}

#[tokio::test]
async fn a_decision_whose_reads_have_changed_is_made_again_and_not_for_ever() {
    let stage = Stage::new().await;
    let device = stage.device(1);
    let stale = || {
        let mut allowed = answer(Verdict::Allow { tags: Vec::new() });
        allowed.effects.push(effects(vec![("list".to_owned(), Some("an older version".to_owned()))]));
        allowed
    };
    stage.policy.answers.lock().push(stale());
    assert_eq!(stage.send(&device, device.authenticate().unwrap()).await, Ok(Reply::Empty));
    assert_eq!(stage.policy.asked.lock().len(), 2);

    stage.policy.answers.lock().extend([stale(), stale(), stale()]);
    let refused = stage.send(&device, device.authenticate().unwrap()).await;
    assert!(matches!(refused, Err(Refusal::Unavailable { .. })), "{refused:?}");
    assert_eq!(stage.policy.asked.lock().len(), 5);
}

/// A policy that keeps count of something until its quota is full: whether that stops enrollments is for its failure policy to say.
#[tokio::test]
async fn effects_over_the_quota_are_left_out_where_the_decision_stands_without_them() {
    let over_quota = |required: bool| {
        let mut effects = effects(Vec::new());
        effects.effects.quota = KvQuota { bytes: 1, keys: 10 };
        effects.required = required;
        effects
    };
    let stage = Stage::new().await;
    let device = stage.device(1);
    let mut allowed = answer(Verdict::Allow { tags: Vec::new() });
    allowed.effects.push(over_quota(true));
    stage.policy.answers.lock().push(allowed);
    let refused = stage.send(&device, device.authenticate().unwrap()).await;
    assert!(matches!(refused, Err(Refusal::Unavailable { .. })), "{refused:?}");
    assert!(stage.storage.enrollment(&EnrollmentId::new(device.id())).await.unwrap().is_none());

    let mut denied = answer(Verdict::Deny { reason: "no".to_owned() });
    denied.effects.push(over_quota(false));
    stage.policy.answers.lock().push(denied);
    let refused = stage.send(&device, device.authenticate().unwrap()).await;
    assert_eq!(refused, Err(Refusal::Denied { reason: "no".to_owned() }));

    let mut allowed = answer(Verdict::Allow { tags: Vec::new() });
    allowed.effects.push(over_quota(false));
    stage.policy.answers.lock().push(allowed);
    assert_eq!(stage.send(&device, device.authenticate().unwrap()).await, Ok(Reply::Empty));
    assert_eq!(stage.storage.kv_get(&TenantId::default(), "policy", "asked", stage.clock.now()).await.unwrap(), None);
}

#[tokio::test]
async fn when_the_policy_cannot_decide_nothing_is_stored() {
    let stage = Stage::new().await;
    let device = stage.device(1);
    stage.policy.answers.lock().push(answer(Verdict::Unavailable { reason: "it trapped".to_owned() }));
    let refused = stage.send(&device, device.authenticate().unwrap()).await;
    let Err(Refusal::Unavailable { retry_after, .. }) = refused else { panic!("{refused:?}") };
    assert!(retry_after > Duration::ZERO);
    assert!(stage.storage.enrollment(&EnrollmentId::new(device.id())).await.unwrap().is_none());
}

#[tokio::test]
async fn a_quarantined_device_is_enrolled_and_gets_only_commands_of_a_person_or_of_that_plugin() {
    use wasmdm_protocol::command::Command;
    use wasmdm_storage::commands::{CommandOptions, Enqueue};
    let stage = Stage::new().await;
    let device = stage.device(1);
    let quarantine = Verdict::Quarantine { by: "policy".to_owned(), tags: vec!["suspect".to_owned()] };
    stage.policy.answers.lock().push(answer(quarantine));
    stage.enroll(&device).await;
    for (uuid, origin) in [("A", "plugin:other"), ("B", "plugin:policy"), ("C", "api:nanomdm")] {
        let document = wasmdm_simulator::message::command_document(uuid, "ProfileList", wasmdm_simulator::message::Dictionary::new()).unwrap();
        let queued = Enqueue {
            tenant: TenantId::default(),
            targets: vec![EnrollmentId::new(device.id())],
            command: Command::parse(document).unwrap(),
            options: CommandOptions::default(),
            origin: origin.to_owned(),
            now: stage.clock.now(),
        };
        stage.storage.enqueue(queued).await.unwrap();
    }
    let mut delivered = Vec::new();
    let mut reply = stage.send(&device, device.idle().unwrap()).await.unwrap();
    while let Reply::Command { uuid, .. } = reply {
        reply = stage.send(&device, device.report("Acknowledged", &uuid).unwrap()).await.unwrap();
        delivered.push(uuid);
    }
    assert_eq!(delivered, ["B", "C"]);
}
