//! Property lists that devices and other programs write.

use std::time::{Duration, SystemTime};

use plist::{Date, Dictionary, Value};
use proptest::prelude::*;
use wasmdm_protocol::plist::{self as ours, PlistError};

fn xml(inner: &str) -> Result<Value, PlistError> {
    ours::parse(format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<!DOCTYPE plist PUBLIC \"-//Apple//DTD PLIST 1.0//EN\" \"http://www.apple.com/DTDs/PropertyList-1.0.dtd\">\n<plist version=\"1.0\">\n{inner}\n</plist>\n").as_bytes())
}

fn dictionary(entries: impl IntoIterator<Item = (&'static str, Value)>) -> Value {
    Value::Dictionary(entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
}

#[test]
fn every_kind_of_value_is_read_from_xml() {
    let read = xml("<dict>
        <key>string</key><string> a &amp; b\t</string>
        <key>integer</key><integer> -12 </integer>
        <key>big</key><integer>18446744073709551615</integer>
        <key>hex</key><integer>0xFF</integer>
        <key>real</key><real>1.5</real>
        <key>true</key><true/>
        <key>false</key><false></false>
        <key>data</key><data>
            AQID
            BA==
        </data>
        <key>date</key><date>2026-01-02T03:04:05Z</date>
        <key>array</key><array><string>a</string><array/><dict/></array>
        <key>empty</key><string/>
    </dict>");
    let expected = dictionary([
        ("string", " a & b\t".into()),
        ("integer", (-12).into()),
        ("big", u64::MAX.into()),
        ("hex", 255.into()),
        ("real", 1.5.into()),
        ("true", true.into()),
        ("false", false.into()),
        ("data", Value::Data(vec![1, 2, 3, 4])),
        ("date", Date::from(SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_323_045)).into()),
        ("array", Value::Array(vec!["a".into(), Value::Array(Vec::new()), Value::Dictionary(Dictionary::new())])),
        ("empty", "".into()),
    ]);
    assert_eq!(read, Ok(expected));
}

#[test]
fn text_is_read_as_xml_means_it() {
    for (inner, text) in [
        ("a&lt;b&gt;&quot;&apos;&amp;amp;", "a<b>\"'&amp;"),
        ("&#65;&#x42;&#x1F600;", "AB\u{1F600}"),
        ("a<![CDATA[<b> & ]] ]]>c", "a<b> & ]] c"),
        ("<![CDATA[]]>", ""),
        ("a<!-- not b -->c<?not d?>", "ac"),
        ("one\r\ntwo\rthree\nfour", "one\ntwo\nthree\nfour"),
        ("ü\u{1F600}", "ü\u{1F600}"),
    ] {
        assert_eq!(xml(&format!("<string>{inner}</string>")), Ok(text.into()), "{inner}");
        assert_eq!(xml(&format!("<dict><key>{inner}</key><true/></dict>")).unwrap().as_dictionary().unwrap().keys().next().unwrap(), text);
    }
}

#[test]
fn prologs_of_other_writers_are_read() {
    for document in [
        "\u{feff}<?xml version='1.0' encoding='utf-8' standalone='yes'?><plist version='1.0'><true/></plist>",
        "\n <?xml version=\"1.0\"?>\r\n<!-- <plist> --><?php ?><!DOCTYPE plist><plist><true/></plist><!-- end -->\n",
        "<plist version=\"1.0\" note='a > b'><true /></plist >",
        "<!DOCTYPE plist SYSTEM \"file://localhost/System/Library/DTDs/PropertyList.dtd\"><true/>",
        "<true/>",
    ] {
        assert_eq!(ours::parse(document.as_bytes()), Ok(true.into()), "{document}");
    }
}

/// Edge case 8.
#[test]
fn what_readers_would_take_differently_is_refused() {
    for inner in [
        "<dict><key>a</key><true/><key>a</key><false/></dict>",
        "<dict><key>a</key></dict>",
        "<dict><key>a</key><key>b</key><true/></dict>",
        "<dict><true/></dict>",
        "<array><key>a</key></array>",
        "<key>a</key>",
        "<integer>18446744073709551616</integer>",
        "<integer>-9223372036854775809</integer>",
        "<integer/>",
        "<integer>1.0</integer>",
        "<real>one</real>",
        "<true>yes</true>",
        "<data>????</data>",
        "<data>AAAAA</data>",
        "<date>yesterday</date>",
        "<date>9999-12-31T23:59:59-23:59</date>",
        "<date>-0001-01-01T00:00:00Z</date>",
        "<string>&unknown;</string>",
        "<string>&#0;</string>",
        "<string>&#xD800;</string>",
        "<string>&#xFFFF;</string>",
        "<string>& b</string>",
        "<string>\u{1}</string>",
        "<string>\0</string>",
        "<string><b/></string>",
        "<string>a</key>",
        "<STRING>a</STRING>",
        "<plist><true/></plist>",
        "<dict></array>",
        "</dict>",
        "text",
        "<![CDATA[a]]><true/>",
        "<true/><true/>",
        "<true/>text",
        "<!DOCTYPE plist><true/>",
        "<set/>",
    ] {
        assert!(matches!(xml(inner), Err(PlistError::Malformed(_))), "{inner}: {:?}", xml(inner));
    }
    for document in [
        b"<!DOCTYPE plist [<!ENTITY a \"b\">]><plist><string>&a;</string></plist>".as_slice(),
        b"<!DOCTYPE plist [ ]><plist><true/></plist>",
        b"<?xml version=\"1.0\" encoding=\"UTF-16\"?><plist><true/></plist>",
        b"<?xml version=\"1.0\" encoding=\"ISO-8859-1\"?><plist><true/></plist>",
        b"\xfe\xff\x00<",
        b"<\0p\0l\0i\0s\0t\0",
        b"<string>\xff</string>",
        b"{ a = b; }",
        b"(1, 2)",
        b"{\"a\": 1}",
        b"<true/></plist>",
    ] {
        assert!(matches!(ours::parse(document), Err(PlistError::Malformed(_))), "{:?}", String::from_utf8_lossy(document));
    }
}

#[test]
fn every_beginning_of_a_document_is_cut_off() {
    let whole =
        b"<?xml version=\"1.0\"?><!DOCTYPE plist><plist><dict><key>a</key><array><string>b&amp;<![CDATA[c]]>\xc3\xbc</string></array></dict></plist>";
    assert!(ours::parse(whole).is_ok());
    for length in 0..whole.len() {
        assert!(ours::parse(&whole[..length]).is_err(), "{length}");
    }
    for document in [b"".as_slice(), b"  ", b"<plist>", b"<plist><dict>", b"<plist><true/>", b"<string>abc", b"<string>\xc3"] {
        assert_eq!(ours::parse(document), Err(PlistError::Truncated), "{:?}", String::from_utf8_lossy(document));
    }
}

#[test]
fn limits_are_named() {
    let nested = |depth: usize| format!("{}{}", "<array>".repeat(depth), "</array>".repeat(depth));
    assert!(xml(&nested(ours::MAX_DEPTH)).is_ok());
    assert_eq!(xml(&nested(ours::MAX_DEPTH + 1)), Err(PlistError::TooLarge { what: "levels", limit: ours::MAX_DEPTH }));
    let many = |count: usize| format!("<array>{}</array>", "<true/>".repeat(count));
    assert!(xml(&many(ours::MAX_VALUES - 1)).is_ok());
    assert_eq!(xml(&many(ours::MAX_VALUES)), Err(PlistError::TooLarge { what: "values", limit: ours::MAX_VALUES }));
}

#[test]
fn xml_is_written_as_apple_writes_it() {
    let value = dictionary([
        ("a<b", "c & d\r".into()),
        ("data", Value::Data((0..60).collect())),
        ("date", Date::from(SystemTime::UNIX_EPOCH + Duration::from_millis(1_500)).into()),
        ("items", Value::Array(vec![1.into(), 1.5.into(), true.into()])),
        ("none", Value::Dictionary(Dictionary::new())),
    ]);
    let expected = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>
<!DOCTYPE plist PUBLIC \"-//Apple//DTD PLIST 1.0//EN\" \"http://www.apple.com/DTDs/PropertyList-1.0.dtd\">
<plist version=\"1.0\">
<dict>
\t<key>a&lt;b</key>
\t<string>c &amp; d&#13;</string>
\t<key>data</key>
\t<data>
\tAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4vMDEy
\tMzQ1Njc4OTo7
\t</data>
\t<key>date</key>
\t<date>1970-01-01T00:00:01Z</date>
\t<key>items</key>
\t<array>
\t\t<integer>1</integer>
\t\t<real>1.5</real>
\t\t<true/>
\t</array>
\t<key>none</key>
\t<dict/>
</dict>
</plist>
";
    assert_eq!(std::str::from_utf8(&ours::to_xml(&value)).unwrap(), expected);
}

#[test]
fn characters_that_xml_cannot_hold_are_replaced() {
    let written = ours::to_xml(&"a\0b\u{1b}c\u{ffff}d\n\t".into());
    assert_eq!(ours::parse(&written), Ok("a\u{fffd}b\u{fffd}c\u{fffd}d\n\t".into()));
}

#[test]
fn dates_of_binary_documents_are_read_with_their_fraction() {
    let date = Date::from(SystemTime::UNIX_EPOCH + Duration::from_millis(1_767_323_045_250));
    let mut binary = Vec::new();
    Value::Date(date).to_writer_binary(&mut binary).unwrap();
    assert_eq!(ours::parse(&binary), Ok(Value::Date(date)));
}

fn strings() -> impl Strategy<Value = String> {
    prop_oneof![
        "[ -~]{0,20}",
        any::<String>()
            .prop_map(|text| text.chars().filter(|character| !character.is_control() && !matches!(character, '\u{fffe}' | '\u{ffff}')).collect()),
    ]
}

/// Values of every kind as devices write them.
pub(crate) fn values() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        strings().prop_map(Value::String),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<bool>().prop_map(Value::from),
        // Eighths: reading JSON is not exact in the last place of others.
        any::<i32>().prop_map(|eighths| Value::Real(f64::from(eighths) / 8.0)),
        prop::collection::vec(any::<u8>(), 0..100).prop_map(Value::Data),
        (0..4_000_000_000_u64).prop_map(|seconds| Date::from(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).into()),
    ];
    leaf.prop_recursive(6, 60, 8, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..8).prop_map(Value::Array),
            prop::collection::vec((strings(), inner), 0..8).prop_map(|entries| Value::Dictionary(entries.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read_again(value in values()) {
        let written = ours::to_xml(&value);
        prop_assert_eq!(ours::parse(&written), Ok(value.clone()));
        // And by another reader.
        prop_assert_eq!(Value::from_reader_xml(&*written).unwrap(), value);
    }

    #[test]
    fn both_forms_of_another_writer_are_read(value in values()) {
        let (mut xml, mut binary) = (Vec::new(), Vec::new());
        value.to_writer_xml(&mut xml).unwrap();
        value.to_writer_binary(&mut binary).unwrap();
        prop_assert_eq!(ours::parse(&xml), Ok(value.clone()));
        prop_assert_eq!(ours::parse(&binary), Ok(value));
    }

    #[test]
    fn changed_binary_documents_never_panic(value in values(), changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut binary = Vec::new();
        value.to_writer_binary(&mut binary).unwrap();
        for (index, byte) in changes {
            let index = index.index(binary.len());
            binary[index] = byte;
        }
        if let Ok(value) = ours::parse(&binary) {
            // Whatever was read can be written.
            let written = ours::to_xml(&value);
            prop_assert!(ours::parse(&written).is_ok() || has_unwritable_key(&value));
        }
    }

    #[test]
    fn changed_xml_documents_never_panic(value in values(), changes in prop::collection::vec((any::<prop::sample::Index>(), prop::sample::select(b"<>/&;![]?-\"'= \0ak\xff".to_vec())), 1..6)) {
        let mut xml = ours::to_xml(&value).to_vec();
        for (index, byte) in changes {
            let index = index.index(xml.len());
            xml[index] = byte;
        }
        if let Ok(value) = ours::parse(&xml) {
            prop_assert_eq!(ours::parse(&ours::to_xml(&value)), Ok(value));
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), binary in any::<bool>()) {
        let document = if binary { [b"bplist00".as_slice(), &bytes].concat() } else { bytes };
        let _ = ours::parse(&document);
    }
}

/// Keys that XML cannot hold can become the same key when they are replaced.
fn has_unwritable_key(value: &Value) -> bool {
    match value {
        Value::Array(values) => values.iter().any(has_unwritable_key),
        Value::Dictionary(entries) => entries.iter().any(|(key, value)| key.chars().any(char::is_control) || has_unwritable_key(value)),
        _ => false,
    }
}

/// Fuzzing found: a level with nothing in it was none in XML and in JSON, so that what was read could not be written in binary.
#[test]
fn an_empty_level_is_a_level() {
    for empty in ["<dict/>", "<array/>"] {
        let at = |levels: usize| format!("<plist version=\"1.0\">{}{empty}{}</plist>", "<array>".repeat(levels), "</array>".repeat(levels));
        assert!(ours::parse(at(ours::MAX_DEPTH - 1).as_bytes()).is_ok());
        assert_eq!(ours::parse(at(ours::MAX_DEPTH).as_bytes()), Err(PlistError::TooLarge { what: "levels", limit: ours::MAX_DEPTH }));
    }
    let json = |levels: usize| (1..levels).fold(serde_json::json!([]), |inner, _| serde_json::json!([inner]));
    assert!(wasmdm_protocol::json::from_json(&json(ours::MAX_DEPTH)).is_ok());
    assert!(wasmdm_protocol::json::from_json(&json(ours::MAX_DEPTH + 1)).is_err());
}

/// Fuzzing found: a part of a second before the year 0 was written as a date that nobody reads.
#[test]
fn a_date_just_before_the_first_one_is_out_of_range() {
    let document = |seconds: f64| {
        let mut bytes = b"bplist00\x33".to_vec();
        bytes.extend(seconds.to_be_bytes());
        // One object at 8; where the table of offsets is.
        bytes.extend([8, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 17]);
        bytes
    };
    let first = -62_167_219_200.0 - 978_307_200.0;
    let read = ours::parse(&document(first)).unwrap();
    assert_eq!(ours::parse(&ours::to_xml(&read)), Ok(read));
    assert!(ours::parse(&document(first - 0.25)).is_err());
}

/// Fuzzing found: keys in binary that XML cannot hold became one key, twice, when the document was written again.
#[test]
fn a_key_that_xml_cannot_hold_is_refused() {
    for character in ['\u{2}', '\u{FFFE}', '\u{FFFF}'] {
        let mut dictionary = Dictionary::new();
        dictionary.insert(format!("a{character}"), Value::from(1));
        let mut binary = Vec::new();
        Value::Dictionary(dictionary).to_writer_binary(&mut binary).unwrap();
        assert!(matches!(ours::parse(&binary), Err(PlistError::Malformed(_))), "{character:?}");
    }
    // What stands in values is written as the sign of a lost character.
    let mut binary = Vec::new();
    Value::from("a\u{2}").to_writer_binary(&mut binary).unwrap();
    assert_eq!(ours::parse(&ours::to_xml(&ours::parse(&binary).unwrap())), Ok(Value::from("a\u{FFFD}")));
}
