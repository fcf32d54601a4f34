//! Plugins in a running server: decisions, hot reload, and what happens when one misbehaves.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http::{Method, StatusCode};
use tokio_util::task::TaskTracker;
use wasmdm::bundled::SERIAL_ALLOW_LIST;
use wasmdm_simulator::{Answer, Authority, Connection, Device, DeviceOptions};

use crate::api::{call_as, json};
use crate::process::{API_KEY, Home, ServerProcess, install};

/// The device's Authenticate, and whatever it is answered.
async fn authenticate(server: &ServerProcess, device: &mut Device) -> Answer {
    let message = device.authenticate().unwrap();
    device.send(&mut Connection::to(&server.url()).unwrap(), message).await.unwrap()
}

fn with_serial(authority: &Authority, number: u64, serial: &str) -> Device {
    Device::with_options(authority, number, DeviceOptions { serial_number: Some(serial.to_owned()), ..DeviceOptions::default() }).unwrap()
}

/// Writes a file that is complete before it has its name.
fn write(path: &Path, content: impl AsRef<[u8]>) {
    let unfinished = path.with_extension("unfinished");
    std::fs::write(&unfinished, content).unwrap();
    std::fs::rename(&unfinished, path).unwrap();
}

fn allow(home: &Home, serial_numbers: &[&str]) {
    write(&home.grants().join("serial-allow-list.toml"), format!("enabled = true\n[config]\nserial_numbers = {serial_numbers:?}\n"));
}

pub(crate) async fn plugin(server: &ServerProcess, name: &str) -> serde_json::Value {
    let answer = call_as(server, Method::GET, &format!("/api/v1/plugins/{name}"), "", &format!("Bearer {API_KEY}")).await;
    if answer.status == StatusCode::OK { json(&answer) } else { serde_json::Value::Null }
}

/// Waits until the plugin's status satisfies `wanted`; the server's own log is the witness if it never does.
pub(crate) async fn until(server: &ServerProcess, name: &str, wanted: impl Fn(&serde_json::Value) -> bool) -> serde_json::Value {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let status = plugin(server, name).await;
        if wanted(&status) {
            return status;
        }
        assert!(Instant::now() < deadline, "{name} is {status:#}\n{:#?}", server.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) fn is_active(status: &serde_json::Value) -> bool {
    status["state"] == "active"
}

/// Enrolled devices that poll in the background, as fast as they are answered.
pub(crate) struct Pollers {
    stop: Arc<AtomicBool>,
    failures: Arc<AtomicU64>,
    latencies: Arc<Mutex<Vec<Duration>>>,
    tasks: TaskTracker,
}

impl Pollers {
    pub(crate) fn start(server: &ServerProcess, devices: Vec<Device>) -> Self {
        let (stop, failures) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (url, tasks, latencies) = (server.url(), TaskTracker::new(), Arc::new(Mutex::new(Vec::new())));
        for mut device in devices {
            let (stop, failures, latencies, url) = (Arc::clone(&stop), Arc::clone(&failures), Arc::clone(&latencies), url.clone());
            tasks.spawn(async move {
                let mut connection = Connection::to(&url).unwrap();
                device.prepare_idle().unwrap();
                while !stop.load(Ordering::Relaxed) {
                    let begin = Instant::now();
                    match device.poll_until_idle(&mut connection).await {
                        Ok(_) => latencies.lock().unwrap().push(begin.elapsed()),
                        Err(error) => {
                            eprintln!("a poll failed: {error}");
                            failures.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    // Devices are not a load test here: many of them, each now and then.
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            });
        }
        Self { stop, failures, latencies, tasks }
    }

    /// Latencies since the last lap, in ascending order.
    pub(crate) fn lap(&self) -> Vec<Duration> {
        let mut latencies = std::mem::take(&mut *self.latencies.lock().unwrap());
        latencies.sort_unstable();
        latencies
    }

    /// Latencies of the last lap in ascending order, and how many polls failed in all.
    pub(crate) async fn stop(self) -> (Vec<Duration>, u64) {
        self.stop.store(true, Ordering::Relaxed);
        self.tasks.close();
        self.tasks.wait().await;
        (self.lap(), self.failures.load(Ordering::Relaxed))
    }
}

pub(crate) async fn enroll(server: &ServerProcess, devices: &mut [Device]) {
    let mut connection = Connection::to(&server.url()).unwrap();
    for device in devices {
        device.enroll(&mut connection).await.unwrap();
    }
}

#[tokio::test]
async fn an_unlisted_device_is_refused_and_leaves_no_trace_until_the_list_changes() {
    let authority = Authority::new(51).unwrap();
    let home = Home::new(&authority.root_pem());
    allow(&home, &["LISTED"]);
    install(&home.plugins(), "serial-allow-list", SERIAL_ALLOW_LIST.manifest, SERIAL_ALLOW_LIST.component);
    let server = home.start();
    until(&server, "serial-allow-list", is_active).await;
    let mut others: Vec<Device> = (0..50).map(|number| with_serial(&authority, 100 + number, "LISTED")).collect();
    enroll(&server, &mut others).await;

    let before = home.fingerprint();
    let mut device = with_serial(&authority, 1, "UNLISTED");
    let answer = authenticate(&server, &mut device).await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    assert!(answer.headers["content-type"].to_str().unwrap().starts_with("text/plain"));
    let after = home.fingerprint();
    let changed: Vec<&str> = before.iter().filter(|(table, digest)| after[*table] != **digest).map(|(table, _)| table.as_str()).collect();
    assert!(changed.iter().all(|table| ["audit", "plugin_key_values", "plugin_usage"].contains(table)), "{changed:?}");
    assert!(changed.contains(&"audit"), "a deny is audited");

    let pollers = Pollers::start(&server, others);
    let generation = plugin(&server, "serial-allow-list").await["generation"].as_u64().unwrap();
    allow(&home, &["LISTED", "UNLISTED"]);
    until(&server, "serial-allow-list", |status| status["generation"].as_u64() > Some(generation)).await;
    assert_eq!(authenticate(&server, &mut device).await.status, StatusCode::OK);
    let (latencies, failures) = pollers.stop().await;
    assert_eq!(failures, 0);
    assert!(!latencies.is_empty());
}

#[tokio::test]
async fn garbage_in_place_of_a_policy_opens_no_door_even_after_kill_and_restart() {
    let authority = Authority::new(52).unwrap();
    let home = Home::new(&authority.root_pem());
    allow(&home, &["LISTED"]);
    install(&home.plugins(), "serial-allow-list", SERIAL_ALLOW_LIST.manifest, SERIAL_ALLOW_LIST.component);
    let server = home.start();
    until(&server, "serial-allow-list", is_active).await;

    write(&home.plugins().join("serial-allow-list/plugin.wasm"), b"\0asm garbage");
    let status = until(&server, "serial-allow-list", |status| status["candidate"]["reason"].is_string()).await;
    assert!(is_active(&status), "the last good version serves: {status:#}");
    let mut listed = with_serial(&authority, 1, "LISTED");
    let mut unlisted = with_serial(&authority, 2, "UNLISTED");
    assert_eq!(authenticate(&server, &mut unlisted).await.status, StatusCode::FORBIDDEN);
    server.kill();

    // From the first request on.
    let server = home.start();
    let first = authenticate(&server, &mut unlisted).await.status;
    assert!([StatusCode::FORBIDDEN, StatusCode::SERVICE_UNAVAILABLE].contains(&first), "{first}");
    until(&server, "serial-allow-list", is_active).await;
    assert_eq!(authenticate(&server, &mut unlisted).await.status, StatusCode::FORBIDDEN);
    assert_eq!(authenticate(&server, &mut listed).await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_policy_that_is_granted_and_was_never_there_keeps_the_door_shut() {
    let authority = Authority::new(53).unwrap();
    let home = Home::new(&authority.root_pem());
    allow(&home, &["LISTED"]);
    write(&home.grants().join("serial-allow-list.toml"), "enabled = true\nrequire = [\"enrollment-policy\"]\n");
    let server = home.start();
    let mut device = with_serial(&authority, 1, "LISTED");
    let answer = authenticate(&server, &mut device).await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(answer.headers.contains_key("retry-after"));
    let ready = call_as(&server, Method::GET, "/readyz", "", "").await;
    assert!(crate::api::text(&ready).contains("serial-allow-list"), "{}", crate::api::text(&ready));
}
