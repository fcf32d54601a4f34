//! Waking devices, whether or not commands wait for them. Needs the grant `push`.
//!
//! A command that is queued with `push` wakes its device by itself.
//!
//! ```
//! # use wasmdm_plugin::{mock, push, Failure};
//! # use serde_json::json;
//! # fn main() -> Result<(), Failure> {
//! let host = mock::Host::new();
//! host.add_enrollment(mock::enrollment("UDID-1", json!({})));
//! push::notify(&["UDID-1"])?;
//! assert_eq!(host.woken(), ["UDID-1"]);
//! # Ok(())
//! # }
//! ```

use crate::{Failure, host};

/// Wakes them after the call's end. An unknown one is a failure, and then nobody is woken.
pub fn notify(targets: &[&str]) -> Result<(), Failure> {
    let targets: Vec<String> = targets.iter().map(|&target| target.to_owned()).collect();
    host::push::notify(&targets)
}
