//! The parsers of single values. A fault never quotes one that may hold a password.

use std::net::IpAddr;
use std::str::FromStr as _;

use ipnet::{IpNet, Ipv4Net};
use reqwest::Url;
use sqlx::postgres::PgConnectOptions;

/// Stands for every origin in `CORS_ALLOWED_ORIGINS`.
pub const ANY_ORIGIN: &str = "*";

/// A network, or an address as a network of its own, without the bits that its mask leaves out. IPv4 written as IPv6 is
/// IPv4, as in the addresses that it is compared with.
pub(super) fn trusted_proxy(value: &str) -> Result<IpNet, &'static str> {
    let value = value.trim();
    if value.is_empty() {
        return Err("an element of the list is empty; leave the comma out");
    }
    let network = value.parse::<IpNet>().or_else(|_| value.parse::<IpAddr>().map(IpNet::from));
    let network = network.map_err(|_| "it is neither a network (CIDR) nor an IP address")?.trunc();
    Ok(match network {
        IpNet::V6(network) if network.prefix_len() >= 96 => match network.addr().to_ipv4_mapped() {
            Some(address) => Ipv4Net::new_assert(address, network.prefix_len() - 96).into(),
            None => network.into(),
        },
        network => network,
    })
}

/// An origin as browsers write it, because `Origin` is compared byte by byte; or [`ANY_ORIGIN`].
pub(super) fn origin(value: &str) -> Result<String, String> {
    let value = value.trim();
    if value == ANY_ORIGIN {
        return Ok(value.to_owned());
    }
    let fault = || "an origin is scheme://host or scheme://host:port".to_owned();
    let url = Url::parse(value).map_err(|_| fault())?;
    if value.contains(ANY_ORIGIN) {
        return Err(format!("{}, without a pattern", fault()));
    }
    let written = match url.scheme() {
        "http" | "https" => url.origin().ascii_serialization(),
        // Of an app with a browser inside, such as capacitor://localhost.
        scheme => {
            let host = url.host_str().filter(|host| !host.is_empty()).ok_or_else(fault)?.to_ascii_lowercase();
            let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
            format!("{scheme}://{host}{port}")
        }
    };
    if value == written { Ok(written) } else { Err(format!("browsers write this origin as {written}")) }
}

pub(super) fn log_filter(value: &str) -> Result<String, String> {
    tracing_subscriber::EnvFilter::try_new(value).map(|_| value.to_owned()).map_err(|error| error.to_string())
}

pub(super) fn parse_database_url(url: &str) -> Result<PgConnectOptions, String> {
    if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
        return Err("it does not begin with postgres://".to_owned());
    }
    if has_encoded_control(url) {
        return Err("it has an encoded control character, such as the line break %0A".to_owned());
    }
    PgConnectOptions::from_str(url).map_err(|error| error.to_string())
}

fn has_encoded_control(url: &str) -> bool {
    let encoded = url.split('%').skip(1);
    let mut codes = encoded.filter_map(|rest| u8::from_str_radix(rest.get(..2)?, 16).ok());
    codes.any(|code| code.is_ascii_control())
}

#[cfg(test)]
mod tests {
    use crate::config::tests::load;

    #[test]
    fn trusted_proxies_are_networks_or_addresses_with_blanks_between() {
        for (value, networks) in [
            ("10.0.0.0/8,192.168.0.0/16", &["10.0.0.0/8", "192.168.0.0/16"][..]),
            (" 10.0.0.0/8 , 192.168.0.0/16\t", &["10.0.0.0/8", "192.168.0.0/16"]),
            ("10.1.2.3, 2001:db8::1", &["10.1.2.3/32", "2001:db8::1/128"]),
            // What the mask leaves out does not count.
            ("10.1.2.3/8,2001:db8::1/32", &["10.0.0.0/8", "2001:db8::/32"]),
            // IPv4 written as IPv6 is IPv4.
            ("::ffff:10.1.2.3, ::ffff:10.0.0.0/104", &["10.1.2.3/32", "10.0.0.0/8"]),
            ("::/0", &["::/0"]),
        ] {
            let config = load(&[("TRUSTED_PROXIES", value)]).expect(value);
            let found: Vec<_> = config.trusted_proxies.iter().map(ToString::to_string).collect();
            assert_eq!(found, networks, "{value:?}");
        }
        for (value, words) in [
            ("everybody", "'everybody'"),
            ("10.0.0.0/8, proxy", " proxy'"),
            ("10.0.0.1:80", "'10.0.0.1:80'"),
            ("10.0.0.0/33", "'10.0.0.0/33'"),
            ("fe80::1%eth0", "'fe80::1%eth0'"),
            ("10.0.0.0/8,,10.1.2.3", "empty"),
            ("10.0.0.0/8,", "empty"),
        ] {
            let error = load(&[("TRUSTED_PROXIES", value)]).expect_err(value);
            assert!(
                error.starts_with("configuration: TRUSTED_PROXIES: ") && error.contains(words),
                "{error}"
            );
        }
    }

    #[test]
    fn an_origin_is_taken_only_as_browsers_write_it() {
        let origins =
            |value: &str| load(&[("CORS_ALLOWED_ORIGINS", value)]).map(|config| config.cors_allowed_origins);
        assert!(origins("").expect("unset").is_empty());
        for good in [
            "*",
            "https://chat.example.com",
            "http://localhost:5173",
            "https://192.0.2.1",
            "http://[::1]:8080",
            "https://xn--bcher-kva.example",
            "capacitor://localhost",
            "chrome-extension://abcdefghijklmnop",
        ] {
            assert_eq!(origins(good).expect(good), [good]);
        }
        let two = origins("https://a.example, https://b.example:8443").expect("two");
        assert_eq!(two, ["https://a.example", "https://b.example:8443"]);
        for (bad, fault) in [
            ("https://chat.example.com/", "as https://chat.example.com;"),
            ("https://chat.example.com/app", "as https://chat.example.com;"),
            ("https://chat.example.com?x", "as https://chat.example.com;"),
            ("https://chat.example.com#x", "as https://chat.example.com;"),
            ("https://user@chat.example.com", "as https://chat.example.com;"),
            ("https://Chat.Example.com", "as https://chat.example.com;"),
            ("HTTPS://chat.example.com", "as https://chat.example.com;"),
            ("https://chat.example.com:443", "as https://chat.example.com;"),
            ("http://chat.example.com:80", "as http://chat.example.com;"),
            ("https://bücher.example", "as https://xn--bcher-kva.example;"),
            ("chat.example.com", "scheme://host"),
            ("//chat.example.com", "scheme://host"),
            ("localhost:5173", "scheme://host"),
            ("https://", "scheme://host"),
            ("https://*.example.com", "scheme://host"),
            ("null", "scheme://host"),
            ("file:///x", "scheme://host"),
            ("capacitor://localhost/", "as capacitor://localhost;"),
            ("https://a.example,", "scheme://host"),
            ("https://a.example,,https://b.example", "scheme://host"),
            ("https://a.example https://b.example", "scheme://host"),
            ("https://a.example,https://b.example/", "as https://b.example;"),
            ("https://a.example,*", "every origin"),
        ] {
            let error = origins(bad).expect_err(bad);
            assert!(error.contains("CORS_ALLOWED_ORIGINS: ") && error.contains(fault), "{bad}: {error}");
            assert!(
                error.contains("; for example CORS_ALLOWED_ORIGINS=https://") && !error.contains('\n'),
                "{error}"
            );
        }
    }
}
