//! The server and its command line.
//!
//! `wiring` puts the parts together, `http` shows every route on one page, `command_line` every subcommand. What a message means is in
//! `wasmdm-service`, what is stored in `wasmdm-storage`, how a plugin is called in `wasmdm-plugin-runtime`.

pub mod apns_proxy;
pub mod apple_push;
pub mod auth_proxy;
pub mod bundled;
pub mod clock;
pub mod command;
pub mod command_line;
pub mod config;
pub mod declarative_proxy;
pub mod dump;
pub mod escrow_key;
pub mod http;
pub mod logging;
pub mod nanomdm_arguments;
pub mod observability;
pub mod outward;
pub mod places;
pub mod push_certificate_expiry;
pub mod webhook;
pub mod wiring;

/// The version that the server reports.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
