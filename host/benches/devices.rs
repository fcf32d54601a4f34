//! What a device request costs, row by row of the targets. Servers run as processes of their own, so that their CPU time is their own. What
//! is compared is measured alternately, in slices of a fraction of a second, because machines differ and are shared: a neighbour that
//! wakes up disturbs both sides of a pair. docs/performance.md says how to read it.
//!
//! `cargo bench -p wasmdm --bench devices -- --row idle-signature --against OTHER_WASMDM`

#![expect(
    clippy::print_stdout,
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a program for people, which ends at the first thing that is wrong"
)]

#[path = "../tests/it/process.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
mod process;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::{Parser, ValueEnum};
use http::{HeaderMap, Method, Uri};
use plist::Dictionary;
use process::{API_KEY, Home, ServerProcess};
use tokio::task::JoinSet;
use wasmdm::bundled::{BundledPlugin, CHAT_NOTIFY, ENROLLMENT_BASELINE, SERIAL_ALLOW_LIST};
use wasmdm_protocol::mdm_signature;
use wasmdm_simulator::apns::{FakeApns, FakeApnsOptions, PushCertificateRequest};
use wasmdm_simulator::device::Prepared;
use wasmdm_simulator::fleet::{FleetOptions, Polling};
use wasmdm_simulator::measure::{Estimate, Tally, ThreadTimes, own_thread_cpu};
use wasmdm_simulator::message::{ReceivedCommand, command_document};
use wasmdm_simulator::{ApiClient, Authority, Connection, Device, DeviceOptions, Fleet, KeyType, Proof, Target};

/// Interleaved measurements of what devices cost a server.
#[derive(Debug, Parser)]
struct Arguments {
    /// Only these rows (repeatable)
    #[arg(long, value_enum)]
    row: Vec<Row>,
    /// Another wasmdm, whose slices alternate with those of this one
    #[arg(long, value_name = "PATH")]
    against: Option<PathBuf>,
    /// Pairs of slices in a row
    #[arg(long, default_value_t = 40)]
    pairs: usize,
    /// Length of a slice in milliseconds, about
    #[arg(long, default_value_t = 150)]
    slice: u64,
    /// Enrolled devices
    #[arg(long, default_value_t = 2000)]
    devices: usize,
    /// Connections
    #[arg(long, default_value_t = 32)]
    connections: usize,
    /// Seconds of polls at 500 a second
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Enrolled devices of the row `memory`
    #[arg(long, default_value_t = 10_000)]
    memory_devices: u64,
    /// Finished commands of each device in the rows `history-…`
    #[arg(long, default_value_t = 1000)]
    finished: u64,
    /// Enrollments of the larger database in the row `scale`; the smaller has a hundredth
    #[arg(long, default_value_t = 100_000)]
    enrollments: u64,
    /// What cargo adds
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Row {
    /// An Idle poll with nothing pending, signed
    IdleSignature,
    /// The same, with the certificate in a header
    IdleHeader,
    /// Idle, a command, its acknowledgement, signed
    CommandsSignature,
    /// The same, with the certificate in a header
    CommandsHeader,
    /// Authenticate and TokenUpdate, signed
    EnrollmentSignature,
    /// The same, with the certificate in a header
    EnrollmentHeader,
    /// Latency of Idle polls at 500 a second
    Paced,
    /// Authenticate with serial-allow-list of 1,000 serial numbers, against without
    AllowList,
    /// Resident memory with many enrolled devices, three plugins and no connection
    Memory,
    /// An Idle poll of devices with many finished commands, against none
    HistoryIdle,
    /// A poll that fetches a command, and its answer, of devices with many finished commands, against none
    HistoryCommands,
    /// An enrollment beside many others, against a hundredth
    Scale,
    /// Pushes through the API, 1,000 ids a call, to a push service without latency and to one of 30 ms
    Pushes,
}

/// How a row's servers are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Idle,
    Commands,
    Enrollment,
    Authenticate,
}

/// Messages that follow each other on one connection.
type Job = Vec<Prepared>;

fn main() {
    let mut arguments = Arguments::parse();
    if arguments.row.is_empty() {
        arguments.row = Row::value_variants().to_vec();
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    println!(
        "{} pairs of slices of {} ms, {} connections, {} devices, RSA-2048, SQLite with synchronous=FULL; requests signed beforehand",
        arguments.pairs, arguments.slice, arguments.connections, arguments.devices
    );
    println!("CPU is the server's, in µs a request: the median, and between which bounds the true one lies in 95 of 100 cases\n");
    let mut missed = 0;
    for row in arguments.row.clone() {
        let begin = Instant::now();
        println!("{}", row.to_possible_value().unwrap().get_name());
        missed += runtime.block_on(run(row, &arguments));
        println!("  ({:.0} s)\n", begin.elapsed().as_secs_f64());
    }
    println!("{missed} targets missed");
}

/// Answers how many targets were missed.
async fn run(row: Row, arguments: &Arguments) -> usize {
    match row {
        Row::IdleSignature => cost(arguments, Asked::Idle, false, Some(30.0), None, 4911.0).await,
        Row::IdleHeader => cost(arguments, Asked::Idle, true, Some(25.0), None, 8199.0).await,
        Row::CommandsSignature => cost(arguments, Asked::Commands, false, None, Some(150.0), 1912.0).await,
        Row::CommandsHeader => cost(arguments, Asked::Commands, true, None, Some(150.0), 2394.0).await,
        Row::EnrollmentSignature => cost(arguments, Asked::Enrollment, false, None, Some(250.0), 1073.0).await,
        Row::EnrollmentHeader => cost(arguments, Asked::Enrollment, true, None, Some(250.0), 2258.0).await,
        Row::Paced => paced(arguments).await,
        Row::AllowList => allow_list(arguments).await,
        Row::Memory => memory(arguments).await,
        Row::HistoryIdle => history(arguments, Asked::Idle).await,
        Row::HistoryCommands => history(arguments, Asked::Commands).await,
        Row::Scale => scale(arguments).await,
        Row::Pushes => {
            pushes(arguments, Duration::ZERO, 8_000.0, 8_000.0).await + pushes(arguments, Duration::from_millis(30), 157.0, 10_000.0).await
        }
    }
}

// --- servers ---

/// A server, and the connections over which it is asked.
struct Stage {
    server: ServerProcess,
    home: Home,
    target: Target,
    connections: Vec<Connection>,
    api: ApiClient,
}

impl Stage {
    fn open(home: Home, connections: usize) -> Self {
        let server = home.start();
        let target = Target::parse(&server.url()).expect("a URL");
        let api = ApiClient::new(&server.url(), API_KEY).expect("a client");
        let connections = (0..connections).map(|_| Connection::new(target.clone())).collect();
        Self { server, home, target, connections, api }
    }

    /// The same database and devices in a new process, after something was done to the file.
    async fn reopened<F: Future<Output = ()>>(self, change: impl FnOnce(PathBuf) -> F) -> Self {
        let Self { server, home, connections, .. } = self;
        server.terminate();
        assert!(server.wait(), "it ends in order");
        change(home.data().join("wasmdm.sqlite")).await;
        Self::open(home, connections.len())
    }

    fn cpu(&self) -> ThreadTimes {
        ThreadTimes::of(self.server.pid())
    }

    /// Does all jobs, each on one of the connections.
    async fn work(&mut self, jobs: &Arc<Vec<Job>>) -> Slice {
        let path = self.target.path(false).clone();
        self.ask(jobs, move |connection, prepared| (Method::PUT, path_of(connection, prepared, &path))).await
    }

    /// Sends the same bytes to a route that does nothing.
    async fn work_on_null_route(&mut self, jobs: &Arc<Vec<Job>>) -> Slice {
        let path = Uri::from_static("/healthz");
        self.ask(jobs, move |_, _| (Method::GET, path.clone())).await
    }

    async fn ask(&mut self, jobs: &Arc<Vec<Job>>, to: impl Fn(&Connection, &Prepared) -> (Method, Uri) + Clone + Send + 'static) -> Slice {
        let next = Arc::new(AtomicUsize::new(0));
        let mut tasks = JoinSet::new();
        let begin = Instant::now();
        for mut connection in self.connections.drain(..) {
            let (jobs, next, to) = (Arc::clone(jobs), Arc::clone(&next), to.clone());
            tasks.spawn(async move {
                connection.measure();
                let mut bodies = 0;
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    for prepared in job {
                        let (method, path) = to(&connection, prepared);
                        let (headers, body) = (prepared.headers.clone(), prepared.message.body.clone());
                        let answer = connection.request(method, path, headers, body).await.expect("an answer");
                        assert_eq!(answer.status, http::StatusCode::OK, "{}", answer.excerpt());
                        bodies += usize::from(!answer.body.is_empty());
                    }
                }
                let tally = connection.measure();
                (connection, tally, bodies)
            });
        }
        let mut slice = Slice::default();
        while let Some(done) = tasks.join_next().await {
            let (connection, tally, bodies) = done.expect("a worker");
            self.connections.push(connection);
            slice.tally.merge(&tally);
            slice.bodies += bodies;
        }
        slice.elapsed = begin.elapsed();
        slice
    }
}

fn path_of(connection: &Connection, prepared: &Prepared, reports: &Uri) -> Uri {
    if prepared.message.is_check_in() { connection.target().path(true).clone() } else { reports.clone() }
}

/// What one slice saw.
#[derive(Default)]
struct Slice {
    tally: Tally,
    elapsed: Duration,
    /// Answers that were not empty.
    bodies: usize,
}

fn home(authority: &Authority, header: bool) -> Home {
    let home = Home::new(&authority.root_pem());
    if header { home.with(&["--cert-header", "Client-Cert", "--trusted-proxy", "127.0.0.1"]) } else { home }
}

fn proof(header: bool) -> Proof {
    if header { Proof::CertificateHeader("client-cert".parse().expect("a header name")) } else { Proof::default() }
}

fn authority() -> Authority {
    Authority::with_keys(1, KeyType::Rsa2048, 4).expect("keys")
}

fn install(home: &Home, plugin: &BundledPlugin, grant: &str) {
    std::fs::write(home.grants().join(format!("{}.toml", plugin.name)), grant).expect("a grant file");
    process::install(&home.plugins(), plugin.name, plugin.manifest, plugin.component);
}

fn allow_list_grant(devices: u64) -> String {
    let serials = (0..=devices).map(|number| format!("\"BENCH{number:07}\"")).collect::<Vec<_>>().join(",");
    // Patient limits: a decision that a loaded machine makes late is a 503, which is right, and not what is measured.
    format!("enabled = true\n[limits]\ndecision = \"10s\"\ncpu = \"2s\"\n[config]\nserial_numbers = [{serials}]\n")
}

/// Until the server says that devices can be served, with all its plugins.
async fn ready(server: &ServerProcess) {
    let mut connection = Connection::to(&server.url()).expect("a URL");
    for _ in 0..1200 {
        let answer = connection.request(Method::GET, Uri::from_static("/readyz"), HeaderMap::new(), Bytes::new()).await;
        if answer.is_ok_and(|answer| answer.status == http::StatusCode::OK) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("the server did not become ready: {:#?}", server.log());
}

// --- devices ---

/// The devices that ask, and what they ask next. The same messages go to both sides of a pair.
struct Devices<'a> {
    authority: &'a Authority,
    header: bool,
    asked: Asked,
    enrolled: Vec<Device>,
    idle: Vec<Job>,
    next: usize,
    made: u64,
    commands: u64,
}

impl<'a> Devices<'a> {
    fn new(authority: &'a Authority, header: bool, asked: Asked) -> Self {
        Self { authority, header, asked, enrolled: Vec::new(), idle: Vec::new(), next: 0, made: 0, commands: 0 }
    }

    fn make(&mut self) -> Device {
        self.made += 1;
        let options = DeviceOptions { proof: proof(self.header), serial_prefix: Some("BENCH".to_owned()), ..DeviceOptions::default() };
        Device::with_options(self.authority, self.made, options).expect("a device")
    }

    fn enrollment(device: &mut Device) -> Job {
        let messages = device.enrollment_messages().expect("messages");
        messages.into_iter().map(|message| device.prepare(message).expect("a signature")).collect()
    }

    /// Enrolls so many with all of these servers.
    async fn enroll(&mut self, count: usize, stages: &mut [&mut Stage]) {
        let mut jobs = Vec::new();
        for _ in 0..count {
            let mut device = self.make();
            jobs.push(Self::enrollment(&mut device));
            let idle = device.idle().expect("a message");
            self.idle.push(vec![device.prepare(idle).expect("a signature")]);
            self.enrolled.push(device);
        }
        let jobs = Arc::new(jobs);
        for stage in stages {
            stage.work(&jobs).await;
        }
    }

    /// The next `count` jobs, for which all servers are made ready.
    async fn jobs(&mut self, count: usize, stages: &mut [&mut Stage]) -> Arc<Vec<Job>> {
        if self.asked == Asked::Enrollment {
            return Arc::new((0..count).map(|_| Self::enrollment(&mut self.make())).collect());
        }
        let chosen: Vec<usize> = (0..count.min(self.enrolled.len())).map(|place| (self.next + place) % self.enrolled.len()).collect();
        self.next = (self.next + chosen.len()) % self.enrolled.len();
        if self.asked == Asked::Commands {
            return Arc::new(self.commands(&chosen, stages).await);
        }
        let asked = self.asked;
        let job = |device: usize| match asked {
            Asked::Authenticate => {
                let device = self.enrolled.get_mut(device).expect("a device");
                let message = device.authenticate().expect("a message");
                vec![device.prepare(message).expect("a signature")]
            }
            _ => self.idle.get(device).expect("a device").clone(),
        };
        Arc::new(chosen.into_iter().map(job).collect())
    }

    /// Queues a command for each with all servers; answers the polls that fetch them, with the acknowledgements.
    async fn commands(&mut self, chosen: &[usize], stages: &mut [&mut Stage]) -> Vec<Job> {
        let mut jobs = Vec::new();
        for chunk in chosen.chunks(50) {
            self.commands += 1;
            let uuid = format!("BENCH-{:012}", self.commands);
            let document = command_document(&uuid, "SecurityInfo", Dictionary::new()).expect("a command");
            let ids: Vec<String> = chunk.iter().filter_map(|device| self.enrolled.get(*device)).map(Device::id).collect();
            let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
            for stage in stages.iter_mut() {
                let answer = stage.api.enqueue(&ids, document.clone(), false).await.expect("an answer");
                assert!(answer.status.is_success(), "{answer:?}");
            }
            let command = ReceivedCommand::parse(&document).expect("a command");
            for place in chunk {
                let device = self.enrolled.get_mut(*place).expect("a device");
                let message = device.acknowledgement(&command).expect("a message");
                let acknowledgement = device.prepare(message).expect("a signature");
                let idle = self.idle.get(*place).and_then(|job| job.first()).expect("a poll").clone();
                jobs.push(vec![idle, acknowledgement]);
            }
        }
        jobs
    }
}

// --- pairs ---

/// What was measured in one round, in µs a request.
struct Round {
    /// The server's CPU, also for what it does afterwards.
    this: f64,
    other: Option<f64>,
    null_route: f64,
    verification: f64,
}

/// All rounds of a row.
struct Measured {
    rounds: Vec<Round>,
    tally: Tally,
    jobs: usize,
    elapsed: Duration,
}

impl Measured {
    fn estimate(&self, of: impl Fn(&Round) -> f64) -> Estimate {
        Estimate::of(&self.rounds.iter().map(of).collect::<Vec<_>>())
    }

    fn ratio(&self) -> Estimate {
        self.estimate(|round| round.this / round.other.unwrap_or(f64::NAN))
    }
}

/// Asks `this` and `other` alternately, and in between the route that does nothing.
async fn measure(arguments: &Arguments, devices: &mut Devices<'_>, this: &mut Stage, mut other: Option<&mut Stage>) -> Measured {
    // How many jobs a slice has follows from a first one, which also warms everything up.
    let first = prepared(devices, 64, this, &mut other).await;
    let begin = this.work(&first).await.elapsed;
    if let Some(other) = &mut other {
        other.work(&first).await;
    }
    let per_job = begin.as_secs_f64() / count(first.len());
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small positive number")]
    let jobs = ((count(usize::try_from(arguments.slice).unwrap()) / 1000.0 / per_job) as usize).max(32);

    let mut measured = Measured { rounds: Vec::new(), tally: Tally::default(), jobs: 0, elapsed: Duration::ZERO };
    for pair in 0..arguments.pairs {
        let slice = prepared(devices, jobs, this, &mut other).await;
        let (this_before, other_before) = (this.cpu(), other.as_ref().map(|other| other.cpu()));
        // Who goes first changes, so that neither always follows the other.
        if let Some(other) = other.as_mut().filter(|_| pair % 2 == 1) {
            other.work(&slice).await;
        }
        let done = this.work(&slice).await;
        if let Some(other) = other.as_mut().filter(|_| pair % 2 == 0) {
            other.work(&slice).await;
        }
        let requests = count(usize::try_from(done.tally.requests()).unwrap());
        let used = |stage: &Stage, before: &ThreadTimes| micros(stage.cpu().since(before)) / requests;
        let (this_cost, other_cost) =
            (used(this, &this_before), other.as_ref().zip(other_before.as_ref()).map(|(other, before)| used(other, before)));
        if devices.asked == Asked::Commands {
            assert_eq!(done.bodies, slice.len(), "every poll brings a command");
        }
        let null_before = this.cpu();
        let null = this.work_on_null_route(&slice).await;
        let null_route = micros(this.cpu().since(&null_before)) / count(usize::try_from(null.tally.requests()).unwrap());
        measured.rounds.push(Round { this: this_cost, other: other_cost, null_route, verification: verification(&slice) });
        measured.tally.merge(&done.tally);
        measured.jobs += slice.len();
        measured.elapsed += done.elapsed;
    }
    measured
}

async fn prepared(devices: &mut Devices<'_>, count: usize, this: &mut Stage, other: &mut Option<&mut Stage>) -> Arc<Vec<Job>> {
    match other {
        Some(other) => devices.jobs(count, &mut [this, other]).await,
        None => devices.jobs(count, &mut [this]).await,
    }
}

/// What verifying one signature of these messages costs; zero where there is none.
fn verification(jobs: &[Job]) -> f64 {
    let signed: Vec<(&[u8], &[u8])> = jobs
        .iter()
        .flatten()
        .take(100)
        .filter_map(|prepared| Some((prepared.headers.get("mdm-signature")?.as_bytes(), &*prepared.message.body)))
        .collect();
    if signed.is_empty() {
        return 0.0;
    }
    let begin = own_thread_cpu();
    for (header, body) in &signed {
        mdm_signature::verify(header, body).expect("a signature that verifies");
    }
    micros(own_thread_cpu().saturating_sub(begin)) / count(signed.len())
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

#[expect(clippy::cast_precision_loss, reason = "counts stay below 2^52")]
fn count(number: usize) -> f64 {
    number as f64
}

fn milliseconds(tally: &Tally, per_mille: u64) -> f64 {
    tally.latencies.quantile(per_mille).as_secs_f64() * 1e3
}

/// Prints a target; answers one if it was missed.
fn target(what: &str, value: f64, limit: f64, at_most: bool) -> usize {
    let met = if at_most { value <= limit } else { value >= limit };
    let sign = if at_most { "≤" } else { "≥" };
    println!("  target: {what} {sign} {limit}: {} ({value:.2})", if met { "met" } else { "not met" });
    usize::from(!met)
}

// --- rows ---

/// A message's cost beside the null route and a verification, and how many there are in a second.
async fn cost(arguments: &Arguments, asked: Asked, header: bool, above: Option<f64>, at_most: Option<f64>, jobs_per_second: f64) -> usize {
    let authority = authority();
    let mut this = Stage::open(home(&authority, header), arguments.connections);
    let mut other = arguments.against.as_ref().map(|program| {
        let mut home = home(&authority, header);
        home.program.clone_from(program);
        Stage::open(home, arguments.connections)
    });
    let mut devices = Devices::new(&authority, header, asked);
    if asked != Asked::Enrollment {
        let mut stages: Vec<&mut Stage> = std::iter::once(&mut this).chain(&mut other).collect();
        devices.enroll(arguments.devices, &mut stages).await;
    }
    let measured = measure(arguments, &mut devices, &mut this, other.as_mut()).await;
    let cost = measured.estimate(|round| round.this);
    println!(
        "  server {cost}, null route (N) {}, verification (V) {}",
        measured.estimate(|round| round.null_route),
        measured.estimate(|round| round.verification)
    );
    let excess = measured.estimate(|round| round.this - round.null_route - round.verification);
    println!("  server - N - V {excess}");
    let rate = count(measured.jobs) / measured.elapsed.as_secs_f64();
    let (p50, p99) = (milliseconds(&measured.tally, 500), milliseconds(&measured.tally, 990));
    println!("  {rate:.0} {} a second, p50 {p50:.2} ms, p99 {p99:.2} ms", what(asked));
    if other.is_some() {
        println!("  the other {}, this / other {:.3}", measured.estimate(|round| round.other.unwrap_or_default()), measured.ratio());
    }
    let mut missed = 0;
    if let Some(limit) = above {
        missed += target("server - N - V", excess.median, limit, true) + target("p99 in ms", p99, 16.0, true);
    }
    if let Some(limit) = at_most {
        missed += target("server", cost.median, limit, true);
    }
    missed + target(&format!("{} a second", what(asked)), rate, jobs_per_second, false)
}

const fn what(asked: Asked) -> &'static str {
    match asked {
        Asked::Idle => "polls",
        Asked::Commands => "commands",
        Asked::Enrollment => "enrollments",
        Asked::Authenticate => "Authenticates",
    }
}

/// Polls that are due at fixed moments: their latency counts from then.
async fn paced(arguments: &Arguments) -> usize {
    let authority = authority();
    let home = home(&authority, false);
    let server = home.start();
    let options = FleetOptions {
        devices: arguments.devices as u64,
        connections: arguments.connections,
        measure: true,
        server_pid: Some(server.pid()),
        ..FleetOptions::default()
    };
    let mut fleet = Fleet::new(&authority, Target::parse(&server.url()).expect("a URL"), options).expect("devices");
    fleet.enroll().await.expect("enrolled");
    fleet.poll(Polling::For(Duration::from_secs(arguments.seconds)), Some(500)).await.expect("polled");
    assert!(fleet.report.is_success(), "{}", fleet.report.to_text());
    let polls = fleet.report.phase("polls").expect("polls");
    println!(
        "  {:.0} polls a second, p50 {:.2} ms, p99 {:.2} ms, longest {:.2} ms, server {:.1} µs",
        polls.requests_per_second,
        polls.latency_ms.p50,
        polls.latency_ms.p99,
        polls.latency_ms.max,
        polls.server_cpu_us.unwrap_or_default()
    );
    target("p99 in ms", polls.latency_ms.p99, 3.0, true)
}

async fn allow_list(arguments: &Arguments) -> usize {
    let authority = authority();
    let with = home(&authority, false);
    install(&with, &SERIAL_ALLOW_LIST, &allow_list_grant(1000));
    let mut with = Stage::open(with, arguments.connections);
    ready(&with.server).await;
    let mut without = Stage::open(home(&authority, false), arguments.connections);
    let mut devices = Devices::new(&authority, false, Asked::Authenticate);
    // Those that the list names.
    devices.enroll(arguments.devices.min(1000), &mut [&mut with, &mut without]).await;
    let measured = measure(arguments, &mut devices, &mut with, Some(&mut without)).await;
    println!("  with {}, without {}", measured.estimate(|round| round.this), measured.estimate(|round| round.other.unwrap_or_default()));
    let difference = measured.estimate(|round| round.this - round.other.unwrap_or_default());
    println!("  the plugin adds {difference}");
    target("µs that the plugin adds", difference.median, 40.0, true)
}

async fn memory(arguments: &Arguments) -> usize {
    let authority = authority();
    let home = home(&authority, true);
    install(&home, &SERIAL_ALLOW_LIST, &allow_list_grant(arguments.memory_devices));
    let commands = "commands = [\"enqueue:DeviceInformation\", \"enqueue:DeviceConfigured\"]";
    let baseline = format!("enabled = true\n[grants]\nkv = {{ bytes = \"64MiB\" }}\nenrollments = [\"read\"]\ntimers = true\n{commands}\n");
    install(&home, &ENROLLMENT_BASELINE, &baseline);
    // Its room is a name that leads nowhere: what it cannot post waits.
    std::fs::write(home.grants().join("chat-url"), "https://chat.invalid/hook").expect("a secret");
    let secrets = "secrets = { chat_url = { file = \"chat-url\", host = \"chat.invalid\", use = \"http\" } }";
    install(&home, &CHAT_NOTIFY, &format!("enabled = true\n[grants]\nhttp = [\"chat.invalid\"]\n{secrets}\n"));
    let server = home.start();
    ready(&server).await;
    println!("  {:.1} MB with three plugins and no device", megabytes(server.resident()));
    let options = FleetOptions {
        devices: arguments.memory_devices,
        connections: arguments.connections,
        proof: proof(true),
        serial_prefix: Some("BENCH".to_owned()),
        patience: Duration::from_secs(60),
        ..FleetOptions::default()
    };
    let mut fleet = Fleet::new(&authority, Target::parse(&server.url()).expect("a URL"), options).expect("devices");
    fleet.enroll().await.expect("enrolled");
    assert!(fleet.report.is_success(), "{}", fleet.report.to_text());
    drop(fleet);
    println!("  {:.1} MB when the last of {} has enrolled", megabytes(server.resident()), arguments.memory_devices);
    let resident = megabytes(server.resident());
    target("resident MB", resident, 100.0, true)
}

#[expect(clippy::cast_precision_loss, reason = "bytes of a process")]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

async fn history(arguments: &Arguments, asked: Asked) -> usize {
    let authority = authority();
    let mut with = Stage::open(home(&authority, false), arguments.connections);
    let mut without = Stage::open(home(&authority, false), arguments.connections);
    let mut devices = Devices::new(&authority, false, asked);
    devices.enroll(arguments.devices, &mut [&mut with, &mut without]).await;
    let finished = arguments.finished;
    let mut with = with.reopened(async |database| wasmdm_testkit::seed::finished_commands(&database, finished).await).await;
    let mut without = without.reopened(async |_| ()).await;
    let measured = measure(arguments, &mut devices, &mut with, Some(&mut without)).await;
    println!(
        "  with {finished} finished commands {}, without {}",
        measured.estimate(|round| round.this),
        measured.estimate(|round| round.other.unwrap_or_default())
    );
    println!("  with / without {:.3}", measured.ratio());
    target("with / without", measured.ratio().median, 1.1, true)
}

async fn scale(arguments: &Arguments) -> usize {
    let authority = authority();
    let opened = async |enrollments: u64| {
        let stage = Stage::open(home(&authority, false), arguments.connections);
        stage.reopened(async |database| wasmdm_testkit::seed::enrolled_devices(&database, enrollments).await).await
    };
    let (many, few) = (arguments.enrollments, (arguments.enrollments / 100).max(1));
    let (mut large, mut small) = (opened(many).await, opened(few).await);
    let mut devices = Devices::new(&authority, false, Asked::Enrollment);
    let measured = measure(arguments, &mut devices, &mut large, Some(&mut small)).await;
    println!(
        "  beside {many} enrollments {}, beside {few} {}",
        measured.estimate(|round| round.this),
        measured.estimate(|round| round.other.unwrap_or_default())
    );
    println!("  many / few {:.3}", measured.ratio());
    target("many / few", measured.ratio().median, 1.25, true)
}

/// Two clients call `/v1/push` with 1,000 devices each, again and again: what NanoMDM was measured with.
async fn pushes(arguments: &Arguments, latency: Duration, theirs: f64, at_least: f64) -> usize {
    const CLIENTS: u64 = 2;
    const IDS: u64 = 1000;
    const CALLS: u64 = 10;
    let authority = authority();
    let service = FakeApns::start_with(FakeApnsOptions { latency, remembered: 0, ..FakeApnsOptions::default() }).expect("a push service");
    let home = home(&authority, true);
    let roots = home.directory.path().join("push-service.pem");
    std::fs::write(&roots, service.root_pem()).expect("a file");
    let home = home.with(&["--apns-endpoint", &service.endpoint(), "--apns-roots", &roots.to_string_lossy()]);
    let mut stage = Stage::open(home, arguments.connections);
    let request = PushCertificateRequest { rsa: true, ..PushCertificateRequest::new(authority.topic()) };
    let certificate = service.authority().issue_as(&request).expect("a certificate");
    let pem = format!("{}{}", certificate.certificate_pem, certificate.private_key_pem);
    stage.api.store_push_certificate(pem).await.expect("stored");
    let mut devices = Devices::new(&authority, true, Asked::Idle);
    devices.enroll(usize::try_from(CLIENTS * IDS).unwrap(), &mut [&mut stage]).await;
    let ids: Vec<String> = devices.enrolled.iter().map(Device::id).collect();
    // The handshake is not what is measured.
    assert!(stage.api.push(&[ids.first().expect("a device")]).await.expect("an answer").status.is_success());

    let (server_before, service_before, begin) = (stage.cpu(), service.cpu().unwrap_or_default(), Instant::now());
    let mut clients = JoinSet::new();
    for ids in ids.chunks(usize::try_from(IDS).unwrap()) {
        let (ids, mut api) = (ids.to_vec(), stage.api.another());
        clients.spawn(async move {
            let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
            let mut longest = Duration::ZERO;
            for _ in 0..CALLS {
                let begin = Instant::now();
                let answer = api.push(&ids).await.expect("an answer");
                assert!(answer.status.is_success(), "{answer:?}");
                longest = longest.max(begin.elapsed());
            }
            longest
        });
    }
    let longest = clients.join_all().await.into_iter().max().unwrap_or_default();
    let elapsed = begin.elapsed();
    let pushed = count(usize::try_from(CLIENTS * IDS * CALLS).unwrap());
    let rate = pushed / elapsed.as_secs_f64();
    println!(
        "  {latency:?} latency: {rate:.0} pushes a second (NanoMDM {theirs:.0}), longest call of {IDS} ids {:.0} ms, server {:.1} µs a push, push service {:.1}",
        longest.as_secs_f64() * 1e3,
        micros(stage.cpu().since(&server_before)) / pushed,
        micros(service.cpu().unwrap_or_default().saturating_sub(service_before)) / pushed
    );
    target("pushes a second", rate, at_least, false)
}
