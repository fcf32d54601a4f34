//! What clients of NanoMDM see under `/v1`. docs/nanomdm.md says what is kept and what is corrected.

use http::{Method, StatusCode};
use wasmdm_protocol::enrollment::EnrollmentKind;
use wasmdm_simulator::message::command_document;
use wasmdm_simulator::{Answering, Authority, Behaviour, Connection, Device, DeviceOptions};

use crate::api::{basic, call, call_as, json, text};
use crate::process::{API_KEY, Home, ServerProcess};

fn command(uuid: &str) -> bytes::Bytes {
    command_document(uuid, "ProfileList", plist::Dictionary::new()).unwrap()
}

async fn enrolled(server: &ServerProcess, authority: &Authority, number: u64) -> Device {
    let mut device = Device::new(authority, number).unwrap();
    device.enroll(&mut Connection::to(&server.url()).unwrap()).await.unwrap();
    device
}

#[tokio::test]
async fn the_api_key_is_asked_for_as_nanomdm_asks() {
    let home = Home::without_authority();
    let server = home.start();
    for authorization in ["", &basic("nanomdm", "wrong"), &basic("root", API_KEY), "Basic !", &format!("Bearer {API_KEY}")] {
        let answer = call_as(&server, Method::GET, "/v1/push/A", "", authorization).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{authorization}");
        assert_eq!(answer.headers["www-authenticate"], "Basic realm=\"nanomdm\"");
        assert_eq!(text(&answer), "Unauthorized\n");
    }
    let answer = call_as(&server, Method::GET, "/v1/push/A", "", &basic("micromdm", API_KEY)).await;
    assert_ne!(answer.status, StatusCode::UNAUTHORIZED);
    let version = call_as(&server, Method::GET, "/version", "", "").await;
    assert_eq!(text(&version), format!("{{\"version\":\"{}\"}}", env!("CARGO_PKG_VERSION")));
    let nothing = call_as(&server, Method::GET, "/nope", "", "").await;
    assert_eq!((nothing.status, text(&nothing).as_str()), (StatusCode::NOT_FOUND, "404 page not found\n"));
}

/// A start line that NanoMDM takes, with keys that have nothing to sign and with values that are empty, did not start the server.
#[tokio::test]
async fn a_start_line_of_nanomdm_runs_the_server_and_what_is_idle_in_it_is_said() {
    let line = ["-webhook-hmac-key", "-kanarienvogel", "-dm", "", "-dm-send-hmac-key=kanarienvogel", "--dump=false", "--checkin=true"];
    let mut home = Home::without_authority().with(&line);
    for name in ["NANOMDM_WEBHOOK_URL", "NANOMDM_INTERMEDIATE", "NANOMDM_CERT_HEADER"] {
        home = home.with_variable(name, "".as_ref());
    }
    let server = home.start();
    server.logs(&["WARN", "webhook-hmac-key: it is not used, as there is no webhook-url"]).await;
    server.logs(&["WARN", "dm-send-hmac-key: it is not used, as there is no dm"]).await;
    assert!(!std::path::Path::new("false").exists());
}

#[tokio::test]
async fn an_enqueue_without_push_answers_to_the_byte_as_nanomdm() {
    let authority = Authority::new(21).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let device = enrolled(&server, &authority, 1).await;
    let answer = call(&server, Method::PUT, &format!("/v1/enqueue/{}?nopush=1", device.id()), command("C-2")).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.headers["content-type"], "application/json");
    assert_eq!(text(&answer), "{\n\t\"no_push\": true,\n\t\"command_uuid\": \"C-2\",\n\t\"request_type\": \"ProfileList\"\n}\n");
}

/// One unknown id failed the whole call (SQL), or was queued for in silence (default store). NanoMDM defect 7. Edge case 41.
#[tokio::test]
async fn each_id_has_its_own_outcome() {
    let authority = Authority::new(22).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let (one, two) = (enrolled(&server, &authority, 1).await, enrolled(&server, &authority, 2).await);
    let answer = call(&server, Method::PUT, &format!("/v1/enqueue/{},NOPE,{}?nopush=1", one.id(), two.id()), command("C")).await;
    assert_eq!(answer.status, StatusCode::MULTI_STATUS);
    let result = json(&answer);
    assert_eq!(result["status"].as_object().unwrap().keys().collect::<Vec<_>>(), ["NOPE"]);
    assert!(result["status"]["NOPE"]["command_error"].is_string());
    for mut device in [one, two] {
        let session = device.poll_until_idle(&mut Connection::to(&server.url()).unwrap()).await.unwrap();
        assert_eq!(session.commands.len(), 1);
    }
    let nobody = call(&server, Method::PUT, "/v1/enqueue/NOPE?nopush=1", command("D")).await;
    assert_eq!(nobody.status, StatusCode::INTERNAL_SERVER_ERROR);
}

/// A failed push made a 500 of a command that was queued, so that the client sent it again; and `nopush=0` was taken for yes. NanoMDM defect 7.
/// Edge case 50.
#[tokio::test]
async fn no_push_success_is_invented() {
    let authority = Authority::new(23).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let device = enrolled(&server, &authority, 1).await;
    // `nopush=0` and an empty value push; the command is queued, so a failed push is no 500.
    for (number, query) in ["", "?nopush=0", "?nopush="].into_iter().enumerate() {
        let answer = call(&server, Method::PUT, &format!("/v1/enqueue/{}{query}", device.id()), command(&format!("C-{number}"))).await;
        assert_eq!(answer.status, StatusCode::MULTI_STATUS, "{query}");
        let result = json(&answer);
        assert!(result.get("no_push").is_none());
        assert!(result["status"][device.id()]["push_error"].as_str().unwrap().contains("no push certificate for topic"));
        assert!(result["status"][device.id()].get("push_result").is_none());
    }
    let answer = call(&server, Method::GET, &format!("/v1/push/{},NOPE", device.id()), "").await;
    assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR);
    assert!(json(&answer)["status"]["NOPE"]["push_error"].as_str().unwrap().contains("not enrolled"));
}

#[tokio::test]
async fn a_bad_command_is_a_400_that_names_the_key_and_queues_nothing() {
    let authority = Authority::new(24).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let mut device = enrolled(&server, &authority, 1).await;
    let without = |key: &str| {
        let text = String::from_utf8(command("C").to_vec()).unwrap();
        text.replace(&format!("<key>{key}</key>"), "<key>Other</key>")
    };
    for (body, named) in [
        ("not a plist".to_owned(), None),
        (without("CommandUUID"), Some("CommandUUID")),
        (without("RequestType"), Some("RequestType")),
        (without("Command"), Some("Command")),
    ] {
        let answer = call(&server, Method::PUT, &format!("/v1/enqueue/{}?nopush=1", device.id()), body).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{named:?}");
        let error = json(&answer)["command_error"].as_str().unwrap().to_owned();
        assert!(named.is_none_or(|key| error.contains(key)), "{error}");
    }
    for path in ["/v1/enqueue/", "/v1/enqueue/,,", "/v1/push/"] {
        assert_eq!(call(&server, Method::PUT, path, command("C")).await.status, StatusCode::BAD_REQUEST, "{path}");
    }
    assert!(device.poll_until_idle(&mut Connection::to(&server.url()).unwrap()).await.unwrap().commands.is_empty());
}

/// An id that stood twice in one call got its command for ever. NanoMDM defect 3.
#[tokio::test]
async fn the_same_command_again_is_no_second_command_and_another_under_its_uuid_is_refused() {
    let authority = Authority::new(25).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let mut device = enrolled(&server, &authority, 1).await;
    // A client that lost the answer sends the same again; and an id may stand in the list twice.
    for _ in 0..2 {
        let answer = call(&server, Method::PUT, &format!("/v1/enqueue/{0},{0}?nopush=1", device.id()), command("C")).await;
        assert_eq!(answer.status, StatusCode::OK);
    }
    let other = command_document("C", "DeviceLock", plist::Dictionary::new()).unwrap();
    let answer = call(&server, Method::PUT, &format!("/v1/enqueue/{}?nopush=1", device.id()), other).await;
    assert_eq!(answer.status, StatusCode::CONFLICT);
    assert!(json(&answer)["command_error"].as_str().unwrap().contains("CommandUUID"));
    let session = device.poll_until_idle(&mut Connection::to(&server.url()).unwrap()).await.unwrap();
    assert_eq!(session.commands.iter().map(|command| command.request_type.as_str()).collect::<Vec<_>>(), ["ProfileList"]);
}

/// A deferred command of an id that stood twice spun a core for ever, also when the device had gone. NanoMDM defect 3.
#[tokio::test]
async fn an_id_that_stands_twice_is_asked_once_and_its_not_now_ends_the_session() {
    let authority = Authority::new(29).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let behaviour = Behaviour::acknowledging().with("ProfileList", Answering::NotNow { times: 1 });
    let mut device = Device::with_options(&authority, 1, DeviceOptions { behaviour, ..DeviceOptions::default() }).unwrap();
    let mut connection = Connection::to(&server.url()).unwrap();
    device.enroll(&mut connection).await.unwrap();
    let answer = call(&server, Method::PUT, &format!("/v1/enqueue/{0},{0}?nopush=1", device.id()), command("C")).await;
    assert_eq!(answer.status, StatusCode::OK);
    let mut seen = Vec::new();
    for _ in 0..3 {
        let session = device.poll_until_idle(&mut connection).await.unwrap();
        seen.push((session.requests, session.commands.into_iter().map(|command| command.status.unwrap()).collect::<Vec<_>>()));
    }
    assert_eq!(seen, [(2, vec!["NotNow".to_owned()]), (2, vec!["Acknowledged".to_owned()]), (1, vec![])]);
}

/// A device enrolled anew and lost its queue, and a client that sent its command again was told that all was well.
#[tokio::test]
async fn a_command_that_will_not_go_out_any_more_is_an_error_that_says_why() {
    let authority = Authority::new(30).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let (mut device, other) = (enrolled(&server, &authority, 1).await, enrolled(&server, &authority, 2).await);
    let path = format!("/v1/enqueue/{}?nopush=1", device.id());
    assert_eq!(call(&server, Method::PUT, &path, command("C")).await.status, StatusCode::OK);
    device.enroll(&mut Connection::to(&server.url()).unwrap()).await.unwrap();
    let answer = call(&server, Method::PUT, &path, command("C")).await;
    assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR, "{}", text(&answer));
    let problem = json(&answer)["status"][device.id()]["command_error"].as_str().unwrap().to_owned();
    assert!(problem.contains("was cancelled") && problem.contains("CommandUUID"), "{problem}");
    let answer = call(&server, Method::PUT, &format!("/v1/enqueue/{},{}?nopush=1", device.id(), other.id()), command("C")).await;
    assert_eq!(answer.status, StatusCode::MULTI_STATUS, "{}", text(&answer));
    assert!(json(&answer)["status"].get(other.id()).is_none());
}

/// An enrolled Mac may call its users as it likes: with a comma in a name, a command for that user was one for somebody else's device. So
/// no id has a comma, and those between ids may be encoded.
#[tokio::test]
async fn a_comma_within_an_id_names_nobody_else() {
    let authority = Authority::new(31).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let (mut victim, mut device) = (enrolled(&server, &authority, 1).await, enrolled(&server, &authority, 2).await);
    let mut user = Device::with_options(&authority, 2, DeviceOptions { kind: Some(EnrollmentKind::User), ..DeviceOptions::default() }).unwrap();
    user.replace_identity(device.identity.clone());
    user.user_id = format!("x,{}", victim.id());
    let mut connection = Connection::to(&server.url()).unwrap();
    let update = user.token_update().unwrap();
    let answer = user.send(&mut connection, update).await.unwrap();
    assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{}", answer.excerpt());

    // Clients that escape a path segment encode what stands between the ids, too.
    let both = format!("/v1/enqueue/{}%2C{}?nopush=1", device.id(), victim.id().replace('-', "%2D"));
    let answer = call(&server, Method::PUT, &both, command("BOTH")).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", text(&answer));
    for device in [&mut victim, &mut device] {
        assert_eq!(device.poll_until_idle(&mut connection).await.unwrap().commands.len(), 1);
    }
    assert_eq!(call(&server, Method::PUT, "/v1/enqueue/%FF?nopush=1", command("C")).await.status, StatusCode::BAD_REQUEST);
}

/// Go takes the first of two.
#[tokio::test]
async fn of_a_query_parameter_that_stands_twice_the_first_counts() {
    let authority = Authority::new(32).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let device = enrolled(&server, &authority, 1).await;
    let answer = call(&server, Method::PUT, &format!("/v1/enqueue/{}?nopush=1&nopush=0", device.id()), command("C")).await;
    assert_eq!((answer.status, &json(&answer)["no_push"]), (StatusCode::OK, &true.into()), "{}", text(&answer));
    let shown = call(&server, Method::GET, "/v1/pushcert?topic=com.apple.mgmt.none&topic=other", "").await;
    assert!(shown.status == StatusCode::NOT_FOUND && text(&shown).contains("com.apple.mgmt.none"), "{}", text(&shown));
}

/// Edge case 45.
#[tokio::test]
async fn a_command_reaches_the_device_to_the_byte_as_it_was_queued() {
    let authority = Authority::new(26).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let mut device = enrolled(&server, &authority, 1).await;
    let odd = format!(
        "\n<!-- by hand -->{}   \n",
        String::from_utf8(command("C").to_vec()).unwrap().replace("<?xml version=\"1.0\" encoding=\"UTF-8\"?>", "")
    );
    let answer = call(&server, Method::POST, &format!("/v1/enqueue/{}?nopush=1", device.id()), odd.clone()).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", text(&answer));
    let idle = device.idle().unwrap();
    let delivered = device.send(&mut Connection::to(&server.url()).unwrap(), idle).await.unwrap();
    assert_eq!(text(&delivered), odd);
    assert_eq!(delivered.headers["content-type"], "text/xml; charset=utf-8");
}

/// Edge case 31.
#[tokio::test]
async fn push_certificates_are_checked_stored_and_shown() {
    let home = Home::without_authority();
    let server = home.start();
    let topic = "com.apple.mgmt.External.0f0f0f0f-1111-2222-3333-444444444444";
    let (certificate, key) = push_certificate(Some(topic), 2030);
    let (_, other_key) = push_certificate(Some(topic), 2030);
    let (no_topic, its_key) = push_certificate(None, 2030);
    let (expired, expired_key) = push_certificate(Some(topic), 2020);
    let put = |body: String| {
        let server = &server;
        async move { call(server, Method::PUT, "/v1/pushcert", body).await }
    };
    for (body, reason) in [
        (String::new(), "PEM"),
        (certificate.clone(), "PRIVATE KEY"),
        (key.clone(), "CERTIFICATE"),
        (format!("{certificate}{other_key}"), "not the certificate's"),
        (format!("{no_topic}{its_key}"), "user id"),
        (format!("{expired}{expired_key}"), "expired"),
    ] {
        let answer = put(body).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{reason}");
        assert!(json(&answer)["error"].as_str().unwrap().contains(reason), "{}", text(&answer));
    }
    let shown = |topic: &str| {
        let path = format!("/v1/pushcert?topic={topic}");
        let server = &server;
        async move { call(server, Method::GET, &path, "").await }
    };
    assert_eq!(shown(topic).await.status, StatusCode::NOT_FOUND, "nothing wrong was stored");
    assert_eq!(call(&server, Method::GET, "/v1/pushcert", "").await.status, StatusCode::BAD_REQUEST);
    assert_eq!(call(&server, Method::POST, "/v1/pushcert", "").await.status, StatusCode::METHOD_NOT_ALLOWED);

    // Put together without a newline between, as some do.
    let stored = put(format!("{}{key}", certificate.trim_end())).await;
    assert_eq!(stored.status, StatusCode::OK, "{}", text(&stored));
    let expected = format!("{{\n\t\"not_after\": \"2030-01-01T00:00:00Z\",\n\t\"topic\": \"{topic}\"\n}}\n");
    assert_eq!(text(&stored), expected);
    assert_eq!(text(&shown(topic).await), expected);
}

pub(crate) fn push_certificate(topic: Option<&str>, year: i32) -> (String, String) {
    use rcgen::{CertificateParams, DistinguishedName, DnType, DnValue, KeyPair};
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "APSP:test");
    if let Some(topic) = topic {
        params.distinguished_name.push(DnType::CustomDnType(vec![0, 9, 2342, 19_200_300, 100, 1, 1]), DnValue::Utf8String(topic.to_owned()));
    }
    params.not_before = rcgen::date_time_ymd(2019, 1, 1);
    params.not_after = rcgen::date_time_ymd(year, 1, 1);
    (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
}

fn with_content_type(
    device: &mut Device,
    message: wasmdm_simulator::Message,
    content_type: Option<&'static str>,
) -> wasmdm_simulator::device::Prepared {
    let mut prepared = device.prepare(message).unwrap();
    prepared.headers.remove(http::header::CONTENT_TYPE);
    if let Some(content_type) = content_type {
        prepared.headers.insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    }
    prepared
}

const CHECK_IN: Option<&str> = Some("application/x-apple-aspen-mdm-checkin");

/// With `-checkin` the path alone tells what a message is. Edge case 1.
#[tokio::test]
async fn a_split_check_in_url_takes_each_kind_at_its_own_path_whatever_the_content_type_says() {
    let authority = Authority::new(27).unwrap();
    for split in [true, false] {
        let home = Home::new(&authority.root_pem()).with(if split { &["--checkin"] } else { &[] });
        let server = home.start();
        let mut device = Device::new(&authority, 1).unwrap();
        let mut connection = Connection::to(&server.url()).unwrap();
        let mut send = async |message: wasmdm_simulator::Message, path: &str, content_type| {
            let prepared = with_content_type(&mut device, message, content_type);
            connection.request(Method::PUT, path.parse().unwrap(), prepared.headers, prepared.message.body).await.unwrap().status
        };
        let example = Device::new(&authority, 1).unwrap();
        let (authenticate, update, idle) = (example.authenticate().unwrap(), example.token_update().unwrap(), example.idle().unwrap());
        for content_type in [CHECK_IN, None] {
            assert_eq!(send(authenticate.clone(), "/checkin", content_type).await, StatusCode::OK);
            assert_eq!(send(update.clone(), "/checkin", content_type).await, StatusCode::OK);
            assert_eq!(send(idle.clone(), "/checkin", content_type).await, StatusCode::BAD_REQUEST);
        }
        // A check-in at the wrong path is refused, and takes nothing from the device.
        let expected = if split { StatusCode::BAD_REQUEST } else { StatusCode::OK };
        assert_eq!(send(update.clone(), "/mdm", CHECK_IN).await, expected);
        assert_eq!(send(update.clone(), "/mdm", None).await, StatusCode::BAD_REQUEST);
        assert_eq!(send(idle.clone(), "/mdm", None).await, StatusCode::OK);
        let expected = if split { StatusCode::OK } else { StatusCode::BAD_REQUEST };
        assert_eq!(send(idle.clone(), "/mdm", CHECK_IN).await, expected);
        home.check(&[]);
    }
}

#[tokio::test]
async fn a_server_without_mdm_serves_its_api_and_no_device() {
    let authority = Authority::new(28).unwrap();
    let home = Home::without_authority().with(&["--disable-mdm", "--auth-proxy-url", "http://127.0.0.1:1/"]);
    let server = home.start();
    let mut device = Device::new(&authority, 1).unwrap();
    let mut connection = Connection::to(&server.url()).unwrap();
    let authenticate = device.authenticate().unwrap();
    let prepared = device.prepare(authenticate).unwrap();
    for path in ["/mdm", "/checkin", "/authproxy/x"] {
        let answer = connection.request(Method::PUT, path.parse().unwrap(), prepared.headers.clone(), prepared.message.body.clone()).await.unwrap();
        assert_eq!((answer.status, text(&answer).as_str()), (StatusCode::NOT_FOUND, "404 page not found\n"), "{path}");
    }
    assert_eq!(call(&server, Method::GET, "/readyz", "").await.status, StatusCode::OK, "an authority is nobody's need");
    assert_eq!(call(&server, Method::PUT, "/v1/enqueue/A?nopush=1", command("C")).await.status, StatusCode::INTERNAL_SERVER_ERROR);
}
