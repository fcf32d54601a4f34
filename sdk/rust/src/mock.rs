//! A host for native unit tests: key-values, configuration and clock in memory, scripted HTTP answers, and a record of
//! what the plugin did. Each thread has its own.
//!
//! ```
//! use wasmdm_plugin::{CallInfo, Event, EventSink, Failure, http, mock};
//! use serde_json::json;
//!
//! struct Notify;
//! impl EventSink for Notify {
//!     fn handle(_: CallInfo, occurrence: Event) -> Result<(), Failure> {
//!         http::post("https://hooks.example").json(&json!({ "topic": occurrence.topic }))?.send()?.success()?;
//!         Ok(())
//!     }
//! }
//!
//! let host = mock::Host::new();
//! host.respond(mock::response(503, ""));
//! let failure = host.call(|| Notify::handle(mock::call(), mock::event("enrollment.enrolled", json!({})))).unwrap_err();
//! assert!(failure.retryable);
//! assert_eq!(host.requests()[0].url, "https://hooks.example");
//! ```
//!
//! It grants everything, and keeps the real host's rules where a plugin's logic can meet them: limits of a call
//! ([`Limits`]), idempotency keys, one timer per name and enrollment, effects that vanish when a hook fails
//! ([`Host::call`]).

pub(crate) mod imports;

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use serde_json::Value;

use crate::commands::Outcome;
use crate::http::{Request, Response};
use crate::log::Level;
use crate::{CallInfo, CommandStatus, Enrollment, Event, Failure, Input, NewCommand, Timestamp};

/// When the mock's clock starts: 2026-01-01T00:00:00Z.
pub const START: Timestamp = 1_767_225_600_000;

/// Limits of one call, as the server has them by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Calls of host functions.
    pub host_calls: u32,
    /// Bytes of one value.
    pub value_bytes: usize,
    /// Bytes of all values and keys.
    pub kv_bytes: usize,
    /// Keys.
    pub kv_keys: usize,
    /// HTTP requests.
    pub http_calls: u32,
    /// Bytes of one HTTP answer.
    pub http_answer_bytes: usize,
    /// Commands.
    pub commands: usize,
    /// Timers set.
    pub timers: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            host_calls: 1000,
            value_bytes: 64 * 1024,
            kv_bytes: 16 * 1024 * 1024,
            kv_keys: 100_000,
            http_calls: 4,
            http_answer_bytes: 1024 * 1024,
            commands: 100,
            timers: 10,
        }
    }
}

/// A command that the plugin queued for one enrollment.
#[derive(Debug, Clone, PartialEq)]
pub struct Enqueued {
    /// The enrollment.
    pub target: String,
    /// The `CommandUUID` that it got.
    pub uuid: String,
    /// What was queued.
    pub command: NewCommand,
}

/// A timer that the plugin set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timer {
    /// Its name.
    pub name: String,
    /// The enrollment that it names.
    pub who: Option<String>,
    /// When it fires.
    pub at: Timestamp,
    /// What comes back.
    pub data: Vec<u8>,
}

/// A line that the plugin logged.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// Its level.
    pub level: Level,
    /// The text.
    pub message: String,
    /// Fields in order.
    pub fields: Vec<(String, String)>,
}

#[derive(Debug, Clone)]
struct Stored {
    value: Vec<u8>,
    version: u64,
    expires_at: Option<Timestamp>,
}

/// What a failed call takes back.
#[derive(Debug, Clone, Default)]
struct Effects {
    pairs: BTreeMap<String, Stored>,
    next_version: u64,
    enrollments: BTreeMap<String, Enrollment>,
    released: Vec<String>,
    enqueued: Vec<Enqueued>,
    statuses: BTreeMap<(String, String), CommandStatus>,
    next_uuid: u64,
    timers: BTreeMap<(String, Option<String>), Timer>,
    woken: Vec<String>,
}

type Respond = Rc<dyn Fn(&Request) -> Result<Response, Failure>>;
type Convert = Rc<dyn Fn(&[u8]) -> Result<Vec<u8>, Failure>>;

struct State {
    effects: Effects,
    config: Value,
    info: Value,
    now: Timestamp,
    limits: Limits,
    /// Of the current call.
    host_calls: u32,
    http_calls: u32,
    timers_set: u32,
    commands_before: usize,
    responses: VecDeque<Result<Response, Failure>>,
    respond: Option<Respond>,
    to_json: Option<Convert>,
    from_json: Option<Convert>,
    requests: Vec<Request>,
    logs: Vec<Line>,
    /// Refusals by interface: `kv`, `http`, ….
    refused: BTreeMap<String, Failure>,
    random: u64,
}

impl Default for State {
    fn default() -> Self {
        Self {
            effects: Effects::default(),
            config: Value::Object(serde_json::Map::new()),
            info: serde_json::json!({
                "name": "plugin-under-test", "version": "0.0.0", "digest": "", "tenant": "default", "server_version": "0.0.0", "limits": {}
            }),
            now: START,
            limits: Limits::default(),
            host_calls: 0,
            http_calls: 0,
            timers_set: 0,
            commands_before: 0,
            responses: VecDeque::new(),
            respond: None,
            to_json: None,
            from_json: None,
            requests: Vec::new(),
            logs: Vec::new(),
            refused: BTreeMap::new(),
            random: 0,
        }
    }
}

thread_local! {
    static STATE: RefCell<State> = RefCell::default();
}

fn with<T>(work: impl FnOnce(&mut State) -> T) -> T {
    STATE.with(|state| work(&mut state.borrow_mut()))
}

/// The mock of this thread. Making one empties it.
#[derive(Debug)]
pub struct Host(());

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

impl Host {
    /// An empty host whose clock shows [`START`].
    pub fn new() -> Self {
        with(|state| *state = State::default());
        Self(())
    }

    /// Runs one call as the host does: with limits of its own, and with no effects if it fails.
    pub fn call<T>(&self, hook: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
        let before = with(|state| {
            state.host_calls = 0;
            state.http_calls = 0;
            state.timers_set = 0;
            state.commands_before = state.effects.enqueued.len();
            state.effects.clone()
        });
        let outcome = hook();
        if outcome.is_err() {
            with(|state| state.effects = before);
        }
        outcome
    }

    /// The number of host functions called since [`Host::call`] last began.
    pub fn host_calls(&self) -> u32 {
        with(|state| state.host_calls)
    }

    /// Sets the configuration, an object.
    pub fn set_config(&self, config: Value) {
        with(|state| state.config = config);
    }

    /// Sets what `runtime::info` answers.
    pub fn set_info(&self, info: Value) {
        with(|state| state.info = info);
    }

    /// Sets the limits of calls.
    pub fn set_limits(&self, limits: Limits) {
        with(|state| state.limits = limits);
    }

    /// Makes all functions of a capability (`kv`, `http`, …) fail.
    pub fn refuse(&self, capability: &str, failure: Failure) {
        with(|state| state.refused.insert(capability.to_owned(), failure));
    }

    /// The clock.
    pub fn now(&self) -> Timestamp {
        with(|state| state.now)
    }

    /// Moves the clock.
    pub fn advance(&self, milliseconds: u64) {
        with(|state| state.now = state.now.saturating_add(milliseconds));
    }

    /// The key-values that have not expired.
    pub fn pairs(&self) -> BTreeMap<String, Vec<u8>> {
        with(|state| {
            let now = state.now;
            let live = |stored: &Stored| stored.expires_at.is_none_or(|at| now < at);
            let pairs = &state.effects.pairs;
            pairs.iter().filter(|(_, stored)| live(stored)).map(|(key, stored)| (key.clone(), stored.value.clone())).collect()
        })
    }

    /// The next HTTP answer. Answers are given in order, before [`Host::on_http`] is asked.
    pub fn respond(&self, response: Response) {
        with(|state| state.responses.push_back(Ok(response)));
    }

    /// The next HTTP request fails.
    pub fn respond_with_failure(&self, failure: Failure) {
        with(|state| state.responses.push_back(Err(failure)));
    }

    /// Answers HTTP requests.
    pub fn on_http(&self, respond: impl Fn(&Request) -> Result<Response, Failure> + 'static) {
        with(|state| state.respond = Some(Rc::new(respond)));
    }

    /// Converts property lists to JSON.
    pub fn on_plist_to_json(&self, convert: impl Fn(&[u8]) -> Result<Vec<u8>, Failure> + 'static) {
        with(|state| state.to_json = Some(Rc::new(convert)));
    }

    /// Converts JSON to property lists.
    pub fn on_plist_from_json(&self, convert: impl Fn(&[u8]) -> Result<Vec<u8>, Failure> + 'static) {
        with(|state| state.from_json = Some(Rc::new(convert)));
    }

    /// The HTTP requests that were sent, also by calls that failed later.
    pub fn requests(&self) -> Vec<Request> {
        with(|state| state.requests.clone())
    }

    /// Adds or replaces an enrollment.
    pub fn add_enrollment(&self, enrollment: Enrollment) {
        with(|state| state.effects.enrollments.insert(enrollment.id.clone(), enrollment));
    }

    /// An enrollment, with the tags that were set.
    pub fn enrollment(&self, id: &str) -> Option<Enrollment> {
        with(|state| state.effects.enrollments.get(id).cloned())
    }

    /// The enrollments that were released from quarantine.
    pub fn released(&self) -> Vec<String> {
        with(|state| state.effects.released.clone())
    }

    /// The commands that were queued, in order.
    pub fn enqueued(&self) -> Vec<Enqueued> {
        with(|state| state.effects.enqueued.clone())
    }

    /// Sets what the host answers about a command.
    pub fn set_command_status(&self, id: &str, status: CommandStatus) {
        with(|state| state.effects.statuses.insert((id.to_owned(), status.uuid.clone()), status));
    }

    /// Whom the plugin has woken, in order.
    pub fn woken(&self) -> Vec<String> {
        with(|state| state.effects.woken.clone())
    }

    /// The timers that are set, in the order of their names.
    pub fn timers(&self) -> Vec<Timer> {
        with(|state| state.effects.timers.values().cloned().collect())
    }

    /// Takes out the timers that are due, the earliest first: hand them to the plugin's `tick`.
    pub fn due_timers(&self) -> Vec<Timer> {
        with(|state| {
            let now = state.now;
            let timers = std::mem::take(&mut state.effects.timers);
            let (due, later): (Vec<_>, Vec<_>) = timers.into_iter().partition(|(_, timer)| timer.at <= now);
            state.effects.timers = later.into_iter().collect();
            let mut due: Vec<Timer> = due.into_iter().map(|(_, timer)| timer).collect();
            due.sort_by_key(|timer| timer.at);
            due
        })
    }

    /// The lines that were logged, also by calls that failed.
    pub fn logs(&self) -> Vec<Line> {
        with(|state| state.logs.clone())
    }
}

/// A call as hooks get it, with a deadline in 30 s.
pub fn call() -> CallInfo {
    CallInfo { id: "call-1".to_owned(), deadline: with(|state| state.now).saturating_add(30_000), traceparent: None, facts: "{}".to_owned() }
}

/// A device's enrollment with those facts.
#[expect(clippy::needless_pass_by_value, reason = "tests write `json!(…)` in place")]
pub fn enrollment(id: &str, facts: Value) -> Enrollment {
    Enrollment {
        id: id.to_owned(),
        parent_id: None,
        kind: "device".to_owned(),
        topic: "com.apple.mgmt.External.example".to_owned(),
        facts: facts.to_string(),
    }
}

/// A document as hooks get it.
#[expect(clippy::needless_pass_by_value, reason = "tests write `json!(…)` in place")]
pub fn input(document: Value) -> Input {
    Input { body: document.to_string(), truncated: false }
}

/// An event at its first delivery, of no enrollment, with the mock's time. Change its fields as needed.
pub fn event(topic: &str, data: Value) -> Event {
    Event { id: "event-1".to_owned(), topic: topic.to_owned(), at: with(|state| state.now), attempt: 1, who: None, data: input(data) }
}

/// An HTTP answer without headers.
pub fn response(status: u16, body: impl Into<Vec<u8>>) -> Response {
    Response { status, headers: Vec::new(), body: body.into() }
}

/// The outcome of queueing, as the host gives it.
fn queued(target: &str, uuid: String) -> Outcome {
    Outcome { id: target.to_owned(), uuid: Some(uuid), state: "queued".to_owned(), error: None }
}
