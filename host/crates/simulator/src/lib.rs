//! Simulated Apple devices, as many as wanted, against any MDM server: enrolling, polling, answering commands, and measuring how the
//! server bears it.
//!
//! The devices speak only what real ones speak, so that the same run works against another product. They never look into the server.
//! Start at [`device::Device`] for one device, at [`fleet::Fleet`] for many that do the same, at [`living::LivingFleet`] for many
//! that live, at [`cli::simulate`] for the command.

pub mod api;
pub mod apns;
pub mod authority;
pub mod behaviour;
pub mod canary;
pub mod cli;
pub mod connection;
mod der;
pub mod device;
pub mod error;
pub mod fleet;
pub mod journal;
pub mod living;
pub mod measure;
pub mod message;
pub mod null_server;
pub mod report;
pub mod signer;

pub use api::ApiClient;
pub use apns::FakeApns;
pub use authority::{Authority, Identity, KeyType};
pub use behaviour::{Answering, Behaviour};
pub use connection::{Answer, Connection, Target};
pub use device::{Device, DeviceOptions, Product, Proof, Session};
pub use error::SimulatorError;
pub use fleet::{Fleet, FleetOptions};
pub use journal::{Journal, JournalWriter};
pub use living::{LifeEvent, LifeRates, LivingFleet, LivingOptions};
pub use message::Message;
pub use null_server::NullServer;
pub use report::{PhaseReport, Report};
pub use signer::SignatureForm;
