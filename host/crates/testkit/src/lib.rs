//! What the tests of several crates share. Development only.

pub mod clock;
pub mod guests;
pub mod push;
pub mod seed;
