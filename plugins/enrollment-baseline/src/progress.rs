//! Following an enrollment until its device may leave Setup Assistant.
//!
//! ```text
//! latest/DEVICE         the enrollment that counts: its event, its time, whether the device awaits, whether it was released
//! done/DEVICE/EVENT     the steps of that enrollment that are final
//! ```
//!
//! `DeviceConfigured` goes out once: when all steps are final, or when the timer `release` fires. Which of the two comes
//! first is decided by `latest/DEVICE`, which both read and write: of two calls at once, the host lets one commit and calls
//! the other again, which then finds the device released.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use wasmdm_plugin::{CommandData, Event, EventData, Failure, Timestamp, commands, enrollments, info, kv, runtime, timers};

use crate::baseline::{self, Step};
use crate::settings;

/// The timer that ends the wait.
pub(crate) const TIMER: &str = "release";

/// Far longer than the longest wait, and bounded: a key per device for ever would fill the key-values.
const KEPT_SECONDS: u32 = 7 * 24 * 60 * 60;

/// A cancelled step may mean that a new Authenticate has emptied the queue. Its events are then on the way, and stop this.
const AFTER_CANCELLATION_MS: u64 = 60_000;

/// Goes before whatever is still queued when the time is up.
const URGENT: i8 = 100;

/// The enrollment of a device that counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Latest {
    /// The id of its event `enrollment.enrolled`.
    event: String,
    at: Timestamp,
    /// Whether the device waits in Setup Assistant.
    awaiting: bool,
    released: bool,
}

/// The steps that are final, and how many there are.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Done {
    steps: BTreeSet<u32>,
    total: u32,
}

impl Done {
    fn is_complete(&self) -> bool {
        usize::try_from(self.total).is_ok_and(|total| self.steps.len() >= total)
    }
}

/// Takes one event.
pub(crate) fn follow(event: &Event) -> Result<(), Failure> {
    // Users check out, and await their own configuration, without their device.
    let Some(who) = event.who.as_ref().filter(|who| who.is_device_channel()) else {
        return Ok(());
    };
    let device = who.id.as_str();
    match event.topic.as_str() {
        "enrollment.enrolled" => enrolled(device, event),
        "enrollment.enrolling" | "enrollment.checked-out" => over(device, event.at),
        "configuration.awaiting" => awaits_now(device, event),
        "configuration.released" => released(device, event.at),
        _ => match event.read_data()?.command {
            Some(command) => finished(device, &command, event.topic == "command.cancelled"),
            None => Ok(()),
        },
    }
}

fn enrolled(device: &str, event: &Event) -> Result<(), Failure> {
    let before = latest(device)?;
    if before.as_ref().is_some_and(|before| before.at > event.at || before.event == event.id) {
        // An old event that was put back by hand, or the same again.
        return Ok(());
    }
    if let Some(before) = before {
        kv::remove(&done_key(device, &before.event))?;
    }
    let latest = Latest { event: event.id.clone(), at: event.at, awaiting: awaits_configuration(event)?, released: false };
    if latest.awaiting {
        return wait(device, latest, event.at);
    }
    put_latest(device, &latest)?;
    timers::cancel(TIMER, Some(device))?;
    Ok(())
}

/// The device began to wait: said with its enrollment already, or only later (with its bootstrap token).
fn awaits_now(device: &str, event: &Event) -> Result<(), Failure> {
    match latest(device)? {
        Some(latest) if latest.at <= event.at && !latest.awaiting && !latest.released => {
            let latest = Latest { awaiting: true, ..latest };
            wait(device, latest, event.at)
        }
        _ => Ok(()),
    }
}

/// From now on the last result or the timer releases the device.
fn wait(device: &str, latest: Latest, since: Timestamp) -> Result<(), Failure> {
    let settings = settings::read()?;
    let complete = done(device, &latest.event)?.is_some_and(|done| done.is_complete());
    if complete || baseline::awaited(&settings) == 0 {
        return release(device, latest, "nothing is left to wait for");
    }
    put_latest(device, &latest)?;
    let at = since.saturating_add(settings.release_after_ms()?);
    timers::set(TIMER, at, Some(device), latest.event.as_bytes())
}

/// A new Authenticate or a CheckOut: nothing of what was before counts any more.
fn over(device: &str, at: Timestamp) -> Result<(), Failure> {
    let Some(latest) = latest(device)?.filter(|latest| latest.at <= at) else {
        return Ok(());
    };
    kv::remove(&latest_key(device))?;
    kv::remove(&done_key(device, &latest.event))?;
    timers::cancel(TIMER, Some(device))?;
    Ok(())
}

/// The device was released, by this plugin or by a person.
fn released(device: &str, at: Timestamp) -> Result<(), Failure> {
    let Some(latest) = latest(device)?.filter(|latest| latest.at <= at && latest.awaiting && !latest.released) else {
        return Ok(());
    };
    put_latest(device, &Latest { released: true, ..latest })?;
    timers::cancel(TIMER, Some(device))?;
    Ok(())
}

/// A command has its final result. `NotNow` is none, and not even subscribed to: the step just stays open.
fn finished(device: &str, command: &CommandData, cancelled: bool) -> Result<(), Failure> {
    let Some(step) = command.idempotency_key.as_deref().and_then(baseline::step) else {
        return Ok(());
    };
    if !is_ours(command)? {
        return Ok(());
    }
    let latest = latest(device)?.filter(|latest| latest.event == step.event);
    if latest.as_ref().is_some_and(|latest| latest.released) {
        return Ok(());
    }
    let done = add_done(device, step)?;
    match latest.filter(|latest| latest.awaiting && done.is_complete()) {
        Some(latest) if cancelled => {
            let at = runtime::now().saturating_add(AFTER_CANCELLATION_MS);
            timers::set(TIMER, at, Some(device), latest.event.as_bytes())
        }
        Some(latest) => release(device, latest, "all first commands are done"),
        // It does not wait yet, or the event of the enrollment has not been here: who begins to wait finds what is done.
        None => Ok(()),
    }
}

/// The timer has fired.
pub(crate) fn time_is_up(device: &str, data: &[u8]) -> Result<(), Failure> {
    let waiting = |latest: &Latest| latest.event.as_bytes() == data && latest.awaiting && !latest.released;
    match latest(device)?.filter(waiting) {
        Some(latest) => send(device, latest, URGENT, "the time is up"),
        None => Ok(()),
    }
}

/// Releases the device before the time is up.
fn release(device: &str, latest: Latest, why: &str) -> Result<(), Failure> {
    send(device, latest, 0, why)?;
    timers::cancel(TIMER, Some(device))?;
    Ok(())
}

/// Sends `DeviceConfigured` and remembers it, in one commit.
fn send(device: &str, latest: Latest, priority: i8, why: &str) -> Result<(), Failure> {
    let state = enrollments::get(device)?.map(|enrollment| enrollment.read_facts()).transpose()?;
    // Between a new Authenticate and its TokenUpdate the command would meet the device too early.
    if state.and_then(|facts| facts.state).as_deref() == Some("enrolled") {
        let command = commands::device_configured().idempotency_key(format!("device-configured/{}", latest.event)).priority(priority);
        commands::enqueue_for(device, &command)?;
        info!("Releasing {device} from Setup Assistant: {why}"; enrollment = device);
    }
    kv::remove(&done_key(device, &latest.event))?;
    put_latest(device, &Latest { released: true, ..latest })
}

/// Whether the `TokenUpdate` said that the device waits. Absent is unknown, and then nobody may be waiting.
fn awaits_configuration(event: &Event) -> Result<bool, Failure> {
    let data: EventData = event.read_data()?;
    let said = data.message.as_ref().and_then(|message| message.get("AwaitingConfiguration"));
    Ok(said.and_then(Value::as_bool).unwrap_or(false))
}

/// Whether this plugin has queued the command.
fn is_ours(command: &CommandData) -> Result<bool, Failure> {
    let Some(plugin) = command.origin.as_deref().and_then(|origin| origin.strip_prefix("plugin:")) else {
        return Ok(false);
    };
    let name = runtime::info()?.name;
    // A tenant's own plugin stands with its tenant before its name.
    Ok(plugin == name || plugin.ends_with(&format!("/{name}")))
}

fn add_done(device: &str, step: Step<'_>) -> Result<Done, Failure> {
    let mut done = done(device, step.event)?.unwrap_or_default();
    done.total = step.total;
    done.steps.insert(step.number);
    let value = serde_json::to_vec(&done)?;
    kv::put_for(&done_key(device, step.event), &value, KEPT_SECONDS)?;
    Ok(done)
}

fn latest(device: &str) -> Result<Option<Latest>, Failure> {
    kv::get_json(&latest_key(device))
}

fn put_latest(device: &str, latest: &Latest) -> Result<(), Failure> {
    let value = serde_json::to_vec(latest)?;
    kv::put_for(&latest_key(device), &value, KEPT_SECONDS)?;
    Ok(())
}

fn done(device: &str, event: &str) -> Result<Option<Done>, Failure> {
    kv::get_json(&done_key(device, event))
}

fn latest_key(device: &str) -> String {
    format!("latest/{device}")
}

fn done_key(device: &str, event: &str) -> String {
    format!("done/{device}/{event}")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use wasmdm_plugin::mock::{self, Host};
    use wasmdm_plugin::{Event, EventCommands, EventSink, Failure, NewCommand, Schedule};

    use crate::EnrollmentBaseline;

    const DEVICE: &str = "UDID-1";
    const MINUTE: u64 = 60_000;

    /// A host with two first commands and an enrolled device.
    fn host() -> Host {
        let host = Host::new();
        host.set_info(json!({ "name": "enrollment-baseline" }));
        host.set_config(json!({ "profiles": ["QUJD"], "release_after": "15m" }));
        set_state(&host, "enrolled");
        host
    }

    fn set_state(host: &Host, state: &str) {
        host.add_enrollment(mock::enrollment(DEVICE, json!({ "state": state })));
    }

    fn about_device(id: &str, topic: &str, data: Value) -> Event {
        Event { id: id.to_owned(), who: Some(mock::enrollment(DEVICE, json!({}))), ..mock::event(topic, data) }
    }

    fn enrolled(id: &str) -> Event {
        about_device(id, "enrollment.enrolled", json!({ "message": { "AwaitingConfiguration": true }, "re_enrolling": false }))
    }

    fn handle(host: &Host, event: Event) {
        host.call(|| EnrollmentBaseline::handle(mock::call(), event)).unwrap();
    }

    /// What `event-commands` answers to that event, as the host keys it.
    fn keys(host: &Host, event: &Event) -> Vec<String> {
        let commands = host.call(|| EnrollmentBaseline::generate(mock::call(), event.clone())).unwrap();
        let key = |command: &NewCommand| command.options.idempotency_key.clone();
        commands.iter().filter_map(key).enumerate().map(|(place, key)| format!("{}/{place}/{key}", event.id)).collect()
    }

    fn result(topic: &str, key: &str) -> Event {
        let command = json!({
            "uuid": "C-1", "request_type": "InstallProfile", "status": "acknowledged",
            "origin": "plugin:enrollment-baseline", "idempotency_key": key,
        });
        about_device("result", topic, json!({ "command": command }))
    }

    fn fire_timers(host: &Host) -> Result<usize, Failure> {
        let due = host.due_timers();
        let count = due.len();
        for timer in due {
            host.call(|| EnrollmentBaseline::tick(mock::call(), timer.name, timer.at, timer.who, timer.data))?;
        }
        Ok(count)
    }

    fn releases(host: &Host) -> usize {
        let enqueued = host.enqueued();
        let sent = enqueued.iter().filter(|queued| queued.target == DEVICE);
        sent.filter(|queued| queued.command.request_type().as_deref() == Some("DeviceConfigured")).count()
    }

    #[test]
    fn the_device_is_released_once_when_all_commands_are_final() {
        let host = host();
        let event = enrolled("E1");
        let keys = keys(&host, &event);
        handle(&host, event);
        handle(&host, result("command.acknowledged", &keys[0]));
        assert_eq!(releases(&host), 0);
        assert_eq!(host.timers().len(), 1);
        handle(&host, result("command.errored", &keys[1]));
        assert_eq!(releases(&host), 1);
        assert!(host.timers().is_empty());
        handle(&host, result("command.errored", &keys[1]));
        host.advance(60 * MINUTE);
        assert_eq!((fire_timers(&host).unwrap(), releases(&host)), (0, 1));
    }

    #[test]
    fn every_final_status_counts_and_not_now_does_not() {
        for topic in ["command.acknowledged", "command.errored", "command.format-error", "command.expired"] {
            let host = host();
            let event = enrolled("E1");
            let keys = keys(&host, &event);
            handle(&host, event);
            for key in &keys {
                handle(&host, result(topic, key));
            }
            assert_eq!(releases(&host), 1, "{topic}");
        }
    }

    #[test]
    fn results_may_come_before_the_enrollment_is_seen() {
        let host = host();
        let event = enrolled("E1");
        for key in keys(&host, &event) {
            handle(&host, result("command.acknowledged", &key));
        }
        assert_eq!(releases(&host), 0);
        handle(&host, event.clone());
        handle(&host, event);
        assert_eq!(releases(&host), 1);
        assert!(host.timers().is_empty());
    }

    #[test]
    fn one_command_that_is_never_answered_releases_the_device_at_the_timeout() {
        let host = host();
        let event = enrolled("E1");
        let keys = keys(&host, &event);
        handle(&host, event);
        handle(&host, result("command.acknowledged", &keys[0]));
        host.advance(15 * MINUTE - 1);
        assert_eq!((fire_timers(&host).unwrap(), releases(&host)), (0, 0));
        host.advance(1);
        assert_eq!((fire_timers(&host).unwrap(), releases(&host)), (1, 1));
        assert!(host.enqueued()[0].command.options.priority > 0);
        handle(&host, result("command.acknowledged", &keys[1]));
        assert_eq!(releases(&host), 1);
    }

    #[test]
    fn a_device_that_does_not_wait_is_left_alone() {
        for message in [json!({}), json!({ "AwaitingConfiguration": false })] {
            let host = host();
            let event = about_device("E1", "enrollment.enrolled", json!({ "message": message }));
            let keys = keys(&host, &event);
            assert_eq!(keys.len(), 2);
            handle(&host, event);
            for key in &keys {
                handle(&host, result("command.acknowledged", key));
            }
            assert_eq!((releases(&host), host.timers().len()), (0, 0));
        }
    }

    #[test]
    fn a_device_that_begins_to_wait_later_is_released_then() {
        let host = host();
        let event = about_device("E1", "enrollment.enrolled", json!({ "message": {} }));
        let keys = keys(&host, &event);
        handle(&host, event);
        handle(&host, result("command.acknowledged", &keys[0]));
        handle(&host, about_device("W1", "configuration.awaiting", json!({})));
        assert_eq!((releases(&host), host.timers().len()), (0, 1));
        handle(&host, result("command.acknowledged", &keys[1]));
        assert_eq!((releases(&host), host.timers().len()), (1, 0));
        handle(&host, about_device("W2", "configuration.awaiting", json!({})));
        assert_eq!((releases(&host), host.timers().len()), (1, 0));
    }

    #[test]
    fn what_a_user_of_the_device_does_changes_nothing() {
        let host = host();
        handle(&host, enrolled("E1"));
        for topic in ["enrollment.checked-out", "configuration.released"] {
            let mut event = about_device("U1", topic, json!({}));
            let who = event.who.as_mut().unwrap();
            who.parent_id = Some(DEVICE.to_owned());
            who.id = format!("{DEVICE}:USER");
            handle(&host, event);
        }
        assert_eq!(host.timers().len(), 1);
    }

    #[test]
    fn without_first_commands_the_device_is_released_at_once() {
        let host = host();
        host.set_config(json!({ "device_information": [] }));
        handle(&host, enrolled("E1"));
        assert_eq!((releases(&host), host.timers().len()), (1, 0));
    }

    #[test]
    fn re_enrolling_begins_anew() {
        let host = host();
        let first = enrolled("E1");
        let first_keys = keys(&host, &first);
        handle(&host, first.clone());
        handle(&host, result("command.acknowledged", &first_keys[0]));
        host.advance(10 * MINUTE);
        handle(&host, about_device("A2", "enrollment.enrolling", json!({})));
        assert!(host.timers().is_empty() && host.pairs().is_empty());
        let second = enrolled("E2");
        let second_keys = keys(&host, &second);
        handle(&host, second);
        // Neither the rest of the first enrollment nor its event put back count.
        handle(&host, result("command.acknowledged", &first_keys[1]));
        handle(&host, first);
        host.advance(5 * MINUTE);
        assert_eq!((fire_timers(&host).unwrap(), releases(&host)), (0, 0));
        for key in &second_keys {
            handle(&host, result("command.acknowledged", key));
        }
        assert_eq!(releases(&host), 1);
    }

    #[test]
    fn a_queue_that_a_new_authenticate_empties_releases_nobody() {
        let host = host();
        let event = enrolled("E1");
        let keys = keys(&host, &event);
        handle(&host, event);
        set_state(&host, "enrolling");
        for key in &keys {
            handle(&host, result("command.cancelled", key));
        }
        handle(&host, about_device("A2", "enrollment.enrolling", json!({})));
        set_state(&host, "enrolled");
        handle(&host, enrolled("E2"));
        host.advance(2 * MINUTE);
        assert_eq!((fire_timers(&host).unwrap(), releases(&host)), (0, 0));
    }

    #[test]
    fn commands_that_a_person_cancels_release_the_device_soon() {
        let host = host();
        let event = enrolled("E1");
        let keys = keys(&host, &event);
        handle(&host, event);
        for key in &keys {
            handle(&host, result("command.cancelled", key));
        }
        assert_eq!(releases(&host), 0);
        host.advance(MINUTE);
        assert_eq!((fire_timers(&host).unwrap(), releases(&host)), (1, 1));
    }

    #[test]
    fn a_device_that_somebody_else_released_is_not_released_again() {
        let host = host();
        let event = enrolled("E1");
        let keys = keys(&host, &event);
        handle(&host, event);
        handle(&host, about_device("R1", "configuration.released", json!({})));
        assert!(host.timers().is_empty());
        for key in &keys {
            handle(&host, result("command.acknowledged", key));
        }
        assert_eq!(releases(&host), 0);
    }

    #[test]
    fn commands_of_others_do_not_count() {
        let host = host();
        let event = enrolled("E1");
        let keys = keys(&host, &event);
        handle(&host, event);
        for origin in ["api:admin", "plugin:other"] {
            for key in &keys {
                let mut of_other = result("command.acknowledged", key);
                of_other.data.body = of_other.data.body.replace("plugin:enrollment-baseline", origin);
                handle(&host, of_other);
            }
        }
        assert_eq!(releases(&host), 0);
    }
}
