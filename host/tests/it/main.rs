//! The whole server over real HTTP, with simulated devices and plugins built from source.

mod api;
mod devices;
mod hostile_input;
mod nanomdm;
mod process;
