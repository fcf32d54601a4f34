//! `wasmdm serve`.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};
use wasmdm_plugin_runtime::loading::CompilerCommand;

use crate::clock::SystemClock;
use crate::config::ServeOptions;
use crate::logging;
use crate::wiring::{RunningServer, Surroundings};

/// Serves until SIGINT or SIGTERM; SIGHUP looks for plugins.
pub async fn run(options: ServeOptions) -> anyhow::Result<ExitCode> {
    let config = options.resolve()?;
    logging::start(config.log_format, &config.log_level)?;
    for remark in &config.remarks {
        warn!("{remark}");
    }
    // Listened for from the start: a signal during a long start must not be lost.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let server = RunningServer::start(config, production()?).await?;
    loop {
        tokio::select! {
            _ = hang_up.recv() => {
                info!("SIGHUP: looking for plugins");
                server.plugins.rescan();
            }
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
        }
    }
    info!("Stopping");
    server.stop().await?;
    Ok(ExitCode::SUCCESS)
}

/// The surroundings of a real server.
pub fn production() -> anyhow::Result<Surroundings> {
    Ok(Surroundings {
        clock: Arc::new(SystemClock),
        compiler: CompilerCommand {
            program: std::env::current_exe().context("the server's own program cannot be found")?,
            args: vec!["__compile-plugin".into()],
        },
        pusher: None,
    })
}
