//! Push: tells Apple's push service to wake devices, and reads the certificates that this takes.
//!
//! [`Apns`] keeps connections open, sends, and says of each push what became of it; it knows neither enrollments nor the database, and
//! remembers nothing that a restart would have to. When to push whom, and what follows from an [`Outcome`], is its caller's.
//!
//! Start at [`Apns::push`], at [`Outcome`] for what the answers mean, at [`push_certificate`] for what an operator uploads.

mod client;
mod connection;
mod notification;
mod old_encryption;
mod outcome;
mod pool;
pub mod push_certificate;
mod reaching;
pub mod signing_request;

pub use client::{Apns, ApnsOptions, ClientCertificate, Endpoint, Jitter, Roots, SetUpError};
pub use notification::{Notification, Priority, Unsendable};
pub use outcome::{Failure, Fault, Outcome, Rejection, Retry};
pub use pool::TopicState;
pub use reaching::Proxy;
