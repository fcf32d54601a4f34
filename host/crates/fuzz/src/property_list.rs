//! Property lists in all their forms, and command documents.

use std::io::Cursor;

use bytes::Bytes;
use plist::Value;
use wasmdm_protocol::command::Command;
use wasmdm_protocol::json::{self, AsJson};
use wasmdm_protocol::plist::{parse, to_xml};

use crate::cost::{Bound, bounded};
use crate::kind_of;
use crate::values::{Slack, as_xml_holds, is_writable, same};

/// A binary document may stand for more than its length, up to a limit; everything else is linear.
pub(crate) const BOUND: Bound = Bound { bytes: 12 << 20, bytes_per_byte: 128 };

pub(crate) fn check(input: &[u8]) -> String {
    let outcome = match bounded(BOUND, input.len(), || parse(input)) {
        Err(error) => kind_of(&error),
        Ok(value) => {
            forms_agree(&value);
            another_reader_agrees(input, &value);
            json_agrees(&value);
            secrets_stay_out(&value);
            format!("{} {}", if input.starts_with(b"bplist00") { "binary" } else { "xml" }, shape(&value, 3))
        }
    };
    let command = match bounded(BOUND, input.len(), || Command::parse(Bytes::copy_from_slice(input))) {
        Err(error) => format!("{}: {}", error.field, kind_of(&error)),
        Ok(command) => {
            assert_eq!(command.raw, input, "a device gets a command as it was queued");
            let other = Command::parse_with_uuid(input, "another".into()).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!((other.uuid.as_str(), &other.request_type), ("another", &command.request_type));
            assert_eq!(Command::parse(other.raw.clone()).as_ref(), Ok(&other), "what is queued under another id is a command again");
            "a command".into()
        }
    };
    format!("{outcome}; {command}")
}

/// Written as XML and as binary and read again, it is the same value.
pub(crate) fn forms_agree(value: &Value) {
    let Some(expected) = as_xml_holds(value) else { return };
    let xml = to_xml(value);
    let read = parse(&xml).unwrap_or_else(|error| panic!("what was written is refused: {error}"));
    assert!(same(&read, &expected, Slack::XML), "written as XML and read again it is {read:?} instead of {expected:?}");
    assert_eq!(to_xml(&read), xml, "written again it is another document");
    let foreign = Value::from_reader_xml(Cursor::new(&xml)).unwrap_or_else(|error| panic!("another reader refuses what was written: {error}"));
    assert!(same(&foreign, &read, Slack::NONE), "another reader takes it for {foreign:?} instead of {read:?}");
    let mut binary = Vec::new();
    // The other writer has no years before 1 or after 9999, nor nothing but that to refuse.
    if value.to_writer_binary(&mut binary).is_ok() {
        let read = parse(&binary).unwrap_or_else(|error| panic!("its binary form is refused: {error}"));
        assert!(same(&read, value, Slack::BINARY), "its binary form is read as {read:?} instead of {value:?}");
    }
}

/// The other reader knows more than ours accepts, and takes some of that wrongly; what it reads must not be another value.
fn another_reader_agrees(input: &[u8], value: &Value) {
    if input.starts_with(b"bplist00") {
        if let Ok(foreign) = Value::from_reader(Cursor::new(input)) {
            assert!(same(&foreign, value, Slack::BINARY), "another reader takes it for {foreign:?} instead of {value:?}");
        }
        return;
    }
    // It drops CDATA and what comments or instructions divide, and takes line ends as they are.
    let dropped: [&[u8]; 4] = [b"<![", b"<!--", b"<?", b"\r"];
    let prolog = input.iter().position(|byte| *byte == b'>').map_or(0, |end| end + 1);
    let behind = input.get(prolog..).unwrap_or_default();
    if dropped.iter().any(|form| behind.windows(form.len()).any(|window| window == *form)) {
        return;
    }
    if let Ok(foreign) = Value::from_reader_xml(Cursor::new(input)) {
        assert!(same(&foreign, value, Slack::XML), "another reader takes it for {foreign:?} instead of {value:?}");
    }
}

/// Its JSON stands for the same value, and both ways of writing it write the same.
fn json_agrees(value: &Value) {
    let tree = json::to_json(value);
    if is_writable(value) {
        let read = json::from_json(&tree).unwrap_or_else(|error| panic!("its JSON is refused: {error}"));
        assert!(same(&read, value, Slack::NONE), "its JSON stands for {read:?} instead of {value:?}");
    }
    let redacted = json::to_redacted_json(value);
    for (written, tree) in [(AsJson::whole(value), &tree), (AsJson::redacted(value), &redacted)] {
        let written = serde_json::to_string(&written).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(written, tree.to_string(), "two ways of writing its JSON differ");
    }
}

/// Of a secret key's value nothing is left, in either way of leaving it out.
fn secrets_stay_out(value: &Value) {
    let without = json::without_secrets(value);
    assert_eq!(json::to_redacted_json(&without), json::to_redacted_json(value), "without its secrets it is another value");
    assert!(!holds_secret(&without), "a secret is still there");
}

fn holds_secret(value: &Value) -> bool {
    match value {
        Value::Array(values) => values.iter().any(holds_secret),
        Value::Dictionary(entries) => entries.iter().any(|(key, value)| {
            if json::is_secret_key(key) {
                match value {
                    Value::String(text) => !text.is_empty(),
                    Value::Data(bytes) => !bytes.is_empty(),
                    Value::Array(values) => !values.is_empty(),
                    Value::Dictionary(entries) => !entries.is_empty(),
                    _ => true,
                }
            } else {
                holds_secret(value)
            }
        }),
        _ => false,
    }
}

/// In a few characters what the value is made of.
pub(crate) fn shape(value: &Value, depth: usize) -> String {
    match value {
        Value::Array(values) => match values.first().filter(|_| depth > 0) {
            Some(first) => format!("[{}]", shape(first, depth - 1)),
            None => "[]".into(),
        },
        Value::Dictionary(entries) => match entries.values().next().filter(|_| depth > 0) {
            Some(first) => format!("{{{}}}", shape(first, depth - 1)),
            None => "{}".into(),
        },
        Value::Boolean(_) => "b".into(),
        Value::Data(_) => "d".into(),
        Value::Date(_) => "t".into(),
        Value::Real(_) => "r".into(),
        Value::Integer(_) => "i".into(),
        Value::String(_) => "s".into(),
        _ => panic!("the readers make no such value"),
    }
}
