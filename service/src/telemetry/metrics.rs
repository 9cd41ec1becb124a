//! Every metric of the service, in one registry. No label ever holds a user's text, id or path.
//!
//! Every series that an alert may read exists from the first scrape on, at 0. Numbers that another part of the service
//! keeps anyway, such as the pool's size, are passed in when Prometheus scrapes.

mod register;
mod removals;
mod streams;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use prometheus::{
    Histogram, HistogramOpts, HistogramTimer, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder,
};
use salvo::http::{Method, StatusCode};
use strum::VariantArray;

use self::register::{add, counters, durations, gauge, gauges};
use self::removals::RemovalMetrics;
use self::streams::StreamMetrics;
pub(crate) use self::streams::{StreamEnd, StreamOpened};
use super::span_metrics::SPANS;

/// The pool's name in the metrics.
const POOL_NAME: &str = "chat";

/// The route label of every other path, so that no client can invent labels.
const UNMATCHED: &str = "unmatched";

/// The standard methods, and one label for everything else that a client may send.
const METHODS: [&str; 8] = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "_OTHER"];

const BATCH_BUCKETS: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: HistogramVec,
    endpoints: Vec<Endpoint>,
    /// One for each of [`METHODS`], in their order.
    unmatched: Vec<Endpoint>,
    active_requests: IntGauge,
    messages_sent: IntCounterVec,
    batch_rows: Histogram,
    outbox_depth: IntGauge,
    outbox_capacity: IntGauge,
    auth_attempts: IntCounterVec,
    rate_limited: IntCounterVec,
    exports_ended: IntCounterVec,
    cache_lookups: IntCounterVec,
    hashing_waiting: IntGauge,
    hashing_capacity: IntGauge,
    streams: StreamMetrics,
    removals: RemovalMetrics,
    pool: PoolMetrics,
    /// By [`OperationName::index`].
    operations: Vec<Histogram>,
    dependency_up: IntGaugeVec,
    ready: IntGauge,
    schema_version: IntGauge,
}

/// What the metrics must know of the rest of the service before the first request.
#[derive(Debug, Default)]
pub struct Known {
    pub endpoints: Vec<EndpointName>,
    /// By their index.
    pub operations: Vec<OperationName>,
    /// The names of the rate limits.
    pub limits: Vec<&'static str>,
    /// The newest migration that this binary knows.
    pub schema_version: i64,
}

/// A route, a method that it takes, and the status of success.
#[derive(Debug, Clone)]
pub struct EndpointName {
    pub method: &'static str,
    /// The template.
    pub route: Cow<'static, str>,
    pub success: StatusCode,
}

/// An operation on a database, as the semantic conventions name it.
#[derive(Clone, Copy, Debug)]
pub struct OperationName {
    /// Its place among all operations.
    pub index: usize,
    pub system: &'static str,
    pub operation: &'static str,
}

/// Numbers that other parts of the service keep, as of a scrape.
#[derive(Debug)]
pub struct Gauges {
    pub outbox_depth: usize,
    pub outbox_capacity: usize,
    pub password_capacity: usize,
    pub streams_open: usize,
    pub streams_max: usize,
    pub pool_idle: usize,
    pub pool_used: usize,
    pub pool_max: u32,
    pub postgres_up: bool,
    pub redis_up: bool,
    pub ready: bool,
    pub schema_version: i64,
}

/// Of the Postgres connection pool.
#[derive(Debug)]
struct PoolMetrics {
    connections: IntGaugeVec,
    max: IntGaugeVec,
    timeouts: IntCounter,
}

/// A route and a method that it takes, or a method on no route.
#[derive(Debug)]
pub struct Endpoint {
    /// In logs and traces.
    pub method: &'static str,
    /// The method's label. A HEAD counts as the GET that it stands for: it does the same work in the same time, under the same
    /// objectives. Series of its own for each route, status and bucket would be many for the few requests of monitors.
    counted_as: &'static str,
    /// The template, or [`UNMATCHED`].
    pub route: Cow<'static, str>,
    /// The name of its spans.
    pub span_name: Cow<'static, str>,
    /// The status that most requests end with: its series needs no look-up.
    usual: (StatusCode, Histogram),
}

#[derive(Clone, Copy, Debug, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum SendOutcome {
    Stored,
    Replayed,
    /// The client's fault: no such recipient, a key used for another message.
    Rejected,
    /// The queue was full.
    Refused,
    Failed,
}

#[derive(Clone, Copy, Debug, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum AuthKind {
    Login,
    Register,
    Refresh,
    /// A password that is asked for again.
    Confirm,
}

#[derive(Clone, Copy, Debug, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum CacheOutcome {
    Hit,
    Miss,
    /// No window could answer: the page lies too deep, or Redis is unavailable.
    Bypass,
}

#[derive(Clone, Copy, Debug, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum ExportOutcome {
    Complete,
    /// Another one of the user runs, or the process runs too many.
    Refused,
    /// The client ended it, or its connection broke.
    Client,
    /// The client did not read.
    Slow,
    TooLong,
    /// The session has ended.
    Revoked,
    Draining,
    Failed,
}

/// Counts as one in flight until it is dropped.
#[derive(Debug)]
pub struct InFlight(IntGauge);

impl Metrics {
    pub fn new(known: Known) -> Result<Arc<Self>, prometheus::Error> {
        let registry = Registry::new();
        describe_process(&registry, known.schema_version)?;
        let requests = durations(
            &registry,
            "http_server_request_duration_seconds",
            "Duration of HTTP requests, without the wait for their bodies",
            &["http_request_method", "http_route", "http_response_status_code"],
        )?;
        let metrics = Self {
            endpoints: known.endpoints.into_iter().flat_map(|name| Endpoint::new(&requests, name)).collect(),
            unmatched: METHODS.into_iter().map(|method| Endpoint::unmatched(&requests, method)).collect(),
            requests,
            active_requests: gauge(&registry, "http_server_active_requests", "HTTP requests in flight")?,
            messages_sent: counters(
                &registry,
                "chat_messages_sent_total",
                "Messages that clients sent",
                &["outcome"],
            )?,
            batch_rows: add(
                &registry,
                Histogram::with_opts(
                    HistogramOpts::new("chat_outbox_batch_rows", "Messages in one statement")
                        .buckets(BATCH_BUCKETS.to_vec()),
                )?,
            )?,
            outbox_depth: gauge(&registry, "chat_outbox_queue_depth", "Messages waiting for a writer")?,
            outbox_capacity: gauge(&registry, "chat_outbox_queue_capacity", "Messages that may wait")?,
            auth_attempts: counters(
                &registry,
                "chat_auth_attempts_total",
                "Logins, registrations, refreshed tokens and passwords asked for again, by outcome",
                &["kind", "outcome"],
            )?,
            rate_limited: counters(
                &registry,
                "chat_rate_limited_total",
                "Requests over a rate limit",
                &["limit"],
            )?,
            exports_ended: counters(
                &registry,
                "chat_exports_total",
                "Exports of a user's data that ended, by outcome",
                &["outcome"],
            )?,
            cache_lookups: counters(
                &registry,
                "chat_cache_lookups_total",
                "Look-ups in the recent window",
                &["outcome"],
            )?,
            hashing_waiting: gauge(
                &registry,
                "chat_password_queue_depth",
                "Passwords being hashed, or waiting",
            )?,
            hashing_capacity: gauge(
                &registry,
                "chat_password_queue_capacity",
                "Passwords that may be hashed or wait at once",
            )?,
            streams: StreamMetrics::new(&registry)?,
            removals: RemovalMetrics::new(&registry)?,
            pool: PoolMetrics::new(&registry)?,
            operations: operation_durations(&registry, &known.operations)?,
            dependency_up: gauges(
                &registry,
                "chat_dependency_up",
                "1 while the dependency answers and takes writes",
                &["dependency"],
            )?,
            ready: gauge(&registry, "chat_ready", "1 while /healthz answers 200")?,
            schema_version: gauge(&registry, "chat_schema_version", "Newest migration applied")?,
            registry,
        };
        metrics.start_at_zero(&known.limits);
        Ok(Arc::new(metrics))
    }

    /// The endpoint of a request; `matched` is the router's template, which lacks its first slash.
    pub fn endpoint(&self, method: &Method, matched: Option<&str>) -> &Endpoint {
        let method = METHODS.iter().position(|known| *known == method.as_str()).unwrap_or(METHODS.len() - 1);
        let is_it = |endpoint: &&Endpoint| {
            endpoint.method == METHODS[method]
                && matched.is_some()
                && endpoint.route.strip_prefix('/') == matched
        };
        self.endpoints.iter().find(is_it).unwrap_or(&self.unmatched[method])
    }

    pub fn request_started(&self) -> InFlight {
        InFlight::new(&self.active_requests)
    }

    /// Requests in flight on the public port.
    pub fn active_requests(&self) -> i64 {
        self.active_requests.get()
    }

    pub fn request_finished(&self, endpoint: &Endpoint, status: StatusCode, duration: Duration) {
        let seconds = duration.as_secs_f64();
        match &endpoint.usual {
            (usual, histogram) if *usual == status => histogram.observe(seconds),
            _ => series(&self.requests, endpoint.counted_as, &endpoint.route, status).observe(seconds),
        }
    }

    /// Times an operation until the timer is dropped, so that a cancelled one counts, too.
    pub fn operation_started(&self, operation: OperationName) -> HistogramTimer {
        self.operations[operation.index].start_timer()
    }

    pub fn pool_timed_out(&self) {
        self.pool.timeouts.inc();
    }

    pub fn message_sent(&self, outcome: SendOutcome) {
        self.messages_sent.with_label_values(&[<&str>::from(outcome)]).inc();
    }

    pub fn batch_written(&self, rows: usize) {
        self.batch_rows.observe(rows as f64);
    }

    pub fn auth_attempt(&self, kind: AuthKind, success: bool) {
        self.auth_attempts
            .with_label_values(&[kind.into(), if success { "success" } else { "failure" }])
            .inc();
    }

    pub fn rate_limited(&self, limit: &'static str) {
        self.rate_limited.with_label_values(&[limit]).inc();
    }

    pub fn cache_lookup(&self, outcome: CacheOutcome) {
        self.cache_lookups.with_label_values(&[<&str>::from(outcome)]).inc();
    }

    pub fn export_ended(&self, outcome: ExportOutcome) {
        self.exports_ended.with_label_values(&[<&str>::from(outcome)]).inc();
    }

    pub fn stream_opened(&self, outcome: StreamOpened) {
        self.streams.opened.with_label_values(&[<&str>::from(outcome)]).inc();
    }

    pub fn stream_ended(&self, reason: StreamEnd) {
        self.streams.ended.with_label_values(&[<&str>::from(reason)]).inc();
    }

    /// A message for a stream, so long after its commit, unless the stream had missed it.
    pub fn stream_message(&self, delay: Option<Duration>) {
        self.streams.messages.inc();
        if let Some(delay) = delay {
            self.streams.delivery.observe(delay.as_secs_f64());
        }
    }

    pub fn stream_gaps(&self, messages: u64) {
        self.streams.gaps.inc_by(messages);
    }

    pub fn stream_catches_up(&self) {
        self.streams.catch_ups.inc();
    }

    pub fn messages_removed(&self, messages: u64) {
        self.removals.removed.inc_by(messages);
    }

    /// How much of a sweep of old messages is done, and when the last one was, in seconds since 1970.
    pub fn retention_progress(&self, swept: f64, completed: f64) {
        self.removals.swept.set(swept);
        self.removals.completed.set(completed);
    }

    /// As of now, in the whole installation.
    pub fn erasures_pending(&self, users: i64) {
        self.removals.erasures_pending.set(users);
    }

    pub fn messages_erased(&self, messages: u64) {
        self.removals.erased.inc_by(messages);
    }

    pub fn hashing_started(&self) -> InFlight {
        InFlight::new(&self.hashing_waiting)
    }

    /// The registry in Prometheus's text format.
    pub fn render(&self, gauges: &Gauges) -> Result<String, prometheus::Error> {
        self.outbox_depth.set(gauges.outbox_depth as i64);
        self.outbox_capacity.set(gauges.outbox_capacity as i64);
        self.hashing_capacity.set(gauges.password_capacity as i64);
        self.streams.clients.set(gauges.streams_open as i64);
        self.streams.clients_max.set(gauges.streams_max as i64);
        self.pool.connections.with_label_values(&[POOL_NAME, "idle"]).set(gauges.pool_idle as i64);
        self.pool.connections.with_label_values(&[POOL_NAME, "used"]).set(gauges.pool_used as i64);
        self.pool.max.with_label_values(&[POOL_NAME]).set(gauges.pool_max.into());
        self.dependency_up.with_label_values(&["postgres"]).set(gauges.postgres_up.into());
        self.dependency_up.with_label_values(&["redis"]).set(gauges.redis_up.into());
        self.ready.set(gauges.ready.into());
        self.schema_version.set(gauges.schema_version);
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }

    fn start_at_zero(&self, limits: &[&'static str]) {
        for outcome in SendOutcome::VARIANTS {
            self.messages_sent.with_label_values(&[<&str>::from(outcome)]);
        }
        for kind in AuthKind::VARIANTS {
            for outcome in ["success", "failure"] {
                self.auth_attempts.with_label_values(&[kind.into(), outcome]);
            }
        }
        for limit in limits {
            self.rate_limited.with_label_values(&[limit]);
        }
        for outcome in CacheOutcome::VARIANTS {
            self.cache_lookups.with_label_values(&[<&str>::from(outcome)]);
        }
        for outcome in ExportOutcome::VARIANTS {
            self.exports_ended.with_label_values(&[<&str>::from(outcome)]);
        }
    }
}

/// The metrics of the process itself, and those that never change.
fn describe_process(registry: &Registry, schema_version: i64) -> Result<(), prometheus::Error> {
    #[cfg(target_os = "linux")]
    registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
    add(registry, SPANS.clone())?;
    let info = Opts::new("chat_build_info", "What this process was built from")
        .const_label("version", env!("CARGO_PKG_VERSION"))
        .const_label("revision", option_env!("CHAT_SERVICE_REVISION").unwrap_or("unknown"));
    add(registry, IntGauge::with_opts(info)?)?.set(1);
    gauge(registry, "chat_schema_version_expected", "Newest migration that this binary knows")?
        .set(schema_version);
    Ok(())
}

/// One histogram for each operation, in their order.
fn operation_durations(
    registry: &Registry,
    operations: &[OperationName],
) -> Result<Vec<Histogram>, prometheus::Error> {
    let histograms = durations(
        registry,
        "db_client_operation_duration_seconds",
        "Duration of operations on Postgres and Redis, failed and cancelled ones included",
        &["db_system_name", "db_operation_name"],
    )?;
    Ok(operations.iter().map(|name| histograms.with_label_values(&[name.system, name.operation])).collect())
}

impl PoolMetrics {
    fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let timeouts = counters(
            registry,
            "db_client_connection_timeouts_total",
            "Waits for a connection of the Postgres pool that ran out of time",
            &["db_client_connection_pool_name"],
        )?;
        Ok(Self {
            connections: gauges(
                registry,
                "db_client_connection_count",
                "Connections of the Postgres pool",
                &["db_client_connection_pool_name", "db_client_connection_state"],
            )?,
            max: gauges(
                registry,
                "db_client_connection_max",
                "Most connections that the Postgres pool may have",
                &["db_client_connection_pool_name"],
            )?,
            timeouts: timeouts.with_label_values(&[POOL_NAME]),
        })
    }
}

impl Endpoint {
    /// The endpoint, and for a GET that of its HEAD.
    fn new(
        requests: &HistogramVec,
        EndpointName { method, route, success }: EndpointName,
    ) -> impl Iterator<Item = Self> {
        // Alerts read these two, so they exist before the first failure.
        for failure in [StatusCode::INTERNAL_SERVER_ERROR, StatusCode::SERVICE_UNAVAILABLE] {
            series(requests, method, &route, failure);
        }
        let usual = (success, series(requests, method, &route, success));
        let named = move |name: &'static str| Self {
            method: name,
            counted_as: method,
            span_name: format!("{name} {route}").into(),
            route: route.clone(),
            usual: usual.clone(),
        };
        [method].into_iter().chain((method == "GET").then_some("HEAD")).map(named)
    }

    fn unmatched(requests: &HistogramVec, method: &'static str) -> Self {
        let usual = StatusCode::NOT_FOUND;
        Self {
            method,
            counted_as: method,
            route: Cow::Borrowed(UNMATCHED),
            span_name: Cow::Borrowed(method),
            usual: (usual, series(requests, method, UNMATCHED, usual)),
        }
    }
}

fn series(requests: &HistogramVec, method: &str, route: &str, status: StatusCode) -> Histogram {
    requests.with_label_values(&[method, route, status.as_str()])
}

impl InFlight {
    fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}
