//! A copy of the database while it is in use.

use crate::sql::args;
use crate::{Storage, StorageError};
use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

impl Storage {
    /// Writes a copy to `file` as the database is at one moment. It is complete and on the disk before it has its name.
    ///
    /// # Errors
    /// [`StorageError::Invalid`] when the file exists already or its folder does not, [`StorageError::Unavailable`] when it cannot be written.
    pub async fn backup(&self, file: &Path) -> Result<(), StorageError> {
        let invalid = |problem: String| StorageError::Invalid { field: "file", problem };
        if file.try_exists().map_err(|error| invalid(error.to_string()))? {
            return Err(invalid(format!("{} exists already", file.display())));
        }
        let (Some(name), Some(folder)) = (file.file_name(), file.parent()) else {
            return Err(invalid(format!("{} is no file's name", file.display())));
        };
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let mut unfinished = name.to_owned();
        unfinished.push(".unfinished");
        let unfinished = folder.join(unfinished);
        let copied = self.copy_to(&unfinished, folder, file).await;
        if copied.is_err() {
            // Whatever is left of it is of no use.
            drop(fs::remove_file(&unfinished));
        }
        copied
    }

    async fn copy_to(&self, unfinished: &PathBuf, folder: &Path, file: &Path) -> Result<(), StorageError> {
        let failed = |error: std::io::Error| StorageError::unavailable(format!("{} cannot be written: {error}", file.display()));
        let Some(target) = unfinished.to_str() else {
            return Err(StorageError::Invalid { field: "file", problem: "its name is not UTF-8".to_owned() });
        };
        // An empty file of our own, so that nobody else can read what will stand in it.
        drop(fs::remove_file(unfinished));
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(unfinished).map_err(failed)?;
        fs::set_permissions(unfinished, Permissions::from_mode(0o600)).map_err(failed)?;
        let mut reader = self.reader().await?;
        let mut db = reader.db();
        // The copy counts as a write, though not to this database.
        db.run("PRAGMA query_only = OFF", args![]).await?;
        let copied = db.run("VACUUM INTO ?", args![target]).await;
        db.run("PRAGMA query_only = ON", args![]).await?;
        copied?;
        File::open(unfinished).and_then(|copy| copy.sync_all()).map_err(failed)?;
        fs::rename(unfinished, file).map_err(failed)?;
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)
    }
}
