//! The request that a task serves: its ids, for every log line that is written meanwhile.

use opentelemetry::trace::TraceId;
use salvo::http::header::HeaderValue;

tokio::task_local! {
    /// The request that this task serves.
    pub static CURRENT: RequestContext;
}

#[derive(Clone, Debug)]
pub(crate) struct RequestContext {
    /// `x-request-id`, which is visible ASCII.
    pub request_id: HeaderValue,
    pub trace_id: Option<TraceId>,
}
