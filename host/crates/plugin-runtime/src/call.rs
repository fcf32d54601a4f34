//! One call of one hook: a fresh instance, bounded in every way, and how it ended.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tracing::Instrument;
use uuid::Uuid;
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_protocol::time::Timestamp;
use wasmdm_service::asker::Asker;
use wasmdm_service::enrollment_policy::Candidate;
use wasmdm_service::return_to_service::Configuration;
use wasmdm_service::token_source::{ServiceToken, TokenRequest};
use wasmdm_service::user_authentication::{Login, UserVerdict};
use wasmdm_storage::effects::PluginEffects;
use wasmdm_storage::events::Event;
use wasmtime::component::{Instance, ResourceTable};
use wasmtime::{PoolConcurrencyLimitError, ResourceLimiter, Store, Trap, UpdateDeadline, WasmBacktrace};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};

use crate::bindings::wasmdm::plugin::types as wit;
use crate::capabilities::buffer::Buffer;
use crate::capabilities::log::CallLog;
use crate::circuit_breaker::{CallResult, Caller};
use crate::contract;
use crate::effective::{Limits, Mode, Settings};
use crate::hook::{CONTRACT_VERSION, Hook, PACKAGE, Permissions};
use crate::meter::{Meter, Metered};
use crate::plugin::{LinkedPlugin, Shared};

/// What a plugin is asked.
#[derive(Debug, Clone, Copy)]
pub enum Request<'a> {
    /// Only to start, and to have the types of its exports checked.
    Probe,
    /// `lifecycle`.
    ValidateConfig { document: &'a str },
    /// `enrollment-policy`, within what is left of the chain's time.
    Decide { candidate: &'a Candidate, within: Duration },
    /// `user-authentication`, within what is left of the answer's time, like the next two.
    Authenticate { login: &'a Login, within: Duration },
    /// `token-source`.
    Token { asked: &'a TokenRequest, within: Duration },
    /// `return-to-service`.
    ReturnToService { asker: &'a Asker, within: Duration },
    /// `event-commands`.
    Generate { event: &'a Event, attempt: u32 },
    /// `event-sink`.
    Handle { event: &'a Event, attempt: u32 },
    /// `schedule`: an event `schedule.tick`.
    Tick { event: &'a Event, attempt: u32 },
}

impl Request<'_> {
    const fn hook(&self) -> Hook {
        match self {
            Self::Probe | Self::ValidateConfig { .. } => Hook::Lifecycle,
            Self::Decide { .. } => Hook::EnrollmentPolicy,
            Self::Authenticate { .. } => Hook::UserAuthentication,
            Self::Token { .. } => Hook::TokenSource,
            Self::ReturnToService { .. } => Hook::ReturnToService,
            Self::Generate { .. } => Hook::EventCommands,
            Self::Handle { .. } => Hook::EventSink,
            Self::Tick { .. } => Hook::Schedule,
        }
    }

    /// Of a check-in that a plugin answers: who asks, and the kind of message.
    const fn asker(&self) -> Option<(&Asker, &'static str)> {
        match self {
            Self::Authenticate { login, .. } => Some((&login.asker, "UserAuthenticate")),
            Self::Token { asked, .. } => Some((&asked.asker, "GetToken")),
            Self::ReturnToService { asker, .. } => Some((asker, "ReturnToService")),
            _ => None,
        }
    }

    /// The time that whoever asks has left, where it is less than the limit.
    const fn within(&self) -> Option<Duration> {
        match self {
            Self::Decide { within, .. } | Self::Authenticate { within, .. } | Self::Token { within, .. } | Self::ReturnToService { within, .. } => {
                Some(*within)
            }
            _ => None,
        }
    }

    fn caller(&self) -> Option<Caller> {
        match self {
            Self::Probe | Self::ValidateConfig { .. } => None,
            Self::Decide { candidate, .. } => Some(Caller::Certificate(candidate.certificate.identity)),
            // A device can make up as many users as it likes.
            Self::Authenticate { .. } | Self::Token { .. } | Self::ReturnToService { .. } => {
                self.asker().map(|(asker, _)| Caller::Enrollment(asker.enrollment.device().clone()))
            }
            Self::Generate { event, .. } | Self::Handle { event, .. } | Self::Tick { event, .. } => {
                event.who.as_ref().map(|who| Caller::Enrollment(who.id.clone()))
            }
        }
    }

    const fn event(&self) -> Option<&Event> {
        match self {
            Self::Generate { event, .. } | Self::Handle { event, .. } | Self::Tick { event, .. } => Some(event),
            _ => None,
        }
    }

    fn facts(&self) -> serde_json::Value {
        match self {
            Self::Probe | Self::ValidateConfig { .. } => serde_json::json!({}),
            Self::Decide { candidate, .. } => {
                let mut facts = serde_json::json!({ "message_type": "Authenticate", "request_id": candidate.request_id });
                if candidate.renewing
                    && let serde_json::Value::Object(facts) = &mut facts
                {
                    facts.insert(String::from("renewing"), true.into());
                }
                facts
            }
            Self::Authenticate { .. } | Self::Token { .. } | Self::ReturnToService { .. } => match self.asker() {
                Some((asker, message_type)) => serde_json::json!({ "message_type": message_type, "request_id": asker.request_id }),
                None => serde_json::json!({}),
            },
            Self::Generate { event, attempt } | Self::Handle { event, attempt } | Self::Tick { event, attempt } => {
                serde_json::json!({ "attempt": attempt, "topic": event.topic, "hops": event.hops })
            }
        }
    }
}

/// A call that ended.
#[derive(Debug)]
pub struct Called {
    /// Unique; the plugin saw it, the log and the audit have it.
    pub id: String,
    pub outcome: Outcome,
    /// What it leaves behind if its answer counts: of answered calls only.
    pub effects: Option<Box<PluginEffects>>,
    pub usage: Usage,
}

/// What a call took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    pub wall: Duration,
    pub cpu: Duration,
    /// Bytes of linear memory at most.
    pub peak_memory: usize,
    pub host_calls: u32,
    pub dropped_log_lines: u32,
}

/// What was seen of a generation since it was linked, for an operator to compare with its limits.
#[derive(Debug, Clone, Default)]
pub struct Observations {
    pub calls: u64,
    pub failures: u64,
    /// The most of each that any call took.
    pub most: Usage,
    /// The last few that failed, oldest first.
    pub recent: VecDeque<RecentFailure>,
}

/// A call that failed.
#[derive(Debug, Clone)]
pub struct RecentFailure {
    pub at: Timestamp,
    pub call: String,
    pub hook: Hook,
    pub tenant: TenantId,
    pub outcome: Outcome,
}

impl Observations {
    const RECENT: usize = 10;

    fn add(&mut self, tenant: &TenantId, hook: Hook, called: &Called, at: Timestamp) {
        self.calls = self.calls.saturating_add(1);
        let usage = &called.usage;
        let most = &mut self.most;
        most.wall = most.wall.max(usage.wall);
        most.cpu = most.cpu.max(usage.cpu);
        most.peak_memory = most.peak_memory.max(usage.peak_memory);
        most.host_calls = most.host_calls.max(usage.host_calls);
        most.dropped_log_lines = most.dropped_log_lines.max(usage.dropped_log_lines);
        if called.outcome.result() != CallResult::Failure {
            return;
        }
        self.failures = self.failures.saturating_add(1);
        if self.recent.len() >= Self::RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(RecentFailure { at, call: called.id.clone(), hook, tenant: tenant.clone(), outcome: called.outcome.clone() });
    }
}

/// How a call ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    Answered(Answer),
    /// The plugin said itself that it could not.
    Failure(Failure),
    /// It stopped; with the names of the functions that it was in.
    Trap(String),
    /// Wall time was up.
    Deadline,
    /// CPU time was up.
    Cpu,
    OutOfMemory,
    HostCalls,
    OutputTooLarge,
    /// Too many calls of the plugin run already: it was not asked.
    Saturated,
    /// Its circuit breaker is open: it was not asked.
    Suspended {
        until: Timestamp,
    },
    /// It does not answer this hook for this tenant.
    NotServed,
    /// No instance could be made.
    Link(String),
}

/// An answer that counts.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    Nothing,
    Decision(Decision),
    User(UserVerdict),
    Token(Option<ServiceToken>),
    ReturnToService(Option<Configuration>),
}

/// What an enrollment policy says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    Abstain,
    Allow { tags: Vec<String>, reason: Option<String> },
    Quarantine { tags: Vec<String>, reason: Option<String> },
    Deny { reason: Option<String> },
}

/// A `failure` of the contract.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub code: String,
    pub message: String,
    pub retryable: bool,
    pub retry_after: Option<Duration>,
}

impl Outcome {
    /// The label in metrics.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Answered(_) => "ok",
            Self::Failure(_) => "failure",
            Self::Trap(_) => "trap",
            Self::Deadline => "deadline",
            Self::Cpu => "cpu",
            Self::OutOfMemory => "out-of-memory",
            Self::HostCalls => "host-calls",
            Self::OutputTooLarge => "output-too-large",
            Self::Saturated => "saturated",
            Self::Suspended { .. } => "suspended",
            Self::NotServed => "not-served",
            Self::Link(_) => "link",
        }
    }

    const fn result(&self) -> CallResult {
        match self {
            Self::Answered(_) => CallResult::Success,
            Self::Saturated | Self::Suspended { .. } | Self::NotServed => CallResult::Neither,
            _ => CallResult::Failure,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answered(_) => f.write_str("an answer"),
            Self::Failure(failure) => write!(f, "failure {}: {}", failure.code, failure.message),
            Self::Trap(trace) => write!(f, "trap: {trace}"),
            Self::Deadline => f.write_str("deadline: it took longer than its limit of wall time"),
            Self::Cpu => f.write_str("cpu: it used more than its limit of CPU time"),
            Self::OutOfMemory => f.write_str("out-of-memory: it asked for more memory than its limit"),
            Self::HostCalls => f.write_str("host-calls: it called the host more often than its limit"),
            Self::OutputTooLarge => f.write_str("output-too-large: it returned more than its limit"),
            Self::Saturated => f.write_str("saturated: too many of its calls run already"),
            Self::Suspended { until } => write!(f, "suspended until {until} because it failed too often"),
            Self::NotServed => f.write_str("not-served: it does not answer this hook for this tenant"),
            Self::Link(reason) => write!(f, "link: {reason}"),
        }
    }
}

/// What belongs to one instance: the call that it was made for, and its WASI.
pub struct Sandbox {
    pub(crate) call: State,
    wasi: WasiCtx,
    table: ResourceTable,
}

/// What a guest's imports know of the call. One for each call.
pub(crate) struct State {
    pub(crate) shared: Arc<Shared>,
    pub(crate) settings: Arc<Settings>,
    pub(crate) tenant: TenantId,
    pub(crate) hook: Hook,
    pub(crate) permissions: Permissions,
    /// Of the event that is delivered; prefixes idempotency keys.
    pub(crate) event: Option<String>,
    /// Key-values are written apart and nothing of the decision counts.
    pub(crate) shadow: bool,
    pub(crate) ends: tokio::time::Instant,
    pub(crate) buffer: Buffer,
    pub(crate) log: Arc<CallLog>,
    pub(crate) host_calls: u32,
    pub(crate) http_calls: u32,
    breach: Option<Breach>,
    limiter: Limiter,
    meter: Arc<Meter>,
}

/// A limit that the host ended the call for.
#[derive(Debug, Clone, Copy, thiserror::Error)]
enum Breach {
    #[error("CPU time is up")]
    Cpu,
    #[error("too many calls of the host")]
    HostCalls,
}

impl State {
    /// Counts a call of the host.
    pub(crate) fn enter(&mut self) -> wasmtime::Result<()> {
        self.host_calls = self.host_calls.saturating_add(1);
        if self.host_calls > self.settings.limits.host_calls {
            self.breach = Some(Breach::HostCalls);
            return Err(Breach::HostCalls.into());
        }
        Ok(())
    }

    /// How much of the call's time is left.
    pub(crate) fn remaining(&self) -> Duration {
        self.ends.saturating_duration_since(tokio::time::Instant::now())
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.shared.services.clock.now()
    }
}

impl WasiView for Sandbox {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

/// Bounds what an instance may reserve.
#[derive(Debug, Clone, Copy)]
struct Limiter {
    memory: usize,
    peak: usize,
    memory_limit: usize,
    table_elements: usize,
    table_limit: usize,
    instances: usize,
    tables: usize,
    memories: usize,
    refused_memory: bool,
}

impl Limiter {
    const fn new(limits: &Limits) -> Self {
        Self {
            memory: 0,
            peak: 0,
            memory_limit: limits.memory,
            table_elements: 0,
            table_limit: limits.table_elements,
            instances: limits.core_instances,
            // One table for each module is what toolchains make.
            tables: limits.core_instances,
            memories: limits.memories,
            refused_memory: false,
        }
    }
}

impl ResourceLimiter for Limiter {
    fn memory_growing(&mut self, current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        let total = self.memory.saturating_sub(current).saturating_add(desired);
        if total > self.memory_limit {
            self.refused_memory = true;
            return Ok(false);
        }
        self.memory = total;
        self.peak = self.peak.max(total);
        Ok(true)
    }

    fn table_growing(&mut self, current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        let total = self.table_elements.saturating_sub(current).saturating_add(desired);
        if total > self.table_limit {
            return Ok(false);
        }
        self.table_elements = total;
        Ok(true)
    }

    fn instances(&self) -> usize {
        self.instances
    }

    fn tables(&self) -> usize {
        self.tables
    }

    fn memories(&self) -> usize {
        self.memories
    }
}

/// How far a call got, to tell a component that cannot start from one that stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Starting,
    Running,
}

/// A request in the contract's types. Made before the meter runs: it is the host's work, not the guest's.
enum Arguments {
    Probe,
    ValidateConfig { document: String },
    Decide { who: wit::Enrollment, message: wit::Input, re_enrolling: bool },
    Authenticate { who: wit::Enrollment, message: wit::Input, digest_response: Option<String> },
    Token { who: wit::Enrollment, service_type: String, parameters: Option<String> },
    ReturnToService { who: wit::Enrollment },
    Generate(wit::Event),
    Handle(wit::Event),
    Tick(contract::Tick),
}

impl Arguments {
    fn of(request: &Request<'_>, input: usize) -> Self {
        match *request {
            Request::Probe => Self::Probe,
            Request::ValidateConfig { document } => Self::ValidateConfig { document: document.to_owned() },
            Request::Decide { candidate, .. } => Self::Decide {
                who: contract::candidate(candidate),
                message: contract::message(&candidate.message, input),
                re_enrolling: candidate.re_enrolling,
            },
            Request::Authenticate { login, .. } => Self::Authenticate {
                who: contract::asker(&login.asker),
                message: contract::message(&login.message, input),
                digest_response: login.digest_response.clone(),
            },
            Request::Token { asked, .. } => Self::Token {
                who: contract::asker(&asked.asker),
                service_type: asked.service_type.clone(),
                // Whole: whoever makes the token needs what Apple has it made of.
                parameters: asked.parameters.as_ref().map(|parameters| wasmdm_protocol::json::to_json(parameters).to_string()),
            },
            Request::ReturnToService { asker, .. } => Self::ReturnToService { who: contract::asker(asker) },
            Request::Generate { event, attempt } => Self::Generate(contract::event(event, attempt, input)),
            Request::Handle { event, attempt } => Self::Handle(contract::event(event, attempt, input)),
            Request::Tick { event, .. } => Self::Tick(contract::Tick::of(event)),
        }
    }
}

/// What comes out of the guest.
enum Returned {
    Nothing,
    Decision(wit::Decision),
    User(wit::Decision),
    Token(Option<Vec<u8>>),
    ReturnToService(Option<String>),
    Commands(Vec<wit::NewCommand>),
}

impl LinkedPlugin {
    /// Calls a hook. Never fails: what goes wrong is the [`Outcome`]. Dropping the future ends the guest.
    pub async fn call(&self, tenant: &TenantId, request: Request<'_>) -> Called {
        let hook = request.hook();
        let id = Uuid::now_v7().simple().to_string();
        let span = tracing::info_span!(
            "plugin call",
            plugin = %self.shared.identity.name,
            digest = %self.shared.identity.digest.get(..12).unwrap_or_default(),
            hook = hook.as_str(),
            tenant = %tenant,
            call = %id,
        );
        let called = Box::pin(self.guarded(tenant, request, id)).instrument(span).await;
        self.shared.observations.lock().add(tenant, hook, &called, self.shared.services.clock.now());
        self.measure(hook, &called);
        called
    }

    /// The call within its breaker and its places.
    async fn guarded(&self, tenant: &TenantId, request: Request<'_>, id: String) -> Called {
        let began = tokio::time::Instant::now();
        let not_asked = |id, outcome| Called { id, outcome, effects: None, usage: Usage { wall: began.elapsed(), ..Usage::default() } };
        let hook = request.hook();
        let settings = match request {
            Request::Probe => Some(self.shared.settings_for_probe()),
            _ if !self.hooks().contains(&hook) => None,
            _ => self.shared.settings(tenant),
        };
        let Some(settings) = settings else { return not_asked(id, Outcome::NotServed) };
        let mut wall = settings.limits.wall(hook);
        if let Some(within) = request.within() {
            wall = wall.min(within);
        }
        let ends = began + wall;
        let clock = &self.shared.services.clock;
        let deadline = clock.now().plus(wall);
        if wall.is_zero() {
            return not_asked(id, Outcome::Deadline);
        }
        // What is asked before a version becomes active must not suspend it.
        let leave = match hook {
            Hook::Lifecycle => None,
            _ => match self.shared.breakers.leave(tenant, hook, clock.now()) {
                Ok(leave) => Some(leave),
                Err(suspended) => return not_asked(id, Outcome::Suspended { until: suspended.until }),
            },
        };
        let place = tokio::time::timeout_at(ends, self.shared.places.take(tenant, &settings.limits)).await;
        let Ok(Ok(_place)) = place else { return not_asked(id, Outcome::Saturated) };

        let called = Box::pin(self.run(tenant, request, id, settings, ends, deadline, began)).await;
        if let Some(leave) = leave
            && leave.ended(called.outcome.result(), request.caller(), clock.now())
        {
            tracing::warn!("Plugin {} failed too often at {hook} and is suspended for now", self.shared.identity.name);
        }
        called
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one call, used once")]
    async fn run(
        &self,
        tenant: &TenantId,
        request: Request<'_>,
        id: String,
        settings: Arc<Settings>,
        ends: tokio::time::Instant,
        deadline: Timestamp,
        began: tokio::time::Instant,
    ) -> Called {
        let hook = request.hook();
        let meter = Arc::new(Meter::default());
        let mut store = self.store(tenant, &request, Arc::clone(&settings), ends, Arc::clone(&meter));
        let mut reached = Stage::Starting;
        let call = wit::CallInfo { id: id.clone(), deadline: contract::timestamp(deadline), traceparent: None, facts: request.facts().to_string() };

        let arguments = Arguments::of(&request, settings.limits.input);
        let guest = Metered::new(self.execute(&mut store, &arguments, &call, &mut reached), Arc::clone(&meter));
        let ended = tokio::time::timeout_at(ends, guest).await;

        let cpu = meter.used();
        let state = &store.data().call;
        let mut usage = Usage { wall: began.elapsed(), cpu, peak_memory: state.limiter.peak, host_calls: state.host_calls, dropped_log_lines: 0 };
        let outcome = match ended {
            Err(_) => Err(Outcome::Deadline),
            Ok(Err(error)) => Err(classify(&error, state, reached)),
            Ok(Ok(_)) if tokio::time::Instant::now() > ends => Err(Outcome::Deadline),
            // The epoch only looks every few milliseconds; the account at the end is exact.
            Ok(Ok(_)) if cpu > settings.limits.cpu(hook) => Err(Outcome::Cpu),
            Ok(Ok(Err(failure))) => Err(Outcome::Failure(contract::failure_in(&failure, settings.limits.log_line))),
            Ok(Ok(Ok(returned))) => Ok(returned),
        };
        let state = store.into_data().call;
        usage.dropped_log_lines = state.log.finish();
        let (outcome, effects) = match outcome.and_then(|returned| state.conclude(returned, &request)) {
            Ok((answer, effects)) => (Outcome::Answered(answer), effects),
            Err(outcome) => (outcome, None),
        };
        Called { id, outcome, effects, usage }
    }

    fn store(
        &self,
        tenant: &TenantId,
        request: &Request<'_>,
        settings: Arc<Settings>,
        ends: tokio::time::Instant,
        meter: Arc<Meter>,
    ) -> Store<Sandbox> {
        let hook = request.hook();
        let limits = settings.limits;
        let log = Arc::new(CallLog::new(Arc::clone(&self.shared), limits));
        let mut table = ResourceTable::new();
        table.set_max_capacity(1_000);
        let state = State {
            shared: Arc::clone(&self.shared),
            tenant: tenant.clone(),
            hook,
            permissions: hook.permissions(),
            event: request.event().map(|event| event.id.clone()),
            shadow: hook.is_decision() && settings.mode == Mode::Monitor,
            ends,
            buffer: Buffer::default(),
            log: Arc::clone(&log),
            host_calls: 0,
            http_calls: 0,
            breach: None,
            limiter: Limiter::new(&limits),
            meter,
            settings,
        };
        let wasi = crate::capabilities::wasi::context(&log, &self.shared.services.clock);
        let mut store = Store::new(self.pre.engine(), Sandbox { call: state, wasi, table });
        store.limiter(|sandbox| &mut sandbox.call.limiter);
        store.set_epoch_deadline(1);
        let cpu_limit = limits.cpu(hook);
        store.epoch_deadline_callback(move |mut context| {
            let state = &mut context.data_mut().call;
            if state.meter.used_within_poll() > cpu_limit {
                state.breach = Some(Breach::Cpu);
                return Err(Breach::Cpu.into());
            }
            // Others of this worker get their turn; the timer of the wall limit is among them.
            Ok(UpdateDeadline::YieldCustom(1, Box::pin(tokio::task::yield_now())))
        });
        // What a guest can make the host copy at once: a list of a million references to one long string is small in its own memory.
        store.set_hostcall_fuel(limits.output.max(limits.input).saturating_add(64 << 10));
        store
    }

    async fn execute(
        &self,
        store: &mut Store<Sandbox>,
        arguments: &Arguments,
        call: &wit::CallInfo,
        reached: &mut Stage,
    ) -> wasmtime::Result<Result<Returned, wit::Failure>> {
        let instance = self.pre.instantiate_async(&mut *store).await?;
        match arguments {
            Arguments::Probe => {
                self.load_all(store, &instance)?;
                Ok(Ok(Returned::Nothing))
            }
            Arguments::ValidateConfig { document } => {
                let guest = found(self.indices.lifecycle.as_ref())?.load(&mut *store, &instance)?;
                *reached = Stage::Running;
                let answer = guest.call_validate_config(&mut *store, call, document).await?;
                Ok(answer.map(|()| Returned::Nothing))
            }
            Arguments::Decide { who, message, re_enrolling } => {
                let guest = found(self.indices.enrollment_policy.as_ref())?.load(&mut *store, &instance)?;
                *reached = Stage::Running;
                let answer = guest.call_decide(&mut *store, call, who, message, *re_enrolling).await?;
                Ok(answer.map(Returned::Decision))
            }
            Arguments::Authenticate { who, message, digest_response } => {
                let guest = found(self.indices.user_authentication.as_ref())?.load(&mut *store, &instance)?;
                *reached = Stage::Running;
                let answer = guest.call_answer(&mut *store, call, who, message, digest_response.as_deref()).await?;
                Ok(answer.map(Returned::User))
            }
            Arguments::Token { who, service_type, parameters } => {
                let guest = found(self.indices.token_source.as_ref())?.load(&mut *store, &instance)?;
                *reached = Stage::Running;
                let answer = guest.call_get_token(&mut *store, call, who, service_type, parameters.as_ref()).await?;
                Ok(answer.map(Returned::Token))
            }
            Arguments::ReturnToService { who } => {
                let guest = found(self.indices.return_to_service.as_ref())?.load(&mut *store, &instance)?;
                *reached = Stage::Running;
                let answer = guest.call_configuration(&mut *store, call, who).await?;
                Ok(answer.map(Returned::ReturnToService))
            }
            Arguments::Generate(event) => {
                let guest = found(self.indices.event_commands.as_ref())?.load(&mut *store, &instance)?;
                *reached = Stage::Running;
                let answer = guest.call_generate(&mut *store, call, event).await?;
                Ok(answer.map(Returned::Commands))
            }
            Arguments::Handle(event) => {
                let guest = found(self.indices.event_sink.as_ref())?.load(&mut *store, &instance)?;
                *reached = Stage::Running;
                let answer = guest.call_handle(&mut *store, call, event).await?;
                Ok(answer.map(|()| Returned::Nothing))
            }
            Arguments::Tick(tick) => {
                let guest = found(self.indices.schedule.as_ref())?.load(&mut *store, &instance)?;
                *reached = Stage::Running;
                let answer = guest.call_tick(&mut *store, call, &tick.name, tick.scheduled_for, tick.who.as_ref(), &tick.data).await?;
                Ok(answer.map(|()| Returned::Nothing))
            }
        }
    }

    fn load_all(&self, store: &mut Store<Sandbox>, instance: &Instance) -> wasmtime::Result<()> {
        let indices = &self.indices;
        if let Some(found) = &indices.lifecycle {
            typed(Hook::Lifecycle, found.load(&mut *store, instance))?;
        }
        if let Some(found) = &indices.enrollment_policy {
            typed(Hook::EnrollmentPolicy, found.load(&mut *store, instance))?;
        }
        if let Some(found) = &indices.user_authentication {
            typed(Hook::UserAuthentication, found.load(&mut *store, instance))?;
        }
        if let Some(found) = &indices.token_source {
            typed(Hook::TokenSource, found.load(&mut *store, instance))?;
        }
        if let Some(found) = &indices.return_to_service {
            typed(Hook::ReturnToService, found.load(&mut *store, instance))?;
        }
        if let Some(found) = &indices.event_commands {
            typed(Hook::EventCommands, found.load(&mut *store, instance))?;
        }
        if let Some(found) = &indices.event_sink {
            typed(Hook::EventSink, found.load(&mut *store, instance))?;
        }
        if let Some(found) = &indices.schedule {
            typed(Hook::Schedule, found.load(&mut *store, instance))?;
        }
        Ok(())
    }

    fn measure(&self, hook: Hook, called: &Called) {
        let metrics = self.metrics(hook);
        match called.outcome.label() {
            "ok" => metrics.ok.increment(1),
            outcome => {
                let plugin = self.shared.identity.name.clone();
                metrics::counter!("wasmdm_plugin_calls_total", "plugin" => plugin, "hook" => hook.as_str(), "outcome" => outcome).increment(1);
            }
        }
        if matches!(called.outcome.result(), CallResult::Neither) {
            return;
        }
        let usage = &called.usage;
        metrics.seconds.record(usage.wall.as_secs_f64());
        metrics.cpu_seconds.record(usage.cpu.as_secs_f64());
        #[expect(clippy::cast_precision_loss, reason = "bytes of memory are far below 2^52")]
        metrics.peak_memory.record(usage.peak_memory as f64);
        metrics.host_calls.increment(u64::from(usage.host_calls));
        if usage.dropped_log_lines > 0 {
            let plugin = self.shared.identity.name.clone();
            metrics::counter!("wasmdm_plugin_log_lines_dropped_total", "plugin" => plugin).increment(u64::from(usage.dropped_log_lines));
        }
    }
}

fn typed<T>(hook: Hook, loaded: wasmtime::Result<T>) -> wasmtime::Result<()> {
    loaded.map(drop).map_err(|error| error.context(format!("its `{hook}` has other types than {PACKAGE}@{CONTRACT_VERSION}")))
}

fn found<T>(indices: Option<&T>) -> wasmtime::Result<&T> {
    indices.ok_or_else(|| wasmtime::Error::msg("the hook is not exported"))
}

fn classify(error: &wasmtime::Error, state: &State, reached: Stage) -> Outcome {
    match state.breach {
        Some(Breach::Cpu) => return Outcome::Cpu,
        Some(Breach::HostCalls) => return Outcome::HostCalls,
        None => {}
    }
    if state.limiter.refused_memory {
        return Outcome::OutOfMemory;
    }
    if error.downcast_ref::<PoolConcurrencyLimitError>().is_some() {
        return Outcome::Saturated;
    }
    // wasmtime has no type for this one.
    if error.root_cause().to_string().contains("fuel allocated for hostcalls") {
        return Outcome::OutputTooLarge;
    }
    if reached == Stage::Starting && error.downcast_ref::<Trap>().is_none() && error.downcast_ref::<WasmBacktrace>().is_none() {
        return Outcome::Link(contract::printable(&format!("{error:#}"), 1_000));
    }
    Outcome::Trap(readable(error))
}

/// The reason and the names of the functions, innermost first. Names come from the plugin: control characters are escaped.
fn readable(error: &wasmtime::Error) -> String {
    const MAX: usize = 4 << 10;
    let mut text = error.root_cause().to_string();
    if let Some(trace) = error.downcast_ref::<WasmBacktrace>() {
        for (n, frame) in trace.frames().iter().enumerate() {
            text.push_str(if n == 0 { " at " } else { " < " });
            text.push_str(frame.func_name().map(demangled).as_deref().unwrap_or("?"));
        }
    }
    contract::printable(&text, MAX)
}

fn demangled(name: &str) -> String {
    let mut text = String::new();
    match demangle(&mut text, name) {
        Ok(()) => text,
        Err(fmt::Error) => name.to_owned(),
    }
}

/// Rust's names end in a hash that says nothing to an author.
fn demangle(out: &mut String, name: &str) -> fmt::Result {
    use fmt::Write;
    write!(out, "{:#}", rustc_demangle::demangle(name))
}

impl State {
    /// Checks what the guest returned and joins it with what it wrote.
    fn conclude(self, returned: Returned, request: &Request<'_>) -> Result<(Answer, Option<Box<PluginEffects>>), Outcome> {
        let limit = self.settings.limits.output;
        let mut state = self;
        let answer = match returned {
            Returned::Nothing => Answer::Nothing,
            Returned::Decision(decision) => {
                if contract::size_of_decision(&decision) > limit {
                    return Err(Outcome::OutputTooLarge);
                }
                Answer::Decision(contract::decision_in(decision).map_err(Outcome::Failure)?)
            }
            Returned::User(decision) => {
                if contract::size_of_decision(&decision) > limit {
                    return Err(Outcome::OutputTooLarge);
                }
                let first = matches!(request, Request::Authenticate { login, .. } if login.digest_response.is_none());
                Answer::User(contract::user_verdict_in(&decision, first).map_err(Outcome::Failure)?)
            }
            Returned::Token(token) => {
                if token.as_ref().map_or(0, Vec::len) > limit {
                    return Err(Outcome::OutputTooLarge);
                }
                Answer::Token(token.map(contract::token_in).transpose().map_err(Outcome::Failure)?)
            }
            Returned::ReturnToService(configuration) => {
                if configuration.as_ref().map_or(0, String::len) > limit {
                    return Err(Outcome::OutputTooLarge);
                }
                Answer::ReturnToService(configuration.as_deref().map(contract::configuration_in).transpose().map_err(Outcome::Failure)?)
            }
            Returned::Commands(commands) => {
                if contract::size_of_commands(&commands) > limit {
                    return Err(Outcome::OutputTooLarge);
                }
                let event = request.event();
                state.take_generated(commands, event).map_err(Outcome::Failure)?;
                Answer::Nothing
            }
        };
        let effects = state.into_effects();
        Ok((answer, effects.map(Box::new)))
    }
}
