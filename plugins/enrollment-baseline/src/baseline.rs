//! The first commands, and the keys by which their results are recognised.
//!
//! The host puts the id of the event and the command's place in the answer before a key: `EVENT/2/baseline/2/5` is step 2 of 5 of
//! the enrollment that EVENT told of, and `EVENT/3/baseline-unawaited/0` a command that nobody waits for.

use wasmdm_plugin::{NewCommand, commands};

use crate::settings::Settings;

const KEY: &str = "baseline/";
const UNAWAITED_KEY: &str = "baseline-unawaited/";

/// A device in Setup Assistant answers it with `NotNow`: who waits for it waits until the timeout (Apple defers declarative
/// management until the setup is over).
const UNAWAITED: &str = "DeclarativeManagement";

/// Which of an enrollment's steps a command is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Step<'a> {
    /// The id of the event `enrollment.enrolled`.
    pub(crate) event: &'a str,
    /// From 0.
    pub(crate) number: u32,
    /// How many there are.
    pub(crate) total: u32,
}

/// The step that an idempotency key names.
pub(crate) fn step(idempotency_key: &str) -> Option<Step<'_>> {
    let (before, step) = idempotency_key.rsplit_once(&format!("/{KEY}"))?;
    // An id has no slash.
    let event = before.split('/').next()?;
    let (number, total) = step.split_once('/')?;
    let step = Step { event, number: number.parse().ok()?, total: total.parse().ok()? };
    (step.number < step.total).then_some(step)
}

/// How many commands are waited for.
pub(crate) fn awaited(settings: &Settings) -> usize {
    unkeyed(settings).iter().filter(|command| is_awaited(command)).count()
}

/// The first commands of an enrollment, in order.
pub(crate) fn commands(settings: &Settings) -> Vec<NewCommand> {
    let total = awaited(settings);
    let (mut number, mut unawaited) = (0, 0);
    let keyed = |command: NewCommand| {
        if is_awaited(&command) {
            number += 1;
            command.idempotency_key(format!("{KEY}{}/{total}", number - 1))
        } else {
            unawaited += 1;
            command.idempotency_key(format!("{UNAWAITED_KEY}{}", unawaited - 1))
        }
    };
    unkeyed(settings).into_iter().map(keyed).collect()
}

fn unkeyed(settings: &Settings) -> Vec<NewCommand> {
    let queries = &settings.device_information;
    let information = (!queries.is_empty()).then(|| commands::device_information(queries));
    let profiles = settings.profiles.iter().map(|profile| commands::install_profile(&without_white_space(profile)));
    let others = settings.commands.iter().map(NewCommand::json);
    information.into_iter().chain(profiles).chain(others).collect()
}

fn is_awaited(command: &NewCommand) -> bool {
    command.request_type().as_deref() != Some(UNAWAITED)
}

/// Base64 as a configuration file holds it: in lines.
pub(crate) fn without_white_space(base64: &str) -> String {
    base64.split_ascii_whitespace().collect()
}

#[cfg(test)]
mod tests {
    use super::{Step, step};
    use serde_json::{Value, json};
    use wasmdm_plugin::{CommandBody, EventCommands, NewCommand, mock};

    use crate::EnrollmentBaseline;

    fn generate(config: Value, topic: &str) -> Vec<NewCommand> {
        let host = mock::Host::new();
        host.set_config(config);
        let event = mock::event(topic, json!({}));
        host.call(|| EnrollmentBaseline::generate(mock::call(), event)).unwrap()
    }

    fn body(command: &NewCommand) -> Value {
        let CommandBody::AsJson(body) = &command.body else {
            panic!("not JSON: {command:?}");
        };
        serde_json::from_str(body).unwrap()
    }

    fn keys(commands: &[NewCommand]) -> Vec<&str> {
        commands.iter().filter_map(|command| command.options.idempotency_key.as_deref()).collect()
    }

    #[test]
    fn information_profiles_and_other_commands_go_out_in_order() {
        let config = json!({
            "device_information": ["OSVersion"],
            "profiles": ["QUJD\n REVG"],
            "commands": [{ "RequestType": "SecurityInfo" }],
        });
        let commands = generate(config, "enrollment.enrolled");
        assert_eq!(
            commands.iter().map(body).collect::<Vec<_>>(),
            [
                json!({ "RequestType": "DeviceInformation", "Queries": ["OSVersion"] }),
                json!({ "RequestType": "InstallProfile", "Payload": { "$data": "QUJDREVG" } }),
                json!({ "RequestType": "SecurityInfo" }),
            ]
        );
        assert_eq!(keys(&commands), ["baseline/0/3", "baseline/1/3", "baseline/2/3"]);
        assert!(commands.iter().all(|command| command.options.push));
    }

    #[test]
    fn declarative_management_is_sent_but_not_waited_for() {
        let config = json!({
            "device_information": [],
            "commands": [{ "RequestType": "DeclarativeManagement" }, { "RequestType": "SecurityInfo" }],
        });
        assert_eq!(keys(&generate(config, "enrollment.enrolled")), ["baseline-unawaited/0", "baseline/0/1"]);
    }

    #[test]
    fn other_events_are_answered_with_nothing() {
        assert!(generate(json!({}), "enrollment.checked-out").is_empty());
    }

    #[test]
    fn a_step_is_read_from_the_key_that_the_host_completed() {
        assert_eq!(step("0199-a/2/baseline/2/5"), Some(Step { event: "0199-a", number: 2, total: 5 }));
        for other in ["baseline/2/5", "e/baseline/5/5", "e/baseline/x/5", "e/baseline-unawaited/0", "e/device-configured", ""] {
            assert_eq!(step(other), None, "{other}");
        }
    }
}
