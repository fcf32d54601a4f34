use crate::fixture::*;
use bytes::Bytes;
use wasmdm_protocol::report::Status;
use wasmdm_storage::commands::CommandOptions;
use wasmdm_storage::effects::{Applied, KvQuota, KvWrite, PluginCommand, PluginEffects, TagChange};
use wasmdm_storage::outbox::{Completed, Delivery, Lease};

fn put(key: &str, value: &str, version: &str) -> KvWrite {
    KvWrite { key: key.to_owned(), value: Some(Bytes::from(value.to_owned())), version: version.to_owned(), expires_at: None }
}

fn plugin_command(target: &str, uuid: &str) -> PluginCommand {
    PluginCommand { target: id(target), command: command(uuid, "DeviceInformation"), options: CommandOptions::default() }
}

async fn value(database: &Database, key: &str) -> Option<String> {
    let pair = database.storage().kv_get(&default(), "p", key, at(100)).await.unwrap();
    pair.map(|pair| String::from_utf8(pair.value.to_vec()).unwrap())
}

/// One event of device A, taken by a worker of the plugin `p`.
async fn one_delivery(database: &Database) -> (Lease, Delivery) {
    database.subscribe("plugin:p", &["enrollment.enrolled"]).await;
    database.enroll("A").await;
    database.take(50).await
}

pub(crate) async fn effects_commit_with_the_acknowledgement(database: &Database) {
    let (lease, delivery) = one_delivery(database).await;
    let mut effects = effects("p");
    effects.reads = vec![("k".to_owned(), None)];
    effects.writes = vec![put("k", "1", "v1"), put("other", "x", "v2"), KvWrite { value: None, ..put("other", "", "v3") }];
    effects.commands = vec![plugin_command("A", "P1"), plugin_command("A", "P2")];
    assert!(matches!(database.done(&lease, &delivery, Some(effects)).await, Completed::Stored { .. }));
    assert_eq!(value(database, "k").await.as_deref(), Some("1"));
    assert_eq!(value(database, "other").await, None);
    assert_eq!(database.storage().kv_usage(&default(), "p").await.unwrap(), (2, 1));
    assert_eq!(database.poll("A").await.as_deref(), Some("P1"));
    assert_eq!(database.report("A", "P1", Status::Acknowledged).await.1.as_deref(), Some("P2"));
    let status = database.storage().command_status(&default(), &id("A"), "P2").await.unwrap().unwrap();
    assert_eq!(status.origin, "plugin:p");
}

pub(crate) async fn a_read_that_changed_discards_all_effects(database: &Database) {
    let (lease, delivery) = one_delivery(database).await;
    let mut first = effects("p");
    first.writes = vec![put("k", "1", "v1")];
    database.storage().record_decision(vec![required(first)], vec![], at(55)).await.unwrap();
    let mut late = effects("p");
    late.reads = vec![("k".to_owned(), None)];
    late.writes = vec![put("k", "2", "v2")];
    late.commands = vec![plugin_command("A", "P1")];
    for conflicts in 1..=2 {
        assert!(matches!(database.done(&lease, &delivery, Some(late.clone())).await, Completed::Conflict(_)));
        let again = database.storage().next_delivery(&lease, at(60)).await.unwrap().unwrap();
        assert_eq!((again.event.id.as_str(), again.conflicts, again.attempt), (delivery.event.id.as_str(), conflicts, 1));
    }
    assert_eq!(value(database, "k").await.as_deref(), Some("1"));
    assert_eq!(database.poll("A").await, None);
    late.reads = vec![("k".to_owned(), Some("v1".to_owned()))];
    assert!(matches!(database.done(&lease, &delivery, Some(late)).await, Completed::Stored { .. }));
    assert_eq!(value(database, "k").await.as_deref(), Some("2"));
}

pub(crate) async fn a_command_that_finished_meanwhile_is_a_conflict(database: &Database) {
    let (lease, delivery) = one_delivery(database).await;
    database.queue("A", "C1").await;
    database.queue("A", "C2").await;
    let mut cancel = effects("p");
    cancel.cancels = vec![(id("A"), "C1".to_owned()), (id("A"), "C2".to_owned())];
    database.storage().cancel_command(&default(), &id("A"), "C1", at(51)).await.unwrap();
    assert!(matches!(database.done(&lease, &delivery, Some(cancel.clone())).await, Completed::Conflict(_)));
    assert_eq!(database.state("A", "C2").await, "queued");
    cancel.cancels.remove(0);
    assert!(matches!(database.done(&lease, &delivery, Some(cancel)).await, Completed::Stored { .. }));
    assert_eq!(database.state("A", "C2").await, "cancelled");
}

pub(crate) async fn a_quota_is_enforced_at_commit(database: &Database) {
    let (lease, delivery) = one_delivery(database).await;
    let with = |writes: Vec<KvWrite>| PluginEffects { writes, quota: KvQuota { bytes: 10, keys: 2 }, ..effects("p") };
    for too_much in [vec![put("k", "1234567890", "v")], vec![put("a", "", "v"), put("b", "", "v"), put("c", "", "v")]] {
        assert!(matches!(database.done(&lease, &delivery, Some(with(too_much))).await, Completed::Rejected(_)));
    }
    let fits = with(vec![put("k", "123456789", "v1")]);
    assert_eq!(database.storage().record_decision(vec![required(fits)], vec![], at(60)).await.unwrap(), Applied::Done(()));
    assert!(matches!(database.done(&lease, &delivery, Some(with(vec![put("l", "", "v")]))).await, Completed::Rejected(_)));
    // Replacing and removing is always possible.
    let replaced = with(vec![put("k", "1", "v2"), put("l", "2", "v3")]);
    assert!(matches!(database.done(&lease, &delivery, Some(replaced)).await, Completed::Stored { .. }));
    assert_eq!(database.storage().kv_usage(&default(), "p").await.unwrap(), (4, 2));
}

pub(crate) async fn expired_pairs_do_not_count_against_the_quota(database: &Database) {
    let quota = KvQuota { bytes: 10, keys: 2 };
    let mut write = put("k", "123456789", "v1");
    write.expires_at = Some(at(50));
    let first = PluginEffects { writes: vec![write], quota, ..effects("p") };
    database.storage().record_decision(vec![required(first)], vec![], at(10)).await.unwrap();
    // It is absent now, and a plugin that read it before has a conflict.
    let mut second = PluginEffects { writes: vec![put("l", "123456789", "v2")], quota, ..effects("p") };
    second.reads = vec![("k".to_owned(), Some("v1".to_owned()))];
    let conflict = database.storage().record_decision(vec![required(second.clone())], vec![], at(50)).await.unwrap();
    assert!(matches!(conflict, Applied::Conflict(_)));
    second.reads = vec![("k".to_owned(), None)];
    assert_eq!(database.storage().record_decision(vec![required(second)], vec![], at(50)).await.unwrap(), Applied::Done(()));
    assert_eq!(database.storage().kv_usage(&default(), "p").await.unwrap(), (10, 1));
}

pub(crate) async fn an_unknown_target_rejects_all_effects(database: &Database) {
    let (lease, delivery) = one_delivery(database).await;
    let mut wrong = effects("p");
    wrong.writes = vec![put("k", "1", "v1")];
    wrong.commands = vec![plugin_command("A", "P1"), plugin_command("unknown", "P2")];
    assert!(matches!(database.done(&lease, &delivery, Some(wrong)).await, Completed::Rejected(_)));
    assert_eq!(value(database, "k").await, None);
    assert_eq!(database.poll("A").await, None);
    database.queue("A", "C1").await;
    let mut reused = effects("p");
    reused.commands = vec![PluginCommand { command: command("C1", "DeviceLock"), ..plugin_command("A", "C1") }];
    assert!(matches!(database.done(&lease, &delivery, Some(reused)).await, Completed::Rejected(_)));
}

pub(crate) async fn a_redelivered_command_with_the_same_key_is_queued_once(database: &Database) {
    let (lease, delivery) = one_delivery(database).await;
    let with_uuid = |uuid: &str| {
        let mut effects = effects("p");
        let options = CommandOptions { idempotency_key: Some(format!("{}/0", delivery.event.id)), ..CommandOptions::default() };
        effects.commands = vec![PluginCommand { options, ..plugin_command("A", uuid) }];
        effects
    };
    database.storage().record_decision(vec![required(with_uuid("P1"))], vec![], at(55)).await.unwrap();
    assert!(matches!(database.done(&lease, &delivery, Some(with_uuid("P2"))).await, Completed::Stored { .. }));
    let pending = database.storage().pending_commands(&default(), &id("A")).await.unwrap();
    assert_eq!(pending.iter().map(|command| command.uuid.as_str()).collect::<Vec<_>>(), ["P1"]);
}

pub(crate) async fn own_events_come_back_only_when_asked_for(database: &Database) {
    for include_self in [false, true] {
        let device = if include_self { "B" } else { "A" };
        database.subscribe_to("plugin:p", "event-sink", &["enrollment.enrolled", "command.queued", "command.acknowledged"], include_self).await;
        database.subscribe("plugin:q", &["command.queued"]).await;
        database.enroll(device).await;
        let (lease, delivery) = database.take(50).await;
        let mut effects = effects("p");
        effects.commands = vec![plugin_command(device, &format!("{device}1"))];
        database.done(&lease, &delivery, Some(effects)).await;
        database.storage().release(&lease, at(51)).await.unwrap();
        let mut got = Vec::new();
        for lease in database.claim(150).await {
            while let Some(delivery) = database.storage().next_delivery(&lease, at(150)).await.unwrap() {
                database.done(&lease, &delivery, None).await;
                got.push((lease.subscriber.clone(), delivery.event.topic, delivery.event.hops));
            }
            database.storage().release(&lease, at(150)).await.unwrap();
        }
        let of = |subscriber: &str, topic: &str, hops| (subscriber.to_owned(), topic.to_owned(), hops);
        got.sort();
        let mut expected = vec![of("plugin:q", "command.queued", 1)];
        if include_self {
            expected.insert(0, of("plugin:p", "command.queued", 1));
        }
        assert_eq!(got, expected);
        // The device's answer is no effect of the plugin.
        database.poll(device).await;
        database.report(device, &format!("{device}1"), Status::Acknowledged).await;
        let answers = database.drain(200).await;
        assert_eq!(answers.len(), 1);
        assert_eq!((answers[0].event.topic.as_str(), answers[0].event.hops), ("command.acknowledged", 0));
    }
}

pub(crate) async fn an_event_loop_ends(database: &Database) {
    database.subscribe("plugin:p", &["command.queued"]).await;
    database.subscribe("plugin:q", &["command.queued"]).await;
    database.enroll("A").await;
    database.queue("A", "C1").await;
    let mut handled = 0;
    loop {
        let leases = database.claim(150).await;
        if leases.is_empty() {
            break;
        }
        for lease in leases {
            while let Some(delivery) = database.storage().next_delivery(&lease, at(150)).await.unwrap() {
                handled += 1;
                let mut effects = effects(lease.subscriber.strip_prefix("plugin:").unwrap());
                effects.commands = vec![plugin_command("A", &format!("L{handled}"))];
                assert!(matches!(database.done(&lease, &delivery, Some(effects)).await, Completed::Stored { .. }));
            }
            database.storage().release(&lease, at(150)).await.unwrap();
        }
    }
    assert_eq!(handled, 18, "one chain from each of the two, nine links long: hops 0 to 8");
}

pub(crate) async fn a_policy_conflict_stores_nothing(database: &Database) {
    let mut message = authenticate("A", "A", 0);
    let mut late = effects("guard");
    late.reads = vec![("list".to_owned(), Some("v1".to_owned()))];
    late.writes = vec![put("count", "1", "v2")];
    message.effects = vec![required(effects("first")), required(late)];
    let applied = database.storage().authenticate(message.clone()).await.unwrap();
    assert!(matches!(applied, Applied::Conflict(_)));
    assert!(database.storage().enrollment(&id("A")).await.unwrap().is_none());
    assert_eq!(database.count_rows("certificate_bindings").await, 0);
    assert_eq!(database.count_rows("plugin_key_values").await, 0);
    message.effects[1].effects.reads[0].1 = None;
    assert!(matches!(database.storage().authenticate(message).await.unwrap(), Applied::Done(_)));
    let pair = database.storage().kv_get(&default(), "guard", "count", at(1)).await.unwrap().unwrap();
    assert_eq!(pair.version, "v2");
}

pub(crate) async fn tags_and_releases_commit_with_the_acknowledgement(database: &Database) {
    database.subscribe("plugin:p", &["enrollment.enrolled"]).await;
    let mut message = authenticate("A", "A", 0);
    message.quarantined_by = Some("p".to_owned());
    message.tags = vec!["new".to_owned()];
    database.try_authenticate(message).await;
    database.token_update("A", 1).await;
    let (lease, delivery) = database.take(50).await;
    let mut changes = effects("p");
    changes.tags = vec![TagChange { id: id("A"), add: vec!["lab".to_owned()], remove: vec!["new".to_owned()] }];
    changes.releases = vec![id("A")];
    database.done(&lease, &delivery, Some(changes.clone())).await;
    let record = database.storage().enrollment(&id("A")).await.unwrap().unwrap();
    assert_eq!(record.facts["tags"], serde_json::json!(["lab"]));
    assert_eq!(record.quarantined_by, None);
    let again = database.storage().record_decision(vec![required(changes)], vec![], at(60)).await.unwrap();
    assert!(matches!(again, Applied::Conflict(_)), "it is released already");
}
