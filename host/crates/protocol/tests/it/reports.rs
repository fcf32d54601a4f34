//! Reports, and what is made of those that cannot be read (edge case 4).

use plist::{Dictionary, Value};
use proptest::prelude::*;
use wasmdm_protocol::plist as ours;
use wasmdm_protocol::report::{MalformedReport, Report, Status};

fn xml(inner: &str) -> Vec<u8> {
    format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<plist version=\"1.0\">\n<dict>\n{inner}\n</dict>\n</plist>\n").into_bytes()
}

const CLAIMS: &str = "<key>UDID</key><string>U1</string><key>CommandUUID</key><string>C1</string><key>Status</key><string>Acknowledged</string>";

fn read(document: impl Into<Vec<u8>>) -> Report {
    Report::parse(document.into().into()).unwrap()
}

fn malformed(document: impl Into<Vec<u8>>) -> MalformedReport {
    *Report::parse(document.into().into()).unwrap_err()
}

fn claims(report: &MalformedReport) -> (Option<&str>, Option<&str>, Option<&str>) {
    (report.enrollment.as_ref().map(|enrollment| enrollment.id.as_str()), report.command_uuid.as_deref(), report.status.as_deref())
}

#[test]
fn a_report_says_how_a_command_went() {
    for (text, status) in [
        ("Acknowledged", Status::Acknowledged),
        ("Error", Status::Error),
        ("CommandFormatError", Status::CommandFormatError),
        ("NotNow", Status::NotNow),
        ("Later", Status::Unknown("Later".into())),
        ("acknowledged", Status::Unknown("acknowledged".into())),
    ] {
        let raw = xml(&CLAIMS.replace("Acknowledged", text));
        let report = read(raw.clone());
        assert_eq!((report.status.as_str(), &report.status), (text, &status));
        assert_eq!((report.enrollment.id.as_str(), report.command_uuid.as_deref(), report.raw.as_ref()), ("U1", Some("C1"), raw.as_slice()));
    }
}

#[test]
fn a_poll_is_about_no_command() {
    let report = read(xml("<key>UDID</key><string>U1</string><key>Status</key><string>Idle</string>"));
    assert_eq!((report.status, report.command_uuid), (Status::Idle, None));
    let report = read(xml(&CLAIMS.replace("Acknowledged", "Idle")));
    assert_eq!((report.status, report.command_uuid), (Status::Idle, None));
}

#[test]
fn a_report_of_a_user_says_who_that_is() {
    let report = read(xml(&format!(
        "{CLAIMS}<key>UserID</key><string>A</string><key>UserShortName</key><string>ada</string><key>UserLongName</key><string>Ada L.</string>"
    )));
    assert_eq!(report.enrollment.id.as_str(), "U1:A");
    assert_eq!((report.facts.user_short_name.as_deref(), report.facts.user_long_name.as_deref()), (Some("ada"), Some("Ada L.")));
}

/// Edge case 3.
#[test]
fn reports_in_binary_and_behind_a_byte_order_mark_are_read() {
    let mut binary = Vec::new();
    ours::parse(&xml(CLAIMS)).unwrap().to_writer_binary(&mut binary).unwrap();
    assert_eq!(read(binary).command_uuid.as_deref(), Some("C1"));
    assert_eq!(read([b"\xef\xbb\xbf".as_slice(), &xml(CLAIMS)].concat()).command_uuid.as_deref(), Some("C1"));
    assert_eq!(read([b"\n".as_slice(), &xml(CLAIMS)].concat()).command_uuid.as_deref(), Some("C1"));
}

#[test]
fn a_report_without_its_keys_is_malformed_and_keeps_what_it_says() {
    let without = |key: &str| {
        let mut document = ours::parse(&xml(CLAIMS)).unwrap();
        document.as_dictionary_mut().unwrap().remove(key);
        malformed(ours::to_xml(&document))
    };
    assert_eq!(claims(&without("Status")), (Some("U1"), Some("C1"), None));
    assert_eq!(claims(&without("CommandUUID")), (Some("U1"), None, Some("Acknowledged")));
    assert_eq!(claims(&without("UDID")), (None, Some("C1"), Some("Acknowledged")));
    assert!(without("Status").reason.contains("Status"));
    let long = malformed(xml(&CLAIMS.replace("C1", &"C".repeat(256))));
    assert_eq!(claims(&long), (Some("U1"), None, Some("Acknowledged")));
    assert_eq!(claims(&malformed(xml(&CLAIMS.replace("U1", "U:1")))), (None, Some("C1"), Some("Acknowledged")));
}

#[test]
fn claims_are_read_out_of_documents_that_are_refused() {
    let deep = format!("<key>Result</key>{}{}", "<array>".repeat(500), "</array>".repeat(500));
    for broken in [
        deep.as_str(),
        "<key>a</key><integer>99999999999999999999</integer>",
        "<key>a</key><string>&nbsp;</string>",
        "<key>a</key><true/><key>a</key><true/>",
        "<key>a</key><string>\u{1}</string>",
        "<key>a</key><data>?</data>",
        "<key>a</key><dict><key>UDID</key><string>other</string><key>CommandUUID</key><string>other</string></dict><nonsense>",
        "<!-- <key>UDID</key><string>other</string> --><key>a</key><b/>",
        "<key>a</key><string><![CDATA[<key>UDID</key><string>other</string>]]></string><b/>",
    ] {
        for document in [xml(&format!("{CLAIMS}{broken}")), xml(&format!("{broken}{CLAIMS}"))] {
            assert_eq!(claims(&malformed(document)), (Some("U1"), Some("C1"), Some("Acknowledged")), "{broken:.100}");
        }
    }
    let cut = xml(CLAIMS);
    assert_eq!(claims(&malformed(&cut[..cut.len() - 18])), (Some("U1"), Some("C1"), Some("Acknowledged")));
    let not_utf8 = [xml(CLAIMS).as_slice(), b"\xff"].concat();
    assert_eq!(claims(&malformed(not_utf8)), (Some("U1"), Some("C1"), Some("Acknowledged")));
    let escaped = malformed(xml(&format!("{}<b/>", CLAIMS.replace("C1", "a&amp;b"))));
    assert_eq!(escaped.command_uuid.as_deref(), Some("a&b"));
}

/// Fuzzing found three ways to make the salvage of a broken report claim a device that the readers would not have read: text within an
/// instruction, text within an attribute, and a UDID that is no plain text while an `EnrollmentID` is. Edge case 4.
#[test]
fn what_only_looks_like_a_claim_is_none() {
    for lure in [
        "<?a ><string>other</string> ?><string>U1</string>",
        "<!-- > <string>other</string> --><string>U1</string>",
        "<string a=\">other</string><string b=\">U1</string>",
        "<string a='>other</string><string b='>U1</string>",
    ] {
        let document = xml(&CLAIMS.replace("<string>U1</string>", lure));
        assert_eq!(read(document.clone()).enrollment.id.as_str(), "U1", "{lure}");
        assert_eq!(claims(&malformed([document.as_slice(), b"<"].concat())), (Some("U1"), Some("C1"), Some("Acknowledged")), "{lure}");
    }
    for udid in ["<string>U<!-- -->1</string>", "<integer>1</integer>", "<string>U1"] {
        let document = CLAIMS.replace("<string>U1</string>", udid);
        let claimed = malformed(format!("<plist><dict><key>EnrollmentID</key><string>other</string>{document}<b/>"));
        assert_eq!(claimed.enrollment, None, "{udid}");
    }
    let read = malformed(xml(&CLAIMS.replace("<string>U1</string>", "<integer>1</integer><key>EnrollmentID</key><string>other</string>")));
    assert_eq!(read.enrollment, None);
}

/// Fuzzing found that a report of a user whose id is no plain text was nobody's, so that its command would have come again for ever. The
/// device is known, and the storage knows which of its channels the command was sent to. Edge case 4.
#[test]
fn where_the_user_cannot_be_told_the_device_is_claimed() {
    let shared = "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF";
    for user in [
        "<key>UserID</key><string>A<!-- -->B</string>".to_owned(),
        format!("<key>UserID</key><string>{shared}</string>"),
        format!("<key>UserID</key><string>{shared}</string><key>UserShortName</key><string>a<!-- -->b</string>"),
        "<key>UserID</key><true/>".to_owned(),
    ] {
        for end in ["</dict></plist><", "<b/></dict></plist>"] {
            let claimed = malformed(format!("<plist><dict>{CLAIMS}{user}{end}"));
            assert_eq!(claims(&claimed), (Some("U1"), Some("C1"), Some("Acknowledged")), "{user}");
        }
    }
}

#[test]
fn only_the_top_dictionary_makes_claims() {
    for document in [
        xml(&format!("<key>a</key><dict>{CLAIMS}</dict><b/>")),
        xml(&format!("<key>a</key><array><dict>{CLAIMS}</dict></array><b/>")),
        format!("<plist><array><dict>{CLAIMS}</dict></array>").into_bytes(),
        format!("<plist><dict></dict><dict>{CLAIMS}</dict>").into_bytes(),
        format!("<plist>{CLAIMS}").into_bytes(),
        b"not a document".to_vec(),
        Vec::new(),
    ] {
        assert_eq!(claims(&malformed(document)), (None, None, None));
    }
    // A value belongs to the key right before it.
    let shifted = malformed(xml("<key>UDID</key><true/><string>U2</string><key>CommandUUID</key><string>C1</string><b/>"));
    assert_eq!(claims(&shifted), (None, Some("C1"), None));
}

#[test]
fn claims_are_read_out_of_binary_documents_that_are_refused() {
    let string = |text: &str| [&[0x50 | text.len() as u8], text.as_bytes()].concat();
    // Its last entry is an array that holds itself.
    let objects = [
        vec![0xd4, 1, 2, 3, 4, 5, 6, 7, 8],
        string("UDID"),
        string("CommandUUID"),
        string("Status"),
        string("a"),
        string("U1"),
        string("C1"),
        string("NotNow"),
        vec![0xa1, 8],
    ];
    assert_eq!(claims(&malformed(crate::hostile::binary(&objects))), (Some("U1"), Some("C1"), Some("NotNow")));
}

#[test]
fn secrets_do_not_show_in_logs() {
    let raw = xml(&format!("{CLAIMS}<key>UnlockToken</key><string>hush</string>"));
    assert!(!format!("{:?}", read(raw.clone())).contains("hush"));
    assert!(!format!("{:?}", malformed(&raw[..raw.len() - 5])).contains("hush"));
}

proptest! {
    #[test]
    fn claims_survive_whatever_follows(noise in "[<>/&a-z \\[\\]!?-]{0,80}") {
        let document = format!("<dict>{CLAIMS}{noise}");
        if let Err(report) = Report::parse(document.into_bytes().into()) {
            prop_assert_eq!(claims(&report), (Some("U1"), Some("C1"), Some("Acknowledged")));
        }
    }

    #[test]
    fn reports_of_any_content_are_read(value in crate::plists::values()) {
        let mut report: Dictionary = ours::parse(&xml(CLAIMS)).unwrap().into_dictionary().unwrap();
        report.insert("QueryResponses".into(), value);
        let report = Value::Dictionary(report);
        prop_assert_eq!(read(ours::to_xml(&report)).document, report);
    }
}
