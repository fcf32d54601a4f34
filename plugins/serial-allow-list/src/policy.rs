//! The decision.

use serde::Deserialize;
use wasmdm_plugin::{Decision, Enrollment, Failure, config};

use crate::{config_list, serial_number, settings, stored_list};

/// The one fact that matters here.
#[derive(Deserialize)]
struct SerialNumber {
    serial_number: Option<String>,
}

/// Listed devices may enroll, others not. As long as a configured address has not given a list, a device that stands in
/// no other list can be neither allowed nor refused: a failure, so that it is told to come back.
pub(crate) fn decide(candidate: &Enrollment) -> Result<Decision, Failure> {
    let told = candidate.facts_as::<SerialNumber>()?.serial_number;
    let Some(serial_number) = told.as_deref().and_then(serial_number::of_device) else {
        return Ok(settings::without_serial()?.decision());
    };
    if let Some(array) = config::raw("serial_numbers")
        && config_list::contains(&array, &serial_number)?
    {
        return Ok(Decision::allow());
    }
    let mut unknown = None;
    for url in settings::urls()? {
        match stored_list::contains(&url, &serial_number)? {
            Some(true) => return Ok(Decision::allow()),
            Some(false) => {}
            None => unknown = Some(url),
        }
    }
    match unknown {
        Some(url) => Err(Failure::unavailable(format!("the list of {url} was not fetched yet")).retry_after_ms(60_000)),
        None => Ok(Decision::deny(format!("serial number {serial_number} is not listed"))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use wasmdm_plugin::{Decision, EnrollmentPolicy, Failure, mock};

    use crate::{SerialAllowList, stored_list};

    fn decide(host: &mock::Host, facts: Value) -> Result<Decision, Failure> {
        let candidate = mock::enrollment("UDID-1", facts);
        let message = mock::input(json!({ "MessageType": "Authenticate" }));
        host.call(|| SerialAllowList::decide(mock::call(), candidate, message, false))
    }

    fn verdict(host: &mock::Host, serial_number: &str) -> String {
        decide(host, json!({ "serial_number": serial_number })).unwrap().verdict
    }

    #[test]
    fn only_listed_devices_enroll() {
        let host = mock::Host::new();
        host.set_config(json!({ "serial_numbers": ["C02AAA", "c02bbb"] }));
        assert_eq!(verdict(&host, "C02AAA"), "allow");
        assert_eq!(verdict(&host, "C02BBB"), "allow");
        let denied = decide(&host, json!({ "serial_number": "C02CCC" })).unwrap();
        assert_eq!(denied, Decision::deny("serial number C02CCC is not listed"));
    }

    #[test]
    fn an_empty_list_refuses_everybody() {
        let host = mock::Host::new();
        host.set_config(json!({ "serial_numbers": [] }));
        assert_eq!(verdict(&host, "C02AAA"), "deny");
    }

    #[test]
    fn a_device_without_serial_number_gets_what_is_configured() {
        let host = mock::Host::new();
        for (setting, expected) in [(None, "deny"), (Some("deny"), "deny"), (Some("allow"), "allow"), (Some("quarantine"), "quarantine")] {
            let mut config = json!({ "serial_numbers": ["C02AAA"] });
            if let Some(setting) = setting {
                config["without_serial"] = json!(setting);
            }
            host.set_config(config);
            for facts in [json!({}), json!({ "serial_number": " " })] {
                assert_eq!(decide(&host, facts).unwrap().verdict, expected, "{setting:?}");
            }
        }
    }

    #[test]
    fn before_the_first_fetch_unlisted_devices_are_told_to_come_back() {
        let host = mock::Host::new();
        host.set_config(json!({ "serial_numbers": ["C02AAA"], "url": "https://lists.example" }));
        assert_eq!(verdict(&host, "C02AAA"), "allow");
        let failure = decide(&host, json!({ "serial_number": "C02BBB" })).unwrap_err();
        assert!(failure.retryable, "{failure:?}");
    }

    #[test]
    fn a_list_serves_only_the_address_that_it_came_from() {
        let host = mock::Host::new();
        stored_list::replace("https://old.example", &["C02AAA".to_owned()].into()).unwrap();
        host.set_config(json!({ "url": "https://old.example" }));
        assert_eq!(verdict(&host, "C02AAA"), "allow");
        host.set_config(json!({ "url": "https://new.example" }));
        assert!(decide(&host, json!({ "serial_number": "C02AAA" })).is_err());
    }

    #[test]
    fn any_of_several_lists_is_enough() {
        let host = mock::Host::new();
        host.set_config(json!({ "url": ["https://a.example", "https://b.example"] }));
        stored_list::replace("https://a.example", &["C02AAA".to_owned()].into()).unwrap();
        assert!(decide(&host, json!({ "serial_number": "C02BBB" })).is_err());
        stored_list::replace("https://b.example", &["C02BBB".to_owned()].into()).unwrap();
        assert_eq!(verdict(&host, "C02AAA"), "allow");
        assert_eq!(verdict(&host, "C02BBB"), "allow");
        assert_eq!(verdict(&host, "C02CCC"), "deny");
    }
}
