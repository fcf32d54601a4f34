//! `wasmdm push-certificate …`: from no push certificate to one that a running server uses, and which ones it has.
//!
//! Keys and passwords are read from files and the environment only, never from arguments, and leave this process for the server alone.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Subcommand;

mod import;
mod list;
mod request;
mod server;

/// Get, renew and list push certificates.
#[derive(Debug, Subcommand)]
pub enum PushCertificateCommand {
    /// Make a key and a signing request, which a vendor signs, and say what comes next; again, it goes on with the same key
    Request(request::RequestOptions),
    /// Check a certificate from Apple with its key, and store both at a running server, which uses them from the next push on
    Import(import::ImportOptions),
    /// List the server's push topics: when each certificate ends, and how many devices and users depend on it
    List(list::ListOptions),
}

/// Runs it.
pub async fn run(command: PushCertificateCommand) -> anyhow::Result<ExitCode> {
    match command {
        PushCertificateCommand::Request(options) => request::run(&options),
        PushCertificateCommand::Import(options) => import::run(options).await,
        PushCertificateCommand::List(options) => list::run(&options).await,
    }
}

/// Certificates and keys are a few kilobytes; a path to something else must not fill the memory.
const LARGEST_FILE: u64 = 1 << 20;

fn read(field: &str, path: &Path) -> anyhow::Result<Vec<u8>> {
    let unreadable = || format!("{field}: {} cannot be read", path.display());
    let length = std::fs::metadata(path).with_context(unreadable)?.len();
    anyhow::ensure!(length <= LARGEST_FILE, "{field}: {} is too large for a certificate or a key", path.display());
    std::fs::read(path).with_context(unreadable)
}

/// The password of that file, or of that variable; `-` is standard input. A newline at its end is none of it.
fn password(field: &str, file: Option<&Path>, variable: &str) -> anyhow::Result<Option<String>> {
    let text = match file {
        Some(path) if path == Path::new("-") => {
            let mut line = String::new();
            std::io::stdin().read_line(&mut line).with_context(|| format!("{field}: standard input cannot be read"))?;
            line
        }
        Some(path) => String::from_utf8(read(field, path)?).map_err(|_| anyhow::anyhow!("{field}: {} is no text", path.display()))?,
        None => match std::env::var(variable) {
            Ok(text) => text,
            Err(std::env::VarError::NotPresent) => return Ok(None),
            Err(std::env::VarError::NotUnicode(_)) => anyhow::bail!("{variable}: it is no text"),
        },
    };
    Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned()))
}
