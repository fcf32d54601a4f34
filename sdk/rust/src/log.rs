//! Lines in the server's log. Always granted; bounded in lines, length and rate, the rest is dropped and counted.
//!
//! Use the macros [`trace!`](crate::trace!), [`debug!`](crate::debug!), [`info!`](crate::info!), [`warn!`](crate::warn!)
//! and [`error!`](crate::error!). Fields stand after a semicolon:
//!
//! ```
//! let host = wasmdm_plugin::mock::Host::new();
//! let count = 3;
//! wasmdm_plugin::info!("Refreshed {count} serial numbers"; count = count, source = "https://lists.example");
//! assert_eq!(host.logs()[0].message, "Refreshed 3 serial numbers");
//! ```

use crate::host;

pub use crate::host::types::log::Level;

/// Writes one line. The macros are more convenient.
pub fn write(severity: Level, message: &str, fields: &[(String, String)]) {
    host::log::write(severity, message, fields);
}

#[doc(hidden)]
#[macro_export]
macro_rules! __log {
    ($level:ident, $format:literal $(, $argument:expr)* $(; $($key:ident = $value:expr),* $(,)?)?) => {
        $crate::log::write(
            $crate::log::Level::$level,
            &::std::format!($format $(, $argument)*),
            &[$($((::std::string::String::from(stringify!($key)), ::std::string::ToString::to_string(&$value))),*)?],
        )
    };
}

/// Logs at level trace. See [`log`](crate::log).
#[macro_export]
macro_rules! trace { ($($line:tt)*) => { $crate::__log!(Trace, $($line)*) }; }
/// Logs at level debug. See [`log`](crate::log).
#[macro_export]
macro_rules! debug { ($($line:tt)*) => { $crate::__log!(Debug, $($line)*) }; }
/// Logs at level info. See [`log`](crate::log).
#[macro_export]
macro_rules! info { ($($line:tt)*) => { $crate::__log!(Info, $($line)*) }; }
/// Logs at level warn. See [`log`](crate::log).
#[macro_export]
macro_rules! warn { ($($line:tt)*) => { $crate::__log!(Warn, $($line)*) }; }
/// Logs at level error. See [`log`](crate::log).
#[macro_export]
macro_rules! error { ($($line:tt)*) => { $crate::__log!(Error, $($line)*) }; }
