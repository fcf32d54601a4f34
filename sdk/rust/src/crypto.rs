//! Random bytes from the host. Always granted.

use crate::{Failure, host};

/// So many random bytes, at most 4,096, fit for keys.
pub fn random(length: u32) -> Result<Vec<u8>, Failure> {
    host::crypto::random(length)
}
