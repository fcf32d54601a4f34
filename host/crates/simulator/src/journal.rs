//! A journal of what devices sent and what they were told: each request before it leaves, each answer after it was read.
//!
//! After the server was killed, the journal is the witness: whatever was answered 200 must be in the database. A line is a JSON
//! object; a last line that was cut off is ignored.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead as _, BufReader, BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use aws_lc_rs::digest;
use serde::{Deserialize, Serialize};

use crate::connection::Answer;
use crate::error::SimulatorError;
use crate::message::{Message, MessageKind, ReceivedCommand};

/// The longest line that is read.
const LINE_LIMIT: usize = 1024 * 1024;

/// What a line is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryKind {
    /// A device's message, about to be sent.
    Request,
    /// The answer to one, read completely.
    Answer,
    /// A command, about to be given to the server's API for one enrollment.
    Enqueue,
    /// The API said that it was queued.
    Enqueued,
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Counted from 1 over the whole file.
    pub n: u64,
    /// Milliseconds by the clock that the writer was given.
    pub at: i64,
    /// The enrollment's id.
    pub device: String,
    /// What the line is about.
    pub kind: EntryKind,
    /// For an answer and an `enqueued`: the `n` of what it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<u64>,
    /// `MessageType` of a check-in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message_type: Option<String>,
    /// `Status` of a report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    /// The command that is reported on or queued.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command_uuid: Option<String>,
    /// Of an answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http_status: Option<u16>,
    /// The command that the answer delivers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_command_uuid: Option<String>,
    /// Lower-case hex over the body.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Lower-case hex over the bootstrap token in the message: the token itself is nobody's business.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_sha256: Option<String>,
    /// Of an Authenticate: the server asked for it, and the enrollment goes on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub renews_identity: bool,
}

impl Entry {
    fn new(device: &str, kind: EntryKind) -> Self {
        Self {
            n: 0,
            at: 0,
            device: device.into(),
            kind,
            request: None,
            message_type: None,
            status: None,
            command_uuid: None,
            http_status: None,
            next_command_uuid: None,
            sha256: None,
            token_sha256: None,
            renews_identity: false,
        }
    }
}

/// Writes a journal. Lines reach the operating system before the method returns, so that they outlive this process.
pub struct JournalWriter {
    inner: Mutex<Inner>,
    path: PathBuf,
    clock: Box<dyn Fn() -> i64 + Send + Sync>,
}

struct Inner {
    file: BufWriter<File>,
    last: u64,
    in_flight: BTreeSet<u64>,
    lost: BTreeSet<u64>,
}

impl std::fmt::Debug for JournalWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JournalWriter").field("path", &self.path).finish_non_exhaustive()
    }
}

impl JournalWriter {
    /// Opens `path`, going on after what stands there already. `clock` answers milliseconds.
    pub fn open(path: &Path, clock: impl Fn() -> i64 + Send + Sync + 'static) -> Result<Self, SimulatorError> {
        let (last, whole) = if path.exists() {
            let (entries, whole) = read_entries(path)?;
            (entries.last().map_or(0, |entry| entry.n), whole)
        } else {
            (0, 0)
        };
        let file = File::options().create(true).append(true).open(path).map_err(|error| SimulatorError::io(path, error))?;
        // A line that was cut off must not run into the next one.
        file.set_len(whole).map_err(|error| SimulatorError::io(path, error))?;
        Ok(Self {
            inner: Mutex::new(Inner { file: BufWriter::new(file), last, in_flight: BTreeSet::new(), lost: BTreeSet::new() }),
            path: path.into(),
            clock: Box::new(clock),
        })
    }

    /// Writes down a message that is about to be sent; answers its number.
    pub fn record_request(&self, device: &str, message: &Message) -> Result<u64, SimulatorError> {
        let mut entry = Entry::new(device, EntryKind::Request);
        match &message.kind {
            MessageKind::CheckIn { message_type } => {
                entry.message_type = Some(message_type.clone());
                if message_type == "SetBootstrapToken" {
                    entry.token_sha256 = bootstrap_token(&message.body).map(|token| sha256(&token));
                }
            }
            MessageKind::Report { status, command_uuid } => {
                entry.status = Some(status.clone());
                entry.command_uuid.clone_from(command_uuid);
            }
        }
        entry.sha256 = Some(sha256(&message.body));
        entry.renews_identity = message.renews_identity;
        let number = self.write(entry)?;
        self.lock().in_flight.insert(number);
        Ok(number)
    }

    /// Remembers, only in memory, that nobody waits for the answer to the request of that number any more.
    pub fn record_lost(&self, request: u64) {
        let mut inner = self.lock();
        inner.in_flight.remove(&request);
        inner.lost.insert(request);
    }

    /// The requests of this process whose answers are still waited for.
    pub fn in_flight(&self) -> BTreeSet<u64> {
        self.lock().in_flight.clone()
    }

    /// How many of these requests were never answered.
    pub fn lost_of(&self, requests: &BTreeSet<u64>) -> usize {
        self.lock().lost.intersection(requests).count()
    }

    /// Writes down the answer to the request of that number.
    pub fn record_answer(&self, request: u64, device: &str, answer: &Answer) -> Result<(), SimulatorError> {
        let mut entry = Entry::new(device, EntryKind::Answer);
        entry.request = Some(request);
        entry.http_status = Some(answer.status.as_u16());
        if !answer.body.is_empty() {
            entry.sha256 = Some(sha256(&answer.body));
            entry.next_command_uuid = ReceivedCommand::parse(&answer.body).ok().map(|command| command.uuid);
        }
        self.write(entry)?;
        self.lock().in_flight.remove(&request);
        Ok(())
    }

    /// Writes down a command that is about to be queued for one enrollment; answers its number.
    pub fn record_enqueue(&self, device: &str, command_uuid: &str, document: &[u8]) -> Result<u64, SimulatorError> {
        let mut entry = Entry::new(device, EntryKind::Enqueue);
        entry.command_uuid = Some(command_uuid.into());
        entry.sha256 = Some(sha256(document));
        self.write(entry)
    }

    /// Writes down that the server has confirmed the enqueue of that number.
    pub fn record_enqueued(&self, enqueue: u64, device: &str, command_uuid: &str) -> Result<(), SimulatorError> {
        let mut entry = Entry::new(device, EntryKind::Enqueued);
        entry.request = Some(enqueue);
        entry.command_uuid = Some(command_uuid.into());
        self.write(entry).map(|_| ())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write(&self, mut entry: Entry) -> Result<u64, SimulatorError> {
        entry.at = (self.clock)();
        let mut inner = self.lock();
        entry.n = inner.last + 1;
        let failed = |error| SimulatorError::io(&self.path, error);
        serde_json::to_writer(&mut inner.file, &entry).map_err(|error| failed(std::io::Error::other(error)))?;
        inner.file.write_all(b"\n").map_err(failed)?;
        inner.file.flush().map_err(failed)?;
        inner.last = entry.n;
        Ok(entry.n)
    }
}

/// Something that a confirmed or an unanswered request did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Known<T> {
    /// The last word about it was confirmed.
    Confirmed(T),
    /// A later request about it was never answered, so that the server may have either state.
    Uncertain {
        /// What was confirmed before, if anything.
        before: Option<T>,
        /// What the unanswered requests asked for.
        attempted: Vec<T>,
    },
}

/// How an enrollment stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum EnrollmentState {
    /// Authenticate was confirmed, no TokenUpdate since.
    Authenticated,
    /// A TokenUpdate was confirmed.
    Enrolled,
    /// It left; of a user's channel also: the device left or began to enroll again.
    CheckedOut,
}

/// The final report of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FinalResult {
    /// `Acknowledged`, `Error` or `CommandFormatError`
    pub status: String,
    /// Lower-case hex over the report.
    pub sha256: String,
    /// Whether the server answered 200 to it.
    pub confirmed: bool,
}

/// One delivery of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// The line of the answer that brought it.
    pub n: u64,
    /// The enrollment.
    pub device: String,
    /// The command.
    pub command_uuid: String,
}

/// What follows from a journal.
#[derive(Debug, Clone, Default)]
pub struct Journal {
    /// Every line.
    pub entries: Vec<Entry>,
    /// How each enrollment stands.
    pub enrollments: BTreeMap<String, Known<EnrollmentState>>,
    /// Final results by enrollment and `CommandUUID`; the first that was confirmed, else the last that was tried.
    pub results: BTreeMap<(String, String), FinalResult>,
    /// SHA-256 of each escrowed bootstrap token; `None` is a deleted one.
    pub bootstrap_tokens: BTreeMap<String, Known<Option<String>>>,
    /// Commands that the API confirmed, by enrollment, in the order of confirmation.
    pub enqueued: BTreeMap<String, Vec<String>>,
    /// Enrollment and `CommandUUID` of enqueues without an answer.
    pub uncertain_enqueues: BTreeSet<(String, String)>,
    /// Every delivery, in the order of the lines.
    pub deliveries: Vec<Delivery>,
    /// Requests without an answer.
    pub unanswered: u64,
}

impl Journal {
    /// The enrollments that certainly are enrolled.
    pub fn enrolled(&self) -> impl Iterator<Item = &str> {
        self.in_state(EnrollmentState::Enrolled)
    }

    /// The enrollments that certainly have left.
    pub fn checked_out(&self) -> impl Iterator<Item = &str> {
        self.in_state(EnrollmentState::CheckedOut)
    }

    fn in_state(&self, wanted: EnrollmentState) -> impl Iterator<Item = &str> {
        self.enrollments.iter().filter(move |(_, state)| **state == Known::Confirmed(wanted)).map(|(device, _)| device.as_str())
    }

    /// The final results that the server has confirmed.
    pub fn confirmed_results(&self) -> impl Iterator<Item = (&str, &str, &FinalResult)> {
        self.results.iter().filter(|(_, result)| result.confirmed).map(|((device, uuid), result)| (device.as_str(), uuid.as_str(), result))
    }

    /// Deliveries of a command after its final result had been confirmed: there must be none.
    pub fn deliveries_after_confirmed_result(&self) -> Vec<&Delivery> {
        let mut confirmed_at: BTreeMap<(&str, &str), u64> = BTreeMap::new();
        let requests: BTreeMap<u64, &Entry> = self.entries.iter().map(|entry| (entry.n, entry)).collect();
        for answer in &self.entries {
            if answer.kind != EntryKind::Answer || answer.http_status != Some(200) {
                continue;
            }
            let Some(request) = answer.request.and_then(|n| requests.get(&n)) else {
                continue;
            };
            if let (Some(status), Some(uuid)) = (&request.status, &request.command_uuid)
                && is_final(status)
            {
                confirmed_at.entry((request.device.as_str(), uuid.as_str())).or_insert(answer.n);
            }
        }
        self.deliveries
            .iter()
            .filter(|delivery| confirmed_at.get(&(delivery.device.as_str(), delivery.command_uuid.as_str())).is_some_and(|at| *at < delivery.n))
            .collect()
    }

    fn take(&mut self, request: &Entry, status: Option<u16>) {
        let confirmed = status == Some(200);
        // An answer other than 200 says that nothing was stored.
        if status.is_some() && !confirmed {
            return;
        }
        if status.is_none() {
            self.unanswered += 1;
        }
        if let Some(message_type) = request.message_type.as_deref() {
            let state = match message_type {
                "Authenticate" => Some(EnrollmentState::Authenticated),
                "TokenUpdate" => Some(EnrollmentState::Enrolled),
                "CheckOut" => Some(EnrollmentState::CheckedOut),
                _ => None,
            };
            if request.renews_identity {
                // The enrollment goes on, whether or not the server calls it enrolled before the TokenUpdate that follows: with its
                // users, and with what is escrowed.
                learn(&mut self.enrollments, &request.device, EnrollmentState::Authenticated, false);
                return;
            }
            if let Some(state) = state {
                learn(&mut self.enrollments, &request.device, state, confirmed);
                // What ends or renews the device's enrollment ends its users' channels.
                if state != EnrollmentState::Enrolled {
                    let users = format!("{}:", request.device);
                    let users: Vec<String> =
                        self.enrollments.range(users.clone()..).map(|(id, _)| id).take_while(|id| id.starts_with(&users)).cloned().collect();
                    for user in users {
                        let left = EnrollmentState::CheckedOut;
                        learn(&mut self.enrollments, &user, left, confirmed);
                    }
                }
            }
            match message_type {
                "SetBootstrapToken" => learn(&mut self.bootstrap_tokens, &request.device, request.token_sha256.clone(), confirmed),
                // Enrolling again deletes what was escrowed before.
                "Authenticate" if self.bootstrap_tokens.contains_key(&request.device) => {
                    learn(&mut self.bootstrap_tokens, &request.device, None, confirmed);
                }
                _ => {}
            }
        }
        if let (Some(status), Some(uuid)) = (&request.status, &request.command_uuid)
            && is_final(status)
        {
            let result = FinalResult { status: status.clone(), sha256: request.sha256.clone().unwrap_or_default(), confirmed };
            let key = (request.device.clone(), uuid.clone());
            let known = self.results.entry(key).or_insert_with(|| result.clone());
            if !known.confirmed {
                *known = result;
            }
        }
    }
}

fn learn<T: Clone>(facts: &mut BTreeMap<String, Known<T>>, device: &str, value: T, confirmed: bool) {
    if confirmed {
        facts.insert(device.into(), Known::Confirmed(value));
        return;
    }
    let known = facts.remove(device);
    let known = match known {
        Some(Known::Uncertain { before, mut attempted }) => {
            attempted.push(value);
            Known::Uncertain { before, attempted }
        }
        Some(Known::Confirmed(before)) => Known::Uncertain { before: Some(before), attempted: vec![value] },
        None => Known::Uncertain { before: None, attempted: vec![value] },
    };
    facts.insert(device.into(), known);
}

fn is_final(status: &str) -> bool {
    matches!(status, "Acknowledged" | "Error" | "CommandFormatError")
}

/// Reads a journal and draws the conclusions.
pub fn read_journal(path: &Path) -> Result<Journal, SimulatorError> {
    let (entries, _) = read_entries(path)?;
    let mut answers: BTreeMap<u64, &Entry> = BTreeMap::new();
    for entry in &entries {
        if let (EntryKind::Answer | EntryKind::Enqueued, Some(request)) = (entry.kind, entry.request) {
            answers.insert(request, entry);
        }
    }
    let mut journal = Journal::default();
    for entry in &entries {
        let answer = answers.get(&entry.n);
        match entry.kind {
            // One enrollment has one request in flight, so the order of the requests is the order of what they did.
            EntryKind::Request => {
                journal.take(entry, answer.and_then(|answer| answer.http_status));
            }
            EntryKind::Answer => {
                if let Some(uuid) = &entry.next_command_uuid {
                    journal.deliveries.push(Delivery { n: entry.n, device: entry.device.clone(), command_uuid: uuid.clone() });
                }
            }
            EntryKind::Enqueue => {
                if let (None, Some(uuid)) = (answer, &entry.command_uuid) {
                    journal.uncertain_enqueues.insert((entry.device.clone(), uuid.clone()));
                }
            }
            EntryKind::Enqueued => {
                if let Some(uuid) = &entry.command_uuid {
                    journal.enqueued.entry(entry.device.clone()).or_default().push(uuid.clone());
                }
            }
        }
    }
    journal.entries = entries;
    Ok(journal)
}

/// The whole lines of a journal, and how many bytes they take.
fn read_entries(path: &Path) -> Result<(Vec<Entry>, u64), SimulatorError> {
    let failed = |error| SimulatorError::io(path, error);
    let mut reader = BufReader::new(File::open(path).map_err(failed)?);
    let mut entries: Vec<Entry> = Vec::new();
    let mut whole = 0;
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = std::io::Read::take(&mut reader, LINE_LIMIT as u64).read_until(b'\n', &mut line).map_err(failed)?;
        // A last line without its end was cut off while it was written.
        if read == 0 || (line.last() != Some(&b'\n') && read < LINE_LIMIT) {
            return Ok((entries, whole));
        }
        let number = entries.len() + 1;
        let wrong = |problem: String| SimulatorError::Journal { path: path.into(), line: number, problem };
        let entry: Entry = serde_json::from_slice(&line).map_err(|error| wrong(error.to_string()))?;
        if entry.n != number as u64 {
            return Err(wrong(format!("numbered {}", entry.n)));
        }
        entries.push(entry);
        whole += read as u64;
    }
}

fn bootstrap_token(body: &[u8]) -> Option<Vec<u8>> {
    let document = plist::Value::from_reader(std::io::Cursor::new(body)).ok()?;
    let token = document.as_dictionary()?.get("BootstrapToken")?.as_data()?;
    (!token.is_empty()).then(|| token.to_vec())
}

/// Lower-case hex of the SHA-256 digest.
pub fn sha256(data: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, data).as_ref())
}

/// Lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: [char; 16] = ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'];
    bytes.iter().flat_map(|byte| [byte >> 4, byte & 0xF]).filter_map(|digit| DIGITS.get(usize::from(digit))).collect()
}
