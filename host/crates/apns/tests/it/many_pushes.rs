//! Ten thousand pushes over three topics while everything goes wrong that can.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream};
use wasmdm_apns::{Apns, ClientCertificate, Outcome, Retry};
use wasmdm_protocol::time::Timestamp;
use wasmdm_simulator::apns::{Answer, Effect, FakeApns, FakeApnsOptions, IssuedPushCertificate, Rule};

use crate::service::{notification, options, ready, token};

const PUSHES: u32 = 10_000;
const AT_ONCE: usize = 400;
const TOPICS: u32 = 3;
/// No device needs more attempts, unless pushes starve.
const MOST_ATTEMPTS: u32 = 40;
const LEFT_AT: i64 = 1_700_000_000_000;

/// What became of one device.
struct Told {
    number: u32,
    last: Outcome,
    /// How often nobody can know whether it was woken.
    undecided: usize,
    /// Whether it was begun after the certificates were renewed.
    is_renewed: bool,
    took: Duration,
}

struct Topic {
    name: String,
    issued: [IssuedPushCertificate; 2],
    ready: [ClientCertificate; 2],
}

impl Topic {
    fn new(fake: &FakeApns, number: u32) -> Self {
        let name = format!("com.apple.mgmt.External.{number:08}-0000-0000-0000-000000000000");
        let issued = [1, 2].map(|_| fake.authority().issue(&name).unwrap());
        let ready = [ready(&issued[0], 1), ready(&issued[1], 2)];
        Self { name, issued, ready }
    }
}

fn left(number: u32) -> bool {
    number % 500 == 7
}

fn misaddressed(number: u32) -> bool {
    number % 1000 == 11
}

fn refused_for_good(number: u32) -> bool {
    number % 1000 == 13
}

/// Every device is reached, or ends with a reason; nobody is told twice but where an answer was lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_pushes_arrive_once_or_end_with_a_reason() {
    let fake = FakeApns::start_with(FakeApnsOptions { latency: Duration::from_millis(2), remembered: 40_000, ..FakeApnsOptions::default() }).unwrap();
    let apns = Apns::new(options(&fake)).unwrap();
    let topics: Vec<_> = (0..TOPICS).map(|number| Topic::new(&fake, number)).collect();
    for number in 0..PUSHES {
        if left(number) {
            fake.unregister(&token(number), LEFT_AT);
        } else if misaddressed(number) {
            fake.add_rule(Rule::for_token(&token(number), Effect::Answer(Answer::new(400, "BadDeviceToken"))));
        } else if refused_for_good(number) {
            fake.add_rule(Rule::for_token(&token(number), Effect::Answer(Answer::new(400, "NotInTheBook"))));
        }
    }
    for (every, effect) in [
        (97, Effect::Answer(Answer::new(429, "TooManyRequests").retry_after(0))),
        (101, Effect::Answer(Answer::new(429, "TooManyRequests"))),
        (211, Effect::Answer(Answer::new(503, "ServiceUnavailable"))),
        (307, Effect::Answer(Answer::new(500, "InternalServerError"))),
        (401, Effect::RefuseStream),
        (503, Effect::GoAway),
        (997, Effect::Delay(Duration::from_millis(50))),
        (1_499, Effect::Cut),
    ] {
        fake.add_rule(Rule::always(effect).every(every));
    }

    let ended = AtomicUsize::new(0);
    let told: Vec<Told> = stream::iter(0..PUSHES)
        .map(|number| {
            let (apns, ended) = (&apns, &ended);
            let topic = &topics[usize::try_from(number % TOPICS).unwrap()];
            async move {
                let is_renewed = ended.load(Ordering::Relaxed) >= 5_000;
                let told = tell(apns, &topic.ready[usize::from(is_renewed)], number, is_renewed).await;
                ended.fetch_add(1, Ordering::Relaxed);
                told
            }
        })
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;

    let mut codes = BTreeMap::new();
    for one in &told {
        *codes.entry(one.last.code()).or_insert(0) += 1;
        let expected = match one.number {
            number if left(number) => "Unregistered",
            number if misaddressed(number) => "BadDeviceToken",
            number if refused_for_good(number) => "unknown",
            _ => "accepted",
        };
        assert_eq!(one.last.code(), expected, "device {}: {}", one.number, one.last);
    }
    assert_eq!(codes, BTreeMap::from([("accepted", 9_960), ("Unregistered", 20), ("BadDeviceToken", 10), ("unknown", 10)]));
    assert!(told.iter().filter(|one| left(one.number)).all(|one| one.last == Outcome::Unregistered { at: Some(Timestamp::from_millis(LEFT_AT)) }));

    let received = fake.received();
    assert_eq!(fake.counters().requests, received.len() as u64, "all of them are remembered");
    let mut delivered: HashMap<&[u8], usize> = HashMap::new();
    for one in received.iter().filter(|one| one.delivered) {
        *delivered.entry(one.token.as_deref().unwrap()).or_default() += 1;
    }
    let mut twice = 0;
    for one in &told {
        let times = delivered.get(token(one.number).as_slice()).copied().unwrap_or_default();
        if one.last.is_accepted() {
            assert!(times >= 1, "device {} was never told", one.number);
            assert!(times <= 1 + one.undecided, "device {} was told {times} times, {} undecided", one.number, one.undecided);
        } else {
            assert_eq!(times, 0);
        }
        twice += times.saturating_sub(1);
    }
    let undecided: usize = told.iter().map(|one| one.undecided).sum();
    // The cuts really happened, and cost no more than what was on the wire.
    assert!(undecided > 0 && twice <= undecided, "{twice} told again, {undecided} undecided");

    assert_eq!(fake.complaints(), Vec::<String>::new(), "every request was as Apple wants it");
    let serials: HashMap<&str, &Topic> =
        topics.iter().flat_map(|topic| topic.issued.iter().map(move |issued| (issued.serial.as_str(), topic))).collect();
    let renewed: HashSet<&str> = topics.iter().map(|topic| topic.issued[1].serial.as_str()).collect();
    let begun_renewed: HashSet<Vec<u8>> = told.iter().filter(|one| one.is_renewed).map(|one| token(one.number)).collect();
    assert!(begun_renewed.len() > 4_000);
    for one in &received {
        assert_eq!(one.header("apns-topic"), Some(serials[one.serial.as_str()].name.as_str()));
        assert!(renewed.contains(one.serial.as_str()) || !begun_renewed.contains(one.token.as_deref().unwrap()), "the old certificate lived on");
    }
    for state in apns.topics() {
        assert_eq!((state.version, state.waiting, state.in_flight), (2, 0, 0));
    }

    let mut times: Vec<_> = told.iter().map(|one| one.took).collect();
    times.sort();
    let (median, slowest) = (times[times.len() / 2], times[times.len() - 1]);
    println!("{} requests, {undecided} undecided, {twice} told twice, median {median:?}, slowest {slowest:?}", received.len());
    assert!(slowest < Duration::from_secs(30), "no push waited for its timeout: {slowest:?}");
}

/// One device, until it is told or there is no use in trying. The times to wait are taken as passed.
async fn tell(apns: &Apns, certificate: &ClientCertificate, number: u32, is_renewed: bool) -> Told {
    let begin = Instant::now();
    let push = notification(number);
    let mut undecided = 0;
    for _ in 0..MOST_ATTEMPTS {
        let outcome = apns.push(certificate, &push).await;
        if !outcome.is_accepted() && outcome.may_have_woken() {
            undecided += 1;
        }
        if !matches!(outcome.retry(), Some(Retry::After(_))) {
            return Told { number, last: outcome, undecided, is_renewed, took: begin.elapsed() };
        }
    }
    panic!("device {number} was never told");
}
