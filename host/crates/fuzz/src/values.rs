//! Property lists held against each other, with what a form cannot hold left out.

use std::time::{Duration, SystemTime};

use wasmdm_protocol::plist::{Dictionary, Value};

/// The value as XML can hold it: characters that it cannot write are replaced. `None` where that makes two keys of a dictionary the same.
pub(crate) fn as_xml_holds(value: &Value) -> Option<Value> {
    Some(match value {
        Value::String(text) => Value::String(replaced(text)),
        Value::Array(values) => Value::Array(values.iter().map(as_xml_holds).collect::<Option<_>>()?),
        Value::Dictionary(entries) => {
            let mut kept = Dictionary::new();
            for (key, value) in entries {
                if kept.insert(replaced(key), as_xml_holds(value)?).is_some() {
                    return None;
                }
            }
            Value::Dictionary(kept)
        }
        other => other.clone(),
    })
}

/// Whether XML holds all of its text.
pub(crate) fn is_writable(value: &Value) -> bool {
    match value {
        Value::String(text) => replaced(text) == *text,
        Value::Array(values) => values.iter().all(is_writable),
        Value::Dictionary(entries) => entries.iter().all(|(key, value)| replaced(key) == *key && is_writable(value)),
        _ => true,
    }
}

fn replaced(text: &str) -> String {
    let unwritable = |character| matches!(character, '\u{0}'..='\u{8}' | '\u{b}' | '\u{c}' | '\u{e}'..='\u{1f}' | '\u{fffe}' | '\u{ffff}');
    text.replace(unwritable, "\u{fffd}")
}

/// What two forms of one value may differ in.
#[derive(Clone, Copy)]
pub(crate) struct Slack {
    /// Of dates.
    pub(crate) time: Duration,
    /// Of numbers with a fraction, relative to them.
    pub(crate) real: f64,
}

impl Slack {
    pub(crate) const NONE: Self = Self { time: Duration::ZERO, real: 0.0 };
    /// XML has whole seconds.
    pub(crate) const XML: Self = Self { time: Duration::from_secs(1), real: 0.0 };
    /// Seconds since 2001 as a number with a fraction are good to some microseconds in our century, and to less in the last one.
    pub(crate) const BINARY: Self = Self { time: Duration::from_micros(100), real: 0.0 };
    /// Reading JSON is not exact in the last place of a number.
    pub(crate) const JSON: Self = Self { time: Duration::ZERO, real: 1e-15 };
}

/// Whether both are the same but for that. The order of keys counts.
pub(crate) fn same(one: &Value, other: &Value, slack: Slack) -> bool {
    match (one, other) {
        (Value::Array(one), Value::Array(other)) => one.len() == other.len() && one.iter().zip(other).all(|(one, other)| same(one, other, slack)),
        (Value::Dictionary(one), Value::Dictionary(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| one.0 == other.0 && same(one.1, other.1, slack))
        }
        (Value::Date(one), Value::Date(other)) => {
            let (one, other) = (SystemTime::from(*one), SystemTime::from(*other));
            one.duration_since(other).unwrap_or_else(|error| error.duration()) <= slack.time
        }
        (Value::Real(one), Value::Real(other)) => {
            one.total_cmp(other).is_eq() || (one.is_nan() && other.is_nan()) || (one - other).abs() <= one.abs() * slack.real
        }
        _ => one == other,
    }
}
