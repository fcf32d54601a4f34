//! Connections that end, refuse, stall, and are renewed.

use std::time::Duration;

use futures_util::future::{join, join_all};
use wasmdm_apns::{Apns, ApnsOptions, ClientCertificate, Endpoint, Failure, Fault, Outcome, Retry, Roots};
use wasmdm_simulator::FakeApns;
use wasmdm_simulator::apns::{Answer, Effect, FakeApnsOptions, PushCertificateRequest, Rule};

use crate::service::{TOPIC, certificate, client, notification, options, ready, token};

fn fake(options: FakeApnsOptions) -> FakeApns {
    FakeApns::start_with(options).unwrap()
}

async fn push_all(apns: &Apns, certificate: &ClientCertificate, numbers: std::ops::Range<u32>) -> Vec<Outcome> {
    join_all(numbers.map(|number| async move { apns.push(certificate, &notification(number)).await })).await
}

/// Of a certificate that another authority vouches for.
#[tokio::test]
async fn a_service_that_is_not_under_the_roots_is_not_spoken_to() {
    let fake = FakeApns::start().unwrap();
    let other = FakeApns::start().unwrap();
    let apns = Apns::new(ApnsOptions { roots: Roots::Pem(other.root_pem()), ..options(&fake) }).unwrap();
    let outcome = apns.push(&certificate(&fake, TOPIC), &notification(1)).await;
    let Outcome::Failed(Failure::Unreachable { problem, .. }) = &outcome else { panic!("{outcome:?}") };
    assert!(problem.contains("UnknownIssuer"), "{problem}");
    assert_eq!((outcome.fault(), outcome.code()), (Some(Fault::Service), "unreachable"));
    let mozilla = Apns::new(ApnsOptions { roots: Roots::Mozilla, ..options(&fake) }).unwrap();
    assert_eq!(mozilla.push(&certificate(&fake, TOPIC), &notification(1)).await.code(), "unreachable");
    assert_eq!(fake.counters().requests, 0);
}

#[tokio::test]
async fn a_service_of_another_name_is_not_spoken_to() {
    let fake = fake(FakeApnsOptions { names: vec!["push.example".into()], ..FakeApnsOptions::default() });
    let endpoint = Endpoint::parse(&format!("localhost:{}", fake.address().port())).unwrap();
    let apns = Apns::new(ApnsOptions { endpoint, ..options(&fake) }).unwrap();
    let outcome = apns.push(&certificate(&fake, TOPIC), &notification(1)).await;
    let Outcome::Failed(Failure::Unreachable { problem, .. }) = &outcome else { panic!("{outcome:?}") };
    assert!(problem.contains("not valid for name"), "{problem}");
    assert_eq!(fake.counters().requests, 0);
}

/// With TLS 1.3 the client only learns of it after its handshake is done.
#[tokio::test]
async fn an_expired_push_certificate_is_told_from_a_service_that_is_away() {
    let fake = FakeApns::start().unwrap();
    let apns = client(&fake);
    let expired = fake.authority().issue_as(&PushCertificateRequest::expired(TOPIC)).unwrap();
    let outcome = apns.push(&ready(&expired, 1), &notification(1)).await;
    let Outcome::Failed(Failure::CertificateRefused { problem, .. }) = &outcome else { panic!("{outcome:?}") };
    assert!(problem.contains("CertificateExpired"), "{problem}");
    assert_eq!((outcome.fault(), outcome.retry()), (Some(Fault::Certificate), Some(Retry::WithNewCertificate)));
    let stranger = FakeApns::start().unwrap().authority().issue(TOPIC).unwrap();
    let outcome = apns.push(&ready(&stranger, 2), &notification(1)).await;
    assert_eq!(outcome.code(), "certificate-refused", "{outcome}");

    // The renewed one works at once: what the old one has failed is forgotten.
    let renewed = fake.authority().issue(TOPIC).unwrap();
    assert!(apns.push(&ready(&renewed, 3), &notification(1)).await.is_accepted());
}

#[tokio::test]
async fn a_service_that_is_down_is_found_again_when_it_is_up() {
    let first = FakeApns::start().unwrap();
    let certificate = certificate(&first, TOPIC);
    let apns = client(&first);
    let (address, authority) = (first.address(), first.authority().clone());
    assert!(apns.push(&certificate, &notification(1)).await.is_accepted());
    drop(first);
    let outcome = apns.push(&certificate, &notification(2)).await;
    // Either the push meets the end of the connection, or it finds nobody.
    assert!(["lost", "unreachable"].contains(&outcome.code()), "{outcome}");
    let outcome = apns.push(&certificate, &notification(3)).await;
    assert_eq!(outcome.code(), "unreachable", "{outcome}");
    assert!(!outcome.may_have_woken());
    assert!(apns.topics()[0].failure.is_some());

    let second = fake(FakeApnsOptions { address, authority: Some(authority), ..FakeApnsOptions::default() });
    assert!(apns.push(&certificate, &notification(4)).await.is_accepted());
    assert_eq!(apns.topics()[0].failure, None);
    assert_eq!(second.counters().requests, 1);
}

/// Callers do not pile up behind a service that is away: between attempts they are told at once, and when the next attempt is.
#[tokio::test]
async fn between_attempts_pushes_fail_at_once_and_say_when_to_come_again() {
    let fake = FakeApns::start().unwrap();
    let certificate = certificate(&fake, TOPIC);
    let hour = Duration::from_hours(1);
    let apns = Apns::new(ApnsOptions { shortest_backoff: hour, longest_backoff: hour, ..options(&fake) }).unwrap();
    drop(fake);
    for number in 1..=3 {
        let outcome = apns.push(&certificate, &notification(number)).await;
        let Some(Retry::After(pause)) = outcome.retry() else { panic!("{outcome:?}") };
        assert_eq!(outcome.code(), "unreachable");
        // Jitter 0.5: three quarters of the hour.
        assert!(pause <= Duration::from_mins(45) && (number == 1 || pause > Duration::from_mins(44)), "{number}: {pause:?}");
    }
}

#[tokio::test]
async fn one_connection_carries_as_many_pushes_as_the_service_allows_and_then_another_is_opened() {
    let fake = fake(FakeApnsOptions { max_concurrent_streams: 10, latency: Duration::from_millis(20), ..FakeApnsOptions::default() });
    let apns = Apns::new(ApnsOptions { connections_per_topic: 3, ..options(&fake) }).unwrap();
    let outcomes = push_all(&apns, &certificate(&fake, TOPIC), 1..200).await;
    assert!(outcomes.iter().all(Outcome::is_accepted), "{outcomes:?}");
    let counters = fake.counters();
    assert_eq!(counters.connections, 3);
    assert!(counters.most_at_once <= 30, "{counters:?}");
}

#[tokio::test]
async fn more_than_may_wait_are_refused_at_once() {
    let fake = fake(FakeApnsOptions { max_concurrent_streams: 1, latency: Duration::from_millis(5), ..FakeApnsOptions::default() });
    let apns = Apns::new(ApnsOptions { connections_per_topic: 1, waiting_per_topic: 5, ..options(&fake) }).unwrap();
    let outcomes = push_all(&apns, &certificate(&fake, TOPIC), 1..21).await;
    let (accepted, overloaded): (Vec<_>, Vec<_>) = outcomes.iter().partition(|outcome| outcome.is_accepted());
    assert_eq!((accepted.len(), overloaded.len()), (5, 15));
    assert!(overloaded.iter().all(|outcome| outcome.code() == "overloaded"));
}

/// NanoMDM's library panicked on a GOAWAY once.
#[tokio::test]
async fn pushes_behind_a_goaway_go_out_again_on_another_connection_and_none_twice() {
    let fake = fake(FakeApnsOptions { go_away_after: Some(25), latency: Duration::from_millis(5), ..FakeApnsOptions::default() });
    let apns = client(&fake);
    let outcomes = push_all(&apns, &certificate(&fake, TOPIC), 1..101).await;
    let refused = outcomes.iter().filter(|outcome| outcome.code() == "refused").count();
    assert!(outcomes.iter().all(|outcome| outcome.is_accepted() || outcome.code() == "refused"), "{outcomes:?}");
    // A hundred pushes at once meet a GOAWAY after each 25: the fourth connection takes the last of them.
    assert_eq!(refused, 0);
    assert_eq!(fake.counters().delivered, 100);
    assert_eq!(fake.received().len(), 100, "what came behind a GOAWAY was not looked at");
    assert_eq!(fake.counters().connections, 4);
}

#[tokio::test]
async fn a_service_that_only_refuses_is_not_asked_for_ever() {
    let fake = FakeApns::start().unwrap();
    fake.add_rule(Rule::always(Effect::RefuseStream));
    let apns = client(&fake);
    let outcome = apns.push(&certificate(&fake, TOPIC), &notification(1)).await;
    assert_eq!(outcome.code(), "refused", "{outcome}");
    assert!(!outcome.may_have_woken());
    assert_eq!(fake.counters().requests, 6);
}

/// Apple may say it when it closes the connection instead of in an answer.
#[tokio::test]
async fn a_goaway_because_of_the_certificate_is_told_from_any_other() {
    let fake = FakeApns::start().unwrap();
    let apns = client(&fake);
    let certificate = certificate(&fake, TOPIC);
    fake.add_rule(Rule::for_token(&token(1), Effect::Dismiss("BadCertificateEnvironment".into())).times(1));
    fake.add_rule(Rule::for_token(&token(2), Effect::Dismiss("IdleTimeout".into())).times(1));
    let hour = Duration::from_hours(1);
    let patient = Apns::new(ApnsOptions { shortest_backoff: hour, longest_backoff: hour, ..options(&fake) }).unwrap();
    let outcome = patient.push(&certificate, &notification(1)).await;
    let Outcome::Failed(Failure::CertificateRefused { problem, .. }) = &outcome else { panic!("{outcome:?}") };
    assert!(problem.contains("BadCertificateEnvironment"), "{problem}");
    assert!(!outcome.may_have_woken());
    assert!(apns.push(&certificate, &notification(2)).await.is_accepted(), "over a new connection");
    assert_eq!(fake.counters().delivered, 1);
}

#[tokio::test]
async fn a_503_makes_the_client_connect_anew() {
    let fake = FakeApns::start().unwrap();
    let apns = client(&fake);
    let certificate = certificate(&fake, TOPIC);
    fake.add_rule(Rule::for_token(&token(2), Effect::Answer(Answer::new(503, "ServiceUnavailable"))).times(1));
    assert!(apns.push(&certificate, &notification(1)).await.is_accepted());
    assert_eq!(apns.push(&certificate, &notification(2)).await.code(), "ServiceUnavailable");
    assert!(apns.push(&certificate, &notification(2)).await.is_accepted());
    let connections: Vec<_> = fake.received().iter().map(|received| received.connection).collect();
    assert_eq!(connections, [1, 1, 2]);
}

#[tokio::test]
async fn a_cut_connection_leaves_its_pushes_undecided_and_the_next_push_connects_anew() {
    let fake = FakeApns::start().unwrap();
    let apns = client(&fake);
    let certificate = certificate(&fake, TOPIC);
    fake.add_rule(Rule::for_token(&token(1), Effect::Cut).times(1));
    let outcome = apns.push(&certificate, &notification(1)).await;
    assert_eq!(outcome.code(), "lost", "{outcome}");
    assert!(outcome.may_have_woken());
    assert_eq!(outcome.retry(), Some(Retry::After(Duration::ZERO)));
    assert!(apns.push(&certificate, &notification(1)).await.is_accepted());
    let ids: Vec<_> = fake.received().iter().map(|received| received.header("apns-id").unwrap().to_owned()).collect();
    assert_eq!(ids[0], ids[1], "the same push");
}

#[tokio::test]
async fn a_push_without_an_answer_ends_at_its_time_and_others_go_on() {
    let fake = FakeApns::start().unwrap();
    let apns = Apns::new(ApnsOptions { push_timeout: Duration::from_secs(2), ..options(&fake) }).unwrap();
    let certificate = certificate(&fake, TOPIC);
    fake.add_rule(Rule::for_token(&token(1), Effect::Silence));
    let outcome = apns.push(&certificate, &notification(1)).await;
    assert_eq!(outcome, Outcome::Failed(Failure::TimedOut { limit: Duration::from_secs(2), sent: true }));
    assert!(outcome.may_have_woken());
    assert!(apns.push(&certificate, &notification(2)).await.is_accepted());
    assert_eq!(fake.counters().connections, 1, "the service still answers PINGs, so the connection is kept");
}

/// A listener that accepts and says nothing, as a middlebox that has forgotten the connection.
#[tokio::test]
async fn a_service_that_never_speaks_is_given_up() {
    let fake = FakeApns::start().unwrap();
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = Endpoint::parse(&silent.local_addr().unwrap().to_string()).unwrap();
    let apns = Apns::new(ApnsOptions { endpoint, connect_timeout: Duration::from_millis(50), ..options(&fake) }).unwrap();
    let outcome = apns.push(&certificate(&fake, TOPIC), &notification(1)).await;
    let Outcome::Failed(Failure::Unreachable { problem, .. }) = &outcome else { panic!("{outcome:?}") };
    assert!(problem.contains("50ms"), "{problem}");
}

/// The bytes of a connection get lost without an end: only a PING finds out.
#[tokio::test]
async fn a_connection_that_died_silently_is_found_by_a_ping() {
    let fake = FakeApns::start().unwrap();
    let relay = crate::relay::Relay::to(fake.address());
    let endpoint = Endpoint::parse(&format!("localhost:{}", relay.port())).unwrap();
    let (keep_alive, ping_timeout) = (Duration::from_millis(100), Duration::from_secs(1));
    let apns = Apns::new(ApnsOptions { endpoint, keep_alive, ping_timeout, ..options(&fake) }).unwrap();
    let certificate = certificate(&fake, TOPIC);
    assert!(apns.push(&certificate, &notification(1)).await.is_accepted());
    relay.swallow();
    // It ends by the PING long before its own time of thirty seconds, and says that nobody knows.
    let outcome = apns.push(&certificate, &notification(2)).await;
    assert_eq!(outcome.code(), "lost", "{outcome}");
    assert!(apns.push(&certificate, &notification(3)).await.is_accepted(), "over a new connection");
}

/// With pushes under way it took the time of a push, thirty seconds, before anybody doubted, and all that time the others went there too.
#[tokio::test]
async fn a_connection_that_died_in_the_middle_of_work_is_found_within_16_seconds() {
    let fake = FakeApns::start().unwrap();
    let relay = crate::relay::Relay::to(fake.address());
    let endpoint = Endpoint::parse(&format!("localhost:{}", relay.port())).unwrap();
    let roots = Roots::Pem(fake.root_pem());
    let apns = Apns::new(ApnsOptions { endpoint, roots, ..ApnsOptions::new(std::sync::Arc::new(|| 0.5)) }).unwrap();
    let certificate = certificate(&fake, TOPIC);
    assert!(apns.push(&certificate, &notification(1)).await.is_accepted());
    relay.swallow();
    // Nothing comes any more, so the clock may run as fast as it can.
    tokio::time::pause();
    let begin = tokio::time::Instant::now();
    let outcome = apns.push(&certificate, &notification(2)).await;
    assert_eq!(outcome.code(), "lost", "{outcome}");
    assert!(begin.elapsed() <= Duration::from_secs(16), "{:?}", begin.elapsed());
    tokio::time::resume();
    assert!(apns.push(&certificate, &notification(3)).await.is_accepted(), "over a new connection");
}

#[tokio::test]
async fn a_connection_that_nobody_needs_is_closed() {
    let fake = FakeApns::start().unwrap();
    let short = Duration::from_millis(10);
    let apns = Apns::new(ApnsOptions { keep_alive: short, idle_timeout: short * 2, ..options(&fake) }).unwrap();
    let certificate = certificate(&fake, TOPIC);
    assert!(apns.push(&certificate, &notification(1)).await.is_accepted());
    while apns.topics()[0].connections > 0 {
        tokio::task::yield_now().await;
    }
    assert!(apns.push(&certificate, &notification(2)).await.is_accepted());
    assert_eq!(fake.counters().connections, 2);
}

#[tokio::test]
async fn a_renewed_certificate_is_used_at_once_and_the_old_ones_pushes_end_where_they_are() {
    let fake = FakeApns::start().unwrap();
    let apns = client(&fake);
    let (old, new) = (fake.authority().issue(TOPIC).unwrap(), fake.authority().issue(TOPIC).unwrap());
    let (first, second) = (ready(&old, 1), ready(&new, 2));
    fake.add_rule(Rule::for_token(&token(1), Effect::Delay(Duration::from_millis(50))));
    let renewal = async {
        while fake.counters().requests == 0 {
            tokio::task::yield_now().await;
        }
        assert!(apns.push(&second, &notification(2)).await.is_accepted());
        // Someone who has not heard of the renewal yet is served with the new one too.
        assert!(apns.push(&first, &notification(3)).await.is_accepted());
    };
    let slow = notification(1);
    let (slow, ()) = join(apns.push(&first, &slow), renewal).await;
    assert!(slow.is_accepted());
    let serials: Vec<_> = fake.received().iter().map(|received| received.serial.clone()).collect();
    assert_eq!(serials, [old.serial, new.serial.clone(), new.serial]);
    assert_eq!(apns.topics()[0].version, 2);
}

#[tokio::test]
async fn closing_lets_pushes_under_way_end_and_takes_no_more() {
    let fake = fake(FakeApnsOptions { latency: Duration::from_millis(50), ..FakeApnsOptions::default() });
    let apns = client(&fake);
    let certificate = certificate(&fake, TOPIC);
    let closing = async {
        while fake.counters().requests == 0 {
            tokio::task::yield_now().await;
        }
        apns.close().await;
    };
    let slow = notification(1);
    let (slow, ()) = join(apns.push(&certificate, &slow), closing).await;
    assert!(slow.is_accepted());
    assert_eq!(apns.push(&certificate, &notification(2)).await, Outcome::Failed(Failure::Closed));
}

#[test]
fn wrong_options_are_named() {
    let fake = FakeApns::start().unwrap();
    for (options, problem) in [
        (ApnsOptions { connections_per_topic: 0, ..options(&fake) }, "connections_per_topic"),
        (ApnsOptions { roots: Roots::Pem("nothing".into()), ..options(&fake) }, "roots: "),
    ] {
        assert!(Apns::new(options).unwrap_err().to_string().starts_with(problem));
    }
    for wrong in ["", "https://api.push.apple.com", "host:port", "host:70000", "host:0", "a b", "user@host", "host:"] {
        assert!(Endpoint::parse(wrong).is_err(), "{wrong}");
    }
    for (text, shown, port) in
        [("api.push.apple.com", "api.push.apple.com", 443), ("a.example:2197", "a.example:2197", 2197), ("[::1]:8443", "[::1]:8443", 8443)]
    {
        let endpoint = Endpoint::parse(text).unwrap();
        assert_eq!((endpoint.to_string().as_str(), endpoint.port()), (shown, port));
    }
    assert_eq!(Endpoint::default().to_string(), "api.push.apple.com");
}
