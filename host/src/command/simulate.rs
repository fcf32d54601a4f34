//! `wasmdm simulate`.

use std::io::Write as _;
use std::process::ExitCode;

use wasmdm_simulator::cli::{SimulateArguments, simulate};

/// Runs the devices and prints the report; exit code 1 if there were errors that nobody asked for.
pub async fn run(arguments: SimulateArguments) -> anyhow::Result<ExitCode> {
    let as_json = arguments.json;
    let report = simulate(arguments).await?;
    let text = if as_json { serde_json::to_string_pretty(&report)? } else { report.to_string() };
    writeln!(std::io::stdout(), "{text}")?;
    Ok(if report.failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
