use crate::fixture::*;
use bytes::Bytes;
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_storage::effects::{KvWrite, PluginEffects};

async fn write(database: &Database, plugin: &str, keys: &[(&str, Option<i64>)]) {
    let write = |&(key, expires): &(&str, Option<i64>)| KvWrite {
        key: key.to_owned(),
        value: Some(Bytes::from_static(b"\x00\xff")),
        version: format!("v-{key}"),
        expires_at: expires.map(at),
    };
    let effects = PluginEffects { writes: keys.iter().map(write).collect(), ..effects(plugin) };
    database.storage().record_decision(vec![required(effects)], vec![], at(0)).await.unwrap();
}

pub(crate) async fn pairs_are_of_one_plugin_and_tenant(database: &Database) {
    write(database, "p", &[("k", None)]).await;
    let get = async |tenant: TenantId, plugin: &str, key: &str| database.storage().kv_get(&tenant, plugin, key, at(1)).await.unwrap();
    let pair = get(default(), "p", "k").await.unwrap();
    assert_eq!((&*pair.value, pair.version.as_str()), (&b"\x00\xff"[..], "v-k"));
    assert_eq!(get(default(), "q", "k").await, None);
    assert_eq!(get(TenantId::new("other"), "p", "k").await, None);
    assert_eq!(get(default(), "p", "K").await, None);
    assert!(!format!("{pair:?}").contains("255"));
}

pub(crate) async fn scans_go_in_byte_order_after_a_key(database: &Database) {
    write(database, "p", &[("a", None), ("a/1", None), ("a/2", None), ("a/é", None), ("a/Z", None), ("a0", None), ("b", None)]).await;
    let scan = async |prefix: &str, after: Option<&str>, limit: u32| {
        let pairs = database.storage().kv_scan(&default(), "p", prefix, after, limit, at(1)).await.unwrap();
        pairs.into_iter().map(|pair| pair.key).collect::<Vec<_>>()
    };
    assert_eq!(scan("a/", None, 10).await, ["a/1", "a/2", "a/Z", "a/é"]);
    assert_eq!(scan("a/", None, 2).await, ["a/1", "a/2"]);
    assert_eq!(scan("a/", Some("a/2"), 2).await, ["a/Z", "a/é"]);
    assert_eq!(scan("a", None, 1).await, ["a"]);
    assert_eq!(scan("", None, 10).await, ["a", "a/1", "a/2", "a/Z", "a/é", "a0", "b"]);
    assert_eq!(scan("c", None, 10).await, Vec::<String>::new());
}

pub(crate) async fn expired_pairs_are_absent_and_cleared_away(database: &Database) {
    write(database, "p", &[("k1", Some(50)), ("k2", None)]).await;
    let found = async |millis: i64| database.storage().kv_scan(&default(), "p", "", None, 10, at(millis)).await.unwrap().len();
    assert_eq!((found(49).await, found(50).await), (2, 1));
    assert!(database.storage().kv_get(&default(), "p", "k1", at(50)).await.unwrap().is_none());
    assert_eq!(database.storage().kv_usage(&default(), "p").await.unwrap(), (8, 2));
    database.storage().expire_commands(at(50)).await.unwrap();
    assert_eq!(database.storage().kv_usage(&default(), "p").await.unwrap(), (4, 1));
    assert_eq!(database.count_rows("plugin_key_values").await, 1);
}
