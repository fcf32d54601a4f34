//! Simulated devices against a small server in this process.

#![cfg(test)]

mod devices;
mod fleet;
mod journal;
mod living;
mod server;
mod signatures;
