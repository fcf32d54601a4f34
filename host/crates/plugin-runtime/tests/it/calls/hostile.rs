//! Plugins that do their worst: each ends with its outcome, in time, and the host goes on.

use std::time::{Duration, Instant};

use wasmdm_plugin_runtime::call::{Answer, Decision, Outcome, Request};
use wasmdm_plugin_runtime::effective::Effective;
use wasmdm_plugin_runtime::hook::Hook;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};

use super::setup::{Server, candidate, granted};

/// How late a call may end. Alone it is a few milliseconds.
const LATE: Duration = Duration::from_millis(100);

/// What ends in time does so every time, but a machine that other tests keep busy may be late with anything: the best of three attempts
/// counts. Each answers how long it took.
pub(crate) async fn assert_in_time(limit: Duration, attempt: impl AsyncFn() -> Duration) {
    let mut took = Vec::new();
    for _ in 0..3 {
        let this = attempt().await;
        if this < limit + LATE {
            return;
        }
        took.push(this);
    }
    panic!("within {limit:?} and {LATE:?} it never ended: {took:?}");
}

async fn label(behave: &str, adjust: impl FnOnce(&mut Effective)) -> Outcome {
    let server = Server::start().await;
    let plugin = server.misbehaving(behave, adjust);
    let called = server.call(&plugin, "D").await;
    assert!(called.effects.is_none() || matches!(called.outcome, Outcome::Answered(_)), "a call that failed leaves nothing behind");
    // The host goes on.
    let next = server.misbehaving("deny", |_| ());
    assert_eq!(server.call(&next, "D").await.outcome.label(), "ok");
    called.outcome
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endless_loop_ends_when_its_cpu_time_is_up() {
    let server = Server::start().await;
    let plugin = server.misbehaving("loop", |_| ());
    let called = server.call(&plugin, "D").await;
    assert_eq!(called.outcome, Outcome::Cpu);
    let limit = plugin.effective().settings.limits.cpu_sync;
    assert!(called.usage.cpu >= limit && called.usage.cpu < limit + Duration::from_millis(60), "{:?}", called.usage);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endless_loop_ends_when_its_wall_time_is_up() {
    let server = Server::start().await;
    let plugin = server.misbehaving("loop", |effective| {
        effective.settings.limits.cpu_sync = Duration::from_mins(1);
        effective.settings.limits.wall.decision = Duration::from_millis(100);
    });
    assert_in_time(Duration::from_millis(100), async || {
        let began = Instant::now();
        assert_eq!(server.call(&plugin, "D").await.outcome, Outcome::Deadline);
        assert!(began.elapsed() >= Duration::from_millis(100), "{:?}", began.elapsed());
        began.elapsed()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_loop_while_the_instance_is_made_ends_too() {
    let server = Server::start().await;
    let plugin = server.link("endless-start", "endless-start", granted(&serde_json::json!({}))).unwrap();
    assert_eq!(server.call(&plugin, "D").await.outcome, Outcome::Cpu);
    let error = plugin.probe().await.unwrap_err().to_string();
    assert!(error.contains("does not start") && (error.contains("cpu") || error.contains("deadline")), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_loop_in_validate_config_ends_and_does_not_suspend_the_plugin() {
    let server = Server::start().await;
    let plugin = server.misbehaving("", |_| ());
    for _ in 0..6 {
        let error = plugin.validate_config(r#"{"behave":"loop-in-validate-config"}"#, &TenantId::default()).await.unwrap_err().to_string();
        assert!(error.contains("cpu") || error.contains("deadline"), "{error}");
    }
    assert!(plugin.validate_config("{}", &TenantId::default()).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sleeping_for_ever_ends_at_the_deadline() {
    let server = Server::start().await;
    let plugin = server.misbehaving("sleep", |effective| effective.settings.limits.wall.decision = Duration::from_millis(100));
    assert_in_time(Duration::from_millis(100), async || {
        let began = Instant::now();
        let called = server.call(&plugin, "D").await;
        assert_eq!(called.outcome, Outcome::Deadline);
        assert!(called.usage.cpu < Duration::from_millis(50), "sleeping is not charged: {:?}", called.usage);
        began.elapsed()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_after_the_deadline_does_not_count() {
    let late = label("late", |effective| effective.settings.limits.wall.decision = Duration::from_millis(100)).await;
    assert_eq!(late, Outcome::Deadline);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recursion_ends_in_a_trap() {
    assert_eq!(label("recurse", |_| ()).await.label(), "trap");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trap_names_the_function() {
    let outcome = label("trap", |_| ()).await;
    let Outcome::Trap(trace) = outcome else { panic!("{outcome}") };
    assert!(trace.contains("unreachable") && trace.contains("a_function_that_panics"), "{trace}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exiting_is_a_trap() {
    assert_eq!(label("exit", |_| ()).await.label(), "trap");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn allocating_without_end_runs_out_of_memory() {
    let server = Server::start().await;
    let plugin = server.misbehaving("alloc", |effective| effective.settings.limits.cpu_sync = Duration::from_secs(20));
    let called = server.call(&plugin, "D").await;
    assert_eq!(called.outcome, Outcome::OutOfMemory);
    assert!(called.usage.peak_memory <= 64 << 20 && called.usage.peak_memory > 60 << 20, "{:?}", called.usage);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_may_live_with_memory_that_it_does_not_get() {
    let outcome = label("alloc-and-recover", |effective| effective.settings.limits.cpu_sync = Duration::from_secs(20)).await;
    assert!(matches!(outcome, Outcome::Answered(Answer::Decision(Decision::Allow { .. }))), "{outcome}");
}

/// Instances are used again, and what is put back is only what the kernel says was written: more of it than is kept resident, and added memory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_finds_anything_of_a_call_before() {
    let server = Server::start().await;
    let plugin = server.misbehaving("look-for-a-call-before", |effective| effective.settings.limits.cpu_sync = Duration::from_secs(20));
    for n in 0..20 {
        assert_eq!(server.call(&plugin, "D").await.outcome.label(), "ok", "call {n}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn filling_memory_in_bulk_is_charged() {
    assert_eq!(label("fill", |_| ()).await, Outcome::Cpu);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_million_cheap_host_calls_are_too_many() {
    let server = Server::start().await;
    let plugin = server.misbehaving("host-calls", |effective| effective.settings.limits.cpu_sync = Duration::from_secs(20));
    let called = server.call(&plugin, "D").await;
    assert_eq!(called.outcome, Outcome::HostCalls);
    assert_eq!(called.usage.host_calls, 1_001);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_log_is_dropped_and_counted() {
    let server = Server::start().await;
    let plugin = server.misbehaving("log-flood", |effective| effective.settings.limits.cpu_sync = Duration::from_secs(20));
    let called = server.call(&plugin, "D").await;
    assert_eq!(called.outcome.label(), "ok");
    assert_eq!(called.usage.dropped_log_lines, 900 - 16, "16 KiB are 16 lines of 1 KiB");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_huge_answer_is_too_large() {
    let roomy = |effective: &mut Effective| effective.settings.limits.cpu_sync = Duration::from_secs(20);
    assert_eq!(label("huge-reason", roomy).await, Outcome::OutputTooLarge, "it is not even copied");
    assert_eq!(label("huge-detail", roomy).await, Outcome::OutputTooLarge);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_verdict_that_nobody_knows_is_a_failure() {
    assert_eq!(label("unknown-verdict", |_| ()).await.label(), "failure");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_are_no_files_no_sockets_and_no_environment() {
    let outcome = label("files", |_| ()).await;
    assert_eq!(outcome, Outcome::Answered(Answer::Decision(Decision::Deny { reason: Some(String::from("true true 0")) })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn looping_plugins_do_not_keep_others_from_answering() {
    let server = Server::start().await;
    let hostile = server.misbehaving("loop", |effective| {
        effective.settings.limits.cpu_sync = Duration::from_secs(20);
        effective.settings.limits.wall.decision = Duration::from_millis(600);
    });
    let good = server.misbehaving("deny", |_| ());
    let candidate = candidate("D");
    let tenant = TenantId::default();
    let request = Request::Decide { candidate: &candidate, within: Duration::from_mins(1) };
    // All eight take turns in one task, of two epoch ticks at most: the last one has its last turn so much later.
    let turns = Duration::from_millis(8 * 20);
    assert_in_time(Duration::from_millis(600) + turns, async || {
        let loops = futures_util::future::join_all((0..8).map(|_| hostile.call(&tenant, request)));
        let others = async {
            let mut answered = 0;
            for _ in 0..5 {
                answered += usize::from(good.call(&tenant, request).await.outcome.label() == "ok");
            }
            answered
        };
        let (loops, answered) = futures_util::join!(loops, others);
        assert_eq!(answered, 5);
        assert!(loops.iter().all(|called| called.outcome == Outcome::Deadline), "{loops:?}");
        loops.iter().map(|called| called.usage.wall).max().unwrap()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_calls_than_places_are_saturated() {
    let server = Server::start().await;
    let plugin = server.misbehaving("sleep", |effective| {
        let limits = &mut effective.settings.limits;
        limits.wall.decision = Duration::from_millis(300);
        limits.concurrent = 2;
        limits.waiting = 3;
        limits.waiting_per_tenant = 3;
    });
    let candidate = candidate("D");
    let tenant = TenantId::default();
    let request = Request::Decide { candidate: &candidate, within: Duration::from_mins(1) };
    let calls = futures_util::future::join_all((0..10).map(|_| plugin.call(&tenant, request))).await;
    let count = |outcome: &Outcome| calls.iter().filter(|called| called.outcome == *outcome).count();
    // Two ran and five found no place at all. The three that waited had their turn at best when their time was almost over.
    let (late, saturated) = (count(&Outcome::Deadline), count(&Outcome::Saturated));
    assert!((2..=5).contains(&late) && late + saturated == 10, "{late} and {saturated}");
    assert!(plugin.breakers().suspended(&tenant, Hook::EnrollmentPolicy, wasmdm_protocol::time::Timestamp::from_millis(0)).is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plugin_that_keeps_failing_is_suspended_and_tried_again() {
    use wasmdm_service::clock::Clock as _;
    let server = Server::start().await;
    let plugin = server.misbehaving("trap", |_| ());
    for n in 0..5 {
        assert_eq!(server.call(&plugin, &format!("D{n}")).await.outcome.label(), "trap");
    }
    let until = server.clock.now().plus(Duration::from_secs(1));
    assert_eq!(server.call(&plugin, "D9").await.outcome, Outcome::Suspended { until });
    server.clock.advance(Duration::from_secs(1));
    assert_eq!(server.call(&plugin, "D9").await.outcome.label(), "trap");
    assert_eq!(server.call(&plugin, "D9").await.outcome.label(), "suspended");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_certificate_with_many_enrollment_ids_suspends_nothing() {
    // Whoever authenticates chooses the UDID: five of them from one certificate closed the door for everybody.
    let server = Server::start().await;
    let plugin = server.misbehaving("trap", |_| ());
    let tenant = TenantId::default();
    let one = candidate("D");
    for n in 0..20 {
        let mut candidate = one.clone();
        candidate.enrollment.id = EnrollmentId::new(format!("D{n}"));
        let called = plugin.call(&tenant, Request::Decide { candidate: &candidate, within: Duration::from_mins(1) }).await;
        assert_eq!(called.outcome.label(), "trap", "call {n}");
    }
    // Other certificates count, also for one enrollment id.
    for _ in 0..4 {
        assert_eq!(server.call(&plugin, "D").await.outcome.label(), "trap");
    }
    assert_eq!(server.call(&plugin, "D").await.outcome.label(), "suspended");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fresh_instance_for_each_call_costs_little() {
    let server = Server::start().await;
    let plugin = server.misbehaving("", |_| ());
    let (mut walls, mut cpus) = (Vec::new(), Vec::new());
    for _ in 0..300 {
        let called = server.call(&plugin, "D").await;
        assert_eq!(called.outcome.label(), "ok");
        walls.push(called.usage.wall);
        cpus.push(called.usage.cpu);
    }
    walls.sort();
    cpus.sort();
    let (wall, cpu) = (walls[walls.len() / 2], cpus[cpus.len() / 2]);
    println!("fresh call p50 {wall:?}, of it CPU {cpu:?}");
    // The host of a test is not optimised and other tests share the processors: CPU time is what can be compared at all.
    assert!(cpu < Duration::from_millis(5), "{cpu:?}");
}
