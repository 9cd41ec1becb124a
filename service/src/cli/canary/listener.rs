//! `/metrics` and `/livez` of the canary.

use std::io;
use std::sync::Arc;

use salvo::conn::tcp::TcpAcceptor;
use salvo::http::StatusCode;
use salvo::http::header::{CONTENT_TYPE, HeaderValue};
use salvo::{Depot, Response, Router, Server, affix_state, handler};
use tokio::net::TcpListener;

use super::metrics::Metrics;

/// Runs until it is dropped.
pub(super) async fn serve(listener: TcpListener, metrics: Arc<Metrics>) -> io::Result<()> {
    let router = Router::new()
        .hoop(affix_state::inject(metrics))
        .push(Router::with_path("metrics").get(render))
        .push(Router::with_path("livez").get(alive));
    Server::new(TcpAcceptor::try_from(listener)?).serve(router).await;
    Ok(())
}

#[handler]
async fn render(depot: &mut Depot, res: &mut Response) {
    let text = depot.get_typed::<Arc<Metrics>>().ok().and_then(|metrics| metrics.render().ok());
    let written = text.is_some_and(|text| res.write_body(text).is_ok());
    res.status_code(if written { StatusCode::OK } else { StatusCode::INTERNAL_SERVER_ERROR });
    res.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4"));
}

/// Rounds that fail are no reason for a restart.
#[handler]
async fn alive() -> &'static str {
    "ok\n"
}
