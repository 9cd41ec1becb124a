//! What `/` and the files below `/page/` answer.

use crate::support::{PrefixProxy, TestApp};

const FILES: [(&str, &str); 5] = [
    ("/", "text/html"),
    ("/page/page.css", "text/css"),
    ("/page/page.js", "text/javascript"),
    ("/page/chat-client.js", "text/javascript"),
    ("/page/icon.svg", "image/svg+xml"),
];

#[tokio::test(flavor = "multi_thread")]
async fn the_page_is_served_with_a_policy_that_allows_nothing_from_outside() {
    let app = TestApp::start().await;
    for (path, media_type) in FILES {
        let answer = app.raw(request(path).as_bytes()).await;
        assert!(!answer.text(200).is_empty(), "{path}");
        let header = |name| answer.header(name).unwrap_or_default().to_owned();
        assert!(header("content-type").starts_with(media_type), "{path}");
        assert_eq!(header("x-content-type-options"), "nosniff", "{path}");
        assert_eq!(header("cache-control"), "no-cache", "{path}");
        let policy = header("content-security-policy");
        assert!(policy.starts_with("default-src 'none';"), "{path}: {policy}");
        for loose in ["unsafe", "*", "http:", "https:", "data:"] {
            assert!(!policy.contains(loose), "{path}: {policy}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_page_its_paths_are_404_as_any_other() {
    let app = TestApp::with(&[("CHAT_PAGE", "false")]).await;
    let production = TestApp::with(&[("APP_ENV", "production")]).await;
    for (path, _) in FILES {
        app.raw(request(path).as_bytes()).await.problem(404);
        production.raw(request(path).as_bytes()).await.problem(404);
    }
    let shown = TestApp::with(&[("APP_ENV", "production"), ("CHAT_PAGE", "true")]).await;
    shown.raw(request("/").as_bytes()).await.text(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_refers_to_its_files_below_the_prefix_of_a_proxy() {
    let app = TestApp::start().await;
    let proxy = PrefixProxy::start(app.running.public, "/team/chat").await;
    let page = app.get_url(proxy.url("/")).response().await.text(200);
    let references = page.split(['"', '\'']).filter(|text| text.starts_with("page/"));
    let mut count = 0;
    for reference in references {
        let url = proxy.url("/").join(reference).expect("a reference");
        app.get_url(url).response().await.text(200);
        count += 1;
    }
    assert_eq!(count, 3, "the style, the script and the icon");
}

fn request(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")
}
