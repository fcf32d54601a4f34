//! An answer that one owner gives, or nobody.

/// What came of asking the owner of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OwnedAnswer<T> {
    /// Nobody has it.
    Nobody,
    /// Somebody has it and could not answer, or must be there and is not.
    Failed {
        /// For the log.
        reason: String,
    },
    /// What the owner says. What it wrote with its answer is stored.
    Given(T),
}
