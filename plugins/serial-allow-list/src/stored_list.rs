//! A fetched list in key-values, made for cheap lookups in large lists.
//!
//! ```text
//! list/SOURCE/current          "GENERATION\n" and the first serial number of each chunk, one a line
//! list/SOURCE/GENERATION/N     chunk N: serial numbers in order, one a line
//! list/SOURCE/status           what the last fetch brought; see refresh
//! source/SOURCE                the address, so that lists of former addresses are found and removed
//! ```
//!
//! `SOURCE` is a hash of the address, so a list never serves another address than its own. A lookup reads two values,
//! one of them a chunk of at most 16 KiB, however long the list is: with 100,000 serial numbers `current` has 1 KiB. A
//! new list gets new keys, and `current` turns to them in the same commit that removes the old ones.

use std::collections::BTreeSet;

use wasmdm_plugin::{Failure, kv};

/// Bytes of a chunk: large enough that a list fits into one call's host calls, small enough to copy in microseconds.
const CHUNK: usize = 16 * 1024;

/// A call may make 1,000 host calls; replacing a list makes one per old and per new chunk, and a few more. Four lists
/// in one call fit with so many chunks (1.8 MiB) each.
const MOST_CHUNKS: usize = 115;

/// Generations read before giving up on a list that keeps changing.
const ATTEMPTS: usize = 3;

/// `current`, read.
struct Current {
    generation: u64,
    /// The first serial number of each chunk.
    firsts: Vec<String>,
}

/// Whether the address' list contains a normalised serial number; `None` if there is no list of that address.
pub(crate) fn contains(url: &str, serial_number: &str) -> Result<Option<bool>, Failure> {
    let source = source(url);
    for _ in 0..ATTEMPTS {
        let Some(current) = current(&source)? else {
            return Ok(None);
        };
        let after = current.firsts.partition_point(|first| first.as_str() <= serial_number);
        let Some(chunk) = after.checked_sub(1) else {
            return Ok(Some(false));
        };
        if let Some(chunk) = kv::get(&chunk_key(&source, current.generation, chunk))? {
            return Ok(Some(chunk_contains(&chunk, serial_number.as_bytes())));
        }
        // The list was replaced between the two reads.
    }
    Err(Failure::conflict("the list is being replaced"))
}

/// Whether a list can be stored in one call.
pub(crate) fn check_size(serial_numbers: &BTreeSet<String>) -> Result<(), Failure> {
    if chunks(serial_numbers).len() > MOST_CHUNKS {
        let message = format!("{} serial numbers are too many for one list", serial_numbers.len());
        return Err(Failure::new("quota", message));
    }
    Ok(())
}

/// Makes these the address' list, and removes what it replaces. The serial numbers are normalised, not empty, and passed
/// [`check_size`].
pub(crate) fn replace(url: &str, serial_numbers: &BTreeSet<String>) -> Result<(), Failure> {
    let source = source(url);
    let old = current(&source)?;
    let generation = old.as_ref().map_or(1, |old| old.generation + 1);
    let chunks = chunks(serial_numbers);
    let mut text = generation.to_string();
    for (number, chunk) in chunks.iter().enumerate() {
        kv::put(&chunk_key(&source, generation, number), chunk.as_bytes())?;
        text.push('\n');
        text.push_str(chunk.lines().next().unwrap_or_default());
    }
    kv::put(&current_key(&source), text.as_bytes())?;
    for number in 0..old.as_ref().map_or(0, |old| old.firsts.len()) {
        kv::remove(&chunk_key(&source, generation - 1, number))?;
    }
    Ok(())
}

/// Removes one list whose address is none of these, if there is one. One a call, because host calls are counted.
pub(crate) fn forget_one_other(urls: &[String]) -> Result<(), Failure> {
    let kept: BTreeSet<String> = urls.iter().map(|url| source(url)).collect();
    for pair in kv::scan("source/") {
        let key = pair?.key;
        let source = key.trim_start_matches("source/");
        if !kept.contains(source) {
            return forget(source);
        }
    }
    Ok(())
}

fn forget(source: &str) -> Result<(), Failure> {
    if let Some(old) = current(source)? {
        for number in 0..old.firsts.len() {
            kv::remove(&chunk_key(source, old.generation, number))?;
        }
    }
    kv::remove(&current_key(source))?;
    kv::remove(&format!("list/{source}/status"))?;
    kv::remove(&format!("source/{source}"))?;
    Ok(())
}

/// Remembers that there are keys of this address, for [`forget_one_other`].
pub(crate) fn remember(url: &str) -> Result<(), Failure> {
    kv::put(&format!("source/{}", source(url)), url.as_bytes())?;
    Ok(())
}

/// Whether a list of that address is there.
pub(crate) fn is_there(url: &str) -> Result<bool, Failure> {
    Ok(kv::get(&current_key(&source(url)))?.is_some())
}

/// The key under which a refresh keeps its notes about an address.
pub(crate) fn status_key(url: &str) -> String {
    format!("list/{}/status", source(url))
}

fn current(source: &str) -> Result<Option<Current>, Failure> {
    let Some(value) = kv::get(&current_key(source))? else {
        return Ok(None);
    };
    let text = String::from_utf8(value).map_err(|error| Failure::invalid(error.to_string()))?;
    let mut lines = text.lines();
    let generation = lines.next().and_then(|digits| digits.parse().ok());
    let generation = generation.ok_or_else(|| Failure::invalid("`current` has no generation"))?;
    let firsts = lines.map(str::to_owned).collect();
    Ok(Some(Current { generation, firsts }))
}

/// Sorted serial numbers, one a line, cut into chunks.
fn chunks(serial_numbers: &BTreeSet<String>) -> Vec<String> {
    let mut chunks: Vec<String> = Vec::new();
    for serial_number in serial_numbers {
        match chunks.last_mut() {
            Some(last) if last.len() + 1 + serial_number.len() <= CHUNK => {
                last.push('\n');
                last.push_str(serial_number);
            }
            _ => chunks.push(serial_number.clone()),
        }
    }
    chunks
}

/// A binary search by bytes: each step looks at the line around the middle.
fn chunk_contains(chunk: &[u8], wanted: &[u8]) -> bool {
    let mut rest = chunk;
    while !rest.is_empty() {
        let middle = rest.len() / 2;
        let before = rest.get(..middle).unwrap_or_default();
        let begin = before.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let (smaller, line_on) = rest.split_at(begin);
        let length = line_on.iter().position(|&byte| byte == b'\n').unwrap_or(line_on.len());
        let (line, greater) = line_on.split_at(length);
        match line.cmp(wanted) {
            std::cmp::Ordering::Equal => return true,
            std::cmp::Ordering::Less => rest = greater.get(1..).unwrap_or_default(),
            std::cmp::Ordering::Greater => rest = smaller.get(..begin.saturating_sub(1)).unwrap_or_default(),
        }
    }
    false
}

/// FNV-1a of the address, in hexadecimal digits: addresses are the operator's own, so nobody makes them collide.
fn source(url: &str) -> String {
    let hash = url.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    format!("{hash:016x}")
}

fn current_key(source: &str) -> String {
    format!("list/{source}/current")
}

fn chunk_key(source: &str, generation: u64, number: usize) -> String {
    format!("list/{source}/{generation}/{number}")
}

#[cfg(test)]
mod tests {
    use super::{CHUNK, check_size, chunk_contains, chunks, contains, forget_one_other, remember, replace};
    use std::collections::BTreeSet;
    use wasmdm_plugin::mock;

    const URL: &str = "https://lists.example";

    fn serial(number: u32) -> String {
        format!("C{number:011}")
    }

    fn list(numbers: impl Iterator<Item = u32>) -> BTreeSet<String> {
        numbers.map(serial).collect()
    }

    #[test]
    fn a_lookup_among_100_000_makes_two_host_calls_and_reads_one_chunk() {
        let host = mock::Host::new();
        host.call(|| replace(URL, &list((0..200_000).step_by(2)))).unwrap();
        assert!(host.pairs().values().all(|value| value.len() <= CHUNK));
        for number in (0..200_002).step_by(1_237).chain([0, 1, 199_998, 199_999]) {
            let found = host.call(|| contains(URL, &serial(number))).unwrap();
            assert_eq!(found, Some(number % 2 == 0 && number < 200_000), "{number}");
            assert_eq!(host.host_calls(), 2);
        }
        assert_eq!(host.call(|| contains(URL, "A")).unwrap(), Some(false));
    }

    #[test]
    fn replacing_removes_the_old_chunks() {
        let host = mock::Host::new();
        host.call(|| replace(URL, &list(0..100_000))).unwrap();
        let before = host.pairs().len();
        host.call(|| replace(URL, &list(100_000..200_000))).unwrap();
        assert_eq!(host.pairs().len(), before);
        assert_eq!(contains(URL, &serial(99_999)).unwrap(), Some(false));
        assert_eq!(contains(URL, &serial(100_000)).unwrap(), Some(true));
        host.call(|| replace(URL, &list(7..8))).unwrap();
        assert_eq!(host.pairs().len(), 2);
        assert_eq!(contains(URL, &serial(7)).unwrap(), Some(true));
    }

    #[test]
    fn a_list_that_is_too_long_is_refused() {
        assert!(check_size(&list(0..140_000)).is_ok());
        assert_eq!(check_size(&list(0..200_000)).unwrap_err().code, "quota");
    }

    #[test]
    fn former_addresses_are_forgotten_with_all_their_keys() {
        let host = mock::Host::new();
        for url in [URL, "https://former.example"] {
            replace(url, &list(0..10_000)).unwrap();
            remember(url).unwrap();
        }
        let both = host.pairs().len();
        host.call(|| forget_one_other(&[URL.to_owned()])).unwrap();
        assert_eq!(host.pairs().len(), both / 2);
        assert_eq!(contains(URL, &serial(1)).unwrap(), Some(true));
        host.call(|| forget_one_other(&[URL.to_owned()])).unwrap();
        assert_eq!(host.pairs().len(), both / 2);
    }

    #[test]
    fn the_search_in_a_chunk_agrees_with_a_plain_one() {
        let words: BTreeSet<String> = ["A", "AB", "ABC", "B", "BA", "C"].map(str::to_owned).into();
        for skip in 0..words.len() {
            let some: BTreeSet<String> = words.iter().skip(skip).cloned().collect();
            let chunk = chunks(&some).concat();
            for word in words.iter().map(String::as_str).chain(["", "0", "AA", "ABCD", "Z"]) {
                assert_eq!(chunk_contains(chunk.as_bytes(), word.as_bytes()), some.contains(word), "{word} in {chunk}");
            }
        }
        assert!(!chunk_contains(b"", b"A"));
    }
}
