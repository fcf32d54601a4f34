//! The whole server over real HTTP, with simulated devices and plugins built from source.

#![cfg(test)]

mod alternating_builds;
mod api;
mod declarative_management;
mod demo;
mod devices;
mod documents;
mod enrollment_baseline;
mod fleet;
mod hostile_input;
mod identities;
mod in_process;
mod kill;
mod misbehaving_plugins;
mod nanomdm;
mod plugins;
mod process;
mod quickstart;
mod readme;
mod schemas;
mod webhook;
