//! Through which proxy the push service is reached: the one that was named, or the one that the environment names for everything that goes out
//! with TLS. As Go's libraries choose, and NanoMDM with them, so that a server behind an egress proxy need not be told twice.

use std::net::IpAddr;

use anyhow::Context as _;
use ipnet::IpNet;
use wasmdm_apns::{Endpoint, Proxy};

/// `given` is the flag; the variables count without it only.
pub fn choose(given: Option<&str>, endpoint: &Endpoint, variable: impl Fn(&str) -> Option<String>) -> anyhow::Result<Option<Proxy>> {
    match given.map(str::trim) {
        Some("none") => return Ok(None),
        Some(url) => return Proxy::parse(url).map(Some).map_err(|error| anyhow::anyhow!("apns-{error}")),
        None => {}
    }
    let first = |names: [&str; 2]| names.into_iter().filter_map(&variable).find(|value| !value.trim().is_empty());
    let Some(url) = first(["HTTPS_PROXY", "https_proxy"]) else { return Ok(None) };
    if is_local(endpoint.host()) || first(["NO_PROXY", "no_proxy"]).is_some_and(|excepted| is_excepted(&excepted, endpoint)) {
        return Ok(None);
    }
    // Pushes that silently go nowhere are worse than a server that does not start.
    Proxy::parse(&url).map(Some).context("HTTPS_PROXY: name another one with apns-proxy, or say there that none is to be used (`none`)")
}

/// Nobody means these with the variable.
fn is_local(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost") || host.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

/// Names with everything below them, names that begin with a dot without themselves, addresses, networks, each with or without a port; `*`.
fn is_excepted(excepted: &str, endpoint: &Endpoint) -> bool {
    let host = endpoint.host().to_ascii_lowercase();
    let address: Option<IpAddr> = host.parse().ok();
    excepted.split(',').map(|one| one.trim().to_ascii_lowercase()).filter(|one| !one.is_empty()).any(|one| {
        if one == "*" {
            return true;
        }
        if let (Ok(network), Some(address)) = (one.parse::<IpNet>(), &address) {
            return network.contains(address);
        }
        // An IPv6 address has colons of its own.
        let (name, port) = match one.rsplit_once(':') {
            Some((name, port)) if one.parse::<IpAddr>().is_err() => (name, port.parse::<u16>().ok()),
            _ => (one.as_str(), None),
        };
        if port.is_some_and(|port| port != endpoint.port()) {
            return false;
        }
        let name = name.trim_start_matches('[').trim_end_matches(']').trim_start_matches('*');
        match name.strip_prefix('.') {
            Some(_) => host.ends_with(name),
            None => host == name || host.strip_suffix(name).is_some_and(|rest| rest.ends_with('.')),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(given: Option<&str>, endpoint: &str, variables: &[(&str, &str)]) -> Option<String> {
        let variable = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        choose(given, &Endpoint::parse(endpoint).unwrap(), variable).unwrap().map(|proxy| proxy.to_string())
    }

    /// NanoMDM's transport looks at these variables; a server that moved from it behind an egress proxy lost every push.
    #[test]
    fn the_environments_proxy_is_used_unless_another_is_named() {
        const APPLE: &str = "api.push.apple.com";
        let both = [("HTTPS_PROXY", "http://one:1"), ("https_proxy", "http://two:2")];
        assert_eq!(chosen(None, APPLE, &both).as_deref(), Some("one:1"));
        assert_eq!(chosen(None, APPLE, &both[1..]).as_deref(), Some("two:2"));
        assert_eq!(chosen(None, APPLE, &[("HTTPS_PROXY", ""), ("HTTP_PROXY", "http://three:3")]), None);
        assert_eq!(chosen(Some("http://four:4"), APPLE, &both).as_deref(), Some("four:4"));
        assert_eq!(chosen(Some("none"), APPLE, &both), None);
        assert_eq!(chosen(None, "localhost:2197", &both), None);
        assert_eq!(chosen(None, "127.0.0.1:2197", &both), None);
        let wrong = choose(None, &Endpoint::default(), |_| Some("https://name:secret@host".to_owned())).unwrap_err();
        assert!(format!("{wrong:#}").contains("apns-proxy") && !format!("{wrong:#}").contains("secret"), "{wrong:#}");
    }

    #[test]
    fn whom_no_proxy_names_is_reached_straight() {
        for (excepted, endpoint, is_straight) in [
            ("*", "api.push.apple.com", true),
            ("example.com, apple.com", "api.push.apple.com", true),
            ("API.push.apple.com", "api.push.apple.com", true),
            (".apple.com", "api.push.apple.com", true),
            ("*.apple.com", "api.push.apple.com", true),
            (".api.push.apple.com", "api.push.apple.com", false),
            ("pple.com", "api.push.apple.com", false),
            ("apple.com:443", "api.push.apple.com", true),
            ("apple.com:443", "api.push.apple.com:2197", false),
            ("10.0.0.0/8", "10.1.2.3:443", true),
            ("10.1.2.3", "10.1.2.3:443", true),
            ("10.1.2.4", "10.1.2.3:443", false),
            ("2001:db8::1", "[2001:db8::1]:443", true),
            ("", "api.push.apple.com", false),
        ] {
            let proxy = chosen(None, endpoint, &[("HTTPS_PROXY", "http://proxy:1"), ("NO_PROXY", excepted)]);
            assert_eq!(proxy.is_none(), is_straight, "{excepted} {endpoint}");
        }
    }
}
