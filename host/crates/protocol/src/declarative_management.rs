//! Where declarative management asks.
//!
//! An `Endpoint` is a device's words. It names a place under the address that an operator gave, and must not be able to name another:
//! neither another host nor a place above.

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

/// A status report without its secrets; nothing, if it cannot be read.
pub fn status_without_secrets(data: &[u8]) -> Vec<u8> {
    fn clean(value: &mut serde_json::Value) {
        match value {
            serde_json::Value::Object(entries) => {
                for (key, value) in entries {
                    if SECRET_ITEMS.contains(&key.rsplit('.').next().unwrap_or(key)) {
                        *value = serde_json::Value::Null;
                    } else {
                        clean(value);
                    }
                }
            }
            serde_json::Value::Array(values) => values.iter_mut().for_each(clean),
            _ => {}
        }
    }
    let Ok(mut report) = serde_json::from_slice::<serde_json::Value>(data) else { return Vec::new() };
    let before = report.clone();
    clean(&mut report);
    if report == before { data.to_vec() } else { serde_json::to_vec(&report).unwrap_or_default() }
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
        assert_eq!(status_without_secrets(harmless), harmless);
        assert_eq!(status_without_secrets(b"push-magic"), b"");
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
