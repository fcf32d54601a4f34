//! Secrets of every kind are planted, and looked for wherever a server could show them; and in its files, when they are sealed.

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{Method, StatusCode};
use plist::{Dictionary, Value};
use wasmdm_protocol::enrollment::{EnrollmentKind, TenantId};
use wasmdm_protocol::time::Timestamp;
use wasmdm_simulator::canary::{MARK, found, found_in};
use wasmdm_simulator::message::command_document;
use wasmdm_simulator::{Authority, Connection, Device, DeviceOptions, Message, Product};
use wasmdm_storage::Storage;
use wasmdm_storage::keyring::Keyring;

use crate::api::{call, call_as, text};
use crate::nanomdm::push_certificate;
use crate::plugins::{is_active, until};
use crate::process::{Home, ServerProcess, install, run};
use crate::schemas::{GRANT, MANIFEST, recorder};
use crate::webhook::Receiver;

const TOPIC: &str = "com.apple.mgmt.External.0f0f0f0f-1111-2222-3333-444444444444";

/// Commands with a secret in each.
fn commands() -> Vec<(&'static str, Dictionary)> {
    let secret = |key: &str| Dictionary::from_iter([(key.to_owned(), Value::from(MARK))]);
    let data = |key: &str| Dictionary::from_iter([(key.to_owned(), Value::Data(MARK.into()))]);
    let mut recovery_lock = secret("CurrentPassword");
    recovery_lock.insert("NewPassword".into(), MARK.into());
    vec![
        ("DeviceLock", secret("PIN")),
        ("SetRecoveryLock", recovery_lock),
        ("ClearPasscode", data("UnlockToken")),
        ("AccountConfiguration", {
            let admin = data("passwordHash");
            Dictionary::from_iter([("AutoSetupAdminAccounts".to_owned(), Value::Array(vec![Value::Dictionary(admin)]))])
        }),
        ("InstallProfile", data("Payload")),
        ("SecurityInfo", Dictionary::new()),
        ("ActivationLockBypassCode", Dictionary::new()),
        ("RotateFileVaultKey", secret("PrivateKeyExportPassword")),
    ]
}

/// What a device reports of such a command.
fn report(device: &Device, uuid: &str, request_type: &str) -> Message {
    let mut keys = Dictionary::from_iter([("UDID".to_owned(), Value::from(device.udid.as_str()))]);
    match request_type {
        "SecurityInfo" => {
            let key = Dictionary::from_iter([("FDE_PersonalRecoveryKeyCMS".to_owned(), Value::Data(MARK.into()))]);
            keys.insert("SecurityInfo".into(), Value::Dictionary(key));
        }
        "ActivationLockBypassCode" => {
            keys.insert("ActivationLockBypassCode".into(), MARK.into());
        }
        "RotateFileVaultKey" => {
            let result = Dictionary::from_iter([("EncryptedNewRecoveryKey".to_owned(), Value::Data(MARK.into()))]);
            keys.insert("RotateResult".into(), Value::Dictionary(result));
        }
        _ => {}
    }
    Message::report("Acknowledged", Some(uuid), keys).unwrap()
}

/// A home with a recorder of everything, and what is secret in it.
fn home(authority: &Authority, webhook: &str, log_level: &str) -> Home {
    let home = Home::new(&authority.root_pem());
    let secret_file = |name: &str| {
        let path = home.directory.path().join(name);
        std::fs::write(&path, format!("{MARK}-{name}")).unwrap();
        path.to_string_lossy().into_owned()
    };
    let hmac_key = secret_file("webhook-hmac-key");
    let dm_keys = [secret_file("dm-send-hmac-key"), secret_file("dm-recv-hmac-key")];
    // A receiver whose address holds a password, and a server of declarative management that is not there.
    let webhook_password = webhook.replace("http://", &format!("http://user:{MARK}-password@"));
    let dm = format!("http://user:{MARK}-password@127.0.0.1:1/");
    std::fs::write(home.grants().join("recorder.toml"), format!("{GRANT}[config]\npassword = \"{MARK}-config\"\n")).unwrap();
    install(&home.plugins(), "recorder", MANIFEST, &recorder());
    home.with(&["--webhook-url", webhook, "--webhook-url", &webhook_password, "--webhook-hmac-key-file", &hmac_key])
        .with(&["--dm", &dm, "--dm-send-hmac-key-file", &dm_keys[0], "--dm-recv-hmac-key-file", &dm_keys[1], "--ua-zl-dc"])
        .with(&["--log-level", log_level])
}

/// Every secret that there is comes to the server, and goes wrong there in many a way.
async fn live(server: &ServerProcess, authority: &Authority, home: &Home) {
    until(server, "recorder", is_active).await;
    let (certificate, key) = push_certificate(Some(TOPIC), 2030);
    home.secrets.lock().unwrap().extend(key.lines().filter(|line| !line.starts_with('-')).map(str::to_owned));
    assert_eq!(call(server, Method::PUT, "/v1/pushcert", format!("{certificate}{key}")).await.status, StatusCode::OK);
    let mut errors = vec![call(server, Method::PUT, "/v1/pushcert", key.clone()).await];

    let mut connection = Connection::to(&format!("{}/mdm?password={MARK}", server.url())).unwrap();
    for (number, kind) in EnrollmentKind::ALL.into_iter().enumerate() {
        for product in [Product::Mac, Product::Iphone] {
            let options = DeviceOptions { kind: Some(kind), product: Some(product), ..DeviceOptions::default() };
            let mut device = Device::with_options(authority, (number * 10) as u64 + product as u64, options).unwrap();
            device.enroll(&mut connection).await.unwrap();
            device.rotate_push_token(1);
            let messages = [
                device.token_update(),
                device.set_bootstrap_token(Some(&device.bootstrap_token())),
                device.get_bootstrap_token(),
                device.user_authenticate(None),
                device.user_authenticate(Some(MARK)),
                device.get_token("com.apple.maid"),
                device.status_report(),
            ];
            // Answered or refused: what matters is what the server tells of it. An error that repeats a secret fails here.
            for message in messages {
                device.send(&mut connection, message.unwrap()).await.unwrap();
            }
        }
    }
    let mut device = Device::new(authority, 99).unwrap();
    device.enroll(&mut connection).await.unwrap();
    for (request_type, keys) in commands() {
        let path = format!("/v1/enqueue/{}?nopush=1", device.id());
        let document = command_document(request_type, request_type, keys).unwrap();
        assert_eq!(call(server, Method::PUT, &path, document.clone()).await.status, StatusCode::OK, "{request_type}");
        // The same UUID with another body, and half a command.
        errors.push(call(server, Method::PUT, &path, String::from_utf8_lossy(&document).replace("<dict>", "<dict><key>More</key><true/>")).await);
        errors.push(call(server, Method::PUT, &path, document.slice(..document.len() / 2)).await);
        let idle = device.idle().unwrap();
        assert!(!device.insist(&mut connection, idle).await.unwrap().is_empty());
        device.insist(&mut connection, report(&device, request_type, request_type)).await.unwrap();
    }
    device.insist(&mut connection, report(&device, "never-sent", "ActivationLockBypassCode")).await.unwrap();
    // A TokenUpdate that is refused, one that is no property list, and a wrong API key.
    let stranger = Device::new(authority, 98).unwrap();
    let mut broken = device.token_update().unwrap();
    broken.body = broken.body.slice(..broken.body.len() - 40);
    for message in [stranger.token_update().unwrap(), broken] {
        errors.push(device.send(&mut connection, message).await.unwrap());
    }
    errors.push(call_as(server, Method::GET, "/api/v1/plugins", "", &crate::api::basic("nanomdm", &format!("{MARK}-wrong"))).await);
    for answer in &errors {
        assert_eq!(found_in(&answer.body), None, "{}", answer.status);
    }
    for path in ["/api/v1/plugins", "/api/v1/plugins/recorder", "/api/v1/dead-letters", "/readyz"] {
        let answer = call(server, Method::GET, path, "").await;
        assert_eq!(found_in(&answer.body), None, "{path}: {}", text(&answer));
    }
}

fn storage_url(home: &Home) -> String {
    format!("sqlite://{}", home.data().join("wasmdm.sqlite").display())
}

/// No event that the recorder was handed has a secret.
async fn assert_events_are_clean(home: &Home, keyring: Keyring) {
    let storage = Storage::open_read_only_with_keys(&storage_url(home), keyring).await.unwrap();
    let (mut topics, mut after) = (std::collections::BTreeSet::new(), None);
    loop {
        let pairs = storage.kv_scan(&TenantId::default(), "recorder", "event/", after.as_deref(), 100, Timestamp::from_millis(0)).await.unwrap();
        let Some(last) = pairs.last() else { break };
        after = Some(last.key.clone());
        for pair in pairs {
            // The operator's own parameters of the URL are told as they are.
            let mut document: serde_json::Value = serde_json::from_slice(&pair.value).unwrap();
            for who in ["enrollment", "enrollment_now"] {
                document[who]["url_params"] = serde_json::Value::Null;
            }
            assert_eq!(found_in(document.to_string().as_bytes()), None, "{}", pair.key);
            topics.insert(pair.key.split('/').nth(1).unwrap().to_owned());
        }
    }
    storage.close().await.unwrap();
    for topic in ["enrollment.enrolled", "command.queued", "command.acknowledged", "bootstrap-token.escrowed", "checkin.TokenUpdate"] {
        assert!(topics.contains(topic), "{topic} is not among {topics:?}");
    }
}

/// What the files of the database show: itself, what is beside it, and a backup.
fn files_show(home: &Home) -> Vec<String> {
    let database = home.data().join("wasmdm.sqlite");
    let backup = home.directory.path().join("backup");
    let (code, _, error) = run(&["db", "backup", "--data", &home.data().to_string_lossy(), &backup.to_string_lossy()]);
    assert_eq!(code, 0, "{error}");
    let mut shown = Vec::new();
    for file in [database.clone(), database.with_extension("sqlite-wal"), backup.clone()] {
        let content = std::fs::read(&file).unwrap_or_default();
        for secret in home.secrets.lock().unwrap().iter().map(String::as_str).chain([MARK]) {
            shown.extend(found(secret, &content).map(|leak| format!("{}: {leak}", file.display())));
        }
    }
    std::fs::remove_file(backup).unwrap();
    shown
}

/// A key file with one more key, whose keys are secrets of the home.
fn new_key(home: &Home, name: &str) -> String {
    let path = home.directory.path().join("keys").to_string_lossy().into_owned();
    let (code, out, error) = run(&["db", "new-key", &path, "--name", name]);
    assert_eq!(code, 0, "{error}");
    for line in std::fs::read_to_string(&path).unwrap().lines() {
        let key = line.split_whitespace().last().unwrap();
        assert!(!out.contains(key));
        let raw = STANDARD.decode(key).unwrap();
        let numbers = raw.iter().map(u8::to_string).collect::<Vec<_>>().join(", ");
        let hex = raw.iter().fold(String::new(), |hex, byte| format!("{hex}{byte:02x}"));
        home.secrets.lock().unwrap().extend([key.to_owned(), hex, numbers]);
    }
    path
}

async fn until_sealed(home: &Home, server: &ServerProcess, name: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let (_, out, _) = run(&["db", "keys", "--data", &home.data().to_string_lossy()]);
        if out.starts_with("         0 values in plain")
            && out.lines().count() == 2
            && out.contains(&format!("under `{name}`"))
            && out.contains("all there are")
        {
            return;
        }
        assert!(Instant::now() < deadline, "{out}\n{:#?}", server.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_secret_stands_in_logs_metrics_errors_events_or_sealed_files() {
    let authority = Authority::new(120).unwrap();
    let (url, receiver) = Receiver::start(&[]).await;
    let home = home(&authority, &url, "trace,hyper=debug,sqlx=debug");
    let keys = new_key(&home, "first");
    let home = home.with(&["--key-file", &keys]);
    let mut server = home.start();
    live(&server, &authority, &home).await;
    receiver.events(40).await;
    for (headers, body) in receiver.heard.lock().unwrap().iter() {
        assert_eq!(found_in(&without_parameters(body)), None);
        let signature = headers.get("x-hmac-signature").unwrap();
        assert_eq!(found_in(signature.as_bytes()), None);
    }
    let leaks = server.finish();
    assert!(leaks.is_empty(), "{leaks:#?}");
    assert_eq!(files_show(&home), [""; 0]);
    assert_events_are_clean(&home, Keyring::from_file(keys.as_ref()).unwrap()).await;
    home.check(&["--key-file", &keys]);
}

/// The JSON of a receiver without the parameters of the URL, which are the operator's own, and with what is packed in it unpacked.
fn without_parameters(body: &[u8]) -> Vec<u8> {
    let mut event: serde_json::Value = serde_json::from_slice(body).unwrap();
    let mut unpacked = Vec::new();
    for kind in ["checkin_event", "acknowledge_event"] {
        if let Some(event) = event.get_mut(kind).and_then(serde_json::Value::as_object_mut) {
            event.remove("url_params");
            let payload = STANDARD.decode(event["raw_payload"].as_str().unwrap()).unwrap();
            // The JSON of a status report, which stands there in lines of base64.
            let document = plist::from_bytes::<Value>(&payload).unwrap();
            unpacked.extend(document.as_dictionary().unwrap().get("Data").and_then(Value::as_data).unwrap_or_default());
            unpacked.extend(payload);
        }
    }
    unpacked.extend(event.to_string().into_bytes());
    unpacked
}

/// A database that was plain is sealed by a server that is killed again and again, then sealed under another key, and left plain in the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plain_database_shows_no_secret_once_it_is_sealed() {
    let authority = Authority::new(121).unwrap();
    let (url, _receiver) = Receiver::start(&[]).await;
    let home = home(&authority, &url, "debug");
    let server = home.start();
    live(&server, &authority, &home).await;
    server.stop();
    assert!(files_show(&home).len() >= 4, "the net holds: a plain database shows the mark and the key of the push certificate");

    let plain_data = home.data().to_string_lossy().into_owned();
    let keys = new_key(&home, "first");
    let home = home.with(&["--key-file", &keys]);
    for _ in 0..3 {
        home.start().kill();
    }
    let server = home.start();
    until_sealed(&home, &server, "first").await;
    let metrics = text(&call(&server, Method::GET, "/metrics", "").await);
    assert!(metrics.contains("wasmdm_storage_resealing 0"), "{metrics}");
    server.stop();
    // What a device gets is what it left there.
    let (code, out, error) = run(&["db", "reseal", "--data", &plain_data, "--key-file", &keys]);
    assert_eq!(code, 0, "{out}{error}");
    assert_eq!(files_show(&home), [""; 0]);
    home.check(&["--key-file", &keys]);
    assert!(home.check(&[]).contains("sealed values are not looked into"));

    // Without the key it is not opened, and says so in a sentence.
    let (code, _, error) = run(&["serve", "--listen", "127.0.0.1:0", "--data", &plain_data]);
    assert_eq!(code, 1);
    assert!(error.contains("key-file: values of this database are sealed under the key `first`"), "{error}");

    new_key(&home, "second");
    let mut server = home.start();
    until_sealed(&home, &server, "second").await;
    let mut device = Device::new(&authority, 99).unwrap();
    let mut connection = Connection::to(&server.url()).unwrap();
    device.enroll(&mut connection).await.unwrap();
    let leaks = server.finish();
    assert!(leaks.is_empty(), "{leaks:#?}");
    assert_eq!(files_show(&home), [""; 0]);

    let (code, out, error) = run(&["db", "reseal", "--plain", "--data", &plain_data, "--key-file", &keys]);
    assert!(code == 0 && out.contains("made plain"), "{out}{error}");
    home.check(&[]);
    assert!(!files_show(&home).is_empty());
}

/// The net of every other test of this file and of every server process: it finds a secret that stands in a log.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_in_a_log_is_found_at_the_end_of_the_server() {
    let authority = Authority::new(122).unwrap();
    let home = Home::new(&authority.root_pem());
    let mut server = home.start();
    let mut connection = Connection::to(&server.url()).unwrap();
    // What is no secret to the server is written to its log: the id of a device that it does not know.
    let mut device = Device::new(&authority, 1).unwrap();
    MARK.clone_into(&mut device.udid);
    let idle = device.idle().unwrap();
    drop(device.send(&mut connection, idle).await);
    let leaks = server.finish();
    assert!(leaks.iter().any(|leak| leak.starts_with("log: as it is")), "{leaks:#?}");
}
