//! `--dump`: what devices say and are answered, for a person who looks for a fault. NanoMDM's `-dump`, with the answers and without secrets.
//!
//! A message is shown after it was parsed, never as it came: values of secret keys are empty, binary values are a length, a profile
//! within a command is shown like a message, and what cannot be read is a length and a digest. Nobody waits for the writing; what comes
//! faster than it can be written is left out, and the dump says so.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use aws_lc_rs::digest;
use tokio::io::{AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};
use wasmdm_protocol::enrollment::EnrollmentId;
use wasmdm_protocol::json::is_secret_key;
use wasmdm_protocol::plist::{self, Dictionary, Value};
use wasmdm_protocol::time::Timestamp;
use wasmdm_service::message::Message;
use wasmdm_service::reply::Reply;

/// Of one message, in bytes of text; the rest is counted.
const SHOWN: usize = 64 << 10;
/// Longer ones are not even looked at.
const LONGEST: usize = 1 << 20;
/// Entries that wait to be written.
const WAITING: usize = 256;
/// How long the end of the server waits for another entry.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Where it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DumpTarget {
    /// Standard output.
    Stdout,
    /// Appended to, readable by its owner only.
    File(PathBuf),
}

impl DumpTarget {
    /// `-` is standard output.
    pub fn of(text: &str) -> Self {
        if text == "-" { Self::Stdout } else { Self::File(text.into()) }
    }
}

/// Whose message it is.
#[derive(Debug, Clone, Copy)]
pub struct Line<'a> {
    pub request_id: &'a str,
    pub peer: IpAddr,
    /// Of the device's request, without its query.
    pub path: &'a str,
    pub at: Timestamp,
}

/// Takes entries.
#[derive(Debug)]
pub struct Dump {
    entries: mpsc::Sender<String>,
    left_out: Arc<AtomicU64>,
}

impl Dump {
    /// Opens the target; a task of `tracker` writes until `shutdown`.
    pub async fn start(target: &DumpTarget, tracker: &TaskTracker, shutdown: CancellationToken) -> anyhow::Result<Self> {
        let out: Box<dyn AsyncWrite + Send + Unpin> = match target {
            DumpTarget::Stdout => Box::new(tokio::io::stdout()),
            DumpTarget::File(path) => {
                let mut options = std::fs::OpenOptions::new();
                options.append(true).create(true).mode(0o600);
                let file = tokio::fs::OpenOptions::from(options).open(path).await;
                Box::new(file.with_context(|| format!("dump: {} cannot be opened", path.display()))?)
            }
        };
        info!("Messages of devices are dumped, without secrets");
        let (entries, written) = mpsc::channel(WAITING);
        let left_out = Arc::new(AtomicU64::new(0));
        tracker.spawn(write(out, written, Arc::clone(&left_out), shutdown));
        Ok(Self { entries, left_out })
    }

    /// A message that could be read, or a report that could not.
    pub fn request(&self, line: Line<'_>, message: &Message) {
        let (enrollment, kind, document, length) = match message {
            Message::CheckIn(check_in) => (&check_in.enrollment.id, check_in.check_in.message_type(), &check_in.document, check_in.raw.len()),
            Message::Report(report) => (&report.enrollment.id, report.status.as_str(), &report.document, report.raw.len()),
            Message::Malformed(report) => return self.unreadable(line, &report.raw, &report.reason),
            // That it was refused says all.
            Message::Oversized(_) => return,
        };
        let (redacted, text) = if length > LONGEST { (String::new(), format!("| ({length} bytes are not shown)\n")) } else { shown(document) };
        let head = head(">>> request", line, Some(enrollment));
        self.send(format!("{head} message={} bytes={length}{redacted}\n{text}\n", escaped(kind)));
    }

    /// A body of which nothing is believed.
    pub fn unreadable(&self, line: Line<'_>, body: &[u8], problem: &dyn std::fmt::Display) {
        let sha256 = digest::digest(&digest::SHA256, body).as_ref().iter().fold(String::new(), |mut hex, byte| {
            // Writing to a string does not fail.
            let _ = write!(hex, "{byte:02x}");
            hex
        });
        let problem = escaped(&problem.to_string());
        self.send(format!("{} unreadable bytes={} sha256={sha256} problem=\"{problem}\"\n\n", head(">>> request", line, None), body.len()));
    }

    /// What it was answered.
    pub fn reply(&self, line: Line<'_>, enrollment: Option<&EnrollmentId>, reply: &Reply) {
        let head = head("<<< answer", line, enrollment);
        let (status, body) = match reply {
            Reply::Empty => (200, None),
            Reply::NoContent => (204, None),
            Reply::Json(body) | Reply::Plist(body) | Reply::Command { body, .. } => (200, Some(body)),
        };
        let Some(body) = body else { return self.send(format!("{head} status={status} bytes=0\n\n")) };
        let (redacted, text) = match reply {
            _ if body.len() > LONGEST => (String::new(), format!("| ({} bytes are not shown)\n", body.len())),
            Reply::Json(_) => shown(&Value::Data(body.to_vec())),
            _ => match plist::parse(body) {
                Ok(document) => shown(&document),
                Err(_) => (String::new(), format!("| ({} bytes that are no property list)\n", body.len())),
            },
        };
        self.send(format!("{head} status={status} bytes={}{redacted}\n{text}\n", body.len()));
    }

    /// That it was refused.
    pub fn refusal(&self, line: Line<'_>, enrollment: Option<&EnrollmentId>, status: u16, reason: &dyn std::fmt::Display) {
        let reason = escaped(&reason.to_string());
        self.send(format!("{} status={status} refused=\"{reason}\"\n\n", head("<<< answer", line, enrollment)));
    }

    fn send(&self, entry: String) {
        if self.entries.try_send(entry).is_err() {
            self.left_out.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn head(direction: &str, line: Line<'_>, enrollment: Option<&EnrollmentId>) -> String {
    let enrollment = escaped(enrollment.map_or("?", EnrollmentId::as_str));
    format!("{direction} time={} id={} peer={} path={} enrollment=\"{enrollment}\"", line.at, line.request_id, line.peer, escaped(line.path))
}

/// The names of what was left out, and the rest, each line behind a bar: no text of a device can look like the head of an entry.
fn shown(document: &Value) -> (String, String) {
    let mut redacted = BTreeSet::new();
    let text = match without_secrets(document, &mut redacted) {
        // JSON, which is no property list.
        Value::String(text) => text,
        document => String::from_utf8_lossy(&plist::to_xml(&document)).into_owned(),
    };
    let mut out = String::with_capacity(text.len().min(SHOWN) + 256);
    let mut left = 0;
    for line in text.lines() {
        if out.len() + line.len() > SHOWN {
            left += line.len() + 1;
            continue;
        }
        out.push_str("| ");
        out.extend(line.chars().map(|c| if c.is_control() && c != '\t' { char::REPLACEMENT_CHARACTER } else { c }));
        out.push('\n');
    }
    if left > 0 {
        let _ = writeln!(out, "| ({left} more bytes are not shown)");
    }
    let names = redacted.into_iter().map(|name| escaped(&name)).collect::<Vec<_>>().join(",");
    (if names.is_empty() { names } else { format!(" redacted={names}") }, out)
}

/// What names of keys that hold secrets have in them, in lower case: profiles and declarations have many that are in no schema of commands.
const SECRET_WORDS: [&str; 13] = [
    "apikey",
    "authkey",
    "challenge",
    "credential",
    "escrowkey",
    "passcode",
    "passphrase",
    "password",
    "privatekey",
    "pushmagic",
    "recoverykey",
    "secret",
    "token",
];
/// Names that only look so.
const HARMLESS: [&str; 4] = ["DeclarationsToken", "ServerToken", "SyncTokens", "TokenServiceType"];

fn is_secret(key: &str) -> bool {
    if is_secret_key(key) {
        return true;
    }
    let name: String = key.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect();
    !HARMLESS.contains(&key) && SECRET_WORDS.iter().any(|word| name.contains(word))
}

fn without_secrets(value: &Value, redacted: &mut BTreeSet<String>) -> Value {
    match value {
        Value::Dictionary(entries) => {
            let mut kept = Dictionary::new();
            for (key, value) in entries {
                let shown = match value {
                    // `PasscodePresent`, `minLength` of a passcode: answers and rules.
                    Value::Boolean(_) | Value::Integer(_) if !is_secret_key(key) => value.clone(),
                    _ if is_secret(key) => {
                        redacted.insert(key.clone());
                        Value::String(String::new())
                    }
                    _ => without_secrets(value, redacted),
                };
                kept.insert(key.clone(), shown);
            }
            Value::Dictionary(kept)
        }
        Value::Array(values) => Value::Array(values.iter().map(|value| without_secrets(value, redacted)).collect()),
        Value::Data(data) => data_without_secrets(data, redacted),
        other => other.clone(),
    }
}

/// A profile within a command, JSON of declarations; else only how long it is: a signed profile or a certificate with its key.
fn data_without_secrets(data: &[u8], redacted: &mut BTreeSet<String>) -> Value {
    if let Ok(document @ (Value::Dictionary(_) | Value::Array(_))) = plist::parse(data) {
        return without_secrets(&document, redacted);
    }
    if let Ok(mut json @ (serde_json::Value::Object(_) | serde_json::Value::Array(_))) = serde_json::from_slice(data) {
        clean_json(&mut json, redacted);
        return Value::String(serde_json::to_string_pretty(&json).unwrap_or_default());
    }
    Value::String(format!("({} bytes)", data.len()))
}

fn clean_json(value: &mut serde_json::Value, redacted: &mut BTreeSet<String>) {
    match value {
        serde_json::Value::Object(entries) => {
            for (key, value) in entries {
                if is_secret(key) && !value.is_boolean() && !value.is_null() {
                    redacted.insert(key.clone());
                    *value = serde_json::Value::Null;
                } else {
                    clean_json(value, redacted);
                }
            }
        }
        serde_json::Value::Array(values) => values.iter_mut().for_each(|value| clean_json(value, redacted)),
        _ => {}
    }
}

/// On one line, without quotes of its own.
fn escaped(text: &str) -> String {
    text.chars().take(500).flat_map(char::escape_debug).collect()
}

async fn write(
    mut out: Box<dyn AsyncWrite + Send + Unpin>,
    mut entries: mpsc::Receiver<String>,
    left_out: Arc<AtomicU64>,
    shutdown: CancellationToken,
) {
    loop {
        let entry = tokio::select! {
            entry = entries.recv() => entry,
            () = shutdown.cancelled() => tokio::time::timeout(LAST_WORDS, entries.recv()).await.ok().flatten(),
        };
        let Some(mut entry) = entry else { return };
        let lost = left_out.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let _ = writeln!(entry, "--- {lost} entries were left out about here: they came faster than they could be written\n");
        }
        let written = async {
            out.write_all(entry.as_bytes()).await?;
            out.flush().await
        };
        if let Err(error) = written.await {
            warn!("The dump ends here, it cannot be written: {error}");
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_empty_wherever_they_stand_and_named() {
        let profile = br"<dict><key>PayloadContent</key><array><dict><key>EAPClientConfiguration</key><dict><key>UserPassword</key>
            <string>canary-1</string><key>SSID</key><string>office</string></dict><key>SharedSecret</key><data>Y2FuYXJ5LTI=</data></dict></array></dict>";
        let mut command = Dictionary::new();
        command.insert("RequestType".to_owned(), "InstallProfile".into());
        command.insert("Payload".to_owned(), Value::Data(profile.to_vec()));
        command.insert("PIN".to_owned(), 123_456.into());
        command.insert("PasscodePresent".to_owned(), true.into());
        command.insert("Certificate".to_owned(), Value::Data(b"canary-3".to_vec()));
        let (redacted, text) = shown(&Value::Dictionary(command));
        assert_eq!(redacted, " redacted=PIN,SharedSecret,UserPassword");
        for gone in ["canary", "123456", "Y2FuYXJ5"] {
            assert!(!text.contains(gone), "{text}");
        }
        for there in ["InstallProfile", "office", "(8 bytes)", "<true/>"] {
            assert!(text.contains(there), "{text}");
        }
    }

    #[test]
    fn no_text_can_look_like_the_head_of_an_entry_or_steer_a_terminal() {
        let (_, text) = shown(&Value::String("a\n>>> request id=forged\n\u{9b}31m\u{7f}".to_owned()));
        assert!(text.lines().all(|line| line.starts_with("| ")), "{text}");
        assert!(!text.contains(['\u{9b}', '\u{7f}']));
        assert_eq!(escaped("a\n\"b\u{1b}"), "a\\n\\\"b\\u{1b}");
    }

    #[test]
    fn a_long_message_is_cut() {
        let (_, text) = shown(&Value::Array(vec!["x".repeat(1000).into(); 1000]));
        assert!(text.len() < SHOWN + 1000 && text.ends_with("more bytes are not shown)\n"), "{}", text.len());
    }
}
