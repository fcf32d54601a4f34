//! Property lists as JSON, and status reports of declarative management.

use wasmdm_protocol::command::Command;
use wasmdm_protocol::declarative_management::status_without_secrets;
use wasmdm_protocol::{json, plist};

use crate::cost::{Bound, bounded};
use crate::kind_of;
use crate::property_list::{forms_agree, shape};
use crate::values::{Slack, same};

const BOUND: Bound = Bound { bytes: 1 << 20, bytes_per_byte: 512 };
/// A few times its length, for numbers that are written out longer: it is read before anybody has said whose it is.
const CLEANING: Bound = Bound { bytes: 4 << 10, bytes_per_byte: 16 };

pub(crate) fn check(input: &[u8]) -> String {
    status_report(input);
    let Ok(tree) = serde_json::from_slice::<serde_json::Value>(input) else { return "no JSON".into() };
    let outcome = match bounded(BOUND, input.len(), || json::from_json(&tree)) {
        Err(error) => kind_of(&error.problem),
        Ok(value) => {
            forms_agree(&value);
            let written = json::to_json(&value);
            let read = json::from_json(&written).unwrap_or_else(|error| panic!("its JSON is refused: {error}"));
            assert!(same(&read, &value, Slack::NONE), "its JSON stands for {read:?} instead of {value:?}");
            // As text, too, unless there are more levels than the other reader of JSON takes.
            if let Ok(tree) = serde_json::from_str::<serde_json::Value>(&written.to_string()) {
                let read = json::from_json(&tree).unwrap_or_else(|error| panic!("its JSON is refused: {error}"));
                assert!(same(&read, &value, Slack::JSON), "its JSON as text stands for {read:?} instead of {value:?}");
            }
            shape(&value, 3)
        }
    };
    let command = match Command::from_json("0001".into(), &tree) {
        Err(error) => kind_of(&error.problem),
        Ok(command) => {
            assert_eq!(Command::parse(command.raw.clone()).as_ref(), Ok(&command), "what was made of JSON is a command");
            assert!(plist::parse(&command.raw).is_ok());
            "a command".into()
        }
    };
    format!("{outcome}; {command}")
}

/// What is handed on is the report to the byte or one without its secrets; cleaning it twice changes nothing.
fn status_report(input: &[u8]) {
    let cleaned = bounded(CLEANING, input.len(), || status_without_secrets(input));
    if *cleaned != *input {
        assert_eq!(status_without_secrets(&cleaned), cleaned, "a second cleaning finds more");
    }
    if let Ok(tree) = serde_json::from_slice::<serde_json::Value>(&cleaned) {
        assert!(!holds_secret(&tree), "a secret is still there: {tree}");
    } else {
        assert!(cleaned.is_empty(), "what cannot be read could hold anything");
    }
}

fn holds_secret(tree: &serde_json::Value) -> bool {
    match tree {
        serde_json::Value::Object(entries) => entries.iter().any(|(key, value)| {
            let item = key.rsplit('.').next().unwrap_or(key);
            (["applecare-token", "push-magic", "push-token"].contains(&item) && !value.is_null()) || holds_secret(value)
        }),
        serde_json::Value::Array(values) => values.iter().any(holds_secret),
        _ => false,
    }
}
