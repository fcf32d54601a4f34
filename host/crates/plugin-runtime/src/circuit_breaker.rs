//! Stops asking a plugin that keeps failing, one breaker for each tenant and hook of a generation.
//!
//! A new generation begins with closed breakers: it is what an operator repairs a plugin with.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use parking_lot::Mutex;
use wasmdm_protocol::enrollment::{EnrollmentId, TenantId};
use wasmdm_protocol::time::Timestamp;

use crate::hook::Hook;

/// So many failures within [`WINDOW`] suspend it.
const FAILURES: usize = 5;
const WINDOW: Duration = Duration::from_secs(30);
/// Or more than a fifth of so many calls.
const CALLS: usize = 200;
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_mins(5);

/// The breakers of one generation of a plugin.
#[derive(Debug, Default)]
pub struct CircuitBreakers {
    breakers: Mutex<HashMap<(TenantId, Hook), Breaker>>,
}

/// How a call ended, as far as the breaker cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallResult {
    Success,
    Failure,
    /// Says nothing about the plugin: saturated, or given up by the caller.
    Neither,
}

/// Whose doing a failure may be. What one caller does counts once in a window.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Caller {
    /// Whoever asks to enroll chooses the enrollment id, and can choose another one each time; the certificate was given to it. This is
    /// [`wasmdm_protocol::certificate::Certificate::identity`]: the digest of the whole can be changed by whoever holds the certificate.
    Certificate([u8; 32]),
    Enrollment(EnrollmentId),
}

/// The plugin is suspended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Suspended {
    /// When the next call is let through.
    pub until: Timestamp,
}

/// Leave for one call. Dropped without [`Leave::ended`], the call said nothing.
#[derive(Debug)]
pub struct Leave<'a> {
    breakers: &'a CircuitBreakers,
    key: Option<(TenantId, Hook)>,
    /// The call is the one that finds out whether the plugin works again.
    trial: bool,
}

impl CircuitBreakers {
    /// Asks whether the hook may be called now.
    pub fn leave(&self, tenant: &TenantId, hook: Hook, now: Timestamp) -> Result<Leave<'_>, Suspended> {
        let key = (tenant.clone(), hook);
        let trial = self.breakers.lock().entry(key.clone()).or_default().leave(now)?;
        Ok(Leave { breakers: self, key: Some(key), trial })
    }

    /// Until when the hook is suspended, if it is.
    pub fn suspended(&self, tenant: &TenantId, hook: Hook, now: Timestamp) -> Option<Suspended> {
        let breakers = self.breakers.lock();
        let until = breakers.get(&(tenant.clone(), hook))?.suspended_until?;
        (until > now).then_some(Suspended { until })
    }
}

impl Leave<'_> {
    /// Tells how the call ended, and whose doing that may be; `None`: nobody's, so that each failure counts. `true`: the hook is suspended
    /// from now on.
    pub fn ended(mut self, result: CallResult, caller: Option<Caller>, now: Timestamp) -> bool {
        let Some(key) = self.key.take() else { return false };
        self.breakers.breakers.lock().entry(key).or_default().ended(result, self.trial, caller, now)
    }
}

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        if let Some(key) = self.key.take()
            && self.trial
        {
            self.breakers.breakers.lock().entry(key).or_default().trial = false;
        }
    }
}

#[derive(Debug, Default)]
struct Breaker {
    suspended_until: Option<Timestamp>,
    pause: Duration,
    /// One call is on its way to see whether it works again.
    trial: bool,
    /// Times of failures in the window.
    recent: VecDeque<Timestamp>,
    /// The last calls; `true` is a failure.
    calls: VecDeque<bool>,
    /// Whose failures were counted since the window began. Few: five suspend it, and each one after these doubles the pause.
    counted: HashSet<Caller>,
    /// A window in which the hook was suspended lasts until it works again.
    window_began: Timestamp,
}

impl Breaker {
    /// `true`: for the trial.
    fn leave(&mut self, now: Timestamp) -> Result<bool, Suspended> {
        let Some(until) = self.suspended_until else { return Ok(false) };
        if until > now {
            return Err(Suspended { until });
        }
        if self.trial {
            return Err(Suspended { until: now.plus(FIRST_PAUSE) });
        }
        self.trial = true;
        Ok(true)
    }

    fn ended(&mut self, result: CallResult, was_trial: bool, caller: Option<Caller>, now: Timestamp) -> bool {
        if was_trial {
            self.trial = false;
        }
        match result {
            CallResult::Neither => false,
            CallResult::Success => {
                if was_trial {
                    *self = Self::default();
                }
                self.push(false);
                false
            }
            CallResult::Failure if was_trial => {
                // One bad device that comes back for every trial says nothing new.
                if self.pause < LONGEST_PAUSE && self.counts(caller, now) {
                    self.pause = self.pause.saturating_mul(2).min(LONGEST_PAUSE);
                }
                self.suspend(now);
                true
            }
            // A call that began before the suspension says nothing new.
            CallResult::Failure if self.suspended_until.is_some() => false,
            CallResult::Failure => {
                if !self.counts(caller, now) {
                    return false;
                }
                self.push(true);
                self.recent.push_back(now);
                while self.recent.front().is_some_and(|first| now.since(*first) > WINDOW) {
                    self.recent.pop_front();
                }
                let failed = self.calls.iter().filter(|failed| **failed).count();
                if self.recent.len() < FAILURES && failed.saturating_mul(5) <= CALLS {
                    return false;
                }
                self.pause = FIRST_PAUSE;
                self.suspend(now);
                true
            }
        }
    }

    /// One device that makes the plugin fail must not suspend it for all: it counts once in a window.
    fn counts(&mut self, caller: Option<Caller>, now: Timestamp) -> bool {
        if self.suspended_until.is_none() && now.since(self.window_began) > WINDOW {
            self.window_began = now;
            self.counted.clear();
        }
        caller.is_none_or(|caller| self.counted.insert(caller))
    }

    fn push(&mut self, failed: bool) {
        if self.calls.len() >= CALLS {
            self.calls.pop_front();
        }
        self.calls.push_back(failed);
    }

    fn suspend(&mut self, now: Timestamp) {
        self.suspended_until = Some(now.plus(self.pause));
        self.recent.clear();
        self.calls.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOOK: Hook = Hook::EnrollmentPolicy;

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millis(1_000_000 + millis)
    }

    fn call(breakers: &CircuitBreakers, result: CallResult, about: &str, now: Timestamp) -> Result<bool, Suspended> {
        let leave = breakers.leave(&TenantId::default(), HOOK, now)?;
        Ok(leave.ended(result, Some(Caller::Enrollment(EnrollmentId::new(about))), now))
    }

    fn fail_until_suspended(breakers: &CircuitBreakers, now: Timestamp) {
        for n in 0..4 {
            assert_eq!(call(breakers, CallResult::Failure, &format!("D{n}"), now), Ok(false));
        }
        assert_eq!(call(breakers, CallResult::Failure, "D4", now), Ok(true));
    }

    #[test]
    fn five_failures_in_half_a_minute_suspend_it() {
        let breakers = CircuitBreakers::default();
        fail_until_suspended(&breakers, at(0));
        assert_eq!(call(&breakers, CallResult::Success, "D9", at(999)), Err(Suspended { until: at(1000) }));
    }

    #[test]
    fn failures_far_apart_do_not_suspend_it() {
        let breakers = CircuitBreakers::default();
        for n in 0..20 {
            assert_eq!(call(&breakers, CallResult::Failure, &format!("D{n}"), at(n * 10_000)), Ok(false));
        }
    }

    #[test]
    fn more_than_a_fifth_of_the_last_calls_suspend_it() {
        let breakers = CircuitBreakers::default();
        let mut now = 0;
        let mut suspended_after = None;
        for n in 0..60 {
            now += 15_000;
            if call(&breakers, CallResult::Failure, &format!("D{n}"), at(now)).unwrap() {
                suspended_after = Some(n + 1);
                break;
            }
            for _ in 0..3 {
                call(&breakers, CallResult::Success, "D", at(now)).unwrap();
            }
        }
        assert_eq!(suspended_after, Some(41));
    }

    #[test]
    fn one_device_counts_once() {
        let breakers = CircuitBreakers::default();
        for n in 0..50 {
            assert_eq!(call(&breakers, CallResult::Failure, "D", at(n)), Ok(false));
        }
    }

    #[test]
    fn saturation_does_not_count() {
        let breakers = CircuitBreakers::default();
        for n in 0..50 {
            assert_eq!(call(&breakers, CallResult::Neither, &format!("D{n}"), at(n)), Ok(false));
        }
    }

    #[test]
    fn a_trial_that_works_closes_it() {
        let breakers = CircuitBreakers::default();
        fail_until_suspended(&breakers, at(0));
        let trial = breakers.leave(&TenantId::default(), HOOK, at(1000)).unwrap();
        assert!(call(&breakers, CallResult::Success, "D", at(1000)).is_err(), "one trial at a time");
        assert!(!trial.ended(CallResult::Success, None, at(1001)));
        assert_eq!(call(&breakers, CallResult::Failure, "D", at(1002)), Ok(false));
    }

    #[test]
    fn trials_that_fail_come_at_most_every_five_minutes() {
        let breakers = CircuitBreakers::default();
        fail_until_suspended(&breakers, at(0));
        let mut now = at(1000);
        for seconds in [2, 4, 8, 16, 32, 64, 128, 256, 300, 300] {
            assert_eq!(call(&breakers, CallResult::Failure, &format!("after {seconds}"), now), Ok(true));
            let until = now.plus(Duration::from_secs(seconds));
            assert_eq!(breakers.suspended(&TenantId::default(), HOOK, now), Some(Suspended { until }));
            now = until;
        }
    }

    #[test]
    fn one_device_that_fails_every_trial_does_not_lengthen_the_pause() {
        let breakers = CircuitBreakers::default();
        fail_until_suspended(&breakers, at(0));
        let mut now = at(1000);
        // "D0" was among those that suspended it. However long it polls, also beyond the window.
        for _ in 0..60 {
            assert_eq!(call(&breakers, CallResult::Failure, "D0", now), Ok(true));
            let until = now.plus(FIRST_PAUSE);
            assert_eq!(breakers.suspended(&TenantId::default(), HOOK, now), Some(Suspended { until }));
            now = until;
        }
        for _ in 0..3 {
            assert_eq!(call(&breakers, CallResult::Failure, "another", now), Ok(true));
            let until = now.plus(Duration::from_secs(2));
            assert_eq!(breakers.suspended(&TenantId::default(), HOOK, now), Some(Suspended { until }), "doubled once");
            now = until;
        }
    }

    #[test]
    fn a_call_from_before_the_suspension_is_not_the_trial() {
        let breakers = CircuitBreakers::default();
        let tenant = TenantId::default();
        let [old, given_up] = [(); 2].map(|()| breakers.leave(&tenant, HOOK, at(0)).unwrap());
        fail_until_suspended(&breakers, at(0));
        let trial = breakers.leave(&tenant, HOOK, at(1000)).unwrap();
        assert!(!old.ended(CallResult::Failure, None, at(1001)));
        drop(given_up);
        assert!(breakers.leave(&tenant, HOOK, at(1002)).is_err(), "the trial is still on its way");
        assert!(!trial.ended(CallResult::Success, None, at(1003)));
        assert!(breakers.leave(&tenant, HOOK, at(1004)).is_ok());
    }

    #[test]
    fn a_trial_that_is_given_up_lets_the_next_one_through() {
        let breakers = CircuitBreakers::default();
        fail_until_suspended(&breakers, at(0));
        drop(breakers.leave(&TenantId::default(), HOOK, at(1000)).unwrap());
        assert_eq!(call(&breakers, CallResult::Success, "D", at(1000)), Ok(false));
    }

    #[test]
    fn other_hooks_and_tenants_go_on() {
        let breakers = CircuitBreakers::default();
        fail_until_suspended(&breakers, at(0));
        assert!(breakers.leave(&TenantId::new("other"), HOOK, at(0)).is_ok());
        assert!(breakers.leave(&TenantId::default(), Hook::EventSink, at(0)).is_ok());
    }
}
