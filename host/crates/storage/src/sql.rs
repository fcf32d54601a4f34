//! Running statements: arguments, rows, and connections that know their dialect.

use crate::StorageError;
use crate::dialect::Dialect;
use crate::direct::DirectConnection;
use crate::keyring::Keyring;
use rusqlite::types::Value;
use sqlx::any::{AnyArguments, AnyRow};
use sqlx::{AnyConnection, Arguments as _, Row as _};
use wasmdm_protocol::time::Timestamp;

/// Values for the `?` of a statement.
#[derive(Default)]
pub(crate) struct Args {
    pub(crate) values: Vec<Value>,
}

impl Args {
    pub(crate) fn add(&mut self, value: impl Argument) {
        self.values.push(value.into_value());
    }
}

/// What can be a value of a statement.
pub(crate) trait Argument {
    fn into_value(self) -> Value;
}

impl Argument for i64 {
    fn into_value(self) -> Value {
        Value::Integer(self)
    }
}

impl Argument for String {
    fn into_value(self) -> Value {
        Value::Text(self)
    }
}

impl Argument for &str {
    fn into_value(self) -> Value {
        Value::Text(self.to_owned())
    }
}

impl Argument for Vec<u8> {
    fn into_value(self) -> Value {
        Value::Blob(self)
    }
}

impl Argument for &[u8] {
    fn into_value(self) -> Value {
        Value::Blob(self.to_owned())
    }
}

impl<T: Argument> Argument for Option<T> {
    fn into_value(self) -> Value {
        self.map_or(Value::Null, Argument::into_value)
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

/// Between statements that go together; it stands in no statement.
pub(crate) const NEXT: &str = ";\n";

/// Statements that go to the database together, their arguments one after the other. Through a driver with a thread of its own each
/// statement costs a hop there and back, which is more than the database's own work. SQLite's driver runs them in order; a database whose
/// driver does not must be given them one by one.
pub(crate) fn together(statements: &[&str]) -> String {
    statements.join(NEXT)
}

/// A connection.
pub(crate) struct Db<'c> {
    connection: Connection<'c>,
    dialect: Dialect,
    pub(crate) keyring: &'c Keyring,
}

enum Connection<'c> {
    Driven(&'c mut AnyConnection),
    Direct(&'c mut DirectConnection),
}

impl<'c> Db<'c> {
    /// Through the driver, on whose thread the statements run.
    pub(crate) fn driven(connection: &'c mut AnyConnection, dialect: Dialect, keyring: &'c Keyring) -> Self {
        Self { connection: Connection::Driven(connection), dialect, keyring }
    }

    /// On the caller's own thread: the futures are ready at once.
    pub(crate) fn direct(connection: &'c mut DirectConnection, dialect: Dialect, keyring: &'c Keyring) -> Self {
        Self { connection: Connection::Direct(connection), dialect, keyring }
    }

    pub(crate) async fn one(&mut self, sql: &'static str, args: Args) -> Result<Option<Row>, StorageError> {
        match &mut self.connection {
            Connection::Driven(connection) => {
                let row = sqlx::query_with(self.dialect.statement(sql), bound(args)?).fetch_optional(&mut **connection).await?;
                Ok(row.map(Row::Driven))
            }
            Connection::Direct(connection) => connection.one(sql, args),
        }
    }

    pub(crate) async fn all(&mut self, sql: &'static str, args: Args) -> Result<Vec<Row>, StorageError> {
        match &mut self.connection {
            Connection::Driven(connection) => {
                let rows = sqlx::query_with(self.dialect.statement(sql), bound(args)?).fetch_all(&mut **connection).await?;
                Ok(rows.into_iter().map(Row::Driven).collect())
            }
            Connection::Direct(connection) => connection.all(sql, args),
        }
    }

    /// Every row of a table, whose name comes from the database's own catalogue.
    pub(crate) async fn whole_table(&mut self, table: &str) -> Result<Vec<Row>, StorageError> {
        if !table.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            return Err(StorageError::corrupt(format!("a table is called `{}`", table.escape_default())));
        }
        let statement = format!("SELECT * FROM {table}");
        match &mut self.connection {
            Connection::Driven(connection) => {
                let rows = sqlx::query(sqlx::AssertSqlSafe(statement)).fetch_all(&mut **connection).await?;
                Ok(rows.into_iter().map(Row::Driven).collect())
            }
            Connection::Direct(connection) => connection.all(&statement, args![]),
        }
    }

    /// How many rows it changed.
    pub(crate) async fn run(&mut self, sql: &'static str, args: Args) -> Result<u64, StorageError> {
        match &mut self.connection {
            Connection::Driven(connection) => {
                Ok(sqlx::query_with(self.dialect.statement(sql), bound(args)?).execute(&mut **connection).await?.rows_affected())
            }
            Connection::Direct(connection) => connection.run(sql, args),
        }
    }
}

fn bound(args: Args) -> Result<AnyArguments, StorageError> {
    let mut arguments = AnyArguments::default();
    for value in args.values {
        let added = match value {
            Value::Null => arguments.add(None::<i64>),
            Value::Integer(number) => arguments.add(number),
            Value::Real(number) => arguments.add(number),
            Value::Text(text) => arguments.add(text),
            Value::Blob(bytes) => arguments.add(bytes),
        };
        added.map_err(|error| StorageError::Invalid { field: "argument", problem: error.to_string() })?;
    }
    Ok(arguments)
}

/// A row of an answer.
pub(crate) enum Row {
    Driven(AnyRow),
    Direct(Vec<Value>),
}

impl Row {
    /// How many columns it has.
    pub(crate) fn width(&self) -> usize {
        match self {
            Self::Driven(row) => row.len(),
            Self::Direct(values) => values.len(),
        }
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

impl Columns for Row {
    fn text(&self, column: usize) -> Result<String, StorageError> {
        self.opt_text(column)?.ok_or_else(|| is_null(column))
    }
    fn opt_text(&self, column: usize) -> Result<Option<String>, StorageError> {
        match self {
            Self::Driven(row) => Ok(row.try_get(column)?),
            Self::Direct(values) => match values.get(column) {
                Some(Value::Null) => Ok(None),
                Some(Value::Text(text)) => Ok(Some(text.clone())),
                _ => Err(is_other(column, "text")),
            },
        }
    }
    fn int(&self, column: usize) -> Result<i64, StorageError> {
        self.opt_int(column)?.ok_or_else(|| is_null(column))
    }
    fn opt_int(&self, column: usize) -> Result<Option<i64>, StorageError> {
        match self {
            Self::Driven(row) => Ok(row.try_get(column)?),
            Self::Direct(values) => match values.get(column) {
                Some(Value::Null) => Ok(None),
                Some(Value::Integer(number)) => Ok(Some(*number)),
                _ => Err(is_other(column, "number")),
            },
        }
    }
    fn blob(&self, column: usize) -> Result<Vec<u8>, StorageError> {
        self.opt_blob(column)?.ok_or_else(|| is_null(column))
    }
    fn opt_blob(&self, column: usize) -> Result<Option<Vec<u8>>, StorageError> {
        match self {
            Self::Driven(row) => Ok(row.try_get(column)?),
            Self::Direct(values) => match values.get(column) {
                Some(Value::Null) => Ok(None),
                Some(Value::Blob(bytes)) => Ok(Some(bytes.clone())),
                _ => Err(is_other(column, "blob")),
            },
        }
    }
}

fn is_null(column: usize) -> StorageError {
    StorageError::corrupt(format!("column {column} is NULL"))
}

fn is_other(column: usize, wanted: &str) -> StorageError {
    StorageError::corrupt(format!("column {column} is no {wanted}"))
}

pub(crate) fn parse_json(text: &[u8]) -> Result<serde_json::Value, StorageError> {
    serde_json::from_slice(text).map_err(|error| StorageError::corrupt(format!("a JSON column does not parse: {error}")))
}
