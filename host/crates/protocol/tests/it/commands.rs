//! Command documents.

use serde_json::json;
use wasmdm_protocol::command::Command;
use wasmdm_protocol::plist as ours;

fn document(inner: &str) -> Vec<u8> {
    format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<plist version=\"1.0\"><dict>{inner}</dict></plist>").into_bytes()
}

const COMMAND: &str = "<key>Command</key><dict><key>RequestType</key><string>DeviceLock</string><key>PIN</key><string>123456</string></dict>";

#[test]
fn a_document_is_kept_to_the_byte() {
    let raw = document(&format!("{COMMAND}<key>CommandUUID</key><string>0001</string>"));
    let command = Command::parse(raw.clone().into()).unwrap();
    assert_eq!((command.uuid.as_str(), command.request_type.as_str(), command.raw.as_ref()), ("0001", "DeviceLock", raw.as_slice()));
    let mut binary = Vec::new();
    ours::parse(&raw).unwrap().to_writer_binary(&mut binary).unwrap();
    let command = Command::parse(binary.clone().into()).unwrap();
    assert_eq!((command.uuid.as_str(), command.raw.as_ref()), ("0001", binary.as_slice()));
}

#[test]
fn what_is_wrong_is_named() {
    let uuid = |uuid: &str| format!("<key>CommandUUID</key><string>{uuid}</string>");
    for (inner, field) in [
        (COMMAND.to_owned(), "CommandUUID"),
        (format!("{COMMAND}{}", uuid("")), "CommandUUID"),
        (format!("{COMMAND}{}", uuid("a\nb")), "CommandUUID"),
        (format!("{COMMAND}{}", uuid(&"a".repeat(256))), "CommandUUID"),
        (format!("{COMMAND}<key>CommandUUID</key><integer>1</integer>"), "CommandUUID"),
        (uuid("1"), "Command"),
        (format!("<key>Command</key><string>DeviceLock</string>{}", uuid("1")), "Command"),
        (format!("<key>Command</key><dict/>{}", uuid("1")), "Command.RequestType"),
        (format!("<key>Command</key><dict><key>RequestType</key><string>{}</string></dict>{}", "a".repeat(128), uuid("1")), "Command.RequestType"),
        (format!("<key>Command</key><dict><key>RequestType</key><true/></dict>{}", uuid("1")), "Command.RequestType"),
        ("<key>".into(), "."),
    ] {
        assert_eq!(Command::parse(document(&inner).into()).unwrap_err().field, field, "{inner}");
    }
    assert_eq!(Command::parse(b"<array/>".as_slice().into()).unwrap_err().field, ".");
    assert_eq!(Command::parse(b"".as_slice().into()).unwrap_err().field, ".");
}

#[test]
fn json_becomes_a_whole_document() {
    let command = Command::from_json("0001".into(), &json!({ "RequestType": "InstallProfile", "Payload": { "$data": "AQI=" } })).unwrap();
    let expected = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>
<!DOCTYPE plist PUBLIC \"-//Apple//DTD PLIST 1.0//EN\" \"http://www.apple.com/DTDs/PropertyList-1.0.dtd\">
<plist version=\"1.0\">
<dict>
\t<key>Command</key>
\t<dict>
\t\t<key>RequestType</key>
\t\t<string>InstallProfile</string>
\t\t<key>Payload</key>
\t\t<data>
\t\tAQI=
\t\t</data>
\t</dict>
\t<key>CommandUUID</key>
\t<string>0001</string>
</dict>
</plist>
";
    assert_eq!(std::str::from_utf8(&command.raw).unwrap(), expected);
    assert_eq!(Command::parse(command.raw.clone()), Ok(command));
}

#[test]
fn json_that_is_no_command_names_its_field() {
    for (json, field) in [
        (json!({}), "Command.RequestType"),
        (json!([]), "Command"),
        (json!(null), "Command"),
        (json!({ "RequestType": 1 }), "Command.RequestType"),
        (json!({ "RequestType": "A", "Items": [{ "b": null }] }), "Command.Items[0].b"),
    ] {
        assert_eq!(Command::from_json("1".into(), &json).unwrap_err().field, field, "{json}");
    }
    assert_eq!(Command::from_json(String::new(), &json!({ "RequestType": "A" })).unwrap_err().field, "CommandUUID");
}

#[test]
fn another_uuid_replaces_or_joins() {
    for inner in
        [COMMAND.to_owned(), format!("<key>CommandUUID</key><string>old</string>{COMMAND}"), format!("<key>CommandUUID</key><true/>{COMMAND}")]
    {
        let command = Command::parse_with_uuid(&document(&inner), "new".into()).unwrap();
        assert_eq!((command.uuid.as_str(), command.request_type.as_str()), ("new", "DeviceLock"));
        let written = ours::parse(&command.raw).unwrap();
        let written = written.as_dictionary().unwrap();
        assert_eq!(written.get("CommandUUID").unwrap().as_string(), Some("new"));
        assert_eq!(written.get("Command").unwrap().as_dictionary().unwrap().get("PIN").unwrap().as_string(), Some("123456"));
    }
    assert_eq!(Command::parse_with_uuid(b"<array/>", "new".into()).unwrap_err().field, ".");
    assert_eq!(Command::parse_with_uuid(&document(""), "new".into()).unwrap_err().field, "Command");
}

/// Fuzzing found: a command in binary can name characters that XML has not, and under another id it became another command.
#[test]
fn a_name_that_xml_cannot_hold_is_refused() {
    for character in ['\u{FFFE}', '\u{FFFF}'] {
        let mut command = ours::Dictionary::new();
        command.insert("RequestType".into(), format!("Profile{character}List").into());
        let mut document = ours::Dictionary::new();
        document.insert("Command".into(), ours::Value::Dictionary(command));
        document.insert("CommandUUID".into(), "0001".into());
        let mut binary = Vec::new();
        ours::Value::Dictionary(document).to_writer_binary(&mut binary).unwrap();
        let error = Command::parse(binary.into()).unwrap_err();
        assert_eq!((error.field.as_str(), error.problem.as_str()), ("Command.RequestType", "has a character that XML cannot hold"));
    }
}
