//! What each subcommand does.

pub mod db;
pub mod demo;
pub mod plugin;
pub mod push_certificate;
pub mod serve;
pub mod simulate;
