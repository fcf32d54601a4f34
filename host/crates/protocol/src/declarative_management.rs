//! Where declarative management asks.
//!
//! An `Endpoint` is a device's words. It names a place under the address that an operator gave, and must not be able to name another:
//! neither another host nor a place above.

use std::borrow::Cow;
use std::fmt;

use serde::Serialize;
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::relative_path::push_segment;

/// Far more than Apple's endpoints have (`declaration/<kind>/<identifier>`).
const MAX_SEGMENTS: usize = 16;

/// A path that can be put behind a base URL as it is: percent-encoded, relative, and without steps upwards.
///
/// ```
/// use wasmdm_protocol::declarative_management::EndpointPath;
/// let path = EndpointPath::parse("declaration/configuration/com.example passcode")?;
/// assert_eq!(path.as_str(), "declaration/configuration/com.example%20passcode");
/// assert!(EndpointPath::parse("//elsewhere.example/tokens").is_err());
/// # Ok::<(), wasmdm_protocol::declarative_management::EndpointError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointPath(String);

/// Why an `Endpoint` is no path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Endpoint: {0}")]
pub struct EndpointError(&'static str);

impl EndpointPath {
    /// Reads an `Endpoint`. What is percent-encoded already stays so.
    pub fn parse(endpoint: &str) -> Result<Self, EndpointError> {
        let mut path = String::with_capacity(endpoint.len());
        for (place, segment) in endpoint.split('/').enumerate() {
            if place >= MAX_SEGMENTS {
                return Err(EndpointError("it has too many parts"));
            }
            if place == 0 {
                // A colon would make a scheme of it.
                if !segment.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
                    return Err(EndpointError("its first part is no name"));
                }
            } else {
                path.push('/');
            }
            push_segment(&mut path, segment).map_err(EndpointError)?;
        }
        Ok(Self(path))
    }

    /// `tokens`, `declaration/configuration/ID`, …
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Status items that are secrets (`mdm.push-magic`, `mdm.push-token`, `enhanced-logging.applecare-token`), by the last part of their name.
const SECRET_ITEMS: [&str; 3] = ["applecare-token", "push-magic", "push-token"];

/// A status report without its secrets: the same bytes where there are none; nothing, if it cannot be read.
///
/// Written while it is read, and never held as values: a megabyte of `{"":0},` would be a hundred of them, for whoever has a certificate.
pub fn status_without_secrets(data: &[u8]) -> Cow<'_, [u8]> {
    let mut cleaned = Cleaned { json: Vec::with_capacity(data.len()), found: false };
    let mut report = serde_json::Deserializer::from_slice(data);
    if Cleaner(&mut cleaned).deserialize(&mut report).and_then(|()| report.end()).is_err() {
        return Cow::Owned(Vec::new());
    }
    if cleaned.found { Cow::Owned(cleaned.json) } else { Cow::Borrowed(data) }
}

/// What was read so far.
struct Cleaned {
    json: Vec<u8>,
    /// Whether there was a secret in it.
    found: bool,
}

impl Cleaned {
    /// A string or a number.
    fn write<E: de::Error>(&mut self, scalar: &(impl Serialize + ?Sized)) -> Result<(), E> {
        serde_json::to_writer(&mut self.json, scalar).map_err(E::custom)
    }
}

/// Reads one value and writes it without its secrets.
struct Cleaner<'a>(&'a mut Cleaned);

impl<'de> DeserializeSeed<'de> for Cleaner<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, value: D) -> Result<(), D::Error> {
        value.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Cleaner<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        self.0.write(&())
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<(), E> {
        self.0.write(&value)
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<(), E> {
        self.0.write(&value)
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<(), E> {
        self.0.write(&value)
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<(), E> {
        self.0.write(&value)
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<(), E> {
        self.0.write(value)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<(), A::Error> {
        let mut before = b'[';
        loop {
            let length = self.0.json.len();
            self.0.json.push(before);
            if values.next_element_seed(Cleaner(self.0))?.is_none() {
                self.0.json.truncate(length);
                break;
            }
            before = b',';
        }
        if before == b'[' {
            self.0.json.push(before);
        }
        self.0.json.push(b']');
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        let mut before = b'{';
        while let Some(key) = entries.next_key::<Cow<'_, str>>()? {
            self.0.json.push(before);
            before = b',';
            self.0.write(key.as_ref())?;
            self.0.json.push(b':');
            if SECRET_ITEMS.contains(&key.rsplit('.').next().unwrap_or(&key)) {
                self.0.found |= entries.next_value::<Option<IgnoredAny>>()?.is_some();
                self.0.json.extend_from_slice(b"null");
            } else {
                entries.next_value_seed(Cleaner(self.0))?;
            }
        }
        if before == b'{' {
            self.0.json.push(before);
        }
        self.0.json.push(b'}');
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apples_endpoints_stay_as_they_are() {
        for endpoint in ["tokens", "declaration-items", "status", "declaration/activation/com.example.a_b-c:1"] {
            assert_eq!(EndpointPath::parse(endpoint).unwrap().as_str(), endpoint);
        }
    }

    #[test]
    fn what_a_path_cannot_hold_is_encoded_once() {
        let path = |text: &str| EndpointPath::parse(text).unwrap().as_str().to_owned();
        assert_eq!(path("declaration/asset/a?b#c d%zz"), "declaration/asset/a%3Fb%23c%20d%25zz");
        assert_eq!(path("declaration/asset/a;b"), "declaration/asset/a%3Bb");
        assert_eq!(path("declaration/asset/a%20b"), "declaration/asset/a%20b");
        assert_eq!(path("declaration/asset/ü"), "declaration/asset/%C3%BC");
    }

    #[test]
    fn secrets_are_cut_out_of_a_status_report_and_the_rest_stays() {
        let report = br#"{"StatusItems": {"mdm": {"push-magic": "m", "push-token": "t"}, "device": {"model": "Mac"}}, "a": [{"mdm.push-token": 1}]}"#;
        let cleaned: serde_json::Value = serde_json::from_slice(&status_without_secrets(report)).unwrap();
        assert_eq!(cleaned["StatusItems"]["mdm"]["push-magic"], serde_json::Value::Null);
        assert_eq!(cleaned["a"][0]["mdm.push-token"], serde_json::Value::Null);
        assert_eq!(cleaned["StatusItems"]["device"]["model"], "Mac");
        let harmless = br#"{ "StatusItems":{} }"#;
        assert!(matches!(status_without_secrets(harmless), Cow::Borrowed(_)), "to the byte");
        assert_eq!(*status_without_secrets(b"push-magic"), *b"");
    }

    #[test]
    fn what_is_not_secret_stays_as_it_was_said() {
        let report =
            r#" {"push\u002dmagic": {"a": [1]}, "":[], "o":{}, "a": [1, -2, 0.5, true, null, "\u00fc\n\"", [[]], {"b": {}}], "b.push-token": 0} "#;
        let cleaned = r#"{"push-magic":null,"":[],"o":{},"a":[1,-2,0.5,true,null,"ü\n\"",[[]],{"b":{}}],"b.push-token":null}"#;
        assert_eq!(String::from_utf8_lossy(&status_without_secrets(report.as_bytes())), cleaned);
        // There is nothing more to be taken out.
        assert!(matches!(status_without_secrets(cleaned.as_bytes()), Cow::Borrowed(_)));
        for broken in ["{} {}", "{\"push-token\":1", "[1,]", "", "{\"push-token\":}"] {
            assert!(status_without_secrets(broken.as_bytes()).is_empty(), "{broken}");
        }
    }

    /// Edge case 55.
    #[test]
    fn no_endpoint_leads_to_another_host_or_upwards() {
        for endpoint in [
            "",
            "/tokens",
            "//elsewhere.example/tokens",
            "http://elsewhere.example/",
            "http:elsewhere",
            "..",
            "../admin",
            "declaration/../../admin",
            "declaration/%2e%2E/admin",
            "declaration/.%2e/admin",
            "declaration/..;/..;a=b/admin",
            "declaration/%2e%2e%3B/admin",
            "declaration/asset/a%2Fb",
            "declaration/asset/..\\admin",
            "declaration/asset/a%5c..",
            "declaration/asset/a\r\nHost: elsewhere",
            "declaration//a",
            "tokens/",
            "\\\\elsewhere\\tokens",
            "a/b/c/d/e/f/g/h/i/j/k/l/m/n/o/p/q",
        ] {
            assert!(EndpointPath::parse(endpoint).is_err(), "{endpoint:?}");
        }
    }
}
