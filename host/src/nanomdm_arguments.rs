//! NanoMDM's command line, understood where it means the same.
//!
//! Go's flags have one dash or two (`-ca FILE`, `--ca=FILE`), and each has a variable (`NANOMDM_CA`). They become our own here, before
//! anything else reads the arguments; what has no equivalent is refused in words that say what to do instead.

use std::ffi::{OsStr, OsString};

/// What a flag of NanoMDM is here.
enum Meaning {
    /// The same, with a value.
    Value(&'static str),
    /// The same, on or off: the argument that it is when it is on, and when it is off. None: off is what it is without an argument, too.
    Switch(&'static str, Option<&'static str>),
    /// Not to be had; what to do instead.
    Refused(&'static str),
}

impl Meaning {
    /// The flag of ours.
    fn ours(&self) -> &'static str {
        match self {
            Self::Value(ours) => ours,
            Self::Switch(argument, _) => argument.split('=').next().unwrap_or(argument),
            Self::Refused(_) => "",
        }
    }
}

const ONE_DATABASE: &str = "state is in one database: write --database sqlite://PATH; what another store holds is not read";

const FLAGS: &[(&str, Meaning)] = &[
    ("listen", Meaning::Value("--listen")),
    ("api", Meaning::Value("--api-key")),
    ("ca", Meaning::Value("--ca")),
    ("intermediate", Meaning::Value("--intermediate")),
    ("cert-header", Meaning::Value("--cert-header")),
    ("dm", Meaning::Value("--dm")),
    ("dm-send-hmac-key", Meaning::Value("--dm-send-hmac-key")),
    ("dm-recv-hmac-key", Meaning::Value("--dm-recv-hmac-key")),
    ("auth-proxy-url", Meaning::Value("--auth-proxy-url")),
    ("webhook-url", Meaning::Value("--webhook-url")),
    ("webhook-hmac-key", Meaning::Value("--webhook-hmac-key")),
    ("ua-zl-dc", Meaning::Switch("--ua-zl-dc", Some("--ua-zl-dc=false"))),
    ("migration", Meaning::Switch("--migration", Some("--migration=false"))),
    (DUMP, Meaning::Switch("--dump=-", Some("--dump="))),
    ("debug", Meaning::Switch("--log-level=debug", None)),
    (VERSION, Meaning::Switch("--version", None)),
    ("checkin", Meaning::Switch("--checkin", Some("--checkin=false"))),
    ("disable-mdm", Meaning::Switch("--disable-mdm", Some("--disable-mdm=false"))),
    ("storage", Meaning::Refused(ONE_DATABASE)),
    ("storage-dsn", Meaning::Refused(ONE_DATABASE)),
    (DSN, Meaning::Refused(ONE_DATABASE)),
    ("storage-options", Meaning::Refused("there are no options of the database to set")),
    ("retro", Meaning::Switch("--retro", Some("--retro=false"))),
];

/// Its name is ours too, and there it takes a file.
const DUMP: &str = "dump";
/// The two that have no variable.
const VERSION: &str = "version";
const DSN: &str = "dsn";

/// The arguments as our own.
#[derive(Debug, Default)]
pub struct Translated {
    /// Without the program's name.
    pub arguments: Vec<OsString>,
    /// Names of our flags whose value was given in NanoMDM's way.
    pub of_nanomdm: Vec<&'static str>,
}

/// The arguments with NanoMDM's flags and variables as our own. Only a command line that runs the server is looked at: `serve …`, one that
/// begins with a flag, as NanoMDM's do, or an empty one beside NanoMDM's variables, as a container has it.
///
/// # Errors
/// A sentence that names the flag or the variable.
pub fn translate(arguments: Vec<OsString>, variable: impl Fn(&str) -> Option<OsString>) -> Result<Translated, String> {
    // An empty value is what Go's flags begin with: not given.
    let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
    let is_serve = arguments.first().is_some_and(|first| first == "serve");
    let is_nanomdm = match arguments.first() {
        Some(first) => Flag::of(first).is_some_and(|flag| flag.is_single || flag.meaning().is_some()),
        None => FLAGS.iter().any(|(flag, _)| variable_of(flag).is_some_and(|name| variable(&name).is_some())),
    };
    if !is_serve && !is_nanomdm {
        return Ok(Translated { arguments, of_nanomdm: Vec::new() });
    }
    let mut line = Line::default();
    let mut rest = arguments.into_iter().skip(usize::from(is_serve));
    while let Some(argument) = rest.next() {
        let flag = Flag::of(&argument);
        match flag.as_ref().map(|flag| (flag, flag.meaning())) {
            Some((flag, None)) if flag.is_single => return Err(format!("{}: there is no such flag; `wasmdm serve --help` lists them", flag.said())),
            Some((flag, Some(meaning))) if flag.is_nanomdms(meaning, is_serve) => match meaning {
                Meaning::Value(ours) => {
                    let value = flag.value.map(OsString::from).or_else(|| rest.next()).ok_or_else(|| format!("{}: it needs a value", flag.said()))?;
                    line.give(ours, (!value.is_empty()).then(|| joined(ours, &value)));
                }
                Meaning::Switch(on, off) => {
                    let is_on = is_on(&flag.said(), flag.value)?;
                    // `--version` is the program's, not the command's.
                    if is_on && flag.name == VERSION {
                        return Ok(Translated { arguments: vec![OsString::from(*on)], of_nanomdm: Vec::new() });
                    }
                    line.give(meaning.ours(), if is_on { Some(*on) } else { *off }.map(OsString::from));
                }
                Meaning::Refused(instead) => return Err(format!("{}: {instead}", flag.said())),
            },
            _ => line.pass(argument),
        }
    }
    for (flag, meaning) in FLAGS {
        let Some(named) = variable_of(flag) else { continue };
        let Some(value) = variable(&named) else { continue };
        if let Meaning::Refused(instead) = meaning {
            return Err(format!("{named}: {instead}"));
        }
        let ours = meaning.ours();
        let or_file = |name: &str, suffix: &str| [name.to_owned(), format!("{name}{suffix}")];
        let our_variable = variable_name("WASMDM_", ours.trim_start_matches('-'));
        if line.has(&or_file(ours, "-file")) || or_file(&our_variable, "_FILE").iter().any(|name| variable(name).is_some()) {
            continue;
        }
        match meaning {
            Meaning::Value(ours) => line.give(ours, Some(joined(ours, &value))),
            Meaning::Switch(on, off) => {
                let is_on = is_on(&named, Some(&value.to_string_lossy()))?;
                line.give(ours, if is_on { Some(*on) } else { *off }.map(OsString::from));
            }
            Meaning::Refused(_) => {}
        }
    }
    Ok(line.end())
}

/// A command line on its way.
#[derive(Default)]
struct Line {
    /// Ours, as they came.
    passed: Vec<OsString>,
    /// NanoMDM's, each as one argument of ours, with the name of our flag.
    given: Vec<(&'static str, OsString)>,
    /// All flags of ours that stood there, also those that were switched off.
    seen: Vec<String>,
}

impl Line {
    fn pass(&mut self, argument: OsString) {
        self.seen.extend(argument.to_str().and_then(|text| text.split('=').next()).map(str::to_owned));
        self.passed.push(argument);
    }

    /// The last one counts, as in Go.
    fn give(&mut self, ours: &'static str, argument: Option<OsString>) {
        self.seen.push(ours.to_owned());
        self.given.retain(|(given, _)| *given != ours);
        self.given.extend(argument.map(|argument| (ours, argument)));
    }

    fn has(&self, names: &[String]) -> bool {
        self.seen.iter().any(|seen| names.contains(seen))
    }

    fn end(self) -> Translated {
        let of_nanomdm = self.given.iter().map(|(ours, _)| ours.trim_start_matches('-')).collect();
        let given = self.given.into_iter().map(|(_, argument)| argument);
        Translated { arguments: std::iter::once(OsString::from("serve")).chain(self.passed).chain(given).collect(), of_nanomdm }
    }
}

/// An argument that Go would take for a flag. One letter behind one dash is ours (`-h`, `-V`).
struct Flag<'a> {
    /// It has one dash, as none of ours has.
    is_single: bool,
    name: &'a str,
    value: Option<&'a str>,
}

impl<'a> Flag<'a> {
    fn of(argument: &'a OsString) -> Option<Self> {
        let text = argument.to_str()?.strip_prefix('-')?;
        let (is_single, text) = text.strip_prefix('-').map_or((true, text), |text| (false, text));
        let (name, value) = text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value)));
        (name.len() > 1).then_some(Self { is_single, name, value })
    }

    fn meaning(&self) -> Option<&'static Meaning> {
        FLAGS.iter().find(|(flag, _)| *flag == self.name).map(|(_, meaning)| meaning)
    }

    /// Whether it is to be read as NanoMDM reads it. With two dashes it may be one of ours.
    fn is_nanomdms(&self, meaning: &Meaning, is_serve: bool) -> bool {
        let is_ours = match meaning {
            // Without a value in it, it may have a file behind it.
            Meaning::Switch(..) if self.name == DUMP => self.value.is_none_or(|value| switch(value).is_none()),
            Meaning::Switch(..) | Meaning::Refused(_) => false,
            Meaning::Value(ours) => is_serve && ours.trim_start_matches('-') == self.name,
        };
        self.is_single || !is_ours
    }

    fn said(&self) -> String {
        format!("{}{}", if self.is_single { "-" } else { "--" }, self.name)
    }
}

/// In one argument, because a value may begin with a dash.
fn joined(flag: &str, value: &OsStr) -> OsString {
    let mut argument = OsString::from(flag);
    argument.push("=");
    argument.push(value);
    argument
}

fn variable_of(flag: &str) -> Option<String> {
    (flag != VERSION && flag != DSN).then(|| variable_name("NANOMDM_", flag))
}

fn variable_name(prefix: &str, flag: &str) -> String {
    format!("{prefix}{}", flag.to_ascii_uppercase().replace('-', "_"))
}

fn is_on(name: &str, value: Option<&str>) -> Result<bool, String> {
    value.map_or(Some(true), switch).ok_or_else(|| format!("{name}: write true or false"))
}

/// As Go reads a switch.
fn switch(value: &str) -> Option<bool> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(arguments: &str, variables: &[(&str, &str)]) -> Result<Translated, String> {
        let arguments = arguments.split_whitespace().map(|argument| OsString::from(argument.replace("EMPTY", ""))).collect();
        let variable = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value));
        translate(arguments, variable)
    }

    fn run(arguments: &str, variables: &[(&str, &str)]) -> Result<String, String> {
        all(arguments, variables).map(|line| line.arguments.iter().map(|text| text.to_string_lossy()).collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn a_command_line_of_nanomdm_runs_the_server() {
        let line = "-ca ca.pem -api=secret -listen :9001 -checkin -debug -ua-zl-dc=false -webhook-url http://a/?x=1";
        let ours = "serve --ca=ca.pem --api-key=secret --listen=:9001 --checkin --log-level=debug --ua-zl-dc=false --webhook-url=http://a/?x=1";
        assert_eq!(run(line, &[]).unwrap(), ours);
        assert_eq!(run(&format!("serve {line}"), &[]).unwrap(), ours);
        assert_eq!(run("-version", &[]).unwrap(), "--version");
    }

    #[test]
    fn every_flag_of_nanomdm_that_has_an_equivalent_becomes_it() {
        let line = "-auth-proxy-url http://a/ -migration -dump -disable-mdm -checkin=0";
        assert_eq!(run(line, &[]).unwrap(), "serve --auth-proxy-url=http://a/ --migration --dump=- --disable-mdm --checkin=false");
        let variables = [
            ("NANOMDM_AUTH_PROXY_URL", "http://a/"),
            ("NANOMDM_CHECKIN", "1"),
            ("NANOMDM_MIGRATION", "true"),
            ("NANOMDM_DUMP", "true"),
            ("NANOMDM_DISABLE_MDM", "0"),
        ];
        assert_eq!(
            run("serve --dump=./f", &variables).unwrap(),
            "serve --dump=./f --auth-proxy-url=http://a/ --migration --checkin --disable-mdm=false"
        );
    }

    /// A container's image has no arguments, and clap printed its help and ended.
    #[test]
    fn variables_of_nanomdm_and_no_argument_run_the_server() {
        let variables = [("NANOMDM_CA", "ca.pem"), ("NANOMDM_API", "key")];
        assert_eq!(run("", &variables).unwrap(), "serve --api-key=key --ca=ca.pem");
        assert_eq!(run("", &[("NANOMDM_CA", ""), ("NANOMDM_DSN", "x"), ("NANOMDM_VERSION", "1")]).unwrap(), "");
        assert!(run("", &[("NANOMDM_STORAGE", "filekv")]).unwrap_err().starts_with("NANOMDM_STORAGE: "));
    }

    /// A unit file that leaves what it does not use empty did not start.
    #[test]
    fn an_empty_value_is_none() {
        let empty = ["NANOMDM_WEBHOOK_URL", "NANOMDM_DM", "NANOMDM_INTERMEDIATE", "NANOMDM_CERT_HEADER", "NANOMDM_DM_SEND_HMAC_KEY", "NANOMDM_API"];
        assert_eq!(run("serve", &empty.map(|name| (name, ""))).unwrap(), "serve");
        assert_eq!(run("-ca ca.pem -webhook-url EMPTY -intermediate=", &[("NANOMDM_WEBHOOK_URL", "http://a/")]).unwrap(), "serve --ca=ca.pem");
        assert_eq!(run("serve", &[("NANOMDM_CA", "ca.pem"), ("WASMDM_CA", "")]).unwrap(), "serve --ca=ca.pem");
    }

    /// Go does not count dashes, and `--dump=true` made a file of that name.
    #[test]
    fn two_dashes_are_as_good_as_one() {
        assert_eq!(run("--ca ca.pem --checkin --data d", &[]).unwrap(), "serve --data d --ca=ca.pem --checkin");
        assert_eq!(
            run("serve --api K --debug --checkin=true --retro=0", &[]).unwrap(),
            "serve --api-key=K --log-level=debug --checkin --retro=false"
        );
        assert_eq!(run("serve --dump=true", &[]).unwrap(), "serve --dump=-");
        assert_eq!(run("serve --dump=false", &[("NANOMDM_DUMP", "1")]).unwrap(), "serve --dump=");
        assert_eq!(run("serve --dump", &[]).unwrap(), "serve --dump");
        assert!(run("serve --dsn x", &[]).unwrap_err().starts_with("--dsn: state is in one database"));
        assert!(run("serve --checkin=perhaps", &[]).unwrap_err().starts_with("--checkin: "));
        assert!(run("--ca", &[]).unwrap_err().starts_with("--ca: it needs a value"));
    }

    /// A switch that was off was left out, and `WASMDM_MIGRATION=true` or the file kept the door open.
    #[test]
    fn a_switch_that_is_off_says_so() {
        let open = [("WASMDM_MIGRATION", "true"), ("WASMDM_DUMP", "-")];
        assert_eq!(run("-migration=false -dump=false -retro=0", &open).unwrap(), "serve --migration=false --dump= --retro=false");
        assert_eq!(run("serve --migration=f --migration --migration=F", &[]).unwrap(), "serve --migration=false");
        assert_eq!(run("serve", &[("NANOMDM_MIGRATION", "false"), ("NANOMDM_RETRO", "0")]).unwrap(), "serve --migration=false --retro=false");
        assert_eq!(run("serve", &[("NANOMDM_MIGRATION", "false"), open[0]]).unwrap(), "serve", "ours counts");
        assert_eq!(run("serve -debug=false -version=false", &[]).unwrap(), "serve");
    }

    #[test]
    fn a_value_may_begin_with_a_dash_and_the_last_one_counts() {
        assert_eq!(run("-api -K -webhook-hmac-key=--", &[]).unwrap(), "serve --api-key=-K --webhook-hmac-key=--");
        assert_eq!(run("-ca one.pem -checkin -ca two.pem -checkin=f", &[]).unwrap(), "serve --ca=two.pem --checkin=false");
    }

    #[test]
    fn what_was_given_in_nanomdms_way_is_known() {
        let line = all("serve -dm-send-hmac-key k --webhook-hmac-key h", &[("NANOMDM_DM_RECV_HMAC_KEY", "r")]).unwrap();
        assert_eq!(line.of_nanomdm, ["dm-send-hmac-key", "dm-recv-hmac-key"]);
        assert_eq!(all("--ca c --webhook-hmac-key h", &[]).unwrap().of_nanomdm, ["ca", "webhook-hmac-key"]);
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
        assert_eq!(run("serve --api-key-file f", &variables).unwrap(), "serve --api-key-file f --ca=ca.pem --ua-zl-dc");
        assert_eq!(run("serve", &[("NANOMDM_API", "key"), ("WASMDM_API_KEY_FILE", "f")]).unwrap(), "serve");
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
        assert!(run("serve", &[("NANOMDM_STORAGE", "filekv")]).unwrap_err().starts_with("NANOMDM_STORAGE: "));
    }
}
