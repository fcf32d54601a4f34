//! Where host calls go: to the server from a component, to the mock from a native test.

#[cfg(target_family = "wasm")]
pub(crate) use crate::bindings::capabilities::wasmdm::plugin::{commands, config, crypto, enrollments, http, kv, log, plist, push, runtime, timers};
#[cfg(not(target_family = "wasm"))]
pub(crate) use crate::mock::imports::{commands, config, crypto, enrollments, http, kv, log, plist, push, runtime, timers};

pub(crate) use crate::bindings::capabilities::wasmdm::plugin as types;
