use serde_json::json;
use wasmdm_plugin::kv::Precondition;
use wasmdm_plugin::{Failure, NewCommand, commands, enrollments, http, kv, mock, runtime, timers};

#[test]
fn a_failed_call_leaves_nothing_but_its_log_and_its_requests() {
    let host = mock::Host::new();
    kv::put("kept", b"1").unwrap();
    host.respond(mock::response(200, ""));
    let outcome: Result<(), Failure> = host.call(|| {
        kv::put("lost", b"2")?;
        kv::remove("kept")?;
        timers::set("lost", runtime::now(), None, b"")?;
        commands::enqueue_for("UDID-1", &commands::plain("SecurityInfo"))?;
        http::get("https://example").send()?;
        wasmdm_plugin::warn!("about to fail");
        Err(Failure::unavailable("no"))
    });
    assert_eq!(outcome.unwrap_err().code, "unavailable");
    assert_eq!(host.pairs().keys().collect::<Vec<_>>(), ["kept"]);
    assert!(host.timers().is_empty() && host.enqueued().is_empty());
    assert_eq!((host.requests().len(), host.logs().len()), (1, 1));
}

#[test]
fn put_if_answers_conflict_when_the_version_is_another() {
    let _host = mock::Host::new();
    let first = kv::put_if("k", b"1", &Precondition::Absent, None).unwrap();
    let second = kv::put_if("k", b"2", &Precondition::Version(first.clone()), None).unwrap();
    assert_ne!(first, second);
    let refused = kv::put_if("k", b"3", &Precondition::Version(first), None).unwrap_err();
    assert_eq!((refused.code.as_str(), refused.retryable), ("conflict", true));
    assert_eq!(kv::get("k").unwrap().unwrap(), b"2");
}

#[test]
fn a_value_is_forgotten_after_its_time() {
    let host = mock::Host::new();
    kv::put_for("k", b"1", 60).unwrap();
    host.advance(59_999);
    assert!(kv::get("k").unwrap().is_some());
    host.advance(1);
    assert!(kv::get("k").unwrap().is_none() && host.pairs().is_empty());
}

#[test]
fn scan_follows_pages_to_the_end() {
    let host = mock::Host::new();
    host.set_limits(mock::Limits { host_calls: 10_000, ..Default::default() });
    for number in 0..2_500 {
        kv::put(&format!("in/{number:04}"), b"").unwrap();
    }
    kv::put("out", b"").unwrap();
    let keys: Vec<String> = kv::scan("in/").map(|pair| pair.unwrap().key).collect();
    assert_eq!(keys.len(), 2_500);
    assert!(keys.is_sorted());
}

#[test]
fn counters_begin_at_zero_and_read_as_digits() {
    let _host = mock::Host::new();
    assert_eq!(kv::add("n", 5).unwrap(), 5);
    assert_eq!(kv::add("n", -2).unwrap(), 3);
    assert_eq!(kv::get("n").unwrap().unwrap(), b"3");
}

#[test]
fn the_same_idempotency_key_queues_once_per_enrollment() {
    let host = mock::Host::new();
    let command = commands::plain("SecurityInfo").idempotency_key("once");
    let first = commands::enqueue_for("UDID-1", &command).unwrap();
    assert_eq!(commands::enqueue_for("UDID-1", &command).unwrap(), first);
    assert_ne!(commands::enqueue_for("UDID-2", &command).unwrap(), first);
    assert_eq!(host.enqueued().len(), 2);
}

#[test]
fn a_command_without_request_type_is_invalid() {
    let _host = mock::Host::new();
    let failure = commands::enqueue_for("UDID-1", &NewCommand::json(&json!({}))).unwrap_err();
    assert_eq!(failure.code, "invalid");
}

#[test]
fn a_timer_set_again_moves_and_fires_once() {
    let host = mock::Host::new();
    timers::set("t", host.now() + 10, Some("UDID-1"), b"a").unwrap();
    timers::set("t", host.now() + 20, Some("UDID-1"), b"b").unwrap();
    timers::set("t", host.now() + 10, Some("UDID-2"), b"c").unwrap();
    host.advance(10);
    let fired = host.due_timers();
    assert_eq!(fired.iter().map(|timer| timer.data.as_slice()).collect::<Vec<_>>(), [b"c"]);
    host.advance(10);
    assert_eq!(host.due_timers().len(), 1);
    assert!(host.due_timers().is_empty());
}

#[test]
fn answers_become_failures_by_their_status() {
    let answer = |status, retry_after: Option<&str>| {
        let mut response = mock::response(status, "");
        if let Some(seconds) = retry_after {
            response.headers.push(("Retry-After".to_owned(), seconds.to_owned()));
        }
        response.success().err().map(|failure| (failure.retryable, failure.retry_after_ms))
    };
    assert_eq!(answer(204, None), None);
    assert_eq!(answer(429, Some("7")), Some((true, Some(7_000))));
    assert_eq!(answer(429, Some("Wed, 21 Oct 2026 07:28:00 GMT")), Some((true, None)));
    assert_eq!(answer(503, None), Some((true, None)));
    assert_eq!(answer(404, Some("7")), Some((false, None)));
    assert_eq!(answer(302, None), Some((false, None)));
}

#[test]
fn limits_of_a_call_are_kept_and_begin_anew_with_the_next() {
    let host = mock::Host::new();
    host.set_limits(mock::Limits { host_calls: 2, ..Default::default() });
    let three = || {
        kv::get("a")?;
        kv::get("b")?;
        kv::get("c")
    };
    assert_eq!(host.call(three).unwrap_err().code, "quota");
    host.call(|| kv::get("a")).unwrap();
    assert_eq!(host.host_calls(), 1);
}

#[test]
fn tags_change_what_a_query_finds() {
    let host = mock::Host::new();
    host.add_enrollment(mock::enrollment("UDID-1", json!({ "serial_number": "A", "tags": ["old"] })));
    host.add_enrollment(mock::enrollment("UDID-2", json!({ "serial_number": "B" })));
    enrollments::tag("UDID-1", &["new"], &["old"]).unwrap();
    let tagged = |tag: &str| {
        let filter = enrollments::Filter { tag: Some(tag.to_owned()), ..Default::default() };
        enrollments::query(&filter, None, 100).unwrap().0.len()
    };
    assert_eq!((tagged("new"), tagged("old")), (1, 0));
    assert_eq!(enrollments::by_serial_number("B").unwrap()[0].id, "UDID-2");
}

#[test]
fn a_refused_capability_fails_with_the_failure_that_the_test_wants() {
    let host = mock::Host::new();
    host.refuse("kv", Failure::new("denied", "not granted"));
    assert_eq!(kv::get("k").unwrap_err().code, "denied");
}
