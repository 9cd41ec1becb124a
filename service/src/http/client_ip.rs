//! The address that a request comes from.

use std::net::IpAddr;

use ipnet::IpNet;
use salvo::Request;

/// The client's address: the connection's, or, behind trusted proxies, the last one in `X-Forwarded-For` that is not a
/// trusted proxy. The client could have made up anything left of it.
pub(super) fn client_ip(req: &Request, trusted_proxies: &[IpNet]) -> Option<IpAddr> {
    let peer = req.remote_addr().ip()?.to_canonical();
    let forwarded = req.headers().get_all("x-forwarded-for");
    let hops: Vec<&str> =
        forwarded.iter().filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(',')).collect();
    Some(last_untrusted(peer, &hops, trusted_proxies))
}

fn last_untrusted(peer: IpAddr, hops: &[&str], trusted_proxies: &[IpNet]) -> IpAddr {
    let trusted = |address: &IpAddr| trusted_proxies.iter().any(|network| network.contains(address));
    let mut client = peer;
    for hop in hops.iter().rev() {
        if !trusted(&client) {
            break;
        }
        // A trusted proxy wrote this hop. If it is no address, the proxy's own is the best that is known.
        let Ok(address) = hop.trim().parse::<IpAddr>() else { break };
        client = address.to_canonical();
    }
    client
}
