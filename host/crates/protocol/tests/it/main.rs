//! The protocol as its callers see it: bytes in, values or refusals out.

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
