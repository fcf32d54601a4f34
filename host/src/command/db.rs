//! `wasmdm db …`.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Subcommand;
use wasmdm_protocol::enrollment::TenantId;
use wasmdm_service::clock::Clock as _;
use wasmdm_storage::keyring::add_new_key;
use wasmdm_storage::sealing::{Census, SealingKey};
use wasmdm_storage::{OpenOptions, Storage};

use crate::clock::SystemClock;
use crate::config::{database_url, keyring};
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
        /// The key file, as for `serve`
        #[arg(long, env = "WASMDM_KEY_FILE", value_name = "FILE")]
        key_file: Option<PathBuf>,
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
        /// The key file, as for `serve`
        #[arg(long, env = "WASMDM_KEY_FILE", value_name = "FILE")]
        key_file: Option<PathBuf>,
        /// How many
        #[arg(long, value_name = "N", default_value_t = 100)]
        limit: u32,
    },
    /// Make a key and put it in front of those of a key file, which is made if there is none; the next start of the server seals with it
    NewKey {
        /// The key file
        file: PathBuf,
        /// What the key is called in the file [default: today's date]
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
    },
    /// Count the values that can hold a secret: how many are sealed under each key, and how many are in plain; a running server is not disturbed
    Keys {
        /// The database, as for `serve`
        #[arg(long, env = "WASMDM_DATABASE", value_name = "URL", default_value = "sqlite")]
        database: String,
        /// The data directory, as for `serve`
        #[arg(long, env = "WASMDM_DATA", value_name = "DIR", default_value = "data")]
        data: PathBuf,
    },
    /// Seal every value with the first key of the key file, and write the whole database file anew; the server must be stopped
    Reseal {
        /// The database, as for `serve`
        #[arg(long, env = "WASMDM_DATABASE", value_name = "URL", default_value = "sqlite")]
        database: String,
        /// The data directory, as for `serve`
        #[arg(long, env = "WASMDM_DATA", value_name = "DIR", default_value = "data")]
        data: PathBuf,
        /// The key file, as for `serve`
        #[arg(long, env = "WASMDM_KEY_FILE", value_name = "FILE")]
        key_file: PathBuf,
        /// Make every value plain instead, to go on without a key file
        #[arg(long)]
        plain: bool,
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

async fn open(database: &str, data: &Path, key_file: Option<&Path>) -> anyhow::Result<Storage> {
    Storage::open_read_only_with_keys(&database_url(database, data)?, keyring(key_file)?).await.context("database")
}

/// A line for each key, and one for what is plain.
fn use_of_keys(keys: &[SealingKey], census: &Census) -> String {
    let mut lines = format!("{:>10} values in plain\n", census.plain);
    for key in keys {
        let values = census.sealed.get(&key.id).copied().unwrap_or_default();
        let state = match (key.is_complete, key.is_clean) {
            (false, _) => "",
            (true, false) => "; all there are, but free parts of the file may hold older ones: see `wasmdm db reseal`",
            (true, true) => "; all there are",
        };
        // Writing to a string does not fail.
        let _ = writeln!(lines, "{values:>10} values under `{}` ({}){state}", key.name, key.id);
    }
    for (id, values) in census.sealed.iter().filter(|(id, _)| !keys.iter().any(|key| key.id == **id)) {
        let _ = writeln!(lines, "{values:>10} values under a key that the database does not know ({id})");
    }
    lines
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
        DbCommand::NewKey { file, name } => {
            let name = name.unwrap_or_else(|| SystemClock.now().to_string().chars().take("2000-01-01".len()).collect());
            let keys = add_new_key(&file, &name)?;
            writeln!(
                out,
                "{}: the key `{name}` is the first of {keys}. Keep a copy of the file apart from backups of the database.",
                file.display()
            )?;
            Ok(ExitCode::SUCCESS)
        }
        DbCommand::Keys { database, data } => {
            let storage = Storage::open_read_only(&database_url(&database, &data)?).await.context("database")?;
            let (keys, census) = (storage.sealing_keys().await.context("database")?, storage.sealing_census().await.context("database")?);
            storage.close().await.context("database")?;
            write!(out, "{}", use_of_keys(&keys, &census))?;
            Ok(ExitCode::SUCCESS)
        }
        DbCommand::Reseal { database, data, key_file, plain } => {
            let options = OpenOptions { url: database_url(&database, &data)?, now: SystemClock.now() };
            let values = Storage::reseal(options, keyring(Some(&key_file))?, plain).await.context("database")?;
            let how = if plain { "made plain" } else { "sealed anew" };
            writeln!(out, "{values} values were {how}, and the file was written anew")?;
            Ok(ExitCode::SUCCESS)
        }
        DbCommand::DeadLetters { database, data, key_file, limit } => {
            let storage = open(&database, &data, key_file.as_deref()).await?;
            for letter in storage.dead_letters(&TenantId::default(), None, limit).await.context("database")? {
                writeln!(out, "{}", dead_letters::line(&letter))?;
            }
            storage.close().await.context("database")?;
            Ok(ExitCode::SUCCESS)
        }
        DbCommand::Check { database, data, key_file, journal } => {
            let storage = open(&database, &data, key_file.as_deref()).await?;
            if key_file.is_none() && !storage.sealing_keys().await.context("database")?.is_empty() {
                writeln!(out, "sealed values are not looked into: give --key-file for that")?;
            }
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
