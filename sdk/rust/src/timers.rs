//! One-shot timers, which arrive at the hook `schedule`. Needs the grant `timers`.
//!
//! There is one timer per name and enrollment: setting it again moves it.
//!
//! ```
//! # use wasmdm_plugin::{mock, runtime, timers, Failure};
//! # fn main() -> Result<(), Failure> {
//! let host = mock::Host::new();
//! timers::set("remind", runtime::now() + 60_000, Some("UDID-1"), b"")?;
//! assert!(timers::cancel("remind", Some("UDID-1"))?);
//! # Ok(())
//! # }
//! ```

use crate::{Failure, Timestamp, host};

/// Sets a timer, with data that comes back when it fires.
pub fn set(name: &str, at: Timestamp, who: Option<&str>, data: &[u8]) -> Result<(), Failure> {
    host::timers::set(name, at, who, data)
}

/// Withdraws a timer. Whether there was one.
pub fn cancel(name: &str, who: Option<&str>) -> Result<bool, Failure> {
    host::timers::cancel(name, who)
}
