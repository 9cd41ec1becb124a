//! Every metric of the service, in one registry. No label ever holds a user's text, id or path.
//!
//! What an alert may read exists from the first scrape on, at 0. Numbers that something else keeps anyway, such
//! as the pool's size, are read when Prometheus asks.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use prometheus::{
    Histogram, HistogramOpts, HistogramTimer, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder,
};
use salvo::http::{Method, StatusCode};
use sqlx::PgPool;

use crate::app::App;
use crate::call::Call;
use crate::db::{self, POOL_NAME};
use crate::limits::Limit;
use crate::routes::ENDPOINTS;
use crate::span_counter::SPANS;

/// The label of every path that is none of ours, so that nobody can make up labels.
const UNMATCHED: &str = "unmatched";

/// The methods of the standard, and one label for everything that a client may invent.
const METHODS: [&str; 8] = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "_OTHER"];

/// Seconds; from a hit in the window, under 1 ms, to the request time-out, with 250 ms for the objective.
const DURATION_BUCKETS: [f64; 13] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

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
    cache_lookups: IntCounterVec,
    hashing_waiting: IntGauge,
    hashing_capacity: IntGauge,
    pool: PoolMetrics,
    /// One for each [`Call`], in their order.
    calls: Vec<Histogram>,
    dependency_up: IntGaugeVec,
    ready: IntGauge,
    schema_version: IntGauge,
}

/// Of the pool of connections to Postgres.
#[derive(Debug)]
struct PoolMetrics {
    connections: IntGaugeVec,
    max: IntGaugeVec,
    timeouts: IntCounter,
}

/// A route and a method that it takes, or a method on no route.
#[derive(Debug)]
pub struct Endpoint {
    pub method: &'static str,
    /// The template, or [`UNMATCHED`].
    pub route: &'static str,
    /// Of its spans.
    pub span_name: Cow<'static, str>,
    /// What most requests end with, found without a look-up.
    usual: (StatusCode, Histogram),
}

#[derive(Clone, Copy, Debug)]
pub enum SendOutcome {
    Stored,
    Replayed,
    /// The client's fault: no such recipient, a key used for another message.
    Rejected,
    /// The queue was full.
    Refused,
    Failed,
}

#[derive(Clone, Copy, Debug)]
pub enum AuthKind {
    Login,
    Register,
}

#[derive(Clone, Copy, Debug)]
pub enum CacheOutcome {
    Hit,
    Miss,
    /// No window could answer: too deep a page, or Redis away.
    Bypass,
}

/// Counts one up for as long as it lives.
#[derive(Debug)]
pub struct InFlight(IntGauge);

impl Metrics {
    pub fn new() -> Result<Arc<Self>, prometheus::Error> {
        let registry = Registry::new();
        describe_process(&registry)?;
        let requests = durations(
            &registry,
            "http_server_request_duration_seconds",
            "Duration of HTTP requests",
            &["http_request_method", "http_route", "http_response_status_code"],
        )?;
        let metrics = Self {
            endpoints: ENDPOINTS
                .into_iter()
                .map(|(method, route, success)| Endpoint::new(&requests, method, route, success))
                .collect(),
            unmatched: METHODS
                .into_iter()
                .map(|method| Endpoint::new(&requests, method, UNMATCHED, StatusCode::NOT_FOUND))
                .collect(),
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
                "Logins and registrations that were judged",
                &["kind", "outcome"],
            )?,
            rate_limited: counters(
                &registry,
                "chat_rate_limited_total",
                "Requests over a rate limit",
                &["limit"],
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
            pool: PoolMetrics::new(&registry)?,
            calls: call_durations(&registry)?,
            dependency_up: gauges(
                &registry,
                "chat_dependency_up",
                "1 while the dependency answers",
                &["dependency"],
            )?,
            ready: gauge(&registry, "chat_ready", "1 while /healthz answers 200")?,
            schema_version: gauge(&registry, "chat_schema_version", "Newest migration applied")?,
            registry,
        };
        metrics.start_at_zero();
        Ok(Arc::new(metrics))
    }

    /// What a request asks for; `matched` is the router's template, which lacks its first slash.
    pub fn endpoint(&self, method: &Method, matched: &str) -> &Endpoint {
        let method = METHODS.iter().position(|known| *known == method.as_str()).unwrap_or(METHODS.len() - 1);
        let is_it = |endpoint: &&Endpoint| {
            endpoint.method == METHODS[method] && endpoint.route.strip_prefix('/') == Some(matched)
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
            _ => series(&self.requests, endpoint.method, endpoint.route, status).observe(seconds),
        }
    }

    /// Times a call until what is returned is dropped, so that one that is given up counts, too.
    pub fn call_started(&self, call: Call) -> HistogramTimer {
        self.calls[call as usize].start_timer()
    }

    pub fn pool_timed_out(&self) {
        self.pool.timeouts.inc();
    }

    pub fn message_sent(&self, outcome: SendOutcome) {
        self.messages_sent.with_label_values(&[outcome.name()]).inc();
    }

    pub fn batch_written(&self, rows: usize) {
        self.batch_rows.observe(rows as f64);
    }

    pub fn auth_attempt(&self, kind: AuthKind, success: bool) {
        self.auth_attempts
            .with_label_values(&[kind.name(), if success { "success" } else { "failure" }])
            .inc();
    }

    pub fn rate_limited(&self, limit: Limit) {
        self.rate_limited.with_label_values(&[limit.name()]).inc();
    }

    pub fn cache_lookup(&self, outcome: CacheOutcome) {
        self.cache_lookups.with_label_values(&[outcome.name()]).inc();
    }

    pub fn hashing_started(&self) -> InFlight {
        InFlight::new(&self.hashing_waiting)
    }

    /// The registry in Prometheus's text format.
    pub fn render(&self, app: &App) -> Result<String, prometheus::Error> {
        self.outbox_depth.set(app.outbox.depth() as i64);
        self.outbox_capacity.set(app.outbox.capacity() as i64);
        self.hashing_capacity.set(app.passwords.capacity() as i64);
        self.pool.look_at(app.database.pool());
        self.dependency_up.with_label_values(&["postgres"]).set(i64::from(app.health.postgres_answers()));
        self.dependency_up.with_label_values(&["redis"]).set(i64::from(app.redis.live().is_some()));
        self.ready.set(i64::from(app.health.is_ready()));
        self.schema_version.set(app.health.schema_version());
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }

    fn start_at_zero(&self) {
        use SendOutcome::{Failed, Refused, Rejected, Replayed, Stored};
        for outcome in [Stored, Replayed, Rejected, Refused, Failed] {
            self.messages_sent.with_label_values(&[outcome.name()]);
        }
        for kind in [AuthKind::Login, AuthKind::Register] {
            for outcome in ["success", "failure"] {
                self.auth_attempts.with_label_values(&[kind.name(), outcome]);
            }
        }
        for limit in Limit::ALL {
            self.rate_limited.with_label_values(&[limit.name()]);
        }
        for outcome in [CacheOutcome::Hit, CacheOutcome::Miss, CacheOutcome::Bypass] {
            self.cache_lookups.with_label_values(&[outcome.name()]);
        }
    }
}

/// What does not change while the process lives, and what is told of the process itself.
fn describe_process(registry: &Registry) -> Result<(), prometheus::Error> {
    #[cfg(target_os = "linux")]
    registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
    add(registry, SPANS.clone())?;
    let info = Opts::new("chat_build_info", "What this process was built from")
        .const_label("version", env!("CARGO_PKG_VERSION"))
        .const_label("revision", option_env!("CHAT_SERVICE_REVISION").unwrap_or("unknown"));
    add(registry, IntGauge::with_opts(info)?)?.set(1);
    gauge(registry, "chat_schema_version_expected", "Newest migration that this binary knows")?
        .set(db::known_version());
    Ok(())
}

/// One histogram for each call, at its place in [`Call::ALL`].
fn call_durations(registry: &Registry) -> Result<Vec<Histogram>, prometheus::Error> {
    let calls = durations(
        registry,
        "db_client_operation_duration_seconds",
        "Duration of what was asked of Postgres and Redis, also where it failed or was given up",
        &["db_system_name", "db_operation_name"],
    )?;
    Ok(Call::ALL.map(|call| calls.with_label_values(&[call.system(), call.name()])).into())
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

    fn look_at(&self, pool: &PgPool) {
        let idle = pool.num_idle() as i64;
        let used = i64::from(pool.size()) - idle;
        self.connections.with_label_values(&[POOL_NAME, "idle"]).set(idle);
        self.connections.with_label_values(&[POOL_NAME, "used"]).set(used);
        self.max.with_label_values(&[POOL_NAME]).set(pool.options().get_max_connections().into());
    }
}

impl Endpoint {
    /// With the series that alerts read: of success, and of faults of ours.
    fn new(requests: &HistogramVec, method: &'static str, route: &'static str, usual: StatusCode) -> Self {
        let series = |status| series(requests, method, route, status);
        if route != UNMATCHED {
            series(StatusCode::INTERNAL_SERVER_ERROR);
            series(StatusCode::SERVICE_UNAVAILABLE);
        }
        let span_name =
            if route == UNMATCHED { Cow::from(method) } else { format!("{method} {route}").into() };
        Self { method, route, span_name, usual: (usual, series(usual)) }
    }
}

fn series(requests: &HistogramVec, method: &str, route: &str, status: StatusCode) -> Histogram {
    requests.with_label_values(&[method, route, status.as_str()])
}

impl SendOutcome {
    fn name(self) -> &'static str {
        match self {
            Self::Stored => "stored",
            Self::Replayed => "replayed",
            Self::Rejected => "rejected",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }
}

impl AuthKind {
    fn name(self) -> &'static str {
        match self {
            Self::Login => "login",
            Self::Register => "register",
        }
    }
}

impl CacheOutcome {
    fn name(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Miss => "miss",
            Self::Bypass => "bypass",
        }
    }
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

fn add<C: prometheus::core::Collector + Clone + 'static>(
    registry: &Registry,
    metric: C,
) -> Result<C, prometheus::Error> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn counters(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<IntCounterVec, prometheus::Error> {
    add(registry, IntCounterVec::new(Opts::new(name, help), labels)?)
}

fn durations(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<HistogramVec, prometheus::Error> {
    let opts = HistogramOpts::new(name, help).buckets(DURATION_BUCKETS.to_vec());
    add(registry, HistogramVec::new(opts, labels)?)
}

fn gauge(registry: &Registry, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
    add(registry, IntGauge::new(name, help)?)
}

fn gauges(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<IntGaugeVec, prometheus::Error> {
    add(registry, IntGaugeVec::new(Opts::new(name, help), labels)?)
}
