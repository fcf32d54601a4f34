//! The plugin enrollment-baseline in a server: the first commands, and the release from the Setup Assistant (edge case 18).

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use wasmdm::bundled::ENROLLMENT_BASELINE;
use wasmdm_simulator::{Answering, Authority, Behaviour, Connection, Device, DeviceOptions};

use crate::in_process::Server;

fn grant() -> String {
    let profile = STANDARD.encode("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<plist version=\"1.0\"><dict><key>PayloadIdentifier</key><string>example.wifi</string></dict></plist>");
    format!(
        "enabled = true\n[grants]\nkv = {{ bytes = \"1MiB\" }}\nenrollments = [\"read\"]\ntimers = true\n\
         commands = [\"enqueue:DeviceInformation\", \"enqueue:InstallProfile\", \"enqueue:DeviceConfigured\"]\n\
         [config]\nrelease_after = \"15m\"\nprofiles = [\"{profile}\"]\n"
    )
}

async fn stage(seed: u64, behaviour: Behaviour) -> (Server, Device, Connection) {
    let authority = Authority::new(seed).unwrap();
    let grant = grant();
    let plugin = (ENROLLMENT_BASELINE.name, ENROLLMENT_BASELINE.manifest, ENROLLMENT_BASELINE.component, grant.as_str());
    let server = Server::start(&authority, &[plugin]).await;
    let options = DeviceOptions { behaviour, awaiting_configuration: Some(true), ..DeviceOptions::default() };
    let mut device = Device::with_options(&authority, 1, options).unwrap();
    let mut connection = Connection::to(&server.url()).unwrap();
    device.enroll(&mut connection).await.unwrap();
    server.quiet().await;
    (server, device, connection)
}

/// What one session brought, after everything that followed from it was handled.
async fn session(server: &Server, device: &mut Device, connection: &mut Connection) -> Vec<String> {
    let session = device.poll_until_idle(connection).await.unwrap();
    server.quiet().await;
    session.commands.iter().map(|command| format!("{} {}", command.request_type, command.status.as_deref().unwrap_or("-"))).collect()
}

/// Edge case 18.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_is_not_released_before_a_deferred_profile_is_final() {
    let (server, mut device, mut connection) = stage(61, Behaviour::acknowledging().with("InstallProfile", Answering::NotNow { times: 2 })).await;
    let mut seen = Vec::new();
    for _ in 0..5 {
        seen.push(session(&server, &mut device, &mut connection).await);
    }
    let expected: [&[&str]; 5] = [
        &["DeviceInformation Acknowledged", "InstallProfile NotNow"],
        &["InstallProfile NotNow"],
        &["InstallProfile Acknowledged"],
        &["DeviceConfigured Acknowledged"],
        &[],
    ];
    assert_eq!(seen, expected);
    // The timer of the release finds that there is nothing to do.
    server.clock.advance(Duration::from_secs(16 * 60));
    server.quiet().await;
    assert_eq!(session(&server, &mut device, &mut connection).await, [""; 0]);
    server.stop().await;
}

/// Edge case 18.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_never_answers_is_released_once_when_the_time_is_over() {
    let (server, mut device, mut connection) = stage(62, Behaviour::acknowledging().with("InstallProfile", Answering::Never)).await;
    assert_eq!(session(&server, &mut device, &mut connection).await, ["DeviceInformation Acknowledged", "InstallProfile -"]);
    server.clock.advance(Duration::from_secs(14 * 60));
    server.quiet().await;
    assert_eq!(session(&server, &mut device, &mut connection).await, ["InstallProfile -"]);
    server.clock.advance(Duration::from_secs(61));
    server.quiet().await;
    let mut released = 0;
    for _ in 0..3 {
        let commands = session(&server, &mut device, &mut connection).await;
        released += commands.iter().filter(|command| command.starts_with("DeviceConfigured")).count();
    }
    assert_eq!(released, 1);
    server.stop().await;
}
