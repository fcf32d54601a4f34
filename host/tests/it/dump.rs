//! What `--dump` shows, and what it never shows.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{Method, StatusCode};
use plist::{Dictionary, Value};
use wasmdm_simulator::message::command_document;
use wasmdm_simulator::{Authority, Connection, Device, DeviceOptions, Message, Product};

use crate::api::call;
use crate::process::Home;

const SECRETS: [&str; 6] = ["canary-pin", "canary-wifi", "canary-scep", "canary-hash", "canary-digest", "canary-key"];

/// In NanoMDM `-dump` writes messages as they came, with every token, and leaves the answers out.
#[tokio::test(flavor = "multi_thread")]
async fn a_dump_shows_both_directions_and_no_secret() {
    let authority = Authority::new(91).unwrap();
    let home = Home::new(&authority.root_pem());
    let file = home.directory.path().join("dump.txt");
    let home = home.with(&["--ua-zl-dc", "--dump", &file.to_string_lossy()]);
    let server = home.start();
    let mut connection = Connection::to(&server.url()).unwrap();
    let options = DeviceOptions { product: Some(Product::Ipad), ..DeviceOptions::default() };
    let mut device = Device::with_options(&authority, 1, options).unwrap();
    device.enroll(&mut connection).await.unwrap();
    device.escrow_bootstrap_token(&mut connection).await.unwrap();
    let get = device.get_bootstrap_token().unwrap();
    device.insist(&mut connection, get).await.unwrap();
    let options = DeviceOptions { kind: Some(wasmdm_protocol::enrollment::EnrollmentKind::User), ..DeviceOptions::default() };
    let mut user = Device::with_options(&authority, 1, options).unwrap();
    (user.identity, user.udid) = (device.identity.clone(), device.udid.clone());
    let digest = user.user_authenticate(Some(SECRETS[4])).unwrap();
    user.insist(&mut connection, digest).await.unwrap();

    let mut wifi = Dictionary::new();
    wifi.insert("Password".to_owned(), SECRETS[1].into());
    wifi.insert("Challenge".to_owned(), SECRETS[2].into());
    wifi.insert("SSID_STR".to_owned(), "the-office".into());
    let mut profile = Vec::new();
    Value::Dictionary(wifi).to_writer_xml(&mut profile).unwrap();
    let keys = |pairs: &[(&str, Value)]| pairs.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect::<Dictionary>();
    for (uuid, request_type, keys) in [
        ("lock", "DeviceLock", keys(&[("PIN", SECRETS[0].into()), ("Message", "a message".into())])),
        ("profile", "InstallProfile", keys(&[("Payload", Value::Data(profile))])),
        ("account", "AccountConfiguration", keys(&[("passwordHash", Value::Data(SECRETS[3].into()))])),
        ("identity", "InstallProfile", keys(&[("Payload", Value::Data(SECRETS[5].into()))])),
    ] {
        let document = command_document(uuid, request_type, keys).unwrap();
        assert_eq!(call(&server, Method::PUT, &format!("/v1/enqueue/{}?nopush=1", device.id()), document).await.status, StatusCode::OK);
    }
    assert_eq!(device.poll_until_idle(&mut connection).await.unwrap().commands.len(), 4);
    let nonsense = Message::raw_check_in(format!("<dict><key>Token</key><string>{}", SECRETS[0]));
    assert_eq!(device.send(&mut connection, nonsense).await.unwrap().status, StatusCode::BAD_REQUEST);
    let mut stranger = Device::new(&Authority::new(92).unwrap(), 1).unwrap();
    let idle = stranger.idle().unwrap();
    assert_eq!(stranger.send(&mut connection, idle).await.unwrap().status, StatusCode::BAD_REQUEST);

    // Nobody waits for the writer.
    let mut dump = String::new();
    for _ in 0..1000 {
        dump = std::fs::read_to_string(&file).unwrap();
        if dump.contains("refused=\"identity certificate") || dump.contains("refused=\"Mdm-Signature") {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let mut hidden: Vec<String> = SECRETS.iter().flat_map(|secret| [(*secret).to_owned(), STANDARD.encode(secret)]).collect();
    hidden.push(device.push_magic.clone());
    for token in [device.token.clone(), device.bootstrap_token()] {
        hidden.push(STANDARD.encode(token).chars().take(20).collect());
    }
    for secret in hidden {
        assert!(!dump.contains(&secret), "{secret}: {dump}");
    }
    for shown in [
        ">>> request time=",
        "message=Authenticate bytes=",
        "message=TokenUpdate bytes=",
        "redacted=PushMagic,Token,UnlockToken",
        "redacted=BootstrapToken",
        "redacted=DigestResponse",
        "redacted=PIN",
        "redacted=Challenge,Password",
        "redacted=passwordHash",
        "the-office",
        "a message",
        "message=Idle",
        "message=Acknowledged",
        "<<< answer time=",
        "status=200 bytes=0",
        "unreadable bytes=",
        "status=400 refused=\"",
        &format!("enrollment=\"{}\"", device.id()),
    ] {
        assert!(dump.contains(shown), "{shown}: {dump}");
    }
    // Each answer has the id of its request.
    let ids = |direction: &str| {
        let lines = dump.lines().filter(|line| line.starts_with(direction));
        lines.map(|line| line.split(" id=").nth(1).unwrap().split(' ').next().unwrap().to_owned()).collect::<std::collections::BTreeSet<_>>()
    };
    assert!(ids(">>> ").is_subset(&ids("<<< ")));
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&file).unwrap());
    assert_eq!(mode & 0o777, 0o600);
}
