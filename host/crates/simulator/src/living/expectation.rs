//! What one channel must see of its queue: every command that was confirmed as queued, in order, until its result is confirmed, and never
//! again afterwards.
//!
//! Where an answer was lost the channel cannot know what the server has sent with it; then less is certain, and only what is certain
//! must be seen.

use std::collections::BTreeMap;

/// Where a command stands on the server, as far as the channel can know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Queued,
    /// It came, and was not answered.
    Sent,
    /// It was answered `NotNow` in this session.
    Deferred,
    /// Its final report was sent, and whether it arrived is not known.
    Reported,
}

#[derive(Debug, Clone)]
struct Expected {
    uuid: String,
    /// The order of queueing.
    number: u64,
    /// The API has confirmed it.
    confirmed: bool,
    stage: Stage,
    /// It stands at [`Stage::Queued`], but a lost answer may have brought it.
    maybe_sent: bool,
}

/// What a request asks of the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    /// An Idle poll: deferred commands come again, and first of all one that was sent and not answered.
    Idle,
    /// A report for the first time: nothing comes again.
    Report,
    /// A report that the server has confirmed before: what the lost answer brought comes again.
    RepeatedReport,
    /// A report that the server may have had before.
    MaybeRepeatedReport,
}

impl Asked {
    /// Whether the server offers again what was sent and not answered.
    const fn may_offer_again(self) -> bool {
        !matches!(self, Self::Report)
    }

    const fn offers_again(self) -> bool {
        matches!(self, Self::Idle | Self::RepeatedReport)
    }
}

/// One request, as of the moment when it was sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Question {
    asked: Asked,
    /// Commands up to this number were confirmed as queued before.
    confirmed: u64,
    /// Whether it is certain that the server has no other request of this channel.
    alone: bool,
}

impl Question {
    /// The same request, which was sent more than once before it was answered.
    pub(super) const fn sent_again(mut self) -> Self {
        if matches!(self.asked, Asked::Report) {
            self.asked = Asked::MaybeRepeatedReport;
        }
        self
    }
}

/// How a command was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answered {
    NotNow,
    Final,
}

/// The queue of one channel, seen from the device.
#[derive(Debug, Default)]
pub(super) struct Expectation {
    /// Those without a confirmed result, in the order of queueing.
    open: Vec<Expected>,
    /// Those with one, with the status; also of commands that somebody else queued.
    finished: BTreeMap<String, String>,
    /// Those that were cancelled, with the reason.
    cancelled: BTreeMap<String, &'static str>,
    last_number: u64,
    /// Whether the server knows the channel.
    pub(super) is_known: bool,
    /// Whether the server must call the channel enrolled.
    pub(super) is_enrolled: bool,
}

impl Expectation {
    /// A command is about to be given to the API.
    pub(super) fn queueing(&mut self, uuid: &str) {
        self.last_number += 1;
        self.open.push(Expected { uuid: uuid.into(), number: self.last_number, confirmed: false, stage: Stage::Queued, maybe_sent: false });
    }

    /// The API has taken it.
    pub(super) fn queued(&mut self, uuid: &str) {
        if let Some(expected) = self.open.iter_mut().find(|expected| expected.uuid == uuid) {
            expected.confirmed = true;
        }
    }

    /// The API has refused it.
    pub(super) fn not_queued(&mut self, uuid: &str) {
        self.open.retain(|expected| expected.uuid != uuid);
    }

    /// What waits is cancelled: the enrollment has begun anew, or the device was wiped.
    pub(super) fn cancel_all(&mut self, why: &'static str) {
        for expected in self.open.drain(..) {
            self.cancelled.insert(expected.uuid, why);
        }
    }

    /// A request is about to be sent.
    pub(super) fn ask(&mut self, asked: Asked, alone: bool) -> Question {
        if asked == Asked::Idle {
            for expected in self.open.iter_mut().filter(|expected| expected.stage == Stage::Deferred) {
                expected.stage = Stage::Queued;
            }
        }
        // Confirmations come in the order of queueing.
        let confirmed = self.open.iter().filter(|expected| expected.confirmed).map(|expected| expected.number).max().unwrap_or_default();
        Question { asked, confirmed, alone }
    }

    /// The answer to a request was lost, and with it maybe a command.
    pub(super) fn lost(&mut self) {
        for expected in self.open.iter_mut().filter(|expected| expected.stage == Stage::Queued) {
            expected.maybe_sent = true;
        }
    }

    /// How the channel has answered a command. `confirmed`: the server has said 200 to it.
    pub(super) fn reported(&mut self, uuid: &str, answered: Answered, status: &str, confirmed: bool) {
        if answered == Answered::Final && confirmed {
            self.finished.entry(uuid.into()).or_insert_with(|| status.into());
            self.open.retain(|expected| expected.uuid != uuid);
            return;
        }
        let Some(expected) = self.open.iter_mut().find(|expected| expected.uuid == uuid) else {
            return;
        };
        match (answered, confirmed) {
            (Answered::NotNow, true) => expected.stage = Stage::Deferred,
            // Whether it stands at `sent` or at `not-now`, the next Idle brings it.
            (Answered::NotNow, false) => {
                expected.stage = Stage::Queued;
                expected.maybe_sent = true;
            }
            (Answered::Final, _) => expected.stage = Stage::Reported,
        }
    }

    /// A request was answered, with this command or with none. Answers what is wrong with that. `is_ours` tells the commands that were
    /// queued through the API from those of the server's plugins.
    pub(super) fn answered(&mut self, question: Question, delivered: Option<&str>, is_ours: impl Fn(&str) -> bool) -> Option<String> {
        match delivered {
            Some(uuid) => {
                let problem = self.problem_with(question, uuid, is_ours);
                if let Some(expected) = self.open.iter_mut().find(|expected| expected.uuid == uuid) {
                    expected.stage = Stage::Sent;
                    expected.maybe_sent = false;
                }
                problem
            }
            None if self.is_enrolled && question.alone => {
                let missing = self.open.iter().find(|expected| {
                    is_due(expected, question)
                        && match expected.stage {
                            Stage::Queued => question.asked.offers_again() || !expected.maybe_sent,
                            Stage::Sent => question.asked.offers_again(),
                            Stage::Deferred | Stage::Reported => false,
                        }
                })?;
                Some(format!("{} waits, but the answer to {:?} was empty", missing.uuid, question.asked))
            }
            None => None,
        }
    }

    fn problem_with(&self, question: Question, uuid: &str, is_ours: impl Fn(&str) -> bool) -> Option<String> {
        if !self.is_enrolled {
            return Some(format!("{uuid} came although the channel is not enrolled"));
        }
        if let Some(status) = self.finished.get(uuid) {
            return Some(format!("{uuid} came again after its result {status} was confirmed"));
        }
        if let Some(why) = self.cancelled.get(uuid) {
            return Some(format!("{uuid} came although it was cancelled: {why}"));
        }
        let Some(come) = self.open.iter().find(|expected| expected.uuid == uuid) else {
            return is_ours(uuid).then(|| format!("{uuid} came, which was queued for another enrollment"));
        };
        if !question.alone {
            return None;
        }
        if come.stage == Stage::Deferred {
            return Some(format!("{uuid} came again in the session in which it was deferred"));
        }
        let may_be_sent = come.maybe_sent || come.stage != Stage::Queued;
        if may_be_sent && !question.asked.may_offer_again() {
            // Only a queued one comes after a first report.
            return (!come.maybe_sent).then(|| format!("{uuid} came again before the next Idle"));
        }
        let overtaken = self.open.iter().filter(|other| is_due(other, question) && other.uuid != uuid).find(|other| {
            let is_before = other.number < come.number;
            match other.stage {
                // Those that were sent go first.
                Stage::Sent => question.asked.offers_again() && (is_before || !may_be_sent),
                Stage::Queued => is_before && !may_be_sent && (!other.maybe_sent || question.asked.offers_again()),
                Stage::Deferred | Stage::Reported => false,
            }
        })?;
        Some(format!("{uuid} came before {}, whose turn it was", overtaken.uuid))
    }

    /// How many confirmed commands still want to be answered.
    pub(super) fn waiting(&self) -> usize {
        self.open.iter().filter(|expected| expected.confirmed && expected.stage != Stage::Reported).count()
    }
}

/// Whether the server certainly knew of it when it was asked.
fn is_due(expected: &Expected, question: Question) -> bool {
    expected.confirmed && expected.number <= question.confirmed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(uuids: &[&str]) -> Expectation {
        let mut queue = Expectation { is_enrolled: true, ..Expectation::default() };
        for uuid in uuids {
            queue.queueing(uuid);
            queue.queued(uuid);
        }
        queue
    }

    fn asks(queue: &mut Expectation, asked: Asked, delivered: Option<&str>) -> Option<String> {
        let question = queue.ask(asked, true);
        queue.answered(question, delivered, |_| true)
    }

    #[test]
    fn a_queue_that_is_worked_off_in_order_is_no_problem() {
        let mut queue = queue(&["A", "B"]);
        assert_eq!(asks(&mut queue, Asked::Idle, Some("A")), None);
        queue.reported("A", Answered::NotNow, "NotNow", true);
        assert_eq!(asks(&mut queue, Asked::Report, Some("B")), None);
        queue.reported("B", Answered::Final, "Error", true);
        assert_eq!(asks(&mut queue, Asked::Report, None), None);
        assert_eq!(asks(&mut queue, Asked::Idle, Some("A")), None);
        queue.reported("A", Answered::Final, "Acknowledged", true);
        assert_eq!(asks(&mut queue, Asked::Report, None), None);
        assert_eq!((queue.waiting(), queue.finished.len()), (0, 2));
    }

    #[test]
    fn what_must_not_come_is_a_problem() {
        for (delivered, words) in [
            (Some("B"), "came before A"),
            (None, "A waits"),
            (Some("DONE"), "after its result Acknowledged"),
            (Some("GONE"), "cancelled: wiped"),
            (Some("OTHER"), "another enrollment"),
        ] {
            let mut queue = queue(&["GONE"]);
            queue.cancel_all("wiped");
            for uuid in ["DONE", "A", "B"] {
                queue.queueing(uuid);
                queue.queued(uuid);
            }
            queue.reported("DONE", Answered::Final, "Acknowledged", true);
            let problem = asks(&mut queue, Asked::Idle, delivered).unwrap();
            assert!(problem.contains(words), "{problem}");
        }
        let mut left = queue(&["A"]);
        left.is_enrolled = false;
        assert!(asks(&mut left, Asked::Idle, Some("A")).unwrap().contains("not enrolled"));
        assert_eq!(asks(&mut left, Asked::Idle, None), None);
    }

    #[test]
    fn a_deferred_command_must_wait_for_the_next_idle_and_then_come() {
        let mut queue = queue(&["A"]);
        asks(&mut queue, Asked::Idle, Some("A"));
        queue.reported("A", Answered::NotNow, "NotNow", true);
        assert!(asks(&mut queue, Asked::Report, Some("A")).unwrap().contains("deferred"));
        queue.reported("A", Answered::NotNow, "NotNow", true);
        assert!(asks(&mut queue, Asked::Idle, None).unwrap().contains("A waits"));
    }

    #[test]
    fn an_unanswered_command_comes_first_at_the_next_idle_and_not_before() {
        let mut queue = queue(&["A", "B", "C"]);
        asks(&mut queue, Asked::Idle, Some("A"));
        queue.reported("A", Answered::Final, "Acknowledged", true);
        asks(&mut queue, Asked::Report, Some("B"));
        assert!(asks(&mut queue, Asked::Idle, Some("C")).unwrap().contains("before B"));
        let mut queue = self::queue(&["A", "B"]);
        asks(&mut queue, Asked::Idle, Some("A"));
        assert!(asks(&mut queue, Asked::Report, Some("A")).unwrap().contains("before the next Idle"));
    }

    #[test]
    fn after_a_lost_answer_what_it_may_have_brought_may_come_later_but_must_come() {
        let mut queue = queue(&["A", "B"]);
        queue.ask(Asked::Idle, true);
        queue.lost();
        // The lost answer brought A; the report of something else says nothing of it.
        assert_eq!(asks(&mut queue, Asked::Report, Some("B")), None);
        queue.reported("B", Answered::Final, "Acknowledged", true);
        assert_eq!(asks(&mut queue, Asked::Report, None), None);
        assert!(asks(&mut queue, Asked::Idle, None).unwrap().contains("A waits"));
        // A final report whose answer was lost need not bring the command again.
        let mut queue = self::queue(&["A"]);
        asks(&mut queue, Asked::Idle, Some("A"));
        queue.reported("A", Answered::Final, "Acknowledged", false);
        assert_eq!(asks(&mut queue, Asked::Idle, None), None);
        assert_eq!(queue.waiting(), 0);
    }

    #[test]
    fn what_was_queued_while_the_request_was_on_its_way_may_come_or_not() {
        for delivered in [None, Some("A")] {
            let mut queue = queue(&[]);
            let question = queue.ask(Asked::Idle, true);
            queue.queueing("A");
            queue.queued("A");
            assert_eq!(queue.answered(question, delivered, |_| true), None);
        }
    }

    #[test]
    fn a_plugins_command_comes_when_it_likes_but_not_after_its_result() {
        let mut queue = queue(&["A"]);
        let question = queue.ask(Asked::Idle, true);
        assert_eq!(queue.answered(question, Some("PLUGIN"), |_| false), None);
        queue.reported("PLUGIN", Answered::Final, "Acknowledged", true);
        let question = queue.ask(Asked::Report, true);
        assert!(queue.answered(question, Some("PLUGIN"), |_| false).unwrap().contains("after its result"));
    }
}
