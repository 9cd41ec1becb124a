//! What the router does not know of paths and methods: each path has one spelling, and `HEAD` answers wherever `GET` does.

use salvo::http::{Method, Request};
use salvo::routing::{Filter, FilterInfo, PathState, filters};
use salvo::{Router, async_trait};

/// Matches a request whose path is spelled in the one way that it has. The router would also match paths with more slashes,
/// and with letters percent-encoded, so that proxies, caches and access rules in front would see other paths than it does.
#[derive(Debug)]
pub(super) struct OneSpelling {
    /// The paths that end with a slash.
    pub folders: &'static [&'static str],
}

impl OneSpelling {
    fn has(&self, path: &str) -> bool {
        let segment = |segment: &str| !matches!(segment, "" | "." | "..") && !is_overencoded(segment);
        self.folders.contains(&path)
            || path.strip_prefix('/').is_some_and(|rest| rest.split('/').all(segment))
    }
}

#[async_trait]
impl Filter for OneSpelling {
    async fn filter(&self, req: &mut Request, _path: &mut PathState<'_>) -> bool {
        self.has(req.uri().path())
    }

    /// For the `Allow` header of a 405.
    async fn filter_for_method(
        &self,
        req: &mut Request,
        _path: &mut PathState<'_>,
        _method: &Method,
    ) -> Option<bool> {
        Some(self.has(req.uri().path()))
    }
}

/// Whether a segment percent-encodes a character that needs no encoding, by RFC 3986, or has a `%` that encodes nothing.
fn is_overencoded(segment: &str) -> bool {
    segment.split('%').skip(1).any(|rest| {
        let encoded = rest.get(..2).filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
        let byte = encoded.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        byte.is_none_or(|byte| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte))
    })
}

/// Gives every `GET` of the router a `HEAD` with the same handlers; the middleware drops the body.
pub(super) fn with_head(mut router: Router) -> Router {
    let children = std::mem::take(&mut router.routers);
    router.routers = children.into_iter().map(with_head).collect();
    let heads = router.routers.iter().filter(|child| is_get(child)).map(|get| {
        let mut head = Router::with_filter(filters::head());
        head.hoops.clone_from(&get.hoops);
        head.goal.clone_from(&get.goal);
        head
    });
    let mut heads = heads.collect();
    router.append(&mut heads)
}

fn is_get(router: &Router) -> bool {
    matches!(&router.filters[..], [filter] if matches!(filter.info(), FilterInfo::Method(Method::GET)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_has_one_spelling() {
        let paths = OneSpelling { folders: &["/", "/docs/"] };
        for path in
            ["/", "/me", "/docs", "/docs/", "/users/a.b-c_d~", "/users/...", "/users/%20%2F%C3%A4", "/a/%25"]
        {
            assert!(paths.has(path), "{path}");
        }
        for path in [
            "",
            "*",
            "me",
            "//",
            "/me/",
            "//me",
            "/docs//",
            "/docs/x/",
            "/./me",
            "/../me",
            "/me/.",
            "/users/%41",
            "/users/%7e",
            "/users/%2E",
            "/a%",
            "/a%4",
            "/a%zz",
            "/a%+1",
            "/%é",
        ] {
            assert!(!paths.has(path), "{path}");
        }
    }
}
