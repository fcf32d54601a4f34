//! The service over a real database, without HTTP and without WebAssembly.

#![cfg(test)]

mod answers;
mod enrollment_policy;
mod outbox;
mod stage;
