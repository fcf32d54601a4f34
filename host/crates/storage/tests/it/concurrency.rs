use crate::fixture::*;
use std::collections::{HashMap, HashSet};
use std::time::Duration;
use tokio::task::JoinSet;
use wasmdm_protocol::report::Status;
use wasmdm_storage::commands::{CommandOptions, Enqueue, EnqueueOutcome, Offer};
use wasmdm_storage::outbox::Claim;

pub(crate) async fn two_polls_at_once_send_a_command_once(database: &Database) {
    database.enroll("A").await;
    for round in 0..20 {
        let uuid = format!("C{round}");
        database.queue("A", &uuid).await;
        let storage = database.storage();
        let tenant = default();
        let device = id("A");
        let (one, two) =
            tokio::join!(storage.poll(&tenant, &device, Offer::default(), at(20)), storage.poll(&tenant, &device, Offer::default(), at(20)));
        let sent = [one.unwrap(), two.unwrap()].into_iter().flatten().collect::<Vec<_>>();
        assert_eq!(sent.len(), 1);
        assert_eq!(sent[0].uuid, uuid);
        database.report("A", &uuid, Status::Acknowledged).await;
    }
}

pub(crate) async fn parallel_enqueues_keep_their_order_and_lose_nothing(database: &Database) {
    database.enroll("A").await;
    let mut callers = JoinSet::new();
    for caller in 0..10 {
        let storage = database.storage();
        callers.spawn(async move {
            for number in 0..10 {
                let enqueue = Enqueue {
                    tenant: default(),
                    targets: vec![id("A")],
                    command: command(&format!("{caller}-{number}"), "DeviceInformation"),
                    options: CommandOptions::default(),
                    origin: "api:test".to_owned(),
                    now: at(10),
                };
                assert!(matches!(storage.enqueue(enqueue).await.unwrap()[..], [EnqueueOutcome::Queued { .. }]));
            }
        });
    }
    while let Some(done) = callers.join_next().await {
        done.unwrap();
    }
    let mut next = [0; 10];
    let mut uuid = database.poll("A").await;
    let mut seen = 0;
    while let Some(sent) = uuid {
        let (caller, number) = sent.split_once('-').unwrap();
        let caller: usize = caller.parse().unwrap();
        assert_eq!(number.parse::<usize>().unwrap(), next[caller], "each caller's commands come in its order");
        next[caller] += 1;
        seen += 1;
        uuid = database.report("A", &sent, Status::Acknowledged).await.1;
    }
    assert_eq!(seen, 100);
}

pub(crate) async fn two_workers_never_hold_one_partition(database: &Database) {
    database.subscribe("plugin:p", &["enrollment.*"]).await;
    for device in 0..40 {
        database.enroll(&format!("D{device}")).await;
    }
    let mut workers = JoinSet::new();
    for worker in 0..4 {
        let storage = database.storage();
        workers.spawn(async move {
            let mut held = Vec::new();
            loop {
                let owner = format!("worker-{worker}");
                let claim = Claim { owner, limit: 3, share: 3, shares: HashMap::new(), lease: Duration::from_secs(30), now: at(50) };
                let leases = storage.claim(claim).await.unwrap();
                if leases.is_empty() {
                    return held;
                }
                held.extend(leases.into_iter().map(|lease| lease.partition));
            }
        });
    }
    let mut partitions = Vec::new();
    while let Some(held) = workers.join_next().await {
        partitions.extend(held.unwrap());
    }
    assert_eq!(partitions.len(), 40);
    assert_eq!(partitions.into_iter().collect::<HashSet<_>>().len(), 40);
}
