//! `wasmdm-fuzz corpus` writes the corpus; `wasmdm-fuzz repeat TARGET FILE` runs a target over a file.

use std::process::ExitCode;

use wasmdm_fuzz::{Target, corpus, cost};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["corpus"] => corpus::write().map(|count| format!("{count} files")).map_err(|error| error.to_string()),
        ["targets"] => Ok(Target::ALL.map(Target::name).join("\n")),
        ["repeat", target, file] => repeat(target, file),
        _ => Err("usage: wasmdm-fuzz corpus | targets | repeat TARGET FILE".into()),
    };
    match done {
        Ok(text) => {
            say(&text);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn repeat(target: &str, file: &str) -> Result<String, String> {
    let target = Target::from_name(target).ok_or_else(|| format!("there is no target `{target}`"))?;
    let input = std::fs::read(file).map_err(|error| format!("{file}: {error}"))?;
    let (outcome, memory) = cost::memory_of(|| target.check(&input));
    Ok(format!("{outcome} ({} bytes of input, {memory} bytes of memory at once)", input.len()))
}

#[expect(clippy::print_stdout, reason = "what the command is asked for")]
fn say(text: &str) {
    println!("{text}");
}
