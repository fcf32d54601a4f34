//! The chain of enrollment policies.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use wasmdm_plugin_runtime::effective::{Effective, Mode, OnFailure};
use wasmdm_plugin_runtime::hook::Hook;
use wasmdm_plugin_runtime::registry::{Entry, Missing, Registry};
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_service::enrollment_policy::Verdict;

use super::hostile::assert_in_time;
use super::setup::Server;

fn verdicts(decisions: &Value) -> Vec<(String, String)> {
    let text = |decision: &Value, key: &str| decision[key].as_str().unwrap_or_default().to_owned();
    decisions.as_array().unwrap().iter().map(|decision| (text(decision, "plugin"), text(decision, "verdict"))).collect()
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|(plugin, verdict)| ((*plugin).to_owned(), (*verdict).to_owned())).collect()
}

fn ordered(order: i32) -> impl FnOnce(&mut Effective) {
    move |effective| effective.order = order
}

#[tokio::test]
async fn without_plugins_everyone_may_enroll() {
    let server = Server::start().await;
    let answer = server.decide("D").await;
    assert_eq!(answer.verdict, Verdict::Allow { tags: vec![] });
    assert_eq!(answer.decisions, json!([]));
}

#[tokio::test]
async fn plugins_are_asked_by_order_and_then_by_name_and_a_deny_ends_it() {
    let server = Server::start().await;
    server.activate([
        server.named("d", &json!({ "behave": "allow" }), ordered(300)),
        server.named("c", &json!({ "behave": "deny" }), ordered(200)),
        server.named("b", &json!({ "behave": "allow" }), ordered(100)),
        server.named("a", &json!({ "behave": "" }), ordered(100)),
    ]);
    let answer = server.decide("D").await;
    assert_eq!(answer.verdict, Verdict::Deny { reason: String::from("as configured") });
    assert_eq!(verdicts(&answer.decisions), pairs(&[("a", "abstain"), ("b", "allow"), ("c", "deny")]));
    let row = &answer.audit[0];
    assert_eq!((answer.audit.len(), row.actor.as_str(), row.action.as_str()), (1, "plugin:c", "enrollment-policy.deny"));
    assert_eq!(row.detail["digest"], "ab".repeat(32));
    assert_eq!(row.detail["generation"], 7);
    assert_eq!(row.detail["reason"], "as configured");
    assert_eq!(row.detail["request_id"], "REQUEST");
}

#[tokio::test]
async fn quarantine_beats_allow_and_tags_add_up() {
    let server = Server::start().await;
    server.activate([server.named("a", &json!({ "behave": "quarantine" }), |_| ()), server.named("b", &json!({ "behave": "allow" }), |_| ())]);
    let answer = server.decide("D").await;
    assert_eq!(answer.verdict, Verdict::Quarantine { by: String::from("a"), tags: vec![String::from("watched"), String::from("allowed")] });
}

#[tokio::test]
async fn a_deny_without_a_reason_names_the_plugin() {
    let server = Server::start().await;
    server.activate([server.named("a", &json!({ "behave": "deny-without-reason" }), |_| ())]);
    assert_eq!(server.decide("D").await.verdict, Verdict::Deny { reason: String::from("refused by a") });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failure_is_closed_unless_the_operator_says_open() {
    let server = Server::start().await;
    for behave in ["trap", "fail", "unknown-verdict"] {
        server.activate([server.misbehaving(behave, |_| ()), server.named("z", &json!({ "behave": "allow" }), |_| ())]);
        let answer = server.decide(behave).await;
        assert!(matches!(answer.verdict, Verdict::Unavailable { .. }), "{behave}: {:?}", answer.verdict);
        assert_eq!(verdicts(&answer.decisions), pairs(&[("misbehaving", "failure")]));
        assert_eq!(answer.audit[0].action, "enrollment-policy.failure");

        let open = |effective: &mut Effective| {
            effective.on_failure.insert(Hook::EnrollmentPolicy, OnFailure::Open);
        };
        server.activate([server.misbehaving(behave, open), server.named("z", &json!({ "behave": "allow" }), |_| ())]);
        let answer = server.decide(behave).await;
        assert_eq!(answer.verdict, Verdict::Allow { tags: vec![String::from("allowed")] });
        assert_eq!(verdicts(&answer.decisions), pairs(&[("misbehaving", "failure"), ("z", "allow")]));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_whole_chain_ends_within_its_second() {
    let server = Server::start().await;
    let slow = |name: &str| {
        server.named(name, &json!({ "behave": "sleep" }), |effective| {
            effective.settings.limits.wall.decision = Duration::from_millis(700);
            effective.on_failure.insert(Hook::EnrollmentPolicy, OnFailure::Open);
        })
    };
    server.activate([slow("a"), slow("b"), slow("c"), slow("d")]);
    assert_in_time(Duration::from_secs(1), async || {
        let began = std::time::Instant::now();
        let answer = server.decide("D").await;
        assert_eq!(answer.decisions.as_array().unwrap().len(), 4);
        began.elapsed()
    })
    .await;
}

#[tokio::test]
async fn a_required_plugin_that_is_missing_closes_the_door() {
    let server = Server::start().await;
    let missing = |on_failure, tenants: Option<&str>| {
        Entry::Missing(Missing {
            name: String::from("guard"),
            order: 50,
            hooks: BTreeMap::from([(Hook::EnrollmentPolicy, on_failure)]),
            token_services: None,
            tenants: tenants.map(|tenant| [TenantId::new(tenant)].into()),
            reason: String::from("not loaded yet"),
        })
    };
    let allows = Entry::Active(server.named("z", &json!({ "behave": "allow" }), |_| ()));
    server.registry.swap(Registry::new([missing(OnFailure::Closed, None), allows.clone()]));
    let answer = server.decide("D").await;
    assert!(matches!(answer.verdict, Verdict::Unavailable { .. }), "{:?}", answer.verdict);
    assert_eq!(answer.audit.len(), 1);
    assert_eq!(server.registry.snapshot().missing().count(), 1);

    server.registry.swap(Registry::new([missing(OnFailure::Open, None), allows.clone()]));
    assert_eq!(server.decide("D").await.verdict, Verdict::Allow { tags: vec![String::from("allowed")] });
    server.registry.swap(Registry::new([missing(OnFailure::Closed, Some("other")), allows]));
    assert_eq!(server.decide("D").await.verdict, Verdict::Allow { tags: vec![String::from("allowed")] });
}

#[tokio::test]
async fn a_monitored_plugin_changes_nothing_and_writes_apart() {
    let server = Server::start().await;
    let monitor = |effective: &mut Effective| effective.settings.mode = Mode::Monitor;
    server.activate([server.named("a", &json!({ "behave": "deny" }), monitor), server.named("b", &json!({ "behave": "trap" }), monitor)]);
    let answer = server.decide("D").await;
    assert_eq!(answer.verdict, Verdict::Allow { tags: vec![] });
    assert_eq!(verdicts(&answer.decisions), pairs(&[("a", "deny"), ("b", "failure")]));
    assert_eq!(answer.decisions[0]["mode"], "monitor");

    server.activate([server.named("a", &json!({ "behave": "count" }), monitor)]);
    for expected in ["1", "2"] {
        let answer = server.decide("D").await;
        assert_eq!(answer.decisions[0]["reason"], expected);
        assert_eq!(answer.effects[0].effects.plugin, "a~monitor");
        assert!(answer.effects[0].effects.reads.is_empty(), "what it reads never repeats a decision");
        server.storage.record_decision(answer.effects, answer.audit, wasmdm_protocol::time::Timestamp::from_millis(0)).await.unwrap();
    }
    let key_value = server.storage.kv_get(&TenantId::default(), "a", "count", wasmdm_protocol::time::Timestamp::from_millis(0)).await.unwrap();
    assert!(key_value.is_none());
}

#[tokio::test]
async fn a_disabled_plugin_is_not_asked() {
    let server = Server::start().await;
    server.activate([server.misbehaving("deny", |effective| effective.settings.mode = Mode::Disabled)]);
    assert_eq!(server.decide("D").await.decisions, json!([]));
    let elsewhere = |effective: &mut Effective| effective.tenants = Some([TenantId::new("other")].into());
    server.activate([server.misbehaving("deny", elsewhere)]);
    assert_eq!(server.decide("D").await.decisions, json!([]));
}

#[tokio::test]
async fn a_request_keeps_its_snapshot() {
    let server = Server::start().await;
    server.activate([server.misbehaving("deny", |_| ())]);
    let snapshot = server.registry.snapshot();
    server.activate([server.misbehaving("allow", |_| ())]);
    assert!(snapshot.active("misbehaving").is_some());
    assert!(!std::sync::Arc::ptr_eq(&snapshot, &server.registry.snapshot()));
}

#[tokio::test]
async fn the_plugin_is_told_who_asks_without_secrets() {
    let server = Server::start().await;
    server.activate([server.misbehaving("tell", |_| ())]);
    let Verdict::Deny { reason } = server.decide("D").await.verdict else { panic!() };
    assert!(reason.starts_with("D device com.apple.mgmt.External.test false true "), "{reason}");
    for expected in
        [r#""serial_number":"SN-D""#, r#""tags":[]"#, r#""url_params":{}"#, r#""subject":"CN=device""#, r#""message_type":"Authenticate""#]
    {
        assert!(reason.contains(expected), "{expected} in {reason}");
    }
    server.activate([server.misbehaving("message", |_| ())]);
    let Verdict::Deny { reason } = server.decide("D").await.verdict else { panic!() };
    assert_eq!(reason, r#"{"MessageType":"Authenticate","UDID":"D","UnlockToken":{"$redacted":true}}"#);
}
