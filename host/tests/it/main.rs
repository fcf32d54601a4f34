//! The whole server over real HTTP, with simulated devices and plugins built from source.

#![cfg(test)]

mod alternating_builds;
mod api;
mod auth_proxy;
mod canaries;
mod check_in_answers;
mod declarative_management;
mod demo;
mod devices;
mod documents;
mod dump;
mod enrollment_baseline;
mod escrow_key;
mod every_route;
mod fleet;
mod hostile_input;
mod identities;
mod in_process;
mod kill;
mod mass_push;
mod metrics;
mod migration;
mod misbehaving_plugins;
mod nanomdm;
mod nanomdm_scenes;
mod plugins;
mod process;
mod push;
mod push_certificates;
mod quickstart;
mod readme;
mod schemas;
mod webhook;
