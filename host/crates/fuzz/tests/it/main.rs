//! The targets over the committed corpus and over changes of it: the same ones at every run.

#![cfg(test)]

mod corpus;
mod targets;
