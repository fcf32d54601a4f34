use crate::fixture::*;
use bytes::Bytes;
use wasmdm_storage::effects::{Applied, PluginEffects, TimerChange};
use wasmdm_storage::outbox::Completed;
use wasmdm_storage::timers::CronEntry;

fn set(name: &str, who: Option<&str>, millis: i64) -> TimerChange {
    TimerChange::Set { name: name.to_owned(), who: who.map(id), at: at(millis), data: Bytes::from_static(b"note") }
}

fn cancel(name: &str, who: Option<&str>, existed: bool) -> TimerChange {
    TimerChange::Cancel { name: name.to_owned(), who: who.map(id), existed }
}

async fn apply(database: &Database, timers: Vec<TimerChange>) -> Applied<()> {
    let effects = PluginEffects { timers, ..effects("p") };
    database.storage().record_decision(vec![required(effects)], vec![], at(10)).await.unwrap()
}

async fn timer(database: &Database, name: &str, who: Option<&str>) -> Option<i64> {
    let who = who.map(id);
    let due = database.storage().timer(&default(), "p", name, who.as_ref()).await.unwrap();
    due.map(|due| due.as_millis() - at(0).as_millis())
}

pub(crate) async fn a_timer_fires_once(database: &Database) {
    database.enroll("A").await;
    assert_eq!(database.storage().fire_timers(at(50)).await.unwrap(), None);
    apply(database, vec![set("wait", Some("A"), 100), set("wait", None, 200)]).await;
    assert_eq!(database.storage().fire_timers(at(99)).await.unwrap(), Some(at(100)));
    assert!(database.claim(99).await.is_empty());
    assert_eq!(database.storage().fire_timers(at(150)).await.unwrap(), Some(at(200)));
    assert_eq!(database.storage().fire_timers(at(150)).await.unwrap(), Some(at(200)));
    let (lease, tick) = database.take(150).await;
    assert_eq!((lease.subscriber.as_str(), lease.interface.as_str(), lease.partition.as_str()), ("plugin:p", "schedule", "timer/wait/A"));
    assert_eq!(tick.event.topic, "schedule.tick");
    assert_eq!(tick.event.who.as_ref().unwrap().id, id("A"));
    let expected = serde_json::json!({ "name": "wait", "scheduled_for": at(100).as_millis(), "data": { "$data": "bm90ZQ==" } });
    assert_eq!(tick.event.data, expected);
    assert_eq!(timer(database, "wait", Some("A")).await, Some(100), "its tick is being handled");
    assert!(matches!(database.done(&lease, &tick, None).await, Completed::Stored { .. }));
    assert_eq!(timer(database, "wait", Some("A")).await, None);
    database.storage().fire_timers(at(200)).await.unwrap();
    let (lease, tick) = database.take(200).await;
    assert_eq!(lease.partition, "timer/wait/");
    assert!(tick.event.who.is_none());
}

pub(crate) async fn setting_a_timer_again_moves_it(database: &Database) {
    database.enroll("A").await;
    apply(database, vec![set("wait", Some("A"), 100)]).await;
    apply(database, vec![set("wait", Some("A"), 300)]).await;
    assert_eq!(timer(database, "wait", Some("A")).await, Some(300));
    assert_eq!(database.storage().fire_timers(at(200)).await.unwrap(), Some(at(300)));
    database.storage().fire_timers(at(300)).await.unwrap();
    // The tick waits; the plugin moves its timer while it handles another event.
    apply(database, vec![set("wait", Some("A"), 500)]).await;
    assert_eq!(database.drain(400).await.len(), 0);
    assert_eq!(timer(database, "wait", Some("A")).await, Some(500));
    // And while it handles the tick itself, which is then done.
    database.storage().fire_timers(at(500)).await.unwrap();
    let (lease, tick) = database.take(500).await;
    let again = PluginEffects { timers: vec![set("wait", Some("A"), 900)], ..effects("p") };
    assert!(matches!(database.done(&lease, &tick, Some(again)).await, Completed::Stored { .. }));
    assert_eq!(timer(database, "wait", Some("A")).await, Some(900));
}

pub(crate) async fn cancelling_withdraws_a_tick_that_waits(database: &Database) {
    database.enroll("A").await;
    apply(database, vec![set("wait", Some("A"), 100)]).await;
    database.storage().fire_timers(at(100)).await.unwrap();
    let (lease, tick) = database.take(100).await;
    assert_eq!(apply(database, vec![cancel("wait", Some("A"), true)]).await, Applied::Done(()));
    assert_eq!(timer(database, "wait", Some("A")).await, None);
    assert!(matches!(database.done(&lease, &tick, Some(effects("p"))).await, Completed::Conflict(_)), "it was withdrawn while it was handled");
    assert!(database.storage().next_delivery(&lease, at(101)).await.unwrap().is_none());
    database.storage().release(&lease, at(102)).await.unwrap();
    assert_eq!(database.storage().outbox_due().await.unwrap(), None);
}

pub(crate) async fn a_timer_that_changed_meanwhile_is_a_conflict(database: &Database) {
    database.enroll("A").await;
    assert!(matches!(apply(database, vec![cancel("wait", None, true)]).await, Applied::Conflict(_)));
    assert_eq!(apply(database, vec![cancel("wait", None, false)]).await, Applied::Done(()));
    // What the call itself did is what it was told.
    let own = vec![set("wait", None, 100), cancel("wait", None, true), cancel("wait", None, false)];
    assert_eq!(apply(database, own).await, Applied::Done(()));
    assert_eq!(timer(database, "wait", None).await, None);
    apply(database, vec![set("wait", None, 100)]).await;
    assert!(matches!(apply(database, vec![cancel("wait", None, false)]).await, Applied::Conflict(_)));
}

fn entry(name: &str, millis: i64) -> CronEntry {
    CronEntry { tenant: default(), plugin: "p".to_owned(), name: name.to_owned(), next_due: at(millis) }
}

pub(crate) async fn cron_ticks_coalesce_while_one_waits(database: &Database) {
    let storage = database.storage();
    storage.set_cron(&default(), "p", vec![entry("hourly", 100)]).await.unwrap();
    assert_eq!(storage.due_cron(at(99)).await.unwrap(), (vec![], Some(at(100))));
    let (due, _) = storage.due_cron(at(100)).await.unwrap();
    assert_eq!(due, [entry("hourly", 100)]);
    storage.fire_cron(&due[0], at(200), at(100)).await.unwrap();
    // Another node had the same in hand.
    storage.fire_cron(&due[0], at(200), at(100)).await.unwrap();
    storage.fire_cron(&entry("hourly", 200), at(300), at(200)).await.unwrap();
    assert_eq!(storage.due_cron(at(250)).await.unwrap(), (vec![], Some(at(300))));
    let ticks = database.drain(250).await;
    assert_eq!(ticks.len(), 1);
    assert_eq!(ticks[0].event.data["scheduled_for"], at(100).as_millis());
    assert!(ticks[0].event.who.is_none());
    storage.fire_cron(&entry("hourly", 300), at(400), at(300)).await.unwrap();
    assert_eq!(database.drain(300).await.len(), 1);
}

pub(crate) async fn cron_entries_follow_the_manifest(database: &Database) {
    let storage = database.storage();
    storage.set_cron(&default(), "p", vec![entry("a", 100), entry("b", 100)]).await.unwrap();
    storage.set_cron(&default(), "p", vec![entry("b", 150), entry("c", 120)]).await.unwrap();
    let (due, _) = storage.due_cron(at(1000)).await.unwrap();
    assert_eq!(due, [entry("b", 100), entry("c", 120)]);
    storage.set_cron(&default(), "p", vec![entry("b", 50)]).await.unwrap();
    assert_eq!(storage.due_cron(at(1000)).await.unwrap().0, [entry("b", 50)]);
}
