//! Many devices at once, over a given number of connections: enrolling, working off commands, polling, leaving.
//!
//! Devices are divided among workers; a worker has one connection and lets its devices speak one after the other. What a phase
//! measures begins when everything that can be prepared has been.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use indicatif::ProgressBar;
use plist::{Dictionary, Value};
use tokio::task::JoinSet;
use tokio::time::Instant;
use wasmdm_protocol::enrollment::EnrollmentKind;

use crate::api::{ApiClient, IDS_PER_REQUEST};
use crate::apns::{FakeApns, WakeUps};
use crate::authority::{Authority, derive_uuid};
use crate::behaviour::Behaviour;
use crate::connection::{Connection, Target};
use crate::device::{Device, DeviceOptions, Prepared, Product, Proof, RetryPolicy, Session};
use crate::error::SimulatorError;
use crate::journal::JournalWriter;
use crate::measure::{Tally, own_cpu, process_cpu, thread_cpu};
use crate::message::command_document;
use crate::null_server::NullServer;
use crate::report::{PhaseReport, Report};

/// What commands are queued, in turn.
pub(crate) const REQUEST_TYPES: [&str; 5] = ["DeviceInformation", "SecurityInfo", "ProfileList", "CertificateList", "InstalledApplicationList"];

/// What is asked about a device.
const QUERIES: [&str; 9] =
    ["DeviceName", "OSVersion", "BuildVersion", "ModelName", "Model", "ProductName", "SerialNumber", "UDID", "AwaitingConfiguration"];

/// Which fleet.
#[derive(Debug, Clone)]
pub struct FleetOptions {
    /// How many devices.
    pub devices: u64,
    /// The number of the first one: fleets with the same authority and other numbers are other devices.
    pub first: u64,
    /// Connections that they share.
    pub connections: usize,
    /// The kind of every channel; `None` is device channels of Macs, iPhones and iPads in turn.
    pub kind: Option<EnrollmentKind>,
    /// How they prove who they are.
    pub proof: Proof,
    /// How they answer.
    pub behaviour: Behaviour,
    /// The beginning of their serial numbers.
    pub serial_prefix: Option<String>,
    /// What they say about waiting in the Setup Assistant.
    pub awaiting_configuration: Option<bool>,
    /// Distinguishes this run's commands from those of an earlier run with the same seed: a server takes the same command once.
    pub run: u64,
    /// Whether Macs escrow a bootstrap token after enrolling.
    pub escrow: bool,
    /// Whether requests are signed before the clock starts.
    pub measure: bool,
    /// How long a device tries again when no answer comes.
    pub patience: Duration,
    /// Whether 403 at Authenticate is what is wanted.
    pub expect_deny: bool,
    /// Where every message is written down.
    pub journal: Option<Arc<JournalWriter>>,
    /// The server's process, to read its CPU time.
    pub server_pid: Option<u32>,
    /// Devices do not come by themselves to work off their queue: this service wakes them.
    pub push: Option<Arc<FakeApns>>,
    /// How far it is.
    pub progress: ProgressBar,
}

impl Default for FleetOptions {
    fn default() -> Self {
        Self {
            devices: 1,
            first: 1,
            connections: 1,
            kind: None,
            proof: Proof::default(),
            behaviour: Behaviour::default(),
            serial_prefix: None,
            awaiting_configuration: None,
            run: 0,
            escrow: false,
            measure: false,
            patience: Duration::ZERO,
            expect_deny: false,
            journal: None,
            server_pid: None,
            push: None,
            progress: ProgressBar::hidden(),
        }
    }
}

/// How long devices poll.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Polling {
    /// So many polls of each device.
    Times(u64),
    /// Until this time has passed.
    For(Duration),
}

/// A fleet and what it has found out so far.
#[derive(Debug)]
pub struct Fleet {
    /// The devices in the order of their numbers.
    pub devices: Vec<Device>,
    /// Those that were denied.
    pub denied: HashSet<u64>,
    /// What was found out.
    pub report: Report,
    seed: u64,
    target: Target,
    options: FleetOptions,
    enqueues: u64,
    topic: String,
    /// What wakes each device, by its number.
    wake_ups: HashMap<u64, WakeUps>,
}

/// A worker's share: its devices and its connection.
struct Share {
    devices: Vec<Device>,
    connection: Connection,
    outcome: Outcome,
}

/// What a worker tells at the end.
#[derive(Default)]
struct Outcome {
    problems: Vec<String>,
    problem_count: u64,
    sessions: Vec<(u64, Session)>,
    denied: Vec<u64>,
    enrolled: u64,
    woken: u64,
}

/// Waits for a push that is the device's.
async fn woken(device: &Device, wake_ups: &mut WakeUps, within: Duration) -> Result<(), String> {
    let id = device.id();
    match tokio::time::timeout(within, wake_ups.next()).await {
        Ok(Some(wake_up)) if wake_up.magic.as_deref() == Some(device.push_magic.as_str()) => Ok(()),
        Ok(Some(_)) => Err(format!("{id} got a push with another magic than its own")),
        Ok(None) => Err(format!("{id} cannot be reached by the push service")),
        Err(_) => Err(format!("{id} was not woken within {} s", within.as_secs())),
    }
}

/// How long a device waits for its push at least.
const WAKE_PATIENCE: Duration = Duration::from_secs(10);

/// The most problems that one worker remembers in words.
const WORKER_PROBLEMS: usize = 20;

impl Outcome {
    fn problem(&mut self, text: impl std::fmt::Display) {
        self.problem_count += 1;
        if self.problems.len() < WORKER_PROBLEMS {
            self.problems.push(text.to_string());
        }
    }
}

impl Fleet {
    /// Makes the devices: their certificates are issued here.
    pub fn new(authority: &Authority, target: Target, options: FleetOptions) -> Result<Self, SimulatorError> {
        if options.devices == 0 || options.connections == 0 {
            return Err(SimulatorError::Argument { name: "devices, connections", problem: "at least one of each is needed".into() });
        }
        options.progress.set_length(options.devices);
        options.progress.set_message("making devices");
        let mut devices = Vec::new();
        for number in options.first..options.first.saturating_add(options.devices) {
            let product = match (options.kind, number % 3) {
                (None, 1) => Some(Product::Mac),
                (None, 2) => Some(Product::Iphone),
                (None, _) => Some(Product::Ipad),
                (Some(_), _) => None,
            };
            devices.push(Device::with_options(
                authority,
                number,
                DeviceOptions {
                    kind: options.kind,
                    product,
                    proof: options.proof.clone(),
                    // Which commands fail differs from device to device.
                    behaviour: Behaviour { seed: options.behaviour.seed ^ number.rotate_left(32), ..options.behaviour.clone() },
                    serial_prefix: options.serial_prefix.clone(),
                    awaiting_configuration: options.awaiting_configuration,
                    journal: options.journal.clone(),
                    retry: RetryPolicy { patience: options.patience },
                    ..DeviceOptions::default()
                },
            )?);
            options.progress.inc(1);
        }
        let connections = options.connections.min(devices.len());
        Ok(Self {
            report: Report { devices: devices.len() as u64, connections: connections as u64, ..Report::default() },
            devices,
            denied: HashSet::new(),
            seed: authority.seed(),
            target,
            options,
            enqueues: 0,
            topic: authority.topic().to_owned(),
            wake_ups: HashMap::new(),
        })
    }

    /// From now on the push service reaches the devices, if there is one.
    fn listen(&mut self) {
        let Some(push) = &self.options.push else { return };
        for device in &self.devices {
            self.wake_ups.entry(device.number).or_insert_with(|| push.subscribe(&device.token, &self.topic));
        }
    }

    /// Enrolls all devices. A device that is denied takes no part in what follows.
    pub async fn enroll(&mut self) -> Result<(), SimulatorError> {
        let mut prepared: HashMap<u64, Vec<Prepared>> = HashMap::new();
        if self.options.measure {
            self.begin("signing enrollments");
            for device in &mut self.devices {
                let messages = device.enrollment_messages()?.into_iter().map(|message| device.prepare(message)).collect::<Result<_, _>>()?;
                prepared.insert(device.number, messages);
                self.options.progress.inc(1);
            }
        }
        let prepared = Arc::new(prepared);
        let escrow = self.options.escrow;
        let expect_deny = self.options.expect_deny;
        let progress = self.options.progress.clone();
        self.begin("enrolling");
        let outcomes = self
            .phase("enroll", move |mut share| {
                let prepared = Arc::clone(&prepared);
                let progress = progress.clone();
                async move {
                    for device in &mut share.devices {
                        let enrolled = match prepared.get(&device.number) {
                            Some(messages) => device.enroll_prepared(&mut share.connection, messages).await,
                            None => device.enroll(&mut share.connection).await,
                        };
                        match enrolled {
                            Ok(()) => {
                                share.outcome.enrolled += 1;
                                if expect_deny {
                                    share.outcome.problem(format!("{} enrolled although it was to be denied", device.id()));
                                }
                                let escrows = escrow && device.product == Product::Mac && device.kind == EnrollmentKind::Device;
                                if escrows && let Err(error) = device.escrow_bootstrap_token(&mut share.connection).await {
                                    share.outcome.problem(error);
                                }
                            }
                            Err(SimulatorError::Refused { status: 403, .. }) if expect_deny => {
                                share.outcome.denied.push(device.number);
                            }
                            Err(error) => {
                                if matches!(&error, SimulatorError::Refused { status: 403, .. }) {
                                    share.outcome.denied.push(device.number);
                                }
                                share.outcome.problem(error);
                            }
                        }
                        progress.inc(1);
                    }
                    share
                }
            })
            .await?;
        for outcome in outcomes {
            self.report.enrolled += outcome.enrolled;
            self.denied.extend(outcome.denied);
        }
        self.report.denied = self.denied.len() as u64;
        Ok(())
    }

    /// Queues so many commands for each device that is not denied. The devices' behaviour decides how they will be answered.
    /// Answers the UUIDs by enrollment id, in the order of queueing.
    pub async fn enqueue(&mut self, api: &mut ApiClient, per_device: u64, push: bool) -> Result<BTreeMap<String, Vec<String>>, SimulatorError> {
        self.listen();
        let ids: Vec<String> = self.devices.iter().filter(|device| !self.denied.contains(&device.number)).map(Device::id).collect();
        self.begin("queueing commands");
        self.options.progress.set_length(per_device);
        let mut queued: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut documents: Vec<(Bytes, Vec<String>)> = Vec::new();
        for (_, request_type) in (0..per_device).zip(REQUEST_TYPES.into_iter().cycle()) {
            for chunk in ids.chunks(IDS_PER_REQUEST) {
                self.enqueues += 1;
                let uuid = derive_uuid(self.seed ^ self.options.run, "command", self.enqueues).hyphenated().to_string().to_uppercase();
                let document = command_document(&uuid, request_type, keys_of(request_type))?;
                let confirmed = self.enqueue_one(api, chunk, &uuid, &document, push).await?;
                for id in &confirmed {
                    queued.entry(id.clone()).or_default().push(uuid.clone());
                }
                self.report.commands_enqueued += confirmed.len() as u64;
                documents.push((document, confirmed));
            }
            self.options.progress.inc(1);
        }
        if self.options.measure {
            self.begin("signing answers");
            let mut by_id: HashMap<&str, Vec<&Bytes>> = HashMap::new();
            for (document, confirmed) in &documents {
                for id in confirmed {
                    by_id.entry(id).or_default().push(document);
                }
            }
            for device in &mut self.devices {
                for document in by_id.remove(device.id().as_str()).unwrap_or_default() {
                    device.prepare_acknowledgement(document)?;
                }
                self.options.progress.inc(1);
            }
        }
        Ok(queued)
    }

    /// Queues one command; answers the ids that were confirmed.
    async fn enqueue_one(
        &mut self,
        api: &mut ApiClient,
        ids: &[String],
        uuid: &str,
        document: &Bytes,
        push: bool,
    ) -> Result<Vec<String>, SimulatorError> {
        let mut numbers = Vec::new();
        if let Some(journal) = &self.options.journal {
            for id in ids {
                numbers.push(journal.record_enqueue(id, uuid, document)?);
            }
        }
        let names: Vec<&str> = ids.iter().map(String::as_str).collect();
        let begin = Instant::now();
        let answer = loop {
            match api.enqueue(&names, document.clone(), push).await {
                // The same UUID with the same bytes is the same command: it may be said again.
                Err(error) if error.is_transport() && begin.elapsed() < self.options.patience => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                other => break other?,
            }
        };
        let mut confirmed = Vec::new();
        for (index, id) in ids.iter().enumerate() {
            if let Some(error) = answer.command_error(id) {
                self.report.problem(format!("queueing {uuid} for {id}: {error}"));
                continue;
            }
            if let (Some(journal), Some(number)) = (&self.options.journal, numbers.get(index)) {
                journal.record_enqueued(*number, id, uuid)?;
            }
            confirmed.push(id.clone());
        }
        Ok(confirmed)
    }

    /// Lets every device work off its queue, and checks what it saw against what was queued: nothing missing, first deliveries in the
    /// order of queueing, nothing again after its result was confirmed.
    pub async fn work_off(&mut self, queued: &BTreeMap<String, Vec<String>>) -> Result<(), SimulatorError> {
        self.prepare_idle()?;
        let most = queued.values().map(Vec::len).max().unwrap_or_default();
        let sessions = most + usize::try_from(self.options.behaviour.not_now_first).unwrap_or_default() + 10;
        let progress = self.options.progress.clone();
        let denied = self.denied.clone();
        let wake_ups = Arc::new(parking_lot::Mutex::new(std::mem::take(&mut self.wake_ups)));
        let within = self.options.patience.max(WAKE_PATIENCE);
        self.begin("answering commands");
        let outcomes = self
            .phase("commands", move |mut share| {
                let progress = progress.clone();
                let denied = denied.clone();
                let wake_ups = Arc::clone(&wake_ups);
                async move {
                    for device in &mut share.devices {
                        if !denied.contains(&device.number) {
                            let waking = wake_ups.lock().remove(&device.number);
                            if let Some(mut waking) = waking {
                                match woken(device, &mut waking, within).await {
                                    Ok(()) => share.outcome.woken += 1,
                                    Err(problem) => {
                                        share.outcome.problem(problem);
                                        progress.inc(1);
                                        continue;
                                    }
                                }
                            }
                            match device.poll_until_done(&mut share.connection, sessions).await {
                                Ok(sessions) => {
                                    let number = device.number;
                                    share.outcome.sessions.extend(sessions.into_iter().map(|one| (number, one)));
                                }
                                Err(error) => share.outcome.problem(error),
                            }
                        }
                        progress.inc(1);
                    }
                    share
                }
            })
            .await?;
        let mut finals: HashMap<u64, BTreeMap<String, Vec<String>>> = HashMap::new();
        for outcome in outcomes {
            self.report.woken += outcome.woken;
            for (number, session) in outcome.sessions {
                for command in session.commands {
                    let Some(status) = command.status else {
                        *self.report.reports.entry("silence".into()).or_default() += 1;
                        continue;
                    };
                    *self.report.reports.entry(status.clone()).or_default() += 1;
                    if status != "NotNow" {
                        finals.entry(number).or_default().entry(command.uuid).or_default().push(status);
                    }
                }
            }
        }
        self.compare(queued, &finals);
        Ok(())
    }

    fn compare(&mut self, queued: &BTreeMap<String, Vec<String>>, finals: &HashMap<u64, BTreeMap<String, Vec<String>>>) {
        let mut problems = Vec::new();
        let mut redelivered = 0;
        for device in &self.devices {
            let id = device.id();
            let empty = BTreeMap::new();
            let results = finals.get(&device.number).unwrap_or(&empty);
            for (uuid, statuses) in results {
                let again = statuses.len() as u64 - 1;
                redelivered += again;
                // Where an answer was lost, the device may be asked again.
                if again > 0 && device.transport_errors == 0 {
                    problems.push(format!("{id}: {uuid} came again after its result"));
                }
            }
            let Some(expected) = queued.get(&id) else {
                continue;
            };
            let wanted: HashSet<&str> = expected.iter().map(String::as_str).collect();
            let order: Vec<&str> = device.received.iter().map(String::as_str).filter(|uuid| wanted.contains(uuid)).collect();
            if order.len() < expected.len() {
                problems.push(format!("{id}: {} of {} commands never came", expected.len() - order.len(), expected.len()));
            } else if order != *expected {
                problems.push(format!("{id}: commands came in another order"));
            }
        }
        self.report.redelivered += redelivered;
        for problem in problems {
            self.report.problem(problem);
        }
    }

    /// Lets every device poll, again and again. With a rate the polls are due at fixed moments and their latency counts from then;
    /// without one each worker polls as fast as it is answered.
    pub async fn poll(&mut self, polling: Polling, per_second: Option<u32>) -> Result<(), SimulatorError> {
        self.prepare_idle()?;
        let workers = self.options.connections.min(self.devices.len());
        let denied = self.denied.clone();
        let progress = self.options.progress.clone();
        self.begin("polling");
        let active = self.devices.len() as u64 - self.denied.len() as u64;
        match polling {
            Polling::Times(times) => progress.set_length(times.saturating_mul(active)),
            Polling::For(_) => progress.set_length(0),
        }
        let turns = Arc::new(std::sync::atomic::AtomicU64::new(0));
        let begin = Instant::now();
        let outcomes = self
            .phase("polls", move |mut share| {
                let progress = progress.clone();
                let denied = denied.clone();
                let turns = Arc::clone(&turns);
                async move {
                    share.devices.sort_by_key(|device| denied.contains(&device.number));
                    let active = share.devices.iter().take_while(|device| !denied.contains(&device.number)).count();
                    let mut done: u64 = 0;
                    'polling: loop {
                        if active == 0 {
                            break;
                        }
                        for device in share.devices.iter_mut().take(active) {
                            if let Polling::For(duration) = polling
                                && begin.elapsed() >= duration
                            {
                                break 'polling;
                            }
                            if let Some(rate) = per_second {
                                let turn = turns.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                                let due = begin + due_after(turn, rate);
                                if let Polling::For(duration) = polling
                                    && due.duration_since(begin) >= duration
                                {
                                    break 'polling;
                                }
                                tokio::time::sleep_until(due).await;
                                share.connection.due(due);
                            }
                            if let Err(error) = device.poll_until_idle(&mut share.connection).await {
                                share.outcome.problem(error);
                            }
                            progress.inc(1);
                        }
                        done += 1;
                        if polling == Polling::Times(done) {
                            break;
                        }
                    }
                    share
                }
            })
            .await?;
        debug_assert!(outcomes.len() <= workers);
        Ok(())
    }

    /// All devices leave.
    pub async fn check_out(&mut self) -> Result<(), SimulatorError> {
        let denied = self.denied.clone();
        let progress = self.options.progress.clone();
        self.begin("leaving");
        self.phase("check-out", move |mut share| {
            let denied = denied.clone();
            let progress = progress.clone();
            async move {
                for device in &mut share.devices {
                    if !denied.contains(&device.number)
                        && let Err(error) = device.leave(&mut share.connection).await
                    {
                        share.outcome.problem(error);
                    }
                    progress.inc(1);
                }
                share
            }
        })
        .await
        .map(|_| ())
    }

    /// Polls a server that does nothing, for as long: what this machine and this program can do at most.
    pub async fn measure_ceiling(&mut self, duration: Duration) -> Result<(), SimulatorError> {
        let server = NullServer::start()?;
        let real = std::mem::replace(&mut self.target, Target::parse(&server.url())?);
        let journal = self.options.journal.take();
        let server_pid = self.options.server_pid.take();
        let denied = std::mem::take(&mut self.denied);
        for device in &mut self.devices {
            device.set_journal(None);
        }

        let server_before = thread_cpu(server.thread_id());
        let polled = self.poll(Polling::For(duration), None).await;
        let server_cpu = server_before.zip(thread_cpu(server.thread_id())).map(|(before, after)| after.saturating_sub(before));

        for device in &mut self.devices {
            device.set_journal(journal.clone());
        }
        self.denied = denied;
        self.options.server_pid = server_pid;
        self.options.journal = journal;
        self.target = real;
        polled?;
        if let Some(mut phase) = self.report.phases.pop() {
            phase.name = "ceiling".into();
            // The server ran in this process: its share is its own.
            if let Some(cpu) = server_cpu {
                let micros = PhaseReport::new("", &Tally::default(), cpu, cpu, None).seconds * 1e6;
                let requests = phase.requests.max(1);
                #[expect(clippy::cast_precision_loss, reason = "counts stay below 2^52")]
                let per_request = micros / requests as f64;
                phase.own_cpu_us = (phase.own_cpu_us - per_request).max(0.0);
                phase.server_cpu_us = Some(per_request);
            }
            self.report.ceiling = Some(phase);
        }
        Ok(())
    }

    fn prepare_idle(&mut self) -> Result<(), SimulatorError> {
        if !self.options.measure {
            return Ok(());
        }
        self.begin("signing polls");
        for device in &mut self.devices {
            device.prepare_idle()?;
            self.options.progress.inc(1);
        }
        Ok(())
    }

    fn begin(&self, what: &'static str) {
        let progress = &self.options.progress;
        progress.set_message(what);
        progress.set_length(self.devices.len() as u64);
        progress.set_position(0);
    }

    /// Runs one phase on all workers and measures it.
    async fn phase<W, F>(&mut self, name: &str, work: W) -> Result<Vec<Outcome>, SimulatorError>
    where
        W: Fn(Share) -> F,
        F: Future<Output = Share> + Send + 'static,
    {
        let workers = self.options.connections.min(self.devices.len()).max(1);
        let mut shares: Vec<Share> = (0..workers)
            .map(|_| {
                let mut connection = Connection::new(self.target.clone());
                connection.measure();
                Share { devices: Vec::new(), connection, outcome: Outcome::default() }
            })
            .collect();
        for (index, device) in std::mem::take(&mut self.devices).into_iter().enumerate() {
            if let Some(share) = shares.get_mut(index % workers) {
                share.devices.push(device);
            }
        }

        let server_before = self.options.server_pid.and_then(process_cpu);
        let cpu_before = own_cpu();
        let begin = Instant::now();
        let mut tasks = JoinSet::new();
        for share in shares {
            tasks.spawn(work(share));
        }
        let mut tally = Tally::default();
        let mut outcomes = Vec::new();
        let mut lost = false;
        while let Some(finished) = tasks.join_next().await {
            let Ok(mut share) = finished else {
                lost = true;
                continue;
            };
            tally.merge(&share.connection.measure());
            self.devices.append(&mut share.devices);
            outcomes.push(share.outcome);
        }
        let elapsed = begin.elapsed();
        let own = own_cpu().saturating_sub(cpu_before);
        let server = server_before.zip(self.options.server_pid.and_then(process_cpu)).map(|(before, after)| after.saturating_sub(before));
        self.devices.sort_by_key(|device| device.number);
        if lost {
            self.report.problem(format!("{name}: a worker ended with a panic"));
        }
        for outcome in &mut outcomes {
            let told = outcome.problems.len() as u64;
            for problem in outcome.problems.drain(..) {
                self.report.problem(problem);
            }
            self.report.problem_count += outcome.problem_count - told;
        }
        self.report.phases.push(PhaseReport::new(name, &tally, elapsed, own, server));
        Ok(outcomes)
    }
}

/// When a turn is due.
fn due_after(turn: u64, per_second: u32) -> Duration {
    let rate = u64::from(per_second.max(1));
    Duration::from_secs(turn / rate) + Duration::from_nanos((turn % rate) * 1_000_000_000 / rate)
}

/// What stands beside the `RequestType` of such a command.
pub(crate) fn keys_of(request_type: &str) -> Dictionary {
    let mut keys = Dictionary::new();
    if request_type == "DeviceInformation" {
        keys.insert("Queries".into(), Value::Array(QUERIES.iter().map(|query| (*query).into()).collect()));
    }
    keys
}
