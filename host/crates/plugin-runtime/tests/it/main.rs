//! The runtime from outside.

mod calls;
mod egress;
mod loading;
