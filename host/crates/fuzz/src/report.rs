//! Command reports: read, or malformed for a reason; and what is salvaged of a malformed one is what it says.

use bytes::Bytes;
use plist::Value;
use wasmdm_protocol::plist::{parse, to_xml};
use wasmdm_protocol::report::{MalformedReport, Report, Status};

use crate::check_in::{check_enrollment, check_facts};
use crate::cost::bounded;
use crate::kind_of;
use crate::property_list::{BOUND, shape};
use crate::values::is_writable;

pub(crate) fn check(input: &[u8]) -> String {
    match bounded(BOUND, input.len(), || Report::parse(Bytes::copy_from_slice(input))) {
        Ok(report) => {
            assert_eq!(report.raw, input, "it is kept as it came");
            check_enrollment(&report.enrollment);
            check_facts(&report.facts);
            assert_eq!(report.command_uuid.is_none(), report.status == Status::Idle, "only a poll is about no command");
            let _ = format!("{report:?}");
            forms_agree(&report);
            breakages_agree(&report, input);
            let status = if matches!(report.status, Status::Unknown(_)) { "unknown" } else { report.status.as_str() };
            format!("{status} of a {} {}", report.enrollment.kind.as_str(), shape(&report.document, 1))
        }
        Err(malformed) => {
            assert_eq!(malformed.raw, input, "it is kept as it came");
            assert!(!malformed.reason.is_empty());
            if let Some(enrollment) = &malformed.enrollment {
                check_enrollment(enrollment);
            }
            for claim in malformed.command_uuid.iter().chain(&malformed.status) {
                assert!(!claim.is_empty() && claim.len() <= 255 && !claim.chars().any(char::is_control), "{claim:?}");
            }
            let claims = [malformed.enrollment.is_some(), malformed.command_uuid.is_some(), malformed.status.is_some()];
            format!("{} {claims:?}", kind_of(&malformed.reason))
        }
    }
}

/// In its other forms it is the same report.
fn forms_agree(report: &Report) {
    let mut forms = Vec::new();
    if is_writable(&report.document) {
        forms.push(to_xml(&report.document));
    }
    let mut binary = Vec::new();
    if report.document.to_writer_binary(&mut binary).is_ok() {
        forms.push(binary.into());
    }
    for form in forms {
        let again = Report::parse(form).unwrap_or_else(|malformed| panic!("in another form it is refused: {}", malformed.reason));
        assert_eq!((&again.enrollment, &again.facts), (&report.enrollment, &report.facts));
        assert_eq!((&again.status, &again.command_uuid), (&report.status, &report.command_uuid));
    }
}

/// Broken behind what it says, the same report is malformed, and claims nothing else.
fn breakages_agree(report: &Report, input: &[u8]) {
    if input.starts_with(b"bplist00") {
        // One value more, of a kind that no message has.
        let Some(mut entries) = report.document.as_dictionary().cloned() else { return };
        entries.insert("zz".into(), Value::Uid(plist::Uid::new(1)));
        let mut broken = Vec::new();
        if Value::Dictionary(entries).to_writer_binary(&mut broken).is_ok() && broken.len() < 100_000 {
            whole_agrees(report, &claimed(&broken));
        }
        return;
    }
    for junk in [&b"<"[..], b"<junk>", b"</dict>", b"&"] {
        whole_agrees(report, &claimed(&[input, junk].concat()));
    }
    let text = input.trim_ascii_end();
    // Which of two names counts is known only when both have been read; no device of Apple's says both.
    let names =
        report.document.as_dictionary().map_or(0, |entries| ["UDID", "EnrollmentID"].iter().filter(|name| entries.contains_key(name)).count());
    for part in 1..8 {
        let cut = text.len() * part / 8;
        let Some(beginning) = text.get(..cut) else { continue };
        // What was cut off may have said which of the device's channels it is.
        if parse(beginning).is_err() {
            let mut claims = claimed(beginning);
            if names > 1 {
                claims.enrollment = None;
            }
            agrees(report, &claims);
        }
    }
}

fn claimed(broken: &[u8]) -> MalformedReport {
    match Report::parse(Bytes::copy_from_slice(broken)) {
        Ok(_) => panic!("broken, it is a report all the same"),
        Err(malformed) => *malformed,
    }
}

/// A user may be beyond telling, and then it is the device that is claimed; but never another user.
fn whole_agrees(report: &Report, claims: &MalformedReport) {
    agrees(report, claims);
    if let Some(claimed) = claims.enrollment.as_ref().filter(|claimed| claimed.parent.is_some()) {
        assert_eq!(claimed, &report.enrollment, "the salvage claims another channel");
    }
}

fn agrees(report: &Report, claims: &MalformedReport) {
    if let Some(claimed) = &claims.enrollment {
        assert_eq!(claimed.device(), report.enrollment.device(), "the salvage claims another device");
    }
    if let Some(claimed) = &claims.status {
        assert_eq!(claimed, report.status.as_str(), "the salvage claims another status");
    }
    // Polls are about no command, whatever they say.
    if let (Some(claimed), Some(uuid)) = (&claims.command_uuid, &report.command_uuid) {
        assert_eq!(claimed, uuid, "the salvage claims another command");
    }
}
