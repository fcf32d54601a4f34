//! Calls of plugins, good and hostile ones.

#![cfg(test)]

mod answers;
mod capabilities;
mod events;
mod hostile;
mod linking;
mod policy;
mod setup;
