//! Waking devices.

use futures_util::future::BoxFuture;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};

/// Whoever tells Apple's push service to wake devices.
pub trait Pusher: std::fmt::Debug + Send + Sync + 'static {
    /// Wakes each enrollment; answers one result per id, in order: the `apns-id`, or why it was not pushed.
    fn push<'a>(&'a self, tenant: &'a TenantId, ids: &'a [EnrollmentId]) -> BoxFuture<'a, Vec<Result<String, PushError>>>;
}

/// Why a device was not woken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PushError(pub String);
