//! Every panel's query asked of a real Prometheus: a panel without data looks like a service without trouble.

use std::fmt::{self, Display};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use reqwest::blocking::Client;
use serde_json::Value;

use super::model::{Dashboard, Kind, Panel, version_annotation};

const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Points of a graph. Prometheus gives at most 11,000.
pub(crate) const POINTS: u32 = 120;

/// What the variables stand for, and the time that is looked at: up to now.
#[derive(Clone, Debug)]
pub(crate) struct Scope {
    /// Regular expressions, as Grafana makes them of what is chosen.
    pub(crate) namespace: String,
    pub(crate) job: String,
    pub(crate) pod: String,
    pub(crate) deployment: String,
    /// What Grafana makes at least four times the scrape interval.
    pub(crate) rate_interval: Duration,
    pub(crate) range: Duration,
    /// Whether panels that need more than the service's own metrics must have data, too.
    pub(crate) cluster: bool,
}

impl Default for Scope {
    fn default() -> Self {
        let any = || ".*".to_owned();
        Self {
            namespace: any(),
            job: any(),
            pod: any(),
            deployment: any(),
            rate_interval: Duration::from_secs(60),
            range: Duration::from_secs(900),
            cluster: false,
        }
    }
}

/// One query of one panel, ready to be asked.
#[derive(Clone, Debug)]
pub(crate) struct Question {
    /// Dashboard, panel and query, as a reader finds them.
    pub(crate) place: String,
    /// Without variables.
    pub(crate) expr: String,
    /// Whether only the newest value counts.
    pub(crate) instant: bool,
    /// What has to be scraped besides the service.
    pub(crate) needs: Option<&'static str>,
}

/// What came of it.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) panels: usize,
    pub(crate) queries: usize,
    /// Panels that were left out, and what they need.
    pub(crate) left_out: Vec<(String, &'static str)>,
}

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  {} panels with {} queries have data", self.panels, self.queries)?;
        for (place, needs) in &self.left_out {
            writeln!(f, "  not asked: {place} needs {needs}")?;
        }
        Ok(())
    }
}

/// Asks every query. A panel without data is an error, except those that need an exporter of the cluster, unless the
/// scope has them.
pub(crate) fn check_panels(prometheus_url: &str, scope: &Scope) -> Result<Report> {
    let prometheus = Prometheus::new(prometheus_url)?;
    let mut report = Report::default();
    let mut faults = Vec::new();
    for dashboard in super::all() {
        for panel in dashboard.panels() {
            let questions = questions(&dashboard, panel, scope);
            if let (Some(needs), false) = (panel.needs, scope.cluster) {
                report.left_out.push((format!("{}, {}", dashboard.title, panel.title), needs));
                continue;
            }
            report.panels += 1;
            for question in questions {
                report.queries += 1;
                match prometheus.series(&question.expr, question.instant, scope.range) {
                    Ok(series) if series.iter().any(Series::has_data) => {}
                    Ok(series) if series.is_empty() => {
                        faults.push(format!("{}: no series: {}", question.place, question.expr));
                    }
                    Ok(_) => faults.push(format!("{}: no number: {}", question.place, question.expr)),
                    Err(error) => faults.push(format!("{}: {error:#}: {}", question.place, question.expr)),
                }
            }
        }
    }
    let versions = prometheus.series(&fill(&version_annotation(), scope), false, scope.range)?;
    if versions.is_empty() && prometheus.is_younger_than(scope.range)? {
        faults.push("the annotations of new versions: no series".to_owned());
    }
    if !faults.is_empty() {
        bail!("{} of {} queries have no data:\n  {}", faults.len(), report.queries, faults.join("\n  "));
    }
    Ok(report)
}

/// The queries of a panel with the variables filled in.
pub(crate) fn questions(dashboard: &Dashboard, panel: &Panel, scope: &Scope) -> Vec<Question> {
    let question = |query: &super::model::Query| Question {
        place: format!("{}, {}, {:?}", dashboard.title, panel.title, query.legend),
        expr: fill(&query.expr, scope),
        instant: matches!(panel.kind, Kind::Table | Kind::Bars),
        needs: panel.needs,
    };
    panel.queries.iter().map(question).collect()
}

/// Puts in what Grafana would.
pub(crate) fn fill(expr: &str, scope: &Scope) -> String {
    let seconds = |duration: Duration| format!("{}s", duration.as_secs().max(1));
    [
        ("$__rate_interval", seconds(scope.rate_interval)),
        ("$__range", seconds(scope.range)),
        ("$namespace", scope.namespace.clone()),
        ("$job", scope.job.clone()),
        ("$pod", scope.pod.clone()),
        ("$deployment", scope.deployment.clone()),
    ]
    .into_iter()
    .fold(expr.to_owned(), |expr, (name, value)| expr.replace(name, &value))
}

/// One line of a graph.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    /// Seconds since 1970, and the value.
    pub(crate) points: Vec<(f64, f64)>,
}

impl Series {
    fn has_data(&self) -> bool {
        self.points.iter().any(|(_, value)| value.is_finite())
    }

    fn parse(result: &Value) -> Result<Self> {
        let point = |pair: &Value| -> Result<(f64, f64)> {
            let time = pair[0].as_f64().context("a point without a time")?;
            Ok((time, pair[1].as_str().context("a point without a value")?.parse()?))
        };
        let points = match result["values"].as_array() {
            Some(values) => values.iter().map(point).collect::<Result<_>>()?,
            None => vec![point(&result["value"])?],
        };
        Ok(Self { points })
    }
}

/// A Prometheus, or what speaks its API.
#[derive(Debug)]
pub(crate) struct Prometheus {
    client: Client,
    url: String,
}

impl Prometheus {
    pub(crate) fn new(url: &str) -> Result<Self> {
        let client = Client::builder().timeout(ANSWER_LIMIT).build()?;
        Ok(Self { client, url: url.trim_end_matches('/').to_owned() })
    }

    /// What a panel would show of an expression: the newest values, or those of the range up to now.
    pub(crate) fn series(&self, expr: &str, instant: bool, range: Duration) -> Result<Vec<Series>> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
        let answer = if instant {
            self.get("query", &[("query", expr.to_owned()), ("time", now.to_string())])?
        } else {
            let step = (range / POINTS).max(Duration::from_secs(1));
            self.get(
                "query_range",
                &[
                    ("query", expr.to_owned()),
                    ("start", (now - range.as_secs_f64()).to_string()),
                    ("end", now.to_string()),
                    ("step", step.as_secs().to_string()),
                ],
            )?
        };
        let result = answer["data"]["result"].as_array().context("an answer without a result")?;
        result.iter().map(Series::parse).collect()
    }

    /// Whether it has nothing of the time before the range.
    fn is_younger_than(&self, range: Duration) -> Result<bool> {
        let then = SystemTime::now().duration_since(UNIX_EPOCH)? - range;
        let query = [("query", "count(up)".to_owned()), ("time", then.as_secs().to_string())];
        Ok(self.get("query", &query)?["data"]["result"].as_array().is_some_and(Vec::is_empty))
    }

    fn get(&self, path: &str, query: &[(&str, String)]) -> Result<Value> {
        let url = format!("{}/api/v1/{path}", self.url);
        let answer = self.client.get(&url).query(query).send().with_context(|| format!("ask {url}"))?;
        let status = answer.status();
        let text = answer.text().with_context(|| format!("read the answer of {url}"))?;
        let answer: Value =
            serde_json::from_str(&text).with_context(|| format!("{url} answers {status}: {text}"))?;
        ensure!(answer["status"] == "success", "{}", answer["error"].as_str().unwrap_or(&text));
        Ok(answer)
    }
}
