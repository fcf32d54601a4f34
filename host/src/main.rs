//! Arguments in, exit code out.

use std::process::ExitCode;

fn main() -> ExitCode {
    wasmdm::command_line::main()
}
