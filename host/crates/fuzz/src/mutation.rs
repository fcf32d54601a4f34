//! Changes to inputs that keep enough of their form to get past the first check: elements of a signature, objects of a property list.
//!
//! Everything follows from the seed, so that a run can be repeated.

pub mod ber;
mod binary;
mod value;
mod xml;

use fastrand::Rng;

use crate::Target;
use crate::signature::SEPARATOR;

/// The input changed in one to four places. `other` is another input of the target's, from which parts may be taken.
pub fn mutate(target: Target, input: &[u8], other: &[u8], seed: u64) -> Vec<u8> {
    let mut random = Rng::with_seed(seed);
    let mut changed = input.to_vec();
    for _ in 0..=random.usize(..4) {
        changed = mutate_once(target, &changed, other, &mut random);
    }
    changed
}

fn mutate_once(target: Target, input: &[u8], other: &[u8], random: &mut Rng) -> Vec<u8> {
    if random.u8(..3) == 0 {
        return bytes(input, other, random);
    }
    match target {
        Target::PropertyList | Target::CheckIn | Target::Report if input.starts_with(b"bplist00") => match random.u8(..3) {
            0 => value::mutate(input, random).unwrap_or_else(|| bytes(input, other, random)),
            _ => binary::mutate(input, random).unwrap_or_else(|| bytes(input, other, random)),
        },
        Target::PropertyList | Target::CheckIn | Target::Report => match random.u8(..3) {
            0 => value::mutate(input, random).unwrap_or_else(|| xml::mutate(input, other, random)),
            _ => xml::mutate(input, other, random),
        },
        Target::Json => value::mutate_json(input, random).unwrap_or_else(|| bytes(input, other, random)),
        Target::Signature => {
            let at = input.windows(SEPARATOR.len()).rposition(|window| window == SEPARATOR).unwrap_or(input.len());
            let (cms, rest) = input.split_at(at);
            match ber::mutate(cms, other, random) {
                Some(changed) => [&changed, rest].concat(),
                None => bytes(input, other, random),
            }
        }
        Target::Certificate => ber::mutate(input, other, random).unwrap_or_else(|| bytes(input, other, random)),
    }
}

/// Bits flipped, bytes set, parts left out, doubled, moved, or taken from the other input.
fn bytes(input: &[u8], other: &[u8], random: &mut Rng) -> Vec<u8> {
    let mut changed = input.to_vec();
    let start = random.usize(..=input.len());
    let end = (start + random.usize(..=16)).min(input.len());
    let part = input.get(start..end).unwrap_or_default();
    let foreign = random.usize(..=other.len());
    let foreign = other.get(foreign..(foreign + random.usize(..=32)).min(other.len())).unwrap_or_default();
    match random.u8(..7) {
        0 => {
            if let Some(byte) = changed.get_mut(start) {
                *byte ^= 1 << random.u8(..8);
            }
        }
        1 => {
            if let Some(byte) = changed.get_mut(start) {
                *byte = random.choice([0, 1, 0x7f, 0x80, 0x81, 0x84, 0xff, b'<', b'>', b'&', b'"', b'%', b':']).unwrap_or_default();
            }
        }
        2 => {
            changed.drain(start..end);
        }
        3 => {
            changed.splice(start..start, part.iter().copied());
        }
        4 => {
            changed.splice(start..start, foreign.iter().copied());
        }
        5 => {
            changed.splice(start..end, foreign.iter().copied());
        }
        _ => changed.truncate(start),
    }
    changed
}
