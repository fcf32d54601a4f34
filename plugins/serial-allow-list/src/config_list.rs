//! The list in the configuration, searched as text: making strings of a thousand entries in every fresh instance would
//! cost more than the rest of the call.

use wasmdm_plugin::Failure;

/// Whether a JSON array of strings contains a normalised serial number.
pub(crate) fn contains(array: &str, serial_number: &str) -> Result<bool, Failure> {
    // Nobody escapes characters of a serial number; JSON that does is legal, and goes the slow way.
    if array.contains('\\') {
        return contains_parsed(array, serial_number);
    }
    // Without escapes, every other quotation mark begins a string.
    let wanted = serial_number.as_bytes();
    let mut strings = array.as_bytes().split(|&byte| byte == b'"').skip(1).step_by(2);
    Ok(strings.any(|string| string.trim_ascii().eq_ignore_ascii_case(wanted)))
}

fn contains_parsed(array: &str, serial_number: &str) -> Result<bool, Failure> {
    let listed: Vec<String> = serde_json::from_str(array)?;
    Ok(listed.iter().any(|listed| listed.trim().eq_ignore_ascii_case(serial_number)))
}

#[cfg(test)]
mod tests {
    use super::contains;
    use serde_json::json;

    #[test]
    fn finds_whole_strings_in_any_case_and_spacing() {
        let array = json!(["C02AAA", " c02bbb ", "C02CCCC"]).to_string();
        for listed in ["C02AAA", "C02BBB", "C02CCCC"] {
            assert!(contains(&array, listed).unwrap(), "{listed}");
        }
        for unlisted in ["C02", "C02CCC", "02AAA", ",", ""] {
            assert!(!contains(&array, unlisted).unwrap(), "{unlisted}");
        }
        assert!(!contains("[]", "C02AAA").unwrap());
    }

    #[test]
    fn an_escaped_quotation_mark_begins_no_string() {
        let array = json!(["x\"C02AAA", "C02BBB"]).to_string();
        assert!(array.contains("\"C02AAA\""));
        assert!(!contains(&array, "C02AAA").unwrap());
        assert!(contains(&array, "C02BBB").unwrap());
        assert!(contains(r#"["\u0043\u0030\u0032AAA"]"#, "C02AAA").unwrap());
    }

    #[test]
    fn agrees_with_a_parser_on_a_thousand_serial_numbers() {
        let serial = |number: u32| format!("C02{number:07}XY");
        let array = json!((0..1_000).map(serial).collect::<Vec<_>>()).to_string();
        for number in (0..2_000).step_by(97) {
            assert_eq!(contains(&array, &serial(number)).unwrap(), number < 1_000, "{number}");
        }
    }
}
