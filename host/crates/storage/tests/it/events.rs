use crate::fixture::*;
use bytes::Bytes;
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_protocol::report::Status;
use wasmdm_storage::commands::CommandOptions;
use wasmdm_storage::outbox::Subscription;

pub(crate) async fn nothing_is_written_without_a_subscription(database: &Database) {
    database.subscribe("plugin:p", &["enrollment.checked-out"]).await;
    database.enroll("A").await;
    database.queue("A", "C1").await;
    database.poll("A").await;
    database.report("A", "C1", Status::Acknowledged).await;
    assert_eq!(database.count_rows("events").await, 0);
    assert_eq!(database.storage().outbox_due().await.unwrap(), None);
    assert!(database.claim(1000).await.is_empty());
}

pub(crate) async fn the_life_of_a_device_as_events(database: &Database) {
    database.subscribe("plugin:p", &["*", "checkin.*"]).await;
    let mut message = authenticate("A", "A", 0);
    message.decisions = serde_json::json!([{ "plugin": "guard", "verdict": "allow" }]);
    database.try_authenticate(message).await;
    database.token_update("A", 1).await;
    database.token_update("A", 2).await;
    let mut rotated = token_update("A", 3);
    rotated.token = Bytes::from_static(b"another");
    database.storage().token_update(rotated).await.unwrap();
    database.enroll_user("A", "jo").await;
    database.storage().set_bootstrap_token(&default(), &id("A"), Some(Bytes::from_static(b"t")), Some(true), at(4)).await.unwrap();
    database.authenticate("A", 5).await;
    database.token_update("A", 6).await;
    database.storage().check_out(&default(), &id("A"), Bytes::new(), at(7)).await.unwrap();

    let events: Vec<_> = database.drain(50).await.into_iter().map(|delivery| delivery.event).collect();

    let topics: Vec<_> = events.iter().map(|event| event.topic.as_str()).collect();
    assert_eq!(
        topics,
        [
            "enrollment.enrolling",
            "checkin.Authenticate",
            "enrollment.enrolled",
            "checkin.TokenUpdate",
            "checkin.TokenUpdate",
            "push-token.rotated",
            "checkin.TokenUpdate",
            "user.enrolled",
            "checkin.TokenUpdate",
            "bootstrap-token.escrowed",
            "configuration.awaiting",
            "checkin.SetBootstrapToken",
            "enrollment.enrolling",
            "checkin.Authenticate",
            "enrollment.enrolled",
            "checkin.TokenUpdate",
            "enrollment.checked-out",
            "checkin.CheckOut",
        ]
    );
    assert_eq!(events[0].data["re_enrolling"], false);
    assert_eq!(events[0].data["decisions"][0]["plugin"], "guard");
    assert_eq!(events[0].data["message"]["UDID"], "A");
    assert_eq!(events[2].data["re_enrolling"], false);
    assert_eq!(events[14].data["re_enrolling"], true);
    assert_eq!(events[7].who.as_ref().unwrap().id, id("A:jo"), "a user's events stand in its device's partition");
    let mut ids: Vec<_> = events.iter().map(|event| event.id.as_str()).collect();
    ids.dedup();
    assert_eq!(ids.len(), events.len());
}

pub(crate) async fn the_life_of_a_command_as_events(database: &Database) {
    database.subscribe("plugin:p", &["command.*"]).await;
    database.enroll("A").await;
    for uuid in ["C1", "C2", "C3"] {
        database.queue("A", uuid).await;
    }
    database.poll("A").await;
    database.report("A", "C1", Status::NotNow).await;
    database.report("A", "C2", Status::Error).await;
    database.report("A", "C3", Status::CommandFormatError).await;
    database.storage().cancel_command(&default(), &id("A"), "C1", at(40)).await.unwrap();
    let deliveries = database.drain(50).await;
    let said: Vec<_> =
        deliveries.iter().map(|delivery| (delivery.event.topic.as_str(), delivery.event.data["command"]["uuid"].as_str().unwrap())).collect();
    assert_eq!(
        said,
        [
            ("command.queued", "C1"),
            ("command.queued", "C2"),
            ("command.queued", "C3"),
            ("command.sent", "C1"),
            ("command.not-now", "C1"),
            ("command.sent", "C2"),
            ("command.errored", "C2"),
            ("command.sent", "C3"),
            ("command.format-error", "C3"),
            ("command.cancelled", "C1"),
        ]
    );
    let errored = &deliveries[6].event.data["command"];
    assert_eq!(errored["request_type"], "DeviceInformation");
    assert_eq!(errored["status"], "Error");
    assert_eq!(errored["origin"], "api:test");
    assert_eq!(errored["report"]["CommandUUID"], "C2");
    assert_eq!(errored["error_chain"][0]["ErrorCode"], 12021);
    assert_eq!(deliveries[6].event.hops, 0);
}

pub(crate) async fn topics_filter_by_request_type_and_the_star_leaves_out_raw_ones(database: &Database) {
    database.subscribe("plugin:star", &["*"]).await;
    database.subscribe("plugin:typed", &["command.acknowledged:SecurityInfo"]).await;
    database.enroll("A").await;
    for (uuid, request_type) in [("C1", "SecurityInfo"), ("C2", "DeviceLock")] {
        database.queue_with("A", uuid, request_type, CommandOptions::default(), "api:test").await;
        database.poll("A").await;
        database.report("A", uuid, Status::Acknowledged).await;
    }
    let (mut star, mut typed) = (Vec::new(), Vec::new());
    for lease in database.claim(50).await {
        while let Some(delivery) = database.storage().next_delivery(&lease, at(50)).await.unwrap() {
            database.done(&lease, &delivery, None).await;
            let of = if lease.subscriber == "plugin:star" { &mut star } else { &mut typed };
            of.push(delivery.event);
        }
    }
    assert!(star.iter().all(|event| !event.topic.starts_with("checkin.")));
    assert_eq!(star.len(), 8);
    assert_eq!(typed.len(), 1);
    assert_eq!(typed[0].data["command"]["uuid"], "C1");
    assert!(star.iter().any(|event| event.id == typed[0].id), "one event, two deliveries");
}

pub(crate) async fn an_event_keeps_the_enrollment_as_it_was(database: &Database) {
    database.subscribe("plugin:p", &["enrollment.*"]).await;
    let mut message = authenticate("A", "A", 0);
    message.url_params.insert("site".to_owned(), "north".to_owned());
    message.tags = vec!["lab".to_owned()];
    database.try_authenticate(message).await;
    database.token_update("A", 1).await;
    let deliveries = database.drain(50).await;
    let who = deliveries[0].event.who.as_ref().unwrap();
    assert_eq!(who.facts["state"], "enrolling");
    assert_eq!(who.facts["tags"], serde_json::json!(["lab"]));
    assert_eq!(who.facts["url_params"]["site"], "north");
    assert_eq!(who.facts["serial_number"], "S-A");
    assert_eq!(who.facts["certificate"]["issuer"], "CN=authority");
    assert_eq!(deliveries[0].event.at, at(0));
    assert_eq!(deliveries[1].event.who.as_ref().unwrap().facts["state"], "enrolled");
}

pub(crate) async fn secrets_do_not_stand_in_events(database: &Database) {
    database.subscribe("plugin:p", &["*", "checkin.*"]).await;
    database.enroll("A").await;
    database.storage().set_bootstrap_token(&default(), &id("A"), Some(Bytes::from_static(b"secret-bootstrap")), None, at(2)).await.unwrap();
    let deliveries = database.drain(50).await;
    assert_eq!(deliveries.len(), 6);
    for delivery in &deliveries {
        assert!(!delivery.event.data.to_string().contains("secret"), "{}", delivery.event.data);
    }
    assert_eq!(deliveries[3].event.data["message"]["Token"], serde_json::json!({ "$redacted": true }));
    assert_eq!(deliveries[5].event.data["message"]["BootstrapToken"], serde_json::json!({ "$redacted": true }));
}

pub(crate) async fn clearing_a_queue_tells_of_each_command(database: &Database) {
    database.subscribe("plugin:p", &["command.cancelled"]).await;
    database.enroll("A").await;
    database.enroll_user("A", "jo").await;
    database.queue("A", "C1").await;
    database.queue("A:jo", "C2").await;
    database.authenticate("A", 40).await;
    let deliveries = database.drain(50).await;
    let about: Vec<_> = deliveries.iter().map(|delivery| delivery.event.who.as_ref().unwrap().id.as_str()).collect();
    assert_eq!(about, ["A", "A:jo"]);
}

pub(crate) async fn subscriptions_are_of_one_tenant_and_survive_a_restart(database: &Database) {
    let other = TenantId::new("other");
    let storage = database.storage();
    storage.create_tenant(&other, at(0)).await.unwrap();
    let subscription = Subscription { interface: "event-sink".to_owned(), topics: vec!["*".to_owned()], include_self: false };
    storage.set_subscriptions(&other, "plugin:other", vec![subscription.clone()], at(0)).await.unwrap();
    storage.set_subscriptions(&default(), "webhook:w", vec![subscription], at(0)).await.unwrap();
    database.subscribe("plugin:p", &["enrollment.enrolled"]).await;
    database.restart().await;
    database.enroll("A").await;
    let subscribers: Vec<_> = database.claim(50).await.into_iter().map(|lease| lease.subscriber).collect();
    assert_eq!(subscribers.len(), 2);
    assert!(!subscribers.contains(&"plugin:other".to_owned()));
    assert_eq!(database.storage().subscribers(&default(), "plugin:").await.unwrap(), ["plugin:p"]);
    database.storage().set_subscriptions(&default(), "plugin:p", vec![], at(60)).await.unwrap();
    assert_eq!(database.storage().subscribers(&default(), "plugin:").await.unwrap().len(), 0);
    assert_eq!(database.count_rows("deliveries").await, 3, "what waits stays");
}
