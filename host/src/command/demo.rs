//! `wasmdm demo`: the product's main job in a minute, on real input.
//!
//! A server with its own test authority in a temporary folder, the three plugins that the program carries, and simulated devices that
//! speak the real protocol over HTTP. Nothing of it is staged: what is printed is what the server, its log and its receivers said.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wasmdm_plugin_runtime::loading::State;
use wasmdm_simulator::apns::{FakeApns, WakeUps};
use wasmdm_simulator::{ApiClient, Authority, Connection, Device, DeviceOptions, SimulatorError};

use crate::bundled::{BundledPlugin, CHAT_NOTIFY, ENROLLMENT_BASELINE, SERIAL_ALLOW_LIST};
use crate::command::serve::production;
use crate::config::ServeOptions;
use crate::logging::{self, LogFormat};
use crate::wiring::{RunningServer, Surroundings};

mod chat_room;

use chat_room::ChatRoom;

/// Show the product in a minute.
#[derive(Debug, Clone, Args)]
pub struct DemoOptions {
    /// Number of simulated devices; two of them are not on the list at first
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(3..=500))]
    devices: u64,
    /// Keep the server running afterwards, until Ctrl-C
    #[arg(long)]
    stay: bool,
    /// Show the server's log too
    #[arg(long)]
    verbose: bool,
}

/// Devices that the first version of the policy refuses.
const UNLISTED: u64 = 2;
/// How long a step may take.
const PATIENCE: Duration = Duration::from_mins(2);

/// Runs it, printing to standard output.
pub async fn run(options: DemoOptions) -> anyhow::Result<ExitCode> {
    run_in(options, production()?, &mut std::io::stdout()).await
}

/// Runs it with that clock and compiler, printing to `out`.
pub async fn run_in(options: DemoOptions, surroundings: Surroundings, out: &mut (dyn Write + Send)) -> anyhow::Result<ExitCode> {
    logging::start(LogFormat::Text, if options.verbose { "info" } else { "off" })?;
    let home = tempfile::tempdir().context("a temporary folder")?;
    let authority = Authority::new(1)?;
    let room = ChatRoom::open().await?;
    let apns = FakeApns::start()?;
    let stage = Stage::set(home.path(), &authority, &room, &apns, options.devices)?;

    step(out, "A server starts, with SQLite in a temporary folder and three plugins in its plugin directory")?;
    let server = RunningServer::start(stage.config()?, surroundings).await?;
    say(out, &format!("listening on http://{}", server.address))?;
    let url = format!("http://{}", server.address);
    let mut api = ApiClient::new(&url, &stage.api_key)?;
    let certificate = apns.authority().issue(authority.topic())?;
    api.store_push_certificate(format!("{}{}", certificate.certificate_pem, certificate.private_key_pem)).await?;
    say(out, &format!("it wakes devices through a push service at {}, with the certificate of topic {}", apns.endpoint(), authority.topic()))?;
    wait_for("the plugins to become active", || server.plugins.ready().is_ok() && active(&server) == 3).await?;
    show_plugins(out, &server)?;

    step(
        out,
        &format!("{} simulated devices ask to enroll; {UNLISTED} of them are not on the list of the plugin serial-allow-list", options.devices),
    )?;
    let mut devices =
        (0..options.devices).map(|number| Device::with_options(&authority, number, device_options(number))).collect::<Result<Vec<_>, _>>()?;
    let mut enrolled = Vec::new();
    let mut refused = Vec::new();
    for mut device in devices.drain(..) {
        let mut connection = Connection::to(&url)?;
        let wake_ups = apns.subscribe(&device.token, authority.topic());
        match device.enroll(&mut connection).await {
            Ok(()) => enrolled.push((device, connection, wake_ups)),
            Err(SimulatorError::Refused { status: 403, body, .. }) => {
                say(out, &format!("{} was refused at Authenticate: 403 {body}", device.serial_number))?;
                refused.push(device);
            }
            Err(error) => return Err(error.into()),
        }
    }
    say(out, &format!("{} devices are enrolled", enrolled.len()))?;
    if refused.len() as u64 != UNLISTED {
        bail!("{} devices were refused, and not {UNLISTED}", refused.len());
    }

    step(
        out,
        "The plugin enrollment-baseline answers each enrollment with the first commands; a push wakes the devices, and they do what they are told",
    )?;
    let mut shown = false;
    for (device, connection, wake_ups) in &mut enrolled {
        let story = baseline(device, connection, wake_ups).await?;
        if !shown {
            say(out, &format!("{} got and answered: {}", device.serial_number, story.join(", ")))?;
            shown = true;
        }
    }
    say(
        out,
        &format!("so did the other {}; each was released from the Setup Assistant (DeviceConfigured) when the rest was final", enrolled.len() - 1),
    )?;

    step(out, "The plugin chat-notify told a chat room, whose address it never sees itself")?;
    let expected = enrolled.len();
    wait_for("the chat room to hear of it", || room.messages().len() >= expected).await?;
    for message in room.messages().iter().take(2) {
        say(out, &format!("the room heard: {message}"))?;
    }
    say(out, &format!("and {} messages more", room.messages().len().saturating_sub(2)))?;

    step(out, "Half way, another build of serial-allow-list with a longer list is put into the directory, while all devices go on polling")?;
    let before = digest(&server, SERIAL_ALLOW_LIST.name);
    let pollers = Pollers::start(enrolled.into_iter().map(|(device, connection, _)| (device, connection)).collect());
    stage.write_allow_list(&devices_listed(options.devices, 0), true)?;
    wait_for("the new build to become active", || {
        digest(&server, SERIAL_ALLOW_LIST.name) != before && digest(&server, SERIAL_ALLOW_LIST.name).is_some()
    })
    .await?;
    for device in &mut refused {
        let mut connection = Connection::to(&url)?;
        device.enroll(&mut connection).await?;
        say(out, &format!("{} is enrolled now", device.serial_number))?;
    }
    let (polls, failures) = pollers.stop().await;
    show_plugins(out, &server)?;
    say(out, &format!("{polls} polls were answered meanwhile, {failures} failed"))?;
    if failures > 0 {
        bail!("{failures} polls failed");
    }

    step(out, "An administrator queues a command through NanoMDM's API; a push wakes the device, it comes and answers")?;
    if let Some(device) = refused.first_mut() {
        let mut wake_ups = apns.subscribe(&device.token, authority.topic());
        let mut connection = Connection::to(&url)?;
        // What its enrollment has brought is done first.
        baseline(device, &mut connection, &mut wake_ups).await?;
        while wake_ups.try_next().is_some() {}
        let document = wasmdm_simulator::message::command_document("demo-1", "SecurityInfo", wasmdm_simulator::message::Dictionary::new())?;
        let id = device.id();
        let answer = api.enqueue(&[&id], document, true).await?;
        let result = answer.json.pointer(&format!("/status/{id}/push_result")).and_then(|id| id.as_str()).context("the command's push failed")?;
        say(out, &format!("PUT /v1/enqueue/{id} answered {}: queued, and pushed as {result}", answer.status))?;
        let wake_up = tokio::time::timeout(PATIENCE, wake_ups.next()).await.context("the push did not arrive")?.context("the push service ended")?;
        if wake_up.magic.as_deref() != Some(device.push_magic.as_str()) {
            bail!("the push does not hold the device's magic");
        }
        say(out, &format!("the push service woke {}, whose push magic it carried; the device polls", device.serial_number))?;
        let session = device.poll_until_done(&mut connection, 10).await?;
        let done = session.iter().flat_map(|session| &session.commands).find(|command| command.uuid == "demo-1");
        let status = done.and_then(|command| command.status.clone()).context("the command did not reach the device")?;
        say(out, &format!("{} answered SecurityInfo: {status}", device.serial_number))?;
    }

    if options.stay {
        step(out, "The server stays; stop it with Ctrl-C")?;
        say(out, &format!("curl -u nanomdm:{} {url}/api/v1/plugins", stage.api_key))?;
        say(out, &format!("plugins: {}, grants: {}", stage.plugins().display(), stage.grants().display()))?;
        tokio::signal::ctrl_c().await?;
    } else {
        step(out, "That was it. Run it again with --stay to look around; README.md goes on from here")?;
    }
    server.stop().await?;
    Ok(ExitCode::SUCCESS)
}

/// Polls whenever it is woken, until the device was released from the Setup Assistant.
async fn baseline(device: &mut Device, connection: &mut Connection, wake_ups: &mut WakeUps) -> anyhow::Result<Vec<String>> {
    let mut story = Vec::new();
    let poll = async {
        loop {
            let session = device.poll_until_idle(connection).await?;
            story.extend(
                session.commands.iter().map(|command| format!("{} {}", command.request_type, command.status.as_deref().unwrap_or("unanswered"))),
            );
            if session.commands.iter().any(|command| command.request_type == "DeviceConfigured") {
                return Ok::<_, SimulatorError>(());
            }
            if wake_ups.next().await.is_none() {
                return Err(SimulatorError::Argument { name: "push", problem: "the push service ended".to_owned() });
            }
        }
    };
    tokio::time::timeout(PATIENCE, poll).await.context("a device was not released from the Setup Assistant")??;
    Ok(story)
}

/// Devices that poll in the background.
struct Pollers {
    tracker: TaskTracker,
    stop: CancellationToken,
    counts: Arc<parking_lot::Mutex<(u64, u64)>>,
}

impl Pollers {
    fn start(devices: Vec<(Device, Connection)>) -> Self {
        let pollers = Self { tracker: TaskTracker::new(), stop: CancellationToken::new(), counts: Arc::default() };
        for (mut device, mut connection) in devices {
            let (stop, counts) = (pollers.stop.clone(), Arc::clone(&pollers.counts));
            pollers.tracker.spawn(async move {
                while !stop.is_cancelled() {
                    let outcome = device.poll_until_idle(&mut connection).await;
                    {
                        let mut counts = counts.lock();
                        if outcome.is_ok() { counts.0 += 1 } else { counts.1 += 1 }
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            });
        }
        pollers
    }

    async fn stop(self) -> (u64, u64) {
        self.stop.cancel();
        self.tracker.close();
        self.tracker.wait().await;
        *self.counts.lock()
    }
}

/// The files of the demonstration.
struct Stage {
    home: PathBuf,
    apns_endpoint: String,
    api_key: String,
    listed: Vec<String>,
}

impl Stage {
    fn set(home: &Path, authority: &Authority, room: &ChatRoom, apns: &FakeApns, devices: u64) -> anyhow::Result<Self> {
        let apns_endpoint = apns.endpoint();
        let stage = Self {
            home: home.to_owned(),
            apns_endpoint,
            api_key: uuid::Uuid::new_v4().simple().to_string(),
            listed: devices_listed(devices, UNLISTED),
        };
        for folder in [stage.plugins(), stage.grants()] {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::write(home.join("ca.pem"), authority.root_pem())?;
        std::fs::write(home.join("api-key"), &stage.api_key)?;
        std::fs::write(home.join("push-root.pem"), apns.root_pem())?;
        stage.write_allow_list(&stage.listed, false)?;
        stage.write_plugin(ENROLLMENT_BASELINE, ENROLLMENT_BASELINE.component)?;
        std::fs::write(stage.grants().join("enrollment-baseline.toml"), BASELINE_GRANT)?;
        std::fs::write(stage.grants().join("chat-url"), room.secret_url())?;
        stage.write_plugin(CHAT_NOTIFY, CHAT_NOTIFY.component)?;
        std::fs::write(stage.grants().join("chat-notify.toml"), chat_grant(room))?;
        Ok(stage)
    }

    fn plugins(&self) -> PathBuf {
        self.home.join("data/plugins")
    }

    fn grants(&self) -> PathBuf {
        self.home.join("data/plugins.d")
    }

    fn config(&self) -> anyhow::Result<crate::config::Config> {
        ServeOptions {
            listen: Some("127.0.0.1:0".to_owned()),
            data: Some(self.home.join("data")),
            ca: Some(self.home.join("ca.pem")),
            api_key_file: Some(self.home.join("api-key")),
            apns_endpoint: Some(self.apns_endpoint.clone()),
            apns_roots: Some(self.home.join("push-root.pem")),
            ..ServeOptions::default()
        }
        .resolve()
    }

    /// The policy with that list; `rebuilt` is the same program under another digest, as a new build of it would be.
    fn write_allow_list(&self, serial_numbers: &[String], rebuilt: bool) -> anyhow::Result<()> {
        let list = serial_numbers.iter().map(|serial| format!("\"{serial}\"")).collect::<Vec<_>>().join(", ");
        std::fs::write(self.grants().join("serial-allow-list.toml"), format!("enabled = true\n\n[config]\nserial_numbers = [{list}]\n"))?;
        let component = SERIAL_ALLOW_LIST.component;
        if rebuilt {
            self.write_plugin(SERIAL_ALLOW_LIST, &stamped(component, "second build"))
        } else {
            self.write_plugin(SERIAL_ALLOW_LIST, component)
        }
    }

    /// Each file is complete before it has its name.
    fn write_plugin(&self, plugin: BundledPlugin, component: &[u8]) -> anyhow::Result<()> {
        let folder = self.plugins().join(plugin.name);
        std::fs::create_dir_all(&folder)?;
        for (name, content) in [("plugin.wasm", component), ("plugin.toml", plugin.manifest.as_bytes())] {
            let unfinished = folder.join(format!(".{name}.new"));
            std::fs::write(&unfinished, content)?;
            std::fs::rename(&unfinished, folder.join(name))?;
        }
        Ok(())
    }
}

const BASELINE_GRANT: &str = r#"enabled = true

[grants]
kv = { bytes = "1MiB" }
commands = ["enqueue:DeviceInformation", "enqueue:ProfileList", "enqueue:DeviceConfigured"]
enrollments = ["read"]
timers = true

[config]
commands = [{ RequestType = "ProfileList" }]
release_after = "15m"
"#;

fn chat_grant(room: &ChatRoom) -> String {
    let address = room.address();
    format!(
        r#"enabled = true

[grants]
http = ["http://{address}"]
secrets = {{ chat_url = {{ file = "chat-url", host = "{host}", use = "http" }} }}
"#,
        host = address.ip(),
    )
}

/// The same component with a custom section behind it, which no engine looks at: another digest, the same behaviour.
pub fn stamped(component: &[u8], text: &str) -> Vec<u8> {
    let name = b"build";
    let length = 1 + name.len() + text.len();
    let mut bytes = component.to_vec();
    // Custom section: id 0, length, length of the name, name, content; each length below 128 is one byte.
    bytes.push(0);
    bytes.push(u8::try_from(length.min(127)).unwrap_or(127));
    bytes.push(u8::try_from(name.len()).unwrap_or(0));
    bytes.extend_from_slice(name);
    bytes.extend(text.bytes().take(126 - name.len()));
    bytes
}

fn serial(number: u64) -> String {
    format!("DEMO{number:04}")
}

fn devices_listed(devices: u64, unlisted: u64) -> Vec<String> {
    (0..devices.saturating_sub(unlisted)).map(serial).collect()
}

fn device_options(number: u64) -> DeviceOptions {
    DeviceOptions { serial_number: Some(serial(number)), awaiting_configuration: Some(true), ..DeviceOptions::default() }
}

fn active(server: &RunningServer) -> usize {
    server.plugins.status().iter().filter(|plugin| plugin.state == State::Active).count()
}

fn digest(server: &RunningServer, name: &str) -> Option<String> {
    server.plugins.plugin_status(name).and_then(|plugin| plugin.digest)
}

fn show_plugins(out: &mut (dyn Write + Send), server: &RunningServer) -> anyhow::Result<()> {
    for plugin in server.plugins.status() {
        let digest = plugin.digest.as_deref().unwrap_or("none").chars().take(12).collect::<String>();
        let (version, hooks) = (plugin.version.as_deref().unwrap_or("-"), plugin.hooks.join(", "));
        say(
            out,
            &format!(
                "{} {version} is {}: digest {digest}…, hooks {hooks}",
                plugin.name,
                if plugin.state == State::Active { "active" } else { "not active" }
            ),
        )?;
    }
    Ok(())
}

/// Waits for something that happens on its own time.
async fn wait_for(what: &str, mut happened: impl FnMut() -> bool) -> anyhow::Result<()> {
    let wait = async {
        while !happened() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.with_context(|| format!("waited {PATIENCE:?} for {what}"))
}

fn step(out: &mut (dyn Write + Send), text: &str) -> anyhow::Result<()> {
    writeln!(out, "\n== {text}")?;
    Ok(out.flush()?)
}

fn say(out: &mut (dyn Write + Send), text: &str) -> anyhow::Result<()> {
    writeln!(out, "   {text}")?;
    Ok(out.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamped_component_differs_in_its_digest_only() {
        let stamped = stamped(SERIAL_ALLOW_LIST.component, "x");
        assert!(stamped.starts_with(SERIAL_ALLOW_LIST.component));
        assert_eq!(&stamped[SERIAL_ALLOW_LIST.component.len()..], b"\0\x07\x05buildx");
    }
}
