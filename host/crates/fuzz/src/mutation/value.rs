//! Property lists as values: read, changed in one place, written again in either form.

use std::time::{Duration, SystemTime};

use fastrand::Rng;
use plist::{Date, Dictionary, Value};
use wasmdm_protocol::json;
use wasmdm_protocol::plist::{parse, to_xml};

/// `None` where the input cannot be read.
pub(super) fn mutate(input: &[u8], random: &mut Rng) -> Option<Vec<u8>> {
    let mut value = parse(input).ok()?;
    change(&mut value, random);
    let mut binary = Vec::new();
    if random.bool() && value.to_writer_binary(&mut binary).is_ok() {
        return Some(binary);
    }
    Some(to_xml(&value).into())
}

/// The same with JSON.
pub(super) fn mutate_json(input: &[u8], random: &mut Rng) -> Option<Vec<u8>> {
    let mut value = json::from_json(&serde_json::from_slice(input).ok()?).ok()?;
    change(&mut value, random);
    Some(json::to_json(&value).to_string().into())
}

fn change(value: &mut Value, random: &mut Rng) {
    if random.u8(..4) > 0 {
        let count = match value {
            Value::Array(values) => values.len(),
            Value::Dictionary(entries) => entries.len(),
            _ => 0,
        };
        if count > 0 {
            let place = random.usize(..count);
            let inner = match value {
                Value::Array(values) => values.get_mut(place),
                Value::Dictionary(entries) => entries.values_mut().nth(place),
                _ => None,
            };
            if let Some(inner) = inner {
                return change(inner, random);
            }
        }
    }
    match random.u8(..4) {
        0 => *value = any(random),
        1 => {
            for _ in 0..=random.usize(..12) {
                let inner = value.clone();
                *value = if random.bool() { Value::Array(vec![inner]) } else { Value::Dictionary(Dictionary::from_iter([(key(random), inner)])) };
            }
        }
        _ => match value {
            Value::Array(values) => values.push(any(random)),
            Value::Dictionary(entries) => {
                entries.insert(key(random), any(random));
            }
            other => *other = any(random),
        },
    }
}

fn key(random: &mut Rng) -> String {
    let keys = [
        "",
        "$data",
        "$dictionary",
        "AwaitingConfiguration",
        "CommandUUID",
        "Data",
        "Endpoint",
        "EnrollmentID",
        "EnrollmentUserID",
        "MessageType",
        "PushMagic",
        "Status",
        "Token",
        "Topic",
        "UDID",
        "UnlockToken",
        "UserID",
        "UserShortName",
        "\u{1}",
        "\u{2}",
        "a & <b>",
    ];
    random.choice(keys).unwrap_or_default().to_owned()
}

fn any(random: &mut Rng) -> Value {
    match random.u8(..10) {
        0 => Value::Boolean(random.bool()),
        1 => Value::from(random.choice([i64::MIN, -1, 0, 1 << 53, i64::MAX]).unwrap_or_default()),
        2 => Value::from(u64::MAX),
        3 => Value::Real(random.choice([f64::NAN, f64::NEG_INFINITY, -0.0, 0.1, f64::MAX, f64::MIN_POSITIVE]).unwrap_or_default()),
        4 => Value::Data(std::iter::repeat_with(|| random.u8(..)).take(40).collect()),
        5 => Value::Date(Date::from(SystemTime::UNIX_EPOCH + Duration::from_micros(random.u64(..1 << 52)))),
        6 => Value::Array(Vec::new()),
        7 => Value::Dictionary(Dictionary::new()),
        8 => Value::String("x".repeat(random.choice([0, 1, 63, 64, 65, 255, 256, 1025]).unwrap_or_default())),
        _ => {
            let texts = [
                "Idle",
                "NotNow",
                "U1",
                "a:b",
                "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF",
                "tokens",
                "a\r\nb",
                "ü𝄞",
                "\u{0}",
                "]]>",
                "\u{85}",
                "declaration/../x",
            ];
            random.choice(texts).unwrap_or_default().into()
        }
    }
}
