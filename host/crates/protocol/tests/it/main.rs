//! The protocol as its callers see it: bytes in, values or refusals out.

#![cfg(test)]
#![expect(clippy::cast_possible_truncation, reason = "the documents that tests put together are short")]

mod certificates;
mod checkins;
mod commands;
mod enrollments;
mod hostile;
mod json;
mod plists;
mod reports;
mod signatures;
mod signer;
mod vectors;
