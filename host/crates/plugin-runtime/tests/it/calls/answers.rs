//! Answers that only one plugin can give.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use wasmdm_plugin_runtime::effective::{Effective, Mode};
use wasmdm_plugin_runtime::hook::Hook;
use wasmdm_plugin_runtime::plugin::LinkedPlugin;
use wasmdm_plugin_runtime::registry::{Entry, Missing, Registry};
use wasmdm_protocol::enrollment::{Enrollment, EnrollmentId, EnrollmentKind, TenantId};
use wasmdm_protocol::plist::{self, Value};
use wasmdm_service::asker::Asker;
use wasmdm_service::clock::Clock as _;
use wasmdm_service::owned_answer::OwnedAnswer;
use wasmdm_service::return_to_service::{Configuration, ReturnToService as _};
use wasmdm_service::token_source::{ServiceToken, TokenRequest, TokenSource as _};
use wasmdm_service::user_authentication::{Login, UserAuthentication as _, UserVerdict};

use super::setup::Server;

const MAID: &str = "com.apple.maid";

fn asker(id: &str) -> Asker {
    let (device, user) = id.split_once(':').map_or((id, None), |(device, user)| (device, Some(user)));
    let kind = if user.is_some() { EnrollmentKind::User } else { EnrollmentKind::Device };
    Asker {
        tenant: TenantId::default(),
        enrollment: Enrollment { id: EnrollmentId::new(id), parent: user.map(|_| EnrollmentId::new(device)), kind },
        topic: String::from("com.apple.mgmt.External.test"),
        facts: json!({ "tags": [], "url_params": {} }),
        request_id: String::from("REQUEST"),
    }
}

fn asked(service: &str) -> TokenRequest {
    TokenRequest { asker: asker("D"), service_type: service.to_owned(), parameters: None }
}

fn login(id: &str, digest: Option<&str>) -> Login {
    let mut message = plist::Dictionary::new();
    message.insert(String::from("MessageType"), Value::from("UserAuthenticate"));
    message.insert(String::from("DigestResponse"), Value::from(digest.unwrap_or_default()));
    Login { asker: asker(id), message: Value::Dictionary(message), digest_response: digest.map(str::to_owned) }
}

impl Server {
    async fn token(&self, service: &str) -> OwnedAnswer<Option<ServiceToken>> {
        self.answers.token(&asked(service)).await.unwrap()
    }

    async fn configuration(&self) -> OwnedAnswer<Option<Configuration>> {
        self.answers.configuration(&asker("D")).await.unwrap()
    }

    async fn user(&self, id: &str, digest: Option<&str>) -> OwnedAnswer<UserVerdict> {
        self.answers.authenticate(&login(id, digest)).await.unwrap()
    }

    async fn audited(&self) -> Vec<String> {
        self.storage.audit(&TenantId::default(), 100).await.unwrap().into_iter().map(|row| format!("{} {}", row.actor, row.action)).collect()
    }

    async fn kept(&self, plugin: &str) -> Vec<(String, String)> {
        let pairs = self.storage.kv_scan(&TenantId::default(), plugin, "", None, 100, self.clock.now()).await.unwrap();
        pairs.into_iter().map(|pair| (pair.key, String::from_utf8_lossy(&pair.value).into_owned())).collect()
    }
}

fn text(answer: OwnedAnswer<Option<ServiceToken>>) -> String {
    match answer {
        OwnedAnswer::Given(Some(token)) => String::from_utf8_lossy(token.expose()).into_owned(),
        other => panic!("{other:?}"),
    }
}

fn reason<T: std::fmt::Debug>(answer: OwnedAnswer<T>) -> String {
    match answer {
        OwnedAnswer::Failed { reason } => reason,
        other => panic!("{other:?}"),
    }
}

/// Edge case 48.
#[tokio::test]
async fn each_service_type_has_its_own_plugin_and_an_unknown_one_has_none() {
    let server = Server::start().await;
    assert_eq!(server.token(MAID).await, OwnedAnswer::Nobody);
    let watch = "com.apple.watch.pairing";
    server.activate([server.answering("maid", "", &[MAID], |_| ()), server.answering("watch", "count", &[watch], |_| ())]);
    assert_eq!(text(server.token(MAID).await), "com.apple.maid for D {}");
    assert_eq!(text(server.token(watch).await), "1");
    assert_eq!(server.token("com.apple.else").await, OwnedAnswer::Nobody);
    assert_eq!(server.kept("maid").await.len(), 1);
}

#[tokio::test]
async fn the_parameters_reach_the_plugin_whole_and_no_log() {
    let server = Server::start().await;
    server.activate([server.answering("a", "", &[MAID], |_| ())]);
    let mut parameters = plist::Dictionary::new();
    parameters.insert(String::from("SecurityToken"), Value::from("hush"));
    let asked = TokenRequest { parameters: Some(Value::Dictionary(parameters)), ..asked(MAID) };
    assert_eq!(text(server.answers.token(&asked).await.unwrap()), r#"com.apple.maid for D {"SecurityToken":"hush"}"#);
    assert!(!format!("{asked:?}").contains("hush"));
    let login = login("D:U", Some("hush"));
    assert!(!format!("{login:?}").contains("hush"));
}

/// A failure is never "there is none": the device is to come again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_plugin_cannot_answer_is_a_failure_that_is_audited() {
    let server = Server::start().await;
    let activate = |behave: &str, adjust: fn(&mut Effective)| server.activate([server.answering("a", behave, &[MAID], adjust)]);
    for (behave, label) in
        [("trap", "trap"), ("loop", "cpu"), ("fail", "failure"), ("empty", "failure"), ("long", "failure"), ("huge", "output-too-large")]
    {
        // Making so much takes a while in a build that is not optimised; only the loop is to use up its time.
        let patient: fn(&mut Effective) = |effective| effective.settings.limits.cpu_sync = Duration::from_secs(2);
        activate(behave, if behave == "huge" { patient } else { |_| () });
        assert_eq!(reason(server.token(MAID).await), format!("plugin a could not answer ({label})"), "{behave}");
    }
    activate("sleep", |effective| effective.settings.limits.wall.answer = Duration::from_millis(100));
    assert!(reason(server.token(MAID).await).contains("deadline"));
    for behave in ["trap", "fail", "rubbish", "no-dictionary", "without-enabled", "own-bootstrap-token", "huge"] {
        activate(behave, |_| ());
        assert!(reason(server.configuration().await).starts_with("plugin a could not answer ("), "{behave}");
    }
    for behave in ["trap", "fail", "perhaps", "reject", "auth-token-at-once", "without-detail", "empty-challenge"] {
        activate(behave, |_| ());
        assert!(reason(server.user("E:U", None).await).starts_with("plugin a could not answer ("), "{behave}");
    }
    for behave in ["no-challenge", "challenge-again"] {
        activate(behave, |_| ());
        assert!(reason(server.user("F:U", Some("digest")).await).starts_with("plugin a could not answer ("), "{behave}");
    }
    let audited = server.audited().await;
    // Ten rows of one plugin about one device in a minute, users and all.
    assert_eq!(audited.len(), 10 + 7 + 2, "{audited:?}");
    assert!(
        audited.contains(&String::from("plugin:a token-source.failure")) && audited.contains(&String::from("plugin:a user-authentication.failure"))
    );
    activate("longest", |_| ());
    assert_eq!(text(server.token(MAID).await).len(), 64 << 10);
    activate("none", |_| ());
    assert_eq!(server.token(MAID).await, OwnedAnswer::Given(None));
    assert_eq!(server.configuration().await, OwnedAnswer::Given(None));
}

#[tokio::test]
async fn a_configuration_has_apples_keys_and_asks_for_the_bootstrap_token() {
    let server = Server::start().await;
    server.activate([server.answering("a", "", &[], |_| ())]);
    let OwnedAnswer::Given(Some(configuration)) = server.configuration().await else { panic!() };
    assert!(configuration.with_bootstrap_token);
    assert!(!format!("{configuration:?}").contains("Wi-Fi"));
    let keys = configuration.into_keys(Some(b"token"));
    assert_eq!(keys.get("WiFiProfileData").and_then(Value::as_data), Some(&b"Wi-Fi"[..]));
    assert_eq!(keys.get("BootstrapToken").and_then(Value::as_data), Some(&b"token"[..]));
}

/// What the first answer wrote is stored before it goes out: the plugin knows its own challenge again.
/// Edge case 33.
#[tokio::test]
async fn a_user_proves_who_they_are_in_two_steps() {
    let server = Server::start().await;
    assert_eq!(server.user("D:U", None).await, OwnedAnswer::Nobody);
    server.activate([server.answering("a", "", &[], |_| ())]);
    assert_eq!(server.user("D:U", None).await, OwnedAnswer::Given(UserVerdict::Challenge(String::from("challenge for D:U"))));
    assert_eq!(server.user("D:U", Some("wrong")).await, OwnedAnswer::Given(UserVerdict::Reject));
    let right = server.user("D:U", Some("digest of challenge for D:U")).await;
    assert_eq!(right, OwnedAnswer::Given(UserVerdict::AuthToken(String::from("token of D:U"))));
    assert_eq!(server.user("D:U", Some("digest of challenge for D:U")).await, OwnedAnswer::Given(UserVerdict::Reject));
    let logins: Vec<_> = server.kept("a").await.into_iter().filter(|(key, _)| key.starts_with("login/")).collect();
    assert_eq!(logins.len(), 4);
    for (_, handed) in &logins {
        assert!(handed.contains(r#""DigestResponse":{"$redacted":true}"#) && !handed.contains("digest of"), "{handed}");
    }
    assert_eq!(server.audited().await, ["plugin:a user-authentication.reject", "plugin:a user-authentication.reject"]);
    for (behave, verdict) in [("abstain", UserVerdict::Abstain), ("decline", UserVerdict::Decline), ("no-challenge", UserVerdict::NoChallenge)] {
        server.activate([server.answering("a", behave, &[], |_| ())]);
        assert_eq!(server.user("D:U", None).await, OwnedAnswer::Given(verdict));
    }
}

/// Calls at the same time read the same counter: whoever commits second is asked again, and no answer is given twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_whose_reads_have_changed_is_made_again() {
    let server = Arc::new(Server::start().await);
    server.activate([server.answering("a", "count", &[MAID], |_| ())]);
    let mut tokens = BTreeSet::new();
    let mut kept_changing = 0;
    for _ in 0..10 {
        let answers = futures_util::future::join_all((0..3).map(|_| server.token(MAID))).await;
        for answer in answers {
            match answer {
                OwnedAnswer::Given(Some(token)) => assert!(tokens.insert(token.expose().to_vec()), "{token:?} was given twice"),
                other => {
                    assert!(reason(other).contains("conflict"));
                    kept_changing += 1;
                }
            }
        }
    }
    assert_eq!(server.kept("a").await, [(String::from("count"), tokens.len().to_string())]);
    assert!(kept_changing < 30, "every call conflicted");
}

#[tokio::test]
async fn what_an_answer_writes_must_fit() {
    let server = Server::start().await;
    server.activate([server.answering("a", "big-value", &[MAID], |effective| {
        effective.settings.capabilities.kv.as_mut().unwrap().keys = 0;
    })]);
    assert!(reason(server.token(MAID).await).contains("effects"));
    assert!(server.kept("a").await.is_empty());
}

#[tokio::test]
async fn an_answer_writes_key_values_and_nothing_else() {
    let server = Server::start().await;
    server.activate([server.answering("a", "writes", &[MAID], |_| ())]);
    let _ = server.token(MAID).await;
    let row = &server.storage.audit(&TenantId::default(), 1).await.unwrap()[0];
    assert_eq!(row.detail["reason"], "failure told: denied denied denied denied denied ok ok ok");
    assert!(server.kept("a").await.is_empty(), "a failed call leaves nothing");
}

#[tokio::test]
async fn a_required_owner_that_is_missing_fails_and_what_it_does_not_have_is_nobodys() {
    let server = Server::start().await;
    let missing = |hooks: &[Hook], services: Option<&[&str]>| {
        Entry::Missing(Missing {
            name: String::from("gone"),
            order: 1,
            hooks: hooks.iter().map(|hook| (*hook, hook.default_on_failure())).collect::<BTreeMap<_, _>>(),
            token_services: services.map(|services| services.iter().map(|service| (*service).to_owned()).collect()),
            tenants: None,
            reason: String::from("not loaded yet"),
        })
    };
    server.registry.swap(Registry::new([missing(&[Hook::TokenSource], Some(&[MAID]))]));
    assert_eq!(reason(server.token(MAID).await), "plugin gone could not answer (missing)");
    assert_eq!(server.token("com.apple.else").await, OwnedAnswer::Nobody);
    assert_eq!((server.configuration().await, server.user("D:U", None).await), (OwnedAnswer::Nobody, OwnedAnswer::Nobody));
    assert_eq!(server.audited().await, ["plugin:gone token-source.failure"]);

    // Of what it has nothing is known: it may be anything.
    let all: Vec<Hook> = Hook::guards().into_iter().collect();
    server.registry.swap(Registry::new([missing(&all, None)]));
    assert!(reason(server.token("com.apple.else").await).contains("missing"));
    assert!(reason(server.configuration().await).contains("missing"));
    assert!(reason(server.user("D:U", None).await).contains("missing"));
    // But one that is there answers.
    let maid = Entry::Active(server.answering("maid", "", &[MAID], |_| ()));
    server.registry.swap(Registry::new([missing(&all, None), maid]));
    assert_eq!(text(server.token(MAID).await), "com.apple.maid for D {}");
}

#[tokio::test]
async fn an_owner_answers_in_every_mode_but_for_its_own_tenants_only() {
    let server = Server::start().await;
    let active = |adjust: fn(&mut Effective)| -> Arc<LinkedPlugin> { server.answering("a", "count", &[MAID], adjust) };
    server.activate([active(|effective| effective.settings.mode = Mode::Monitor)]);
    assert_eq!(text(server.token(MAID).await), "1");
    assert_eq!(server.kept("a").await, [(String::from("count"), String::from("1"))], "there is no shadow of an answer");
    server.activate([active(|effective| effective.settings.mode = Mode::Disabled)]);
    assert_eq!(server.token(MAID).await, OwnedAnswer::Nobody);
    server.activate([active(|effective| effective.tenants = Some([TenantId::new("other")].into()))]);
    assert_eq!(server.token(MAID).await, OwnedAnswer::Nobody);
}

/// A device can make up as many users as it likes.
#[tokio::test]
async fn one_device_with_many_users_suspends_nothing_and_many_devices_do() {
    let server = Server::start().await;
    server.activate([server.answering("a", "trap", &[MAID], |_| ())]);
    for user in 0..20 {
        assert!(reason(server.user(&format!("D:{user}"), None).await).contains("trap"));
    }
    for device in 0..4 {
        assert!(reason(server.user(&format!("E{device}:U"), None).await).contains("trap"));
    }
    assert!(reason(server.user("F:U", None).await).contains("suspended"));
    // Its other hooks have breakers of their own.
    assert!(reason(server.token(MAID).await).contains("trap"));
}
