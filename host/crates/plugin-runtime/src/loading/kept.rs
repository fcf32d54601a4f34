//! The last good version of each plugin, kept in the data directory: garbage in the plugin directory and a restart must not open a door.
//!
//! `plugins-active/NAME/DIGEST.wasm` and `active.json`, which names the digest and is replaced by renaming. Secrets are not kept.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tracing::warn;
use wasmdm_protocol::time::Timestamp;

use crate::hook::Hook;

use super::candidate::{MAX_COMPONENT, sha256_hex};
use super::document::is_plugin_name;
use super::files::{make_private_dir, read_bounded, write_whole};
use super::grant::Grant;
use super::manifest::{MAX_DOCUMENT, Manifest, is_sha256};

/// A version as it was when it became active.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    pub(super) manifest: Manifest,
    pub(super) manifest_text: Option<String>,
    pub(super) wasm: Bytes,
    pub(super) digest: String,
    pub(super) generation: u64,
    pub(super) hooks: BTreeSet<Hook>,
    pub(super) grant_text: Option<String>,
}

/// What is known of a kept version even if its bytes are lost.
#[derive(Debug, Clone)]
pub(super) enum KeptState {
    Whole(Box<Kept>),
    /// It was active, with these hooks, and cannot be loaded.
    Lost {
        hooks: BTreeSet<Hook>,
        /// Of its `token-source`; `None`: unknown.
        token_services: Option<BTreeSet<String>>,
        reason: String,
    },
    /// Its directory was removed; until then its subscription keeps its events.
    Removed {
        hooks: BTreeSet<Hook>,
        /// Of its `token-source`; `None`: unknown.
        token_services: Option<BTreeSet<String>>,
    },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ActiveFile {
    digest: String,
    generation: u64,
    hooks: Vec<String>,
    manifest: Option<String>,
    grant: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct RemovedFile {
    removed_at: Timestamp,
    hooks: Vec<String>,
    #[serde(default)]
    token_services: Option<BTreeSet<String>>,
}

/// The directory of kept versions.
#[derive(Debug, Clone)]
pub(super) struct KeptVersions {
    directory: PathBuf,
}

/// What is written of a version that becomes active.
#[derive(Debug)]
pub(super) struct Keep<'a> {
    pub(super) name: &'a str,
    pub(super) digest: &'a str,
    pub(super) generation: u64,
    pub(super) hooks: &'a BTreeSet<Hook>,
    pub(super) manifest_text: Option<&'a str>,
    pub(super) grant_text: Option<&'a str>,
    /// `None`: they are kept already.
    pub(super) wasm: Option<&'a [u8]>,
}

impl KeptVersions {
    pub(super) fn open(data_dir: &Path) -> io::Result<Self> {
        let directory = data_dir.join("plugins-active");
        make_private_dir(&directory)?;
        Ok(Self { directory })
    }

    /// Everything kept, by name.
    pub(super) fn load(&self) -> io::Result<Vec<(String, KeptState)>> {
        let mut kept = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let Ok(name) = entry?.file_name().into_string() else { continue };
            if is_plugin_name(&name) {
                kept.extend(self.load_one(&name).map(|state| (name, state)));
            }
        }
        Ok(kept)
    }

    /// Plugins that were removed, and when.
    pub(super) fn load_removed(&self) -> io::Result<Vec<(String, Timestamp)>> {
        let mut removed = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if is_plugin_name(&name) && !entry.path().join("active.json").exists() {
                removed.extend(self::removed(&entry.path()).map(|file| (name, file.removed_at)));
            }
        }
        Ok(removed)
    }

    fn load_one(&self, name: &str) -> Option<KeptState> {
        let directory = self.directory.join(name);
        let lost = |hooks: BTreeSet<Hook>, token_services: Option<BTreeSet<String>>, problem: String| {
            let reason = format!("its last good version cannot be loaded from the data directory: {problem}");
            warn!(plugin = name, "Plugin {name}: {reason}");
            Some(KeptState::Lost { hooks, token_services, reason })
        };
        // What hooks it had is not known then: it may have been a policy.
        let unknown = Hook::guards;
        let active = directory.join("active.json");
        // Only a file that is certainly not there was removed; one that cannot be read may be the guard of the door.
        if matches!(active.try_exists(), Ok(false)) {
            return removed(&directory).map(|file| KeptState::Removed { hooks: hooks_of(&file.hooks), token_services: file.token_services });
        }
        let content = match read_bounded(&active, 4 * MAX_DOCUMENT) {
            Ok(content) => content,
            Err(error) => return lost(unknown(), None, format!("active.json: {error}")),
        };
        let file: ActiveFile = match serde_json::from_slice(&content.bytes) {
            Ok(file) => file,
            Err(error) => return lost(unknown(), None, format!("active.json: {error}")),
        };
        let hooks = hooks_of(&file.hooks);
        let parsed = file.manifest.as_deref().map_or_else(|| Ok(Manifest::lone(name)), Manifest::parse);
        let token_services = parsed.as_ref().ok().map(|manifest| manifest.hooks.token_services());
        if !is_sha256(&file.digest) {
            return lost(hooks, token_services, "active.json names no digest".to_owned());
        }
        let wasm = match read_bounded(&directory.join(format!("{}.wasm", file.digest)), MAX_COMPONENT) {
            Ok(content) => content.bytes,
            Err(problem) => return lost(hooks, token_services, format!("{}.wasm: {problem}", file.digest)),
        };
        if sha256_hex(&wasm) != file.digest {
            return lost(hooks, token_services, format!("{}.wasm has changed", file.digest));
        }
        let manifest = match parsed {
            Ok(manifest) => manifest,
            Err(error) => return lost(hooks, None, error.to_string()),
        };
        Some(KeptState::Whole(Box::new(Kept {
            manifest,
            manifest_text: file.manifest,
            wasm: wasm.into(),
            digest: file.digest,
            generation: file.generation,
            hooks,
            grant_text: file.grant,
        })))
    }

    /// Keeps a version; when this returns, it outlives a loss of power.
    pub(super) fn store(&self, keep: &Keep<'_>) -> io::Result<()> {
        let directory = self.directory.join(keep.name);
        make_private_dir(&directory)?;
        let component = format!("{}.wasm", keep.digest);
        if let Some(wasm) = keep.wasm
            && !directory.join(&component).exists()
        {
            write_whole(&directory.join(&component), &[wasm], true)?;
        }
        let file = ActiveFile {
            digest: keep.digest.to_owned(),
            generation: keep.generation,
            hooks: names_of(keep.hooks),
            manifest: keep.manifest_text.map(str::to_owned),
            grant: keep.grant_text.map(str::to_owned),
        };
        write_whole(&directory.join("active.json"), &[&serde_json::to_vec(&file)?], true)?;
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            let name = entry.file_name();
            if name != component.as_str() && name != "active.json" {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Forgets a version whose directory was removed, but remembers since when.
    pub(super) fn remove(&self, name: &str, hooks: &BTreeSet<Hook>, token_services: Option<&BTreeSet<String>>, now: Timestamp) -> io::Result<()> {
        let directory = self.directory.join(name);
        if !directory.is_dir() {
            return Ok(());
        }
        let file = RemovedFile { removed_at: now, hooks: names_of(hooks), token_services: token_services.cloned() };
        write_whole(&directory.join("removed.json"), &[&serde_json::to_vec(&file)?], true)?;
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            if entry.file_name() != "removed.json" {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Forgets a plugin altogether.
    pub(super) fn forget(&self, name: &str) -> io::Result<()> {
        match fs::remove_dir_all(self.directory.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }
}

fn removed(directory: &Path) -> Option<RemovedFile> {
    serde_json::from_slice(&read_bounded(&directory.join("removed.json"), 64 * 1024).ok()?.bytes).ok()
}

fn hooks_of(names: &[String]) -> BTreeSet<Hook> {
    names.iter().filter_map(|hook| Hook::from_name(hook)).collect()
}

fn names_of(hooks: &BTreeSet<Hook>) -> Vec<String> {
    hooks.iter().map(|hook| hook.as_str().to_owned()).collect()
}

impl Kept {
    /// The grant as it was, for when the present file cannot be read.
    pub(super) fn grant(&self) -> Grant {
        self.grant_text.as_deref().and_then(|text| Grant::parse("kept", text).ok()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keep<'a>(digest: &'a str, wasm: &'a [u8], hooks: &'a BTreeSet<Hook>) -> Keep<'a> {
        Keep { name: "guard", digest, generation: 7, hooks, manifest_text: None, grant_text: Some("order = 3\n"), wasm: Some(wasm) }
    }

    #[test]
    fn the_version_kept_last_comes_back_and_older_bytes_go() {
        let data = tempfile::tempdir().unwrap();
        let kept = KeptVersions::open(data.path()).unwrap();
        let hooks = BTreeSet::from([Hook::EnrollmentPolicy]);
        kept.store(&keep(&sha256_hex(b"one"), b"one", &hooks)).unwrap();
        kept.store(&keep(&sha256_hex(b"two"), b"two", &hooks)).unwrap();
        let loaded = kept.load().unwrap();
        let [(name, KeptState::Whole(version))] = &loaded[..] else { panic!("{loaded:?}") };
        assert_eq!((name.as_str(), &version.wasm[..], version.generation), ("guard", &b"two"[..], 7));
        assert_eq!((&version.hooks, version.grant().order), (&hooks, 3));
        assert_eq!(fs::read_dir(data.path().join("plugins-active/guard")).unwrap().count(), 2);
    }

    #[test]
    fn a_version_whose_bytes_changed_is_lost_but_its_hooks_are_known() {
        let data = tempfile::tempdir().unwrap();
        let kept = KeptVersions::open(data.path()).unwrap();
        let hooks = BTreeSet::from([Hook::EventSink]);
        let digest = sha256_hex(b"one");
        kept.store(&keep(&digest, b"one", &hooks)).unwrap();
        fs::write(data.path().join(format!("plugins-active/guard/{digest}.wasm")), b"other").unwrap();
        let loaded = kept.load().unwrap();
        assert!(matches!(&loaded[..], [(_, KeptState::Lost { hooks: lost, .. })] if *lost == hooks), "{loaded:?}");
        fs::write(data.path().join("plugins-active/guard/active.json"), b"{").unwrap();
        let loaded = kept.load().unwrap();
        assert!(matches!(&loaded[..], [(_, KeptState::Lost { hooks, .. })] if hooks.contains(&Hook::EnrollmentPolicy)), "{loaded:?}");
    }

    #[test]
    fn a_removed_plugin_is_remembered_without_its_bytes() {
        let data = tempfile::tempdir().unwrap();
        let kept = KeptVersions::open(data.path()).unwrap();
        kept.store(&keep(&sha256_hex(b"one"), b"one", &BTreeSet::new())).unwrap();
        let hooks = BTreeSet::from([Hook::EventSink]);
        let services = BTreeSet::from(["com.apple.maid".to_owned()]);
        kept.remove("guard", &hooks, Some(&services), Timestamp::from_millis(5)).unwrap();
        let loaded = kept.load().unwrap();
        assert!(
            matches!(&loaded[..], [(_, KeptState::Removed { hooks: had, token_services })] if *had == hooks && *token_services == Some(services)),
            "{loaded:?}"
        );
        assert_eq!(kept.load_removed().unwrap(), [("guard".to_owned(), Timestamp::from_millis(5))]);
        kept.forget("guard").unwrap();
        kept.forget("guard").unwrap();
        assert!(kept.load().unwrap().is_empty());
    }
}
