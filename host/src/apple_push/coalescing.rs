//! One push of a channel at a time.
//!
//! Whoever asks while one is under way waits for its end, because the device may have come for that one already and found nothing; all who
//! wait then share the next. So a burst of commands for a device is two pushes, not a hundred. A push is of the token that the channel had told
//! by then: what becomes of one says nothing of another.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use wasmdm_protocol::enrollment::EnrollmentId;
use wasmdm_protocol::time::Timestamp;
use wasmdm_storage::wakes::NotWoken;

/// The `apns-id`, or why not.
pub(super) type Pushed = Result<String, NotWoken>;

/// Whose token it is, and when it was told.
type Token = (EnrollmentId, Timestamp);

/// The channels that are being pushed to.
#[derive(Debug, Default)]
pub(super) struct Coalescing {
    turns: Mutex<HashMap<Token, Arc<Turn>>>,
}

#[derive(Debug, Default)]
struct Turn {
    /// How many pushes have begun.
    begun: AtomicU64,
    /// What became of the last; held while one is under way.
    last: tokio::sync::Mutex<Option<Pushed>>,
}

/// Forgets the turn when its last user has gone, in whatever way.
struct Place<'a> {
    turns: &'a Coalescing,
    token: Token,
    turn: Arc<Turn>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut turns = self.turns.turns.lock();
        // The map's and this one.
        if Arc::strong_count(&self.turn) <= 2 {
            turns.remove(&self.token);
        }
    }
}

impl Coalescing {
    /// Pushes, or shares a push that begins after this call. `push` answers the result and what only the one who pushed is told.
    pub(super) async fn push<T>(
        &self,
        id: &EnrollmentId,
        told_at: Timestamp,
        push: impl Future<Output = (Pushed, Option<T>)>,
    ) -> (Pushed, Option<T>) {
        let place = self.place((id.clone(), told_at));
        let arrived = place.turn.begun.load(Ordering::Acquire);
        let mut last = place.turn.last.lock().await;
        if place.turn.begun.load(Ordering::Acquire) > arrived
            // None: whoever began it went away before its end.
            && let Some(shared) = &*last
        {
            return (shared.clone(), None);
        }
        *last = None;
        place.turn.begun.fetch_add(1, Ordering::AcqRel);
        let (result, told) = push.await;
        *last = Some(result.clone());
        (result, told)
    }

    fn place(&self, token: Token) -> Place<'_> {
        let turn = Arc::clone(self.turns.lock().entry(token.clone()).or_default());
        Place { turns: self, token, turn }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use futures_util::FutureExt as _;
    use tokio::sync::Semaphore;

    use super::*;

    const TOLD: Timestamp = Timestamp::from_millis(1);

    /// Counts pushes; each waits until it is let go.
    #[derive(Default)]
    struct Service {
        begun: AtomicUsize,
        answers: Option<Semaphore>,
    }

    impl Service {
        fn held() -> Self {
            Self { begun: AtomicUsize::new(0), answers: Some(Semaphore::new(0)) }
        }

        async fn push(&self) -> (Pushed, Option<usize>) {
            let number = self.begun.fetch_add(1, Ordering::Relaxed) + 1;
            if let Some(answers) = &self.answers {
                answers.acquire().await.unwrap().forget();
            }
            (Ok(number.to_string()), Some(number))
        }

        fn answer(&self) {
            self.answers.as_ref().unwrap().add_permits(1);
        }
    }

    #[tokio::test]
    async fn those_who_ask_while_a_push_is_under_way_share_the_next() {
        let (coalescing, service, id) = (Coalescing::default(), Service::held(), EnrollmentId::new("A"));
        let mut first = Box::pin(coalescing.push(&id, TOLD, service.push()));
        assert!(first.as_mut().now_or_never().is_none());
        let mut later: Vec<_> = (0..5).map(|_| Box::pin(coalescing.push(&id, TOLD, service.push()))).collect();
        for waiting in &mut later {
            assert!(waiting.as_mut().now_or_never().is_none());
        }
        assert_eq!(service.begun.load(Ordering::Relaxed), 1);
        service.answer();
        assert_eq!(first.await, (Ok("1".to_owned()), Some(1)));
        service.answer();
        let results = futures_util::future::join_all(later).await;
        assert!(results.iter().all(|(result, _)| *result == Ok("2".to_owned())), "{results:?}");
        assert_eq!(results.iter().filter(|(_, told)| told.is_some()).count(), 1);
        assert!(coalescing.turns.lock().is_empty());
    }

    #[tokio::test]
    async fn one_who_goes_away_in_the_middle_leaves_the_push_to_the_next() {
        let (coalescing, service, id) = (Coalescing::default(), Service::held(), EnrollmentId::new("A"));
        let mut first = Box::pin(coalescing.push(&id, TOLD, service.push()));
        assert!(first.as_mut().now_or_never().is_none());
        let mut second = Box::pin(coalescing.push(&id, TOLD, service.push()));
        assert!(second.as_mut().now_or_never().is_none());
        drop(first);
        service.answer();
        assert_eq!(second.await.0, Ok("2".to_owned()));
        let mut alone = Box::pin(coalescing.push(&id, TOLD, service.push()));
        assert!(alone.as_mut().now_or_never().is_none());
        drop(alone);
        assert!(coalescing.turns.lock().is_empty());
    }

    #[tokio::test]
    async fn channels_do_not_wait_for_each_other_nor_calls_that_follow_each_other() {
        let (coalescing, held, free) = (Coalescing::default(), Service::held(), Service::default());
        let (one, two) = (EnrollmentId::new("A"), EnrollmentId::new("B"));
        let mut first = Box::pin(coalescing.push(&one, TOLD, held.push()));
        assert!(first.as_mut().now_or_never().is_none());
        for number in 1..4 {
            assert_eq!(coalescing.push(&two, TOLD, free.push()).await, (Ok(number.to_string()), Some(number)));
        }
        // The device has told another token meanwhile: what Apple says of the one before is not about this one.
        let told_later = Timestamp::from_millis(2);
        assert_eq!(coalescing.push(&one, told_later, free.push()).await, (Ok("4".to_owned()), Some(4)));
    }
}
