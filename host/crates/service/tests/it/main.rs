//! The service over a real database, without HTTP and without WebAssembly.

#![cfg(test)]

mod enrollment_policy;
mod identities;
mod outbox;
mod stage;
mod waker;
