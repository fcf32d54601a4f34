//! One simulated device: who it is, what it says, how it answers.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use plist::{Dictionary, Value};
use wasmdm_protocol::enrollment::EnrollmentKind;

use crate::authority::{Authority, Identity, derive, derive_uuid};
use crate::behaviour::{Answering, Behaviour};
use crate::canary::{MARK, marked};
use crate::connection::{Answer, Connection, MDM_SIGNATURE};
use crate::error::SimulatorError;
use crate::journal::{JournalWriter, hex};
use crate::message::{CHECK_IN_CONTENT_TYPE, Message, MessageKind, ReceivedCommand};
use crate::signer::{self, SignatureForm};

mod answers;
mod check_ins;

/// The most commands that one session may deliver: beyond it the server is repeating itself.
const SESSION_LIMIT: usize = 10_000;

/// What the device is. It decides the form of the UDID, the names it gives, and whether it has an unlock token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Product {
    /// A portable Mac.
    #[default]
    Mac,
    /// An iPhone.
    Iphone,
    /// An iPad.
    Ipad,
}

/// How the device proves who it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proof {
    /// It signs each message in `Mdm-Signature`.
    Signature(SignatureForm),
    /// A proxy that has checked its certificate passes it on in this header (RFC 9440).
    CertificateHeader(HeaderName),
    /// Not at all.
    None,
}

impl Default for Proof {
    fn default() -> Self {
        Self::Signature(SignatureForm::APPLE)
    }
}

/// What distinguishes a device from the default one.
#[derive(Debug, Clone, Default)]
pub struct DeviceOptions {
    /// Which of the five kinds its channel is.
    pub kind: Option<EnrollmentKind>,
    /// What it is; by the kind, if not given.
    pub product: Option<Product>,
    /// Its proof of identity.
    pub proof: Proof,
    /// How it answers.
    pub behaviour: Behaviour,
    /// Its serial number begins so.
    pub serial_prefix: Option<String>,
    /// Its whole serial number.
    pub serial_number: Option<String>,
    /// Its push topic, if it is not the authority's.
    pub topic: Option<String>,
    /// Whether it is a Shared iPad, which has no unlock token.
    pub is_shared: bool,
    /// What it says about waiting in the Setup Assistant.
    pub awaiting_configuration: Option<bool>,
    /// Where its messages are written down.
    pub journal: Option<Arc<JournalWriter>>,
    /// Whether and how long a message is sent again when no answer came.
    pub retry: RetryPolicy,
}

/// How an answer gets lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// The server has sent it, and the device has gone.
    Unread,
    /// The device hangs up before the server has answered.
    Cut,
}

/// What a device does when no answer comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RetryPolicy {
    /// How long it goes on trying; zero is once.
    pub patience: Duration,
}

/// How one command ended in one session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnsweredCommand {
    /// `CommandUUID`
    pub uuid: String,
    /// `RequestType`
    pub request_type: String,
    /// The `Status` that was reported; `None` if the device never answers it.
    pub status: Option<String>,
}

/// What happened between an Idle and the empty answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Session {
    /// The commands in the order in which they came.
    pub commands: Vec<AnsweredCommand>,
    /// Requests that were answered.
    pub requests: u64,
}

impl Session {
    /// Whether the device would come back by itself: its last word was `NotNow`.
    pub fn ended_with_not_now(&self) -> bool {
        self.commands.last().is_some_and(|command| command.status.as_deref() == Some("NotNow"))
    }
}

/// A message with its headers, signed.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// What is sent.
    pub message: Message,
    /// Content type and proof.
    pub headers: HeaderMap,
}

fn secret_uuid(seed: u64, label: &str, number: u64) -> String {
    format!("{MARK}-{}", derive_uuid(seed, label, number).hyphenated().to_string().to_uppercase())
}

/// A simulated device, or one user's channel of it.
#[derive(Debug)]
pub struct Device {
    /// Its number in the fleet.
    pub number: u64,
    /// Its certificate and key. May be replaced, as a device that enrolls again replaces it.
    pub identity: Identity,
    /// Which of the five kinds its channel is.
    pub kind: EnrollmentKind,
    /// What it is.
    pub product: Product,
    /// `UDID`, also for user channels; User Enrollments never say it.
    pub udid: String,
    /// `EnrollmentID` of a User Enrollment.
    pub enrollment_id: String,
    /// `UserID` or `EnrollmentUserID` of user channels.
    pub user_id: String,
    /// `UserShortName` of user channels.
    pub user_short_name: String,
    /// `UserLongName` of user channels.
    pub user_long_name: String,
    /// `SerialNumber`
    pub serial_number: String,
    /// `Topic`
    pub topic: String,
    /// `PushMagic`
    pub push_magic: String,
    /// `Token`
    pub token: Vec<u8>,
    /// What it says about waiting in the Setup Assistant.
    pub awaiting_configuration: Option<bool>,
    /// Its proof of identity.
    pub proof: Proof,
    /// How it answers.
    pub behaviour: Behaviour,
    /// Every command in the order of first delivery.
    pub received: Vec<String>,
    /// Identifiers of the profiles that were installed.
    pub profiles: Vec<String>,
    /// Requests for which no answer came.
    pub transport_errors: u64,
    seed: u64,
    is_shared: bool,
    journal: Option<Arc<JournalWriter>>,
    retry: RetryPolicy,
    deliveries: HashMap<String, Delivered>,
    prepared: HashMap<String, Prepared>,
    prepared_idle: Option<Prepared>,
    certificate_header: Option<HeaderValue>,
}

#[derive(Debug, Default, Clone)]
struct Delivered {
    times: u32,
    not_now: u32,
    is_first: bool,
}

impl Device {
    /// Device number `number` of the authority's fleet: a Mac on its own channel that acknowledges everything.
    pub fn new(authority: &Authority, number: u64) -> Result<Self, SimulatorError> {
        Self::with_options(authority, number, DeviceOptions::default())
    }

    /// The same with options.
    pub fn with_options(authority: &Authority, number: u64, options: DeviceOptions) -> Result<Self, SimulatorError> {
        let seed = authority.seed();
        let kind = options.kind.unwrap_or(EnrollmentKind::Device);
        let product = options.product.unwrap_or(match kind {
            EnrollmentKind::SharedIpad => Product::Ipad,
            EnrollmentKind::UserEnrollmentDevice => Product::Iphone,
            EnrollmentKind::Device | EnrollmentKind::User | EnrollmentKind::UserEnrollment => Product::Mac,
        });
        let derived = |label: &str| derive_uuid(seed, label, number).hyphenated().to_string().to_uppercase();
        let udid = match product {
            Product::Mac => derived("udid"),
            Product::Iphone => format!("00008130-{}", upper_hex(&derive(seed, "udid", number), 8)),
            Product::Ipad => format!("00008132-{}", upper_hex(&derive(seed, "udid", number), 8)),
        };
        let (user_id, user_short_name) = match kind {
            EnrollmentKind::SharedIpad => ("FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF".to_owned(), format!("student{number}@school.example")),
            _ => (derived("user"), format!("user{number}")),
        };
        let serial_number = options.serial_number.unwrap_or_else(|| {
            let prefix = options.serial_prefix.as_deref().unwrap_or("SIM");
            format!("{prefix}{number:07}")
        });
        let identity = authority.issue(number, serial_number.as_str())?;
        Ok(Self {
            number,
            identity,
            kind,
            product,
            udid,
            enrollment_id: derived("enrollment"),
            user_id,
            user_short_name,
            user_long_name: format!("Simulated User {number}"),
            serial_number,
            topic: options.topic.unwrap_or_else(|| authority.topic().to_owned()),
            push_magic: secret_uuid(seed, "push magic", number),
            token: marked(derive(seed, "token", number)),
            awaiting_configuration: options.awaiting_configuration,
            proof: options.proof,
            behaviour: options.behaviour,
            received: Vec::new(),
            profiles: Vec::new(),
            transport_errors: 0,
            seed,
            is_shared: options.is_shared,
            journal: options.journal,
            retry: options.retry,
            deliveries: HashMap::new(),
            prepared: HashMap::new(),
            prepared_idle: None,
            certificate_header: None,
        })
    }

    /// The enrollment's id as servers write it: `DEVICE`, `DEVICE:USER` or `DEVICE:SHORTNAME`.
    pub fn id(&self) -> String {
        match self.kind {
            EnrollmentKind::Device | EnrollmentKind::UserEnrollmentDevice => self.device_id().into(),
            EnrollmentKind::User | EnrollmentKind::UserEnrollment => {
                format!("{}:{}", self.device_id(), self.user_id)
            }
            EnrollmentKind::SharedIpad => {
                format!("{}:{}", self.device_id(), self.user_short_name)
            }
        }
    }

    /// The id of the device's own channel.
    pub fn device_id(&self) -> &str {
        match self.kind {
            EnrollmentKind::UserEnrollmentDevice | EnrollmentKind::UserEnrollment => &self.enrollment_id,
            EnrollmentKind::Device | EnrollmentKind::User | EnrollmentKind::SharedIpad => &self.udid,
        }
    }

    // --- what it says ---

    /// The identifying keys of the device's own channel.
    fn device_identifiers(&self) -> Dictionary {
        let mut keys = Dictionary::new();
        match self.kind {
            EnrollmentKind::UserEnrollmentDevice | EnrollmentKind::UserEnrollment => {
                keys.insert("EnrollmentID".into(), self.enrollment_id.as_str().into());
            }
            EnrollmentKind::Device | EnrollmentKind::User | EnrollmentKind::SharedIpad => {
                keys.insert("UDID".into(), self.udid.as_str().into());
            }
        }
        keys
    }

    /// The identifying keys of its channel.
    fn identifiers(&self) -> Dictionary {
        let mut keys = self.device_identifiers();
        match self.kind {
            EnrollmentKind::User | EnrollmentKind::SharedIpad => {
                keys.insert("UserID".into(), self.user_id.as_str().into());
                keys.insert("UserShortName".into(), self.user_short_name.as_str().into());
                keys.insert("UserLongName".into(), self.user_long_name.as_str().into());
            }
            EnrollmentKind::UserEnrollment => {
                keys.insert("EnrollmentUserID".into(), self.user_id.as_str().into());
                keys.insert("UserShortName".into(), self.user_short_name.as_str().into());
                keys.insert("UserLongName".into(), self.user_long_name.as_str().into());
            }
            EnrollmentKind::Device | EnrollmentKind::UserEnrollmentDevice => {}
        }
        keys
    }

    /// `Authenticate`, always on the device's own channel.
    pub fn authenticate(&self) -> Result<Message, SimulatorError> {
        let mut keys = self.device_identifiers();
        keys.insert("Topic".into(), self.topic.as_str().into());
        keys.insert("DeviceName".into(), self.device_name().into());
        keys.insert("OSVersion".into(), self.os_version().into());
        keys.insert("BuildVersion".into(), self.build_version().into());
        keys.insert("Model".into(), self.model().into());
        keys.insert("ModelName".into(), self.model_name().into());
        keys.insert("ProductName".into(), self.product_name().into());
        // User Enrollments keep serial number and UDID to themselves.
        if !self.is_user_enrollment() {
            keys.insert("SerialNumber".into(), self.serial_number.as_str().into());
        }
        Message::check_in("Authenticate", keys).map(Message::for_device_channel)
    }

    /// `TokenUpdate` of its channel.
    pub fn token_update(&self) -> Result<Message, SimulatorError> {
        self.token_update_of(self.identifiers(), self.push_magic.as_str(), &self.token)
    }

    fn device_channel_token_update(&self) -> Result<Message, SimulatorError> {
        if self.kind.is_device_channel() {
            return self.token_update();
        }
        let magic = secret_uuid(self.seed, "device push magic", self.number);
        let token = marked(derive(self.seed, "device token", self.number));
        self.token_update_of(self.device_identifiers(), &magic, &token).map(Message::for_device_channel)
    }

    fn token_update_of(&self, mut keys: Dictionary, push_magic: &str, token: &[u8]) -> Result<Message, SimulatorError> {
        let is_device_channel = !keys.contains_key("UserID") && !keys.contains_key("EnrollmentUserID");
        keys.insert("Topic".into(), self.topic.as_str().into());
        keys.insert("PushMagic".into(), push_magic.into());
        keys.insert("Token".into(), Value::Data(token.to_vec()));
        if let Some(awaiting) = self.awaiting_configuration {
            keys.insert("AwaitingConfiguration".into(), awaiting.into());
        }
        // Only a device that can be unlocked from afar has one: not Macs, User Enrollments or Shared iPads.
        if is_device_channel && self.kind == EnrollmentKind::Device && self.product != Product::Mac && !self.is_shared {
            let token = marked(derive(self.seed, "unlock token", self.number));
            keys.insert("UnlockToken".into(), Value::Data(token));
        }
        if !is_device_channel && self.product == Product::Mac {
            keys.insert("NotOnConsole".into(), false.into());
        }
        Message::check_in("TokenUpdate", keys)
    }

    /// Takes another push token and magic, as devices do now and then; the next `TokenUpdate` says so.
    pub fn rotate_push_token(&mut self, generation: u64) {
        let number = self.number.rotate_left(32) ^ generation;
        self.push_magic = secret_uuid(self.seed, "rotated push magic", number);
        self.token = marked(derive(self.seed, "rotated token", number));
    }

    /// `CheckOut` of its channel.
    pub fn check_out(&self) -> Result<Message, SimulatorError> {
        let mut keys = self.identifiers();
        keys.insert("Topic".into(), self.topic.as_str().into());
        Message::check_in("CheckOut", keys)
    }

    /// The bootstrap token that the device would escrow.
    pub fn bootstrap_token(&self) -> Vec<u8> {
        marked(derive(self.seed, "bootstrap token", self.number))
    }

    /// `SetBootstrapToken`; without a token it deletes the escrowed one.
    pub fn set_bootstrap_token(&self, token: Option<&[u8]>) -> Result<Message, SimulatorError> {
        let mut keys = self.device_identifiers();
        if let Some(token) = token {
            keys.insert("BootstrapToken".into(), Value::Data(token.to_vec()));
        }
        if let Some(awaiting) = self.awaiting_configuration {
            keys.insert("AwaitingConfiguration".into(), awaiting.into());
        }
        Message::check_in("SetBootstrapToken", keys).map(Message::for_device_channel)
    }

    /// `GetBootstrapToken`
    pub fn get_bootstrap_token(&self) -> Result<Message, SimulatorError> {
        Message::check_in("GetBootstrapToken", self.device_identifiers()).map(Message::for_device_channel)
    }

    /// `DeclarativeManagement` to an endpoint, with data or without.
    pub fn declarative_management(&self, endpoint: &str, data: Option<&[u8]>) -> Result<Message, SimulatorError> {
        let mut keys = self.identifiers();
        keys.insert("Endpoint".into(), endpoint.into());
        if let Some(data) = data {
            keys.insert("Data".into(), Value::Data(data.to_vec()));
        }
        Message::check_in("DeclarativeManagement", keys)
    }

    /// `UserAuthenticate`, the first without a digest, the second with one.
    pub fn user_authenticate(&self, digest: Option<&str>) -> Result<Message, SimulatorError> {
        let mut keys = self.identifiers();
        keys.insert("DigestResponse".into(), digest.unwrap_or_default().into());
        Message::check_in("UserAuthenticate", keys)
    }

    /// `GetToken` for a service.
    pub fn get_token(&self, service_type: &str) -> Result<Message, SimulatorError> {
        let mut keys = self.identifiers();
        keys.insert("TokenServiceType".into(), service_type.into());
        Message::check_in("GetToken", keys)
    }

    /// `ReturnToService`
    pub fn return_to_service(&self) -> Result<Message, SimulatorError> {
        Message::check_in("ReturnToService", self.device_identifiers()).map(Message::for_device_channel)
    }

    /// The poll with which a session begins.
    pub fn idle(&self) -> Result<Message, SimulatorError> {
        Message::report("Idle", None, self.identifiers())
    }

    /// A bare report on a command.
    pub fn report(&self, status: &str, command_uuid: &str) -> Result<Message, SimulatorError> {
        Message::report(status, Some(command_uuid), self.identifiers())
    }

    /// The report of a device that did what it was told, with what such a device answers.
    pub fn acknowledgement(&self, command: &ReceivedCommand) -> Result<Message, SimulatorError> {
        let mut keys = self.identifiers();
        for (key, value) in self.answer_to(&command.request_type, &command.command) {
            keys.insert(key, value);
        }
        Message::report("Acknowledged", Some(&command.uuid), keys)
    }

    /// The report of a device that failed.
    pub fn error_report(&self, command_uuid: &str) -> Result<Message, SimulatorError> {
        let mut keys = self.identifiers();
        keys.insert("ErrorChain".into(), error_chain());
        Message::report("Error", Some(command_uuid), keys)
    }

    /// A report that no parser accepts, of which identifier and command can be read all the same. Both may be somebody else's.
    pub fn malformed_report(&self, device_id: &str, command_uuid: &str) -> Message {
        let key = if self.is_user_enrollment() { "EnrollmentID" } else { "UDID" };
        let body = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<plist version=\"1.0\">\n<dict>\n\t<key>CommandUUID</key>\n\t\
             <string>{command_uuid}</string>\n\t<key>Status</key>\n\t<string>Acknowledged</string>\n\t<key>{key}</key>\n\t\
             <string>{device_id}</string>\n\t<key>QueryResponses</key>\n\t<dict>\n\t\t<key>DeviceName</key>\n"
        );
        let mut message = Message::raw_report(body);
        message.kind = MessageKind::Report { status: "malformed".into(), command_uuid: Some(command_uuid.into()) };
        message
    }

    // --- what it does ---

    /// Signs a message, or adds the certificate's header.
    pub fn prepare(&mut self, message: Message) -> Result<Prepared, SimulatorError> {
        let mut headers = HeaderMap::with_capacity(4);
        headers.insert(
            http::header::USER_AGENT,
            HeaderValue::from_static(match self.product {
                Product::Mac => "MDM-OSX/1.0 mdmclient/1090",
                Product::Iphone | Product::Ipad => "MDM/1.0",
            }),
        );
        if message.is_check_in() {
            headers.insert(http::header::CONTENT_TYPE, HeaderValue::from_static(CHECK_IN_CONTENT_TYPE));
        }
        match &self.proof {
            Proof::Signature(form) => {
                let value = signer::sign(&self.identity, &message.body, *form)?;
                headers.insert(MDM_SIGNATURE, header_value(&value)?);
            }
            Proof::CertificateHeader(name) => {
                let value = match &self.certificate_header {
                    Some(value) => value.clone(),
                    None => header_value(&self.identity.rfc9440())?,
                };
                self.certificate_header = Some(value.clone());
                headers.insert(name.clone(), value);
            }
            Proof::None => {}
        }
        Ok(Prepared { message, headers })
    }

    /// Writes its messages down elsewhere from now on, or nowhere.
    pub fn set_journal(&mut self, journal: Option<Arc<JournalWriter>>) {
        self.journal = journal;
    }

    /// Takes another identity, as a device that enrolls again or whose certificate was renewed.
    pub fn replace_identity(&mut self, identity: Identity) {
        self.identity = identity;
        self.certificate_header = None;
        self.prepared.clear();
        self.prepared_idle = None;
    }

    /// Signs the Idle poll now, so that polling later costs no signature.
    pub fn prepare_idle(&mut self) -> Result<(), SimulatorError> {
        let message = self.idle()?;
        self.prepared_idle = Some(self.prepare(message)?);
        Ok(())
    }

    /// Signs the acknowledgement of a command that is still to come, so that answering it later costs no signature.
    pub fn prepare_acknowledgement(&mut self, command_document: &Bytes) -> Result<(), SimulatorError> {
        let command = ReceivedCommand::parse(command_document).map_err(|problem| SimulatorError::Answer {
            device: self.id(),
            what: "preparing".into(),
            problem,
        })?;
        let message = self.acknowledgement(&command)?;
        let prepared = self.prepare(message)?;
        self.prepared.insert(command.uuid, prepared);
        Ok(())
    }

    /// Signs and sends a message; answers whatever the server answers.
    pub async fn send(&mut self, connection: &mut Connection, message: Message) -> Result<Answer, SimulatorError> {
        let prepared = self.prepare(message)?;
        self.transmit(connection, &prepared).await
    }

    /// Sends what was signed before. Tries again for as long as the retry policy says while no answer comes at all.
    pub async fn transmit(&mut self, connection: &mut Connection, prepared: &Prepared) -> Result<Answer, SimulatorError> {
        let speaker = if prepared.message.on_device_channel { self.device_id().to_owned() } else { self.id() };
        let begin = tokio::time::Instant::now();
        let mut pause = Duration::from_millis(20);
        loop {
            let request = match &self.journal {
                Some(journal) => Some(journal.record_request(&speaker, &prepared.message)?),
                None => None,
            };
            let path = connection.target().path(prepared.message.is_check_in()).clone();
            let outcome = connection.request(Method::PUT, path, prepared.headers.clone(), prepared.message.body.clone()).await;
            match outcome {
                Ok(answer) => {
                    if let (Some(journal), Some(request)) = (&self.journal, request) {
                        journal.record_answer(request, &speaker, &answer)?;
                    }
                    return Ok(answer);
                }
                Err(error) if error.is_transport() => {
                    self.transport_errors += 1;
                    if let (Some(journal), Some(request)) = (&self.journal, request) {
                        journal.record_lost(request);
                    }
                    if begin.elapsed() + pause > self.retry.patience {
                        return Err(error);
                    }
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_millis(500));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends what was signed before and never learns the answer: it arrives and is not read, or the connection is cut before it comes.
    pub async fn transmit_and_lose(&mut self, connection: &mut Connection, prepared: &Prepared, loss: Loss) -> Result<(), SimulatorError> {
        let speaker = if prepared.message.on_device_channel { self.device_id().to_owned() } else { self.id() };
        let request = match &self.journal {
            Some(journal) => Some(journal.record_request(&speaker, &prepared.message)?),
            None => None,
        };
        let path = connection.target().path(prepared.message.is_check_in()).clone();
        match loss {
            Loss::Unread => {
                // What became of it is not looked at.
                let _ = connection.request(Method::PUT, path, prepared.headers.clone(), prepared.message.body.clone()).await;
                connection.close();
            }
            Loss::Cut => connection.abandon(&Method::PUT, &path, &prepared.headers, &prepared.message.body).await,
        }
        if let (Some(journal), Some(request)) = (&self.journal, request) {
            journal.record_lost(request);
        }
        Ok(())
    }

    /// Sends a message that only 200 lets the device go on from; answers the body.
    pub async fn insist(&mut self, connection: &mut Connection, message: Message) -> Result<Bytes, SimulatorError> {
        let prepared = self.prepare(message)?;
        self.insist_prepared(connection, &prepared).await
    }

    async fn insist_prepared(&mut self, connection: &mut Connection, prepared: &Prepared) -> Result<Bytes, SimulatorError> {
        let answer = self.transmit(connection, prepared).await?;
        if answer.status == StatusCode::OK {
            return Ok(answer.body);
        }
        Err(SimulatorError::Refused {
            device: self.id(),
            what: prepared.message.name().to_owned(),
            status: answer.status.as_u16(),
            body: answer.excerpt(),
        })
    }

    /// The messages with which this channel enrolls: Authenticate and TokenUpdate, for a user's channel its own TokenUpdate too.
    pub fn enrollment_messages(&self) -> Result<Vec<Message>, SimulatorError> {
        let mut messages = vec![self.authenticate()?, self.device_channel_token_update()?];
        if !self.kind.is_device_channel() {
            messages.push(self.token_update()?);
        }
        Ok(messages)
    }

    /// Enrolls. Anything but 200 is an error, and ends it.
    pub async fn enroll(&mut self, connection: &mut Connection) -> Result<(), SimulatorError> {
        for message in self.enrollment_messages()? {
            self.insist(connection, message).await?;
        }
        self.forget_commands();
        Ok(())
    }

    /// Sends messages that were signed before, as enrolling does.
    pub async fn enroll_prepared(&mut self, connection: &mut Connection, messages: &[Prepared]) -> Result<(), SimulatorError> {
        for prepared in messages {
            self.insist_prepared(connection, prepared).await?;
        }
        self.forget_commands();
        Ok(())
    }

    fn forget_commands(&mut self) {
        self.deliveries.clear();
        self.received.clear();
    }

    /// Leaves.
    pub async fn leave(&mut self, connection: &mut Connection) -> Result<(), SimulatorError> {
        let message = self.check_out()?;
        self.insist(connection, message).await.map(|_| ())
    }

    /// Escrows its bootstrap token.
    pub async fn escrow_bootstrap_token(&mut self, connection: &mut Connection) -> Result<(), SimulatorError> {
        let token = self.bootstrap_token();
        let message = self.set_bootstrap_token(Some(&token))?;
        self.insist(connection, message).await.map(|_| ())
    }

    /// One session: Idle, then an answer to each command, until the server has nothing more to say or the device stays silent.
    pub async fn poll_until_idle(&mut self, connection: &mut Connection) -> Result<Session, SimulatorError> {
        let mut session = Session::default();
        let mut next = if let Some(prepared) = &self.prepared_idle {
            prepared.clone()
        } else {
            let message = self.idle()?;
            self.prepare(message)?
        };
        loop {
            let what = next.message.name().to_owned();
            let body = self.insist_prepared(connection, &next).await?;
            session.requests += 1;
            if body.is_empty() {
                return Ok(session);
            }
            let unusable = |problem: String| SimulatorError::Answer { device: String::new(), what: what.clone(), problem };
            if session.commands.len() >= SESSION_LIMIT {
                return Err(self.named(unusable(format!("more than {SESSION_LIMIT} commands in one session"))));
            }
            let command = ReceivedCommand::parse(&body).map_err(|problem| self.named(unusable(problem)))?;
            let answer = self.answer(&command)?;
            session.commands.push(AnsweredCommand {
                uuid: command.uuid,
                request_type: command.request_type,
                status: answer.as_ref().map(|prepared| prepared.message.name().to_owned()),
            });
            let Some(prepared) = answer else {
                // A device that goes away in the middle closes its connection.
                connection.close();
                return Ok(session);
            };
            next = prepared;
        }
    }

    /// Sessions until one brings no command, or only ones that are deferred or never answered. At most `limit` sessions.
    pub async fn poll_until_done(&mut self, connection: &mut Connection, limit: usize) -> Result<Vec<Session>, SimulatorError> {
        let mut sessions = Vec::new();
        for _ in 0..limit {
            let session = self.poll_until_idle(connection).await?;
            let is_silent = session.commands.last().is_some_and(|command| command.status.is_none());
            let is_empty = session.commands.is_empty();
            sessions.push(session);
            if is_empty || is_silent {
                break;
            }
        }
        Ok(sessions)
    }

    fn named(&self, error: SimulatorError) -> SimulatorError {
        match error {
            SimulatorError::Answer { what, problem, .. } => SimulatorError::Answer { device: self.id(), what, problem },
            other => other,
        }
    }

    /// How often each command was delivered to it.
    pub fn deliveries(&self) -> BTreeMap<&str, u32> {
        self.deliveries.iter().map(|(uuid, delivered)| (uuid.as_str(), delivered.times)).collect()
    }

    /// The device's answer to a command by its plan; `None` if it stays silent.
    pub fn answer(&mut self, command: &ReceivedCommand) -> Result<Option<Prepared>, SimulatorError> {
        let is_first = self.received.is_empty();
        let delivered = self.deliveries.entry(command.uuid.clone()).or_default();
        if delivered.times == 0 {
            delivered.is_first = is_first;
            self.received.push(command.uuid.clone());
        }
        delivered.times += 1;
        let plan = self.behaviour.plan(&command.request_type, &command.uuid, delivered.is_first);
        let message = match plan {
            Answering::NotNow { times } if delivered.not_now < times => {
                delivered.not_now += 1;
                self.report("NotNow", &command.uuid)?
            }
            Answering::Acknowledge | Answering::NotNow { .. } => {
                self.take_effect(command);
                if let Some(prepared) = self.prepared.remove(&command.uuid) {
                    return Ok(Some(prepared));
                }
                self.acknowledgement(command)?
            }
            Answering::Error => self.error_report(&command.uuid)?,
            Answering::CommandFormatError => self.report("CommandFormatError", &command.uuid)?,
            Answering::Never => return Ok(None),
        };
        self.prepare(message).map(Some)
    }

    /// What a command changes about the device.
    pub(crate) fn take_effect(&mut self, command: &ReceivedCommand) {
        match command.request_type.as_str() {
            "DeviceConfigured" | "UserConfigured" if self.awaiting_configuration.is_some() => {
                self.awaiting_configuration = Some(false);
            }
            "InstallProfile" => {
                if let Some(identifier) = answers::profile_identifier(&command.command)
                    && !self.profiles.contains(&identifier)
                {
                    self.profiles.push(identifier);
                }
            }
            "RemoveProfile" => {
                let identifier = command.command.get("Identifier").and_then(Value::as_string);
                self.profiles.retain(|profile| Some(profile.as_str()) != identifier);
            }
            _ => {}
        }
    }

    const fn is_user_enrollment(&self) -> bool {
        matches!(self.kind, EnrollmentKind::UserEnrollment | EnrollmentKind::UserEnrollmentDevice)
    }
}

fn error_chain() -> Value {
    let mut link = Dictionary::new();
    link.insert("ErrorCode".into(), 12021.into());
    link.insert("ErrorDomain".into(), "MCMDMErrorDomain".into());
    link.insert("LocalizedDescription".into(), "The request could not be carried out.".into());
    link.insert("USEnglishDescription".into(), "The request could not be carried out.".into());
    Value::Array(vec![Value::Dictionary(link)])
}

fn upper_hex(bytes: &[u8], count: usize) -> String {
    hex(bytes.get(..count).unwrap_or(bytes)).to_uppercase()
}

fn header_value(text: &str) -> Result<HeaderValue, SimulatorError> {
    HeaderValue::from_str(text).map_err(|error| SimulatorError::cryptography("header", error))
}

/// Basic credentials as a header's value.
pub(crate) fn basic(user: &str, password: &str) -> Result<HeaderValue, SimulatorError> {
    let mut value = header_value(&format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))?;
    value.set_sensitive(true);
    Ok(value)
}
