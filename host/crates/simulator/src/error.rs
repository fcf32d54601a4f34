//! What can go wrong on the side of the devices.

use std::path::PathBuf;
use std::time::Duration;

/// An error of the simulator. What a server answers is not one, except where a method says that it insists on 200.
#[derive(Debug, thiserror::Error)]
pub enum SimulatorError {
    /// A value that the caller gave.
    #[error("{name}: {problem}")]
    Argument {
        /// The option or parameter.
        name: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The request did not reach the server, or no whole answer came back.
    #[error("no answer from {server}: {problem}")]
    Transport {
        /// Host and port.
        server: String,
        /// The cause.
        problem: String,
    },
    /// No whole answer within the time.
    #[error("no answer from {server} within {limit:?}")]
    TimedOut {
        /// Host and port.
        server: String,
        /// How long was waited.
        limit: Duration,
    },
    /// An answer other than 200 where only 200 lets the device go on.
    #[error("{device}: {what} was answered {status}: {body}")]
    Refused {
        /// The enrollment.
        device: String,
        /// The message's type or status.
        what: String,
        /// HTTP status.
        status: u16,
        /// The beginning of the answer's body.
        body: String,
    },
    /// A 200 whose body a device could not use.
    #[error("{device}: the answer to {what} is unusable: {problem}")]
    Answer {
        /// The enrollment.
        device: String,
        /// The message's type or status.
        what: String,
        /// What is wrong with it.
        problem: String,
    },
    /// An answer other than 2xx that repeats a secret of a device.
    #[error("an answer {status} repeats a secret of a device {secret}")]
    Leak {
        /// HTTP status.
        status: u16,
        /// How it is written there.
        secret: String,
    },
    /// A key, certificate or signature could not be made.
    #[error("{what}: {problem}")]
    Cryptography {
        /// What was to be made.
        what: &'static str,
        /// The library's words.
        problem: String,
    },
    /// A property list could not be written.
    #[error("writing a property list: {0}")]
    Plist(String),
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A journal that does not say what a journal says.
    #[error("{path}: line {line}: {problem}")]
    Journal {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
}

impl SimulatorError {
    /// Whether a device may simply try again: nothing is known of what the server did.
    pub const fn is_transport(&self) -> bool {
        matches!(self, Self::Transport { .. } | Self::TimedOut { .. })
    }

    pub(crate) fn cryptography(what: &'static str, problem: impl std::fmt::Display) -> Self {
        Self::Cryptography { what, problem: problem.to_string() }
    }

    pub(crate) fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }
}
