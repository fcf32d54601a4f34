//! Does what its configuration says, however bad: `{"behave": "loop"}`. Exports every hook but those that only one plugin can have.

wit_bindgen::generate!({
    path: "../../../../../wit",
    inline: r"
        package wasmdm:guest;
        world misbehaving {
            include wasmdm:plugin/capabilities@0.1.0;
            export wasmdm:plugin/lifecycle@0.1.0;
            export wasmdm:plugin/enrollment-policy@0.1.0;
            export wasmdm:plugin/event-commands@0.1.0;
            export wasmdm:plugin/event-sink@0.1.0;
            export wasmdm:plugin/schedule@0.1.0;
        }
    ",
    generate_all,
});

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Mutex;
use std::time::Duration;

use exports::wasmdm::plugin::{enrollment_policy, event_commands, event_sink, lifecycle, schedule};
use wasmdm::plugin::kv::Precondition;
use wasmdm::plugin::types::{CallInfo, CommandBody, CommandOptions, Decision, Enrollment, Event, Failure, Input, NewCommand};
use wasmdm::plugin::{commands, config, crypto, enrollments, http, kv, log, plist, push, runtime, timers};

struct Misbehaving;

/// A string of the configuration.
fn setting(key: &str) -> String {
    config::get(key).unwrap_or_default().trim_matches('"').to_owned()
}

fn decision(verdict: &str, reason: impl Into<String>) -> Decision {
    Decision { verdict: verdict.to_owned(), reason: Some(reason.into()), detail: None }
}

fn failure(code: &str, message: impl Into<String>) -> Failure {
    Failure { code: code.to_owned(), message: message.into(), retryable: false, retry_after_ms: None, detail: None }
}

fn command(request_type: &str) -> NewCommand {
    NewCommand {
        body: CommandBody::AsJson(format!(r#"{{"RequestType":"{request_type}"}}"#)),
        options: CommandOptions {
            idempotency_key: None,
            collapse_key: None,
            priority: 0,
            not_before: None,
            expires_at: None,
            push: true,
            extra: None,
        },
    }
}

fn spin() {
    let mut n = 0_u64;
    loop {
        n = black_box(n.wrapping_add(1));
    }
}

fn recurse(n: u64) -> u64 {
    let frame = black_box([n; 32]);
    if black_box(true) { recurse(n + 1) + frame[3] } else { 0 }
}

#[inline(never)]
fn a_function_that_panics() {
    panic!("as configured");
}

/// Traps if a call before has left anything in the memory: in what the component initialises, in what it leaves zero, or in what is added to it.
/// Then writes to all of them.
fn look_for_a_call_before() {
    const PAGE: usize = 64 << 10;
    static INITIALISED: Mutex<[u8; PAGE]> = Mutex::new([7; PAGE]);
    static ZERO: Mutex<[u8; 8 * PAGE]> = Mutex::new([0; 8 * PAGE]);
    let all = |bytes: &[u8], expected: u8| black_box(bytes).iter().all(|byte| *byte == expected);
    let (mut initialised, mut zero) = (INITIALISED.lock().unwrap(), ZERO.lock().unwrap());
    assert!(all(&*initialised, 7) && all(&*zero, 0), "something is left of a call before");
    // From the allocator this comes out of memory that was never used, which it takes to be zero as well.
    let mut added = vec![0_u8; 16 * PAGE];
    assert!(all(&added, 0), "something is left of a call before, in added memory");
    initialised.fill(1);
    zero.fill(2);
    added.fill(3);
    black_box(added);
}

/// Misbehaves in the ways that every hook can. `false`: none of these was asked for.
fn misbehave(behaviour: &str) -> bool {
    match behaviour {
        "loop" => spin(),
        "recurse" => {
            black_box(recurse(0));
        }
        "trap" => a_function_that_panics(),
        "exit" => std::process::exit(3),
        "alloc" => {
            let mut kept = Vec::new();
            loop {
                kept.push(black_box(vec![1_u8; 1 << 20]));
            }
        }
        "alloc-and-recover" => {
            let mut kept: Vec<Vec<u8>> = Vec::new();
            loop {
                let mut next = Vec::new();
                if next.try_reserve_exact(1 << 20).is_err() {
                    break;
                }
                kept.push(black_box(next));
            }
        }
        "look-for-a-call-before" => look_for_a_call_before(),
        "fill" => loop {
            black_box(vec![black_box(7_u8); 32 << 20]);
        },
        "host-calls" => {
            for _ in 0..1_000_000 {
                black_box(runtime::now());
            }
        }
        "log-flood" => {
            for n in 0..900 {
                log::write(log::Level::Info, &format!("line {n}: {}", "x".repeat(2_000)), &[]);
            }
        }
        "log-control" => log::write(log::Level::Warn, "one\n2026-01-01 ERROR forged\u{1b}[2J", &[("key\n".into(), "value\r".into())]),
        "print" => {
            println!("to standard output");
            eprint!("to standard error");
        }
        "sleep" => loop {
            std::thread::sleep(Duration::from_secs(3_600));
        },
        "late" => std::thread::sleep(Duration::from_millis(400)),
        _ => return false,
    }
    true
}

impl lifecycle::Guest for Misbehaving {
    fn validate_config(_: CallInfo, document: String) -> Result<(), Failure> {
        if document.contains("refuse-config") {
            return Err(failure("invalid", "behave: refused"));
        }
        if document.contains("loop-in-validate-config") {
            spin();
        }
        if document.contains("write-in-validate-config") {
            kv::put("k", b"v", &Precondition::Anything, None)?;
        }
        Ok(())
    }
}

impl enrollment_policy::Guest for Misbehaving {
    fn decide(call: CallInfo, candidate: Enrollment, message: Input, re_enrolling: bool) -> Result<Decision, Failure> {
        let behaviour = setting("behave");
        if misbehave(&behaviour) {
            return Ok(decision("allow", "survived"));
        }
        match behaviour.as_str() {
            "deny" => Ok(decision("deny", "as configured")),
            "deny-without-reason" => Ok(Decision { reason: None, ..decision("deny", "") }),
            "quarantine" => Ok(Decision { detail: Some(r#"{"tags":["watched"]}"#.into()), ..decision("quarantine", "odd") }),
            "allow" => Ok(Decision { detail: Some(r#"{"tags":["allowed"]}"#.into()), ..decision("allow", "known") }),
            "unknown-verdict" => Ok(decision("perhaps", "")),
            "huge-reason" => Ok(decision("deny", "x".repeat(16 << 20))),
            "huge-detail" => Ok(Decision { detail: Some("x".repeat((1 << 20) + (32 << 10))), ..decision("abstain", "") }),
            "fail" => Err(failure("unavailable", "the directory is down")),
            "tell" => {
                let tells = format!(
                    "{} {} {} {re_enrolling} {} {} {}",
                    candidate.id,
                    candidate.kind,
                    candidate.topic,
                    message.body.len() > 2,
                    candidate.facts,
                    call.facts
                );
                Ok(decision("deny", tells))
            }
            "info" => Ok(decision("deny", runtime::info())),
            "message" => Ok(decision("deny", message.body)),
            "count" => Ok(decision("deny", kv::add("count", 1)?.to_string())),
            "put" => {
                kv::put("seen", candidate.id.as_bytes(), &Precondition::Anything, None)?;
                Ok(decision("abstain", ""))
            }
            "kv" => exercise_kv(),
            "many" => {
                for n in 0..100 {
                    kv::put(&format!("many/{n:03}"), &[0; 10], &Precondition::Anything, Some(60))?;
                }
                let mut keys = 0;
                let mut cursor = None;
                loop {
                    let page = kv::scan("many/", cursor.as_deref(), 30)?;
                    keys += page.pairs.len();
                    cursor = page.cursor;
                    if cursor.is_none() {
                        break;
                    }
                }
                Ok(decision("deny", keys.to_string()))
            }
            "scan-own" => scan_own_writes(),
            "big-value" => {
                kv::put("big", &vec![0; 100_000], &Precondition::Anything, None)?;
                Ok(decision("abstain", ""))
            }
            "writes" => Ok(decision("deny", forbidden_writes(&candidate.id))),
            "random" => Ok(decision("deny", format!("{} {}", crypto::random(16)?.len(), crypto::random(5_000).is_err()))),
            "plist" => {
                let xml = plist::from_json(r#"{"Name":"a","Data":{"$data":"AAE="}}"#)?;
                Ok(decision("deny", format!("{} {}", plist::to_json(&xml)?, plist::to_json(b"rubbish").is_err())))
            }
            "files" => Ok(decision(
                "deny",
                format!(
                    "{} {} {}",
                    std::fs::read("/etc/passwd").is_err(),
                    std::net::TcpStream::connect("127.0.0.1:1").is_err(),
                    std::env::vars().count()
                ),
            )),
            _ => Ok(decision("abstain", "")),
        }
    }
}

/// What each write answers.
fn forbidden_writes(id: &str) -> String {
    fn code<T>(answer: Result<T, Failure>) -> String {
        answer.err().map_or_else(|| "ok".to_owned(), |failure| failure.code)
    }
    let request =
        http::Request { method: "GET".into(), url: "http://127.0.0.1:1/".into(), url_template: false, headers: vec![], body: None, timeout_ms: None };
    [
        code(commands::enqueue(&[id.to_owned()], &command("DeviceLock"))),
        code(commands::cancel(id, "UUID")),
        code(enrollments::tag(id, &["a".to_owned()], &[])),
        code(enrollments::release(id)),
        code(timers::set("t", 1, None, &[])),
        code(timers::cancel("t", None)),
        code(push::notify(&[id.to_owned()])),
        code(http::send(&request)),
        code(kv::put("k", b"v", &Precondition::Anything, None)),
    ]
    .join(" ")
}

/// Its own writes are seen by its own reads. A deny names what is wrong.
fn exercise_kv() -> Result<Decision, Failure> {
    let wrong = |what: &str| Ok(decision("deny", what));
    if kv::get("a")?.is_some() {
        return wrong("a was there");
    }
    let first = kv::put("a", b"1", &Precondition::Absent, None)?;
    if kv::put("a", b"2", &Precondition::Absent, None).map_err(|failure| failure.code) != Err("conflict".to_owned()) {
        return wrong("absent did not conflict");
    }
    let second = kv::put("a", b"2", &Precondition::Version(first.clone()), None)?;
    if kv::put("a", b"3", &Precondition::Version(first), None).is_ok() {
        return wrong("an old version did not conflict");
    }
    match kv::get("a")? {
        Some(pair) if pair.value == b"2" && pair.version == second => {}
        _ => return wrong("a has another value"),
    }
    if kv::add("n", 40)? != 40 || kv::add("n", 2)? != 42 {
        return wrong("n does not add up");
    }
    if kv::add("a", i64::MAX).is_ok() || kv::get("n")?.is_none_or(|pair| pair.value != b"42") {
        return wrong("n has no digits");
    }
    kv::put("b", b"x", &Precondition::Anything, None)?;
    if !kv::remove("b", &Precondition::Anything)? || kv::remove("b", &Precondition::Anything)? {
        return wrong("b was not removed once");
    }
    let keys: Vec<String> = kv::scan("", None, 100)?.pairs.into_iter().map(|pair| pair.key).collect();
    if keys != ["a", "n"] {
        return wrong(&format!("scan found {keys:?}"));
    }
    Ok(decision("allow", "kv works"))
}

/// Changes some of the keys that "many" has put, and scans in pages of every size. A deny names what is wrong.
fn scan_own_writes() -> Result<Decision, Failure> {
    let mut expected: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for n in 0..100 {
        expected.insert(format!("many/{n:03}"), vec![0; 10]);
    }
    // Before the first, after the last, between two, beside the edges of the host's chunks of 32, and over one that is there.
    for key in ["many/", "many/0005", "many/031", "many/0315", "many/0325", "many/050", "many/0995", "many/z"] {
        kv::put(key, key.as_bytes(), &Precondition::Anything, None)?;
        expected.insert(key.to_owned(), key.as_bytes().to_vec());
    }
    // The first, the last, a whole chunk, and one that this call has put.
    let removed = (32..66).map(|n| format!("many/{n:03}")).chain(["many/000", "many/099", "many/0325"].map(str::to_owned));
    for key in removed {
        if !kv::remove(&key, &Precondition::Anything)? {
            return Ok(decision("deny", format!("{key} was not there")));
        }
        expected.remove(&key);
    }
    kv::put("many/000", b"again", &Precondition::Absent, None)?;
    expected.insert("many/000".to_owned(), b"again".to_vec());
    // Outside of the prefix.
    for key in ["man", "many", "many0", "n"] {
        kv::put(key, b"elsewhere", &Precondition::Anything, None)?;
    }
    let expected: Vec<_> = expected.into_iter().collect();
    for limit in [1, 2, 31, 32, 33, 69, 70, 71, 1_000] {
        let mut found = Vec::new();
        let mut cursor = None;
        loop {
            let page = kv::scan("many/", cursor.as_deref(), limit)?;
            let whole = page.pairs.len() == limit as usize;
            if page.pairs.len() > limit as usize || (page.cursor.is_some() && !whole) || (page.pairs.is_empty() && cursor.is_some()) {
                return Ok(decision("deny", format!("a page of {} with the limit {limit}", page.pairs.len())));
            }
            found.extend(page.pairs.into_iter().map(|pair| (pair.key, pair.value)));
            cursor = page.cursor;
            if cursor.is_none() {
                break;
            }
        }
        if found != expected {
            let keys: Vec<_> = found.into_iter().map(|(key, _)| key).collect();
            return Ok(decision("deny", format!("limit {limit} found {keys:?}")));
        }
    }
    Ok(decision("allow", format!("{} pairs", expected.len())))
}

impl event_commands::Guest for Misbehaving {
    fn generate(_: CallInfo, _: Event) -> Result<Vec<NewCommand>, Failure> {
        let behaviour = setting("behave");
        if misbehave(&behaviour) {
            return Ok(vec![]);
        }
        if behaviour == "writes" {
            return Err(failure("told", forbidden_writes("D")));
        }
        if behaviour == "many-commands" {
            return Ok((0..101).map(|_| command("DeviceInformation")).collect());
        }
        Ok(setting("generate").split(',').filter(|name| !name.is_empty()).map(command).collect())
    }
}

impl event_sink::Guest for Misbehaving {
    fn handle(_: CallInfo, occurrence: Event) -> Result<(), Failure> {
        let behaviour = setting("behave");
        if misbehave(&behaviour) {
            return Ok(());
        }
        let id = occurrence.who.map(|who| who.id).unwrap_or_default();
        match behaviour.as_str() {
            "fail" => Err(failure("refused", "never again")),
            "fail-later" => Err(Failure { retryable: true, retry_after_ms: Some(1_500), ..failure("unavailable", "the other side is down") }),
            "enqueue" => {
                let outcomes = commands::enqueue(&[id.clone(), "STRANGER".to_owned()], &command(&setting("command")))?;
                let pending = commands::pending(&id)?;
                kv::put(
                    "outcomes",
                    format!("{} {} {}", outcomes[0].state, outcomes[1].state, pending.len()).as_bytes(),
                    &Precondition::Anything,
                    None,
                )?;
                Ok(())
            }
            // The UUIDs and states that the same key is answered, twice in one list and in a second call, and what is pending then.
            "enqueue-again" => {
                let mut new = command(&setting("command"));
                new.body = CommandBody::AsJson(format!(r#"{{"RequestType":"DeviceInformation","Queries":["{}"]}}"#, setting("query")));
                new.options.idempotency_key = Some("inventory".to_owned());
                let mut outcomes = commands::enqueue(&[id.clone(), id.clone()], &new)?;
                outcomes.extend(commands::enqueue(&[id.clone()], &new)?);
                let told: Vec<String> =
                    outcomes.into_iter().map(|outcome| format!("{} {}", outcome.state, outcome.uuid.unwrap_or_default())).collect();
                kv::put("told", told.join("\n").as_bytes(), &Precondition::Anything, None)?;
                let pending: Vec<String> = commands::pending(&id)?.into_iter().map(|status| status.uuid).collect();
                kv::put("pending", pending.join(" ").as_bytes(), &Precondition::Anything, None).map(drop)
            }
            "enqueue-cancel-enqueue" => {
                let new = command(&setting("command"));
                let mut first = commands::enqueue(&[id.clone()], &new)?;
                commands::enqueue(&[id.clone()], &new)?;
                commands::cancel(&id, &first.remove(0).uuid.unwrap_or_default())?;
                commands::enqueue(&[id], &new).map(drop)
            }
            "tag" => {
                enrollments::tag(&id, &["tagged".to_owned()], &[])?;
                match enrollments::get(&id)? {
                    Some(record) if record.facts.contains("tagged") => Ok(()),
                    other => Err(failure("wrong", format!("{other:?}"))),
                }
            }
            "timer" => {
                timers::set("later", runtime::now() + 60_000, Some(&id), b"data")?;
                if !timers::cancel("later", Some(&id))? {
                    return Err(failure("wrong", "the timer was not there"));
                }
                timers::set("later", runtime::now() + 90_000, Some(&id), b"data")
            }
            "send" => {
                let request = http::Request {
                    method: "POST".into(),
                    url: setting("url"),
                    url_template: false,
                    headers: vec![],
                    body: Some(occurrence.id.into_bytes()),
                    timeout_ms: Some(2_000),
                };
                for _ in 0..setting("times").parse().unwrap_or(1) {
                    let response = http::send(&request)?;
                    kv::put(
                        "answer",
                        format!("{} {}", response.status, String::from_utf8_lossy(&response.body)).as_bytes(),
                        &Precondition::Anything,
                        None,
                    )?;
                }
                Ok(())
            }
            "count" => kv::add("count", 1).map(drop),
            "push" => {
                let nobody = push::notify(&[]).map_err(|failure| failure.code);
                let unknown = push::notify(&[id.clone(), "NOBODY".to_owned()]).map_err(|failure| failure.code);
                let many = push::notify(&vec![id.clone(); 101]).map_err(|failure| failure.code);
                let facts = enrollments::get(&id)?.map(|record| record.facts).unwrap_or_default();
                let told = format!("{nobody:?} {unknown:?} {many:?} {facts}");
                kv::put("push", told.as_bytes(), &Precondition::Anything, None)?;
                push::notify(&[id.clone(), id])
            }
            _ => Ok(()),
        }
    }
}

impl schedule::Guest for Misbehaving {
    fn tick(_: CallInfo, name: String, scheduled_for: u64, who: Option<String>, data: Vec<u8>) -> Result<(), Failure> {
        let told = format!("{name} {scheduled_for} {} {}", who.unwrap_or_default(), String::from_utf8_lossy(&data));
        kv::put("tick", told.as_bytes(), &Precondition::Anything, None).map(drop)
    }
}

#[cfg(target_family = "wasm")]
export!(Misbehaving);
