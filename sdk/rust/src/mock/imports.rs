//! The host's functions, with the signatures of the generated bindings.

use super::{State, with};
use crate::Failure;

/// Counts a call and answers whether the capability may be used.
fn admit(state: &mut State, capability: &str) -> Result<(), Failure> {
    state.host_calls += 1;
    if state.host_calls > state.limits.host_calls {
        return Err(Failure::new("quota", "too many host calls"));
    }
    match state.refused.get(capability) {
        Some(failure) => Err(failure.clone()),
        None => Ok(()),
    }
}

pub(crate) mod runtime {
    use super::with;

    pub(crate) fn info() -> String {
        with(|state| {
            state.host_calls += 1;
            state.info.to_string()
        })
    }

    pub(crate) fn now() -> u64 {
        with(|state| {
            state.host_calls += 1;
            state.now
        })
    }
}

pub(crate) mod log {
    use super::with;
    use crate::log::Level;
    use crate::mock::Line;

    pub(crate) fn write(severity: Level, message: &str, fields: &[(String, String)]) {
        let line = Line { level: severity, message: message.to_owned(), fields: fields.to_vec() };
        with(|state| {
            state.host_calls += 1;
            state.logs.push(line);
        });
    }
}

pub(crate) mod config {
    use super::with;

    pub(crate) fn get(key: &str) -> Option<String> {
        with(|state| {
            state.host_calls += 1;
            state.config.get(key).map(ToString::to_string)
        })
    }

    pub(crate) fn document() -> String {
        with(|state| {
            state.host_calls += 1;
            state.config.to_string()
        })
    }
}

pub(crate) mod kv {
    use super::{State, admit, with};
    use crate::Failure;
    use crate::host::types::kv::Page;
    use crate::kv::{Pair, Precondition};
    use crate::mock::Stored;

    fn live<'a>(state: &'a State, key: &str) -> Option<&'a Stored> {
        let stored = state.effects.pairs.get(key)?;
        stored.expires_at.is_none_or(|at| state.now < at).then_some(stored)
    }

    fn pair(key: &str, stored: &Stored) -> Pair {
        Pair { key: key.to_owned(), value: stored.value.clone(), version: stored.version.to_string() }
    }

    fn check(state: &State, key: &str, expected: &Precondition) -> Result<(), Failure> {
        let version = live(state, key).map(|stored| stored.version.to_string());
        let holds = match expected {
            Precondition::Anything => true,
            Precondition::Absent => version.is_none(),
            Precondition::Version(wanted) => version.as_ref() == Some(wanted),
        };
        if holds { Ok(()) } else { Err(Failure::conflict(format!("`{key}` has changed"))) }
    }

    pub(crate) fn get(key: &str) -> Result<Option<Pair>, Failure> {
        with(|state| {
            admit(state, "kv")?;
            Ok(live(state, key).map(|stored| pair(key, stored)))
        })
    }

    pub(crate) fn put(key: &str, value: &[u8], expected: &Precondition, ttl_seconds: Option<u32>) -> Result<String, Failure> {
        with(|state| {
            admit(state, "kv")?;
            check(state, key, expected)?;
            if value.len() > state.limits.value_bytes {
                return Err(Failure::new("quota", format!("value of `{key}` is too long")));
            }
            state.effects.next_version += 1;
            let stored = Stored {
                value: value.to_vec(),
                version: state.effects.next_version,
                expires_at: ttl_seconds.map(|seconds| state.now.saturating_add(u64::from(seconds) * 1000)),
            };
            let version = stored.version.to_string();
            state.effects.pairs.insert(key.to_owned(), stored);
            let pairs = &state.effects.pairs;
            let bytes: usize = pairs.iter().map(|(key, stored)| key.len() + stored.value.len()).sum();
            if bytes > state.limits.kv_bytes || pairs.len() > state.limits.kv_keys {
                return Err(Failure::new("quota", "the key-values are full"));
            }
            Ok(version)
        })
    }

    pub(crate) fn remove(key: &str, expected: &Precondition) -> Result<bool, Failure> {
        with(|state| {
            admit(state, "kv")?;
            check(state, key, expected)?;
            let existed = live(state, key).is_some();
            state.effects.pairs.remove(key);
            Ok(existed)
        })
    }

    pub(crate) fn scan(prefix: &str, cursor: Option<&str>, limit: u32) -> Result<Page, Failure> {
        with(|state| {
            admit(state, "kv")?;
            let limit = limit.clamp(1, 1000) as usize;
            let mut pairs: Vec<Pair> = state
                .effects
                .pairs
                .keys()
                .filter(|key| key.starts_with(prefix))
                .filter(|key| cursor.is_none_or(|cursor| key.as_str() > cursor))
                .filter_map(|key| Some(pair(key, live(state, key)?)))
                .take(limit + 1)
                .collect();
            let more = pairs.len() > limit;
            pairs.truncate(limit);
            let cursor = more.then(|| pairs.last().map(|pair| pair.key.clone())).flatten();
            Ok(Page { pairs, cursor })
        })
    }

    pub(crate) fn add(key: &str, delta: i64) -> Result<i64, Failure> {
        let before = get(key)?;
        let before: i64 = match &before {
            None => 0,
            Some(pair) => std::str::from_utf8(&pair.value)
                .ok()
                .and_then(|digits| digits.parse().ok())
                .ok_or_else(|| Failure::invalid(format!("`{key}` is no counter")))?,
        };
        let after = before.saturating_add(delta);
        put(key, after.to_string().as_bytes(), &Precondition::Anything, None)?;
        Ok(after)
    }
}

pub(crate) mod http {
    use super::{admit, with};
    use crate::Failure;
    use crate::http::{Request, Response};

    pub(crate) fn send(outgoing: &Request) -> Result<Response, Failure> {
        let (scripted, respond, longest) = with(|state| {
            admit(state, "http")?;
            state.http_calls += 1;
            if state.http_calls > state.limits.http_calls {
                return Err(Failure::new("quota", "too many HTTP requests"));
            }
            state.requests.push(outgoing.clone());
            Ok((state.responses.pop_front(), state.respond.clone(), state.limits.http_answer_bytes))
        })?;
        let response = match (scripted, respond) {
            (Some(scripted), _) => scripted?,
            (None, Some(respond)) => respond(outgoing)?,
            (None, None) => return Err(Failure::unavailable("no answer is scripted")),
        };
        if response.body.len() > longest {
            return Err(Failure::new("quota", "the answer is too long"));
        }
        Ok(response)
    }
}

pub(crate) mod enrollments {
    use super::{admit, with};
    use crate::host::types::enrollments::Page;
    use crate::{Enrollment, Facts, Failure};
    use serde_json::{Value, json};

    pub(crate) fn get(id: &str) -> Result<Option<Enrollment>, Failure> {
        with(|state| {
            admit(state, "enrollments")?;
            Ok(state.effects.enrollments.get(id).cloned())
        })
    }

    pub(crate) fn by_serial_number(serial_number: &str) -> Result<Vec<Enrollment>, Failure> {
        Ok(query(&json!({ "serial_number": serial_number }).to_string(), None, 100)?.found)
    }

    fn matches(enrollment: &Enrollment, key: &str, wanted: &str) -> Result<bool, Failure> {
        let facts: Facts = enrollment.read_facts()?;
        Ok(match key {
            "kind" => enrollment.kind == wanted,
            "state" => facts.state.as_deref() == Some(wanted),
            "tag" => facts.tags.iter().any(|tag| tag == wanted),
            "serial_number" => facts.serial_number.as_deref() == Some(wanted),
            "model" => facts.model.as_deref() == Some(wanted),
            other => return Err(Failure::invalid(format!("filter key `{other}` is unknown"))),
        })
    }

    pub(crate) fn query(filter: &str, cursor: Option<&str>, limit: u32) -> Result<Page, Failure> {
        let filter: std::collections::BTreeMap<String, String> = serde_json::from_str(filter)?;
        with(|state| {
            admit(state, "enrollments")?;
            let limit = limit.clamp(1, 100) as usize;
            let mut found = Vec::new();
            for (id, enrollment) in &state.effects.enrollments {
                let mut fits = cursor.is_none_or(|cursor| id.as_str() > cursor);
                for (key, wanted) in &filter {
                    fits = fits && matches(enrollment, key, wanted)?;
                }
                if fits {
                    found.push(enrollment.clone());
                }
            }
            let more = found.len() > limit;
            found.truncate(limit);
            let cursor = more.then(|| found.last().map(|last| last.id.clone())).flatten();
            Ok(Page { found, cursor })
        })
    }

    pub(crate) fn tag(id: &str, add: &[String], remove: &[String]) -> Result<(), Failure> {
        with(|state| {
            admit(state, "enrollments")?;
            let Some(enrollment) = state.effects.enrollments.get_mut(id) else {
                return Err(Failure::not_found(format!("no enrollment `{id}`")));
            };
            let mut facts: Value = serde_json::from_str(&enrollment.facts)?;
            let mut tags: std::collections::BTreeSet<String> = enrollment.read_facts()?.tags.into_iter().collect();
            tags.extend(add.iter().cloned());
            tags.retain(|tag| !remove.contains(tag));
            if let Some(object) = facts.as_object_mut() {
                object.insert("tags".to_owned(), json!(tags));
            }
            enrollment.facts = facts.to_string();
            Ok(())
        })
    }

    pub(crate) fn release(id: &str) -> Result<bool, Failure> {
        with(|state| {
            admit(state, "enrollments")?;
            let known = state.effects.enrollments.contains_key(id);
            let first = !state.effects.released.iter().any(|released| released == id);
            if known && first {
                state.effects.released.push(id.to_owned());
            }
            Ok(known && first)
        })
    }
}

pub(crate) mod commands {
    use super::{admit, with};
    use crate::commands::Outcome;
    use crate::mock::{Enqueued, queued};
    use crate::{CommandBody, CommandStatus, Failure, NewCommand};

    const FINAL: [&str; 4] = ["acknowledged", "errored", "expired", "cancelled"];

    fn check(command: &NewCommand) -> Result<(), Failure> {
        if matches!(command.body, CommandBody::AsJson(_)) && command.request_type().is_none() {
            return Err(Failure::invalid("Command.RequestType: missing"));
        }
        Ok(())
    }

    pub(crate) fn validate(command: &NewCommand, _target: Option<&str>) -> Result<Vec<String>, Failure> {
        with(|state| admit(state, "commands"))?;
        check(command)?;
        Ok(Vec::new())
    }

    pub(crate) fn enqueue(targets: &[String], command: &NewCommand) -> Result<Vec<Outcome>, Failure> {
        check(command)?;
        with(|state| {
            admit(state, "commands")?;
            let mut outcomes = Vec::new();
            for target in targets {
                let key = command.options.idempotency_key.as_ref();
                let same = |queued: &&Enqueued| queued.target == *target && key.is_some() && queued.command.options.idempotency_key.as_ref() == key;
                if let Some(first) = state.effects.enqueued.iter().find(same) {
                    outcomes.push(queued(target, first.uuid.clone()));
                    continue;
                }
                if state.effects.enqueued.len() >= state.commands_before + state.limits.commands {
                    return Err(Failure::new("quota", "too many commands"));
                }
                state.effects.next_uuid += 1;
                let uuid = format!("command-{}", state.effects.next_uuid);
                state.effects.enqueued.push(Enqueued { target: target.clone(), uuid: uuid.clone(), command: command.clone() });
                let status = CommandStatus {
                    uuid: uuid.clone(),
                    request_type: command.request_type().unwrap_or_default(),
                    state: "queued".to_owned(),
                    updated_at: state.now,
                    report: None,
                    facts: "{}".to_owned(),
                };
                state.effects.statuses.insert((target.clone(), uuid.clone()), status);
                outcomes.push(queued(target, uuid));
            }
            Ok(outcomes)
        })
    }

    pub(crate) fn pending(id: &str) -> Result<Vec<CommandStatus>, Failure> {
        with(|state| {
            admit(state, "commands")?;
            let statuses = state.effects.statuses.iter();
            Ok(statuses
                .filter(|((target, _), status)| target == id && !FINAL.contains(&status.state.as_str()))
                .map(|(_, status)| status.clone())
                .collect())
        })
    }

    pub(crate) fn get(id: &str, uuid: &str) -> Result<Option<CommandStatus>, Failure> {
        with(|state| {
            admit(state, "commands")?;
            let key = (id.to_owned(), uuid.to_owned());
            Ok(state.effects.statuses.get(&key).cloned())
        })
    }

    pub(crate) fn cancel(id: &str, uuid: &str) -> Result<bool, Failure> {
        with(|state| {
            admit(state, "commands")?;
            let key = (id.to_owned(), uuid.to_owned());
            let Some(status) = state.effects.statuses.get_mut(&key) else {
                return Ok(false);
            };
            if FINAL.contains(&status.state.as_str()) {
                return Ok(false);
            }
            "cancelled".clone_into(&mut status.state);
            Ok(true)
        })
    }
}

pub(crate) mod plist {
    use super::{admit, with};
    use crate::Failure;

    const UNSCRIPTED: &str = "the mock converts no property lists unless a conversion is scripted";

    pub(crate) fn to_json(document: &[u8]) -> Result<String, Failure> {
        let convert = with(|state| admit(state, "plist").map(|()| state.to_json.clone()))?;
        let convert = convert.ok_or_else(|| Failure::new("unavailable", UNSCRIPTED))?;
        String::from_utf8(convert(document)?).map_err(|error| Failure::invalid(error.to_string()))
    }

    pub(crate) fn from_json(document: &str) -> Result<Vec<u8>, Failure> {
        let convert = with(|state| admit(state, "plist").map(|()| state.from_json.clone()))?;
        convert.ok_or_else(|| Failure::new("unavailable", UNSCRIPTED))?(document.as_bytes())
    }
}

pub(crate) mod crypto {
    use super::{admit, with};
    use crate::Failure;

    /// Bytes that look random and are the same in every run.
    pub(crate) fn random(length: u32) -> Result<Vec<u8>, Failure> {
        with(|state| {
            admit(state, "crypto")?;
            if length > 4096 {
                return Err(Failure::invalid("length: at most 4096"));
            }
            let byte = |_| {
                state.random = state.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                state.random.to_be_bytes()[0]
            };
            Ok((0..length).map(byte).collect())
        })
    }
}

pub(crate) mod push {
    use super::{admit, with};
    use crate::Failure;

    const MAX_PUSHES: usize = 100;

    pub(crate) fn notify(targets: &[String]) -> Result<(), Failure> {
        with(|state| {
            admit(state, "push")?;
            if targets.is_empty() {
                return Err(Failure::invalid("targets: nobody"));
            }
            if targets.len() > MAX_PUSHES {
                return Err(Failure::new("quota", "too many pushes"));
            }
            if let Some(unknown) = targets.iter().find(|target| !state.effects.enrollments.contains_key(*target)) {
                return Err(Failure::new("not-found", format!("there is no enrollment {unknown}")));
            }
            state.effects.woken.extend_from_slice(targets);
            Ok(())
        })
    }
}

pub(crate) mod timers {
    use super::{admit, with};
    use crate::Failure;
    use crate::mock::Timer;

    pub(crate) fn set(name: &str, at: u64, who: Option<&str>, data: &[u8]) -> Result<(), Failure> {
        with(|state| {
            admit(state, "timers")?;
            state.timers_set += 1;
            if state.timers_set > state.limits.timers {
                return Err(Failure::new("quota", "too many timers"));
            }
            let who = who.map(str::to_owned);
            let timer = Timer { name: name.to_owned(), who: who.clone(), at, data: data.to_vec() };
            state.effects.timers.insert((name.to_owned(), who), timer);
            Ok(())
        })
    }

    pub(crate) fn cancel(name: &str, who: Option<&str>) -> Result<bool, Failure> {
        with(|state| {
            admit(state, "timers")?;
            let key = (name.to_owned(), who.map(str::to_owned));
            Ok(state.effects.timers.remove(&key).is_some())
        })
    }
}
