//! The list in the configuration, searched as text: making strings of a thousand entries in every fresh instance would
//! cost more than the rest of the call.

use wasmdm_plugin::Failure;

use crate::serial_number;

/// Whether a JSON array of strings contains a normalised serial number.
pub(crate) fn contains(array: &str, serial_number: &str) -> Result<bool, Failure> {
    // A device may call itself anything, `,` for instance, which stands between two quotation marks of every list.
    if serial_number::listed(serial_number).is_none() {
        return Ok(false);
    }
    // What is no mark of an escape begins or ends a string, and between strings there are no letters.
    let quoted = format!("\"{serial_number}\"");
    let mut found = array.match_indices(&quoted);
    if found.any(|(at, _)| !array.get(..at).is_some_and(|before| before.ends_with('\\'))) {
        return Ok(true);
    }
    if is_normalised(array) { Ok(false) } else { contains_parsed(array, serial_number) }
}

/// Whether nothing in the array can be a serial number in another form: no lower-case letter, blank or escape.
fn is_normalised(array: &str) -> bool {
    let mut words = array.as_bytes().chunks_exact(8);
    let rest = words.remainder().iter().all(|&byte| !is_other(u64::from(byte) | 0x2222_2222_2222_2200));
    rest && words.all(|word| !<[u8; 8]>::try_from(word).is_ok_and(|word| is_other(u64::from_le_bytes(word))))
}

/// Whether one of eight bytes is a lower-case letter or its neighbour, a blank, a backslash, or no ASCII. Eight at once,
/// because this looks at each byte of the list.
fn is_other(word: u64) -> bool {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGHEST: u64 = ONES * 0x80;
    // Lower-case letters are the columns of ASCII with both of these bits.
    let lower_case = word << 1 & word << 2 & HIGHEST;
    // Borrows may report a byte too many, beside one that is there: nothing is missed, and nothing is made up.
    let is = |byte: u8| {
        let difference = word ^ (ONES * u64::from(byte));
        difference.wrapping_sub(ONES) & !difference & HIGHEST
    };
    (lower_case | is(b' ') | is(b'\\') | word & HIGHEST) != 0
}

fn contains_parsed(array: &str, serial_number: &str) -> Result<bool, Failure> {
    let listed: Vec<String> = serde_json::from_str(array)?;
    Ok(listed.iter().any(|listed| listed.trim().eq_ignore_ascii_case(serial_number)))
}

#[cfg(test)]
mod tests {
    use super::{contains, is_normalised};
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
    fn only_upper_case_without_blanks_and_escapes_is_normalised() {
        for before in 0..9 {
            for after in 0..9 {
                let around = |text: &str| format!("{}{text}{}", "\"09AZ-_.+".repeat(before), "],[\"".repeat(after));
                assert!(is_normalised(&around("")) && is_normalised(&around("Z[]^_@/:?!\"")));
                for other in ["a", "z", " ", "\\", "é", "~"] {
                    assert!(!is_normalised(&around(other)), "{}", around(other));
                }
            }
        }
    }

    #[test]
    fn what_stands_between_strings_is_no_serial_number() {
        let array = json!(["C02AAA", "C02BBB"]).to_string();
        for told in [",", "\",\"", "C02AAA\",\"C02BBB", "", " "] {
            assert!(!contains(&array, told).unwrap(), "{told}");
        }
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
