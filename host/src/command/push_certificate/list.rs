//! `wasmdm push-certificate list`.

use std::io::Write as _;
use std::process::ExitCode;

use clap::Args;

use super::server::{Listed, ServerOptions};

/// List the server's push topics.
#[derive(Debug, Args)]
pub struct ListOptions {
    #[command(flatten)]
    server: ServerOptions,
    /// Print the server's JSON
    #[arg(long)]
    json: bool,
}

/// Prints a line for each topic.
pub(super) async fn run(options: &ListOptions) -> anyhow::Result<ExitCode> {
    let (answer, topics) = options.server.connect()?.topics().await?;
    let mut out = std::io::stdout();
    if options.json {
        writeln!(out, "{answer:#}")?;
        return Ok(ExitCode::SUCCESS);
    }
    if topics.is_empty() {
        writeln!(out, "there is no push certificate: get one with `wasmdm push-certificate request`")?;
        return Ok(ExitCode::SUCCESS);
    }
    let width = topics.iter().map(|topic| topic.topic.chars().count()).max().unwrap_or_default();
    writeln!(out, "{:width$}  {:20}  {:>9}  {:>8}", "TOPIC", "ENDS", "DAYS LEFT", "CHANNELS")?;
    for Listed { topic, not_after, days_left, channels } in &topics {
        let ends = not_after.as_deref().unwrap_or("no certificate");
        let days = match days_left {
            Some(0) => "expired".to_owned(),
            Some(days) => days.to_string(),
            None => "-".to_owned(),
        };
        writeln!(out, "{topic:width$}  {ends:20}  {days:>9}  {channels:>8}")?;
    }
    Ok(ExitCode::SUCCESS)
}
