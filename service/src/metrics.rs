//! Every metric of the service, in one registry. No label ever holds a user's text, id or path.
//!
//! What an alert may read exists from the first scrape on, at 0. Numbers that something else keeps anyway, such
//! as the pool's size, are read when Prometheus asks.

use std::sync::Arc;
use std::time::Duration;

use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};
use salvo::http::StatusCode;

use crate::app::App;
use crate::limits::Limit;
use crate::span_counter::SPANS;

/// Seconds; from a hit in the window, under 1 ms, to the request time-out, with 250 ms for the objective.
const DURATION_BUCKETS: [f64; 13] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

const BATCH_BUCKETS: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: HistogramVec,
    active_requests: IntGauge,
    messages_sent: IntCounterVec,
    batch_rows: Histogram,
    outbox_depth: IntGauge,
    auth_attempts: IntCounterVec,
    rate_limited: IntCounterVec,
    cache_lookups: IntCounterVec,
    hashing_waiting: IntGauge,
    pool_connections: IntGaugeVec,
    dependency_up: IntGaugeVec,
    schema_version: IntGauge,
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
        #[cfg(target_os = "linux")]
        registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        let metrics = Self {
            requests: add(
                &registry,
                HistogramVec::new(
                    HistogramOpts::new("http_server_request_duration_seconds", "Duration of HTTP requests")
                        .buckets(DURATION_BUCKETS.to_vec()),
                    &["http_request_method", "http_route", "http_response_status_code"],
                )?,
            )?,
            active_requests: gauge(&registry, "http_server_active_requests", "HTTP requests in flight")?,
            messages_sent: counters(
                &registry,
                Opts::new("chat_messages_sent_total", "Messages that clients sent"),
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
            auth_attempts: counters(
                &registry,
                Opts::new("chat_auth_attempts_total", "Logins and registrations that were judged"),
                &["kind", "outcome"],
            )?,
            rate_limited: counters(
                &registry,
                Opts::new("chat_rate_limited_total", "Requests over a rate limit"),
                &["limit"],
            )?,
            cache_lookups: counters(
                &registry,
                Opts::new("chat_cache_lookups_total", "Look-ups in the recent window"),
                &["outcome"],
            )?,
            hashing_waiting: gauge(
                &registry,
                "chat_password_queue_depth",
                "Passwords being hashed, or waiting",
            )?,
            pool_connections: gauges(
                &registry,
                Opts::new("db_client_connection_count", "Connections of the Postgres pool"),
                &["db_client_connection_pool_name", "db_client_connection_state"],
            )?,
            dependency_up: gauges(
                &registry,
                Opts::new("chat_dependency_up", "1 while the dependency answers"),
                &["dependency"],
            )?,
            schema_version: gauge(&registry, "chat_schema_version", "Newest migration applied")?,
            registry,
        };
        add(&metrics.registry, SPANS.clone())?;
        let info = Opts::new("chat_build_info", "What this process was built from")
            .const_label("version", env!("CARGO_PKG_VERSION"))
            .const_label("revision", option_env!("CHAT_SERVICE_REVISION").unwrap_or("unknown"));
        add(&metrics.registry, IntGauge::with_opts(info)?)?.set(1);
        metrics.start_at_zero();
        Ok(Arc::new(metrics))
    }

    pub fn request_started(&self) -> InFlight {
        InFlight::new(&self.active_requests)
    }

    /// Requests in flight on the public port.
    pub fn active_requests(&self) -> i64 {
        self.active_requests.get()
    }

    pub fn request_finished(&self, method: &str, route: &str, status: StatusCode, duration: Duration) {
        self.requests.with_label_values(&[method, route, status.as_str()]).observe(duration.as_secs_f64());
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
        let idle = app.pool.num_idle() as i64;
        let used = i64::from(app.pool.size()) - idle;
        self.pool_connections.with_label_values(&["chat", "idle"]).set(idle);
        self.pool_connections.with_label_values(&["chat", "used"]).set(used);
        self.dependency_up.with_label_values(&["postgres"]).set(i64::from(app.health.postgres_answers()));
        self.dependency_up.with_label_values(&["redis"]).set(i64::from(app.redis.live().is_some()));
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

fn counters(registry: &Registry, opts: Opts, labels: &[&str]) -> Result<IntCounterVec, prometheus::Error> {
    add(registry, IntCounterVec::new(opts, labels)?)
}

fn gauge(registry: &Registry, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
    add(registry, IntGauge::new(name, help)?)
}

fn gauges(registry: &Registry, opts: Opts, labels: &[&str]) -> Result<IntGaugeVec, prometheus::Error> {
    add(registry, IntGaugeVec::new(opts, labels)?)
}
