//! `${name}` in URLs and header values: secrets that the plugin names and never sees.

use std::collections::{BTreeMap, BTreeSet};

use super::{EgressError, SecretBinding};

/// The secrets that were put into a request, by name, with the hosts that may have them.
#[derive(Debug, Default)]
pub(super) struct Used {
    bindings: BTreeSet<(String, String)>,
}

impl Used {
    pub(super) fn is_empty(&self) -> bool {
        self.bindings.is_empty()
    }

    /// Fails unless every secret may go to this host.
    pub(super) fn only_for(&self, host: &str) -> Result<(), EgressError> {
        match self.bindings.iter().find(|(_, bound)| !bound.eq_ignore_ascii_case(host)) {
            Some((name, _)) => Err(EgressError::denied(format!("the secret `{name}` is bound to another host"))),
            None => Ok(()),
        }
    }
}

/// Replaces each `${name}`, once: what a secret itself contains is not looked at again.
pub(super) fn fill(template: &str, secrets: &BTreeMap<String, SecretBinding>, used: &mut Used) -> Result<String, EgressError> {
    let mut filled = String::with_capacity(template.len());
    let mut rest = template;
    while let Some((before, after)) = rest.split_once("${") {
        filled.push_str(before);
        let (name, after) = after.split_once('}').ok_or_else(|| EgressError::invalid("a template has `${` without `}`"))?;
        let binding = secrets.get(name).ok_or_else(|| EgressError::denied(format!("the secret `{}` is not granted", shown(name))))?;
        used.bindings.insert((name.into(), binding.host.clone()));
        filled.push_str(&binding.value);
        rest = after;
    }
    filled.push_str(rest);
    Ok(filled)
}

/// A name that the plugin made up, short and on one line.
fn shown(name: &str) -> String {
    name.chars().take(64).filter(|character| !character.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secrets() -> BTreeMap<String, SecretBinding> {
        let binding = |host: &str, value: &str| SecretBinding { host: host.into(), value: value.into() };
        BTreeMap::from([("token".into(), binding("hooks.example", "s3cret")), ("nested".into(), binding("hooks.example", "${token}"))])
    }

    #[test]
    fn each_name_is_replaced_once() {
        let mut used = Used::default();
        assert_eq!(fill("Bearer ${token}, ${nested}!", &secrets(), &mut used).unwrap(), "Bearer s3cret, ${token}!");
        assert!(used.only_for("HOOKS.example").is_ok());
        assert_eq!(used.only_for("evil.example").unwrap_err().code, "denied");
    }

    #[test]
    fn unknown_names_and_open_braces_are_refused() {
        let mut used = Used::default();
        assert_eq!(fill("${other}", &secrets(), &mut used).unwrap_err().code, "denied");
        assert_eq!(fill("${token", &secrets(), &mut used).unwrap_err().code, "invalid");
    }

    #[test]
    fn a_secret_does_not_show_in_debug_output() {
        assert!(!format!("{:?}", secrets()).contains("s3cret"));
    }
}
