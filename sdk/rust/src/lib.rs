//! Write wasmdm plugins in Rust.
//!
//! A plugin is a WebAssembly component that exports some of the server's hooks. Implement the traits of the hooks that
//! you want and name them once in [`export!`]:
//!
//! ```
//! use wasmdm_plugin::{CallInfo, Decision, Enrollment, EnrollmentPolicy, Failure, Input};
//!
//! struct MacsOnly;
//!
//! impl EnrollmentPolicy for MacsOnly {
//!     fn decide(_: CallInfo, candidate: Enrollment, _: Input, _: bool) -> Result<Decision, Failure> {
//!         let model = candidate.read_facts()?.model.unwrap_or_default();
//!         Ok(if model.starts_with("Mac") { Decision::allow() } else { Decision::deny("only Macs enroll here") })
//!     }
//! }
//!
//! wasmdm_plugin::export!(MacsOnly: EnrollmentPolicy);
//! # fn main() {}
//! ```
//!
//! The manifest of such a crate says `crate-type = ["cdylib", "rlib"]`, and
//! `cargo build --release --target wasm32-wasip2` makes the component. Natively the crate is an ordinary library whose
//! host calls go to [`mock`], so that unit tests need neither a server nor WebAssembly.
//!
//! Every call runs in a fresh instance: what is to be remembered belongs in [`kv`]. Writes are buffered by the host,
//! visible to the call's own reads, and committed together with the decision or the event's acknowledgement; a hook that
//! returns a [`Failure`] leaves nothing behind.
//!
//! Start reading at [`export!`] and the traits beside it, then at the module of the capability that you need.

#![warn(missing_docs)]

#[doc(hidden)]
pub mod bindings;
mod decision;
mod document;
mod failure;
mod host;

pub mod commands;
pub mod config;
pub mod crypto;
pub mod enrollments;
pub mod hooks;
pub mod http;
pub mod kv;
pub mod log;
#[cfg(not(target_family = "wasm"))]
pub mod mock;
pub mod plist;
pub mod push;
pub mod return_to_service;
pub mod runtime;
pub mod timers;

pub use bindings::capabilities::wasmdm::plugin::types::{
    CallInfo, CommandBody, CommandOptions, CommandStatus, Decision, Enrollment, Event, Failure, Input, NewCommand,
};
pub use config::read as config;
pub use document::{CertificateFacts, CommandData, EventData, Facts};
pub use hooks::{EnrollmentPolicy, EventCommands, EventSink, Lifecycle, ReturnToService, Schedule, TokenSource, UserAuthentication};
pub use serde_json;

/// Milliseconds since the Unix epoch, UTC.
pub type Timestamp = u64;

/// The id of an enrollment: `DEVICE`, `DEVICE:USER` or `DEVICE:SHORTNAME`.
pub type EnrollmentId = String;
