//! The client against the simulator's push service, and the certificates that an operator uploads.

#![cfg(test)]

mod certificates;
mod connections;
mod many_pushes;
mod proxies;
mod pushes;
mod relay;
mod service;
mod signing_requests;
