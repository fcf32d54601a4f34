//! The whole server over real HTTP, with simulated devices and plugins built from source.

mod api;
mod demo;
mod devices;
mod enrollment_baseline;
mod hostile_input;
mod in_process;
mod kill;
mod nanomdm;
mod plugins;
mod process;
mod quickstart;
