//! Apple's MDM messages as plain values: what arrives is parsed once, here, into types that cannot be wrong.
//!
//! Nothing in this crate does I/O, reads a clock or knows a database. Start at [`checkin::CheckInMessage`] and [`report::Report`]
//! for what devices send, at [`mdm_signature::verify`] for who sent it.

mod ber;
pub mod certificate;
pub mod checkin;
pub mod command;
pub mod declarative_management;
pub mod enrollment;
mod fields;
pub mod json;
pub mod mdm_signature;
pub mod percent;
pub mod plist;
pub mod relative_path;
pub mod report;
mod signature;
pub mod time;
