//! The chat page at `/`, and its files. They are part of the binary; `page/page.js` says what the page does.

use salvo::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use salvo::http::{ResBody, StatusCode};
use salvo::hyper::body::Bytes;
use salvo::{Depot, FlowCtrl, Request, Response, Router, handler};

use super::paths::root;

/// Nothing from outside, nothing inline, and no text that becomes markup.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'";

const JAVASCRIPT: &str = "text/javascript; charset=utf-8";

pub(super) struct File {
    pub(super) path: &'static str,
    media_type: &'static str,
    text: &'static str,
}

pub(super) const FILES: [File; 5] = [
    File { path: "/", media_type: "text/html; charset=utf-8", text: include_str!("page/index.html") },
    File {
        path: "/page/page.css",
        media_type: "text/css; charset=utf-8",
        text: include_str!("page/page.css"),
    },
    File { path: "/page/icon.svg", media_type: "image/svg+xml", text: include_str!("page/icon.svg") },
    File { path: "/page/page.js", media_type: JAVASCRIPT, text: include_str!("page/page.js") },
    // The one that authors of clients copy.
    File {
        path: "/page/chat-client.js",
        media_type: JAVASCRIPT,
        text: include_str!("../../../deploy/examples/chat-client.js"),
    },
];

pub(super) fn routes() -> Router {
    let router = |path| if path == "/" { root() } else { Router::with_path(path) };
    let files = FILES.into_iter().map(|file| router(file.path).get(file));
    files.fold(Router::new().hoop(headers), Router::push)
}

#[handler]
async fn headers(req: &mut Request, depot: &mut Depot, res: &mut Response, ctrl: &mut FlowCtrl) {
    ctrl.call_next(req, depot, res).await;
    let opener = HeaderName::from_static("cross-origin-opener-policy");
    for (name, value) in [
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (opener, "same-origin"),
        // A new version of the service brings new files, and they belong together.
        (CACHE_CONTROL, "no-cache"),
    ] {
        res.headers_mut().insert(name, HeaderValue::from_static(value));
    }
}

#[handler]
impl File {
    async fn handle(&self, res: &mut Response) {
        res.status_code(StatusCode::OK);
        res.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(self.media_type));
        res.replace_body(ResBody::Once(Bytes::from_static(self.text.as_bytes())));
    }
}
