//! Failures: why a hook could not do its work, or a host call was refused.

use std::fmt;

use crate::Failure;

impl Failure {
    /// A failure of that code. The codes of the contract are `denied`, `quota`, `conflict`, `invalid`, `unavailable`,
    /// `deadline` and `not-found`; a plugin may have its own.
    ///
    /// ```
    /// use wasmdm_plugin::Failure;
    /// let failure = Failure::new("billing", "the customer has not paid").retryable();
    /// assert!(failure.retryable);
    /// ```
    pub fn new(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code: code.into(), message: message.into(), retryable: false, retry_after_ms: None, detail: None }
    }

    /// Something that was given is wrong and stays so: an event that fails this way becomes a dead letter at once.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new("invalid", message)
    }

    /// Something that is needed does not answer now; worth another attempt.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new("unavailable", message).retryable()
    }

    /// A value changed while it was worked on; worth another attempt.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new("conflict", message).retryable()
    }

    /// Nothing of that name is there.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new("not-found", message)
    }

    /// The same, to be tried again with the host's usual back-off.
    #[must_use]
    pub fn retryable(mut self) -> Self {
        self.retryable = true;
        self
    }

    /// The same, to be tried again no sooner than in so many milliseconds.
    #[must_use]
    pub fn retry_after_ms(mut self, milliseconds: u32) -> Self {
        self.retryable = true;
        self.retry_after_ms = Some(milliseconds);
        self
    }

    /// The same with words before its message, which say what was being done.
    ///
    /// ```
    /// use wasmdm_plugin::Failure;
    /// assert_eq!(Failure::unavailable("no route").context("fetching the list").message, "fetching the list: no route");
    /// ```
    #[must_use]
    pub fn context(mut self, doing: impl fmt::Display) -> Self {
        self.message = format!("{doing}: {}", self.message);
        self
    }
}

/// A document that is not what it should be: `invalid`.
impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        Self::invalid(error.to_string())
    }
}
