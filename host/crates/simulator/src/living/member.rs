//! One device with its users: what it does, one thing after the other, and what it must see.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use plist::{Dictionary, Value};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use wasmdm_protocol::enrollment::EnrollmentKind;

use super::expectation::{Answered, Asked, Expectation};
use super::{LifeEvent, LivingOptions};
use crate::api::ApiClient;
use crate::authority::{Authority, CertificateRequest, Identity, derive, derive_uuid};
use crate::connection::{Connection, Target};
use crate::device::{Device, DeviceOptions, Loss, Prepared, Product, RetryPolicy};
use crate::error::SimulatorError;
use crate::fleet::{REQUEST_TYPES, keys_of};
use crate::message::{Message, ReceivedCommand, command_document};

/// The most commands that one session may bring.
const SESSION_LIMIT: usize = 10_000;
/// Sessions after which a command that must come has come, with every deferral and every lost answer.
const SESSIONS: usize = 40;
/// The most problems that one member remembers in words.
const PROBLEMS: usize = 5;

/// What a device is, and what users it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Household {
    Mac,
    Iphone,
    Ipad,
    SharedIpad,
    UserEnrollment,
    MacUserEnrollment,
}

impl Household {
    const fn of(number: u64) -> Self {
        match number % 6 {
            1 => Self::Mac,
            2 => Self::Iphone,
            3 => Self::SharedIpad,
            4 => Self::MacUserEnrollment,
            5 => Self::UserEnrollment,
            _ => Self::Ipad,
        }
    }

    const fn device(self) -> (EnrollmentKind, Product) {
        match self {
            Self::Mac => (EnrollmentKind::Device, Product::Mac),
            Self::Iphone => (EnrollmentKind::Device, Product::Iphone),
            Self::Ipad | Self::SharedIpad => (EnrollmentKind::Device, Product::Ipad),
            Self::UserEnrollment => (EnrollmentKind::UserEnrollmentDevice, Product::Iphone),
            Self::MacUserEnrollment => (EnrollmentKind::UserEnrollmentDevice, Product::Mac),
        }
    }

    const fn users(self) -> (EnrollmentKind, u64) {
        match self {
            Self::Mac => (EnrollmentKind::User, 2),
            Self::SharedIpad => (EnrollmentKind::SharedIpad, 3),
            Self::MacUserEnrollment => (EnrollmentKind::UserEnrollment, 1),
            Self::Iphone | Self::Ipad | Self::UserEnrollment => (EnrollmentKind::User, 0),
        }
    }
}

/// What the operator of the fleet and the device itself both know: they queue commands at the same time.
#[derive(Debug)]
pub(super) struct Queues {
    /// Enrollment ids by channel; the device's own is the first.
    pub(super) ids: Vec<String>,
    /// Held while a command is queued, and while something cancels what is queued: otherwise nobody knew which came first.
    pub(super) gate: tokio::sync::Mutex<()>,
    expectations: Mutex<Vec<Expectation>>,
}

impl Queues {
    pub(super) fn lock(&self) -> MutexGuard<'_, Vec<Expectation>> {
        self.expectations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn with<T>(&self, channel: usize, change: impl FnOnce(&mut Expectation) -> T) -> Option<T> {
        self.lock().get_mut(channel).map(change)
    }
}

/// What a member tells at the end.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) problems: Vec<String>,
    pub(super) problem_count: u64,
    pub(super) life: BTreeMap<&'static str, u64>,
    pub(super) reports: BTreeMap<String, u64>,
    pub(super) queued: u64,
    pub(super) redelivered: u64,
}

impl Outcome {
    fn count(&mut self, what: &'static str) {
        *self.life.entry(what).or_default() += 1;
    }
}

/// What came of sending a message.
enum Heard {
    Body {
        body: Bytes,
        /// It was sent more than once.
        again: bool,
    },
    Lost,
}

/// What a device does with one command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Acknowledge,
    NotNow,
    Error,
    CommandFormatError,
    Silence,
}

/// A device, its users, and what they expect.
pub(super) struct Member {
    pub(super) queues: Arc<Queues>,
    pub(super) connection: Connection,
    pub(super) outcome: Outcome,
    authority: Arc<Authority>,
    options: Arc<LivingOptions>,
    api: ApiClient,
    household: Household,
    /// The device's own channel, then its users'.
    channels: Vec<Device>,
    /// Of each channel: a request was cut off just before, and may still be in the server.
    cut: Vec<bool>,
    /// Chooses the events of its life.
    program: fastrand::Rng,
    /// Chooses what happens to messages.
    chances: fastrand::Rng,
    /// Whether its certificates name it: only then it may take another one in silence.
    names_itself: bool,
    certificates: u64,
    push_tokens: u64,
    commands: u64,
    bootstrap_tokens: u64,
    bootstrap_token: Option<Vec<u8>>,
    /// How often each command came.
    deliveries: HashMap<String, u32>,
    /// The command whose acknowledgement begins a renewal.
    renewal: Option<String>,
    is_wiped: bool,
    /// Nothing goes wrong any more, and every command is acknowledged.
    is_calm: bool,
}

impl std::fmt::Debug for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Member").field("household", &self.household).field("ids", &self.queues.ids).finish_non_exhaustive()
    }
}

impl Member {
    pub(super) fn new(
        authority: &Arc<Authority>,
        target: &Target,
        api: ApiClient,
        options: &Arc<LivingOptions>,
        number: u64,
    ) -> Result<Self, SimulatorError> {
        let household = Household::of(number);
        let (kind, product) = household.device();
        let made = |kind| {
            Device::with_options(
                authority,
                number,
                DeviceOptions {
                    kind: Some(kind),
                    product: Some(product),
                    proof: options.proof.clone(),
                    serial_prefix: options.serial_prefix.clone(),
                    is_shared: household == Household::SharedIpad,
                    journal: options.journal.clone(),
                    retry: RetryPolicy { patience: options.patience },
                    ..DeviceOptions::default()
                },
            )
        };
        let mut channels = vec![made(kind)?];
        let (user_kind, users) = household.users();
        for user in 0..users {
            let mut device = made(user_kind)?;
            let distinct = number ^ ((user + 1) << 56);
            if user_kind == EnrollmentKind::SharedIpad {
                device.user_short_name = format!("student{number}.{user}@school.example");
            } else {
                device.user_id = derive_uuid(authority.seed(), "user", distinct).hyphenated().to_string().to_uppercase();
                device.user_short_name = format!("user{number}.{user}");
            }
            device.rotate_push_token((user + 1) << 56);
            channels.push(device);
        }
        let seed = |label| u64::from_be_bytes(derive(authority.seed() ^ options.run, label, number).first_chunk().copied().unwrap_or_default());
        let queues = Queues {
            ids: channels.iter().map(Device::id).collect(),
            gate: tokio::sync::Mutex::default(),
            expectations: Mutex::new(channels.iter().map(|_| Expectation::default()).collect()),
        };
        let mut connection = Connection::new(target.clone());
        connection.measure();
        let mut member = Self {
            queues: Arc::new(queues),
            connection,
            outcome: Outcome::default(),
            authority: Arc::clone(authority),
            options: Arc::clone(options),
            api,
            household,
            cut: vec![false; channels.len()],
            channels,
            program: fastrand::Rng::with_seed(seed("program")),
            chances: fastrand::Rng::with_seed(seed("chances")),
            names_itself: (number / 6).is_multiple_of(2),
            certificates: 0,
            push_tokens: 0,
            commands: 0,
            bootstrap_tokens: 0,
            bootstrap_token: None,
            deliveries: HashMap::new(),
            renewal: None,
            is_wiped: false,
            is_calm: false,
        };
        let identity = member.new_identity(member.names_itself)?;
        member.take_identity(&identity);
        Ok(member)
    }

    /// Lives until it is `over`; then, when `calm` says so, works off what is left and looks whether everything is there.
    pub(super) async fn live(mut self, over: CancellationToken, calm: CancellationToken) -> Self {
        let lived = self.live_until(&over).await;
        if lived.is_ok() {
            calm.cancelled().await;
            self.is_calm = true;
        }
        let closed = match lived {
            Ok(()) => self.close().await,
            // What went wrong may have left it in the middle of something: whatever came after would be a consequence.
            Err(error) => Err(error),
        };
        if let Err(error) = closed {
            self.problem(error);
        }
        self.connection.close();
        self
    }

    async fn live_until(&mut self, over: &CancellationToken) -> Result<(), SimulatorError> {
        let mut possible: Vec<(LifeEvent, f64)> = LifeEvent::ALL
            .into_iter()
            .filter(|event| self.is_possible(*event))
            .map(|event| (event, self.options.rates.of(event)))
            .filter(|(_, rate)| *rate > 0.0)
            .collect();
        possible.sort_by(|(_, one), (_, other)| one.total_cmp(other));
        let per_minute: f64 = possible.iter().map(|(_, rate)| rate).sum();
        // Not all at once: the first event is a little away.
        let mut due = Instant::now() + self.options.spread.mul_f64(self.program.f64());
        tokio::time::sleep_until(due).await;
        self.enroll_anew().await?;
        self.connection.close();
        if possible.is_empty() {
            return Ok(());
        }
        // Rare events come first, another one for each device of a kind, so that a short run has some of them all.
        let place = usize::try_from(self.device(0)?.number / 6).unwrap_or_default() % possible.len();
        let mut first = possible.get(place).map(|(event, _)| *event);
        loop {
            let minutes = -(1.0 - self.program.f64()).ln() / per_minute;
            // Events for which there was no time are not made up for.
            due = (due + Duration::from_secs_f64((minutes * 60.0).min(86_400.0))).max(Instant::now());
            tokio::select! {
                biased;
                () = over.cancelled() => return Ok(()),
                () = tokio::time::sleep_until(due) => {}
            }
            let mut chosen = self.program.f64() * per_minute;
            let event = possible.iter().find_map(|(event, rate)| {
                chosen -= rate;
                (chosen < 0.0).then_some(*event)
            });
            self.happen(first.take().or(event).unwrap_or(LifeEvent::Session)).await?;
            self.connection.close();
        }
    }

    fn is_possible(&self, event: LifeEvent) -> bool {
        match event {
            LifeEvent::User => self.channels.len() > 1,
            LifeEvent::BootstrapToken => self.household == Household::Mac,
            // Those of a User Enrollment can only be unenrolled.
            LifeEvent::Wipe => !matches!(self.household, Household::UserEnrollment | Household::MacUserEnrollment),
            LifeEvent::Rotation => self.names_itself,
            LifeEvent::Stranger => !self.names_itself,
            LifeEvent::Session | LifeEvent::Commands | LifeEvent::PushToken | LifeEvent::ReEnrollment | LifeEvent::CheckOut | LifeEvent::Renewal => {
                true
            }
        }
    }

    async fn happen(&mut self, event: LifeEvent) -> Result<(), SimulatorError> {
        self.outcome.count(event.name());
        self.options.progress.inc(1);
        match event {
            LifeEvent::Session => {
                let channel = self.an_enrolled_channel();
                self.session(channel).await
            }
            LifeEvent::Commands => self.queue_some().await,
            LifeEvent::PushToken => {
                let channel = self.an_enrolled_channel();
                self.push_tokens += 1;
                let generation = self.push_tokens | (channel as u64) << 56;
                if let Some(device) = self.channels.get_mut(channel) {
                    device.rotate_push_token(generation);
                }
                self.update_token(channel).await
            }
            LifeEvent::BootstrapToken => self.bootstrap_token_event().await,
            LifeEvent::User => self.user_event().await,
            LifeEvent::ReEnrollment => {
                let old = self.maybe_another_identity()?;
                self.enroll_anew().await?;
                self.try_old(old).await
            }
            LifeEvent::Wipe => self.wipe().await,
            LifeEvent::CheckOut => self.leave_and_come_back().await,
            LifeEvent::Renewal => self.renew().await,
            LifeEvent::Rotation => {
                let old = self.identity();
                let new = self.new_identity(true)?;
                self.take_identity(&new);
                // The next request of any channel is signed by it.
                let channel = self.an_enrolled_channel();
                self.session(channel).await?;
                self.try_old(old).await
            }
            LifeEvent::Stranger => {
                let stranger = self.new_identity(false)?;
                self.try_refused(stranger, "a certificate that names nobody").await
            }
        }
    }

    // --- what happens ---

    /// Authenticate and TokenUpdate: whatever was before is over, also for the users.
    async fn enroll_anew(&mut self) -> Result<(), SimulatorError> {
        let queues = Arc::clone(&self.queues);
        let gate = queues.gate.lock().await;
        let message = self.device(0)?.authenticate()?;
        self.insist(0, message).await?;
        for expectation in queues.lock().iter_mut() {
            expectation.cancel_all("the device has enrolled again");
            expectation.is_enrolled = false;
        }
        drop(gate);
        self.bootstrap_token = None;
        self.outcome.count("enrollment");
        if self.chances.u8(..4) == 0 {
            // Not enrolled before its TokenUpdate: it is told nothing.
            self.session(0).await?;
        }
        self.update_token(0).await
    }

    async fn update_token(&mut self, channel: usize) -> Result<(), SimulatorError> {
        let message = self.device(channel)?.token_update()?;
        self.insist(channel, message).await?;
        self.queues.with(channel, |expectation| {
            expectation.is_known = true;
            expectation.is_enrolled = true;
        });
        Ok(())
    }

    async fn queue_some(&mut self) -> Result<(), SimulatorError> {
        let channel = self.a_channel(|expectation| expectation.is_known);
        if self.is_awaiting(channel) {
            self.queue_release(channel).await?;
        }
        for _ in 0..self.program.u8(1..=3) {
            let request_type = self.program.choice(REQUEST_TYPES).unwrap_or("SecurityInfo");
            self.queue(channel, request_type, keys_of(request_type)).await?;
        }
        Ok(())
    }

    async fn bootstrap_token_event(&mut self) -> Result<(), SimulatorError> {
        match self.program.u8(..6) {
            0 => self.set_bootstrap_token(None).await,
            1 | 2 => {
                self.bootstrap_tokens += 1;
                let device = self.device(0)?;
                let token = derive(self.authority.seed(), "living bootstrap token", (device.number << 20) | self.bootstrap_tokens).to_vec();
                self.set_bootstrap_token(Some(token)).await
            }
            _ => self.look_at_bootstrap_token().await,
        }
    }

    async fn set_bootstrap_token(&mut self, token: Option<Vec<u8>>) -> Result<(), SimulatorError> {
        let message = self.device(0)?.set_bootstrap_token(token.as_deref())?;
        self.insist(0, message).await?;
        self.bootstrap_token = token;
        Ok(())
    }

    async fn look_at_bootstrap_token(&mut self) -> Result<(), SimulatorError> {
        let message = self.device(0)?.get_bootstrap_token()?;
        let body = self.insist(0, message).await?;
        let stored = Value::from_reader(std::io::Cursor::new(&body))
            .ok()
            .and_then(Value::into_dictionary)
            .and_then(|document| document.get("BootstrapToken").and_then(Value::as_data).map(<[u8]>::to_vec));
        if stored != self.bootstrap_token {
            let word = |token: &Option<Vec<u8>>| if token.is_some() { "one" } else { "none" };
            let kind = if stored.is_some() && self.bootstrap_token.is_some() { "another one" } else { word(&stored) };
            self.problem(format!(
                "{}: asked for its bootstrap token it was given {kind}, having escrowed {}",
                self.id(0),
                word(&self.bootstrap_token)
            ));
        }
        Ok(())
    }

    /// A user comes, goes, or takes another push token.
    async fn user_event(&mut self) -> Result<(), SimulatorError> {
        let channel = self.program.usize(1..self.channels.len().max(2));
        let is_enrolled = self.queues.with(channel, |expectation| expectation.is_enrolled).unwrap_or_default();
        if !is_enrolled {
            let waits = self.household == Household::SharedIpad && self.program.bool();
            if let Some(user) = self.channels.get_mut(channel) {
                user.awaiting_configuration = waits.then_some(true);
            }
            self.update_token(channel).await?;
            if waits && self.program.bool() {
                self.queue_release(channel).await?;
            }
            return Ok(());
        }
        let message = self.device(channel)?.check_out()?;
        self.insist(channel, message).await?;
        self.queues.with(channel, |expectation| expectation.is_enrolled = false);
        // Whoever has gone is told nothing, and answered all the same.
        self.session(channel).await
    }

    async fn wipe(&mut self) -> Result<(), SimulatorError> {
        let mut keys = Dictionary::new();
        keys.insert("PIN".into(), "123456".into());
        let uuid = self.queue(0, "EraseDevice", keys).await?;
        self.sessions_until(0, |member| member.is_wiped, &uuid).await?;
        self.is_wiped = false;
        // It comes back as a new one: another certificate, other tokens, in the Setup Assistant.
        let old = self.identity();
        let new = self.new_identity(self.names_itself)?;
        self.take_identity(&new);
        self.push_tokens += 1;
        let generation = self.push_tokens;
        if let Some(device) = self.channels.first_mut() {
            device.rotate_push_token(generation);
            device.awaiting_configuration = Some(true);
            device.profiles.clear();
        }
        self.enroll_anew().await?;
        self.try_old(old).await?;
        if self.program.bool() {
            self.queue_release(0).await?;
        }
        Ok(())
    }

    async fn leave_and_come_back(&mut self) -> Result<(), SimulatorError> {
        let queues = Arc::clone(&self.queues);
        let gate = queues.gate.lock().await;
        let message = self.device(0)?.check_out()?;
        self.insist(0, message).await?;
        for expectation in queues.lock().iter_mut() {
            expectation.is_enrolled = false;
        }
        drop(gate);
        if self.program.bool() {
            self.queue(0, "SecurityInfo", Dictionary::new()).await?;
        }
        self.session(0).await?;
        let old = self.maybe_another_identity()?;
        self.enroll_anew().await?;
        self.try_old(old).await
    }

    /// The server asks for another certificate, the device brings it, and everything goes on.
    async fn renew(&mut self) -> Result<(), SimulatorError> {
        if self.is_awaiting(0) {
            // A device in the Setup Assistant that authenticates is a new one.
            return self.session(0).await;
        }
        let mut keys = Dictionary::new();
        keys.insert("Payload".into(), Value::Data(enrollment_profile()?));
        let uuid = self.queue_as(0, "InstallProfile", keys, true).await?;
        self.renewal = Some(uuid.clone());
        self.sessions_until(0, |member| member.renewal.is_none(), &uuid).await?;

        let old = self.identity();
        let new = self.new_identity(self.names_itself)?;
        self.take_identity(&new);
        let message = self.device(0)?.authenticate()?.as_renewal();
        self.insist(0, message).await?;
        let came: Vec<usize> = {
            let mut expectations = self.queues.lock();
            let users = expectations.iter_mut().enumerate().skip(1).filter(|(_, user)| user.is_enrolled);
            // Whether it is told something before its TokenUpdate is not asked.
            users.map(|(channel, user)| (channel, user.is_enrolled = false)).map(|(channel, ())| channel).collect()
        };
        self.update_token(0).await?;
        for user in came {
            self.update_token(user).await?;
        }
        if self.household == Household::Mac {
            self.look_at_bootstrap_token().await?;
        }
        self.session(0).await?;
        self.try_old(old).await
    }

    /// Polls until it has happened. The command that makes it happen must come, and is never refused.
    async fn sessions_until(&mut self, channel: usize, happened: impl Fn(&Self) -> bool, uuid: &str) -> Result<(), SimulatorError> {
        for _ in 0..SESSIONS {
            self.session(channel).await?;
            if happened(self) {
                return Ok(());
            }
        }
        Err(self.unusable("Idle", format!("{uuid} did not come in {SESSIONS} sessions")))
    }

    /// Works off everything, and looks whether all is as it must be.
    async fn close(&mut self) -> Result<(), SimulatorError> {
        for channel in 0..self.channels.len() {
            if !self.queues.with(channel, |expectation| expectation.is_enrolled).unwrap_or_default() {
                continue;
            }
            if self.is_awaiting(channel) {
                self.queue_release(channel).await?;
            }
            for _ in 0..SESSIONS {
                self.session(channel).await?;
                if self.queues.with(channel, |expectation| expectation.waiting()) == Some(0) {
                    break;
                }
            }
            let waiting = self.queues.with(channel, |expectation| expectation.waiting()).unwrap_or_default();
            if waiting > 0 {
                self.problem(format!("{}: {waiting} commands never came", self.id(channel)));
            }
            if self.is_awaiting(channel) {
                self.problem(format!("{}: it still waits in the Setup Assistant", self.id(channel)));
            }
            self.update_token(channel).await?;
        }
        if self.household == Household::Mac {
            self.look_at_bootstrap_token().await?;
        }
        Ok(())
    }

    // --- certificates ---

    fn identity(&self) -> Option<Identity> {
        self.channels.first().map(|device| device.identity.clone())
    }

    /// A certificate whose validity begins later than that of all before it.
    fn new_identity(&mut self, names_itself: bool) -> Result<Identity, SimulatorError> {
        self.certificates += 1;
        let days = self.certificates;
        let device = self.device(0)?;
        let name = if names_itself { device.device_id() } else { "MDM Identity" };
        let part = |number: u64| u8::try_from(number).unwrap_or(1);
        let year = i32::try_from(2024 + days / 336).unwrap_or(2024);
        self.authority.issue_as(&CertificateRequest {
            not_before: (year, part(1 + (days / 28) % 12), part(1 + days % 28)),
            ..CertificateRequest::device((days << 40) ^ device.number.wrapping_add(days), name)
        })
    }

    fn take_identity(&mut self, identity: &Identity) {
        for channel in &mut self.channels {
            channel.replace_identity(identity.clone());
        }
    }

    /// Every other time takes a new certificate, and answers the old one.
    fn maybe_another_identity(&mut self) -> Result<Option<Identity>, SimulatorError> {
        if self.program.bool() {
            return Ok(None);
        }
        let old = self.identity();
        let new = self.new_identity(self.names_itself)?;
        self.take_identity(&new);
        Ok(old)
    }

    async fn try_old(&mut self, old: Option<Identity>) -> Result<(), SimulatorError> {
        match old {
            Some(old) => self.try_refused(old, "a certificate that was replaced").await,
            None => Ok(()),
        }
    }

    /// A request that must be answered 400.
    async fn try_refused(&mut self, identity: Identity, what: &str) -> Result<(), SimulatorError> {
        let Some(own) = self.identity() else {
            return Ok(());
        };
        let device = self.channels.first_mut().ok_or_else(no_channel)?;
        device.replace_identity(identity);
        let idle = device.idle().and_then(|message| device.prepare(message));
        device.replace_identity(own);
        let answer = self.transmit(0, &idle?).await?;
        if answer.status != StatusCode::BAD_REQUEST {
            self.problem(format!("{}: {what} was answered {} instead of 400", self.id(0), answer.status.as_u16()));
        }
        Ok(())
    }

    // --- commands ---

    async fn queue(&mut self, channel: usize, request_type: &str, keys: Dictionary) -> Result<String, SimulatorError> {
        self.queue_as(channel, request_type, keys, false).await
    }

    async fn queue_release(&mut self, channel: usize) -> Result<(), SimulatorError> {
        let request_type = if channel == 0 { "DeviceConfigured" } else { "UserConfigured" };
        self.queue(channel, request_type, Dictionary::new()).await.map(|_| ())
    }

    async fn queue_as(&mut self, channel: usize, request_type: &str, keys: Dictionary, renews: bool) -> Result<String, SimulatorError> {
        self.commands += 1;
        let uuid = self.options.command_uuid(self.authority.seed(), (self.device(0)?.number << 24) | self.commands);
        let document = command_document(&uuid, request_type, keys)?;
        let queues = Arc::clone(&self.queues);
        let _gate = queues.gate.lock().await;
        let targets = [(&*queues, channel)];
        let queued = super::enqueue(&mut self.api, &self.options, &targets, &uuid, &document, renews).await?;
        for problem in queued {
            self.problem(problem);
        }
        self.outcome.queued += 1;
        Ok(uuid)
    }

    fn fate(&self, command: &ReceivedCommand, times: u32) -> Fate {
        let [chance, share, ..] = derive(self.authority.seed() ^ self.options.run, &command.uuid, 1);
        if self.is_calm {
            return Fate::Acknowledge;
        }
        let chance = u32::from(chance) * 100 / 256;
        match chance {
            0..12 if times <= 1 + u32::from(share % 3) => Fate::NotNow,
            12..18 if times <= 1 + u32::from(share % 2) => Fate::Silence,
            // Much depends on these.
            _ if matches!(command.request_type.as_str(), "EraseDevice" | "InstallProfile" | "DeviceConfigured" | "UserConfigured") => {
                Fate::Acknowledge
            }
            18..26 => Fate::Error,
            26..30 => Fate::CommandFormatError,
            _ => Fate::Acknowledge,
        }
    }

    /// Idle, and an answer to each command, until the server has nothing more to say or the device falls silent.
    async fn session(&mut self, channel: usize) -> Result<(), SimulatorError> {
        let queues = Arc::clone(&self.queues);
        let mut asked = Asked::Idle;
        let mut prepared = self.prepared_idle(channel)?;
        let mut report: Option<(String, Answered)> = None;
        let mut erasing = None;
        for _ in 0..SESSION_LIMIT {
            let alone = !self.cut.get_mut(channel).is_some_and(std::mem::take);
            let Some(question) = queues.with(channel, |expectation| expectation.ask(asked, alone)) else {
                return Err(no_channel());
            };
            let status = prepared.message.name().to_owned();
            let body = match self.attempt(channel, &prepared).await? {
                Heard::Lost => {
                    queues.with(channel, |expectation| {
                        expectation.lost();
                        if let Some((uuid, answered)) = &report {
                            expectation.reported(uuid, *answered, &status, false);
                        }
                    });
                    // It says it again, or has forgotten the session and begins another; but not where something is waited for that the
                    // server may have taken for done.
                    let is_awaited = report.as_ref().is_some_and(|(uuid, _)| self.renewal.as_ref() == Some(uuid)) || erasing.is_some();
                    if report.is_some() && (is_awaited || self.chances.bool()) {
                        asked = Asked::MaybeRepeatedReport;
                    } else {
                        (asked, report, prepared) = (Asked::Idle, None, self.prepared_idle(channel)?);
                    }
                    continue;
                }
                Heard::Body { body, again } => {
                    let question = if again { question.sent_again() } else { question };
                    let command = self.parse(&body, &status)?;
                    let uuid = command.as_ref().map(|command| command.uuid.as_str());
                    let is_ours = |uuid: &str| self.options.is_ours(self.authority.seed(), uuid);
                    let erased = erasing.take();
                    let problem = {
                        let mut expectations = queues.lock();
                        if erased.is_some() {
                            // Also what its users wait for.
                            for expectation in expectations.iter_mut() {
                                expectation.cancel_all("the device was wiped");
                            }
                        }
                        expectations.get_mut(channel).and_then(|expectation| {
                            if again {
                                expectation.lost();
                            }
                            if let Some((uuid, answered)) = &report {
                                expectation.reported(uuid, *answered, &status, true);
                            }
                            expectation.answered(question, uuid, is_ours)
                        })
                    };
                    if let Some(problem) = problem {
                        self.problem(format!("{}: {problem}", self.id(channel)));
                    }
                    self.reported(report.as_ref(), &status, asked);
                    if erased.is_some() {
                        self.is_wiped = true;
                        return Ok(());
                    }
                    command
                }
            };
            if report.is_some() && asked != Asked::RepeatedReport && !self.is_calm && self.chances.u8(..100) < self.options.repeated_percent {
                self.outcome.count("repeated report");
                asked = Asked::RepeatedReport;
                continue;
            }
            let Some(command) = body else {
                return Ok(());
            };
            let times = self.deliveries.entry(command.uuid.clone()).or_default();
            *times += 1;
            let times = *times;
            self.outcome.redelivered += u64::from(times > 1);
            let fate = self.fate(&command, times);
            if command.request_type == "EraseDevice" && fate == Fate::Acknowledge {
                erasing = Some(queues.gate.lock().await);
            }
            let Some((message, answered)) = self.answer(channel, &command, fate)? else {
                self.outcome.count("silence");
                return Ok(());
            };
            prepared = self.channels.get_mut(channel).ok_or_else(no_channel)?.prepare(message)?;
            report = Some((command.uuid, answered));
            asked = Asked::Report;
        }
        Err(self.unusable("Idle", format!("more than {SESSION_LIMIT} commands in one session")))
    }

    fn parse(&self, body: &Bytes, what: &str) -> Result<Option<ReceivedCommand>, SimulatorError> {
        if body.is_empty() {
            return Ok(None);
        }
        ReceivedCommand::parse(body).map(Some).map_err(|problem| self.unusable(what, problem))
    }

    /// A report was confirmed.
    fn reported(&mut self, report: Option<&(String, Answered)>, status: &str, asked: Asked) {
        let Some((uuid, answered)) = report.filter(|_| asked != Asked::RepeatedReport) else {
            return;
        };
        *self.outcome.reports.entry(status.into()).or_default() += 1;
        if *answered == Answered::Final && self.renewal.as_ref() == Some(uuid) {
            self.renewal = None;
        }
    }

    fn answer(&mut self, channel: usize, command: &ReceivedCommand, fate: Fate) -> Result<Option<(Message, Answered)>, SimulatorError> {
        let device = self.channels.get_mut(channel).ok_or_else(no_channel)?;
        Ok(match fate {
            Fate::Acknowledge => {
                device.take_effect(command);
                Some((device.acknowledgement(command)?, Answered::Final))
            }
            Fate::NotNow => Some((device.report("NotNow", &command.uuid)?, Answered::NotNow)),
            Fate::Error => Some((device.error_report(&command.uuid)?, Answered::Final)),
            Fate::CommandFormatError => Some((device.report("CommandFormatError", &command.uuid)?, Answered::Final)),
            Fate::Silence => None,
        })
    }

    // --- messages ---

    fn prepared_idle(&mut self, channel: usize) -> Result<Prepared, SimulatorError> {
        let device = self.channels.get_mut(channel).ok_or_else(no_channel)?;
        let message = device.idle()?;
        device.prepare(message)
    }

    /// Says it until the server has confirmed it.
    async fn insist(&mut self, channel: usize, message: Message) -> Result<Bytes, SimulatorError> {
        let prepared = self.channels.get_mut(channel).ok_or_else(no_channel)?.prepare(message)?;
        loop {
            if let Heard::Body { body, .. } = self.attempt(channel, &prepared).await? {
                return Ok(body);
            }
        }
    }

    /// Sends it once; now and then the answer is lost.
    async fn attempt(&mut self, channel: usize, prepared: &Prepared) -> Result<Heard, SimulatorError> {
        if !self.is_calm && self.chances.u8(..100) < self.options.lost_percent {
            let loss = if self.chances.bool() { Loss::Unread } else { Loss::Cut };
            let device = self.channels.get_mut(channel).ok_or_else(no_channel)?;
            device.transmit_and_lose(&mut self.connection, prepared, loss).await?;
            if let Some(cut) = self.cut.get_mut(channel) {
                *cut = loss == Loss::Cut;
            }
            self.outcome.count("lost answer");
            return Ok(Heard::Lost);
        }
        let before = self.device(channel)?.transport_errors;
        let answer = self.transmit(channel, prepared).await?;
        let again = self.device(channel)?.transport_errors != before;
        if answer.status == StatusCode::OK {
            return Ok(Heard::Body { body: answer.body, again });
        }
        Err(SimulatorError::Refused {
            device: self.id(channel),
            what: prepared.message.name().to_owned(),
            status: answer.status.as_u16(),
            body: answer.excerpt(),
        })
    }

    /// Sends it; comes again, as devices do, while the server says that it is not available.
    async fn transmit(&mut self, channel: usize, prepared: &Prepared) -> Result<crate::connection::Answer, SimulatorError> {
        let begin = Instant::now();
        let mut pause = Duration::from_millis(50);
        loop {
            let device = self.channels.get_mut(channel).ok_or_else(no_channel)?;
            let answer = device.transmit(&mut self.connection, prepared).await?;
            if answer.status != StatusCode::SERVICE_UNAVAILABLE || begin.elapsed() + pause > self.options.patience {
                return Ok(answer);
            }
            self.outcome.count("answered 503");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    // --- who ---

    fn device(&self, channel: usize) -> Result<&Device, SimulatorError> {
        self.channels.get(channel).ok_or_else(no_channel)
    }

    fn id(&self, channel: usize) -> String {
        self.queues.ids.get(channel).cloned().unwrap_or_default()
    }

    fn is_awaiting(&self, channel: usize) -> bool {
        self.channels.get(channel).is_some_and(|device| device.awaiting_configuration == Some(true))
    }

    fn an_enrolled_channel(&mut self) -> usize {
        self.a_channel(|expectation| expectation.is_enrolled)
    }

    fn a_channel(&mut self, is_possible: impl Fn(&Expectation) -> bool) -> usize {
        let possible: Vec<usize> =
            self.queues.lock().iter().enumerate().filter(|(_, expectation)| is_possible(expectation)).map(|(channel, _)| channel).collect();
        self.program.choice(possible).unwrap_or_default()
    }

    fn unusable(&self, what: &str, problem: String) -> SimulatorError {
        SimulatorError::Answer { device: self.id(0), what: what.into(), problem }
    }

    fn problem(&mut self, text: impl std::fmt::Display) {
        self.outcome.problem_count += 1;
        if self.outcome.problems.len() < PROBLEMS {
            self.outcome.problems.push(text.to_string());
        }
    }
}

fn no_channel() -> SimulatorError {
    SimulatorError::Argument { name: "channel", problem: "the device has none of that number".into() }
}

/// What renews an identity: the profile with which the device is enrolled, again.
fn enrollment_profile() -> Result<Vec<u8>, SimulatorError> {
    let mut profile = Dictionary::new();
    profile.insert("PayloadIdentifier".into(), "example.enrollment".into());
    profile.insert("PayloadType".into(), "Configuration".into());
    profile.insert("PayloadVersion".into(), 1.into());
    profile.insert("PayloadContent".into(), Value::Array(Vec::new()));
    crate::message::to_xml(profile).map(|bytes| bytes.to_vec())
}
