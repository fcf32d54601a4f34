//! The SDK as a plugin author uses it.

#[cfg(test)]
mod capabilities;
#[cfg(test)]
mod contract;
