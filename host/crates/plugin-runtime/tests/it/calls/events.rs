//! Events delivered to plugins, and what they leave behind.

use std::time::Duration;

use serde_json::json;
use wasmdm_plugin_runtime::effective::{Effective, HttpGrant};
use wasmdm_plugin_runtime::egress::{EgressPolicy, Origin};
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_service::clock::Clock as _;
use wasmdm_service::subscriber::Delivered;
use wasmdm_storage::effects::{Applied, DecisionEffects, PluginEffects, TimerChange};
use wasmdm_storage::enrollments::TokenUpdate;
use wasmdm_storage::push_failures::{PushAttempt, PushFailure};

use super::setup::{Server, candidate};

const ME: &str = "plugin:misbehaving";

fn effects(delivered: Delivered) -> Option<PluginEffects> {
    match delivered {
        Delivered::Done { effects, .. } => effects.map(|effects| *effects),
        other => panic!("{other:?}"),
    }
}

fn written(effects: &PluginEffects, key: &str) -> String {
    let write = effects.writes.iter().find(|write| write.key == key).unwrap();
    String::from_utf8(write.value.as_ref().unwrap().to_vec()).unwrap()
}

async fn delivered(behave: serde_json::Value, interface: &str, adjust: impl FnOnce(&mut Effective)) -> Delivered {
    let server = Server::start().await;
    server.enroll("D").await;
    server.activate([server.named("misbehaving", &behave, adjust)]);
    let event = server.event("enrollment.enrolled", "D").await;
    server.deliver(ME, interface, event).await
}

#[tokio::test]
async fn returned_commands_are_the_effects_of_event_commands() {
    let effects = effects(delivered(json!({ "generate": "DeviceInformation,DeviceInformation" }), "event-commands", |_| ()).await).unwrap();
    assert_eq!(effects.commands.len(), 2);
    let [first, second] = &effects.commands[..] else { panic!() };
    assert_eq!(first.target.as_str(), "D");
    assert_eq!(first.command.request_type, "DeviceInformation");
    assert_ne!(first.command.uuid, second.command.uuid, "the host gives each its own CommandUUID");
    assert_eq!(first.options.idempotency_key.as_deref(), Some("EVENT/0"));
    assert_eq!(second.options.idempotency_key.as_deref(), Some("EVENT/1"));
}

#[tokio::test]
async fn nothing_generated_leaves_nothing_behind() {
    assert!(effects(delivered(json!({ "generate": "" }), "event-commands", |_| ()).await).is_none());
}

#[tokio::test]
async fn a_command_that_was_not_granted_is_refused_for_good() {
    let refused = delivered(json!({ "generate": "DeviceInformation,EraseDevice" }), "event-commands", |_| ()).await;
    let Delivered::Failed { error, retryable, .. } = refused else { panic!("{refused:?}") };
    assert!(!retryable && error.contains("denied") && error.contains("enqueue:EraseDevice"), "{error}");
}

#[tokio::test]
async fn more_commands_than_the_limit_are_refused() {
    let refused = delivered(json!({ "behave": "many-commands" }), "event-commands", |_| ()).await;
    let Delivered::Failed { error, retryable, .. } = refused else { panic!("{refused:?}") };
    assert!(!retryable && error.contains("quota"), "{error}");
}

#[tokio::test]
async fn a_sink_queues_commands_and_sees_them_pending() {
    let effects = effects(delivered(json!({ "behave": "enqueue", "command": "DeviceInformation" }), "event-sink", |_| ()).await).unwrap();
    assert_eq!(effects.commands.len(), 1);
    assert_eq!(effects.commands[0].options.idempotency_key.as_deref(), Some("EVENT/event-sink/0"));
    assert_eq!(written(&effects, "outcomes"), "queued unknown 1", "a stranger does not fail the others");
    let refused = delivered(json!({ "behave": "enqueue", "command": "EraseDevice" }), "event-sink", |_| ()).await;
    assert!(format!("{refused:?}").contains("enqueue:EraseDevice"), "{refused:?}");
}

#[tokio::test]
async fn the_same_idempotency_key_is_answered_the_same_uuid() {
    let server = Server::start().await;
    server.enroll("D").await;
    server.enroll("E").await;
    let handled = async |id: &str, query: &str| {
        server.activate([server.named("misbehaving", &json!({ "behave": "enqueue-again", "query": query }), |_| ())]);
        let event = server.event("enrollment.enrolled", id).await;
        let effects = effects(server.deliver(ME, "event-sink", event).await).unwrap();
        let told = written(&effects, "told");
        let [first, second, third] = told.lines().collect::<Vec<_>>()[..] else { panic!("{told}") };
        assert!(first == second && second == third, "{told}");
        let (state, uuid) = first.split_once(' ').unwrap();
        let answer = (state.to_owned(), uuid.to_owned(), written(&effects, "pending"));
        let commands = effects.commands.len();
        assert!(matches!(
            server.storage.record_decision(vec![DecisionEffects { effects, required: true }], vec![], server.clock.now()).await.unwrap(),
            Applied::Done(())
        ));
        (answer, commands)
    };
    let pending = async || server.storage.pending_commands(&TenantId::default(), &EnrollmentId::new("D")).await.unwrap();

    let ((state, uuid, seen), commands) = handled("D", "OSVersion").await;
    assert_eq!((state.as_str(), &seen, commands), ("queued", &uuid, 1));
    let ((_, other, _), _) = handled("E", "OSVersion").await;
    assert_ne!(uuid, other, "a UUID is of one enrollment");
    // Another body changes nothing.
    assert_eq!(handled("D", "SerialNumber").await, (("queued".to_owned(), uuid.clone(), uuid.clone()), 0));
    assert_eq!(pending().await.into_iter().map(|status| status.uuid).collect::<Vec<_>>(), [uuid.as_str()]);

    // Nor does it come again once it is finished.
    let now = server.clock.now();
    assert!(server.storage.cancel_command(&TenantId::default(), &EnrollmentId::new("D"), &uuid, now).await.unwrap());
    let (answer, _) = handled("D", "OSVersion").await;
    assert_eq!(answer, ("cancelled".to_owned(), uuid.clone(), String::new()));
    assert!(pending().await.is_empty());

    // Another certificate: it enrolls anew.
    server.enroll("D").await;
    let ((state, anew, seen), commands) = handled("D", "OSVersion").await;
    assert_eq!((state.as_str(), &seen, commands), ("queued", &anew, 1));
    assert_ne!(uuid, anew);
}

#[tokio::test]
async fn commands_without_a_key_are_not_taken_for_each_other() {
    // One that was cancelled in the same call gave its place, and its key with it, to another.
    let effects =
        effects(delivered(json!({ "behave": "enqueue-cancel-enqueue", "command": "DeviceInformation" }), "event-sink", |_| ()).await).unwrap();
    let keys: Vec<_> = effects.commands.iter().map(|queued| queued.options.idempotency_key.as_deref().unwrap()).collect();
    assert_eq!(keys, ["EVENT/event-sink/1", "EVENT/event-sink/2"]);
}

#[tokio::test]
async fn a_sink_tags_and_sees_the_tag() {
    let effects = effects(delivered(json!({ "behave": "tag" }), "event-sink", |_| ()).await).unwrap();
    assert_eq!(effects.tags.len(), 1);
    let ungranted = |effective: &mut Effective| effective.settings.capabilities.enrollments.tag = false;
    let refused = delivered(json!({ "behave": "tag" }), "event-sink", ungranted).await;
    assert!(format!("{refused:?}").contains("denied"), "{refused:?}");
}

#[tokio::test]
async fn a_timer_that_is_set_again_is_one_timer() {
    let effects = effects(delivered(json!({ "behave": "timer" }), "event-sink", |_| ()).await).unwrap();
    let sets: Vec<_> = effects.timers.iter().filter(|change| matches!(change, TimerChange::Set { .. })).collect();
    assert_eq!(sets.len(), 1);
    assert!(effects.timers.iter().any(|change| matches!(change, TimerChange::Cancel { existed: false, .. })), "{:?}", effects.timers);
}

#[tokio::test]
async fn a_tick_brings_its_name_time_and_data() {
    let server = Server::start().await;
    server.enroll("D").await;
    server.activate([server.misbehaving("", |_| ())]);
    let mut event = server.event("schedule.tick", "D").await;
    let at = server.clock.now();
    event.data = json!({ "name": "later", "scheduled_for": at.to_string(), "data": { "$data": "aGVsbG8=" } });
    let effects = effects(server.deliver(ME, "schedule", event.clone()).await).unwrap();
    assert_eq!(written(&effects, "tick"), format!("later {} D hello", at.as_millis()));
}

#[tokio::test]
async fn failures_say_whether_and_when_to_try_again() {
    let never = delivered(json!({ "behave": "fail" }), "event-sink", |_| ()).await;
    assert!(matches!(never, Delivered::Failed { retryable: false, .. }), "{never:?}");
    let later = delivered(json!({ "behave": "fail-later" }), "event-sink", |_| ()).await;
    let Delivered::Failed { retryable: true, retry_after: Some(after), by, .. } = later else { panic!("{later:?}") };
    assert_eq!(after, Duration::from_millis(1_500));
    assert_eq!(by["digest"], "ab".repeat(32));
    assert_eq!(by["generation"], 7);
    let trap = delivered(json!({ "behave": "trap" }), "event-sink", |_| ()).await;
    assert!(matches!(trap, Delivered::Failed { retryable: true, .. }), "{trap:?}");
}

#[tokio::test]
async fn a_plugin_that_is_not_there_postpones() {
    let server = Server::start().await;
    server.enroll("D").await;
    let event = server.event("enrollment.enrolled", "D").await;
    let postponed = server.deliver(ME, "event-sink", event.clone()).await;
    assert!(matches!(postponed, Delivered::Postponed { .. }), "{postponed:?}");
    server.activate([server.link("misbehaving", "endless-start", super::setup::granted(&json!({}))).unwrap()]);
    let postponed = server.deliver(ME, "event-sink", event).await;
    assert!(matches!(postponed, Delivered::Postponed { .. }), "{postponed:?}");
}

#[tokio::test]
async fn a_suspended_plugin_postpones_until_it_is_tried_again() {
    let server = Server::start().await;
    server.activate([server.misbehaving("trap", |_| ())]);
    for n in 0..5 {
        let id = format!("D{n}");
        server.enroll(&id).await;
        let event = server.event("enrollment.enrolled", &id).await;
        assert!(matches!(server.deliver(ME, "event-sink", event).await, Delivered::Failed { .. }));
    }
    let event = server.event("enrollment.enrolled", "D0").await;
    let postponed = server.deliver(ME, "event-sink", event).await;
    assert!(matches!(postponed, Delivered::Postponed { retry_after, .. } if retry_after == Duration::from_secs(1)), "{postponed:?}");
}

#[tokio::test]
async fn requests_go_to_granted_hosts_and_only_so_many() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 4_096];
            let _ = stream.read(&mut request).await;
            let _ = stream.write_all(b"HTTP/1.1 202 Accepted\r\nContent-Length: 4\r\nConnection: close\r\n\r\ndone").await;
        }
    });
    let origin = Origin::parse(&url).unwrap();
    let granted = move |effective: &mut Effective| {
        let policy = EgressPolicy { allowed: vec![origin], ..EgressPolicy::default() };
        effective.settings.capabilities.http = Some(HttpGrant { policy: policy.into(), sync_hooks: false });
    };
    let sent = delivered(json!({ "behave": "send", "url": url, "times": 4 }), "event-sink", granted.clone()).await;
    assert_eq!(written(&effects(sent).unwrap(), "answer"), "202 done");
    let sent = delivered(json!({ "behave": "send", "url": url, "times": 5 }), "event-sink", granted.clone()).await;
    assert!(format!("{sent:?}").contains("quota"), "{sent:?}");
    let sent = delivered(json!({ "behave": "send", "url": "http://169.254.169.254/" }), "event-sink", granted).await;
    assert!(format!("{sent:?}").contains("denied"), "{sent:?}");
    let sent = delivered(json!({ "behave": "send", "url": url }), "event-sink", |_| ()).await;
    assert!(format!("{sent:?}").contains("http is not granted"), "{sent:?}");
}

#[tokio::test]
async fn whom_a_plugin_wakes_is_woken_after_its_call_and_it_sees_why_a_push_failed() {
    let server = Server::start().await;
    server.enroll("D").await;
    let (tenant, id, now) = (TenantId::default(), EnrollmentId::new("D"), server.clock.now());
    let candidate = candidate("D");
    let update = TokenUpdate {
        tenant: tenant.clone(),
        identity: candidate.certificate.identity,
        enrollment: candidate.enrollment,
        facts: candidate.facts,
        topic: candidate.topic,
        push_magic: "magic".to_owned(),
        token: "token".into(),
        unlock_token: None,
        awaiting_configuration: None,
        raw: "raw".into(),
        document: candidate.message,
        now,
    };
    server.storage.token_update(update).await.unwrap();
    let failure = PushFailure { code: "BadDeviceToken".to_owned(), detail: "told".to_owned(), fault: "device", token_is_dead: false };
    let attempt = PushAttempt { id: id.clone(), told_at: now, failure: Some(failure) };
    server.storage.record_pushes(&tenant, vec![attempt], now).await.unwrap();
    server.activate([server.named("misbehaving", &json!({ "behave": "push" }), |_| ())]);
    let event = server.event("enrollment.enrolled", "D").await;
    let effects = effects(server.deliver(ME, "event-sink", event).await).unwrap();
    assert_eq!(effects.pushes, std::slice::from_ref(&id));
    let told = written(&effects, "push");
    for part in ["Err(\"invalid\") Err(\"not-found\") Err(\"quota\")", "\"push_failure\":{\"code\":\"BadDeviceToken\""] {
        assert!(told.contains(part), "{told}");
    }
    assert_eq!(server.storage.next_wake(&id).await.unwrap(), None, "not before the call's end");
    let committed = server.storage.record_decision(vec![DecisionEffects { effects, required: true }], vec![], now).await.unwrap();
    assert!(matches!(committed, Applied::Done(())));
    assert_eq!(server.storage.next_wake(&id).await.unwrap(), Some(now));
}

#[tokio::test]
async fn without_a_grant_nobody_is_woken() {
    let refused = delivered(json!({ "behave": "push" }), "event-sink", |effective| effective.settings.capabilities.push = false).await;
    let text = format!("{refused:?}");
    assert!(text.contains("denied") && text.contains("push is not granted"), "{text}");
}
