//! Compiles one plugin: a component on standard input, native code on standard output. The server does this by re-running itself; tests and
//! tools that are not the server run this program.

use std::process::ExitCode;

fn main() -> ExitCode {
    wasmdm_plugin_runtime::loading::compile_child_main()
}
