//! `wasmdm plugin …`.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;
use wasmdm_plugin_runtime::loading::check_file;

/// Work on plugins.
#[derive(Debug, Subcommand)]
pub enum PluginCommand {
    /// Say of a component, or of a plugin's directory, whether this server would load it, and with which hooks
    Check {
        /// A .wasm file, or a directory with a plugin.toml
        #[arg(value_name = "FILE")]
        path: PathBuf,
    },
}

/// Runs it; exit code 1 if the plugin would not be loaded.
pub async fn run(command: PluginCommand) -> anyhow::Result<ExitCode> {
    match command {
        PluginCommand::Check { path } => {
            let report = check_file(&path).await;
            writeln!(std::io::stdout(), "{report}")?;
            Ok(if report.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}
