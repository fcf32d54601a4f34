//! Serial numbers in the one form in which they are compared: trimmed, upper case.

/// Apple's are 8 to 14 characters long; virtual machines have longer ones.
const LONGEST: usize = 64;

/// A serial number as a list must write it, normalised; `None` if it cannot be one.
///
/// A page of HTML or a sentence of an error page is refused here, before it could replace a list.
pub(crate) fn listed(text: &str) -> Option<String> {
    let text = text.trim();
    let plausible = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.+".contains(&byte);
    let fits = !text.is_empty() && text.len() <= LONGEST && text.bytes().all(plausible);
    fits.then(|| text.to_ascii_uppercase())
}

/// A device's serial number, normalised; `None` if it is empty.
pub(crate) fn of_device(text: &str) -> Option<String> {
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_ascii_uppercase())
}
