//! Typed access to the keys of a message.

use bytes::Bytes;

use crate::enrollment::{DeviceFacts, IdentifierError, Identifiers};
use crate::plist::{Dictionary, Value};

/// Names, versions and ids are short; the limit keeps them fit for columns and logs.
pub(crate) const MAX_TEXT: usize = 255;

/// What is wrong with a key.
#[derive(Debug)]
pub(crate) struct FieldError {
    pub(crate) key: &'static str,
    pub(crate) problem: String,
}

impl FieldError {
    pub(crate) fn new(key: &'static str, problem: impl Into<String>) -> Self {
        Self { key, problem: problem.into() }
    }

    fn missing(key: &'static str) -> Self {
        Self::new(key, "is missing")
    }
}

impl From<IdentifierError> for FieldError {
    fn from(error: IdentifierError) -> Self {
        Self::new(error.key, error.problem)
    }
}

/// The top dictionary of a message.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a>(&'a Dictionary);

impl<'a> Fields<'a> {
    /// `None` where the document is no dictionary.
    pub(crate) fn of(document: &'a Value) -> Option<Self> {
        document.as_dictionary().map(Self)
    }

    pub(crate) fn value(self, key: &str) -> Option<&'a Value> {
        self.0.get(key)
    }

    /// A string of any content, which may be empty.
    pub(crate) fn string(self, key: &'static str, limit: usize) -> Result<Option<&'a str>, FieldError> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        let text = value.as_string().ok_or_else(|| FieldError::new(key, "is not a string"))?;
        if text.len() > limit {
            return Err(FieldError::new(key, format!("is longer than {limit} bytes")));
        }
        Ok(Some(text))
    }

    /// A string that is there, is not empty and has no control characters.
    pub(crate) fn name(self, key: &'static str, limit: usize) -> Result<&'a str, FieldError> {
        let text = self.string(key, limit)?.ok_or_else(|| FieldError::missing(key))?;
        check_name(text, limit).map_err(|problem| FieldError::new(key, problem))?;
        Ok(text)
    }

    /// Data of at most `limit` bytes.
    pub(crate) fn data(self, key: &'static str, limit: usize) -> Result<Option<Bytes>, FieldError> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        let bytes = value.as_data().ok_or_else(|| FieldError::new(key, "is not data"))?;
        if bytes.len() > limit {
            return Err(FieldError::new(key, format!("is longer than {limit} bytes")));
        }
        Ok(Some(Bytes::copy_from_slice(bytes)))
    }

    /// Data that is there and is not empty.
    pub(crate) fn required_data(self, key: &'static str, limit: usize) -> Result<Bytes, FieldError> {
        self.data(key, limit)?.filter(|bytes| !bytes.is_empty()).ok_or_else(|| FieldError::missing(key))
    }

    pub(crate) fn boolean(self, key: &'static str) -> Result<Option<bool>, FieldError> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        value.as_boolean().map(Some).ok_or_else(|| FieldError::new(key, "is not a boolean"))
    }

    /// Who the message is from. An identifier that is not a string is an error rather than absent: the next one would take its place.
    pub(crate) fn identifiers(self) -> Result<Identifiers, FieldError> {
        // Their lengths are judged by `resolve`.
        let text = |key| Ok::<_, FieldError>(self.string(key, usize::MAX)?.map(str::to_owned));
        Ok(Identifiers {
            udid: text("UDID")?,
            user_id: text("UserID")?,
            user_short_name: text("UserShortName")?,
            enrollment_id: text("EnrollmentID")?,
            enrollment_user_id: text("EnrollmentUserID")?,
        })
    }

    /// What the message says about the device. What cannot be a name is left out: no message is refused for its decoration.
    pub(crate) fn facts(self) -> DeviceFacts {
        let text = |key: &str| self.0.get(key).and_then(Value::as_string).filter(|text| check_name(text, MAX_TEXT).is_ok()).map(str::to_owned);
        DeviceFacts {
            serial_number: text("SerialNumber"),
            model: text("Model"),
            model_name: text("ModelName"),
            product_name: text("ProductName"),
            os_version: text("OSVersion"),
            build_version: text("BuildVersion"),
            user_short_name: text("UserShortName"),
            user_long_name: text("UserLongName"),
        }
    }
}

/// Whether a text can stand in a column, a log line and a header.
pub(crate) fn check_name(text: &str, limit: usize) -> Result<(), String> {
    if text.is_empty() {
        return Err("is empty".into());
    }
    if text.len() > limit {
        return Err(format!("is longer than {limit} bytes"));
    }
    if text.chars().any(char::is_control) {
        return Err("has a control character".into());
    }
    // It could not be written again: what is shown and stored would differ from what goes out.
    if text.contains(['\u{FFFE}', '\u{FFFF}']) {
        return Err("has a character that XML cannot hold".into());
    }
    Ok(())
}
