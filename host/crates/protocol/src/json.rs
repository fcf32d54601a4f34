//! Property lists as JSON, as the plugin contract and `/api/v1` write them.
//!
//! Strings, booleans, arrays and dictionaries are JSON's own. `<data>` is `{"$data": base64}`, `<date>` is `{"$date": rfc3339}`. An integer
//! is a number up to 2^53 and `{"$integer": "…"}` beyond, a real is a number with a fraction or an exponent, or `{"$real": "nan"}`, `"inf"`,
//! `"-inf"`. A dictionary that would read as one of these is written `{"$dictionary": {…}}`. There is no null.

use std::fmt::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use plist::{Dictionary, Integer};
use serde::ser::{Serialize, SerializeMap, SerializeSeq, Serializer};
use serde_json::{Map, Number, json};

use crate::plist::{MAX_DEPTH, MAX_VALUES, Value, date};

/// Keys whose value is a secret wherever it stands, sorted. From Apple's schema of check-ins, commands and their results.
const SECRET_KEYS: &[&str] = &[
    "ActivationLockBypassCode",   // result of ActivationLockBypassCode
    "AppleCareToken",             // command TriggerEnhancedLogCollection
    "AuthToken",                  // UserAuthenticate: the user channel's credential
    "BootstrapToken",             // SetBootstrapToken, answers of GetBootstrapToken and ReturnToService
    "BypassCode",                 // short form of the above in other servers' documents
    "Challenge",                  // SCEP and ACME payloads
    "Configuration",              // result of ManagedApplicationConfiguration: whatever an app is configured with
    "CurrentPassword",            // commands SetFirmwarePassword, SetRecoveryLock
    "DigestResponse",             // UserAuthenticate
    "EncryptedNewRecoveryKey",    // result of RotateFileVaultKey
    "EscrowKey",                  // Activation Lock request
    "FDE_PersonalRecoveryKeyCMS", // result of SecurityInfo
    "FirmwarePassword",           // firmware commands
    "InstitutionalRecoveryKey",   // recovery keys as other servers name them
    "NewPassword",                // commands SetFirmwarePassword, SetRecoveryLock
    "NewRecoveryKey",             // recovery keys as other servers name them
    "PIN",                        // commands DeviceLock, EraseDevice: unlocks the Mac
    "Password",                   // commands RequestMirroring, VerifyFirmwarePassword, VerifyRecoveryLock, RotateFileVaultKey; payloads
    "PersonalRecoveryKey",        // recovery keys as other servers name them
    "PrivateKeyExport",           // command RotateFileVaultKey: the institutional key
    "PrivateKeyExportPassword",   // command RotateFileVaultKey
    "PushMagic",                  // TokenUpdate
    "PushToken",                  // result of DeviceInformation
    "RecoveryKey",                // FileVault escrow
    "RedemptionCode",             // command ApplyRedemptionCode: worth money
    "SecurityToken",              // GetToken of watch pairing
    "Token",                      // TokenUpdate
    "TokenData",                  // answer of GetToken
    "UnlockToken",                // TokenUpdate, command ClearPasscode, result of RequestUnlockToken
    "UnusedRedemptionCode",       // result of ManagedApplicationList
    "passwordHash",               // commands AccountConfiguration, SetAutoAdminPassword
];

/// Whether the value under this key of a message is a secret that plugins and receivers do not get without a grant.
pub fn is_secret_key(key: &str) -> bool {
    SECRET_KEYS.binary_search(&key).is_ok()
}

/// The document with every secret replaced by an empty value of its type, so that whoever reads it still finds what it expects.
pub fn without_secrets(document: &Value) -> Value {
    match document {
        Value::Dictionary(entries) => {
            let mut kept = Dictionary::new();
            for (key, value) in entries {
                kept.insert(key.clone(), if is_secret_key(key) { emptied(value) } else { without_secrets(value) });
            }
            Value::Dictionary(kept)
        }
        Value::Array(values) => Value::Array(values.iter().map(without_secrets).collect()),
        other => other.clone(),
    }
}

fn emptied(secret: &Value) -> Value {
    match secret {
        Value::Data(_) => Value::Data(Vec::new()),
        Value::Dictionary(_) => Value::Dictionary(Dictionary::new()),
        Value::Array(_) => Value::Array(Vec::new()),
        _ => Value::String(String::new()),
    }
}

/// The forms that stand for something else than a dictionary.
const FORMS: [&str; 6] = ["$data", "$date", "$dictionary", "$integer", "$real", "$redacted"];
/// Integers up to this size are exact in every reader of JSON.
const MAX_SAFE: u64 = 1 << 53;

/// JSON that is no property list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {problem}")]
pub struct JsonError {
    /// Where, such as `Payload.Items[2]`; `.` is the whole.
    pub path: String,
    /// What is wrong there.
    pub problem: String,
}

/// The JSON of a property list, secrets and all.
///
/// ```
/// use wasmdm_protocol::{json, plist::Value};
/// assert_eq!(json::to_json(&Value::Data(vec![1])), serde_json::json!({ "$data": "AQ==" }));
/// ```
pub fn to_json(value: &Value) -> serde_json::Value {
    convert(value, false)
}

/// The JSON of a property list in which the values of secret keys are `{"$redacted": true}`, at any depth.
///
/// ```
/// use wasmdm_protocol::{json, plist};
/// let message = plist::parse(b"<dict><key>PushMagic</key><string>secret</string></dict>")?;
/// assert_eq!(json::to_redacted_json(&message), serde_json::json!({ "PushMagic": { "$redacted": true } }));
/// # Ok::<(), plist::PlistError>(())
/// ```
pub fn to_redacted_json(value: &Value) -> serde_json::Value {
    convert(value, true)
}

fn convert(value: &Value, redact: bool) -> serde_json::Value {
    match value {
        Value::Array(values) => values.iter().map(|value| convert(value, redact)).collect(),
        Value::Dictionary(entries) => {
            let object: Map<_, _> = entries.iter().map(|(key, value)| (key.clone(), entry(key, value, redact))).collect();
            if is_form(entries) { json!({ "$dictionary": object }) } else { serde_json::Value::Object(object) }
        }
        Value::Boolean(boolean) => (*boolean).into(),
        Value::String(text) => text.as_str().into(),
        Value::Data(bytes) => json!({ "$data": STANDARD.encode(bytes) }),
        Value::Date(value) => json!({ "$date": date::to_text(*value) }),
        Value::Integer(integer) => match number(*integer) {
            Some(number) => serde_json::Value::Number(number),
            None => json!({ "$integer": integer.to_string() }),
        },
        Value::Real(real) => match Number::from_f64(*real) {
            Some(number) => serde_json::Value::Number(number),
            None => json!({ "$real": real_name(*real) }),
        },
        // Only archives of programs have these; the readers refuse them.
        _ => json!({}),
    }
}

fn entry(key: &str, value: &Value, redact: bool) -> serde_json::Value {
    if redact && is_secret_key(key) { json!({ "$redacted": true }) } else { convert(value, redact) }
}

/// A dictionary that would be read back as something else.
fn is_form(entries: &Dictionary) -> bool {
    entries.len() == 1 && entries.keys().all(|key| FORMS.contains(&key.as_str()))
}

/// The integer as a number, if every reader of JSON takes it exactly.
fn number(integer: Integer) -> Option<Number> {
    if let Some(signed) = integer.as_signed() {
        return (signed.unsigned_abs() <= MAX_SAFE).then(|| signed.into());
    }
    None
}

fn real_name(real: f64) -> &'static str {
    if real.is_nan() {
        "nan"
    } else if real > 0.0 {
        "inf"
    } else {
        "-inf"
    }
}

/// Writes the same JSON straight into a serializer, without the tree between.
///
/// ```
/// use wasmdm_protocol::{json::AsJson, plist::Value};
/// assert_eq!(serde_json::to_string(&AsJson::redacted(&Value::from(1.0)))?, "1.0");
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct AsJson<'a> {
    value: &'a Value,
    redact: bool,
}

impl<'a> AsJson<'a> {
    /// With its secrets.
    pub fn whole(value: &'a Value) -> Self {
        Self { value, redact: false }
    }

    /// Without its secrets.
    pub fn redacted(value: &'a Value) -> Self {
        Self { value, redact: true }
    }
}

impl Serialize for AsJson<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.value {
            Value::Array(values) => {
                let mut sequence = serializer.serialize_seq(Some(values.len()))?;
                for value in values {
                    sequence.serialize_element(&AsJson { value, redact: self.redact })?;
                }
                sequence.end()
            }
            Value::Dictionary(entries) if is_form(entries) => convert(self.value, self.redact).serialize(serializer),
            Value::Dictionary(entries) => {
                let mut map = serializer.serialize_map(Some(entries.len()))?;
                for (key, value) in entries {
                    if self.redact && is_secret_key(key) {
                        map.serialize_entry(key, &Redacted)?;
                    } else {
                        map.serialize_entry(key, &AsJson { value, redact: self.redact })?;
                    }
                }
                map.end()
            }
            Value::String(text) => serializer.serialize_str(text),
            other => convert(other, self.redact).serialize(serializer),
        }
    }
}

struct Redacted;

impl Serialize for Redacted {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(1))?;
        map.serialize_entry("$redacted", &true)?;
        map.end()
    }
}

/// The property list that the JSON stands for. Numbers with a fraction or an exponent are reals, the others integers.
///
/// Fails on null, on redacted values, on unreadable data, dates and integers, on characters that XML cannot hold, and beyond the limits of
/// [`plist::parse`](crate::plist::parse).
///
/// ```
/// use wasmdm_protocol::{json, plist::Value};
/// assert_eq!(json::from_json(&serde_json::json!({ "$integer": "18446744073709551615" }))?, Value::from(u64::MAX));
/// assert_eq!(json::from_json(&serde_json::json!({ "a": [null] })).unwrap_err().path, "a[0]");
/// # Ok::<(), json::JsonError>(())
/// ```
pub fn from_json(json: &serde_json::Value) -> Result<Value, JsonError> {
    Reader { path: Vec::new(), values: 0 }.read(json)
}

enum Step<'a> {
    Key(&'a str),
    Index(usize),
}

struct Reader<'a> {
    path: Vec<Step<'a>>,
    values: usize,
}

impl<'a> Reader<'a> {
    fn error(&self, problem: impl Into<String>) -> JsonError {
        let mut path = String::new();
        for step in &self.path {
            match step {
                Step::Key(key) => {
                    if !path.is_empty() {
                        path.push('.');
                    }
                    path.extend(key.chars().take(60).flat_map(char::escape_debug));
                }
                Step::Index(index) => {
                    let _ = write!(path, "[{index}]");
                }
            }
        }
        if path.is_empty() {
            path.push('.');
        }
        JsonError { path, problem: problem.into() }
    }

    fn read(&mut self, json: &'a serde_json::Value) -> Result<Value, JsonError> {
        self.values += 1;
        if self.values > MAX_VALUES || self.path.len() > MAX_DEPTH {
            return Err(self.error("is too deep or has too many values"));
        }
        match json {
            serde_json::Value::Null => Err(self.error("is null, which property lists do not have: leave the key out")),
            serde_json::Value::Bool(boolean) => Ok((*boolean).into()),
            serde_json::Value::Number(number) => number
                .as_i64()
                .map(Value::from)
                .or_else(|| number.as_u64().map(Value::from))
                .or_else(|| number.as_f64().map(Value::from))
                .ok_or_else(|| self.error("is a number that cannot be held")),
            serde_json::Value::String(text) => self.text(text).map(Value::String),
            serde_json::Value::Array(items) => {
                self.go_down()?;
                let mut values = Vec::with_capacity(items.len());
                for (index, item) in items.iter().enumerate() {
                    values.push(self.step(Step::Index(index), item)?);
                }
                Ok(Value::Array(values))
            }
            serde_json::Value::Object(object) => {
                let mut only = object.iter();
                match (only.next(), only.next()) {
                    (Some((form, value)), None) if FORMS.contains(&form.as_str()) => self.form(form, value),
                    _ => self.dictionary(object),
                }
            }
        }
    }

    fn step(&mut self, step: Step<'a>, json: &'a serde_json::Value) -> Result<Value, JsonError> {
        self.path.push(step);
        let value = self.read(json)?;
        self.path.pop();
        Ok(value)
    }

    /// A collection begins, with something in it or not: as many levels as property lists may have.
    fn go_down(&self) -> Result<(), JsonError> {
        if self.path.len() >= MAX_DEPTH { Err(self.error("is too deep or has too many values")) } else { Ok(()) }
    }

    fn dictionary(&mut self, object: &'a Map<String, serde_json::Value>) -> Result<Value, JsonError> {
        self.go_down()?;
        let mut entries = Dictionary::new();
        for (key, item) in object {
            let name = self.text(key)?;
            entries.insert(name, self.step(Step::Key(key), item)?);
        }
        Ok(Value::Dictionary(entries))
    }

    fn text(&self, text: &str) -> Result<String, JsonError> {
        if text.chars().any(|character| {
            (character.is_ascii_control() && !matches!(character, '\t' | '\n' | '\r' | '\x7f')) || matches!(character, '\u{fffe}' | '\u{ffff}')
        }) {
            return Err(self.error("has a character that XML cannot hold"));
        }
        Ok(text.to_owned())
    }

    fn form(&mut self, form: &str, value: &'a serde_json::Value) -> Result<Value, JsonError> {
        if let ("$dictionary", serde_json::Value::Object(object)) = (form, value) {
            return self.dictionary(object);
        }
        let text = value.as_str().unwrap_or_default();
        match form {
            "$data" if value.is_string() => STANDARD.decode(text).map(Value::Data).map_err(|_| self.error("$data is not base64")),
            "$date" => date::from_text(text).map(Value::Date).ok_or_else(|| self.error("$date is not an RFC 3339 time")),
            "$integer" => text
                .parse::<i64>()
                .map(Value::from)
                .or_else(|_| text.parse::<u64>().map(Value::from))
                .map_err(|_| self.error("$integer is not the text of an integer of 64 bits")),
            "$real" => match text {
                "nan" => Ok(f64::NAN.into()),
                "inf" => Ok(f64::INFINITY.into()),
                "-inf" => Ok(f64::NEG_INFINITY.into()),
                _ => Err(self.error("$real is not `nan`, `inf` or `-inf`")),
            },
            "$redacted" => Err(self.error("is redacted, so its value is not known")),
            _ => Err(self.error(format!("{form} has a value of the wrong type"))),
        }
    }
}
