//! Answers check-ins as its configuration says, and keeps what it was handed: `{"behave": "none"}`. Without a word of it, it answers well.

wit_bindgen::generate!({
    path: "../../../../../wit",
    inline: r"
        package wasmdm:guest;
        world answering {
            include wasmdm:plugin/capabilities@0.1.0;
            export wasmdm:plugin/user-authentication@0.1.0;
            export wasmdm:plugin/token-source@0.1.0;
            export wasmdm:plugin/return-to-service@0.1.0;
        }
    ",
    generate_all,
});

use std::hint::black_box;
use std::time::Duration;

use exports::wasmdm::plugin::{return_to_service, token_source, user_authentication};
use wasmdm::plugin::kv::Precondition;
use wasmdm::plugin::types::{CallInfo, Decision, Enrollment, Failure, Input};
use wasmdm::plugin::{commands, config, crypto, enrollments, http, kv, log, plist, push, runtime, timers};

struct Answering;

/// A string of the configuration.
fn setting(key: &str) -> String {
    config::get(key).unwrap_or_default().trim_matches('"').to_owned()
}

fn failure(code: &str, message: impl Into<String>) -> Failure {
    Failure { code: code.to_owned(), message: message.into(), retryable: false, retry_after_ms: None, detail: None }
}

/// Misbehaves in the ways that every hook can.
fn misbehave(behaviour: &str) -> Result<(), Failure> {
    match behaviour {
        "trap" => panic!("as configured"),
        "loop" => {
            let mut n = 0_u64;
            loop {
                n = black_box(n.wrapping_add(1));
            }
        }
        "sleep" => std::thread::sleep(Duration::from_secs(3_600)),
        "fail" => return Err(failure("unavailable", "the directory is down")),
        "big-value" => kv::put("big", &vec![0; 60_000], &Precondition::Anything, None).map(drop)?,
        // Every other grant is there, and none of it is possible here.
        "writes" => return Err(failure("told", forbidden_writes())),
        _ => {}
    }
    Ok(())
}

/// What each write answers.
fn forbidden_writes() -> String {
    fn code<T>(answer: Result<T, Failure>) -> String {
        answer.err().map_or_else(|| "ok".to_owned(), |failure| failure.code)
    }
    log::write(log::Level::Info, &runtime::info(), &[]);
    let request =
        http::Request { method: "GET".into(), url: "http://127.0.0.1:1/".into(), url_template: false, headers: vec![], body: None, timeout_ms: None };
    [
        code(commands::cancel("D", "UUID")),
        code(enrollments::tag("D", &["a".to_owned()], &[])),
        code(timers::set("t", 1, None, &[])),
        code(push::notify(&["D".to_owned()])),
        code(http::send(&request)),
        code(kv::put("k", b"v", &Precondition::Anything, None)),
        code(crypto::random(1)),
        code(plist::from_json("{}")),
    ]
    .join(" ")
}

/// The documents are JSON already, and so is what is kept. Nothing is kept without the grant.
fn keep(kind: &str, call: &CallInfo, documents: &[(&str, &str)]) {
    let mut members = vec![format!("\"call\":{}", call.facts)];
    members.extend(documents.iter().map(|(name, document)| format!("\"{name}\":{document}")));
    let _ = kv::put(&format!("{kind}/{}", call.id), format!("{{{}}}", members.join(",")).as_bytes(), &Precondition::Anything, None);
}

impl token_source::Guest for Answering {
    fn get_token(call: CallInfo, who: Enrollment, service_type: String, parameters: Option<String>) -> Result<Option<Vec<u8>>, Failure> {
        let behaviour = setting("behave");
        misbehave(&behaviour)?;
        let parameters = parameters.unwrap_or_else(|| "{}".to_owned());
        match behaviour.as_str() {
            "none" => Ok(None),
            "empty" => Ok(Some(Vec::new())),
            "long" => Ok(Some(vec![7; (64 << 10) + 1])),
            "longest" => Ok(Some(vec![7; 64 << 10])),
            "huge" => Ok(Some(vec![7; 16 << 20])),
            // One more each time, whoever asks.
            "count" => Ok(Some(kv::add("count", 1)?.to_string().into_bytes())),
            _ => {
                keep("token", &call, &[("enrollment", &who.facts), ("parameters", &parameters)]);
                Ok(Some(format!("{}{service_type} for {} {parameters}", setting("prefix"), who.id).into_bytes()))
            }
        }
    }
}

impl return_to_service::Guest for Answering {
    fn configuration(call: CallInfo, who: Enrollment) -> Result<Option<String>, Failure> {
        let behaviour = setting("behave");
        misbehave(&behaviour)?;
        match behaviour.as_str() {
            "none" => Ok(None),
            "rubbish" => Ok(Some("{".to_owned())),
            "no-dictionary" => Ok(Some("[]".to_owned())),
            "without-enabled" => Ok(Some("{}".to_owned())),
            "own-bootstrap-token" => Ok(Some(r#"{"Enabled":true,"BootstrapToken":{"$data":"AAEC"}}"#.to_owned())),
            "huge" => Ok(Some(format!(r#"{{"Enabled":true,"WiFiProfileData":{{"$data":"{}"}}}}"#, "A".repeat(8 << 20)))),
            _ => {
                keep("return", &call, &[("enrollment", &who.facts)]);
                Ok(Some(r#"{"Enabled":true,"WiFiProfileData":{"$data":"V2ktRmk="},"BootstrapToken":true}"#.to_owned()))
            }
        }
    }
}

fn decision(verdict: &str, detail: Option<&str>) -> Decision {
    Decision { verdict: verdict.to_owned(), reason: None, detail: detail.map(str::to_owned) }
}

impl user_authentication::Guest for Answering {
    fn answer(call: CallInfo, who: Enrollment, message: Input, digest_response: Option<String>) -> Result<Decision, Failure> {
        let behaviour = setting("behave");
        misbehave(&behaviour)?;
        match behaviour.as_str() {
            "abstain" | "decline" | "no-challenge" | "reject" | "perhaps" => return Ok(decision(&behaviour, None)),
            "auth-token-at-once" => return Ok(decision("auth-token", Some(r#"{"AuthToken":"t"}"#))),
            "challenge-again" if digest_response.is_some() => return Ok(decision("challenge", Some(r#"{"DigestChallenge":"again"}"#))),
            "without-detail" => return Ok(decision("challenge", None)),
            "empty-challenge" => return Ok(decision("challenge", Some(r#"{"DigestChallenge":""}"#))),
            _ => {}
        }
        keep("login", &call, &[("enrollment", &who.facts), ("message", &message.body)]);
        let key = format!("challenge/{}", who.id);
        match digest_response {
            None => {
                let challenge = format!("challenge for {}", who.id);
                // JSON, as all that it keeps.
                kv::put(&key, format!("\"{challenge}\"").as_bytes(), &Precondition::Anything, Some(300))?;
                Ok(decision("challenge", Some(&format!(r#"{{"DigestChallenge":"{challenge}"}}"#))))
            }
            // It knows its own challenge again, so what it wrote with the first answer was stored.
            Some(digest) => match kv::get(&key)? {
                Some(challenge) if digest == format!("digest of {}", String::from_utf8_lossy(&challenge.value).trim_matches('"')) => {
                    kv::remove(&key, &Precondition::Anything)?;
                    Ok(decision("auth-token", Some(&format!(r#"{{"AuthToken":"token of {}"}}"#, who.id))))
                }
                _ => Ok(decision("reject", None)),
            },
        }
    }
}

#[cfg(target_family = "wasm")]
export!(Answering);
