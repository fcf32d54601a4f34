//! What is refused before it is ever called.

use serde_json::json;
use wasmdm_plugin_runtime::hook::Hook;
use wasmdm_protocol::enrollment::TenantId;

use super::setup::{Server, granted};

#[tokio::test]
async fn hooks_are_found_by_looking() {
    let server = Server::start().await;
    // Every hook but those that only one plugin can have, and those.
    let (plugin, owner) = (server.misbehaving("", |_| ()), server.answering("owner", "", &[], |_| ()));
    let (shared, owned): (Vec<_>, Vec<_>) = Hook::ALL.into_iter().partition(|hook| !hook.is_answer());
    for (plugin, hooks) in [(plugin, shared), (owner, owned)] {
        assert_eq!(plugin.hooks().iter().copied().collect::<Vec<_>>(), hooks);
        assert!(plugin.probe().await.is_ok());
    }
    let one = server.link("one", "endless-start", granted(&json!({}))).unwrap();
    assert_eq!(one.hooks().iter().copied().collect::<Vec<_>>(), [Hook::EnrollmentPolicy]);
}

#[tokio::test]
async fn a_component_without_hooks_is_refused_with_the_likely_cause() {
    let server = Server::start().await;
    let error = server.link("none", "no-hooks", granted(&json!({}))).unwrap_err().to_string();
    assert!(error.contains("no hook") && error.contains("export macro"), "{error}");
}

#[tokio::test]
async fn a_hook_that_this_server_lacks_is_refused_by_name() {
    let server = Server::start().await;
    let error = server.link("future", "from-the-future", granted(&json!({}))).unwrap_err().to_string();
    assert!(error.contains("wasmdm:plugin/command-policy@0.1.0") && error.contains("wasmdm 0.1.0-test"), "{error}");
}

#[tokio::test]
async fn a_hook_with_other_types_is_refused() {
    let server = Server::start().await;
    let error = match server.link("wrong", "wrong-types", granted(&json!({}))) {
        Err(error) => error.to_string(),
        Ok(plugin) => plugin.probe().await.unwrap_err().to_string(),
    };
    assert!(error.contains("its `event-sink` has other types than wasmdm:plugin@0.1.0"), "{error}");
}

#[tokio::test]
async fn a_configuration_that_the_plugin_refuses_is_refused_with_its_words() {
    let server = Server::start().await;
    let plugin = server.misbehaving("", |_| ());
    let tenant = TenantId::default();
    let error = plugin.validate_config(r#"{"behave":"refuse-config"}"#, &tenant).await.unwrap_err().to_string();
    assert_eq!(error, "the plugin refuses its configuration: behave: refused");
    let error = plugin.validate_config(r#"{"behave":"write-in-validate-config"}"#, &tenant).await.unwrap_err().to_string();
    assert!(error.contains("not possible in lifecycle"), "{error}");
    assert!(plugin.validate_config("{}", &tenant).await.is_ok());
}
