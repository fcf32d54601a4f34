//! Check-ins, and endpoints of declarative management.

use bytes::Bytes;
use url::Url;
use wasmdm_protocol::checkin::{CheckIn, CheckInMessage};
use wasmdm_protocol::declarative_management::EndpointPath;
use wasmdm_protocol::enrollment::{DeviceFacts, Enrollment};
use wasmdm_protocol::plist;

use crate::cost::bounded;
use crate::kind_of;
use crate::property_list::BOUND;
use crate::values::is_writable;

pub(crate) fn check(input: &[u8]) -> String {
    let endpoint = std::str::from_utf8(input).map_or_else(|_| "no text".into(), check_endpoint);
    let message = match bounded(BOUND, input.len(), || CheckInMessage::parse(Bytes::copy_from_slice(input))) {
        Err(error) => return format!("{}; {endpoint}", kind_of(&error)),
        Ok(message) => message,
    };
    assert_eq!(message.raw, input, "it is kept as it came");
    check_enrollment(&message.enrollment);
    check_facts(&message.facts);
    let _ = format!("{message:?}");
    match &message.check_in {
        CheckIn::TokenUpdate(update) => {
            assert!(!update.token.is_empty() && !update.push_magic.is_empty() && !update.topic.is_empty());
            assert!(update.unlock_token.as_ref().is_none_or(|token| !token.is_empty()), "an empty unlock token would overwrite a good one");
        }
        CheckIn::SetBootstrapToken(set) => assert!(set.bootstrap_token.as_ref().is_none_or(|token| !token.is_empty())),
        CheckIn::Authenticate(authenticate) => assert!(!authenticate.topic.is_empty()),
        CheckIn::DeclarativeManagement(asked) => {
            check_endpoint(&asked.endpoint);
        }
        _ => {}
    }
    // In its other forms it is the same message.
    if let Ok(document) = plist::parse(input) {
        let mut forms = Vec::new();
        if is_writable(&document) {
            forms.push(plist::to_xml(&document));
        }
        let mut binary = Vec::new();
        if document.to_writer_binary(&mut binary).is_ok() {
            forms.push(binary.into());
        }
        for form in forms {
            let again = CheckInMessage::parse(form).unwrap_or_else(|error| panic!("in another form it is refused: {error}"));
            assert_eq!((&again.enrollment, &again.facts), (&message.enrollment, &message.facts));
            assert_eq!(again.check_in.message_type(), message.check_in.message_type());
        }
    }
    format!("{} of a {}", message.check_in.message_type(), message.enrollment.kind.as_str())
}

/// Ids and names fit into columns, log lines and headers, and no id of a device reads like that of another's user.
pub(crate) fn check_enrollment(enrollment: &Enrollment) {
    let device = enrollment.device().as_str();
    assert!(!device.is_empty() && device.len() <= 255 && !device.contains(':'), "{device:?}");
    let id = enrollment.id.as_str();
    assert!(id.len() <= 511 && !id.chars().any(char::is_control), "{id:?}");
    assert_eq!(enrollment.parent.is_none(), enrollment.kind.is_device_channel());
    if let Some(parent) = &enrollment.parent {
        assert!(id.strip_prefix(parent.as_str()).is_some_and(|user| user.len() > 1 && user.starts_with(':')), "{id:?}");
    }
}

pub(crate) fn check_facts(facts: &DeviceFacts) {
    let texts = [
        &facts.serial_number,
        &facts.model,
        &facts.model_name,
        &facts.product_name,
        &facts.os_version,
        &facts.build_version,
        &facts.user_short_name,
        &facts.user_long_name,
    ];
    for text in texts.into_iter().flatten() {
        assert!(!text.is_empty() && text.len() <= 255 && !text.chars().any(char::is_control), "{text:?}");
    }
}

/// Behind an operator's address it stays on that host and below that path, however a client reads it.
fn check_endpoint(endpoint: &str) -> String {
    const BASE: &str = "https://declarations.example/base/";
    let path = match EndpointPath::parse(endpoint) {
        Err(error) => return kind_of(&error),
        Ok(path) => path,
    };
    assert_eq!(EndpointPath::parse(path.as_str()).as_ref(), Ok(&path), "read again it is another path");
    assert!(path.as_str().bytes().all(|byte| byte.is_ascii_graphic()), "{path:?}");
    let joined = Url::parse(&format!("{BASE}{}", path.as_str())).unwrap_or_else(|error| panic!("{path:?}: {error}"));
    let relative = Url::parse(BASE).and_then(|base| base.join(path.as_str())).unwrap_or_else(|error| panic!("{path:?}: {error}"));
    assert_eq!(joined, relative);
    assert!(joined.as_str().starts_with(BASE) && joined.query().is_none() && joined.fragment().is_none(), "{path:?} leads to {joined}");
    assert_eq!(joined.path(), format!("/base/{}", path.as_str()), "a client asks for another path");
    "an endpoint".into()
}
