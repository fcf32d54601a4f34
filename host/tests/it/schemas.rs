//! The JSON schemas of the plugin contract, held against what a plugin in a running server is really handed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use boon::{Compiler, SchemaIndex, Schemas};
use plist::{Date, Dictionary, Value};
use serde_json::Value as Json;
use wasmdm_protocol::enrollment::{EnrollmentKind, TenantId};
use wasmdm_simulator::apns::{PushAuthority, PushCertificateRequest};
use wasmdm_simulator::authority::CertificateRequest;
use wasmdm_simulator::canary::{MARK, found_in};
use wasmdm_simulator::{Answering, Authority, Behaviour, Connection, Device, DeviceOptions, Message, Product};

use crate::api::{call_at, enqueue_at, enqueue_with};
use crate::in_process::Server;

pub(crate) const MANIFEST: &str = r#"[plugin]
name = "recorder"
version = "1.0.0"
wasm = "plugin.wasm"

[hooks.lifecycle]
[hooks.enrollment-policy]
[hooks.event-commands]
topics = ["enrollment.enrolled"]
[hooks.event-sink]
topics = ["*", "checkin.*"]
include-self = true
[hooks.schedule]
cron = [{ name = "every-minute", cron = "* * * * *" }]

[requests]
kv = true
enrollments = ["read"]
commands = ["enqueue:DeviceInformation", "enqueue:SecurityInfo"]
"#;
pub(crate) const GRANT: &str = "enabled = true\n[grants]\nkv = { bytes = \"16MiB\" }\nenrollments = [\"read\"]\n\
    commands = [\"enqueue:DeviceInformation\", \"enqueue:SecurityInfo\"]\n";

/// Of the guest that answers check-ins, which keeps what it is handed as well.
const ANSWERING: &str = r#"[plugin]
name = "answering"
version = "1.0.0"
wasm = "plugin.wasm"

[hooks.user-authentication]
[hooks.token-source]
services = ["com.apple.maid", "com.apple.watch.pairing"]
[hooks.return-to-service]

[requests]
kv = true
"#;
const ANSWERING_GRANT: &str = "enabled = true\n[limits]\nanswer = \"20s\"\ncpu = \"2s\"\n[grants]\nkv = { bytes = \"16MiB\" }\n";

/// The plugin of `host/tests/recorder`, built from source.
pub(crate) fn recorder() -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/recorder");
    let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("recorder");
    let mut build = Command::new("cargo");
    build.args(["build", "--release", "--quiet", "--locked", "--target", "wasm32-wasip2", "--target-dir"]).arg(&target).current_dir(folder);
    for variable in ["CARGO_ENCODED_RUSTFLAGS", "RUSTFLAGS"] {
        build.env_remove(variable);
    }
    let output = build.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::read(target.join("wasm32-wasip2/release/recorder.wasm")).unwrap()
}

/// `wit/schemas`, by what its index says they are for.
struct Contract {
    schemas: Schemas,
    compiled: BTreeMap<String, SchemaIndex>,
    index: Json,
}

impl Contract {
    fn load() -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../wit/schemas").canonicalize().unwrap();
        let index: Json = serde_json::from_slice(&std::fs::read(folder.join("index.json")).unwrap()).unwrap();
        let (mut compiler, mut schemas, mut compiled) = (Compiler::new(), Schemas::new(), BTreeMap::new());
        compiler.enable_format_assertions();
        compiler.enable_content_assertions();
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if name != "index.json" {
                let schema = compiler.compile(&path.to_string_lossy(), &mut schemas).unwrap_or_else(|error| panic!("{name}: {error:#}"));
                compiled.insert(name, schema);
            }
        }
        Self { schemas, compiled, index }
    }

    /// Topics that have a schema.
    fn topics(&self) -> BTreeSet<&str> {
        self.index["event_data"].as_object().unwrap().keys().map(String::as_str).collect()
    }

    /// Holds a document against the schema that the index has at that pointer.
    fn check(&self, pointer: &[&str], document: &Json) {
        let entry = pointer.iter().fold(&self.index, |index, key| &index[key]);
        let name = entry.as_str().unwrap_or_else(|| panic!("{pointer:?} has no schema, and {document:#} was handed out"));
        let checked = self.schemas.validate(document, self.compiled[name]);
        if let Err(error) = checked {
            panic!("{name}: {error:#}\n{document:#}");
        }
    }
}

/// What the recorder was handed so far, by key.
pub(crate) async fn recorded(server: &Server) -> BTreeMap<String, Json> {
    recorded_by(server, "recorder").await
}

async fn recorded_by(server: &Server, plugin: &str) -> BTreeMap<String, Json> {
    let (tenant, mut found) = (TenantId::default(), BTreeMap::new());
    loop {
        let after = found.last_key_value().map(|(key, _): (&String, &Json)| key.clone());
        let now = wasmdm_service::clock::Clock::now(&server.clock);
        let pairs = server.running.storage.kv_scan(&tenant, plugin, "", after.as_deref(), 100, now).await.unwrap();
        if pairs.is_empty() {
            return found;
        }
        found.extend(pairs.into_iter().map(|pair| {
            let document = serde_json::from_slice(&pair.value).unwrap_or_else(|error| panic!("{}: {error}: {:?}", pair.key, pair.value));
            (pair.key, document)
        }));
    }
}

fn topics(recorded: &BTreeMap<String, Json>) -> BTreeSet<&str> {
    recorded.keys().filter_map(|key| key.strip_prefix("event/")?.split('/').next()).collect()
}

/// A report with everything that JSON has no word for.
fn odd_report(device: &Device, uuid: &str) -> Message {
    let mut keys = Dictionary::new();
    keys.insert("UDID".into(), device.udid.as_str().into());
    let mut form = Dictionary::new();
    form.insert("$data".into(), "not data".into());
    let mut many = Dictionary::new();
    many.insert("$real".into(), "nan".into());
    many.insert("$date".into(), 7.into());
    let date: Date = Date::from_xml_format("2026-01-31T12:00:00Z").unwrap();
    let values = [
        ("Data", Value::Data(vec![0, 255])),
        ("Date", Value::Date(date)),
        ("Large", Value::from(u64::MAX)),
        ("Small", Value::from(i64::MIN)),
        ("Exact", Value::from(1_u64 << 53)),
        ("Real", Value::Real(0.5)),
        ("NotANumber", Value::Real(f64::NAN)),
        ("Infinite", Value::Real(f64::INFINITY)),
        ("Form", Value::Dictionary(form)),
        ("NoForm", Value::Dictionary(many)),
        ("UnlockToken", Value::Data(MARK.into())),
        ("Empty", Value::Array(vec![Value::Dictionary(Dictionary::new()), Value::Array(vec![])])),
    ];
    for (key, value) in values {
        keys.insert(key.into(), value);
    }
    Message::report("Acknowledged", Some(uuid), keys).unwrap()
}

/// Lets one device of each kind, and one of each temper, live through everything that makes an event.
async fn live(server: &Server, authority: &Authority) {
    let mut connection = Connection::to(&server.url()).unwrap();
    for (number, kind) in EnrollmentKind::ALL.into_iter().enumerate() {
        for product in [Product::Mac, Product::Iphone, Product::Ipad] {
            let options = DeviceOptions {
                kind: Some(kind),
                product: Some(product),
                awaiting_configuration: (kind == EnrollmentKind::Device).then_some(product != Product::Iphone),
                ..DeviceOptions::default()
            };
            let mut device = Device::with_options(authority, (number * 10) as u64 + product as u64, options).unwrap();
            device.enroll(&mut connection).await.unwrap();
            server.quiet().await;
            device.poll_until_idle(&mut connection).await.unwrap();
            if device.awaiting_configuration == Some(true) {
                enqueue_at(&server.url(), &device.id(), &format!("configured-{product:?}"), "DeviceConfigured").await;
                device.poll_until_idle(&mut connection).await.unwrap();
            }
            device.rotate_push_token(1);
            let again = device.token_update().unwrap();
            device.insist(&mut connection, again).await.unwrap();
            // Answered or refused: what matters is what it makes the server tell.
            let parameters =
                [("SecurityToken", "hush"), ("PhoneUDID", "P"), ("WatchUDID", "W")].map(|(key, value)| (key.to_owned(), Value::from(value)));
            let watch = device.get_token_with("com.apple.watch.pairing", parameters.into_iter().collect());
            let others = [device.declarative_management("tokens", None), device.get_token("com.apple.maid"), watch, device.return_to_service()];
            for message in
                others.into_iter().chain([device.user_authenticate(None), device.user_authenticate(Some(MARK)), device.get_bootstrap_token()])
            {
                device.send(&mut connection, message.unwrap()).await.unwrap();
            }
            if kind == EnrollmentKind::Device {
                device.escrow_bootstrap_token(&mut connection).await.unwrap();
                let none = device.set_bootstrap_token(None).unwrap();
                device.insist(&mut connection, none).await.unwrap();
            }
            device.leave(&mut connection).await.unwrap();
        }
    }

    let tempers = [
        Behaviour::acknowledging().with("ProfileList", Answering::Error),
        Behaviour::acknowledging().with("ProfileList", Answering::CommandFormatError),
        Behaviour::acknowledging().with("ProfileList", Answering::NotNow { times: 1 }),
    ];
    for (number, behaviour) in tempers.into_iter().enumerate() {
        let options = DeviceOptions { behaviour, ..DeviceOptions::default() };
        let mut device = Device::with_options(authority, 100 + number as u64, options).unwrap();
        device.enroll(&mut connection).await.unwrap();
        enqueue_at(&server.url(), &device.id(), &format!("temper-{number}"), "ProfileList").await;
        device.poll_until_idle(&mut connection).await.unwrap();
    }

    // Odd and broken reports, then a second enrollment over a queue that is not empty.
    let mut device = Device::new(authority, 200).unwrap();
    device.enroll(&mut connection).await.unwrap();
    for uuid in ["odd", "broken", "never-sent"] {
        enqueue_at(&server.url(), &device.id(), uuid, "ProfileList").await;
    }
    server.quiet().await;
    let idle = device.idle().unwrap();
    device.insist(&mut connection, idle.clone()).await.unwrap();
    device.insist(&mut connection, odd_report(&device, "odd")).await.unwrap();
    device.insist(&mut connection, idle).await.unwrap();
    let broken = device.malformed_report(&device.udid.clone(), "broken");
    device.send(&mut connection, broken).await.unwrap();
    device.enroll(&mut connection).await.unwrap();
    server.quiet().await;

    // Nobody has stored a push certificate.
    call_at(&server.url(), http::Method::GET, &format!("/v1/push/{}", device.id()), "").await;

    // An identity that a command renews, and one that the device's system renews by itself.
    let mut device = Device::new(authority, 300).unwrap();
    device.enroll(&mut connection).await.unwrap();
    enqueue_with(&server.url(), &device.id(), "renew", "InstallProfile", "nopush=1&renews_identity=1").await;
    device.poll_until_idle(&mut connection).await.unwrap();
    let later = |number| CertificateRequest { not_before: (2025, 1, 1), ..CertificateRequest::device(number, device.id()) };
    let identities = [authority.issue_as(&later(9001)).unwrap(), authority.issue_as(&later(9002)).unwrap()];
    for (identity, authenticates) in identities.into_iter().zip([true, false]) {
        device.replace_identity(identity);
        let messages = if authenticates { device.enrollment_messages().unwrap() } else { vec![device.idle().unwrap()] };
        for message in messages {
            device.insist(&mut connection, message).await.unwrap();
        }
        server.quiet().await;
    }

    // The last enrollment's second command is not fetched in time; the server looks every few seconds.
    server.clock.advance(Duration::from_secs(120));
    for _ in 0..3000 {
        let seen = recorded(server).await;
        if seen.keys().any(|key| key.starts_with("event/command.expired")) && seen.keys().any(|key| key.starts_with("tick/")) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    // A push certificate that ends within the month, of a topic that no device uses; the server looks every hour.
    let request = PushCertificateRequest { not_after: (2027, 2, 1), ..PushCertificateRequest::new("com.apple.mgmt.External.ending") };
    let ending = PushAuthority::new().unwrap().issue_as(&request).unwrap();
    let pem = format!("{}{}", ending.certificate_pem, ending.private_key_pem);
    assert_eq!(call_at(&server.url(), http::Method::PUT, "/v1/pushcert?new_topic=1", pem).await.status, http::StatusCode::OK);
    server.clock.advance(Duration::from_hours(1));
    for _ in 0..3000 {
        if recorded(server).await.keys().any(|key| key.starts_with("event/push.certificate-expiring")) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    server.quiet().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_plugin_is_handed_is_what_the_schemas_say() {
    let contract = Contract::load();
    let authority = Authority::new(111).unwrap();
    let (recorder, monitored) = (recorder(), format!("mode = \"monitor\"\n{GRANT}"));
    let observer = MANIFEST.replace("\"recorder\"", "\"observer\"");
    let answering = wasmdm_testkit::guests::build("answering");
    let plugins: [(&str, &str, &[u8], &str); 3] = [
        ("recorder", MANIFEST, &recorder, GRANT),
        ("observer", &observer, &recorder, &monitored),
        ("answering", ANSWERING, &answering, ANSWERING_GRANT),
    ];
    let server = Server::start(&authority, &plugins).await;
    live(&server, &authority).await;
    let recorded = recorded(&server).await;

    let mut answers = BTreeSet::new();
    for (key, handed) in recorded_by(&server, "answering").await.iter().filter(|(key, _)| !key.starts_with("challenge/")) {
        contract.check(&["call_info_facts"], &handed["call"]);
        contract.check(&["enrollment_facts"], &handed["enrollment"]);
        let kind = key.split('/').next().unwrap();
        let (message_type, document) = match kind {
            "login" => ("UserAuthenticate", Some(("user_authentication_message", "message"))),
            "token" => ("GetToken", Some(("token_parameters", "parameters"))),
            "return" => ("ReturnToService", None),
            _ => panic!("{key} is nothing that the guest keeps"),
        };
        assert_eq!(handed["call"]["message_type"], message_type);
        if let Some((schema, member)) = document {
            contract.check(&[schema], &handed[member]);
        }
        answers.insert(kind.to_owned());
    }
    assert_eq!(answers.into_iter().collect::<Vec<_>>(), ["login", "return", "token"]);
    // What only the one who makes the token gets.
    assert!(!recorded.values().any(|handed| handed.to_string().contains("hush")));

    let mut decisions = 0;
    for (key, handed) in &recorded {
        contract.check(&["call_info_facts"], &handed["call"]);
        assert_eq!(found_in(handed.to_string().as_bytes()), None, "{key}");
        for enrollment in ["enrollment", "enrollment_now"] {
            if let Some(facts) = handed.get(enrollment) {
                contract.check(&["enrollment_facts"], facts);
            }
        }
        match key.split('/').collect::<Vec<_>>()[..] {
            ["event", topic, _] => {
                assert_eq!(handed["call"]["topic"], topic);
                contract.check(&["event_data", topic], &handed["data"]);
            }
            ["decision", _] => {
                decisions += 1;
                contract.check(&["candidate_message"], &handed["message"]);
            }
            ["tick", "every-minute"] => {}
            _ => panic!("{key} is nothing that the recorder keeps"),
        }
    }
    assert!(decisions >= 19, "{decisions}");
    let both = |data: &Json| {
        data["decisions"].as_array().is_some_and(|decisions| decisions.len() == 2 && decisions.iter().any(|one| one["mode"] == "monitor"))
    };
    assert!(recorded.values().any(|handed| both(&handed["data"])), "a monitored decision is told");
    let odd = recorded.values().map(|handed| &handed["data"]["command"]).find(|command| command["uuid"] == "odd" && command.get("report").is_some());
    let report = &odd.unwrap()["report"];
    for (key, form) in [
        ("Data", serde_json::json!({ "$data": "AP8=" })),
        ("Date", serde_json::json!({ "$date": "2026-01-31T12:00:00Z" })),
        ("Large", serde_json::json!({ "$integer": "18446744073709551615" })),
        ("Small", serde_json::json!({ "$integer": "-9223372036854775808" })),
        ("Exact", serde_json::json!(9_007_199_254_740_992_u64)),
        ("Real", serde_json::json!(0.5)),
        ("NotANumber", serde_json::json!({ "$real": "nan" })),
        ("Infinite", serde_json::json!({ "$real": "inf" })),
        ("Form", serde_json::json!({ "$dictionary": { "$data": "not data" } })),
        ("NoForm", serde_json::json!({ "$real": "nan", "$date": 7 })),
        ("UnlockToken", serde_json::json!({ "$redacted": true })),
    ] {
        assert_eq!(report[key], form, "{key}");
    }
    assert!(recorded.contains_key("tick/every-minute"));
    // And the other way round: the index promises nothing that the server does not do.
    assert_eq!(topics(&recorded), contract.topics());
    server.stop().await;
}

#[test]
fn a_schema_refuses_what_the_contract_does_not_have() {
    let contract = Contract::load();
    let event = |message: Json| serde_json::json!({ "message": message, "re_enrolling": false });
    let refused = [
        serde_json::json!({ "MessageType": "TokenUpdate", "PushMagic": "a secret" }),
        serde_json::json!({ "MessageType": "TokenUpdate", "Key": null }),
        serde_json::json!({ "MessageType": "TokenUpdate", "Key": { "$data": "no base64!" } }),
        serde_json::json!({ "MessageType": "TokenUpdate", "Key": { "$date": "yesterday" } }),
        serde_json::json!({ "MessageType": "TokenUpdate", "Key": { "$real": "1.5" } }),
        serde_json::json!({ "MessageType": "CheckOut" }),
    ];
    let schema = contract.compiled["event-data-enrollment-enrolled.json"];
    for message in refused {
        assert!(contract.schemas.validate(&event(message.clone()), schema).is_err(), "{message}");
    }
    let forms = serde_json::json!({
        "MessageType": "TokenUpdate",
        "PushMagic": { "$redacted": true },
        "Keys": [{ "$data": "AP8=" }, { "$date": "2026-01-31T12:00:00Z" }, { "$integer": "18446744073709551615" }, { "$real": "-inf" },
            { "$dictionary": { "$data": "a string" } }, { "$data": 1, "$date": 2 }, {}, 0.5, "text", true],
    });
    if let Err(error) = contract.schemas.validate(&event(forms), schema) {
        panic!("{error:#}");
    }
    // A required plugin that is not there, where the operator lets devices in all the same.
    let mut enrolling = event(serde_json::json!({ "MessageType": "Authenticate" }));
    enrolling["decisions"] = serde_json::json!([{ "plugin": "gone", "verdict": "failure", "reason": "missing: it has no component" }]);
    contract.check(&["event_data", "enrollment.enrolling"], &enrolling);
}
