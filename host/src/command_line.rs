//! Every subcommand on one page.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::command;
use crate::config::ServeOptions;
use crate::nanomdm_arguments;

/// An Apple MDM server with sandboxed WebAssembly plugins.
#[derive(Debug, Parser)]
#[command(name = "wasmdm", version, max_term_width = 110, after_help = "Start with `wasmdm demo`.")]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the server
    Serve(Box<ServeOptions>),
    /// Show the product in a minute: simulated devices, plugins, one of them swapped half way
    Demo(command::demo::DemoOptions),
    /// Simulate devices against any MDM server
    Simulate(Box<command::simulate::SimulateOptions>),
    /// Work on plugins
    #[command(subcommand)]
    Plugin(command::plugin::PluginCommand),
    /// Get, renew and list push certificates
    #[command(subcommand)]
    PushCertificate(command::push_certificate::PushCertificateCommand),
    /// Work on the database
    #[command(subcommand)]
    Db(command::db::DbCommand),
    /// Compiles one component, from standard input to standard output; the server starts this
    #[command(name = "__compile-plugin", hide = true)]
    CompilePlugin,
}

/// Parses the arguments and runs the command; the exit code is 0, 1 for a failure, 2 for wrong arguments.
pub fn main() -> ExitCode {
    // Before a runtime is started: the child limits its own memory.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == "__compile-plugin") {
        return wasmdm_plugin_runtime::loading::compile_child_main();
    }
    let program = std::env::args_os().take(1);
    let given = match nanomdm_arguments::translate(std::env::args_os().skip(1).collect(), |name| std::env::var_os(name)) {
        Ok(given) => given,
        Err(problem) => {
            complain(&format!("error: {problem}"));
            return ExitCode::from(2);
        }
    };
    let mut arguments = CommandLine::parse_from(program.chain(given.arguments));
    if let Command::Serve(options) = &mut arguments.command {
        options.of_nanomdm = given.of_nanomdm;
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error.into()),
    };
    let outcome = runtime.block_on(async {
        match arguments.command {
            Command::Serve(options) => command::serve::run(*options).await,
            Command::Demo(options) => command::demo::run(options).await,
            Command::Simulate(options) => command::simulate::run(*options).await,
            Command::Plugin(plugin) => command::plugin::run(plugin).await,
            Command::PushCertificate(push_certificate) => command::push_certificate::run(push_certificate).await,
            Command::Db(db) => command::db::run(db).await,
            Command::CompilePlugin => Ok(wasmdm_plugin_runtime::loading::compile_child_main()),
        }
    });
    match outcome {
        Ok(code) => code,
        Err(error) => failed(&error),
    }
}

fn failed(error: &anyhow::Error) -> ExitCode {
    complain(&format!("wasmdm: {error:#}"));
    ExitCode::FAILURE
}

fn complain(line: &str) {
    use std::io::Write as _;
    // Nobody is left to be told if standard error is closed.
    drop(writeln!(std::io::stderr(), "{line}"));
}
