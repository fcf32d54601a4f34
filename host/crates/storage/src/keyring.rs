//! The keys that values of the database are sealed with, and the file that they stand in.
//!
//! One key a line, `NAME KEY`, the key as 32 bytes in base64; `#` begins a comment. The first line seals, all lines open: to rotate, put a new line
//! in front. A key is told from others by an id that is made of the key itself, so that its name can be changed.

use crate::StorageError;
use crate::certificate_bindings::hex;
use aws_lc_rs::aead::{AES_256_GCM, RandomizedNonceKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, KeyType, Salt};
use aws_lc_rs::{digest, hmac};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;

/// Bytes of a key's id.
pub(crate) const KEY_ID: usize = 8;
const KEY: usize = 32;
/// Of a key file: far more keys than anybody rotates through.
const LONGEST_FILE: u64 = 64 * 1024;
const LONGEST_NAME: usize = 64;

/// Keys; none: values are kept as they are. Clones share them.
#[derive(Clone, Default)]
pub struct Keyring {
    /// The first one seals.
    keys: Arc<[Key]>,
    /// They only open.
    seals_nothing: bool,
}

/// Nothing of the keys.
impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keyring").finish_non_exhaustive()
    }
}

/// One key, and what is made of it for each use.
pub(crate) struct Key {
    name: String,
    id: [u8; KEY_ID],
    cipher: RandomizedNonceKey,
    digest: hmac::Key,
}

impl Key {
    fn new(name: &str, key: &[u8]) -> Option<Self> {
        Some(Self {
            name: name.to_owned(),
            id: derived(key, b"wasmdm key id")?,
            cipher: RandomizedNonceKey::new(&AES_256_GCM, &derived::<KEY>(key, b"wasmdm sealed value")?).ok()?,
            digest: hmac::Key::new(hmac::HMAC_SHA256, &derived::<KEY>(key, b"wasmdm digest")?),
        })
    }

    pub(crate) fn id(&self) -> &[u8; KEY_ID] {
        &self.id
    }

    /// As the database writes it.
    pub(crate) fn id_text(&self) -> String {
        hex(&self.id)
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn cipher(&self) -> &RandomizedNonceKey {
        &self.cipher
    }
}

struct Length(usize);

impl KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

/// A key for one use, from which neither the others nor their source can be found.
fn derived<const LENGTH: usize>(key: &[u8], purpose: &[u8]) -> Option<[u8; LENGTH]> {
    let mut derived = [0; LENGTH];
    Salt::new(HKDF_SHA256, &[]).extract(key).expand(&[purpose], Length(LENGTH)).ok()?.fill(&mut derived).ok()?;
    Some(derived)
}

impl Keyring {
    /// Reads a key file.
    ///
    /// # Errors
    /// [`StorageError::Key`] says what is wrong with it, and in which line; never what stands in the line.
    pub fn from_file(path: &Path) -> Result<Self, StorageError> {
        let text = read(path)?;
        Self::parse(&text).map_err(|problem| StorageError::Key { reason: format!("{}: {problem}", path.display()) })
    }

    /// Of the contents of a key file.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut keys: Vec<Key> = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let in_line = |problem: &str| format!("line {}: {problem}", index + 1);
            let key = parse_line(line).map_err(|problem| in_line(&problem))?;
            if keys.iter().any(|other| other.name == key.name) {
                return Err(in_line("another key has that name already: give each its own"));
            }
            if keys.iter().any(|other| other.id == key.id) {
                return Err(in_line("the key stands in another line already: remove one of the two"));
            }
            keys.push(key);
        }
        if keys.is_empty() {
            return Err("it holds no key: `wasmdm db new-key FILE` makes one".to_owned());
        }
        Ok(Self { keys: keys.into(), seals_nothing: false })
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Names and ids in the order of the file.
    pub fn names(&self) -> impl Iterator<Item = (&str, String)> {
        self.keys.iter().map(|key| (key.name.as_str(), key.id_text()))
    }

    /// What new values are sealed with.
    pub(crate) fn sealing(&self) -> Option<&Key> {
        self.keys.first().filter(|_| !self.seals_nothing)
    }

    /// The same keys, to open what is sealed and keep what is written as it is.
    pub(crate) fn that_seals_nothing(self) -> Self {
        Self { seals_nothing: true, ..self }
    }

    pub(crate) fn find(&self, id: &[u8]) -> Option<&Key> {
        self.keys.iter().find(|key| key.id == id)
    }

    pub(crate) fn contains(&self, id_text: &str) -> bool {
        self.keys.iter().any(|key| key.id_text() == id_text)
    }

    /// What two values are compared by. A passcode of six digits would be found from a digest that needs no key, so with a key it is a keyed
    /// one, `KEY-ID:DIGEST`.
    pub(crate) fn digest(&self, value: &[u8]) -> String {
        match self.sealing() {
            Some(key) => keyed_digest(key, value),
            None => hex(digest::digest(&digest::SHA256, value).as_ref()),
        }
    }

    /// Whether [`Self::digest`] made that of the value, with whichever key was the first one then.
    pub(crate) fn is_digest_of(&self, stored: &str, value: &[u8]) -> Result<bool, StorageError> {
        let Some((id, _)) = stored.split_once(':') else {
            return Ok(stored == hex(digest::digest(&digest::SHA256, value).as_ref()));
        };
        let key = self.keys.iter().find(|key| key.id_text() == id);
        let key = key.ok_or_else(|| StorageError::Key { reason: format!("a digest was made with the key {id}, which is not given") })?;
        Ok(stored == keyed_digest(key, value))
    }
}

fn keyed_digest(key: &Key, value: &[u8]) -> String {
    format!("{}:{}", key.id_text(), hex(hmac::sign(&key.digest, value).as_ref()))
}

fn parse_line(line: &str) -> Result<Key, String> {
    let wanted = "write a name, a space, and 32 bytes in base64: `wasmdm db new-key` makes such a line";
    let mut words = line.split_whitespace();
    let (Some(name), Some(key), None) = (words.next(), words.next(), words.next()) else {
        return Err(wanted.to_owned());
    };
    if !is_name(name) {
        return Err(format!("the name may have letters, digits, `-`, `_` and `.`, at most {LONGEST_NAME}"));
    }
    let key = STANDARD.decode(key).ok().filter(|key| key.len() == KEY).ok_or_else(|| wanted.to_owned())?;
    Key::new(name, &key).ok_or_else(|| "the key could not be prepared".to_owned())
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= LONGEST_NAME && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

fn unusable(path: &Path, problem: impl fmt::Display) -> StorageError {
    StorageError::Key { reason: format!("{}: {problem}", path.display()) }
}

/// A file that others can read or change is refused: it would protect nothing. A group may read it, as a service's often does.
fn read(path: &Path) -> Result<String, StorageError> {
    let file = File::open(path).map_err(|error| unusable(path, format!("it cannot be read: {error}")))?;
    let metadata = file.metadata().map_err(|error| unusable(path, error))?;
    if metadata.is_file() && metadata.mode() & 0o027 != 0 {
        let mode = metadata.mode() & 0o777;
        return Err(unusable(
            path,
            format!("its mode is {mode:03o}: others than its owner and group can read it, or change it. Run `chmod 600` on it"),
        ));
    }
    let mut text = String::new();
    file.take(LONGEST_FILE + 1).read_to_string(&mut text).map_err(|error| unusable(path, format!("it cannot be read: {error}")))?;
    if u64::try_from(text.len()).unwrap_or(u64::MAX) > LONGEST_FILE {
        return Err(unusable(path, "it is longer than 64 KiB: is it a key file?"));
    }
    Ok(text)
}

/// Makes a key and puts it in front of those of the file, which is made if there is none: complete and on the disk before it has its name.
/// Answers how many keys the file has now.
///
/// # Errors
/// [`StorageError::Key`] when the file is no key file, has a key of that name, or cannot be written; it is as it was then.
pub fn add_new_key(path: &Path, name: &str) -> Result<usize, StorageError> {
    let old = match fs::symlink_metadata(path) {
        Ok(_) => read(path)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(unusable(path, error)),
    };
    if !old.is_empty() {
        Keyring::parse(&old).map_err(|problem| unusable(path, problem))?;
    }
    let mut key = [0; KEY];
    aws_lc_rs::rand::fill(&mut key).map_err(|_| unusable(path, "no randomness is to be had"))?;
    let text = format!("{name} {}\n{old}", STANDARD.encode(key));
    let keys = Keyring::parse(&text).map_err(|problem| unusable(path, problem))?.keys.len();
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(".unfinished");
    let unfinished = Path::new(&unfinished);
    let written = write(unfinished, path, &text).map_err(|error| unusable(path, format!("it cannot be written: {error}")));
    if written.is_err() {
        drop(fs::remove_file(unfinished));
    }
    written.map(|()| keys)
}

fn write(unfinished: &Path, path: &Path, text: &str) -> std::io::Result<()> {
    // What an earlier attempt left may be readable by others.
    match fs::remove_file(unfinished) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(unfinished)?;
    file.write_all(text.as_bytes())?;
    if let Ok(old) = fs::metadata(path) {
        // A group that may read the old one may read the new one.
        std::os::unix::fs::fchown(&file, Some(old.uid()), Some(old.gid()))?;
        file.set_permissions(old.permissions())?;
    }
    file.sync_all()?;
    fs::rename(unfinished, path)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    impl Keyring {
        /// A line with a key that follows from its name.
        pub(crate) fn line_for_tests(name: &str) -> String {
            format!("{name} {}", STANDARD.encode(digest::digest(&digest::SHA256, name.as_bytes())))
        }
    }

    fn problem(text: &str) -> String {
        Keyring::parse(text).map(|_| ()).unwrap_err()
    }

    #[test]
    fn a_file_has_a_key_a_line_and_comments() {
        let text = format!("# a comment\n\n  {}  \n{}\n", Keyring::line_for_tests("new"), Keyring::line_for_tests("old"));
        let keyring = Keyring::parse(&text).unwrap();
        assert_eq!(keyring.names().map(|(name, _)| name.to_owned()).collect::<Vec<_>>(), ["new", "old"]);
        assert_eq!(keyring.sealing().unwrap().name(), "new");
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line_and_without_the_key() {
        let (a, b) = (Keyring::line_for_tests("a"), Keyring::line_for_tests("b"));
        let secret = a.split_once(' ').unwrap().1;
        let wrong = [
            (String::new(), "no key"),
            ("# only a comment".to_owned(), "no key"),
            (format!("{b}\n{secret}"), "line 2: write a name"),
            (format!("{b}\na {secret} more"), "line 2: write a name"),
            (format!("a {}", &secret[4..]), "line 1: write a name"),
            (format!("a {}!", &secret[1..]), "line 1: write a name"),
            (format!("a/b {secret}"), "line 1: the name"),
            (format!("{a}\na {}", b.split_once(' ').unwrap().1), "line 2: another key has that name"),
            (format!("{a}\nother {secret}"), "line 2: the key stands in another line"),
        ];
        for (text, said) in wrong {
            let problem = problem(&text);
            assert!(problem.contains(said), "{text}: {problem}");
            assert!(!problem.contains(&secret[4..40]), "{problem}");
        }
        let shown = format!("{:?} {:#?}", Keyring::parse(&a).unwrap(), Keyring::parse(&a).unwrap());
        assert_eq!(shown, "Keyring { .. } Keyring { .. }");
    }

    #[test]
    fn a_file_that_others_can_read_or_change_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        fs::write(&path, Keyring::line_for_tests("a")).unwrap();
        for (mode, is_good) in [(0o600, true), (0o400, true), (0o640, true), (0o644, false), (0o660, false), (0o602, false)] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let read = Keyring::from_file(&path);
            assert_eq!(read.is_ok(), is_good, "{mode:o}: {read:?}");
            if let Err(error) = read {
                assert!(error.to_string().contains("chmod 600"), "{error}");
            }
        }
        let missing = Keyring::from_file(&directory.path().join("nothing")).unwrap_err().to_string();
        assert!(missing.starts_with("key-file: ") && missing.contains("nothing"), "{missing}");
    }

    #[test]
    fn a_new_key_stands_in_front_and_a_file_that_is_none_stays_as_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        assert_eq!(add_new_key(&path, "first").unwrap(), 1);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(add_new_key(&path, "second").unwrap(), 2);
        let names: Vec<_> = Keyring::from_file(&path).unwrap().names().map(|(name, _)| name.to_owned()).collect();
        assert_eq!(names, ["second", "first"]);
        let before = fs::read_to_string(&path).unwrap();
        assert!(add_new_key(&path, "first").is_err(), "the name is taken");
        assert!(add_new_key(&path, "not a name").is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), before);
        let other = directory.path().join("other");
        fs::write(&other, "PermitRootLogin no\n").unwrap();
        fs::set_permissions(&other, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(add_new_key(&other, "third").is_err());
        assert_eq!(fs::read_to_string(&other).unwrap(), "PermitRootLogin no\n");
        let mut left: Vec<_> = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["keys", "other"]);
    }

    #[test]
    fn a_digest_is_known_again_after_a_rotation() {
        let (a, b) = (Keyring::line_for_tests("a"), Keyring::line_for_tests("b"));
        let old = Keyring::parse(&a).unwrap();
        let both = Keyring::parse(&format!("{b}\n{a}")).unwrap();
        let stored = old.digest(b"123456");
        assert!(both.is_digest_of(&stored, b"123456").unwrap());
        assert!(!both.is_digest_of(&stored, b"123457").unwrap());
        assert!(both.is_digest_of(&Keyring::default().digest(b"123456"), b"123456").unwrap(), "of a formerly plain database");
        assert!(matches!(Keyring::parse(&b).unwrap().is_digest_of(&stored, b"123456"), Err(StorageError::Key { .. })));
    }
}
