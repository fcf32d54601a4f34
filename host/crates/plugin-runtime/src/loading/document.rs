//! Reading TOML so that every error says where: file, line, key.

use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{self, DeserializeOwned, Deserializer, Visitor};

/// Why a manifest or a grant file cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}{}: {}{problem}", line.map(|line| format!(", line {line}")).unwrap_or_default(), key.as_ref().map(|key| format!("`{key}`: ")).unwrap_or_default())]
pub struct DocumentError {
    /// As the operator knows it: `plugin.toml`, `plugins.d/NAME.toml`.
    pub file: String,
    /// Counted from 1.
    pub line: Option<usize>,
    /// The key with its table: `requests.kv`.
    pub key: Option<String>,
    pub problem: String,
}

impl DocumentError {
    /// An error about the whole file.
    pub fn whole(file: &str, problem: impl Into<String>) -> Self {
        Self { file: file.to_owned(), line: None, key: None, problem: problem.into() }
    }
}

/// Parses a document; `file` is its name in errors.
pub(super) fn parse<T: DeserializeOwned>(file: &str, text: &str) -> Result<T, DocumentError> {
    toml::from_str(text).map_err(|error| {
        let (line, key) = match error.span() {
            Some(span) => place(text, span.start),
            None => (None, None),
        };
        DocumentError { file: file.to_owned(), line, key, problem: error.message().to_owned() }
    })
}

/// The line of a byte, and the dotted key that stands there.
fn place(text: &str, offset: usize) -> (Option<usize>, Option<String>) {
    let before = text.get(..offset).unwrap_or(text);
    let line_number = before.matches('\n').count() + 1;
    let line = text.lines().nth(line_number - 1).unwrap_or_default().trim();
    let table_of = |line: &str| {
        let inner = line.strip_prefix('[')?;
        let inner = inner.split(']').next()?.trim_start_matches('[').trim();
        Some(inner.to_owned())
    };
    if let Some(table) = table_of(line) {
        return (Some(line_number), Some(table));
    }
    let Some((key, _)) = line.split_once('=') else { return (Some(line_number), None) };
    let key = key.trim();
    let table = text.lines().take(line_number - 1).filter_map(|line| if line.contains('=') { None } else { table_of(line.trim()) }).last();
    let dotted = match table {
        Some(table) => format!("{table}.{key}"),
        None => key.to_owned(),
    };
    (Some(line_number), Some(dotted))
}

/// A number of bytes: `1MiB`, `64KiB`, `10MB`, or a bare number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

/// A length of time: `20ms`, `5s`, `10min`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(pub Duration);

fn number_and_unit(text: &str) -> Option<(u64, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    Some((number.parse().ok()?, unit.trim()))
}

fn size(text: &str) -> Option<u64> {
    let (number, unit) = number_and_unit(text)?;
    let factor: u64 = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "kB" | "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        _ => return None,
    };
    number.checked_mul(factor)
}

fn span(text: &str) -> Option<Duration> {
    let (number, unit) = number_and_unit(text)?;
    let millis: u64 = match unit {
        "ms" => 1,
        "s" => 1_000,
        "min" => 60_000,
        _ => return None,
    };
    number.checked_mul(millis).map(Duration::from_millis)
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;
        impl Visitor<'_> for SizeVisitor {
            type Value = Size;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"1MiB\"")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
                size(text).map(Size).ok_or_else(|| E::custom(format!("`{text}` is no size: write for instance \"64KiB\" or \"1MiB\"")))
            }
            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Size, E> {
                u64::try_from(bytes).map(Size).map_err(|_| E::custom("a size cannot be negative"))
            }
        }
        deserializer.deserialize_any(SizeVisitor)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        span(&text).map(Span).ok_or_else(|| de::Error::custom(format!("`{text}` is no length of time: write for instance \"20ms\" or \"5s\"")))
    }
}

/// Whether the text can name a plugin: it becomes a path component, a metric label and part of a URL.
pub(super) fn is_plugin_name(text: &str) -> bool {
    let first = text.bytes().next();
    text.len() <= 64
        && first.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        #[serde(default, rename = "inner")]
        _inner: Inner,
    }

    #[derive(Debug, Default, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        size: Option<Size>,
        wait: Option<Span>,
    }

    fn problem(text: &str) -> String {
        parse::<Outer>("plugin.toml", text).unwrap_err().to_string()
    }

    #[test]
    fn an_error_names_file_line_and_key() {
        let unknown = problem("[inner]\nsize = \"1MiB\"\nsise = 2\n");
        assert!(unknown.starts_with("plugin.toml, line 3: `inner.sise`: unknown field `sise`"), "{unknown}");
        let wrong = problem("[inner]\n\nwait = \"5 years\"\n");
        assert!(wrong.starts_with("plugin.toml, line 3: `inner.wait`: `5 years` is no length of time"), "{wrong}");
        assert!(problem("[outer]\nx = 1\n").starts_with("plugin.toml, line 1: `outer`: unknown field `outer`"));
        assert!(problem("inner").starts_with("plugin.toml, line 1: "));
    }

    #[test]
    fn sizes_and_times_have_units() {
        let inner: Inner = parse("x", "size = \"16MiB\"\nwait = \"2min\"\n").unwrap();
        assert_eq!(inner.size, Some(Size(16 << 20)));
        assert_eq!(inner.wait, Some(Span(Duration::from_mins(2))));
        assert_eq!(parse::<Inner>("x", "size = 4096\n").unwrap().size, Some(Size(4096)));
        for wrong in ["size = \"1 parsec\"", "size = -1", "size = \"99999999999999999999GiB\"", "wait = \"20\"", "wait = \"18446744073709551615min\""]
        {
            assert!(parse::<Inner>("x", wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn plugin_names_are_safe_in_paths_and_labels() {
        assert!(is_plugin_name("serial-allow-list") && is_plugin_name("a") && is_plugin_name("2fa"));
        for wrong in ["", ".", "..", "-a", "A", "a/b", "a.b", "a b", "ä", &"a".repeat(65)] {
            assert!(!is_plugin_name(wrong), "{wrong}");
        }
    }
}
