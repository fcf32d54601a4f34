//! What lies in the plugin directory, and the bytes of one candidate, read once.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{Context, SHA256, digest};
use bytes::Bytes;
use serde::Serialize;

use super::document::{DocumentError, is_plugin_name};
use super::files::{self, FileStamp, human, read_bounded};
use super::grant::{Grant, Secrets, read_secrets};
use super::manifest::{MAX_DOCUMENT, Manifest, SERVER_VERSION};

/// Largest component, in bytes.
pub const MAX_COMPONENT: u64 = 32 << 20;

/// Entries of a directory that are looked at; more are an error, so that a directory of a million files cannot stall the server.
const MAX_ENTRIES: usize = 1_000;

/// How far a candidate came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// In the directory.
    Found,
    /// No longer being written.
    Stable,
    /// Its digest is the one that manifest and grant name.
    Verified,
    /// A component, with a manifest and grants that this server can honour.
    Inspected,
    Compiled,
    /// Its imports and exports fit.
    Linked,
    /// Its hooks have the right types, and it accepts its configuration.
    Probed,
    /// It is asked.
    Active,
}

impl Stage {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Found => "found",
            Self::Stable => "stable",
            Self::Verified => "verified",
            Self::Inspected => "inspected",
            Self::Compiled => "compiled",
            Self::Linked => "linked",
            Self::Probed => "probed",
            Self::Active => "active",
        }
    }
}

/// Why a candidate did not become active.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Rejection {
    /// The stage that it did not reach.
    pub stage: Stage,
    pub reason: String,
    /// Not the candidate's fault: worth trying again without a change.
    pub transient: bool,
}

impl Rejection {
    pub(super) fn new(stage: Stage, reason: impl Into<String>) -> Self {
        Self { stage, reason: reason.into(), transient: false }
    }

    pub(super) fn transient(stage: Stage, reason: impl Into<String>) -> Self {
        Self { stage, reason: reason.into(), transient: true }
    }
}

/// A plugin in the directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    /// `NAME/plugin.toml`
    Directory(PathBuf),
    /// `NAME.wasm`
    Lone(PathBuf),
    /// The directory holds the name twice.
    Twice,
}

/// What a look at the directories showed.
#[derive(Debug, Default)]
pub(super) struct Discovery {
    pub(super) plugins: BTreeMap<String, Found>,
    /// Entries that can be no plugin, by file name, with the reason.
    pub(super) refused: BTreeMap<String, String>,
    /// Plugins that have a grant file.
    pub(super) granted: BTreeSet<String>,
}

/// Looks at both directories. An error if the plugin directory cannot be read: that is not the same as empty.
pub(super) fn discover(plugins_dir: Option<&Path>, grants_dir: &Path) -> io::Result<Discovery> {
    let mut discovery = Discovery { granted: granted(grants_dir)?, ..Discovery::default() };
    let Some(directory) = plugins_dir else { return Ok(discovery) };
    for (name, path) in entries(directory)? {
        let lone = name.strip_suffix(".wasm");
        let plugin = lone.unwrap_or(&name);
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("cwasm")) {
            discovery
                .refused
                .insert(name, "it is a precompiled file: this server compiles components itself, and loads no foreign native code".to_owned());
            continue;
        }
        // What cannot be looked at is not gone: it would be taken for removed, and its kept version with it.
        let is_directory = match fs::metadata(&path) {
            Ok(metadata) => metadata.is_dir(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(error),
        };
        let found = match (lone, is_directory) {
            (_, true) => Found::Directory(path),
            (Some(_), false) => Found::Lone(path),
            // A README, an editor's back-up: nobody meant it as a plugin.
            (None, false) => continue,
        };
        if !is_plugin_name(plugin) {
            discovery.refused.insert(name, "its name is no plugin name: lower-case letters, digits, `-` and `_`, at most 64".to_owned());
            continue;
        }
        discovery.plugins.entry(plugin.to_owned()).and_modify(|earlier| *earlier = Found::Twice).or_insert(found);
    }
    Ok(discovery)
}

/// Names and paths in a directory, without hidden ones.
fn entries(directory: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if name.starts_with('.') {
            continue;
        }
        if found.len() == MAX_ENTRIES {
            return Err(io::Error::other(format!("{} holds more than {MAX_ENTRIES} entries", directory.display())));
        }
        found.push((name, entry.path()));
    }
    Ok(found)
}

fn granted(grants_dir: &Path) -> io::Result<BTreeSet<String>> {
    let entries = match entries(grants_dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        entries => entries?,
    };
    let named = entries.iter().filter_map(|(name, _)| name.strip_suffix(".toml"));
    Ok(named.filter(|name| *name != "trust" && is_plugin_name(name)).map(str::to_owned).collect())
}

/// The stamps of all files that a plugin is made of.
pub(super) type Look = BTreeMap<PathBuf, Option<FileStamp>>;

/// Looks at the files without reading them. `secrets`: files of secrets that its grant named when it was last read.
pub(super) fn look(name: &str, found: Option<&Found>, grants_dir: &Path, secrets: &BTreeSet<PathBuf>) -> Look {
    let mut look = Look::new();
    let mut add = |path: PathBuf| {
        let stamp = files::stamp(&path);
        look.insert(path, stamp);
    };
    match found {
        Some(Found::Directory(directory)) => {
            add(directory.clone());
            for (_, path) in entries(directory).unwrap_or_default() {
                add(path);
            }
        }
        Some(Found::Lone(path)) => add(path.clone()),
        Some(Found::Twice) | None => {}
    }
    add(grant_path(grants_dir, name));
    add(trust_path(grants_dir));
    for file in secrets {
        add(grants_dir.join(file));
    }
    look
}

pub(super) fn grant_path(grants_dir: &Path, name: &str) -> PathBuf {
    grants_dir.join(format!("{name}.toml"))
}

fn trust_path(grants_dir: &Path) -> PathBuf {
    grants_dir.join("trust.toml")
}

/// A plugin's files, read.
#[derive(Debug, Clone)]
pub(super) struct Candidate {
    pub(super) manifest: Manifest,
    /// `None`: a lone component.
    pub(super) manifest_text: Option<String>,
    pub(super) wasm: Bytes,
    /// SHA-256 of the component.
    pub(super) digest: String,
}

/// A grant file and its secrets, read.
#[derive(Debug, Clone, Default)]
pub(super) struct GrantFile {
    pub(super) grant: Grant,
    /// `None`: there is no grant file.
    pub(super) text: Option<String>,
    /// The file whose configuration is used, where that is not this one: its own was refused.
    pub(super) configured_by: Option<String>,
    pub(super) secrets: Secrets,
    pub(super) warnings: Vec<String>,
    /// `trust.toml` lies beside it.
    pub(super) signatures_required: bool,
}

/// A directory of plugins, for reading: nothing outside of it is ever read.
#[derive(Debug, Clone, Copy)]
pub(super) struct PluginFiles<'a> {
    pub(super) plugins_dir: &'a Path,
}

impl PluginFiles<'_> {
    /// Reads manifest and component. `declared` is told of the manifest, also if the component cannot be read.
    pub(super) fn read(self, name: &str, found: &Found, declared: &mut Option<Manifest>) -> Result<Candidate, Rejection> {
        match found {
            Found::Twice => {
                Err(Rejection::new(Stage::Found, format!("`{name}` is there twice, as a directory and as {name}.wasm: remove one of them")))
            }
            Found::Lone(path) => self.component(Manifest::lone(name), None, path),
            Found::Directory(directory) => {
                let path = directory.join("plugin.toml");
                let content =
                    self.read_file(&path, MAX_DOCUMENT).map_err(|problem| Rejection::new(Stage::Found, format!("plugin.toml: {problem}")))?;
                let text = String::from_utf8(content).map_err(|_| Rejection::new(Stage::Inspected, "plugin.toml: it is not UTF-8"))?;
                let manifest = Manifest::parse(&text).map_err(|error| Rejection::new(Stage::Inspected, error.to_string()))?;
                if manifest.name != name {
                    let reason = format!(
                        "the directory `{name}` holds a plugin that calls itself `{}`: a directory has the name of its plugin",
                        manifest.name
                    );
                    return Err(Rejection::new(Stage::Inspected, reason));
                }
                let wasm = directory.join(&manifest.wasm);
                *declared = Some(manifest.clone());
                self.component(manifest, Some(text), &wasm)
            }
        }
    }

    fn component(self, manifest: Manifest, manifest_text: Option<String>, path: &Path) -> Result<Candidate, Rejection> {
        let wasm = self.read_file(path, MAX_COMPONENT).map_err(|problem| Rejection::new(Stage::Found, format!("{}: {problem}", manifest.wasm)))?;
        let digest = sha256_hex(&wasm);
        if let Some(expected) = &manifest.sha256
            && *expected != digest
        {
            let reason = format!("{} has the SHA-256 {digest}, but plugin.toml names {expected}: it is not complete, or another file", manifest.wasm);
            return Err(Rejection::new(Stage::Stable, reason));
        }
        inspect_header(&wasm).map_err(|problem| Rejection::new(Stage::Inspected, format!("{}: {problem}", manifest.wasm)))?;
        Ok(Candidate { manifest, manifest_text, wasm: wasm.into(), digest })
    }

    fn read_file(self, path: &Path, limit: u64) -> Result<Vec<u8>, String> {
        // A link may lead elsewhere within the directory (volumes are swapped that way), but not out of it.
        let root = self.plugins_dir.canonicalize().map_err(|error| files::said(&error))?;
        let real = path.canonicalize().map_err(|error| files::said(&error))?;
        if !real.starts_with(&root) {
            return Err("it is a link that leads out of the plugin directory".to_owned());
        }
        read_bounded(&real, limit).map(|content| content.bytes)
    }
}

/// Reads the grant file of a plugin and its secrets.
pub(super) fn read_grant(name: &str, grants_dir: &Path) -> Result<GrantFile, Rejection> {
    let file = format!("plugins.d/{name}.toml");
    let refused = |error: DocumentError| Rejection::new(Stage::Inspected, error.to_string());
    let path = grant_path(grants_dir, name);
    // One that is there but cannot be read is not one that is not there.
    let signatures_required = signatures_required(grants_dir);
    match fs::symlink_metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(GrantFile { signatures_required, ..GrantFile::default() }),
        _ => {}
    }
    let content = read_bounded(&path, MAX_DOCUMENT).map_err(|problem| refused(DocumentError::whole(&file, problem)))?;
    let text = String::from_utf8(content.bytes).map_err(|_| refused(DocumentError::whole(&file, "it is not UTF-8")))?;
    let grant = Grant::parse(&file, &text).map_err(refused)?;
    let (secrets, warnings) = if grant.is_active() {
        read_secrets(grants_dir, &grant).map_err(|problem| refused(DocumentError::whole(&file, problem)))?
    } else {
        (Secrets::new(), Vec::new())
    };
    Ok(GrantFile { grant, text: Some(text), configured_by: None, secrets, warnings, signatures_required })
}

/// Whether there is a `trust.toml`.
pub(super) fn signatures_required(grants_dir: &Path) -> bool {
    // One that cannot be looked at may be there.
    !matches!(fs::symlink_metadata(trust_path(grants_dir)), Err(error) if error.kind() == io::ErrorKind::NotFound)
}

/// Checks the digest of a component against what the operator trusts: of a candidate, and of what runs already.
pub(super) fn verify(name: &str, digest: &str, file: &GrantFile) -> Result<(), Rejection> {
    if file.signatures_required {
        let reason = format!(
            "plugins.d/trust.toml asks for signatures, which this server ({SERVER_VERSION}) cannot check: it runs no plugin until the file is removed"
        );
        return Err(Rejection::new(Stage::Verified, reason));
    }
    match &file.grant.pin {
        Some(pin) if pin != digest => Err(Rejection::new(Stage::Verified, format!("its SHA-256 is {digest}, but plugins.d/{name}.toml pins {pin}"))),
        _ => Ok(()),
    }
}

/// Whether the bytes can be a component, by their first eight.
pub(super) fn inspect_header(wasm: &[u8]) -> Result<(), String> {
    const MAGIC: &[u8] = b"\0asm";
    if wasm.starts_with(b"\x7fELF") {
        return Err("it is a precompiled file: this server compiles components itself, and loads no foreign native code".to_owned());
    }
    match (wasm.get(..4), wasm.get(4..8)) {
        (None, _) | (_, None) => Err("it is too short to be a WebAssembly component".to_owned()),
        (Some(magic), _) if magic != MAGIC => Err("it is not WebAssembly".to_owned()),
        (_, Some([1, 0, 0, 0])) => Err(
            "it is a core WebAssembly module, not a component: build it for wasm32-wasip2, or make a component of it with `wasm-tools component new`"
                .to_owned(),
        ),
        (_, Some([13, 0, 1, 0])) => Ok(()),
        (_, Some(_)) => Err("it is a WebAssembly component of another version than 1.0 (0x1000d)".to_owned()),
    }
}

/// Identifies all that the outcome of loading depends on.
pub(super) fn fingerprint(candidate: &Candidate, grant: &GrantFile) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    let mut part = |bytes: Option<&[u8]>| {
        // With its length, so that no two ways of dividing the same bytes are one.
        let length = bytes.map_or(u64::MAX, |bytes| bytes.len() as u64);
        context.update(&length.to_le_bytes());
        context.update(bytes.unwrap_or_default());
    };
    part(candidate.manifest_text.as_deref().map(str::as_bytes));
    part(Some(candidate.digest.as_bytes()));
    grant_parts(grant, &mut part);
    let mut print = [0; 32];
    print.copy_from_slice(context.finish().as_ref());
    print
}

/// Identifies a grant file and its secrets.
pub(super) fn grant_fingerprint(grant: &GrantFile) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    grant_parts(grant, &mut |bytes: Option<&[u8]>| {
        context.update(&bytes.map_or(u64::MAX, |bytes| bytes.len() as u64).to_le_bytes());
        context.update(bytes.unwrap_or_default());
    });
    let mut print = [0; 32];
    print.copy_from_slice(context.finish().as_ref());
    print
}

fn grant_parts(grant: &GrantFile, part: &mut dyn FnMut(Option<&[u8]>)) {
    part(grant.text.as_deref().map(str::as_bytes));
    part(grant.signatures_required.then_some(b"trust.toml".as_slice()));
    for (file, secret) in &grant.secrets {
        part(Some(file.as_os_str().as_encoded_bytes()));
        part(Some(secret.expose().as_bytes()));
    }
}

/// SHA-256 in lower-case hexadecimal.
pub(super) fn sha256_hex(bytes: &[u8]) -> String {
    hex(digest(&SHA256, bytes).as_ref())
}

pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A sentence about the size of a component.
pub(super) fn size_of(wasm: &[u8]) -> String {
    human(wasm.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMPONENT: &[u8] = b"\0asm\x0d\0\x01\0";

    fn read(directory: &Path, name: &str) -> Result<Candidate, Rejection> {
        let discovery = discover(Some(directory), &directory.join("plugins.d")).unwrap();
        PluginFiles { plugins_dir: directory }.read(name, &discovery.plugins[name], &mut None)
    }

    fn reason(directory: &Path, name: &str) -> String {
        read(directory, name).unwrap_err().reason
    }

    #[test]
    fn plain_words_for_what_is_no_component() {
        for (bytes, words) in [
            (&b""[..], "too short"),
            (b"\0asm\x01\0\0\0rest", "core WebAssembly module, not a component"),
            (b"\x7fELF\x02\x01\x01\0", "precompiled"),
            (b"#!/bin/sh", "not WebAssembly"),
            (b"\0asm\x0e\0\x01\0", "another version"),
        ] {
            let problem = inspect_header(bytes).unwrap_err();
            assert!(problem.contains(words), "{problem}");
        }
        assert_eq!(inspect_header(COMPONENT), Ok(()));
    }

    #[test]
    fn one_name_twice_is_refused_and_so_is_a_directory_of_another_name() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("a.wasm"), COMPONENT).unwrap();
        fs::create_dir(directory.path().join("a")).unwrap();
        assert!(reason(directory.path(), "a").contains("twice"));
        fs::create_dir(directory.path().join("b")).unwrap();
        fs::write(directory.path().join("b/plugin.toml"), "[plugin]\nname = \"a\"\nversion = \"1.0.0\"\n").unwrap();
        assert!(reason(directory.path(), "b").contains("calls itself `a`"));
    }

    #[test]
    fn a_link_out_of_the_directory_is_refused_and_one_within_is_followed() {
        let directory = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("x.wasm"), COMPONENT).unwrap();
        std::os::unix::fs::symlink(outside.path().join("x.wasm"), directory.path().join("x.wasm")).unwrap();
        assert!(reason(directory.path(), "x").contains("leads out of the plugin directory"));
        fs::write(directory.path().join("y.wasm"), COMPONENT).unwrap();
        std::os::unix::fs::symlink("y.wasm", directory.path().join("z.wasm")).unwrap();
        assert!(read(directory.path(), "z").is_ok());
        std::os::unix::fs::symlink(outside.path(), directory.path().join("w")).unwrap();
        fs::write(outside.path().join("plugin.toml"), "[plugin]\nname = \"w\"\nversion = \"1.0.0\"\n").unwrap();
        assert!(reason(directory.path(), "w").contains("leads out of the plugin directory"));
    }

    #[test]
    fn another_digest_than_the_manifest_names_is_not_stable() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("a")).unwrap();
        fs::write(directory.path().join("a/plugin.toml"), format!("[plugin]\nname = \"a\"\nversion = \"1.0.0\"\nsha256 = \"{}\"\n", "0".repeat(64)))
            .unwrap();
        fs::write(directory.path().join("a/plugin.wasm"), COMPONENT).unwrap();
        assert_eq!(read(directory.path(), "a").unwrap_err().stage, Stage::Stable);
    }

    #[test]
    fn precompiled_files_and_odd_names_are_refused_and_other_files_are_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["a.cwasm", "B.wasm", "README.md", ".hidden.wasm"] {
            fs::write(directory.path().join(name), COMPONENT).unwrap();
        }
        let discovery = discover(Some(directory.path()), directory.path()).unwrap();
        assert_eq!(discovery.refused.keys().collect::<Vec<_>>(), ["B.wasm", "a.cwasm"]);
        assert!(discovery.plugins.is_empty());
    }

    #[test]
    fn a_directory_that_is_not_there_is_not_an_empty_one() {
        let directory = tempfile::tempdir().unwrap();
        assert!(discover(Some(&directory.path().join("gone")), directory.path()).is_err());
    }

    #[test]
    fn a_trust_file_keeps_everything_unsigned_out() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("a.wasm"), COMPONENT).unwrap();
        let candidate = read(directory.path(), "a").unwrap();
        let verified = |file: &GrantFile| verify("a", &candidate.digest, file);
        let unsigned = read_grant("a", directory.path()).unwrap();
        assert!(verified(&unsigned).is_ok());
        let pinned = GrantFile { grant: Grant { pin: Some("0".repeat(64)), ..Grant::default() }, ..GrantFile::default() };
        assert!(verified(&pinned).unwrap_err().reason.contains("plugins.d/a.toml pins 000"));
        fs::write(directory.path().join("trust.toml"), "").unwrap();
        let signed = read_grant("a", directory.path()).unwrap();
        assert!(verified(&signed).unwrap_err().reason.contains("trust.toml asks for signatures"));
        assert_ne!(fingerprint(&candidate, &signed), fingerprint(&candidate, &unsigned), "what it refuses is tried again once it is gone");
    }
}
