//! `wasmdm plugin check`: what this server would say to a plugin, without a server.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::Instant;
use wasmdm_protocol::time::Timestamp;
use wasmdm_service::clock::Clock;

use crate::egress;
use crate::engine::Engines;
use crate::hook::Hook;
use crate::plugin::{PluginIdentity, explain_compile_error, link};
use crate::runtime::{Runtime, Services};

use super::candidate::{Candidate, Found, PluginFiles, size_of};
use super::compile::blocking;
use super::document::is_plugin_name;
use super::grant::{Grant, Secrets};
use super::loader::check_named_hooks;
use super::manifest::{Manifest, SERVER_VERSION};
use super::permissions::{Surroundings, effective, intersection};

/// What was found out about a plugin. Its text is for a person.
#[derive(Debug, Default)]
pub struct CheckReport {
    pub path: PathBuf,
    pub name: Option<String>,
    pub version: Option<String>,
    pub digest: Option<String>,
    /// Bytes of the component, for a person.
    pub size: Option<String>,
    pub hooks: BTreeSet<Hook>,
    /// Lines of a grant file without which it would not be loaded.
    pub required_grants: Vec<String>,
    pub compile_time: Option<Duration>,
    /// Each keeps the plugin from being loaded.
    pub problems: Vec<String>,
}

impl CheckReport {
    /// Whether the server would load it, given the grants that it requires.
    pub fn is_ok(&self) -> bool {
        self.problems.is_empty()
    }

    fn problem(mut self, problem: impl Into<String>) -> Self {
        self.problems.push(problem.into());
        self
    }
}

impl fmt::Display for CheckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.path.display())?;
        if let (Some(name), Some(version)) = (&self.name, &self.version) {
            writeln!(f, "  plugin    {name} {version}")?;
        }
        if let (Some(size), Some(digest)) = (&self.size, &self.digest) {
            writeln!(f, "  component {size}, sha256 {digest}")?;
        }
        if let Some(time) = self.compile_time {
            writeln!(f, "  compiled  in {} ms", time.as_millis())?;
        }
        if !self.hooks.is_empty() {
            let hooks: Vec<_> = self.hooks.iter().map(|hook| hook.as_str()).collect();
            writeln!(f, "  hooks     {}", hooks.join(", "))?;
        }
        if let (Some(name), false) = (&self.name, self.required_grants.is_empty()) {
            writeln!(f, "  requires, in plugins.d/{name}.toml:\n    [grants]")?;
            for line in &self.required_grants {
                writeln!(f, "    {line}")?;
            }
        }
        for problem in &self.problems {
            writeln!(f, "  problem   {problem}")?;
        }
        write!(f, "  {}", if self.is_ok() { "This server would load it." } else { "This server would not load it." })
    }
}

/// Checks a `.wasm` file, or a directory with a `plugin.toml`. Compiles in this process: whoever asks trusts the file that far.
pub async fn check_file(path: &Path) -> CheckReport {
    let report = CheckReport { path: path.to_owned(), ..CheckReport::default() };
    let path = path.to_owned();
    match blocking(move || read(&path)).await {
        Err(problem) => report.problem(problem),
        Ok((declared, Err(problem))) => CheckReport { name: declared.map(|manifest| manifest.name), ..report }.problem(problem),
        Ok((_, Ok(candidate))) => Box::pin(check(report, candidate)).await,
    }
}

fn read(path: &Path) -> (Option<Manifest>, Result<Candidate, String>) {
    let mut declared = None;
    let candidate = (|| {
        let real = path.canonicalize().map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
        let parent = real.parent().ok_or("it is no plugin")?;
        let file_name = real.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let (found, name) = if real.is_dir() {
            (Found::Directory(real.clone()), name_in_manifest(&real).unwrap_or_else(|| file_name.to_owned()))
        } else if real.with_file_name("plugin.toml").is_file() {
            // The component of a plugin's directory: its manifest belongs to it.
            (Found::Directory(parent.to_owned()), name_in_manifest(parent).unwrap_or_default())
        } else {
            (Found::Lone(real.clone()), file_name.strip_suffix(".wasm").filter(|name| is_plugin_name(name)).unwrap_or("plugin").to_owned())
        };
        // The manifest may name a file beside it, not elsewhere.
        let root = if real.is_dir() { &real } else { parent };
        PluginFiles { plugins_dir: root }.read(&name, &found, &mut declared).map_err(|rejection| rejection.reason)
    })();
    (declared, candidate)
}

/// A directory that is checked need not have its plugin's name yet.
fn name_in_manifest(directory: &Path) -> Option<String> {
    let text = std::fs::read_to_string(directory.join("plugin.toml")).ok()?;
    Manifest::parse(&text).ok().map(|manifest| manifest.name)
}

async fn check(mut report: CheckReport, candidate: Candidate) -> CheckReport {
    let Candidate { manifest, wasm, digest, .. } = candidate;
    report.name = Some(manifest.name.clone());
    report.version = Some(manifest.version.to_string());
    report.size = Some(size_of(&wasm));
    report.digest = Some(digest.clone());
    let surroundings = Surroundings::default();
    let grant = Grant::default();
    if let Err(missing) = effective(&manifest, &grant, &Secrets::new(), &surroundings) {
        report.required_grants = missing.lines;
    }
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(problem) => return report.problem(problem),
    };
    let begun = Instant::now();
    let engines = runtime.engines().clone();
    let component = match blocking(move || engines.compile(&wasm)).await {
        Ok(Ok(component)) => component,
        Ok(Err(error)) => return report.problem(explain_compile_error(&format!("{error:#}"))),
        Err(problem) => return report.problem(problem),
    };
    report.compile_time = Some(begun.elapsed());
    let identity = PluginIdentity { name: manifest.name.clone(), version: manifest.version.to_string(), digest, generation: 1 };
    let plugin = match link(&runtime, &component, identity, intersection(&manifest, &grant, &Secrets::new(), &surroundings)) {
        Ok(plugin) => plugin,
        Err(error) => return report.problem(error.to_string()),
    };
    report.hooks = plugin.hooks().clone();
    if let Err(rejection) = check_named_hooks(&manifest, plugin.hooks()) {
        report = report.problem(rejection.reason);
    }
    // Its configuration is the operator's: it is not asked about one.
    match plugin.probe().await {
        Ok(()) => report,
        Err(error) => report.problem(error.to_string()),
    }
}

fn runtime() -> Result<Arc<Runtime>, String> {
    let engines = Engines::new().map_err(|error| error.to_string())?;
    let egress = egress::Client::new().map_err(|error| error.message)?;
    let services = Services { storage: None, clock: Arc::new(ToolClock), egress, server_version: SERVER_VERSION.to_owned() };
    Runtime::new(engines, services).map_err(|error| error.to_string())
}

/// The machine's clock, for a tool that has no server.
#[derive(Debug)]
struct ToolClock;

impl Clock for ToolClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_millis(jiff::Timestamp::now().as_millisecond())
    }

    fn sleep_until(&self, at: Timestamp) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(at.since(self.now())))
    }
}
