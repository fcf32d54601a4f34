//! Which addresses plugins do not reach.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

/// Whether an address is in a range that only a grant of the address itself opens: private, loopback, link-local, shared, reserved and
/// multicast ranges of both families, and IPv6 forms that carry such an address inside.
pub fn is_refused(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_refused_v4(address),
        IpAddr::V6(address) => is_refused_v6(address),
    }
}

fn is_refused_v4(address: Ipv4Addr) -> bool {
    let [first, second, third, _] = address.octets();
    match first {
        0 | 10 | 127 => true,
        100 => second & 0xC0 == 64,
        169 => second == 254,
        172 => second & 0xF0 == 16,
        192 => matches!((second, third), (0, 0) | (168, _)),
        198 => second & 0xFE == 18,
        _ => first >= 224,
    }
}

fn is_refused_v6(address: Ipv6Addr) -> bool {
    let segments = address.segments();
    let [first, second, third, ..] = segments;
    let [.., high, low] = segments;
    let last = embedded(high, low);
    match (first, second) {
        // Unspecified, loopback, IPv4-compatible and mapped forms: only what is inside can make them good.
        (0, 0) => match segments {
            [0, 0, 0, 0, 0, 0 | 0xFFFF, _, _] => is_refused_v4(last),
            // `::ffff:0:a.b.c.d` of translators, and whatever else begins with zeros: nothing public.
            _ => true,
        },
        // NAT64: the well-known prefix leads to the address inside, the local one into the network here.
        (0x0064, 0xFF9B) => match segments {
            [_, _, 0, 0, 0, 0, _, _] => is_refused_v4(last),
            _ => true,
        },
        // Teredo and 6to4: relays that nobody needs to reach a service.
        (0x2001, 0) | (0x2002, _) => true,
        // The discard prefix.
        (0x0100, 0) => third == 0,
        // Unique local, link-local, site-local, multicast.
        _ => first & 0xFE00 == 0xFC00 || first & 0xFFC0 == 0xFE80 || first & 0xFFC0 == 0xFEC0 || first & 0xFF00 == 0xFF00,
    }
}

fn embedded(high: u16, low: u16) -> Ipv4Addr {
    Ipv4Addr::from((u32::from(high) << 16) | u32::from(low))
}

/// The IPv4 address inside a form that means the same machine, else the address itself.
pub(super) fn canonical(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V6(six) => match six.segments() {
            [0, 0, 0, 0, 0, 0xFFFF, high, low] | [0x0064, 0xFF9B, 0, 0, 0, 0, high, low] => IpAddr::V4(embedded(high, low)),
            _ => address,
        },
        IpAddr::V4(_) => address,
    }
}

/// Whether the address is one of this machine's: only then a socket can be bound to it.
pub(super) fn is_local(address: IpAddr) -> bool {
    address.is_loopback() || address.is_unspecified() || UdpSocket::bind((address, 0)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_loopback_and_reserved_addresses_are_refused_in_every_form() {
        for text in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.255.255",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.1",
            "192.168.0.1",
            "198.18.0.1",
            "198.19.255.255",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::127.0.0.1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "::ffff:0:10.0.0.1",
            "64:ff9b::10.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::8.8.8.8",
            "2002:7f00:1::",
            "2002:0a00:0001::1",
            "2001:0:4136:e378:8000:63bf:3fff:fdd2",
            "fc00::1",
            "fd12:3456::1",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "100::1",
        ] {
            let address: IpAddr = text.parse().unwrap();
            assert!(is_refused(address), "{text}");
        }
    }

    #[test]
    fn public_addresses_are_not_refused() {
        for text in [
            "1.1.1.1",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "126.255.255.255",
            "128.0.0.1",
            "169.253.0.1",
            "172.15.255.255",
            "172.32.0.0",
            "192.0.1.1",
            "192.167.0.1",
            "198.17.0.1",
            "198.20.0.1",
            "223.255.255.255",
            "::ffff:8.8.8.8",
            "64:ff9b::8.8.8.8",
            "2606:4700::1111",
            "2001:4860:4860::8888",
        ] {
            let address: IpAddr = text.parse().unwrap();
            assert!(!is_refused(address), "{text}");
        }
    }

    #[test]
    fn a_foreign_address_is_not_local() {
        assert!(is_local("127.0.0.1".parse().unwrap()));
        assert!(!is_local("192.0.2.1".parse().unwrap()));
    }
}
