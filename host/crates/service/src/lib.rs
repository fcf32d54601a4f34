//! What each message of a device means. Knows neither HTTP nor WebAssembly: plugins and push stand behind traits.
//!
//! A message goes through the layers of [`Service`] from the outside in: [`certificate_binding::CertificateBinding`] asks whether the
//! certificate is the enrollment's, [`core::Core`] applies the rule of the message. Events leave by [`outbox::Outbox`].

pub mod certificate_binding;
pub mod clock;
pub mod core;
pub mod declarative_management;
pub mod enrollment_policy;
pub mod in_flight;
pub mod message;
pub mod outbox;
pub mod pusher;
pub mod reply;
pub mod subscriber;
pub mod waker;

use futures_util::future::BoxFuture;

use crate::message::{DeviceRequest, Message};
use crate::reply::{Refusal, Reply};

/// Answers one message of a device. Layers wrap it.
pub trait Service: std::fmt::Debug + Send + Sync + 'static {
    /// `request` says who sent it, by a certificate whose chain was verified.
    fn handle(&self, request: DeviceRequest, message: Message) -> BoxFuture<'_, Result<Reply, Refusal>>;
}
