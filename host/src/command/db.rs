//! `wasmdm db …`.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Subcommand;
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_storage::Storage;

use crate::config::database_url;
use crate::http::dead_letters;

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
    /// Write a copy of the database as it is now to a new file; a running server is not disturbed
    Backup {
        /// The database, as for `serve`
        #[arg(long, env = "WASMDM_DATABASE", value_name = "URL", default_value = "sqlite")]
        database: String,
        /// The data directory, as for `serve`
        #[arg(long, env = "WASMDM_DATA", value_name = "DIR", default_value = "data")]
        data: PathBuf,
        /// Where to; the file must not be there yet
        file: PathBuf,
    },
    /// List the events that could not be delivered, a line of JSON each, newest first; the API puts them back
    DeadLetters {
        /// The database, as for `serve`
        #[arg(long, env = "WASMDM_DATABASE", value_name = "URL", default_value = "sqlite")]
        database: String,
        /// The data directory, as for `serve`
        #[arg(long, env = "WASMDM_DATA", value_name = "DIR", default_value = "data")]
        data: PathBuf,
        /// How many
        #[arg(long, value_name = "N", default_value_t = 100)]
        limit: u32,
    },
    /// Print a digest of each table, to compare a database with its copy; a running server is not disturbed
    Fingerprint {
        /// The database, as for `serve`
        #[arg(long, env = "WASMDM_DATABASE", value_name = "URL", default_value = "sqlite")]
        database: String,
        /// The data directory, as for `serve`
        #[arg(long, env = "WASMDM_DATA", value_name = "DIR", default_value = "data")]
        data: PathBuf,
    },
}

/// Runs it; exit code 1 if something was found.
pub async fn run(command: DbCommand) -> anyhow::Result<ExitCode> {
    let mut out = std::io::stdout();
    match command {
        DbCommand::Fingerprint { database, data } => {
            let storage = Storage::open_read_only(&database_url(&database, &data)?).await.context("database")?;
            for (table, digest) in storage.fingerprint().await.context("database")? {
                writeln!(out, "{digest}  {table}")?;
            }
            storage.close().await.context("database")?;
            Ok(ExitCode::SUCCESS)
        }
        DbCommand::Backup { database, data, file } => {
            let storage = Storage::open_read_only(&database_url(&database, &data)?).await.context("database")?;
            storage.backup(&file).await.context("file")?;
            storage.close().await.context("database")?;
            writeln!(out, "{}: {} bytes", file.display(), std::fs::metadata(&file)?.len())?;
            Ok(ExitCode::SUCCESS)
        }
        DbCommand::DeadLetters { database, data, limit } => {
            let storage = Storage::open_read_only(&database_url(&database, &data)?).await.context("database")?;
            for letter in storage.dead_letters(&TenantId::default(), None, limit).await.context("database")? {
                writeln!(out, "{}", dead_letters::line(&letter))?;
            }
            storage.close().await.context("database")?;
            Ok(ExitCode::SUCCESS)
        }
        DbCommand::Check { database, data, journal } => {
            let storage = Storage::open_read_only(&database_url(&database, &data)?).await.context("database")?;
            let mut findings: Vec<String> = storage
                .check()
                .await
                .context("database")?
                .iter()
                .map(|finding| format!("{}: {} ({})", finding.invariant, finding.sentence, finding.what))
                .collect();
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
