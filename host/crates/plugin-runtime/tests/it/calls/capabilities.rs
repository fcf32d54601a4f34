//! What imports answer, with and without their grants.

use serde_json::json;
use wasmdm_plugin_runtime::call::{Answer, Decision, Outcome};
use wasmdm_plugin_runtime::effective::{Effective, KvGrant, Mode};
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_protocol::time::Timestamp;
use wasmdm_service::clock::Clock as _;
use wasmdm_storage::effects::{Applied, DecisionEffects, PluginEffects};

use super::setup::Server;

async fn reason(behave: &str, adjust: impl FnOnce(&mut Effective)) -> String {
    let server = Server::start().await;
    let plugin = server.misbehaving(behave, adjust);
    match server.call(&plugin, "D").await.outcome {
        Outcome::Answered(Answer::Decision(Decision::Deny { reason } | Decision::Allow { reason, .. })) => reason.unwrap_or_default(),
        outcome => outcome.to_string(),
    }
}

fn required(effects: PluginEffects) -> DecisionEffects {
    DecisionEffects { effects, required: true }
}

#[tokio::test]
async fn a_call_sees_its_own_key_values() {
    assert_eq!(reason("kv", |_| ()).await, "kv works");
}

#[tokio::test]
async fn key_values_are_scanned_page_by_page() {
    assert_eq!(reason("many", |_| ()).await, "100");
}

#[tokio::test]
async fn a_scan_shows_what_the_call_itself_wrote_once_and_in_order() {
    let roomy = |effective: &mut Effective| effective.settings.limits.cpu_sync = std::time::Duration::from_secs(20);
    let shadowed = move |effective: &mut Effective| {
        roomy(effective);
        effective.settings.mode = Mode::Monitor;
    };
    let server = Server::start().await;
    let now = server.clock.now();
    let stored = server.call(&server.misbehaving("many", roomy), "D").await.effects.unwrap();
    server.storage.record_decision(vec![required(*stored)], vec![], now).await.unwrap();
    let expected = Outcome::Answered(Answer::Decision(Decision::Allow { tags: vec![], reason: Some(String::from("70 pairs")) }));
    assert_eq!(server.call(&server.misbehaving("scan-own", roomy), "D").await.outcome, expected);
    // A monitored plugin's own name space lies over the other one.
    let stored = server.call(&server.misbehaving("many", shadowed), "D").await.effects.unwrap();
    assert_eq!(stored.plugin, "misbehaving~monitor");
    assert_eq!(server.call(&server.misbehaving("scan-own", shadowed), "D").await.outcome, expected);
    server.storage.record_decision(vec![required(*stored)], vec![], now).await.unwrap();
    assert_eq!(server.call(&server.misbehaving("scan-own", shadowed), "D").await.outcome, expected);
}

#[tokio::test]
async fn without_a_grant_key_values_are_denied() {
    let answer = reason("count", |effective| effective.settings.capabilities.kv = None).await;
    assert!(answer.contains("denied") && answer.contains("kv"), "{answer}");
}

#[tokio::test]
async fn a_value_above_its_quota_is_refused() {
    let answer = reason("big-value", |_| ()).await;
    assert!(answer.contains("quota") && answer.contains("65536"), "{answer}");
    let small = KvGrant { bytes: 1_000, ..KvGrant::default() };
    let answer = reason("many", |effective| effective.settings.capabilities.kv = Some(small)).await;
    assert!(answer.contains("quota"), "{answer}");
}

#[tokio::test]
async fn a_decision_writes_key_values_and_nothing_else() {
    assert_eq!(reason("writes", |_| ()).await, "denied denied denied denied denied denied denied denied ok");
}

#[tokio::test]
async fn a_generator_writes_nothing() {
    let server = Server::start().await;
    server.enroll("D").await;
    server.activate([server.misbehaving("writes", |_| ())]);
    let event = server.event("enrollment.enrolled", "D").await;
    let delivered = server.deliver("plugin:misbehaving", "event-commands", event).await;
    let text = format!("{delivered:?}");
    assert!(text.contains("denied denied denied denied denied denied denied denied denied"), "{text}");
}

#[tokio::test]
async fn what_was_read_is_checked_again_at_commit() {
    let server = Server::start().await;
    let plugin = server.misbehaving("count", |_| ());
    let first = server.call(&plugin, "D").await.effects.unwrap();
    let second = server.call(&plugin, "D").await.effects.unwrap();
    let now = server.clock.now();
    assert!(matches!(server.storage.record_decision(vec![required(*first)], vec![], now).await.unwrap(), Applied::Done(())));
    assert!(matches!(server.storage.record_decision(vec![required(*second)], vec![], now).await.unwrap(), Applied::Conflict(_)));
    let third = server.call(&plugin, "D").await;
    assert_eq!(third.outcome, Outcome::Answered(Answer::Decision(Decision::Deny { reason: Some(String::from("2")) })));
    assert!(matches!(server.storage.record_decision(vec![required(*third.effects.unwrap())], vec![], now).await.unwrap(), Applied::Done(())));
    let stored = server.storage.kv_get(&TenantId::default(), "misbehaving", "count", now).await.unwrap().unwrap();
    assert_eq!(stored.value.as_ref(), b"2");
}

#[tokio::test]
async fn a_write_without_a_read_cannot_conflict() {
    let server = Server::start().await;
    let plugin = server.misbehaving("put", |_| ());
    let effects = server.call(&plugin, "D").await.effects.unwrap();
    assert_eq!((effects.reads.len(), effects.writes.len()), (0, 1));
}

#[tokio::test]
async fn a_plugin_is_told_who_it_is_and_what_it_may_take() {
    let info: serde_json::Value = serde_json::from_str(&reason("info", |_| ()).await).unwrap();
    assert_eq!(info["name"], "misbehaving");
    assert_eq!(info["version"], "1.2.3");
    assert_eq!(info["tenant"], "default");
    assert_eq!(info["server_version"], "0.1.0-test");
    assert_eq!(info["limits"]["memory_bytes"], json!(64 << 20));
    assert_eq!(info["limits"]["cpu_ms"], 50);
}

#[tokio::test]
async fn random_numbers_and_property_lists_need_no_grant() {
    assert_eq!(reason("random", |_| ()).await, "16 true");
    assert_eq!(reason("plist", |_| ()).await, r#"{"Name":"a","Data":{"$data":"AAE="}} true"#);
}

#[tokio::test]
async fn without_a_database_stateful_imports_are_unavailable() {
    use std::sync::Arc;
    use wasmdm_plugin_runtime::plugin::{PluginIdentity, link};
    use wasmdm_plugin_runtime::runtime::{Runtime, Services};
    let server = Server::start().await;
    let services = Services {
        storage: None,
        clock: Arc::new(server.clock.clone()),
        egress: wasmdm_plugin_runtime::egress::Client::new().unwrap(),
        server_version: String::from("0.1.0-test"),
    };
    let runtime = Runtime::new(server.runtime.engines().clone(), services).unwrap();
    let identity = PluginIdentity { name: String::from("a"), version: String::new(), digest: String::new(), generation: 0 };
    let effective = super::setup::granted(&json!({ "behave": "count" }));
    let plugin = link(&runtime, &super::setup::component("misbehaving"), identity, effective).unwrap();
    let outcome = server.call(&plugin, "D").await.outcome;
    assert!(outcome.to_string().contains("unavailable"), "{outcome}");
}

#[tokio::test]
async fn expired_key_values_are_absent() {
    let server = Server::start().await;
    let plugin = server.misbehaving("many", |_| ());
    let effects = server.call(&plugin, "D").await.effects.unwrap();
    let now = server.clock.now();
    server.storage.record_decision(vec![required(*effects)], vec![], now).await.unwrap();
    let found = |at: Timestamp| {
        let storage = server.storage.clone();
        async move { storage.kv_get(&TenantId::default(), "misbehaving", "many/000", at).await.unwrap().is_some() }
    };
    assert!(found(now).await);
    assert!(!found(now.plus(std::time::Duration::from_secs(61))).await);
}
