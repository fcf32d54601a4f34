//! What the core makes of answers that only one owner can give.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use wasmdm_protocol::enrollment::{EnrollmentId, EnrollmentKind, TenantId};
use wasmdm_protocol::plist::{self, Dictionary, Value};
use wasmdm_service::asker::Asker;
use wasmdm_service::certificate_binding::BindingRules;
use wasmdm_service::core::Options;
use wasmdm_service::enrollment_policy::Verdict;
use wasmdm_service::owned_answer::OwnedAnswer;
use wasmdm_service::reply::{RETRY_AFTER, Refusal, Reply};
use wasmdm_service::return_to_service::{Configuration, ReturnToService};
use wasmdm_service::token_source::{ServiceToken, TokenRequest, TokenSource};
use wasmdm_service::user_authentication::{Login, UserAuthentication, UserVerdict};
use wasmdm_simulator::{Device, DeviceOptions, Message};

use crate::stage::{Stage, answer};

/// Answers with what was prepared, and remembers what it was asked.
#[derive(Debug, Default)]
struct Owner {
    tokens: Mutex<Vec<OwnedAnswer<Option<ServiceToken>>>>,
    configurations: Mutex<Vec<OwnedAnswer<Option<Configuration>>>>,
    verdicts: Mutex<Vec<OwnedAnswer<UserVerdict>>>,
    asked: Mutex<Vec<String>>,
    /// The plugin is removed.
    is_gone: Mutex<bool>,
}

impl TokenSource for Owner {
    fn token<'a>(&'a self, asked: &'a TokenRequest) -> BoxFuture<'a, Result<OwnedAnswer<Option<ServiceToken>>, Refusal>> {
        self.asked.lock().push(format!("{} {}", asked.asker.enrollment.id, asked.service_type));
        let answer = self.tokens.lock().pop().unwrap_or(OwnedAnswer::Nobody);
        Box::pin(async move { Ok(answer) })
    }
}

impl ReturnToService for Owner {
    fn configuration<'a>(&'a self, asker: &'a Asker) -> BoxFuture<'a, Result<OwnedAnswer<Option<Configuration>>, Refusal>> {
        self.asked.lock().push(format!("{} return", asker.enrollment.id));
        let answer = self.configurations.lock().pop().unwrap_or(OwnedAnswer::Nobody);
        Box::pin(async move { Ok(answer) })
    }
}

impl UserAuthentication for Owner {
    fn authenticate<'a>(&'a self, login: &'a Login) -> BoxFuture<'a, Result<OwnedAnswer<UserVerdict>, Refusal>> {
        self.asked.lock().push(format!("{} {} {}", login.asker.enrollment.id, login.asker.topic, login.digest_response.as_deref().unwrap_or("-")));
        let answer = self.verdicts.lock().pop().unwrap_or(OwnedAnswer::Nobody);
        Box::pin(async move { Ok(answer) })
    }

    fn is_there(&self, _tenant: &TenantId) -> bool {
        !*self.is_gone.lock()
    }
}

async fn stage(zero_length_digest_challenge: bool) -> (Stage, Arc<Owner>) {
    let owner = Arc::new(Owner::default());
    let options = Options {
        token_source: Some(Arc::clone(&owner) as Arc<dyn TokenSource>),
        return_to_service: Some(Arc::clone(&owner) as Arc<dyn ReturnToService>),
        user_authentication: Some(Arc::clone(&owner) as Arc<dyn UserAuthentication>),
        zero_length_digest_challenge,
        ..Options::default()
    };
    (Stage::with(options, BindingRules::default()).await, owner)
}

fn token() -> OwnedAnswer<Option<ServiceToken>> {
    OwnedAnswer::Given(Some(ServiceToken::new("token".into()).unwrap()))
}

fn failed<T>() -> OwnedAnswer<T> {
    OwnedAnswer::Failed { reason: "it trapped".to_owned() }
}

fn user_of(stage: &Stage, device: &Device) -> Device {
    let options = DeviceOptions { kind: Some(EnrollmentKind::User), ..DeviceOptions::default() };
    let mut user = Device::with_options(&stage.authority, device.number, options).unwrap();
    user.replace_identity(device.identity.clone());
    user
}

fn document(reply: Result<Reply, Refusal>) -> Dictionary {
    let Ok(Reply::Plist(body)) = reply else { panic!("{reply:?}") };
    let Ok(Value::Dictionary(document)) = plist::parse(&body) else { panic!("{body:?}") };
    document
}

fn bad_request(reply: Result<Reply, Refusal>, named: &str) {
    match reply {
        Err(Refusal::BadRequest { reason }) => assert!(reason.contains(named), "{reason}"),
        other => panic!("{named}: {other:?}"),
    }
}

fn unavailable(reply: Result<Reply, Refusal>) {
    match reply {
        Err(Refusal::Unavailable { retry_after, .. }) => assert_eq!(retry_after, RETRY_AFTER),
        other => panic!("{other:?}"),
    }
}

/// Edge case 48.
#[tokio::test]
async fn a_token_goes_out_as_data_and_every_refusal_names_its_key() {
    let (stage, owner) = stage(false).await;
    let device = stage.device(1);
    let asked = || device.get_token("com.apple.maid").unwrap();
    stage.enroll(&device).await;

    owner.tokens.lock().push(token());
    assert_eq!(document(stage.send(&device, asked()).await)["TokenData"].as_data(), Some(&b"token"[..]));
    bad_request(stage.send(&device, asked()).await, "TokenServiceType: nobody serves `com.apple.maid`");
    owner.tokens.lock().push(OwnedAnswer::Given(None));
    bad_request(stage.send(&device, asked()).await, "TokenServiceType");
    owner.tokens.lock().push(failed());
    unavailable(stage.send(&device, asked()).await);
    assert_eq!(*owner.asked.lock(), vec![format!("{} com.apple.maid", device.id()); 4]);
}

/// What Apple requires of a pairing is missing: nobody needs to be asked.
/// Edge case 48.
#[tokio::test]
async fn parameters_that_are_missing_or_too_long_are_named() {
    let (stage, owner) = stage(false).await;
    let device = stage.device(1);
    stage.enroll(&device).await;
    bad_request(stage.send(&device, device.get_token("com.apple.watch.pairing").unwrap()).await, "SecurityToken");
    let with = |parameters: &[(&str, &str)], service: &str| {
        let mut parameters: Dictionary = parameters.iter().map(|(key, value)| ((*key).to_owned(), Value::from(*value))).collect();
        parameters.insert("PhoneUDID".to_owned(), Value::from("P"));
        device.get_token_with(service, parameters).unwrap()
    };
    let watch = "com.apple.watch.pairing";
    bad_request(stage.send(&device, with(&[("SecurityToken", "S")], watch)).await, "WatchUDID");
    bad_request(stage.send(&device, with(&[("Long", &"x".repeat(70_000))], "com.apple.maid")).await, "TokenParameters");
    assert!(owner.asked.lock().is_empty());
    owner.tokens.lock().push(token());
    document(stage.send(&device, with(&[("SecurityToken", "S"), ("WatchUDID", "W")], watch)).await);
}

/// Edge case 49.
#[tokio::test]
async fn only_who_is_enrolled_and_not_in_quarantine_gets_answers() {
    let (stage, owner) = stage(false).await;
    let ask = async |device: &Device, named: &str| {
        for message in [device.get_token("com.apple.maid").unwrap(), device.return_to_service().unwrap()] {
            bad_request(stage.send(device, message).await, named);
        }
    };
    let device = stage.device(1);
    ask(&device, "bound to no enrollment").await;
    stage.send(&device, device.authenticate().unwrap()).await.unwrap();
    ask(&device, "not enrolled").await;
    stage.enroll(&device).await;
    stage.send(&device, device.check_out().unwrap()).await.unwrap();
    ask(&device, "not enrolled").await;

    let suspect = stage.device(2);
    stage.policy.answers.lock().push(answer(Verdict::Quarantine { by: "policy".to_owned(), tags: Vec::new() }));
    stage.enroll(&suspect).await;
    ask(&suspect, "quarantine").await;
    let user = user_of(&stage, &suspect);
    bad_request(stage.send(&user, user.get_token("com.apple.maid").unwrap()).await, "unknown");
    stage.send(&user, user.token_update().unwrap()).await.unwrap();
    bad_request(stage.send(&user, user.get_token("com.apple.maid").unwrap()).await, "quarantine");
    assert!(owner.asked.lock().is_empty());
}

/// Edge case 49.
#[tokio::test]
async fn the_escrowed_bootstrap_token_goes_out_with_a_return_to_service_that_asks_for_it() {
    let (stage, owner) = stage(false).await;
    let device = stage.device(1);
    let ask = || stage.send(&device, device.return_to_service().unwrap());
    let configuration = |wanted: bool| {
        let keys =
            [("Enabled", Value::Boolean(true)), ("WiFiProfileData", Value::Data(b"Wi-Fi".to_vec())), ("BootstrapToken", Value::Boolean(wanted))];
        OwnedAnswer::Given(Some(Configuration::new(keys.map(|(key, value)| (key.to_owned(), value)).into_iter().collect()).unwrap()))
    };
    stage.enroll(&device).await;
    let answered = |reply| document(reply)["ReturnToService"].as_dictionary().unwrap().clone();
    // None is escrowed: the device returns without its apps.
    owner.configurations.lock().push(configuration(true));
    let keys = answered(ask().await);
    assert_eq!(keys.get("WiFiProfileData").and_then(Value::as_data), Some(&b"Wi-Fi"[..]));
    assert_eq!((keys.get("Enabled").and_then(Value::as_boolean), keys.get("BootstrapToken")), (Some(true), None));

    stage.send(&device, device.set_bootstrap_token(Some(b"escrowed")).unwrap()).await.unwrap();
    for (wanted, expected) in [(true, Some(&b"escrowed"[..])), (false, None)] {
        owner.configurations.lock().push(configuration(wanted));
        assert_eq!(answered(ask().await).get("BootstrapToken").and_then(Value::as_data), expected);
    }
    bad_request(ask().await, "nobody serves");
    owner.configurations.lock().push(OwnedAnswer::Given(None));
    bad_request(ask().await, "does not return");
    owner.configurations.lock().push(failed());
    unavailable(ask().await);
    let user = user_of(&stage, &device);
    stage.send(&user, user.token_update().unwrap()).await.unwrap();
    let mut keys = Dictionary::new();
    for (key, value) in [("UDID", &user.udid), ("UserID", &user.user_id), ("UserShortName", &user.user_short_name)] {
        keys.insert(key.to_owned(), Value::from(value.as_str()));
    }
    bad_request(stage.send(&user, Message::check_in("ReturnToService", keys).unwrap()).await, "device channel");
}

/// Edge case 33.
#[tokio::test]
async fn each_verdict_about_a_user_has_apples_answer() {
    for zero_length in [false, true] {
        let (stage, owner) = stage(zero_length).await;
        let device = stage.device(1);
        stage.enroll(&device).await;
        let user = user_of(&stage, &device);
        let ask = async |digest: Option<&str>, verdict: OwnedAnswer<UserVerdict>| {
            owner.verdicts.lock().push(verdict);
            stage.send(&user, user.user_authenticate(digest).unwrap()).await
        };
        let given = OwnedAnswer::Given;
        let said = |reply, key: &str| document(reply)[key].as_string().unwrap().to_owned();
        assert_eq!(said(ask(None, given(UserVerdict::Challenge("prove it".to_owned()))).await, "DigestChallenge"), "prove it");
        assert_eq!(said(ask(None, given(UserVerdict::NoChallenge)).await, "DigestChallenge"), "");
        assert_eq!(said(ask(Some("d"), given(UserVerdict::AuthToken("token".to_owned()))).await, "AuthToken"), "token");
        // A rejected digest is no refusal: an empty token says so.
        assert_eq!(said(ask(Some("d"), given(UserVerdict::Reject)).await, "AuthToken"), "");
        assert_eq!(ask(None, given(UserVerdict::Decline)).await, Err(Refusal::Declined));
        assert_eq!(ask(Some("d"), given(UserVerdict::Decline)).await, Err(Refusal::Declined));
        // Also with `--ua-zl-dc`: who cannot be asked does not open the door.
        assert_eq!(ask(None, failed()).await, Err(Refusal::Declined));
        // No opinion, and nobody to have one, are the same.
        for verdict in [given(UserVerdict::Abstain), OwnedAnswer::Nobody] {
            let first = ask(None, verdict.clone()).await;
            if zero_length {
                assert_eq!(said(first, "DigestChallenge"), "");
            } else {
                assert_eq!(first, Err(Refusal::Declined));
            }
            assert_eq!(ask(Some("d"), verdict).await, Ok(Reply::Empty));
        }
        let asked = owner.asked.lock();
        assert_eq!(asked[0], format!("{} {} -", user.id(), device.topic));
        assert_eq!(asked[2], format!("{} {} d", user.id(), device.topic));
    }
}

/// The device sends the token that it was given with each message of the user's channel: messages that have it are as good as others.
/// Edge case 33.
#[tokio::test]
async fn messages_with_an_auth_token_are_taken_and_it_shows_nowhere() {
    let (stage, _) = stage(false).await;
    let device = stage.device(1);
    stage.enroll(&device).await;
    let user = user_of(&stage, &device);
    for message in [user.token_update(), user.idle(), user.declarative_management("status", Some(b"{}")), user.check_out()] {
        assert_eq!(stage.send(&user, with_token(message.unwrap(), "hush")).await, Ok(Reply::Empty));
    }
    let record = stage.storage.enrollment(&EnrollmentId::new(user.id())).await.unwrap().unwrap();
    assert!(!format!("{record:?}").contains("hush"));
}

/// A message of the user's channel with a token.
fn with_token(message: Message, token: &str) -> Message {
    let text = String::from_utf8(message.body.to_vec()).unwrap();
    let body = text.replacen("<dict>", &format!("<dict><key>AuthToken</key><string>{token}</string>"), 1);
    Message { body: body.into(), ..message }
}

/// The plugin's verdict was an answer to the Mac and nothing more: one that ignores it had the user's channel, and what waits in it.
/// Edge case 33.
#[tokio::test]
async fn who_was_turned_away_stays_out_whatever_the_device_sends() {
    let (stage, owner) = stage(false).await;
    let device = stage.device(1);
    stage.enroll(&device).await;
    let user = user_of(&stage, &device);
    let log_in = async |digest: Option<&str>, verdict: OwnedAnswer<UserVerdict>| {
        owner.verdicts.lock().push(verdict);
        let _ = stage.send(&user, user.user_authenticate(digest).unwrap()).await;
    };
    let given = OwnedAnswer::Given;
    let challenge = || given(UserVerdict::Challenge("prove it".to_owned()));
    // Before the user has a channel, and when there is one.
    for has_channel in [false, true] {
        for (first, second) in [
            (given(UserVerdict::Decline), None),
            (challenge(), None),
            (challenge(), Some(given(UserVerdict::Reject))),
            // Having no opinion of a digest does not make it the right one.
            (challenge(), Some(given(UserVerdict::Abstain))),
            (failed(), None),
        ] {
            log_in(None, first).await;
            if let Some(second) = second {
                log_in(Some("d"), second).await;
            }
            let messages = [user.token_update(), user.report("Acknowledged", "U1"), user.declarative_management("tokens", None), user.get_token("t")];
            for message in messages {
                let refused = stage.send(&user, message.unwrap()).await;
                // Before there is a channel, a report is refused because of that.
                assert!(matches!(refused, Err(Refusal::BadRequest { .. })), "{refused:?}");
            }
            // For whom there is no channel there is nothing to refuse.
            let polled = stage.send(&user, user.idle().unwrap()).await;
            assert_eq!(polled.is_err(), has_channel, "{polled:?}");
            assert_eq!(stage.send(&device, device.idle().unwrap()).await, Ok(Reply::Empty), "the device is as before");
            assert_eq!(stage.send(&device, device.set_bootstrap_token(Some(b"b")).unwrap()).await, Ok(Reply::Empty));
        }
        log_in(None, given(UserVerdict::NoChallenge)).await;
        assert_eq!(stage.send(&user, user.token_update().unwrap()).await, Ok(Reply::Empty));
        assert_eq!(stage.send(&user, user.idle().unwrap()).await, Ok(Reply::Empty));
    }
    log_in(None, given(UserVerdict::Decline)).await;
    bad_request(stage.send(&user, user.idle().unwrap()).await, "`decline`");
    *owner.is_gone.lock() = true;
    assert_eq!(stage.send(&user, user.idle().unwrap()).await, Ok(Reply::Empty), "without the plugin nothing is judged");
    *owner.is_gone.lock() = false;
    // No opinion is as if there were no such plugin.
    log_in(None, given(UserVerdict::Abstain)).await;
    assert_eq!(stage.send(&user, user.idle().unwrap()).await, Ok(Reply::Empty));
}

/// A report that cannot be read does not say that it is a user's, but it is answered with the user's next command. Edge case 33.
#[tokio::test]
async fn a_malformed_report_brings_no_command_of_a_user_who_was_turned_away() {
    let (stage, owner) = stage(false).await;
    let device = stage.device(1);
    stage.enroll(&device).await;
    let user = user_of(&stage, &device);
    stage.send(&user, user.token_update().unwrap()).await.unwrap();
    for uuid in ["U1", "U2", "U3"] {
        crate::identities::queue(&stage, &user, uuid, false).await;
    }
    let fetched = |reply: Result<Reply, Refusal>| match reply {
        Ok(Reply::Command { uuid, .. }) => uuid,
        other => panic!("{other:?}"),
    };
    let malformed = |uuid: &str| device.malformed_report(&device.id(), uuid);
    assert_eq!(fetched(stage.send(&user, user.idle().unwrap()).await), "U1");
    assert_eq!(fetched(stage.send(&device, malformed("U1")).await), "U2", "nobody has said anything of the user");
    owner.verdicts.lock().push(OwnedAnswer::Given(UserVerdict::Decline));
    assert_eq!(stage.send(&user, user.user_authenticate(None).unwrap()).await, Err(Refusal::Declined));
    bad_request(stage.send(&device, malformed("U2")).await, "`decline`");
}

/// Edge case 33.
#[tokio::test]
async fn another_token_than_the_one_that_was_given_is_refused() {
    let (stage, owner) = stage(false).await;
    let device = stage.device(1);
    stage.enroll(&device).await;
    let user = user_of(&stage, &device);
    for (digest, verdict) in [(None, UserVerdict::Challenge("prove it".to_owned())), (Some("d"), UserVerdict::AuthToken("hush".to_owned()))] {
        owner.verdicts.lock().push(OwnedAnswer::Given(verdict));
        stage.send(&user, user.user_authenticate(digest).unwrap()).await.unwrap();
    }
    let update = || user.token_update().unwrap();
    assert_eq!(stage.send(&user, with_token(update(), "hush")).await, Ok(Reply::Empty));
    assert_eq!(stage.send(&user, with_token(user.idle().unwrap(), "hush")).await, Ok(Reply::Empty));
    // Apple's schema lists the token as a key of no message.
    assert_eq!(stage.send(&user, update()).await, Ok(Reply::Empty));
    bad_request(stage.send(&user, with_token(update(), "guessed")).await, "AuthToken");
    bad_request(stage.send(&user, with_token(user.idle().unwrap(), "guessed")).await, "AuthToken");
}
