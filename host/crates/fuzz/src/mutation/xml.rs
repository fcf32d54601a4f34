//! XML: tags, and what lies between them.

use fastrand::Rng;

/// What readers differ in, or could stumble over.
const PIECES: [&str; 33] = [
    "<dict>",
    "</dict>",
    "<dict/>",
    "<array>",
    "</array>",
    "<key>UDID</key>",
    "<key>UserID</key>",
    "<key>Status</key>",
    "<key>CommandUUID</key>",
    "<key/>",
    "<string>a</string>",
    "<string/>",
    "<string a=\">\">",
    "<string a='/'>",
    "<true/>",
    "<integer>-0x10</integer>",
    "<integer>18446744073709551615</integer>",
    "<real>nan</real>",
    "<real>1e400</real>",
    "<date>0000-01-01T00:00:00Z</date>",
    "<date>2026-02-30T24:00:60Z</date>",
    "<data>AA=</data>",
    "<![CDATA[</string>]]>",
    "<!-- <key> -->",
    "<?x > ?>",
    "<?x ><string>evil</string> ?>",
    "<string a=\"><string>evil</string>\">",
    "<!-- <string>evil</string> -->",
    "<!DOCTYPE plist [<!ENTITY a \"b\">]>",
    "&#0;",
    "&#x10ffff;",
    "&amp;",
    "\r\n",
];

/// One tag, with the text behind it, left out, doubled, moved, replaced, or something put before it.
pub(super) fn mutate(input: &[u8], other: &[u8], random: &mut Rng) -> Vec<u8> {
    let mut tokens = tokens(input);
    let foreign = self::tokens(other);
    if tokens.is_empty() {
        return PIECES[0].into();
    }
    let place = random.usize(..tokens.len());
    match random.u8(..6) {
        0 => {
            tokens.remove(place);
        }
        1 => {
            let from = random.usize(..tokens.len());
            if let Some(token) = tokens.get(from).copied() {
                tokens.insert(place, token);
            }
        }
        2 => {
            let with = random.usize(..tokens.len());
            tokens.swap(place, with);
        }
        3 => tokens.insert(place, random.choice(PIECES).unwrap_or_default().as_bytes()),
        4 => {
            if let (Some(token), Some(foreign)) = (tokens.get_mut(place), random.choice(&foreign)) {
                *token = foreign;
            }
        }
        // Within a text.
        _ => {
            let at = random.usize(..=input.len());
            let (before, after) = input.split_at(at);
            return [before, random.choice(PIECES).unwrap_or_default().as_bytes(), after].concat();
        }
    }
    tokens.concat()
}

fn tokens(input: &[u8]) -> Vec<&[u8]> {
    let mut tokens = Vec::new();
    let mut rest = input;
    while !rest.is_empty() {
        let end = rest.iter().skip(1).position(|byte| *byte == b'<').map_or(rest.len(), |at| at + 1);
        let (token, after) = rest.split_at(end);
        tokens.push(token);
        rest = after;
    }
    tokens
}
