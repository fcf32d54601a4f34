//! Time as a parameter.

use futures_util::future::BoxFuture;
use wasmdm_protocol::time::Timestamp;

/// The wall clock of a server; tests move theirs by hand.
pub trait Clock: std::fmt::Debug + Send + Sync + 'static {
    /// The time now.
    fn now(&self) -> Timestamp;

    /// Returns once the clock shows `at` or later.
    fn sleep_until(&self, at: Timestamp) -> BoxFuture<'static, ()>;
}
