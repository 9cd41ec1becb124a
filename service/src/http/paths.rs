//! What the router does not know of paths and methods: each path has one spelling, and `HEAD` answers wherever `GET` does.

use salvo::http::{Method, Request};
use salvo::routing::{Filter, FilterInfo, PathState, filters};
use salvo::{Router, async_trait};

/// Lets every route of the router match only the one spelling of its path. The router alone would also match more slashes, and
/// percent-encoded letters, so that proxies, caches and access rules in front would see other paths than it does. A route
/// names its whole path, as in `api()`.
pub(super) fn with_one_spelling(mut router: Router) -> Router {
    let template = router.filters.iter().find_map(|filter| match filter.info() {
        FilterInfo::Path(template) => Some(template),
        _ => None,
    });
    if let Some(template) = template {
        router.filters.push(Box::new(OneSpelling { template }));
    }
    let children = std::mem::take(&mut router.routers);
    router.routers = children.into_iter().map(with_one_spelling).collect();
    router
}

/// A router for `/`, which has no path filter in Salvo.
pub(super) fn root() -> Router {
    Router::with_filter(OneSpelling { template: String::new() })
}

/// After a route's path filter, so that it costs no other route anything.
#[derive(Debug)]
struct OneSpelling {
    template: String,
}

impl OneSpelling {
    /// Literals are as in the template. A parameter is a value, which percent-encoding only writes in another way. Below a
    /// folder are files with plain names.
    fn has(&self, path: &str) -> bool {
        let Some(path) = path.strip_prefix('/') else { return false };
        let mut given = path.split('/');
        for part in self.template.trim_start_matches('/').split('/') {
            let spelled = match part {
                "{**}" => {
                    let rest: Vec<&str> = given.collect();
                    let is_plain = |name: &&str| !matches!(*name, "" | "." | "..") && !name.contains('%');
                    return matches!(rest[..], [""]) || rest.iter().all(is_plain);
                }
                parameter if parameter.starts_with('{') => {
                    given.next().is_some_and(|value| !value.is_empty())
                }
                literal => given.next() == Some(literal),
            };
            if !spelled {
                return false;
            }
        }
        given.next().is_none()
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
        for (template, good, bad) in [
            (
                "/me",
                &["/me"][..],
                &["me", "//me", "/me/", "/ME", "/m%65", "/./me", "/me/.", "/mex", "/", ""][..],
            ),
            (
                "/users/{username}",
                &["/users/ana", "/users/an%61", "/users/a%2Fb", "/users/a.b-c"],
                &[
                    "/users/",
                    "/users",
                    "//users/ana",
                    "/users//ana",
                    "/users/ana/",
                    "/%75sers/ana",
                    "/users/a/b",
                ],
            ),
            (
                "/docs/{**}",
                &["/docs", "/docs/", "/docs/a.css", "/docs/a/b.css"],
                &[
                    "//docs/",
                    "/docs//",
                    "/docs/a/",
                    "/docs//a",
                    "/docs/./a",
                    "/docs/../me",
                    "/docs/%61",
                    "/doc%73/",
                ],
            ),
        ] {
            let route = OneSpelling { template: template.to_owned() };
            for path in good {
                assert!(route.has(path), "{path}");
            }
            for path in bad {
                assert!(!route.has(path), "{path}");
            }
        }
    }
}
