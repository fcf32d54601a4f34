//! CPU time of a call: what its own task spends on a processor, and nothing of what others do meanwhile.
//!
//! A task can move to another thread only between two polls, so the thread's CPU clock read at both ends of a poll is exact.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Shared by the future of a call and the callback that interrupts its guest.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    /// Nanoseconds of all polls that ended.
    charged: AtomicU64,
    /// The thread's clock when the present poll began.
    poll_began: AtomicU64,
}

impl Meter {
    /// Up to now, from inside of a poll.
    pub(crate) fn used_within_poll(&self) -> Duration {
        let running = thread_cpu_time().saturating_sub(self.poll_began.load(Ordering::Relaxed));
        Duration::from_nanos(self.charged.load(Ordering::Relaxed).saturating_add(running))
    }

    /// Of all polls that ended.
    pub(crate) fn used(&self) -> Duration {
        Duration::from_nanos(self.charged.load(Ordering::Relaxed))
    }
}

/// A future whose polls are charged to a meter.
pub(crate) struct Metered<F> {
    inner: Pin<Box<F>>,
    meter: Arc<Meter>,
}

impl<F: Future> Metered<F> {
    pub(crate) fn new(inner: F, meter: Arc<Meter>) -> Self {
        Self { inner: Box::pin(inner), meter }
    }
}

impl<F: Future> Future for Metered<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let began = thread_cpu_time();
        self.meter.poll_began.store(began, Ordering::Relaxed);
        let polled = self.inner.as_mut().poll(context);
        self.meter.charged.fetch_add(thread_cpu_time().saturating_sub(began), Ordering::Relaxed);
        polled
    }
}

fn thread_cpu_time() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waiting_is_not_charged_and_working_is() {
        let meter = Arc::new(Meter::default());
        let inside = Arc::clone(&meter);
        let spent = Metered::new(
            async move {
                let mut spins = 0_u64;
                while inside.used_within_poll() < Duration::from_millis(5) {
                    spins = std::hint::black_box(spins.wrapping_add(1));
                }
                let before = inside.used_within_poll();
                let (sender, receiver) = tokio::sync::oneshot::channel::<()>();
                let waiter = std::thread::spawn(move || {
                    let deadline = std::time::Instant::now() + Duration::from_millis(50);
                    while std::time::Instant::now() < deadline {
                        std::thread::yield_now();
                    }
                    drop(sender);
                });
                let _ = receiver.await;
                waiter.join().unwrap();
                inside.used_within_poll().saturating_sub(before)
            },
            Arc::clone(&meter),
        )
        .await;
        assert!(meter.used() >= Duration::from_millis(5));
        assert!(spent < Duration::from_millis(25), "{spent:?} were charged for waiting");
    }
}
