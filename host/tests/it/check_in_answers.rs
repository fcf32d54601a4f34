//! Check-ins that a plugin answers: tokens of services, users who log in, devices that return to service.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use http::{Method, StatusCode};
use tokio_util::task::TaskTracker;
use wasmdm::command::demo::stamped;
use wasmdm_protocol::enrollment::EnrollmentKind;
use wasmdm_simulator::{Answer, Authority, Connection, Device, DeviceOptions};
use wasmdm_testkit::guests;

use crate::api::call_as;
use crate::in_process;
use crate::plugins::{is_active, until};
use crate::process::{API_KEY, Home, ServerProcess, install};

const MAID: &str = "com.apple.maid";

fn manifest(name: &str, services: &[&str]) -> String {
    format!(
        "[plugin]\nname = \"{name}\"\nversion = \"1.0.0\"\nwasm = \"plugin.wasm\"\n[hooks.user-authentication]\n[hooks.return-to-service]\n\
         [hooks.token-source]\nservices = {services:?}\n[requests]\nkv = true\n"
    )
}

fn grant(rest: &str, behave: &str) -> String {
    format!("enabled = true\n{rest}\n[grants]\nkv = true\n[config]\nbehave = \"{behave}\"\n")
}

fn write(path: &Path, content: &str) {
    std::fs::write(path.with_extension("new"), content).unwrap();
    std::fs::rename(path.with_extension("new"), path).unwrap();
}

async fn enrolled(url: &str, authority: &Authority, number: u64) -> (Device, Connection) {
    let mut connection = Connection::to(url).unwrap();
    let mut device = Device::new(authority, number).unwrap();
    device.enroll(&mut connection).await.unwrap();
    (device, connection)
}

fn user_of(authority: &Authority, device: &Device) -> Device {
    let options = DeviceOptions { kind: Some(EnrollmentKind::User), ..DeviceOptions::default() };
    let mut user = Device::with_options(authority, device.number, options).unwrap();
    user.replace_identity(device.identity.clone());
    user
}

async fn ask(device: &mut Device, connection: &mut Connection, service: &str) -> Answer {
    let message = device.get_token(service).unwrap();
    device.send(connection, message).await.unwrap()
}

/// Edge cases 33, 48 and 49. NanoMDM defect 19. Its server registers nobody who could make a token: each GetToken is a 500.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plugin_makes_tokens_logs_users_in_and_returns_devices_to_service() {
    let authority = Authority::new(121).unwrap();
    // Unoptimised, on a busy machine.
    let grant = grant("[limits]\nanswer = \"20s\"\ncpu = \"2s\"", "");
    let plugin = ("answering", manifest("answering", &[MAID]), guests::build("answering"));
    let server = in_process::Server::start(&authority, &[(plugin.0, &plugin.1, &plugin.2, &grant)]).await;
    let (mut device, mut connection) = enrolled(&server.url(), &authority, 1).await;

    let token = device.fetch_token(&mut connection, MAID).await.unwrap();
    assert_eq!(String::from_utf8(token).unwrap(), format!("{MAID} for {} {{}}", device.id()));
    assert_eq!(ask(&mut device, &mut connection, "com.apple.else").await.status, StatusCode::BAD_REQUEST);

    device.escrow_bootstrap_token(&mut connection).await.unwrap();
    let configuration = device.fetch_return_to_service(&mut connection).await.unwrap();
    assert_eq!(configuration.get("Enabled").and_then(plist::Value::as_boolean), Some(true));
    assert_eq!(configuration.get("WiFiProfileData").and_then(plist::Value::as_data), Some(&b"Wi-Fi"[..]));
    assert_eq!(configuration.get("BootstrapToken").and_then(plist::Value::as_data), Some(&device.bootstrap_token()[..]));

    let mut user = user_of(&authority, &device);
    assert_eq!(user.log_in(&mut connection, |_| "wrong".to_owned()).await.unwrap(), "");
    let update = user.token_update().unwrap();
    assert_eq!(user.send(&mut connection, update).await.unwrap().status, StatusCode::BAD_REQUEST, "who failed has no channel");
    let token = user.log_in(&mut connection, |challenge| format!("digest of {challenge}")).await.unwrap();
    assert_eq!(token, format!("token of {}", user.id()));
    // Only now there is a channel.
    let update = user.token_update().unwrap();
    user.insist(&mut connection, update).await.unwrap();
    let token = user.fetch_token(&mut connection, MAID).await.unwrap();
    assert!(String::from_utf8(token).unwrap().contains(&user.id()));
    server.stop().await;
}

/// The statuses of all three.
async fn statuses(device: &mut Device, user: &mut Device, connection: &mut Connection) -> [StatusCode; 3] {
    let token = ask(device, connection, MAID).await;
    let message = device.return_to_service().unwrap();
    let returning = device.send(connection, message).await.unwrap();
    for answer in [&token, &returning] {
        assert_eq!(answer.headers.contains_key("retry-after"), answer.status == StatusCode::SERVICE_UNAVAILABLE);
    }
    let message = user.user_authenticate(None).unwrap();
    [token.status, returning.status, user.send(connection, message).await.unwrap().status]
}

/// Edge case 48.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_traps_loops_or_sleeps_is_a_503_in_time_and_the_server_lives() {
    const FAILED: [StatusCode; 3] = [StatusCode::SERVICE_UNAVAILABLE, StatusCode::SERVICE_UNAVAILABLE, StatusCode::GONE];
    let authority = Authority::new(122).unwrap();
    // Whoever is not challenged without the plugin would be managed without a proof.
    let home = Home::new(&authority.root_pem()).with(&["--ua-zl-dc"]);
    let path = home.grants().join("answering.toml");
    write(&path, &grant("", ""));
    install(&home.plugins(), "answering", &manifest("answering", &[MAID]), &guests::build("answering"));
    let server = home.start();
    let mut status = until(&server, "answering", is_active).await;
    let (mut device, mut connection) = enrolled(&server.url(), &authority, 1).await;
    let mut user = user_of(&authority, &device);
    for behaviour in ["trap", "loop", "sleep", "fail"] {
        write(&path, &grant("", behaviour));
        let generation = status["generation"].clone();
        status = until(&server, "answering", |now| now["generation"] != generation).await;
        let begin = std::time::Instant::now();
        assert_eq!(statuses(&mut device, &mut user, &mut connection).await, FAILED, "{behaviour}");
        // Three times half a second, and what a busy machine adds.
        assert!(begin.elapsed() < Duration::from_secs(10), "{behaviour}: {:?}", begin.elapsed());
        assert!(device.poll_until_idle(&mut connection).await.unwrap().commands.is_empty());
    }
    write(&path, &grant("[limits]\nanswer = \"20s\"\ncpu = \"2s\"", "none"));
    let generation = status["generation"].clone();
    until(&server, "answering", |now| now["generation"] != generation).await;
    let none = [StatusCode::BAD_REQUEST, StatusCode::BAD_REQUEST, StatusCode::OK];
    assert_eq!(statuses(&mut device, &mut user, &mut connection).await, none);

    // Its directory is gone, and its grant says that it should be there: it fails. Without the grant nobody answers.
    std::fs::remove_dir_all(home.plugins().join("answering")).unwrap();
    until(&server, "answering", |now| now["state"] == "required-missing").await;
    assert_eq!(statuses(&mut device, &mut user, &mut connection).await, FAILED);
    assert_eq!(ask(&mut device, &mut connection, "com.apple.else").await.status, StatusCode::BAD_REQUEST);
    let ready = call_as(&server, Method::GET, "/readyz", "", "").await;
    assert_eq!(ready.status, StatusCode::SERVICE_UNAVAILABLE);
    std::fs::remove_file(&path).unwrap();
    until(&server, "answering", serde_json::Value::is_null).await;
    assert_eq!(statuses(&mut device, &mut user, &mut connection).await, none);
    let log = server.log().join("\n");
    assert!(log.contains("could not answer at token-source: trap"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_plugins_for_one_service_type_the_first_answers_and_the_second_says_why_not() {
    let authority = Authority::new(123).unwrap();
    let home = Home::new(&authority.root_pem());
    let component = guests::build("answering");
    let patient = "[limits]\nanswer = \"20s\"\ncpu = \"2s\"";
    let put = |name: &str| {
        let grant = format!("{}prefix = \"{name}: \"\n", grant(patient, ""));
        write(&home.grants().join(format!("{name}.toml")), &grant);
        install(&home.plugins(), name, &manifest(name, &[MAID]), &component);
    };
    put("first");
    let server = home.start();
    until(&server, "first", is_active).await;
    let (mut device, mut connection) = enrolled(&server.url(), &authority, 1).await;
    put("second");
    let status = until(&server, "second", |status| status["candidate"]["reason"].is_string()).await;
    let reason = status["candidate"]["reason"].as_str().unwrap();
    assert!(reason.contains("the plugin `first` has ") && reason.contains("tokens for `com.apple.maid`"), "{reason}");
    let token = String::from_utf8(device.fetch_token(&mut connection, MAID).await.unwrap()).unwrap();
    assert!(token.starts_with("first: "), "{token}");

    std::fs::remove_file(home.grants().join("first.toml")).unwrap();
    std::fs::remove_dir_all(home.plugins().join("first")).unwrap();
    until(&server, "second", is_active).await;
    let token = String::from_utf8(device.fetch_token(&mut connection, MAID).await.unwrap()).unwrap();
    assert!(token.starts_with("second: "), "{token}");
}

/// Devices that ask for tokens, as fast as they are answered. What is no token counts as a failure.
struct Askers {
    stop: Arc<AtomicBool>,
    tasks: TaskTracker,
    tokens: Arc<AtomicU64>,
    failures: Arc<AtomicU64>,
}

impl Askers {
    fn start(server: &ServerProcess, devices: Vec<Device>) -> Self {
        let askers = Self { stop: Arc::default(), tasks: TaskTracker::new(), tokens: Arc::default(), failures: Arc::default() };
        for mut device in devices {
            let (stop, tokens, failures, url) = (Arc::clone(&askers.stop), Arc::clone(&askers.tokens), Arc::clone(&askers.failures), server.url());
            askers.tasks.spawn(async move {
                let mut connection = Connection::to(&url).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    match device.fetch_token(&mut connection, MAID).await {
                        Ok(token) if token.starts_with(b"com.apple.maid for ") => tokens.fetch_add(1, Ordering::Relaxed),
                        other => {
                            eprintln!("no token: {other:?}");
                            failures.fetch_add(1, Ordering::Relaxed)
                        }
                    };
                }
            });
        }
        askers
    }
}

/// Edge case 48.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_source_is_swapped_under_load_and_no_request_is_lost() {
    const SWAPS: usize = 20;
    let authority = Authority::new(124).unwrap();
    let home = Home::new(&authority.root_pem());
    let component = guests::build("answering");
    let builds = [stamped(&component, "a"), stamped(&component, "b")];
    write(&home.grants().join("answering.toml"), &grant("[limits]\nanswer = \"20s\"\ncpu = \"2s\"", ""));
    let put = |number: usize| install(&home.plugins(), "answering", &manifest("answering", &[MAID]), &builds[number % 2]);
    put(0);
    let server = home.start();
    let mut status = until(&server, "answering", is_active).await;
    let mut devices = Vec::new();
    for number in 1..=4 {
        devices.push(enrolled(&server.url(), &authority, number).await.0);
    }
    let askers = Askers::start(&server, devices);
    for number in 1..=SWAPS {
        let before = askers.tokens.load(Ordering::Relaxed);
        put(number);
        let reload = call_as(&server, Method::POST, "/api/v1/plugins/answering/reload", "", &format!("Bearer {API_KEY}")).await;
        assert_eq!(reload.status, StatusCode::OK);
        let digest = status["digest"].clone();
        status = until(&server, "answering", |now| now["digest"] != digest).await;
        // Each build answers some.
        while askers.tokens.load(Ordering::Relaxed) < before + 8 && askers.failures.load(Ordering::Relaxed) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    askers.stop.store(true, Ordering::Relaxed);
    askers.tasks.close();
    askers.tasks.wait().await;
    assert_eq!(askers.failures.load(Ordering::Relaxed), 0, "{:#?}", server.log());
    assert!(askers.tokens.load(Ordering::Relaxed) >= 8 * SWAPS as u64);
}
