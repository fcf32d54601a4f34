//! Documents made to bring a server down. Each is read on a small stack, and has its answer at once.

use std::time::{Duration, Instant};

use wasmdm_protocol::checkin::CheckInMessage;
use wasmdm_protocol::command::Command;
use wasmdm_protocol::plist::{self, MAX_DEPTH, MAX_VALUES, PlistError};
use wasmdm_protocol::report::Report;

/// Far above what any of them takes, even unoptimised and beside other tests; far below what the attacks aim at.
const AT_ONCE: Duration = Duration::from_secs(1);

/// The refusal of a document by every reader of the crate.
fn refusal(document: &[u8]) -> PlistError {
    let document = document.to_vec();
    let read = move || {
        let timed = |read: &dyn Fn() -> bool| {
            let start = Instant::now();
            assert!(read(), "it was not refused");
            assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
        };
        timed(&|| CheckInMessage::parse(document.clone().into()).is_err());
        timed(&|| Report::parse(document.clone().into()).is_err());
        timed(&|| Command::parse(document.clone().into()).is_err());
        plist::parse(&document).unwrap_err()
    };
    std::thread::Builder::new().stack_size(512 * 1024).spawn(read).unwrap().join().unwrap()
}

/// A binary document of these objects, the first of them on top, with offsets of two and references of one byte.
pub(crate) fn binary(objects: &[Vec<u8>]) -> Vec<u8> {
    binary_with(objects, 2, 1, 0)
}

fn binary_with(objects: &[Vec<u8>], offset_size: u8, reference_size: u8, root: u64) -> Vec<u8> {
    let mut document = b"bplist00".to_vec();
    let mut offsets: Vec<u8> = Vec::new();
    for object in objects {
        let offset = (document.len() as u64).to_be_bytes();
        offsets.extend(&offset[8 - usize::from(offset_size)..]);
        document.extend(object);
    }
    let table = document.len() as u64;
    document.extend(offsets);
    document.extend([0, 0, 0, 0, 0, 0, offset_size, reference_size]);
    document.extend((objects.len() as u64).to_be_bytes());
    document.extend(root.to_be_bytes());
    document.extend(table.to_be_bytes());
    document
}

const TOO_DEEP: PlistError = PlistError::TooLarge { what: "levels", limit: MAX_DEPTH };
const TOO_MANY: PlistError = PlistError::TooLarge { what: "values", limit: MAX_VALUES };

/// Edge case 8.
#[test]
fn ten_thousand_nested_arrays() {
    let nested = |open: &str, close: &str| format!("<plist>{}{}</plist>", open.repeat(10_000), close.repeat(10_000));
    assert_eq!(refusal(nested("<array>", "</array>").as_bytes()), TOO_DEEP);
    assert_eq!(refusal(nested("<dict><key>a</key>", "</dict>").as_bytes()), TOO_DEEP);
    assert_eq!(refusal("<array>".repeat(400_000).as_bytes()), TOO_DEEP);
    // Each array holds the next.
    let chain: Vec<Vec<u8>> = (0..10_000_u16).map(|index| [&[0xa1], (index + 1).min(9_999).to_be_bytes().as_slice()].concat()).collect();
    assert_eq!(refusal(&binary_with(&chain, 4, 2, 0)), TOO_DEEP);
}

#[test]
fn a_short_document_that_stands_for_billions_of_values() {
    // Sixteen arrays, each of which holds the next one sixteen times.
    let mut objects: Vec<Vec<u8>> = (1..=16).map(|next| [vec![0xaf, 0x10, 16], vec![next; 16]].concat()).collect();
    objects.push(vec![0x09]);
    assert!(too_large(&refusal(&binary(&objects))));
    // 138 bytes: eight arrays of five.
    let mut objects: Vec<Vec<u8>> = (1..=8).map(|next| [vec![0xa8], vec![next; 8]].concat()).collect();
    objects.push(vec![0x09]);
    let bomb = binary(&objects);
    assert!(bomb.len() <= 138, "{}", bomb.len());
    assert!(too_large(&refusal(&bomb)));
    let dictionaries: Vec<Vec<u8>> =
        (1..=12).map(|next| vec![0xd2, 13, 14, next, next]).chain([vec![0x09], vec![0x51, b'a'], vec![0x51, b'b']]).collect();
    assert!(plist::parse(&binary(&dictionaries)).is_ok(), "4,096 values are few enough");
}

/// Fuzzing found 99 kB that took 46 MB: each further reference to a dictionary costs a byte of the document and hundreds in memory. Edge case 8.
#[test]
fn a_small_dictionary_that_is_shared_a_hundred_thousand_times() {
    let references = |count: u32| [[0xaf, 0x12].as_slice(), &count.to_be_bytes(), &vec![1; count as usize]].concat();
    for inner in [vec![vec![0xd1, 2, 3], vec![0x51, b'a'], vec![0x09]], vec![vec![0xa1, 2], vec![0x09]], vec![vec![0xd0]]] {
        let shared = |count| binary_with(&[vec![references(count)], inner.clone()].concat(), 4, 1, 0);
        assert!(too_large(&refusal(&shared(99_000))));
        assert!(plist::parse(&shared(5_000)).is_ok());
    }
    assert_eq!(refusal(&binary_with(&[references(200_001), vec![0x09]], 4, 1, 0)), TOO_MANY);
}

fn too_large(error: &PlistError) -> bool {
    matches!(error, PlistError::TooLarge { .. })
}

#[test]
fn a_long_string_that_is_shared_a_hundred_thousand_times() {
    let references = [[0xaf, 0x12].as_slice(), &100_000_u32.to_be_bytes(), &vec![1; 100_000]].concat();
    for marker in [0x4f, 0x5f, 0x6f] {
        let string = [[marker, 0x12].as_slice(), &100_000_u32.to_be_bytes(), &vec![b'a'; 200_000]].concat();
        assert!(matches!(refusal(&binary_with(&[references.clone(), string], 4, 1, 0)), PlistError::TooLarge { what: "shared bytes", .. }));
    }
}

#[test]
fn objects_that_hold_themselves() {
    let holds_itself = PlistError::Malformed("an object holds itself".into());
    assert_eq!(refusal(&binary(&[vec![0xa1, 0]])), holds_itself);
    assert_eq!(refusal(&binary(&[vec![0xa1, 1], vec![0xa1, 2], vec![0xa1, 0]])), holds_itself);
    assert_eq!(refusal(&binary(&[vec![0xd1, 1, 0], vec![0x51, b'a']])), holds_itself);
    // As its own key.
    assert!(matches!(refusal(&binary(&[vec![0xd1, 0, 0]])), PlistError::Malformed(_)));
}

#[test]
fn lengths_and_references_beyond_the_document() {
    let long = |marker: u8, length: u64| [[marker, 0x13].as_slice(), &length.to_be_bytes()].concat();
    for length in [1 << 62, u64::MAX, 1 << 32, 1 << 31, 100] {
        for marker in [0x4f, 0x5f, 0x6f, 0xaf, 0xdf] {
            assert!(matches!(refusal(&binary(&[long(marker, length)])), PlistError::Malformed(_)), "{marker:x} {length}");
        }
    }
    assert!(matches!(refusal(&binary(&[vec![0xa1, 7]])), PlistError::Malformed(_)), "a reference to nothing");
    assert!(matches!(refusal(&binary(&[vec![0x13, 0]])), PlistError::Malformed(_)), "a number without its bytes");
    assert!(matches!(refusal(&binary(&[vec![0x5f, 0x14, 0]])), PlistError::Malformed(_)), "a length of sixteen bytes");
    assert!(matches!(refusal(&binary(&[vec![0x5f, 0x20, 0]])), PlistError::Malformed(_)), "a length that is no integer");
    assert!(matches!(refusal(&binary(&[vec![0x00]])), PlistError::Malformed(_)), "null");
    assert!(matches!(refusal(&binary(&[vec![0x80, 1]])), PlistError::Malformed(_)), "a UID");
    assert!(matches!(refusal(&binary(&[vec![0x61, 0xd8, 0x00]])), PlistError::Malformed(_)), "a lone surrogate");
    assert!(matches!(refusal(&binary(&[vec![0x51, 0x00]])), PlistError::Malformed(_)), "a NUL");
    assert!(matches!(refusal(&binary(&[vec![0x51, 0xff]])), PlistError::Malformed(_)), "not ASCII");
    assert!(matches!(refusal(&binary(&[[&[0x14], [0x01].as_slice(), &[0; 15]].concat()])), PlistError::Malformed(_)), "an integer of 128 bits");
    assert!(matches!(refusal(&binary(&[vec![0xd2, 1, 1, 2, 2], vec![0x51, b'a'], vec![0x09]])), PlistError::Malformed(_)), "a key twice");
    assert!(matches!(refusal(&binary(&[vec![0xd1, 1, 1], vec![0x09]])), PlistError::Malformed(_)), "a key that is no string");
    for seconds in [f64::NAN, f64::INFINITY, -f64::INFINITY, 1e300, -1e12, 253_370_764_800.0] {
        assert!(matches!(refusal(&binary(&[[&[0x33], seconds.to_be_bytes().as_slice()].concat()])), PlistError::Malformed(_)), "{seconds}");
    }
}

#[test]
fn trailers_that_lie() {
    let objects = [vec![0xa1, 1], vec![0x09]];
    for (offset_size, reference_size) in [(0, 1), (1, 0), (0, 0), (9, 1), (1, 9), (255, 255)] {
        let mut document = binary_with(&objects, 1, 1, 0);
        let trailer = document.len() - 32;
        document[trailer + 6] = offset_size;
        document[trailer + 7] = reference_size;
        assert!(matches!(refusal(&document), PlistError::Malformed(_)), "{offset_size} {reference_size}");
    }
    for field in [8, 16, 24] {
        for lie in [u64::MAX, 1 << 62, 1 << 32, 1000] {
            let mut document = binary(&objects);
            let at = document.len() - 32 + field;
            document[at..at + 8].copy_from_slice(&lie.to_be_bytes());
            assert!(matches!(refusal(&document), PlistError::Malformed(_)), "{field} {lie}");
        }
    }
    let whole = binary(&objects);
    assert!(plist::parse(&whole).is_ok());
    for length in 0..whole.len() {
        assert!(plist::parse(&whole[..length]).is_err(), "{length}");
    }
}

/// Edge case 8.
#[test]
fn entities_that_grow() {
    let mut bomb = "<?xml version=\"1.0\"?><!DOCTYPE plist [<!ENTITY a0 \"ha\">".to_owned();
    for level in 1..30 {
        bomb.extend(["<!ENTITY a", &level.to_string(), " \"", &format!("&a{};", level - 1).repeat(2), "\">"]);
    }
    bomb += "]><plist><string>&a29;</string></plist>";
    assert!(matches!(refusal(bomb.as_bytes()), PlistError::Malformed(_)));
    assert!(matches!(
        refusal(b"<!DOCTYPE plist [<!ENTITY a SYSTEM \"file:///etc/passwd\">]><plist><string>&a;</string></plist>"),
        PlistError::Malformed(_)
    ));
}

#[test]
fn long_documents_of_one_thing() {
    for part in ["<", "<!--", "<![CDATA[", "<?", "&", "<key>", "<true/>", "<string>", "<a ", "<a b=\"", " ", "]]>", "-->", "<!DOCTYPE ", "</", "&#"] {
        for prefix in ["", "<string>", "<dict><key>", "<array>"] {
            let document = format!("{prefix}{}", part.repeat(500_000 / part.len()));
            assert_ne!(refusal(document.as_bytes()).to_string(), "");
        }
    }
}
