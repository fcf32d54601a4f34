//! `wasmdm simulate`.

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;
use wasmdm_simulator::Authority;
use wasmdm_simulator::apns::PushAuthority;
use wasmdm_simulator::cli::{SimulateArguments, simulate};

/// Simulate devices against any MDM server.
#[derive(Debug, Args)]
pub struct SimulateOptions {
    #[command(flatten)]
    arguments: SimulateArguments,

    /// Only make the authorities in --ca-dir: DIR/root.pem is for the server's --ca, DIR/push-root.pem for its --apns-roots
    #[arg(long, requires = "ca_dir")]
    make_ca: bool,
}

/// Runs the devices and prints the report; exit code 1 if there were problems.
pub async fn run(options: SimulateOptions) -> anyhow::Result<ExitCode> {
    let SimulateOptions { arguments, make_ca } = options;
    let mut out = std::io::stdout();
    if make_ca {
        let directory = arguments.ca_dir.clone().context("ca-dir: it is missing")?;
        Authority::load_or_create(&directory, arguments.seed, arguments.key_type, usize::from(arguments.keys))?;
        PushAuthority::load_or_create(&directory)?;
        writeln!(out, "{}", directory.join("root.pem").display())?;
        return Ok(ExitCode::SUCCESS);
    }
    let report = simulate(arguments.clone()).await?;
    write!(out, "{}", arguments.present(&report))?;
    Ok(if report.is_success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
