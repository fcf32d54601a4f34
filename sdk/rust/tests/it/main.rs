//! The SDK as a plugin author uses it.

mod capabilities;
mod contract;
