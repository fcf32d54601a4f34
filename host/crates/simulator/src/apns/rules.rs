//! What goes wrong, for whom, and how often.

use std::time::Duration;

/// What happens to pushes that fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    token: Option<Vec<u8>>,
    topic: Option<String>,
    every: u64,
    times: Option<u64>,
    effect: Effect,
}

/// What happens to a push.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// It is answered so, and not delivered.
    Answer(Answer),
    /// Its answer takes longer, by this.
    Delay(Duration),
    /// It is delivered and never answered.
    Silence,
    /// Its stream is refused: it was not processed.
    RefuseStream,
    /// It is delivered and answered, and the connection gets a GOAWAY that names the last stream that arrived. What the client had sent
    /// after that is not processed.
    GoAway,
    /// The connection gets a GOAWAY with this reason that names no stream at all: nothing on it was processed, and it is closed.
    Dismiss(String),
    /// It is delivered, and its connection is cut without a further word, also to others.
    Cut,
}

/// An answer that is no success.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Apple's code; an empty body if there is none.
    pub reason: Option<String>,
    /// Milliseconds since 1970, with 410.
    pub timestamp: Option<i64>,
    /// `Retry-After`.
    pub retry_after: Option<u64>,
}

impl Answer {
    /// Status and code.
    pub fn new(status: u16, reason: &str) -> Self {
        Self { status, reason: Some(reason.into()), timestamp: None, retry_after: None }
    }

    /// The device left at this time.
    pub fn unregistered(at: i64) -> Self {
        Self { timestamp: Some(at), ..Self::new(410, "Unregistered") }
    }

    /// The same, with `Retry-After` in seconds.
    #[must_use]
    pub const fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    pub(super) fn body(&self) -> Vec<u8> {
        let Some(reason) = &self.reason else {
            return Vec::new();
        };
        let mut body = serde_json::json!({ "reason": reason });
        if let (Some(at), Some(object)) = (self.timestamp, body.as_object_mut()) {
            object.insert("timestamp".into(), at.into());
        }
        body.to_string().into_bytes()
    }
}

impl Rule {
    /// For each push.
    pub const fn always(effect: Effect) -> Self {
        Self { token: None, topic: None, every: 1, times: None, effect }
    }

    /// For each push to this token.
    pub fn for_token(token: &[u8], effect: Effect) -> Self {
        Self { token: Some(token.to_vec()), ..Self::always(effect) }
    }

    /// For each push of this topic.
    pub fn for_topic(topic: &str, effect: Effect) -> Self {
        Self { topic: Some(topic.to_owned()), ..Self::always(effect) }
    }

    /// Of those that fit, only every so many-th.
    #[must_use]
    pub const fn every(mut self, count: u64) -> Self {
        self.every = if count == 0 { 1 } else { count };
        self
    }

    /// Only so often; then the rule is as if it were not there.
    #[must_use]
    pub const fn times(mut self, times: u64) -> Self {
        self.times = Some(times);
        self
    }
}

/// The rules in force, and how often each has fitted.
#[derive(Debug, Default)]
pub(super) struct Rules {
    rules: Vec<(Rule, u64, u64)>,
}

impl Rules {
    pub(super) fn push(&mut self, rule: Rule) {
        self.rules.push((rule, 0, 0));
    }

    pub(super) fn clear(&mut self) {
        self.rules.clear();
    }

    /// What happens to this push.
    pub(super) fn apply(&mut self, token: &[u8], topic: &str) -> Option<Effect> {
        for (rule, fitted, applied) in &mut self.rules {
            let fits = rule.token.as_deref().is_none_or(|one| one == token) && rule.topic.as_deref().is_none_or(|one| one == topic);
            if !fits || rule.times.is_some_and(|times| *applied >= times) {
                continue;
            }
            *fitted += 1;
            if fitted.is_multiple_of(rule.every) {
                *applied += 1;
                return Some(rule.effect.clone());
            }
        }
        None
    }
}
