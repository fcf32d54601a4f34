//! Counting answers and times, and reading CPU clocks.

use std::collections::BTreeMap;
use std::time::Duration;

/// Below this many microseconds every value has a bucket of its own.
const EXACT: u64 = 256;
/// Above, every power of two is divided so many times: a value is known to within 0.8 %.
const DIVISIONS: u64 = 128;
const DIVISION_BITS: u32 = 7;
/// The largest power of two that is told apart: about 13 days in microseconds.
const LARGEST_EXPONENT: u32 = 40;

/// Latencies in constant memory: any number of them.
#[derive(Debug, Clone, Default)]
pub struct Latencies {
    buckets: Vec<u64>,
    count: u64,
    max: u64,
}

impl Latencies {
    /// Adds one.
    pub fn record(&mut self, latency: Duration) {
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        let index = bucket(micros);
        if self.buckets.len() <= index {
            self.buckets.resize(index + 1, 0);
        }
        if let Some(count) = self.buckets.get_mut(index) {
            *count += 1;
        }
        self.count += 1;
        self.max = self.max.max(micros);
    }

    /// Adds all of another's.
    pub fn merge(&mut self, other: &Self) {
        if self.buckets.len() < other.buckets.len() {
            self.buckets.resize(other.buckets.len(), 0);
        }
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine += theirs;
        }
        self.count += other.count;
        self.max = self.max.max(other.max);
    }

    /// How many there are.
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// The largest, exactly.
    pub const fn max(&self) -> Duration {
        Duration::from_micros(self.max)
    }

    /// The smallest value that `per_mille` of a thousand do not exceed; zero if there is none.
    pub fn quantile(&self, per_mille: u64) -> Duration {
        let rank = (self.count * per_mille).div_ceil(1000).max(1);
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return Duration::from_micros(value(index as u64).min(self.max));
            }
        }
        self.max()
    }
}

fn bucket(micros: u64) -> usize {
    let index = if micros < EXACT {
        micros
    } else {
        let exponent = micros.ilog2().min(LARGEST_EXPONENT);
        let division = (micros >> (exponent - DIVISION_BITS)).min(2 * DIVISIONS - 1) - DIVISIONS;
        EXACT + u64::from(exponent - DIVISION_BITS - 1) * DIVISIONS + division
    };
    usize::try_from(index).unwrap_or(usize::MAX - 1)
}

/// The middle of a bucket.
const fn value(index: u64) -> u64 {
    if index < EXACT {
        return index;
    }
    let shift = (index - EXACT) / DIVISIONS + 1;
    let division = (index - EXACT) % DIVISIONS + DIVISIONS;
    (division << shift) + (1 << shift) / 2
}

/// What one connection saw.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// From sending to the last byte of the answer.
    pub latencies: Latencies,
    /// Answers by HTTP status.
    pub answers: BTreeMap<u16, u64>,
    /// Requests without an answer.
    pub transport_errors: u64,
}

impl Tally {
    /// Adds one answer.
    pub fn record(&mut self, latency: Duration, status: u16) {
        self.latencies.record(latency);
        *self.answers.entry(status).or_default() += 1;
    }

    /// Adds all of another's.
    pub fn merge(&mut self, other: &Self) {
        self.latencies.merge(&other.latencies);
        for (status, count) in &other.answers {
            *self.answers.entry(*status).or_default() += count;
        }
        self.transport_errors += other.transport_errors;
    }

    /// Answers of any status.
    pub const fn requests(&self) -> u64 {
        self.latencies.count()
    }
}

/// CPU time of this whole process.
pub fn own_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or_default(), u32::try_from(time.tv_nsec).unwrap_or_default())
}

/// CPU time, user and system, of another process; `None` where it cannot be read. It moves in steps of the kernel's tick (10 ms).
pub fn process_cpu(pid: u32) -> Option<Duration> {
    stat_cpu(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// CPU time of the thread that asks.
pub fn own_thread_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or_default(), u32::try_from(time.tv_nsec).unwrap_or_default())
}

/// CPU times of the threads of another process, to the nanosecond: for slices that are shorter than many of the kernel's ticks.
#[derive(Debug, Clone, Default)]
pub struct ThreadTimes(BTreeMap<u32, Duration>);

impl ThreadTimes {
    /// Reads them; empty where they cannot be read.
    pub fn of(pid: u32) -> Self {
        let read = |task: std::fs::DirEntry| {
            let thread = task.file_name().to_str()?.parse().ok()?;
            let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
            Some((thread, Duration::from_nanos(text.split_whitespace().next()?.parse().ok()?)))
        };
        let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
            return Self::default();
        };
        Self(tasks.filter_map(Result::ok).filter_map(read).collect())
    }

    /// What the threads that live have used since. Of a thread that ended meanwhile nothing is known.
    pub fn since(&self, earlier: &Self) -> Duration {
        let used = |(thread, time): (&u32, &Duration)| time.saturating_sub(earlier.0.get(thread).copied().unwrap_or_default());
        self.0.iter().map(used).sum()
    }
}

/// The middle of several measurements, and how certain it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// The median.
    pub median: f64,
    /// With the next one the bounds between which the true median lies in 95 of 100 cases.
    pub low: f64,
    /// The upper bound.
    pub high: f64,
}

impl Estimate {
    /// Of measurements of which each was made beside its counterpart. The bounds are those of the median of as many measurements drawn
    /// from these again and again (percentile bootstrap); they do not ask how the noise is distributed.
    pub fn of(values: &[f64]) -> Self {
        const DRAWS: usize = 2000;
        let mut chances = fastrand::Rng::with_seed(1);
        let mut medians: Vec<f64> =
            (0..DRAWS).map(|_| median((0..values.len()).filter_map(|_| values.get(chances.usize(0..values.len())).copied()).collect())).collect();
        medians.sort_by(f64::total_cmp);
        let at = |per_mille: usize| medians.get(DRAWS * per_mille / 1000).copied().unwrap_or_default();
        Self { median: median(values.to_vec()), low: at(25), high: at(975) }
    }
}

impl std::fmt::Display for Estimate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let digits = f.precision().unwrap_or(1);
        write!(f, "{:.digits$} [{:.digits$}, {:.digits$}]", self.median, self.low, self.high)
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = values.get(middle).copied().unwrap_or_default();
    if values.len().is_multiple_of(2) { f64::midpoint(upper, values.get(middle.wrapping_sub(1)).copied().unwrap_or_default()) } else { upper }
}

/// CPU time of one thread of this process, to the nanosecond; `None` where it cannot be read.
pub fn thread_cpu(thread_id: i32) -> Option<Duration> {
    let text = std::fs::read_to_string(format!("/proc/self/task/{thread_id}/schedstat")).ok()?;
    let nanoseconds = text.split_whitespace().next()?.parse().ok()?;
    Some(Duration::from_nanos(nanoseconds))
}

fn stat_cpu(stat: &str) -> Option<Duration> {
    // The second field is the name in parentheses, which may hold anything; the rest are numbers.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    let ticks_per_second = rustix::param::clock_ticks_per_second().max(1);
    Some(Duration::from_nanos((user + system).saturating_mul(1_000_000_000 / ticks_per_second)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_known_values_are_right_to_a_hundredth() {
        let mut latencies = Latencies::default();
        for micros in 1..=100_000 {
            latencies.record(Duration::from_micros(micros));
        }
        for (per_mille, expected) in [(500, 50_000.0), (900, 90_000.0), (990, 99_000.0)] {
            let found = latencies.quantile(per_mille).as_secs_f64() * 1e6;
            assert!((found / expected - 1.0).abs() < 0.01, "{per_mille}: {found}");
        }
        assert_eq!(latencies.max(), Duration::from_millis(100));
        assert_eq!(latencies.count(), 100_000);
    }

    #[test]
    fn small_values_are_exact() {
        let mut latencies = Latencies::default();
        for micros in [3, 5, 200] {
            latencies.record(Duration::from_micros(micros));
        }
        assert_eq!(latencies.quantile(500), Duration::from_micros(5));
        assert_eq!(latencies.quantile(990), Duration::from_micros(200));
    }

    #[test]
    fn buckets_follow_one_another_without_gap() {
        let mut last = 0;
        for micros in 0..100_000 {
            let index = bucket(micros);
            assert!(index == last || index == last + 1, "{micros}");
            last = index;
        }
        assert!(bucket(u64::MAX) < 10_000);
        assert_eq!(Latencies::default().quantile(990), Duration::ZERO);
    }

    #[test]
    fn merging_is_the_same_as_recording_into_one() {
        let (mut one, mut other, mut both) = (Tally::default(), Tally::default(), Tally::default());
        for micros in 0..5000 {
            let latency = Duration::from_micros(micros * 7);
            let half = if micros % 2 == 0 { &mut one } else { &mut other };
            half.record(latency, if micros % 10 == 0 { 503 } else { 200 });
            both.record(latency, if micros % 10 == 0 { 503 } else { 200 });
        }
        one.merge(&other);
        assert_eq!(one.answers, both.answers);
        assert_eq!(one.latencies.quantile(900), both.latencies.quantile(900));
        assert_eq!(one.requests(), 5000);
    }

    #[test]
    fn the_median_of_noise_lies_between_its_bounds() {
        let mut chances = fastrand::Rng::with_seed(5);
        let values: Vec<f64> = (0..40).map(|_| 100.0 + 10.0 * chances.f64() + if chances.u8(..10) == 0 { 500.0 } else { 0.0 }).collect();
        let estimate = Estimate::of(&values);
        assert!(estimate.low < estimate.median && estimate.median < estimate.high, "{estimate}");
        assert!((100.0..110.0).contains(&estimate.low) && (100.0..115.0).contains(&estimate.high), "a few outliers move nothing: {estimate}");
        assert_eq!(Estimate::of(&[2.0, 1.0]), Estimate { median: 1.5, low: 1.0, high: 2.0 });
        assert!(Estimate::of(&[]).median.abs() < 1e-9);
        assert_eq!(format!("{:.2}", Estimate::of(&[1.0])), "1.00 [1.00, 1.00]");
    }

    #[test]
    fn threads_that_begin_count_and_those_that_ended_do_not() {
        let times = |list: &[(u32, u64)]| ThreadTimes(list.iter().map(|(thread, millis)| (*thread, Duration::from_millis(*millis))).collect());
        assert_eq!(times(&[(1, 30), (3, 5)]).since(&times(&[(1, 10), (2, 100)])), Duration::from_millis(25));
        assert!(ThreadTimes::of(std::process::id()).since(&ThreadTimes::default()) > Duration::ZERO);
        assert!(own_thread_cpu() > Duration::ZERO);
    }

    #[test]
    fn cpu_time_is_found_behind_any_process_name() {
        let stat = "12 (a ) b) S 1 1 1 0 -1 4194560 1 0 0 0 150 50 0 0 20 0 4 0 100 1 1";
        let ticks = rustix::param::clock_ticks_per_second();
        assert_eq!(stat_cpu(stat), Some(Duration::from_secs(200) / u32::try_from(ticks).unwrap()));
        assert!(process_cpu(std::process::id()).is_some());
        assert!(own_cpu() > Duration::ZERO);
    }
}
