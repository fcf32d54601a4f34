//! Running statements: arguments, rows, and connections that know their dialect.

use crate::StorageError;
use crate::dialect::Dialect;
use crate::keyring::Keyring;
use sqlx::any::{Any, AnyArguments, AnyRow};
use sqlx::{AnyConnection, Arguments, Encode, Row, Type};
use wasmdm_protocol::time::Timestamp;

/// Values for the `?` of a statement.
#[derive(Default)]
pub(crate) struct Args {
    arguments: AnyArguments,
    failed: Option<String>,
}

impl Args {
    pub(crate) fn add<'t, T>(&mut self, value: T)
    where
        T: Encode<'t, Any> + Type<Any>,
    {
        if let Err(error) = self.arguments.add(value) {
            self.failed = Some(error.to_string());
        }
    }
}

/// `args![tenant.as_str(), 5_i64]`
macro_rules! args {
    () => { $crate::sql::Args::default() };
    ($($value:expr),+ $(,)?) => {{
        let mut args = $crate::sql::Args::default();
        $(args.add($value);)+
        args
    }};
}
pub(crate) use args;

/// Statements that go to the database together, their arguments one after the other. Each statement on its own costs a hop to the driver's
/// thread and back, which is more than the database's own work. SQLite's driver runs them in order; a database whose driver does not must
/// be given them one by one.
pub(crate) fn together(statements: &[&str]) -> String {
    statements.join(";\n")
}

/// A connection.
pub(crate) struct Db<'c> {
    connection: &'c mut AnyConnection,
    dialect: Dialect,
    pub(crate) keyring: &'c Keyring,
}

impl<'c> Db<'c> {
    pub(crate) fn new(connection: &'c mut AnyConnection, dialect: Dialect, keyring: &'c Keyring) -> Self {
        Self { connection, dialect, keyring }
    }

    pub(crate) async fn one(&mut self, sql: &'static str, args: Args) -> Result<Option<AnyRow>, StorageError> {
        Ok(sqlx::query_with(self.dialect.statement(sql), bound(args)?).fetch_optional(&mut *self.connection).await?)
    }

    pub(crate) async fn all(&mut self, sql: &'static str, args: Args) -> Result<Vec<AnyRow>, StorageError> {
        Ok(sqlx::query_with(self.dialect.statement(sql), bound(args)?).fetch_all(&mut *self.connection).await?)
    }

    /// Every row of a table, whose name comes from the database's own catalogue.
    pub(crate) async fn whole_table(&mut self, table: &str) -> Result<Vec<AnyRow>, StorageError> {
        if !table.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            return Err(StorageError::corrupt(format!("a table is called `{}`", table.escape_default())));
        }
        let statement = sqlx::AssertSqlSafe(format!("SELECT * FROM {table}"));
        Ok(sqlx::query(statement).fetch_all(&mut *self.connection).await?)
    }

    /// How many rows it changed.
    pub(crate) async fn run(&mut self, sql: &'static str, args: Args) -> Result<u64, StorageError> {
        Ok(sqlx::query_with(self.dialect.statement(sql), bound(args)?).execute(&mut *self.connection).await?.rows_affected())
    }
}

fn bound(args: Args) -> Result<AnyArguments, StorageError> {
    match args.failed {
        None => Ok(args.arguments),
        Some(problem) => Err(StorageError::Invalid { field: "argument", problem }),
    }
}

/// Columns by their place in the statement.
pub(crate) trait Columns {
    fn text(&self, column: usize) -> Result<String, StorageError>;
    fn opt_text(&self, column: usize) -> Result<Option<String>, StorageError>;
    fn int(&self, column: usize) -> Result<i64, StorageError>;
    fn opt_int(&self, column: usize) -> Result<Option<i64>, StorageError>;
    /// A blob with its format byte, for [`crate::sealed::Place::open`].
    fn blob(&self, column: usize) -> Result<Vec<u8>, StorageError>;
    fn opt_blob(&self, column: usize) -> Result<Option<Vec<u8>>, StorageError>;

    fn count(&self, column: usize) -> Result<u32, StorageError> {
        u32::try_from(self.int(column)?).map_err(|_| StorageError::corrupt(format!("column {column} is no count")))
    }
    fn flag(&self, column: usize) -> Result<bool, StorageError> {
        Ok(self.int(column)? != 0)
    }
    fn time(&self, column: usize) -> Result<Timestamp, StorageError> {
        Ok(Timestamp::from_millis(self.int(column)?))
    }
    fn opt_time(&self, column: usize) -> Result<Option<Timestamp>, StorageError> {
        Ok(self.opt_int(column)?.map(Timestamp::from_millis))
    }
    fn json(&self, column: usize) -> Result<serde_json::Value, StorageError> {
        parse_json(self.text(column)?.as_bytes())
    }
}

impl Columns for AnyRow {
    fn text(&self, column: usize) -> Result<String, StorageError> {
        Ok(self.try_get(column)?)
    }
    fn opt_text(&self, column: usize) -> Result<Option<String>, StorageError> {
        Ok(self.try_get(column)?)
    }
    fn int(&self, column: usize) -> Result<i64, StorageError> {
        Ok(self.try_get(column)?)
    }
    fn opt_int(&self, column: usize) -> Result<Option<i64>, StorageError> {
        Ok(self.try_get(column)?)
    }
    fn blob(&self, column: usize) -> Result<Vec<u8>, StorageError> {
        Ok(self.try_get(column)?)
    }
    fn opt_blob(&self, column: usize) -> Result<Option<Vec<u8>>, StorageError> {
        Ok(self.try_get(column)?)
    }
}

pub(crate) fn parse_json(text: &[u8]) -> Result<serde_json::Value, StorageError> {
    serde_json::from_slice(text).map_err(|error| StorageError::corrupt(format!("a JSON column does not parse: {error}")))
}
