//! What a run found out.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use crate::measure::Tally;

/// The most problems that are told in words; the rest is counted.
const PROBLEMS: usize = 20;

/// The report of a whole run.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Simulated devices.
    pub devices: u64,
    /// Connections that they shared.
    pub connections: u64,
    /// Devices that enrolled.
    pub enrolled: u64,
    /// Devices that were answered 403.
    pub denied: u64,
    /// Commands given to the API and confirmed, counted per device.
    pub commands_enqueued: u64,
    /// Devices that a push has woken.
    pub woken: u64,
    /// Reports by their status.
    pub reports: BTreeMap<String, u64>,
    /// Commands that came again although the device had not asked to be asked later.
    pub redelivered: u64,
    /// What happened in the devices' lives.
    pub life: BTreeMap<String, u64>,
    /// The parts of the run in their order.
    pub phases: Vec<PhaseReport>,
    /// What the simulator reaches against a server that does nothing.
    pub ceiling: Option<PhaseReport>,
    /// The first problems in words.
    pub problems: Vec<String>,
    /// All problems.
    pub problem_count: u64,
}

/// One part of a run.
#[derive(Debug, Clone, Default, Serialize)]
pub struct PhaseReport {
    /// What the devices did.
    pub name: String,
    /// Requests that were answered.
    pub requests: u64,
    /// How long it took.
    pub seconds: f64,
    /// Answered requests a second.
    pub requests_per_second: f64,
    /// From sending to the last byte of the answer, in milliseconds.
    pub latency_ms: Quantiles,
    /// Answers by HTTP status.
    pub answers: BTreeMap<u16, u64>,
    /// Requests without an answer.
    pub transport_errors: u64,
    /// The simulator's own CPU time, in microseconds a request.
    pub own_cpu_us: f64,
    /// The server's, where its process id was given.
    pub server_cpu_us: Option<f64>,
}

/// Quantiles in milliseconds.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Quantiles {
    /// Half of them take no longer.
    pub p50: f64,
    /// Nine of ten.
    pub p90: f64,
    /// Ninety-nine of a hundred.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

impl PhaseReport {
    /// Puts together what was measured.
    pub fn new(name: &str, tally: &Tally, elapsed: Duration, own_cpu: Duration, server_cpu: Option<Duration>) -> Self {
        let requests = tally.requests();
        let milliseconds = |per_mille| tally.latencies.quantile(per_mille).as_secs_f64() * 1e3;
        let seconds = elapsed.as_secs_f64();
        Self {
            name: name.into(),
            requests,
            seconds,
            requests_per_second: if seconds > 0.0 { float(requests) / seconds } else { 0.0 },
            latency_ms: Quantiles {
                p50: milliseconds(500),
                p90: milliseconds(900),
                p99: milliseconds(990),
                max: tally.latencies.max().as_secs_f64() * 1e3,
            },
            answers: tally.answers.clone(),
            transport_errors: tally.transport_errors,
            own_cpu_us: per_request(own_cpu, requests),
            server_cpu_us: server_cpu.map(|cpu| per_request(cpu, requests)),
        }
    }

    /// Answers other than 200.
    pub fn refused(&self) -> u64 {
        self.answers.iter().filter(|(status, _)| **status != 200).map(|(_, count)| count).sum()
    }
}

fn per_request(cpu: Duration, requests: u64) -> f64 {
    if requests == 0 {
        return 0.0;
    }
    cpu.as_secs_f64() * 1e6 / float(requests)
}

/// Counts are far below what a float holds exactly.
#[expect(clippy::cast_precision_loss, reason = "counts stay below 2^52")]
const fn float(count: u64) -> f64 {
    count as f64
}

impl Report {
    /// Remembers a problem.
    pub fn problem(&mut self, text: impl Into<String>) {
        self.problem_count += 1;
        if self.problems.len() < PROBLEMS {
            self.problems.push(text.into());
        }
    }

    /// Whether everything went as it should. Requests without an answer that were sent again are no problem by themselves.
    pub const fn is_success(&self) -> bool {
        self.problem_count == 0
    }

    /// The part of that name.
    pub fn phase(&self, name: &str) -> Option<&PhaseReport> {
        self.phases.iter().find(|phase| phase.name == name)
    }

    /// As JSON, indented.
    pub fn to_json(&self) -> String {
        // Only maps with keys that are no text could fail, and there are none.
        serde_json::to_string_pretty(self).unwrap_or_default()
    }

    /// For a person.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.write_text(&mut text);
        text
    }

    fn write_text(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "{} devices over {} connections: {} enrolled, {} denied", self.devices, self.connections, self.enrolled, self.denied)?;
        if self.commands_enqueued > 0 || !self.reports.is_empty() {
            write!(out, "{} commands queued", self.commands_enqueued)?;
            if self.woken > 0 {
                write!(out, ", {} devices woken", self.woken)?;
            }
            for (status, count) in &self.reports {
                write!(out, ", {count} × {status}")?;
            }
            writeln!(out, ", {} delivered again", self.redelivered)?;
        }
        for (event, count) in &self.life {
            writeln!(out, "{count:>10} × {event}")?;
        }
        writeln!(
            out,
            "\n{:<12} {:>10} {:>10} {:>9} {:>9} {:>9} {:>9} {:>9} {:>11}",
            "", "requests", "per second", "p50 ms", "p90 ms", "p99 ms", "max ms", "own µs", "server µs"
        )?;
        for phase in self.phases.iter().chain(&self.ceiling) {
            let server = phase.server_cpu_us.map_or_else(|| "–".to_owned(), |cpu| format!("{cpu:.1}"));
            writeln!(
                out,
                "{:<12} {:>10} {:>10.0} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>9.1} {:>11}",
                phase.name,
                phase.requests,
                phase.requests_per_second,
                phase.latency_ms.p50,
                phase.latency_ms.p90,
                phase.latency_ms.p99,
                phase.latency_ms.max,
                phase.own_cpu_us,
                server
            )?;
            if phase.refused() > 0 || phase.transport_errors > 0 {
                write!(out, "{:<12} without answer: {}", "", phase.transport_errors)?;
                for (status, count) in &phase.answers {
                    write!(out, ", {count} × {status}")?;
                }
                writeln!(out)?;
            }
        }
        if self.problem_count == 0 {
            writeln!(out, "\nno problems")?;
        } else {
            writeln!(out, "\n{} problems", self.problem_count)?;
            for problem in &self.problems {
                writeln!(out, "  {problem}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_and_cpu_are_per_answered_request() {
        let mut tally = Tally::default();
        for _ in 0..1000 {
            tally.record(Duration::from_millis(2), 200);
        }
        tally.transport_errors = 7;
        let phase = PhaseReport::new("polls", &tally, Duration::from_secs(2), Duration::from_millis(20), Some(Duration::from_millis(100)));
        assert!((phase.requests_per_second - 500.0).abs() < 1e-9);
        assert!((phase.own_cpu_us - 20.0).abs() < 1e-9);
        assert!((phase.server_cpu_us.unwrap() - 100.0).abs() < 1e-9);
        assert!((phase.latency_ms.p99 - 2.0).abs() < 0.02);
        assert_eq!((phase.requests, phase.transport_errors), (1000, 7));
    }

    #[test]
    fn a_phase_without_requests_divides_by_nothing() {
        let phase = PhaseReport::new("none", &Tally::default(), Duration::ZERO, Duration::from_millis(1), None);
        assert!(phase.own_cpu_us.abs() < 1e-9);
        assert!(phase.requests_per_second.abs() < 1e-9);
    }

    #[test]
    fn problems_beyond_the_first_are_counted() {
        let mut report = Report::default();
        for number in 0..50 {
            report.problem(format!("problem {number}"));
        }
        assert!(!report.is_success());
        assert!(report.to_text().contains("50 problems"));
        assert!(!report.to_text().contains("problem 49"));
        let json: serde_json::Value = serde_json::from_str(&report.to_json()).unwrap();
        assert_eq!(json["problem_count"], 50);
    }
}
