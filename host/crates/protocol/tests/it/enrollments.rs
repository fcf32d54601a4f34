//! Who a message is from. The texts of ids are NanoMDM's.

use wasmdm_protocol::enrollment::{Enrollment, EnrollmentId, EnrollmentKind, Identifiers};

/// `UDID`, `UserID`, `UserShortName`, `EnrollmentID`, `EnrollmentUserID`; `-` is absent.
fn resolve(parts: [&str; 5]) -> Result<Enrollment, (&'static str, &'static str)> {
    let [udid, user_id, user_short_name, enrollment_id, enrollment_user_id] = parts.map(|part| (part != "-").then(|| part.to_owned()));
    Identifiers { udid, user_id, user_short_name, enrollment_id, enrollment_user_id }.resolve().map_err(|error| (error.key, error.problem))
}

/// Edge case 11. Edge case 12.
#[test]
fn the_five_kinds_and_their_ids() {
    let shared = "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF";
    let lower = shared.to_lowercase();
    for (parts, kind, id, parent) in [
        (["U", "-", "-", "-", "-"], EnrollmentKind::Device, "U", None),
        (["U", "-", "short", "E", "EU"], EnrollmentKind::Device, "U", None),
        (["U", "A", "short", "-", "-"], EnrollmentKind::User, "U:A", Some("U")),
        (["U", shared, "a@b.example", "-", "-"], EnrollmentKind::SharedIpad, "U:a@b.example", Some("U")),
        (["U", &lower, "a@b.example", "-", "-"], EnrollmentKind::SharedIpad, "U:a@b.example", Some("U")),
        (["-", "-", "-", "E", "-"], EnrollmentKind::UserEnrollmentDevice, "E", None),
        (["-", "A", "short", "E", "EU"], EnrollmentKind::UserEnrollment, "E:EU", Some("E")),
    ] {
        let enrollment = resolve(parts).unwrap();
        assert_eq!((enrollment.kind, enrollment.id.as_str(), enrollment.parent.as_ref().map(EnrollmentId::as_str)), (kind, id, parent), "{parts:?}");
        assert_eq!(enrollment.device().as_str(), parent.unwrap_or(id));
    }
}

#[test]
fn ids_that_are_none_are_refused() {
    let long = "U".repeat(256);
    let shared = "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF";
    for (parts, key) in [
        (["-", "-", "-", "-", "-"], "UDID"),
        (["-", "A", "short", "-", "EU"], "UDID"),
        (["", "-", "-", "E", "-"], "UDID"),
        (["U\0", "-", "-", "-", "-"], "UDID"),
        (["U\n", "-", "-", "-", "-"], "UDID"),
        (["U\u{85}", "-", "-", "-", "-"], "UDID"),
        ([&long, "-", "-", "-", "-"], "UDID"),
        (["U", "", "-", "-", "-"], "UserID"),
        (["U", &long, "-", "-", "-"], "UserID"),
        (["U", shared, "-", "-", "-"], "UserShortName"),
        (["U", shared, "", "-", "-"], "UserShortName"),
        (["-", "-", "-", "", "-"], "EnrollmentID"),
        (["-", "-", "-", "E", ""], "EnrollmentUserID"),
    ] {
        assert_eq!(resolve(parts).unwrap_err().0, key, "{parts:?}");
    }
    assert!(resolve([&"U".repeat(255), "-", "-", "-", "-"]).is_ok());
}

/// A device that calls itself `U:A` would share the id of user `A` of device `U`. Edge case 12.
#[test]
fn a_device_cannot_take_the_id_of_another_devices_user() {
    assert_eq!(resolve(["U:A", "-", "-", "-", "-"]), Err(("UDID", "has a colon")));
    assert_eq!(resolve(["-", "-", "-", "E:EU", "-"]), Err(("EnrollmentID", "has a colon")));
    assert_eq!(resolve(["U", "A:B", "-", "-", "-"]).unwrap().id.as_str(), "U:A:B");
}
