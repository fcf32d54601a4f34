//! Simulated devices against a small server in this process.

mod devices;
mod fleet;
mod journal;
mod server;
mod signatures;
