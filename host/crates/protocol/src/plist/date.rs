//! Dates. The `plist` crate's conversions panic at both ends of their range, so years 0 to 9998 are checked here.

use std::time::SystemTime;

use jiff::Timestamp;
use plist::Date;

/// Seconds from the Unix epoch to the first second of the year 0.
const EARLIEST: i64 = -62_167_219_200;
/// Seconds from the Unix epoch to the first second of the year 9999.
const END: i64 = 253_370_764_800;
/// Seconds from the Unix epoch to that of binary property lists, the start of 2001.
const APPLE_EPOCH: i64 = 978_307_200;

/// From RFC 3339 text; property lists use its form with `Z`.
pub(crate) fn from_text(text: &str) -> Option<Date> {
    from_timestamp(text.parse().ok()?)
}

/// From seconds since the start of 2001.
pub(super) fn from_apple_seconds(seconds: f64) -> Option<Date> {
    // Far inside of what i64 holds.
    if !seconds.is_finite() || seconds.abs() > 1e12 {
        return None;
    }
    #[expect(clippy::cast_possible_truncation, reason = "its size was checked")]
    let micros = (seconds * 1e6).round() as i64;
    from_timestamp(Timestamp::from_microsecond(micros.checked_add(APPLE_EPOCH * 1_000_000)?).ok()?)
}

fn from_timestamp(time: Timestamp) -> Option<Date> {
    // A part of a second before the first one is of the year before, which has no text.
    let is_in_range = (EARLIEST..END).contains(&time.as_second()) && (time.as_second() > EARLIEST || time.subsec_nanosecond() >= 0);
    is_in_range.then(|| Date::from(SystemTime::from(time)))
}

/// RFC 3339, with a fraction if the date has one.
pub(crate) fn to_text(date: Date) -> String {
    timestamp(date).to_string()
}

/// As XML property lists write it: whole seconds.
pub(super) fn to_xml_text(date: Date) -> String {
    timestamp(date).strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Dates from elsewhere than the readers can lie out of range.
fn timestamp(date: Date) -> Timestamp {
    Timestamp::try_from(SystemTime::from(date)).unwrap_or(Timestamp::MAX)
}
