//! How a device answers commands.

use std::collections::BTreeMap;

use crate::authority::derive;

/// What a device does with a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Answering {
    /// It does it, and says so.
    #[default]
    Acknowledge,
    /// It tries and fails: `Error` with an error chain.
    Error,
    /// It does not understand it.
    CommandFormatError,
    /// It asks to be asked later, so many times; then it acknowledges.
    NotNow {
        /// How often.
        times: u32,
    },
    /// It never answers: the session ends as if the device had gone.
    Never,
}

/// A plan for all commands of one device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Behaviour {
    /// What is done with a command that nothing below is about.
    pub otherwise: Answering,
    /// Plans by `RequestType`.
    pub by_request_type: BTreeMap<String, Answering>,
    /// How often the first command since enrolling is answered `NotNow`.
    pub not_now_first: u32,
    /// How many of a hundred commands fail; which ones follows from the seed and the command's UUID.
    pub error_percent: u8,
    /// What chooses the failing ones.
    pub seed: u64,
}

impl Behaviour {
    /// Acknowledges everything.
    pub fn acknowledging() -> Self {
        Self::default()
    }

    /// The same plan, with another answer to one type of command.
    #[must_use]
    pub fn with(mut self, request_type: &str, answering: Answering) -> Self {
        self.by_request_type.insert(request_type.into(), answering);
        self
    }

    /// What is done with this command. `is_first` says that no other came before it since enrolling.
    pub fn plan(&self, request_type: &str, command_uuid: &str, is_first: bool) -> Answering {
        if let Some(planned) = self.by_request_type.get(request_type) {
            return *planned;
        }
        if is_first && self.not_now_first > 0 {
            return Answering::NotNow { times: self.not_now_first };
        }
        if self.error_percent > 0 {
            let [first, second, ..] = derive(self.seed, command_uuid, 0);
            if u16::from_be_bytes([first, second]) % 100 < u16::from(self.error_percent) {
                return Answering::Error;
            }
        }
        self.otherwise
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_for_a_type_goes_before_everything_else() {
        let behaviour = Behaviour { not_now_first: 2, error_percent: 100, ..Behaviour::default() }.with("ProfileList", Answering::CommandFormatError);
        assert_eq!(behaviour.plan("ProfileList", "a", true), Answering::CommandFormatError);
        assert_eq!(behaviour.plan("SecurityInfo", "a", true), Answering::NotNow { times: 2 });
        assert_eq!(behaviour.plan("SecurityInfo", "a", false), Answering::Error);
    }

    #[test]
    fn the_share_of_errors_is_about_what_was_asked_for_and_repeats() {
        let behaviour = Behaviour { error_percent: 10, seed: 7, ..Behaviour::default() };
        let failing = |behaviour: &Behaviour| (0..2000).filter(|n| behaviour.plan("SecurityInfo", &n.to_string(), false) == Answering::Error).count();
        let count = failing(&behaviour);
        assert!((140..=260).contains(&count), "{count} of 2000");
        assert_eq!(failing(&behaviour), count);
    }
}
