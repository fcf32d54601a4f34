//! Devices that live: they enroll, work off commands or fail at them, lose answers, take other push tokens and certificates, are wiped,
//! leave and come back; their users come and go. Each device keeps account of what it must see, and every deviation is a problem.
//!
//! What a device does follows from the seed and its number. When it does it, and what it meets, is the run's own. Start reading at
//! `member.rs` for the life, at `expectation.rs` for what must be seen.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use indicatif::ProgressBar;
use plist::Dictionary;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::api::ApiClient;
use crate::authority::{Authority, derive, derive_uuid};
use crate::connection::Target;
use crate::device::Proof;
use crate::error::SimulatorError;
use crate::journal::{JournalWriter, hex};
use crate::measure::{Tally, own_cpu, process_cpu};
use crate::message::command_document;
use crate::report::{PhaseReport, Report};

mod expectation;
mod member;

use member::{Member, Queues};

/// What may happen in a device's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LifeEvent {
    /// A device or user polls and works off its queue.
    Session,
    /// One to three commands are queued for a device or user.
    Commands,
    /// A device or user takes another push token and magic.
    PushToken,
    /// A Mac asks for its bootstrap token, escrows another one or deletes it.
    BootstrapToken,
    /// A user comes or goes.
    User,
    /// The enrollment profile is installed again, with the same certificate or another.
    ReEnrollment,
    /// The device is erased, and comes back in the Setup Assistant.
    Wipe,
    /// The device leaves, and comes back.
    CheckOut,
    /// The server asks for another certificate, and everything goes on.
    Renewal,
    /// The device takes another certificate in silence.
    Rotation,
    /// Somebody speaks for the device with a certificate that does not name it.
    Stranger,
}

impl LifeEvent {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Session,
        Self::Commands,
        Self::PushToken,
        Self::BootstrapToken,
        Self::User,
        Self::ReEnrollment,
        Self::Wipe,
        Self::CheckOut,
        Self::Renewal,
        Self::Rotation,
        Self::Stranger,
    ];

    /// Its name, for the command line and the report.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Session => "session",
            Self::Commands => "commands",
            Self::PushToken => "push-token",
            Self::BootstrapToken => "bootstrap-token",
            Self::User => "user",
            Self::ReEnrollment => "re-enrollment",
            Self::Wipe => "wipe",
            Self::CheckOut => "check-out",
            Self::Renewal => "renewal",
            Self::Rotation => "rotation",
            Self::Stranger => "stranger",
        }
    }

    /// How often it happens in a minute of a device, unless something else is asked for: far more often than in a real life.
    const fn usual_rate(self) -> f64 {
        match self {
            Self::Session => 12.0,
            Self::Commands => 4.0,
            Self::BootstrapToken | Self::User => 2.0,
            Self::PushToken => 1.0,
            Self::ReEnrollment | Self::Renewal | Self::Rotation => 0.4,
            Self::Wipe | Self::CheckOut | Self::Stranger => 0.3,
        }
    }
}

/// How often each event happens in a minute of each device.
#[derive(Debug, Clone, PartialEq)]
pub struct LifeRates(BTreeMap<LifeEvent, f64>);

impl Default for LifeRates {
    fn default() -> Self {
        Self(LifeEvent::ALL.into_iter().map(|event| (event, event.usual_rate())).collect())
    }
}

impl LifeRates {
    /// How often it happens in a minute.
    pub fn of(&self, event: LifeEvent) -> f64 {
        self.0.get(&event).copied().unwrap_or_default()
    }

    /// The same rates, but for one event. Zero is never.
    #[must_use]
    pub fn with(mut self, event: LifeEvent, per_minute: f64) -> Self {
        self.0.insert(event, per_minute.max(0.0));
        self
    }

    /// All rates times `factor`.
    #[must_use]
    pub fn times(mut self, factor: f64) -> Self {
        self.0.values_mut().for_each(|rate| *rate *= factor.max(0.0));
        self
    }
}

/// One rate as the command line takes it: `wipe=0.5`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LifeRate {
    /// What happens.
    pub event: LifeEvent,
    /// How often in a minute of a device.
    pub per_minute: f64,
}

impl FromStr for LifeRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rate) = text.split_once('=').ok_or("it must be EVENT=PER_MINUTE")?;
        let event = LifeEvent::ALL.into_iter().find(|event| event.name() == name).ok_or_else(|| {
            let names: Vec<&str> = LifeEvent::ALL.into_iter().map(LifeEvent::name).collect();
            format!("`{name}` is none of {}", names.join(", "))
        })?;
        let per_minute: f64 = rate.parse().map_err(|_| format!("`{rate}` is no number"))?;
        if !(0.0..=6000.0).contains(&per_minute) {
            return Err(format!("{rate} is not between 0 and 6000"));
        }
        Ok(Self { event, per_minute })
    }
}

/// Which devices, and how they live.
#[derive(Clone)]
pub struct LivingOptions {
    /// How many devices: Macs, iPhones, iPads, Shared iPads and User Enrollments in turn, most of them with users.
    pub devices: u64,
    /// The number of the first one.
    pub first: u64,
    /// How they prove who they are.
    pub proof: Proof,
    /// The beginning of their serial numbers.
    pub serial_prefix: Option<String>,
    /// How often what happens.
    pub rates: LifeRates,
    /// How many of a hundred requests lose their answer.
    pub lost_percent: u8,
    /// How many of a hundred reports are sent again although they were answered.
    pub repeated_percent: u8,
    /// The time in which the devices come, one after the other.
    pub spread: Duration,
    /// How often one command is queued for many devices at once.
    pub mass_enqueue_every: Duration,
    /// How long a device tries again when no answer comes, or 503.
    pub patience: Duration,
    /// Distinguishes this run's commands and chances from those of an earlier run with the same seed.
    pub run: u64,
    /// Where every message is written down.
    pub journal: Option<Arc<JournalWriter>>,
    /// The server's process, to read its CPU time.
    pub server_pid: Option<u32>,
    /// Counts events.
    pub progress: ProgressBar,
}

impl fmt::Debug for LivingOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LivingOptions")
            .field("devices", &self.devices)
            .field("first", &self.first)
            .field("rates", &self.rates)
            .finish_non_exhaustive()
    }
}

impl Default for LivingOptions {
    fn default() -> Self {
        Self {
            devices: 12,
            first: 1,
            proof: Proof::default(),
            serial_prefix: None,
            rates: LifeRates::default(),
            lost_percent: 2,
            repeated_percent: 3,
            spread: Duration::from_secs(2),
            mass_enqueue_every: Duration::from_secs(2),
            patience: Duration::from_secs(30),
            run: 0,
            journal: None,
            server_pid: None,
            progress: ProgressBar::hidden(),
        }
    }
}

impl LivingOptions {
    /// The UUID of a command of this run, which tells it from those of the server's plugins.
    fn command_uuid(&self, seed: u64, number: u64) -> String {
        let uuid = derive_uuid(seed ^ self.run, "living command", number).hyphenated().to_string().to_uppercase();
        format!("{}{}", self.command_prefix(seed), uuid.get(8..).unwrap_or_default())
    }

    fn is_ours(&self, seed: u64, uuid: &str) -> bool {
        uuid.starts_with(&self.command_prefix(seed))
    }

    fn command_prefix(&self, seed: u64) -> String {
        hex(derive(seed ^ self.run, "living commands", 0).first_chunk::<4>().unwrap_or(&[0; 4])).to_uppercase()
    }
}

/// Devices, ready to live.
#[derive(Debug)]
pub struct LivingFleet {
    members: Vec<Member>,
    api: ApiClient,
    authority: Arc<Authority>,
    options: Arc<LivingOptions>,
}

/// The devices that one command of the operator is for, at most.
const MASS: usize = 20;

impl LivingFleet {
    /// Makes the devices. Commands are queued through `api`.
    pub fn new(authority: &Arc<Authority>, target: &Target, api: ApiClient, options: LivingOptions) -> Result<Self, SimulatorError> {
        if options.devices == 0 {
            return Err(SimulatorError::Argument { name: "devices", problem: "at least one is needed".into() });
        }
        let options = Arc::new(options);
        options.progress.set_message("making devices");
        let members = (options.first..options.first.saturating_add(options.devices))
            .map(|number| Member::new(authority, target, api.another(), &options, number))
            .collect::<Result<_, _>>()?;
        Ok(Self { members, api, authority: Arc::clone(authority), options })
    }

    /// Lives for this time.
    pub async fn live_for(self, duration: Duration) -> Result<Report, SimulatorError> {
        let over = CancellationToken::new();
        let ending = over.clone();
        let (report, ()) = tokio::join!(self.live(over), async {
            tokio::time::sleep(duration).await;
            ending.cancel();
        });
        report
    }

    /// Lives until it is `over`, works off what is left, and answers what was seen.
    pub async fn live(self, over: CancellationToken) -> Result<Report, SimulatorError> {
        let Self { members, mut api, authority, options } = self;
        let queues: Vec<Arc<Queues>> = members.iter().map(|member| Arc::clone(&member.queues)).collect();
        let mut report = Report { devices: members.len() as u64, connections: members.len() as u64, ..Report::default() };
        let server_before = options.server_pid.and_then(process_cpu);
        let (cpu_before, begin) = (own_cpu(), Instant::now());
        let calm = CancellationToken::new();
        let mut tasks = JoinSet::new();
        for member in members {
            tasks.spawn(member.live(over.clone(), calm.clone()));
        }
        options.progress.set_message("living");
        let operated = operate(&mut api, &authority, &options, &queues, &over).await;
        over.cancelled().await;
        options.progress.set_message("working off");
        calm.cancel();
        match operated {
            Ok(problems) => problems.into_iter().for_each(|problem| report.problem(problem)),
            Err(error) => report.problem(error.to_string()),
        }
        let mut tally = Tally::default();
        while let Some(finished) = tasks.join_next().await {
            let Ok(mut member) = finished else {
                report.problem("a device's life ended with a panic");
                continue;
            };
            tally.merge(&member.connection.measure());
            let outcome = std::mem::take(&mut member.outcome);
            let told = outcome.problems.len() as u64;
            outcome.problems.into_iter().for_each(|problem| report.problem(problem));
            report.problem_count += outcome.problem_count - told;
            report.commands_enqueued += outcome.queued;
            report.redelivered += outcome.redelivered;
            for (status, count) in outcome.reports {
                *report.reports.entry(status).or_default() += count;
            }
            for (event, count) in outcome.life {
                *report.life.entry(event.into()).or_default() += count;
            }
        }
        report.enrolled = queues.iter().filter(|queues| queues.lock().first().is_some_and(|expectation| expectation.is_enrolled)).count() as u64;
        let server = server_before.zip(options.server_pid.and_then(process_cpu)).map(|(before, after)| after.saturating_sub(before));
        report.phases.push(PhaseReport::new("life", &tally, begin.elapsed(), own_cpu().saturating_sub(cpu_before), server));
        Ok(report)
    }
}

/// Queues a command for many devices at once, again and again, until it is `over`. Answers what went wrong.
async fn operate(
    api: &mut ApiClient,
    authority: &Authority,
    options: &LivingOptions,
    fleet: &[Arc<Queues>],
    over: &CancellationToken,
) -> Result<Vec<String>, SimulatorError> {
    let mut chances = fastrand::Rng::with_seed(authority.seed() ^ options.run.rotate_left(17));
    let mut ticks = tokio::time::interval(options.mass_enqueue_every.max(Duration::from_millis(10)));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut problems = Vec::new();
    for number in 1.. {
        tokio::select! {
            biased;
            () = over.cancelled() => break,
            _ = ticks.tick() => {}
        }
        let mut chosen = chances.choose_multiple(0..fleet.len(), MASS);
        // Gates are taken in one order: two that wait for each other wait for ever.
        chosen.sort_unstable();
        let mut gates = Vec::new();
        let mut targets = Vec::new();
        for queues in chosen.into_iter().filter_map(|index| fleet.get(index)) {
            let gate = queues.gate.lock().await;
            if queues.with(0, |expectation| expectation.is_known) == Some(true) {
                gates.push(gate);
                targets.push((&**queues, 0));
            }
        }
        if targets.is_empty() {
            continue;
        }
        let uuid = options.command_uuid(authority.seed(), u64::MAX - number);
        let document = command_document(&uuid, "SecurityInfo", Dictionary::new())?;
        problems.extend(enqueue(api, options, &targets, &uuid, &document, false).await?);
        drop(gates);
    }
    Ok(problems)
}

/// Queues one command for channels whose gates are held; answers what went wrong, a line for each.
async fn enqueue(
    api: &mut ApiClient,
    options: &LivingOptions,
    targets: &[(&Queues, usize)],
    uuid: &str,
    document: &Bytes,
    renews_identity: bool,
) -> Result<Vec<String>, SimulatorError> {
    let mut written = Vec::new();
    let mut ids: Vec<&str> = Vec::new();
    for (queues, channel) in targets {
        let Some(id) = queues.ids.get(*channel) else { continue };
        queues.with(*channel, |expectation| expectation.queueing(uuid));
        if let Some(journal) = &options.journal {
            written.push(journal.record_enqueue(id, uuid, document)?);
        }
        ids.push(id);
    }
    let begin = Instant::now();
    let answer = loop {
        let answer =
            if renews_identity { api.enqueue_renewal(&ids, document.clone()).await } else { api.enqueue(&ids, document.clone(), false).await };
        let again = match &answer {
            Ok(answer) => answer.status == http::StatusCode::SERVICE_UNAVAILABLE,
            Err(error) => error.is_transport(),
        };
        if !again || begin.elapsed() > options.patience {
            break answer?;
        }
        // The same UUID with the same bytes is the same command: it may be said again.
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let mut problems = Vec::new();
    for (index, ((queues, channel), id)) in targets.iter().zip(&ids).enumerate() {
        if let Some(error) = answer.command_error(id) {
            queues.with(*channel, |expectation| expectation.not_queued(uuid));
            problems.push(format!("queueing {uuid} for {id}: {error}"));
            continue;
        }
        queues.with(*channel, |expectation| expectation.queued(uuid));
        if let (Some(journal), Some(number)) = (&options.journal, written.get(index)) {
            journal.record_enqueued(*number, id, uuid)?;
        }
    }
    Ok(problems)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_names_its_event_and_a_number() {
        assert_eq!("wipe=0.5".parse(), Ok(LifeRate { event: LifeEvent::Wipe, per_minute: 0.5 }));
        for (text, words) in [("wipe", "EVENT=PER_MINUTE"), ("birth=1", "none of session, commands"), ("wipe=x", "no number"), ("wipe=-1", "between")]
        {
            let problem = text.parse::<LifeRate>().unwrap_err();
            assert!(problem.contains(words), "{problem}");
        }
    }

    #[test]
    fn commands_of_a_run_are_told_from_others() {
        let options = LivingOptions { run: 7, ..LivingOptions::default() };
        let uuid = options.command_uuid(1, 5);
        assert!(options.is_ours(1, &uuid) && uuid.len() == 36);
        assert_ne!(uuid, options.command_uuid(1, 6));
        assert!(!LivingOptions::default().is_ours(1, &uuid));
    }
}
