//! SQLite on the caller's own thread.
//!
//! sqlx gives each SQLite connection a thread, and every statement is a message to it and back: four or five switches of threads, which cost
//! more than the statement. The writer runs dozens of statements in a row and has a thread of its own anyway, so it calls SQLite there. The
//! library in both is the same one, linked once.

use crate::StorageError;
use crate::sql::{Args, NEXT, Row};
use rusqlite::types::{Value, ValueRef};
use rusqlite::{Connection, OpenFlags};
use std::path::Path;

/// Statements kept prepared: more than this crate has.
const PREPARED: usize = 512;

/// A connection whose statements block.
pub(crate) struct DirectConnection {
    connection: Connection,
}

impl DirectConnection {
    /// Opens a file that is there.
    pub(crate) fn open(path: &Path) -> Result<Self, StorageError> {
        let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
        connection.set_prepared_statement_cache_capacity(PREPARED);
        Ok(Self { connection })
    }

    /// A statement without arguments whose answer does not matter.
    pub(crate) fn control(&mut self, sql: &str) -> Result<(), StorageError> {
        Ok(self.connection.execute_batch(sql)?)
    }

    /// The first row.
    pub(crate) fn one(&mut self, sql: &str, args: Args) -> Result<Option<Row>, StorageError> {
        let mut first = None;
        self.each(sql, args, |row| {
            first = Some(row);
            false
        })?;
        Ok(first)
    }

    /// Every row.
    pub(crate) fn all(&mut self, sql: &str, args: Args) -> Result<Vec<Row>, StorageError> {
        let mut rows = Vec::new();
        self.each(sql, args, |row| {
            rows.push(row);
            true
        })?;
        Ok(rows)
    }

    /// How many rows were changed.
    pub(crate) fn run(&mut self, sql: &str, args: Args) -> Result<u64, StorageError> {
        self.each(sql, args, |_| true)
    }

    /// Runs [what goes together](crate::sql::together) one after the other, until there is nothing left or a row was enough. Answers how many
    /// rows were changed.
    fn each(&mut self, sql: &str, args: Args, mut more: impl FnMut(Row) -> bool) -> Result<u64, StorageError> {
        let mut args = args.values.into_iter();
        let mut changed = 0;
        for statement in sql.split(NEXT) {
            let mut statement = self.connection.prepare_cached(statement)?;
            for place in 1..=statement.parameter_count() {
                let missing = || StorageError::Invalid { field: "argument", problem: format!("number {place} is missing") };
                statement.raw_bind_parameter(place, args.next().ok_or_else(missing)?)?;
            }
            let (width, reads) = (statement.column_count(), statement.readonly());
            let mut rows = statement.raw_query();
            while let Some(row) = rows.next()? {
                let values = (0..width).map(|column| value(row.get_ref(column)?)).collect::<Result<_, _>>()?;
                if !more(Row::Direct(values)) {
                    return Ok(changed);
                }
            }
            if !reads {
                changed += self.connection.changes();
            }
        }
        Ok(changed)
    }

    pub(crate) fn close(self) -> Result<(), StorageError> {
        self.connection.close().map_err(|(_, error)| error.into())
    }
}

fn value(value: ValueRef<'_>) -> Result<Value, StorageError> {
    Ok(match value {
        ValueRef::Null => Value::Null,
        ValueRef::Integer(number) => Value::Integer(number),
        ValueRef::Real(number) => Value::Real(number),
        ValueRef::Text(text) => Value::Text(String::from_utf8(text.to_vec()).map_err(|_| StorageError::corrupt("a text is not UTF-8"))?),
        ValueRef::Blob(bytes) => Value::Blob(bytes.to_vec()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::{Columns, args, together};

    fn connection() -> (tempfile::TempDir, DirectConnection) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("test.db");
        std::fs::File::create(&path).unwrap();
        let mut connection = DirectConnection::open(&path).unwrap();
        connection.control("CREATE TABLE t (a INTEGER PRIMARY KEY, b TEXT, c BLOB)").unwrap();
        (directory, connection)
    }

    const INSERT: &str = "INSERT INTO t (a, b, c) VALUES (?, ?, ?)";

    #[test]
    fn statements_that_go_together_take_their_arguments_in_turn() {
        let (_directory, mut connection) = connection();
        let both = together(&[INSERT, INSERT]);
        let changed = connection.run(&both, args![1_i64, "x", vec![7_u8], 2_i64, None::<&str>, None::<Vec<u8>>]).unwrap();
        assert_eq!(changed, 2);
        let rows = connection.all("SELECT a, b, c FROM t ORDER BY a", args![]).unwrap();
        let cells = |row: &Row| (row.int(0).unwrap(), row.opt_text(1).unwrap(), row.opt_blob(2).unwrap());
        assert_eq!(rows.iter().map(cells).collect::<Vec<_>>(), [(1, Some("x".to_owned()), Some(vec![7])), (2, None, None)]);
        assert!(matches!(connection.run(&both, args![3_i64, "x", vec![7_u8]]), Err(StorageError::Invalid { .. })));
    }

    #[test]
    fn a_violated_constraint_is_corrupt_and_a_wrong_type_as_well() {
        let (_directory, mut connection) = connection();
        connection.run(INSERT, args![1_i64, "x", vec![7_u8]]).unwrap();
        assert!(matches!(connection.run(INSERT, args![1_i64, "y", vec![8_u8]]), Err(StorageError::Corrupt { .. })));
        let row = connection.one("SELECT b FROM t", args![]).unwrap().unwrap();
        assert!(matches!(row.int(0), Err(StorageError::Corrupt { .. })));
        assert!(matches!(row.int(1), Err(StorageError::Corrupt { .. })));
        assert!(connection.one("SELECT b FROM t WHERE a = 9", args![]).unwrap().is_none());
    }
}
