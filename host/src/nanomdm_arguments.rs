//! NanoMDM's command line, understood where it means the same.
//!
//! Go's flags have one dash (`-ca FILE`, `-ca=FILE`), and each has a variable (`NANOMDM_CA`). They become our own here, before anything else
//! reads the arguments; what has no equivalent is refused in words that say what to do instead.

use std::ffi::OsString;

/// What a flag of NanoMDM is here.
enum Meaning {
    /// The same, with a value.
    Value(&'static str),
    /// The same, on or off.
    Switch(&'static [&'static str]),
    /// Nothing has to be done for it.
    Always,
    /// Not to be had; what to do instead.
    Refused(&'static str),
}

const FLAGS: &[(&str, Meaning)] = &[
    ("listen", Meaning::Value("--listen")),
    ("api", Meaning::Value("--api-key")),
    ("ca", Meaning::Value("--ca")),
    ("intermediate", Meaning::Value("--intermediate")),
    ("cert-header", Meaning::Value("--cert-header")),
    ("dm", Meaning::Value("--dm")),
    ("dm-send-hmac-key", Meaning::Value("--dm-send-hmac-key")),
    ("dm-recv-hmac-key", Meaning::Value("--dm-recv-hmac-key")),
    ("webhook-url", Meaning::Value("--webhook-url")),
    ("webhook-hmac-key", Meaning::Value("--webhook-hmac-key")),
    ("ua-zl-dc", Meaning::Switch(&["--ua-zl-dc"])),
    ("debug", Meaning::Switch(&["--log-level", "debug"])),
    ("version", Meaning::Switch(&["--version"])),
    // /checkin is always there, and /mdm tells check-ins from reports by their content type.
    ("checkin", Meaning::Always),
    ("storage", Meaning::Refused("state is in one database: write --database sqlite://PATH; what another store holds is not read")),
    ("storage-dsn", Meaning::Refused("state is in one database: write --database sqlite://PATH; what another store holds is not read")),
    ("dsn", Meaning::Refused("state is in one database: write --database sqlite://PATH; what another store holds is not read")),
    ("storage-options", Meaning::Refused("there are no options of the database to set")),
    ("disable-mdm", Meaning::Refused("devices are always served; keep /mdm and /checkin from clients at the proxy")),
    ("auth-proxy-url", Meaning::Refused("this version has no authentication proxy")),
    ("migration", Meaning::Refused("this version has no /migration")),
    ("retro", Meaning::Switch(&["--retro"])),
    ("dump", Meaning::Refused("messages are not dumped, as they hold secrets: write --log-level debug")),
];

/// The arguments with NanoMDM's flags and variables as our own. Only a command line that runs the server is looked at: `serve …`, or one
/// that begins with a flag, as NanoMDM's do.
///
/// # Errors
/// A sentence that names the flag or the variable.
pub fn translate(arguments: Vec<OsString>, variable: impl Fn(&str) -> Option<OsString>) -> Result<Vec<OsString>, String> {
    let is_serve = arguments.first().is_some_and(|first| first == "serve");
    let is_nanomdm = arguments.first().and_then(flag_of).is_some();
    if !is_serve && !is_nanomdm {
        return Ok(arguments);
    }
    let mut translated = vec![OsString::from("serve")];
    let mut rest = arguments.into_iter().skip(usize::from(is_serve));
    let mut seen = Vec::new();
    while let Some(argument) = rest.next() {
        let Some((name, value)) = flag_of(&argument) else {
            seen.extend(argument.to_str().and_then(|text| text.split('=').next()).map(str::to_owned));
            translated.push(argument);
            continue;
        };
        let Some((_, meaning)) = FLAGS.iter().find(|(flag, _)| *flag == name) else {
            return Err(format!("-{name}: there is no such flag; `wasmdm serve --help` lists them"));
        };
        match meaning {
            Meaning::Value(ours) => {
                let value = value.map(OsString::from).or_else(|| rest.next()).ok_or_else(|| format!("-{name}: it needs a value"))?;
                seen.push((*ours).to_owned());
                translated.extend([OsString::from(ours), value]);
            }
            Meaning::Switch(ours) => {
                seen.extend(ours.first().map(|ours| (*ours).to_owned()));
                if is_on(&format!("-{name}"), value.as_deref())? {
                    // `--version` is the program's, not the command's.
                    if name == "version" {
                        return Ok(vec![OsString::from("--version")]);
                    }
                    translated.extend(ours.iter().map(OsString::from));
                }
            }
            Meaning::Always => {}
            Meaning::Refused(instead) => return Err(format!("-{name}: {instead}")),
        }
    }
    for (flag, meaning) in FLAGS {
        let named = variable_name("NANOMDM_", flag);
        let Some(value) = variable(&named) else { continue };
        let ours = match meaning {
            Meaning::Value(ours) => ours,
            Meaning::Switch(ours) if *flag != "version" => ours.first().unwrap_or(&""),
            Meaning::Switch(_) | Meaning::Always => continue,
            Meaning::Refused(instead) => return Err(format!("{named}: {instead}")),
        };
        let is_given = seen.iter().any(|seen| seen == ours || *seen == format!("{ours}-file"));
        if is_given || variable(&variable_name("WASMDM_", ours.trim_start_matches('-'))).is_some() {
            continue;
        }
        match meaning {
            Meaning::Switch(ours) if is_on(&named, value.to_str())? => translated.extend(ours.iter().map(OsString::from)),
            Meaning::Value(ours) => translated.extend([OsString::from(ours), value]),
            Meaning::Switch(_) | Meaning::Always | Meaning::Refused(_) => {}
        }
    }
    Ok(translated)
}

/// Name and value of a flag with one dash. Ours have two; one letter is ours too (`-h`, `-V`).
fn flag_of(argument: &OsString) -> Option<(String, Option<String>)> {
    let text = argument.to_str()?.strip_prefix('-').filter(|text| !text.starts_with('-'))?;
    let (name, value) = text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value.to_owned())));
    (name.len() > 1).then(|| (name.to_owned(), value))
}

fn variable_name(prefix: &str, flag: &str) -> String {
    format!("{prefix}{}", flag.to_ascii_uppercase().replace('-', "_"))
}

/// As Go reads a switch.
fn is_on(name: &str, value: Option<&str>) -> Result<bool, String> {
    match value {
        None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        Some(_) => Err(format!("{name}: write true or false")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(arguments: &str, variables: &[(&str, &str)]) -> Result<String, String> {
        let arguments = arguments.split_whitespace().map(OsString::from).collect();
        let variable = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value));
        translate(arguments, variable).map(|translated| translated.iter().map(|text| text.to_string_lossy()).collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn a_command_line_of_nanomdm_runs_the_server() {
        let line = "-ca ca.pem -api=secret -listen :9001 -checkin -debug -ua-zl-dc=false -webhook-url http://a/?x=1";
        let ours = "serve --ca ca.pem --api-key secret --listen :9001 --log-level debug --webhook-url http://a/?x=1";
        assert_eq!(run(line, &[]).unwrap(), ours);
        assert_eq!(run(&format!("serve {line}"), &[]).unwrap(), ours);
        assert_eq!(run("-version", &[]).unwrap(), "--version");
    }

    #[test]
    fn our_own_arguments_stay_as_they_are() {
        for line in ["", "demo", "--help", "-h", "-V", "simulate --url http://a -x", "serve --ca ca.pem --data d -h"] {
            assert_eq!(run(line, &[]).unwrap(), line);
        }
    }

    #[test]
    fn variables_of_nanomdm_count_where_neither_a_flag_nor_ours_says_otherwise() {
        let variables =
            [("NANOMDM_CA", "ca.pem"), ("NANOMDM_API", "key"), ("NANOMDM_UA_ZL_DC", "true"), ("NANOMDM_LISTEN", ":1"), ("WASMDM_LISTEN", ":2")];
        assert_eq!(run("serve --api-key-file f", &variables).unwrap(), "serve --api-key-file f --ca ca.pem --ua-zl-dc");
        assert_eq!(
            run("serve --ca=mine.pem --ua-zl-dc", &[("NANOMDM_CA", "ca.pem"), ("NANOMDM_UA_ZL_DC", "1")]).unwrap(),
            "serve --ca=mine.pem --ua-zl-dc"
        );
        assert_eq!(run("demo", &variables).unwrap(), "demo");
    }

    #[test]
    fn what_has_no_equivalent_is_refused_with_what_to_do() {
        assert!(run("-ca ca.pem -storage pgsql -storage-dsn postgres://u:secret@h/d", &[]).unwrap_err().starts_with("-storage: "));
        assert!(run("serve -strage x", &[]).unwrap_err().contains("--help"));
        assert!(run("serve -ca", &[]).unwrap_err().starts_with("-ca: "));
        assert!(run("serve -ua-zl-dc=perhaps", &[]).unwrap_err().starts_with("-ua-zl-dc: "));
        assert!(run("serve", &[("NANOMDM_MIGRATION", "true")]).unwrap_err().starts_with("NANOMDM_MIGRATION: "));
    }
}
