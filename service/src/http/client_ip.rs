//! The address that a request comes from, and the client that it counts as.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Once;

use ipnet::{IpNet, Ipv6Net};
use salvo::Request;

/// What a log line shows of a header.
const SHOWN_BYTES: usize = 64;

/// The network that one IPv6 client is given: it may use every address in it.
const IPV6_CLIENT_PREFIX: u8 = 64;

/// 64:ff9b::/96, behind which translators write the addresses of IPv4 clients.
const NAT64: [u16; 6] = [0x64, 0xff9b, 0, 0, 0, 0];

/// The client's address: the connection's, or, behind trusted proxies, the last one in `X-Forwarded-For` that is not a
/// trusted proxy. The client could have made up anything left of it.
pub(super) fn client_ip(req: &Request, trusted_proxies: &[IpNet]) -> Option<IpAddr> {
    let peer = req.remote_addr().ip()?.to_canonical();
    // Several headers are one list. Only what is looked at has to be text.
    let lines = req.headers().get_all("x-forwarded-for").iter();
    let hops = lines.rev().flat_map(|line| line.as_bytes().rsplit(|byte| *byte == b','));
    Some(last_untrusted(peer, hops, trusted_proxies))
}

/// The client that limits count for this address: an IPv4 address, or the /64 of an IPv6 one.
pub(super) fn counted_client(address: IpAddr) -> String {
    match address {
        IpAddr::V6(address) => match address.segments() {
            [prefix @ .., high, low] if prefix == NAT64 => {
                let [a, b] = high.to_be_bytes();
                let [c, d] = low.to_be_bytes();
                Ipv4Addr::new(a, b, c, d).to_string()
            }
            _ => Ipv6Net::new_assert(address, IPV6_CLIENT_PREFIX).trunc().to_string(),
        },
        IpAddr::V4(address) => address.to_string(),
    }
}

/// `hops` begins with the last one.
fn last_untrusted<'a>(
    peer: IpAddr,
    hops: impl Iterator<Item = &'a [u8]>,
    trusted_proxies: &[IpNet],
) -> IpAddr {
    let trusted = |address: &IpAddr| trusted_proxies.iter().any(|network| network.contains(address));
    let mut client = peer;
    for hop in hops {
        if !trusted(&client) {
            break;
        }
        // A trusted proxy wrote this hop. If it is no address, the proxy's own is the best that is known. What is left of
        // it, even of an empty one, may be the client's invention.
        let Some(address) = parse_hop(hop) else {
            warn_once(client, hop);
            break;
        };
        client = address;
    }
    client
}

/// An address, where a port, quotes and blanks do not matter: `203.0.113.7:51234`, `"[2001:db8::1]:443"`.
fn parse_hop(hop: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(hop).ok()?.trim();
    let text = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text).trim();
    let (host, port) = match text.strip_prefix('[') {
        Some(text) => match text.split_once(']')? {
            (host, "") => (host, None),
            (host, port) => (host, Some(port.strip_prefix(':')?)),
        },
        None => match text.split_once(':') {
            Some((host, port)) if !port.contains(':') => (host, Some(port)),
            _ => (text, None),
        },
    };
    if port.is_some_and(|port| port.parse::<u16>().is_err()) {
        return None;
    }
    // A zone means something only to the proxy's machine.
    let host = host.split('%').next().unwrap_or_default();
    host.parse::<IpAddr>().ok().map(|address| address.to_canonical())
}

/// Clients choose how often this happens, so it is said once. A hop may be any text of any length.
fn warn_once(proxy: IpAddr, hop: &[u8]) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let shown = String::from_utf8_lossy(&hop[..hop.len().min(SHOWN_BYTES)]);
        tracing::warn!(
            "the trusted proxy {proxy} wrote {:?} into X-Forwarded-For, which is no address: its clients share one rate \
             limit; configure it to append the client's address. Said once per process",
            shown.trim()
        );
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hop_is_an_address_with_or_without_a_port() {
        for (hop, address) in [
            ("203.0.113.7", Some("203.0.113.7")),
            (" 203.0.113.7:51234\t", Some("203.0.113.7")),
            ("\"203.0.113.7:51234\"", Some("203.0.113.7")),
            ("2001:db8::1", Some("2001:db8::1")),
            ("[2001:db8::1]", Some("2001:db8::1")),
            ("\" [2001:db8::1]:443 \"", Some("2001:db8::1")),
            ("[::ffff:203.0.113.7]:1", Some("203.0.113.7")),
            ("fe80::1%eth0", Some("fe80::1")),
            ("[fe80::1%25eth0]:1", Some("fe80::1")),
            ("", None),
            ("unknown", None),
            ("_hidden:80", None),
            ("203.0.113.7:", None),
            ("203.0.113.7:port", None),
            ("203.0.113.7:65536", None),
            ("203.0.113", None),
            ("[203.0.113.7", None),
            ("[2001:db8::1]443", None),
            ("2001:db8::1]:443", None),
            ("for=203.0.113.7", None),
            ("203.0.113.7 203.0.113.8", None),
            ("\"203.0.113.7", None),
        ] {
            let expected = address.map(|address| address.parse::<IpAddr>().expect("an address"));
            assert_eq!(parse_hop(hop.as_bytes()), expected, "{hop:?}");
        }
        assert_eq!(parse_hop(b"203.0.113.7\xff"), None);
    }

    #[test]
    fn a_client_is_an_ipv4_address_or_the_64_of_an_ipv6_address() {
        for (address, client) in [
            ("203.0.113.7", "203.0.113.7"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
            ("2001:db8::", "2001:db8::/64"),
            ("::1", "::/64"),
            ("64:ff9b::203.0.113.7", "203.0.113.7"),
            ("64:ff9b:1::203.0.113.7", "64:ff9b:1::/64"),
        ] {
            assert_eq!(counted_client(address.parse().expect("an address")), client);
        }
    }
}
