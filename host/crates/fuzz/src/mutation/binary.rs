//! Binary property lists: the numbers by which objects and tables refer to each other.

use fastrand::Rng;

const TRAILER: usize = 32;

/// One change to one number; `None` where there is no trailer.
pub(super) fn mutate(input: &[u8], random: &mut Rng) -> Option<Vec<u8>> {
    let mut changed = input.to_vec();
    let trailer = changed.len().checked_sub(TRAILER).filter(|at| *at > 8)?;
    let table = usize::try_from(u64::from_be_bytes(*changed.get(trailer + 24..)?.first_chunk()?)).ok().filter(|table| *table < trailer);
    match random.u8(..7) {
        // Sizes, and the three numbers of the trailer.
        0 => *changed.get_mut(trailer + 6 + random.usize(..2))? = random.choice([0, 1, 2, 4, 8, 9, 255])?,
        1 => {
            let number: u64 = random.choice([0, 1, 2, 255, 256, 1 << 32, 1 << 62, u64::MAX])?;
            let at = trailer + 8 * random.usize(1..4);
            changed.get_mut(at..at + 8)?.copy_from_slice(&number.to_be_bytes());
        }
        // An entry of the table: another object's, or anything.
        2 => {
            let table = table?;
            let (from, to) = (random.usize(table..trailer), random.usize(table..trailer));
            let byte = *changed.get(from)?;
            *changed.get_mut(to)? = byte;
        }
        3 => *changed.get_mut(random.usize(table?..trailer))? = random.u8(..),
        // A marker or a reference.
        4 => {
            let markers = [0x00, 0x08, 0x09, 0x10, 0x13, 0x14, 0x22, 0x23, 0x33, 0x4f, 0x5f, 0x6f, 0x80, 0xa1, 0xaf, 0xd1, 0xdf];
            *changed.get_mut(random.usize(8..trailer))? = random.choice(markers)?;
        }
        5 => *changed.get_mut(random.usize(8..trailer))? = random.u8(..24),
        // A length in more bytes than it needs.
        _ => {
            let at = random.usize(8..trailer);
            let marker = changed.get(at)? | 0x0f;
            let power = random.u8(..5);
            *changed.get_mut(at)? = marker;
            *changed.get_mut(at + 1)? = 0x10 | power;
        }
    }
    Some(changed)
}
