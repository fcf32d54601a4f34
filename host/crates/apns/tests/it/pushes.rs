//! One push, and what the answers mean.

use std::time::Duration;

use uuid::Uuid;
use wasmdm_apns::{Failure, Fault, Notification, Outcome, Priority, Retry};
use wasmdm_protocol::time::Timestamp;
use wasmdm_simulator::FakeApns;
use wasmdm_simulator::apns::{Answer, Effect, FakeApnsOptions, Rule};

use crate::service::{NOW, TOPIC, certificate, client, notification, token};

/// Edge case 50. Without an expiration Apple forgets the push for a device that is away.
#[tokio::test]
async fn a_push_is_written_byte_for_byte_as_apple_wants_it() {
    let fake = FakeApns::start().unwrap();
    let apns = client(&fake);
    let certificate = certificate(&fake, TOPIC);
    let id = Uuid::from_u128(0x0123_4567_89AB_CDEF_0123_4567_89AB_CDEF);
    let push = Notification::new(vec![0xAB, 0xCD, 0x00, 0xFF].into(), "M\"A\\G\u{1}Ä".into(), id, NOW);
    assert_eq!(apns.push(&certificate, &push).await, Outcome::Accepted { apns_id: id });
    let normal = Notification { expiration: Timestamp::from_millis(-5), priority: Priority::Normal, ..push.clone() };
    assert!(apns.push(&certificate, &normal).await.is_accepted());

    let received = fake.received();
    let first = &received[0];
    assert_eq!((first.method.as_str(), first.path.as_str()), ("POST", "/3/device/abcd00ff"));
    assert_eq!(first.body, "{\"mdm\":\"M\\\"A\\\\G\\u0001Ä\"}".as_bytes());
    let headers: Vec<_> = first.headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(
        headers,
        [
            ("apns-push-type", "mdm"),
            ("apns-topic", TOPIC),
            ("apns-expiration", "1802592000"),
            ("apns-priority", "10"),
            ("apns-id", "01234567-89ab-cdef-0123-456789abcdef"),
        ]
    );
    assert_eq!(first.magic.as_deref(), Some("M\"A\\G\u{1}Ä"));
    assert_eq!(received[1].header("apns-expiration"), Some("0"));
    assert_eq!(received[1].header("apns-priority"), Some("5"));
    assert_eq!(fake.complaints(), ["apns-expiration is missing or 0: a device that is away never hears of the push"]);
    assert_eq!(fake.counters().connections, 1, "one connection carries both");
}

#[tokio::test]
async fn a_device_that_listens_is_woken_and_one_that_is_away_later() {
    let fake = FakeApns::start().unwrap();
    let apns = client(&fake);
    let certificate = certificate(&fake, TOPIC);
    let mut listening = fake.subscribe(&token(1), TOPIC);
    assert!(apns.push(&certificate, &notification(1)).await.is_accepted());
    let woken = listening.next().await.unwrap();
    assert_eq!(woken.magic.as_deref(), Some("MAGIC-1"));
    drop(listening);

    for _ in 0..3 {
        assert!(apns.push(&certificate, &notification(1)).await.is_accepted());
    }
    let mut back = fake.subscribe(&token(1), TOPIC);
    assert!(back.try_next().is_some());
    assert!(back.try_next().is_none(), "only the last one is kept");
}

/// Edge case 51. Each of Apple's answers has one meaning, which hangs on its code and not on its words.
#[tokio::test]
async fn every_answer_says_whose_fault_it_is_and_when_to_push_again() {
    const MINUTE: Retry = Retry::After(Duration::from_secs(60));
    const SOON: Retry = Retry::After(Duration::from_secs(5));
    let fake = FakeApns::start().unwrap();
    let apns = client(&fake);
    let certificate = certificate(&fake, TOPIC);
    let cases = [
        (400, "BadDeviceToken", Fault::Device, Retry::WithNewToken),
        (400, "DeviceTokenNotForTopic", Fault::Device, Retry::WithNewToken),
        (400, "TopicDisallowed", Fault::Certificate, Retry::WithNewCertificate),
        (400, "MissingTopic", Fault::Certificate, Retry::WithNewCertificate),
        (400, "BadTopic", Fault::Certificate, Retry::WithNewCertificate),
        (403, "BadCertificate", Fault::Certificate, Retry::WithNewCertificate),
        (403, "BadCertificateEnvironment", Fault::Certificate, Retry::WithNewCertificate),
        (403, "ExpiredProviderToken", Fault::Certificate, Retry::WithNewCertificate),
        (403, "InvalidProviderToken", Fault::Certificate, Retry::WithNewCertificate),
        (403, "MissingProviderToken", Fault::Certificate, Retry::WithNewCertificate),
        (403, "Forbidden", Fault::Certificate, Retry::WithNewCertificate),
        (429, "TooManyRequests", Fault::Device, MINUTE),
        (429, "TooManyProviderTokenUpdates", Fault::Server, MINUTE),
        (400, "IdleTimeout", Fault::Service, SOON),
        (500, "InternalServerError", Fault::Service, SOON),
        (503, "ServiceUnavailable", Fault::Service, SOON),
        (503, "Shutdown", Fault::Service, SOON),
        (400, "BadCollapseId", Fault::Server, Retry::Never),
        (400, "BadExpirationDate", Fault::Server, Retry::Never),
        (400, "BadMessageId", Fault::Server, Retry::Never),
        (400, "BadPriority", Fault::Server, Retry::Never),
        (400, "DuplicateHeaders", Fault::Server, Retry::Never),
        (400, "MissingDeviceToken", Fault::Server, Retry::Never),
        (400, "PayloadEmpty", Fault::Server, Retry::Never),
        (413, "PayloadTooLarge", Fault::Server, Retry::Never),
        (404, "BadPath", Fault::Server, Retry::Never),
        (405, "MethodNotAllowed", Fault::Server, Retry::Never),
        (400, "InvalidPushType", Fault::Server, Retry::Never),
    ];
    for (number, (status, reason, fault, retry)) in (1..).zip(cases) {
        fake.add_rule(Rule::for_token(&token(number), Effect::Answer(Answer::new(status, reason))));
        let outcome = apns.push(&certificate, &notification(number)).await;
        let Outcome::Rejected(rejection) = &outcome else { panic!("{reason}: {outcome:?}") };
        assert_eq!((rejection.status, rejection.reason.as_str()), (status, reason));
        assert_eq!((outcome.fault(), outcome.retry(), outcome.code()), (Some(fault), Some(retry), reason));
        assert!(outcome.to_string().starts_with(reason), "{outcome}");
        assert!(!outcome.may_have_woken());
    }
    assert_eq!(fake.counters().delivered, 0);
}

/// Edge case 51. The caller compares the time with that of the last `TokenUpdate`.
#[tokio::test]
async fn a_410_carries_its_time() {
    let fake = FakeApns::start().unwrap();
    let apns = client(&fake);
    let certificate = certificate(&fake, TOPIC);
    fake.unregister(&token(1), 1_700_000_000_456);
    fake.add_rule(Rule::for_token(&token(2), Effect::Answer(Answer::new(410, "ExpiredToken"))));
    let outcome = apns.push(&certificate, &notification(1)).await;
    assert_eq!(outcome, Outcome::Unregistered { at: Some(Timestamp::from_millis(1_700_000_000_456)) });
    assert_eq!((outcome.fault(), outcome.retry()), (Some(Fault::Device), Some(Retry::WithNewToken)));
    assert_eq!(apns.push(&certificate, &notification(2)).await, Outcome::Unregistered { at: None });
}

#[tokio::test]
async fn retry_after_is_believed_within_bounds() {
    let fake = FakeApns::start().unwrap();
    let apns = client(&fake);
    let certificate = certificate(&fake, TOPIC);
    for (number, seconds, expected) in [(1, 0, 0), (2, 7, 7), (3, u64::MAX, 24 * 3600)] {
        fake.add_rule(Rule::for_token(&token(number), Effect::Answer(Answer::new(429, "TooManyRequests").retry_after(seconds))));
        let outcome = apns.push(&certificate, &notification(number)).await;
        assert_eq!(outcome.retry(), Some(Retry::After(Duration::from_secs(expected))));
    }
}

#[tokio::test]
async fn an_unknown_reason_is_kept_as_it_came_and_judged_by_its_status() {
    let fake = FakeApns::start().unwrap();
    let apns = client(&fake);
    let certificate = certificate(&fake, TOPIC);
    let none = Answer { reason: None, ..Answer::new(502, "") };
    let cases = [
        (Answer::new(400, "NewIn2030"), "NewIn2030", Fault::Server),
        (Answer::new(403, "Strange\n\u{1b}[31mred"), "Strange\\n\\u{1b}[31mred", Fault::Certificate),
        (Answer::new(500, &"x".repeat(300)), &"x".repeat(100), Fault::Service),
        (Answer::new(429, "Slow \"down\""), "Slow \"down\"", Fault::Server),
        (none, "", Fault::Service),
    ];
    for (number, (answer, kept, fault)) in (1..).zip(cases) {
        fake.add_rule(Rule::for_token(&token(number), Effect::Answer(answer)));
        let outcome = apns.push(&certificate, &notification(number)).await;
        let Outcome::Rejected(rejection) = &outcome else { panic!("{outcome:?}") };
        assert_eq!((rejection.reason.as_str(), outcome.fault(), outcome.code()), (kept, Some(fault), "unknown"));
    }
}

/// What the service checks by itself, as Apple does.
#[tokio::test]
async fn tokens_and_topics_are_checked_by_the_service() {
    let fake = FakeApns::start_with(FakeApnsOptions { strict: true, ..FakeApnsOptions::default() }).unwrap();
    let apns = client(&fake);
    let certificate = certificate(&fake, TOPIC);
    fake.register(&token(1), TOPIC);
    fake.register(&token(2), "com.apple.mgmt.External.other");
    let mut codes = Vec::new();
    for number in 1..=3 {
        codes.push(apns.push(&certificate, &notification(number)).await.code());
    }
    assert_eq!(codes, ["accepted", "DeviceTokenNotForTopic", "BadDeviceToken"]);
}

#[tokio::test]
async fn what_cannot_be_a_push_is_not_sent() {
    let fake = FakeApns::start().unwrap();
    let apns = client(&fake);
    let certificate = certificate(&fake, TOPIC);
    let good = notification(1);
    for (push, field) in [
        (Notification { token: Vec::new().into(), ..good.clone() }, "token"),
        (Notification { token: vec![1; 101].into(), ..good.clone() }, "token"),
        (Notification { push_magic: "x".repeat(5000), ..good.clone() }, "push_magic"),
    ] {
        let outcome = apns.push(&certificate, &push).await;
        let Outcome::Failed(Failure::Unsendable(unsendable)) = &outcome else { panic!("{outcome:?}") };
        assert_eq!(unsendable.field, field);
        assert_eq!(outcome.retry(), Some(Retry::Never));
    }
    assert_eq!(fake.counters().requests, 0);
}

#[test]
fn neither_token_nor_magic_nor_key_stands_in_debug_output() {
    let fake = FakeApns::start().unwrap();
    let issued = fake.authority().issue(TOPIC).unwrap();
    let printed = format!("{:?} {:?} {issued:?}", notification(1), crate::service::ready(&issued, 1));
    assert!(!printed.contains("MAGIC") && !printed.contains("PRIVATE") && !printed.contains("token"), "{printed}");
}
