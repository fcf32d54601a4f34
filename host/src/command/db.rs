//! `wasmdm db …`.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Subcommand;
use wasmdm_service::clock::Clock as _;
use wasmdm_storage::Storage;

use crate::clock::SystemClock;
use crate::config::database_url;

mod journal;

/// Work on the database.
#[derive(Debug, Subcommand)]
pub enum DbCommand {
    /// Look for broken invariants, and for confirmed facts that are missing; a running server is not disturbed
    Check {
        /// The database, as for `serve`
        #[arg(long, env = "WASMDM_DATABASE", value_name = "URL", default_value = "sqlite")]
        database: String,
        /// The data directory, as for `serve`
        #[arg(long, env = "WASMDM_DATA", value_name = "DIR", default_value = "data")]
        data: PathBuf,
        /// A journal that `wasmdm simulate --journal` wrote: whatever was answered 200 must be there
        #[arg(long, value_name = "FILE")]
        journal: Vec<PathBuf>,
    },
}

/// Runs it; exit code 1 if something was found.
pub async fn run(command: DbCommand) -> anyhow::Result<ExitCode> {
    match command {
        DbCommand::Check { database, data, journal } => {
            let url = database_url(&database, &data)?;
            let storage = Storage::open_read_only(&url, SystemClock.now()).await.context("database")?;
            let mut out = std::io::stdout();
            let mut findings: Vec<String> = storage.check().await.context("database")?.iter().map(ToString::to_string).collect();
            for path in &journal {
                let comparison = journal::compare(path, &storage).await?;
                writeln!(out, "{}: {}", path.display(), comparison.summary)?;
                findings.extend(comparison.missing);
            }
            storage.close().await.context("database")?;
            for finding in &findings {
                writeln!(out, "{finding}")?;
            }
            if findings.is_empty() {
                writeln!(out, "nothing is wrong")?;
                Ok(ExitCode::SUCCESS)
            } else {
                writeln!(out, "{} findings", findings.len())?;
                Ok(ExitCode::FAILURE)
            }
        }
    }
}
