//! The tenant's enrollments. Needs the grant `enrollments`: `read`, and `tag` or `release` for those two.

use serde::Serialize;
use serde_json::Value;

use crate::{Enrollment, Failure, host};

/// An enrollment, if there is one of that id.
pub fn get(id: &str) -> Result<Option<Enrollment>, Failure> {
    host::enrollments::get(id)
}

/// The enrollments of a serial number; there can be several.
pub fn by_serial_number(serial_number: &str) -> Result<Vec<Enrollment>, Failure> {
    host::enrollments::by_serial_number(serial_number)
}

/// What [`query`] looks for: all that is given must match.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Filter {
    /// `device`, `user`, ….
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// `enrolled`, ….
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// A tag that it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// Its serial number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial_number: Option<String>,
    /// Its model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
}

/// One page (at most 100) of the enrollments that match, and where the next begins.
///
/// ```
/// # use wasmdm_plugin::{enrollments, mock, Failure};
/// # fn main() -> Result<(), Failure> {
/// let host = mock::Host::new();
/// host.add_enrollment(mock::enrollment("UDID-1", serde_json::json!({ "tags": ["lab"] })));
/// let filter = enrollments::Filter { tag: Some("lab".into()), ..Default::default() };
/// let (found, next) = enrollments::query(&filter, None, 100)?;
/// assert_eq!((found.len(), next), (1, None));
/// # Ok(())
/// # }
/// ```
pub fn query(filter: &Filter, cursor: Option<&str>, limit: u32) -> Result<(Vec<Enrollment>, Option<String>), Failure> {
    let filter: Value = serde_json::to_value(filter)?;
    let page = host::enrollments::query(&filter.to_string(), cursor, limit)?;
    Ok((page.found, page.cursor))
}

/// Adds and removes tags.
pub fn tag(id: &str, add: &[&str], remove: &[&str]) -> Result<(), Failure> {
    let owned = |tags: &[&str]| tags.iter().map(|&tag| tag.to_owned()).collect::<Vec<_>>();
    host::enrollments::tag(id, &owned(add), &owned(remove))
}

/// Ends a quarantine. Whether there was one.
pub fn release(id: &str) -> Result<bool, Failure> {
    host::enrollments::release(id)
}
