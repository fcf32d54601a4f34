//! Fuzz targets: each takes any bytes, hands them to a parser of devices' input, and holds what comes out against what must always be true.
//!
//! A target panics on a find. `host/ci/fuzz` runs them all for a while with coverage as their guide; `cargo test -p wasmdm-fuzz` runs them
//! over the corpus and over a fixed number of changed inputs; `wasmdm-fuzz repeat` runs one over one file. Start at [`Target`].

#![expect(clippy::panic, reason = "a panic is how a target says that it found something")]

mod certificate;
mod check_in;
#[cfg(feature = "corpus")]
pub mod corpus;
pub mod cost;
mod json;
pub mod mutation;
mod property_list;
mod report;
mod signature;
mod values;

use std::path::{Path, PathBuf};

/// One parser, and what must be true of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Property lists, XML and binary, their other forms, and command documents.
    PropertyList,
    /// Property lists as JSON, and status reports of declarative management.
    Json,
    /// `Mdm-Signature`: CMS and body, with [`signature::SEPARATOR`] between them.
    Signature,
    /// A certificate as a proxy's header or in DER.
    Certificate,
    /// Check-ins, and endpoints of declarative management.
    CheckIn,
    /// Command reports, and what can be salvaged of malformed ones.
    Report,
}

impl Target {
    /// All targets.
    pub const ALL: [Self; 6] = [Self::PropertyList, Self::Json, Self::Signature, Self::Certificate, Self::CheckIn, Self::Report];

    /// Its name on the command line, which is also its folder in the corpus.
    pub const fn name(self) -> &'static str {
        match self {
            Self::PropertyList => "property-list",
            Self::Json => "json",
            Self::Signature => "signature",
            Self::Certificate => "certificate",
            Self::CheckIn => "check-in",
            Self::Report => "report",
        }
    }

    /// The target of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|target| target.name() == name)
    }

    /// Runs it; panics on a find. The answer says in a few words what became of the input, for instance the kind of its error.
    pub fn check(self, input: &[u8]) -> String {
        match self {
            Self::PropertyList => property_list::check(input),
            Self::Json => json::check(input),
            Self::Signature => signature::check(input),
            Self::Certificate => certificate::check(input),
            Self::CheckIn => check_in::check(input),
            Self::Report => report::check(input),
        }
    }
}

/// Where the committed corpus of a target lies.
pub fn corpus_folder(target: Target) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name())
}

/// An error's text without what differs between two errors of a kind: numbers, and what is quoted.
fn kind_of(error: &impl std::fmt::Display) -> String {
    let text = error.to_string();
    let kind: String = text.split('`').step_by(2).collect();
    assert!(text.len() < 2000, "an error of {} bytes is of no use to a reader", text.len());
    assert!(!text.chars().any(char::is_control), "an error's text goes into a log as a line: {text:?}");
    kind.chars().filter(|character| !character.is_ascii_digit()).take(120).collect()
}
