//! Plugins: WebAssembly components, loaded from a directory and called in a sandbox. The only crate that names wasmtime.
//!
//! A call goes from [`enrollment_policy`], [`answers`] or [`events`], through the immutable snapshot in [`registry`], to a [`plugin::LinkedPlugin`], which
//! makes a fresh instance for it ([`call`]). What the guest may do is in [`effective`], and how it does it in `capabilities`. [`loading`]
//! turns files into linked plugins and swaps the registry. No plugin is ever trusted with anything.

pub mod answers;
pub mod call;
pub mod circuit_breaker;
pub mod effective;
pub mod egress;
pub mod engine;
pub mod enrollment_policy;
pub mod events;
pub mod hook;
pub mod loading;
pub mod plugin;
pub mod registry;
pub mod runtime;

mod audit_rates;
mod bindings;
mod call_metrics;
mod capabilities;
mod contract;
mod meter;
mod saturation;
