//! What fuzzing starts from: messages, signatures and certificates of simulated devices, all of them made here.
//!
//! `cargo run -p wasmdm-fuzz -- corpus` writes the folder; a test holds it against what is made here. Property lists follow from the seed
//! to the byte. Certificates and signatures do so but for random numbers within, so of those the committed ones stay until the folder is
//! written again.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use plist::{Dictionary, Value};
use wasmdm_protocol::enrollment::EnrollmentKind;
use wasmdm_protocol::{json, plist as guarded};
use wasmdm_simulator::authority::CertificateRequest;
use wasmdm_simulator::device::DeviceOptions;
use wasmdm_simulator::message::{ReceivedCommand, command_document};
use wasmdm_simulator::signer::{Attributes, SignatureForm, sign_der};
use wasmdm_simulator::{Authority, Device, KeyType, Message, SimulatorError};

use crate::signature::{LONG_BODY, SEPARATOR, SHORT_BODY};
use crate::{Target, corpus_folder};

/// Of the authority whose devices speak here.
const SEED: u64 = 20_260;

/// One file.
#[derive(Debug, Clone)]
pub struct Seed {
    /// Whose it is.
    pub target: Target,
    /// The file's name.
    pub name: String,
    /// Its content.
    pub bytes: Bytes,
    /// Whether it is the same to the byte whenever it is made.
    pub reproducible: bool,
}

/// All files of the corpus.
pub fn make() -> Result<Vec<Seed>, SimulatorError> {
    let authority = Authority::new(SEED)?;
    let mut seeds = Vec::new();
    let mut add = |target, name: String, bytes: Bytes, reproducible| seeds.push(Seed { target, name, bytes, reproducible });
    for (name, message) in check_ins(&authority)? {
        add(Target::CheckIn, format!("{name}.plist"), message.body.clone(), true);
        add(Target::CheckIn, format!("{name}.bplist"), message.into_binary()?.body, true);
    }
    for endpoint in ["tokens", "declaration-items", "status", "declaration/configuration/com.example.a_b-c:1", "declaration/asset/a%20b;c=d?e#f ü"] {
        let name: String = endpoint.chars().map(|character| if character.is_ascii_alphanumeric() { character } else { '-' }).collect();
        add(Target::CheckIn, format!("endpoint-{name}.txt"), endpoint.into(), true);
    }
    for (name, message) in reports(&authority)? {
        let reproducible = !name.ends_with("CertificateList");
        add(Target::Report, format!("{name}.plist"), message.body.clone(), reproducible);
        if let Ok(message) = message.into_binary() {
            add(Target::Report, format!("{name}.bplist"), message.body, reproducible);
        }
    }
    let values = values(&authority)?;
    for (name, value) in &values {
        add(Target::PropertyList, format!("{name}.plist"), guarded::to_xml(value), true);
        add(Target::PropertyList, format!("{name}.bplist"), binary(value)?, true);
        add(Target::Json, format!("{name}.json"), json::to_json(value).to_string().into(), true);
    }
    add(Target::Json, "status-report.json".into(), STATUS_REPORT.into(), true);
    for (name, identity) in identities(&authority)? {
        let reproducible = false;
        add(Target::Certificate, format!("{name}.der"), identity.clone(), reproducible);
        add(Target::Certificate, format!("{name}.rfc9440"), format!(":{}:", STANDARD.encode(&identity)).into(), reproducible);
        let pem = format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", STANDARD.encode(&identity));
        let escaped: String = url::form_urlencoded::byte_serialize(pem.as_bytes()).collect();
        add(Target::Certificate, format!("{name}.pem-escaped"), escaped.into(), reproducible);
    }
    for (name, cms, body) in signatures(&authority)? {
        add(Target::Signature, format!("{name}.cms"), [cms.as_slice(), SEPARATOR, &body].concat().into(), false);
    }
    Ok(seeds)
}

/// Writes the corpus; what is in its folders already and not part of it is removed.
pub fn write() -> std::io::Result<usize> {
    let seeds = make().map_err(std::io::Error::other)?;
    for target in Target::ALL {
        let folder = corpus_folder(target);
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::create_dir_all(&folder)?;
    }
    for seed in &seeds {
        std::fs::write(corpus_folder(seed.target).join(&seed.name), &seed.bytes)?;
    }
    Ok(seeds.len())
}

const STATUS_REPORT: &str = r#"{"StatusItems":{"mdm":{"push-magic":"magic","push-token":"dG9rZW4=","app":[{"identifier":"com.example","state":"managed"}]},"device":{"model":{"family":"Mac"}},"test.push-magic":1},"Errors":[]}"#;

const KINDS: [EnrollmentKind; 5] = EnrollmentKind::ALL;

fn device(authority: &Authority, kind: EnrollmentKind) -> Result<Device, SimulatorError> {
    let options = DeviceOptions { kind: Some(kind), awaiting_configuration: Some(true), ..DeviceOptions::default() };
    Device::with_options(authority, 1, options)
}

fn check_ins(authority: &Authority) -> Result<Vec<(String, Message)>, SimulatorError> {
    let mut found = Vec::new();
    for kind in KINDS {
        let device = device(authority, kind)?;
        let mut messages = vec![device.token_update()?, device.check_out()?];
        if kind.is_device_channel() {
            messages.push(device.authenticate()?);
        }
        found.extend(messages.into_iter().map(|message| (format!("{}-{}", message.name(), kind.as_str()), message)));
    }
    let device = device(authority, EnrollmentKind::User)?;
    let named = [
        ("UserAuthenticate-first", device.user_authenticate(None)?),
        ("UserAuthenticate-second", device.user_authenticate(Some("Digest username=\"a\", response=\"b\""))?),
        ("SetBootstrapToken", device.set_bootstrap_token(Some(&device.bootstrap_token()))?),
        ("SetBootstrapToken-none", device.set_bootstrap_token(None)?),
        ("GetBootstrapToken", device.get_bootstrap_token()?),
        ("DeclarativeManagement-tokens", device.declarative_management("tokens", None)?),
        ("DeclarativeManagement-status", device.declarative_management("status", Some(STATUS_REPORT.as_bytes()))?),
        ("GetToken", device.get_token("com.apple.watch.pairing")?),
        ("ReturnToService", device.return_to_service()?),
    ];
    found.extend(named.map(|(name, message)| (name.to_owned(), message)));
    Ok(found)
}

/// What devices of the simulator know an answer to.
const REQUEST_TYPES: [&str; 6] = ["DeviceInformation", "SecurityInfo", "ProfileList", "CertificateList", "InstalledApplicationList", "RestartDevice"];

fn reports(authority: &Authority) -> Result<Vec<(String, Message)>, SimulatorError> {
    let mut found = Vec::new();
    for kind in KINDS {
        let device = device(authority, kind)?;
        found.push((format!("Idle-{}", kind.as_str()), device.idle()?));
        found.push((format!("NotNow-{}", kind.as_str()), device.report("NotNow", "command-1")?));
    }
    let device = device(authority, EnrollmentKind::Device)?;
    for request_type in REQUEST_TYPES {
        let raw = command_document("command-2", request_type, Dictionary::new())?;
        let command = ReceivedCommand::parse(&raw).map_err(SimulatorError::Plist)?;
        found.push((format!("Acknowledged-{request_type}"), device.acknowledgement(&command)?));
    }
    found.push(("Error".into(), device.error_report("command-3")?));
    found.push(("CommandFormatError".into(), device.report("CommandFormatError", "command-4")?));
    found.push(("unknown-status".into(), device.report("Postponed", "command-5")?));
    found.push(("malformed".into(), device.malformed_report(device.device_id(), "command-6")));
    Ok(found)
}

/// Documents that are no messages, but hold every kind of value.
fn values(authority: &Authority) -> Result<Vec<(String, Value)>, SimulatorError> {
    let device = device(authority, EnrollmentKind::Device)?;
    let read = |bytes: &Bytes| guarded::parse(bytes).map_err(|error| SimulatorError::Plist(error.to_string()));
    let date = read(&Bytes::from_static(b"<date>2026-01-02T03:04:05Z</date>"))?;
    let scalars = [
        ("text", "a & <b> \u{fc}\u{1d11e} \"c\"".into()),
        ("line ends", "a\tb\nc".into()),
        ("true", true.into()),
        ("false", false.into()),
        ("integer", 42.into()),
        ("negative", Value::from(-1)),
        ("largest", u64::MAX.into()),
        ("real", 0.5.into()),
        ("date", date),
        ("data", Value::Data((0..=255).collect())),
        ("empty", Value::Data(Vec::new())),
    ];
    let scalars = scalars.map(|(key, value)| (key.to_owned(), value));
    let nested = (0..20).fold(Value::from("inside"), |inner, level| {
        if level % 2 == 0 { Value::Array(vec![inner]) } else { Value::Dictionary(Dictionary::from_iter([("level".to_owned(), inner)])) }
    });
    let forms = ["$data", "$date", "$dictionary", "$integer", "$real", "$redacted"]
        .map(|form| Value::Dictionary(Dictionary::from_iter([(form.to_owned(), Value::from("no form"))])));
    let secrets = ["UnlockToken", "PushMagic", "RecoveryKey", "Configuration"].map(|key| (key.to_owned(), Value::from("secret")));
    let mut found = vec![
        ("scalars".to_owned(), Value::Dictionary(scalars.into_iter().collect())),
        ("nested".to_owned(), nested),
        ("forms".to_owned(), Value::Array(forms.to_vec())),
        ("secrets".to_owned(), Value::Array(vec![Value::Dictionary(secrets.into_iter().collect())])),
        ("token-update".to_owned(), read(&device.token_update()?.body)?),
    ];
    for request_type in REQUEST_TYPES {
        found.push((format!("command-{request_type}"), read(&command_document("command-1", request_type, Dictionary::new())?)?));
    }
    Ok(found)
}

fn binary(value: &Value) -> Result<Bytes, SimulatorError> {
    let mut binary = Vec::new();
    value.to_writer_binary(&mut binary).map_err(|error| SimulatorError::Plist(error.to_string()))?;
    Ok(binary.into())
}

fn identities(authority: &Authority) -> Result<Vec<(String, Bytes)>, SimulatorError> {
    let mut found = vec![("p256-root".to_owned(), authority.root_der().clone())];
    for number in 0..3 {
        found.push((format!("p256-device-{number}"), authority.issue(number, format!("SIM{number:07}"))?.certificate));
    }
    let requests = [
        ("p256-no-name", CertificateRequest { common_name: None, ..CertificateRequest::device(3, "") }),
        ("p256-odd-name", CertificateRequest::device(4, " #a,b+c=\"d\";<e>\\ü")),
        ("p256-no-usage", CertificateRequest { usages: Vec::new(), ..CertificateRequest::device(5, "device") }),
        ("p256-expired", CertificateRequest { not_after: (2025, 1, 1), ..CertificateRequest::device(6, "device") }),
    ];
    for (name, request) in requests {
        found.push((name.to_owned(), authority.issue_as(&request)?.certificate));
    }
    let rsa = Authority::with_keys(SEED, KeyType::Rsa2048, 1)?;
    found.push(("rsa2048-device".to_owned(), rsa.issue(0, "SIM0000000")?.certificate));
    found.push(("rsa2048-root".to_owned(), rsa.root_der().clone()));
    Ok(found)
}

/// Name, CMS and the body that it signs.
type Signed = (String, Vec<u8>, Vec<u8>);

fn signatures(authority: &Authority) -> Result<Vec<Signed>, SimulatorError> {
    let rsa = Authority::with_keys(SEED, KeyType::Rsa2048, 1)?;
    let timed = SignatureForm { attributes: Attributes::Signed { signing_time: Some(*b"260101000000Z") }, ..SignatureForm::MODERN };
    let mut found = Vec::new();
    for (key, identity) in [("rsa2048", rsa.issue(0, "SIM0000000")?), ("p256", authority.issue(0, "SIM0000000")?)] {
        for (number, form) in SignatureForm::all().into_iter().chain([timed]).enumerate() {
            for (length, body) in [("short", SHORT_BODY), ("long", LONG_BODY)] {
                found.push((format!("{key}-form-{number}-{length}"), sign_der(&identity, body, form)?, body.to_vec()));
            }
        }
    }
    Ok(found)
}
