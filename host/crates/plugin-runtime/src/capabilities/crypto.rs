//! `crypto`: random numbers. Some toolchains freeze their own generator into the component.

use aws_lc_rs::rand;

use crate::bindings::wasmdm::plugin::crypto::Host;
use crate::call::State;
use crate::capabilities::{Denied, failure, invalid};

const MAX_RANDOM: u32 = 4_096;

impl Host for State {
    async fn random(&mut self, length: u32) -> wasmtime::Result<Result<Vec<u8>, Denied>> {
        self.enter()?;
        if length > MAX_RANDOM {
            return Ok(Err(invalid(format!("length: at most {MAX_RANDOM} bytes at once"))));
        }
        let mut bytes = vec![0; usize::try_from(length)?];
        Ok(rand::fill(&mut bytes).map(|()| bytes).map_err(|_| failure("unavailable", "the system gives no random numbers")))
    }
}
