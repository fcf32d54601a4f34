//! The JSON in the plugin contract.

use plist::Value;
use proptest::prelude::*;
use serde_json::json;
use wasmdm_protocol::json::{AsJson, from_json, is_secret_key, to_json, to_redacted_json};
use wasmdm_protocol::plist as ours;

fn xml(inner: &str) -> Value {
    ours::parse(inner.as_bytes()).unwrap()
}

#[test]
fn every_kind_of_value_has_its_json() {
    let value = xml("<dict>
        <key>z</key><string>text</string>
        <key>a</key><array><true/><integer>-3</integer><real>2</real><real>1e300</real></array>
        <key>safe</key><integer>9007199254740992</integer>
        <key>big</key><integer>9007199254740993</integer>
        <key>low</key><integer>-9007199254740993</integer>
        <key>max</key><integer>18446744073709551615</integer>
        <key>data</key><data>AQI=</data>
        <key>date</key><date>2026-01-02T03:04:05Z</date>
        <key>real</key><array><real>nan</real><real>inf</real><real>-inf</real></array>
    </dict>");
    let expected = r#"{"z":"text","a":[true,-3,2.0,1e+300],"safe":9007199254740992,"big":{"$integer":"9007199254740993"},"low":{"$integer":"-9007199254740993"},"max":{"$integer":"18446744073709551615"},"data":{"$data":"AQI="},"date":{"$date":"2026-01-02T03:04:05Z"},"real":[{"$real":"nan"},{"$real":"inf"},{"$real":"-inf"}]}"#;
    assert_eq!(to_json(&value).to_string().replace("1e300", "1e+300"), expected);
    assert_eq!(serde_json::to_string(&AsJson::whole(&value)).unwrap().replace("1e300", "1e+300"), expected);
}

#[test]
fn a_dictionary_cannot_pass_for_something_else() {
    let value = xml("<array>
        <dict><key>$data</key><string>AQI=</string></dict>
        <dict><key>$redacted</key><true/></dict>
        <dict><key>$data</key><string>x</string><key>b</key><true/></dict>
        <dict><key>$other</key><true/></dict>
    </array>");
    let json = to_json(&value);
    assert_eq!(
        json,
        json!([{ "$dictionary": { "$data": "AQI=" } }, { "$dictionary": { "$redacted": true } }, { "$data": "x", "b": true }, { "$other": true }])
    );
    assert_eq!(from_json(&json), Ok(value));
}

#[test]
fn secrets_are_redacted_at_any_depth_and_nothing_else_is() {
    let value = xml("<dict>
        <key>Topic</key><string>com.apple.mgmt.1</string>
        <key>Token</key><data>AQI=</data>
        <key>SecurityInfo</key><dict>
            <key>FDE_PersonalRecoveryKeyCMS</key><data>AQI=</data>
            <key>FDE_HasPersonalRecoveryKey</key><true/>
        </dict>
        <key>Items</key><array><dict><key>UnlockToken</key><dict><key>a</key><string>secret</string></dict></dict></array>
    </dict>");
    let redacted = json!({ "$redacted": true });
    let expected = json!({
        "Topic": "com.apple.mgmt.1",
        "Token": redacted,
        "SecurityInfo": { "FDE_PersonalRecoveryKeyCMS": redacted, "FDE_HasPersonalRecoveryKey": true },
        "Items": [{ "UnlockToken": redacted }],
    });
    assert_eq!(to_redacted_json(&value), expected);
    assert_eq!(serde_json::to_value(AsJson::redacted(&value)).unwrap(), expected);
    assert_eq!(to_json(&value)["Token"], json!({ "$data": "AQI=" }));
}

#[test]
fn a_secret_in_a_dictionary_that_looks_like_a_form_is_redacted() {
    let value = xml("<dict><key>$dictionary</key><dict><key>PushMagic</key><string>secret</string></dict></dict>");
    for json in [to_redacted_json(&value), serde_json::to_value(AsJson::redacted(&value)).unwrap()] {
        assert!(!json.to_string().contains("secret"), "{json}");
    }
}

#[test]
fn every_secret_of_check_ins_commands_and_results_is_known() {
    for key in [
        "UnlockToken",
        "BootstrapToken",
        "Token",
        "PushMagic",
        "ActivationLockBypassCode",
        "FDE_PersonalRecoveryKeyCMS",
        "EncryptedNewRecoveryKey",
        "EscrowKey",
        "FirmwarePassword",
        "NewPassword",
        "Password",
        "PIN",
        "PushToken",
        "SecurityToken",
        "TokenData",
        "passwordHash",
        "UnusedRedemptionCode",
        "DigestResponse",
        "AuthToken",
    ] {
        assert!(is_secret_key(key), "{key}");
    }
    for key in ["Topic", "TokenServiceType", "UDID", "CommandUUID", "ProductKey", "HasSecureToken", "PasswordExists", ""] {
        assert!(!is_secret_key(key), "{key}");
    }
}

#[test]
fn numbers_are_what_they_are_written_as() {
    let read = |text: &str| from_json(&serde_json::from_str(text).unwrap());
    assert_eq!(read("1"), Ok(1.into()));
    assert_eq!(read("1.0"), Ok(1.0.into()));
    assert_eq!(read("1e2"), Ok(100.0.into()));
    assert_eq!(read("-9223372036854775808"), Ok(i64::MIN.into()));
    assert_eq!(read("18446744073709551615"), Ok(u64::MAX.into()));
    assert_eq!(read("{\"$integer\":\"7\"}"), Ok(7.into()));
}

#[test]
fn json_that_is_no_property_list_names_its_place() {
    for (json, path, problem) in [
        (json!(null), ".", "null"),
        (json!({ "Payload": { "Items": [1, { "a": null }] } }), "Payload.Items[1].a", "null"),
        (json!({ "a": { "$redacted": true } }), "a", "redacted"),
        (json!({ "a": { "$data": "?" } }), "a", "base64"),
        (json!({ "a": { "$data": 1 } }), "a", "wrong type"),
        (json!({ "a": { "$date": "tomorrow" } }), "a", "RFC 3339"),
        (json!({ "a": { "$date": 1 } }), "a", "RFC 3339"),
        (json!({ "a": { "$integer": "18446744073709551616" } }), "a", "64 bits"),
        (json!({ "a": { "$real": "1" } }), "a", "nan"),
        (json!(["a\u{0}"]), "[0]", "XML"),
        (json!({ "a\u{1}": 1 }), ".", "XML"),
    ] {
        let error = from_json(&json).unwrap_err();
        assert_eq!(error.path, path, "{json}");
        assert!(error.problem.contains(problem), "{json}: {error}");
    }
    let deep = (0..100).fold(json!(1), |inner, _| json!([inner]));
    assert!(from_json(&deep).is_err());
}

proptest! {
    #[test]
    fn what_became_json_is_read_again(value in crate::plists::values()) {
        let json = to_json(&value);
        prop_assert_eq!(from_json(&json), Ok(value.clone()));
        prop_assert_eq!(serde_json::to_value(AsJson::whole(&value)).unwrap(), json.clone());
        prop_assert_eq!(from_json(&serde_json::from_str(&json.to_string()).unwrap()), Ok(value));
    }
}
