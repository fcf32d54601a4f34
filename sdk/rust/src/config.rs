//! The operator's configuration: the table `[config]` of the grant file. Always granted.

use serde::de::DeserializeOwned;

use crate::{Failure, host};

/// The whole configuration as a type; also at the crate's root as `wasmdm_plugin::config::<T>()`.
///
/// Without a configuration it is an empty object, so give the type defaults.
///
/// ```
/// use serde::Deserialize;
/// use serde_json::json;
///
/// #[derive(Deserialize)]
/// #[serde(deny_unknown_fields)]
/// struct Config {
///     minimum_os: String,
/// }
///
/// let host = wasmdm_plugin::mock::Host::new();
/// host.set_config(json!({ "minimum_os": "26.1" }));
/// assert_eq!(wasmdm_plugin::config::<Config>().unwrap().minimum_os, "26.1");
/// ```
pub fn read<T: DeserializeOwned>() -> Result<T, Failure> {
    parse(&document())
}

/// A configuration as a type, for instance the one that `validate_config` gets.
pub fn parse<T: DeserializeOwned>(document: &str) -> Result<T, Failure> {
    serde_json::from_str(document).map_err(|error| Failure::from(error).context("configuration"))
}

/// One top-level key as a type; `None` if it is absent. Cheaper than the whole document where that is large.
pub fn key<T: DeserializeOwned>(name: &str) -> Result<Option<T>, Failure> {
    raw(name)
        .map(|text| serde_json::from_str(&text))
        .transpose()
        .map_err(|error| Failure::from(error).context(format_args!("configuration key `{name}`")))
}

/// One top-level key as JSON text.
pub fn raw(name: &str) -> Option<String> {
    host::config::get(name)
}

/// The whole configuration as JSON text.
pub fn document() -> String {
    host::config::document()
}
