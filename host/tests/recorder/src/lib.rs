//! Keeps every JSON document that it is handed in its key-values, and does little else. The guest `answering` does the same at the hooks that
//! only one plugin can have.

wit_bindgen::generate!({
    path: "../../../wit",
    inline: r"
        package wasmdm:guest;
        world recorder {
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

use exports::wasmdm::plugin::{enrollment_policy, event_commands, event_sink, lifecycle, schedule};
use wasmdm::plugin::kv::Precondition;
use wasmdm::plugin::types::{CallInfo, CommandBody, CommandOptions, Decision, Enrollment, Event, Failure, Input, NewCommand};
use wasmdm::plugin::{enrollments, kv, runtime};

struct Recorder;

/// The documents are JSON already, and so is what is kept.
fn keep(key: &str, documents: &[(&str, &str)]) -> Result<(), Failure> {
    let members: Vec<String> = documents.iter().map(|(name, document)| format!("\"{name}\":{document}")).collect();
    kv::put(key, format!("{{{}}}", members.join(",")).as_bytes(), &Precondition::Anything, None).map(drop)
}

impl lifecycle::Guest for Recorder {
    /// It cannot write here, so it holds the facts to what the contract says of them.
    fn validate_config(call: CallInfo, _: String) -> Result<(), Failure> {
        if call.facts == "{}" {
            return Ok(());
        }
        let message = format!("facts of the call: {}", call.facts);
        Err(Failure { code: "invalid".to_owned(), message, retryable: false, retry_after_ms: None, detail: None })
    }
}

impl enrollment_policy::Guest for Recorder {
    fn decide(call: CallInfo, candidate: Enrollment, message: Input, _: bool) -> Result<Decision, Failure> {
        keep(&format!("decision/{}", call.id), &[("call", &call.facts), ("enrollment", &candidate.facts), ("message", &message.body)])?;
        Ok(Decision { verdict: "allow".to_owned(), reason: Some("recorded".to_owned()), detail: Some(r#"{"tags":["recorded"]}"#.to_owned()) })
    }
}

fn command(request_type: &str, key: Option<&str>, expires_at: Option<u64>) -> NewCommand {
    NewCommand {
        body: CommandBody::AsJson(format!(r#"{{"RequestType":"{request_type}"}}"#)),
        options: CommandOptions {
            idempotency_key: key.map(str::to_owned),
            collapse_key: None,
            priority: 0,
            not_before: None,
            expires_at,
            push: false,
            extra: None,
        },
    }
}

impl event_commands::Guest for Recorder {
    fn generate(_: CallInfo, _: Event) -> Result<Vec<NewCommand>, Failure> {
        Ok(vec![command("DeviceInformation", Some("first"), None), command("SecurityInfo", None, Some(runtime::now() + 60_000))])
    }
}

impl event_sink::Guest for Recorder {
    fn handle(call: CallInfo, occurrence: Event) -> Result<(), Failure> {
        let mut documents = vec![("call", call.facts), ("data", occurrence.data.body)];
        if let Some(who) = occurrence.who {
            if let Some(now) = enrollments::get(&who.id)? {
                documents.push(("enrollment_now", now.facts));
            }
            documents.push(("enrollment", who.facts));
        }
        let documents: Vec<(&str, &str)> = documents.iter().map(|(name, document)| (*name, document.as_str())).collect();
        keep(&format!("event/{}/{}", occurrence.topic, occurrence.id), &documents)
    }
}

impl schedule::Guest for Recorder {
    fn tick(call: CallInfo, name: String, _: u64, _: Option<String>, _: Vec<u8>) -> Result<(), Failure> {
        keep(&format!("tick/{name}"), &[("call", &call.facts)])
    }
}

#[cfg(target_family = "wasm")]
export!(Recorder);
