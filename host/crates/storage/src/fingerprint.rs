//! A digest of each table, to compare a database with itself at another time, or with its copy.

use crate::sql::{Columns as _, Row, args};
use crate::{Storage, StorageError};
use aws_lc_rs::digest;
use std::collections::BTreeMap;
use std::fmt::Write as _;

impl Storage {
    /// SHA-256 of each table's rows, in whatever order they lie; the names of the tables are the keys.
    pub async fn fingerprint(&self) -> Result<BTreeMap<String, String>, StorageError> {
        let mut reader = self.reader().await?;
        let mut tables = BTreeMap::new();
        for table in reader.db().all(self.inner.dialect.tables(), args![]).await? {
            let table = table.text(0)?;
            let mut rows: Vec<Vec<u8>> = reader.db().whole_table(&table).await?.iter().map(row_digest).collect();
            rows.sort_unstable();
            tables.insert(table, hex(digest::digest(&digest::SHA256, &rows.concat()).as_ref()));
        }
        Ok(tables)
    }
}

fn row_digest(row: &Row) -> Vec<u8> {
    let mut context = digest::Context::new(&digest::SHA256);
    for column in 0..row.width() {
        // A marker for the type and the length before the content keep neighbouring columns apart.
        let (kind, cell) = if let Ok(text) = row.opt_text(column) {
            (b't', text.map(String::into_bytes))
        } else if let Ok(number) = row.opt_int(column) {
            (b'i', number.map(|number| number.to_be_bytes().to_vec()))
        } else {
            (b'b', row.opt_blob(column).ok().flatten())
        };
        context.update(&[kind, u8::from(cell.is_some())]);
        let cell = cell.unwrap_or_default();
        context.update(&cell.len().to_be_bytes());
        context.update(&cell);
    }
    context.finish().as_ref().to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
