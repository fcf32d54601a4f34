//! Whoever says how a device returns to service (`ReturnToService`).

use std::fmt;

use futures_util::future::BoxFuture;
use wasmdm_protocol::plist::{Dictionary, Value};

use crate::asker::Asker;
use crate::owned_answer::OwnedAnswer;
use crate::reply::Refusal;

/// The plugin with the hook `return-to-service`.
pub trait ReturnToService: fmt::Debug + Send + Sync + 'static {
    /// Asks the owner; `None`: the device does not return. An error is the database's.
    fn configuration<'a>(&'a self, asker: &'a Asker) -> BoxFuture<'a, Result<OwnedAnswer<Option<Configuration>>, Refusal>>;
}

/// How a device returns: Apple's dictionary, but for the bootstrap token.
#[derive(Clone, PartialEq)]
pub struct Configuration {
    keys: Dictionary,
    /// The escrowed token goes with it.
    pub with_bootstrap_token: bool,
}

impl Configuration {
    /// Checks Apple's keys; ones that this server does not know are left as they are. `BootstrapToken` is true or false: the token itself is
    /// the server's to put in.
    pub fn new(mut keys: Dictionary) -> Result<Self, String> {
        if !matches!(keys.get("Enabled"), Some(Value::Boolean(_))) {
            return Err("Enabled: is missing, or is neither true nor false".to_owned());
        }
        for key in ["WiFiProfileData", "MDMProfileData"] {
            match keys.get(key) {
                None => {}
                Some(Value::Data(profile)) if !profile.is_empty() => {}
                Some(_) => return Err(format!("{key}: is not the data of a profile")),
            }
        }
        let with_bootstrap_token = match keys.remove("BootstrapToken") {
            None => false,
            Some(Value::Boolean(wanted)) => wanted,
            Some(_) => return Err("BootstrapToken: is neither true nor false; the server puts the token in".to_owned()),
        };
        Ok(Self { keys, with_bootstrap_token })
    }

    /// Apple's dictionary, with the token if one is given.
    pub fn into_keys(self, bootstrap_token: Option<&[u8]>) -> Dictionary {
        let mut keys = self.keys;
        if let Some(token) = bootstrap_token {
            keys.insert("BootstrapToken".to_owned(), Value::Data(token.to_vec()));
        }
        keys
    }
}

/// Without its values: a Wi-Fi profile has a password.
impl fmt::Debug for Configuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Configuration")
            .field("keys", &self.keys.keys().collect::<Vec<_>>())
            .field("with_bootstrap_token", &self.with_bootstrap_token)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configuration(keys: &[(&str, Value)]) -> Result<Configuration, String> {
        Configuration::new(keys.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect())
    }

    #[test]
    fn a_wrong_key_is_named() {
        let enabled = ("Enabled", Value::Boolean(true));
        for (keys, named) in [
            (vec![], "Enabled: is missing"),
            (vec![("Enabled", Value::from("yes"))], "Enabled"),
            (vec![enabled.clone(), ("WiFiProfileData", Value::from("profile"))], "WiFiProfileData"),
            (vec![enabled.clone(), ("MDMProfileData", Value::Data(Vec::new()))], "MDMProfileData"),
            (vec![enabled.clone(), ("BootstrapToken", Value::Data(vec![1]))], "BootstrapToken"),
        ] {
            let problem = configuration(&keys).unwrap_err();
            assert!(problem.starts_with(named), "{problem}");
        }
        let whole = configuration(&[enabled, ("BootstrapToken", Value::Boolean(true)), ("ShouldRetryEnrollment", Value::Boolean(true))]).unwrap();
        assert!(whole.with_bootstrap_token);
        let keys: Vec<String> = whole.into_keys(Some(b"token")).keys().cloned().collect();
        assert_eq!(keys, ["Enabled", "ShouldRetryEnrollment", "BootstrapToken"]);
    }
}
