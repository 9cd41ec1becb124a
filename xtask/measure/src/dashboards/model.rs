//! A dashboard as it is written here, and as Grafana's JSON. Places, ids and all that panels have in common are made here,
//! so that the dashboards cannot differ in them.

use serde_json::{Value, json};

/// The schema of Grafana 10.4 to 11; newer ones migrate it when they load it.
const SCHEMA_VERSION: u32 = 39;

/// By which the dashboards find one another.
pub(crate) const TAG: &str = "chat-service";

/// Where the runbooks are read, unless the chart or a user says something else.
const RUNBOOKS: &str = "deploy/runbooks";

const COLUMNS: u32 = 24;

/// What stands for the labels in an expression, and the labels.
const SELECTORS: [(&str, &str); 3] = [
    ("{OURS", r#"{namespace=~"$namespace", job=~"$job", pod=~"$pod""#),
    // Series that rules made of those of all pods.
    ("{RULE", r#"{namespace=~"$namespace", job=~"$job""#),
    // Series of the cluster, whose job is that of their exporter.
    ("{CLUSTER", r#"{namespace=~"$namespace""#),
];

#[derive(Debug)]
pub(crate) struct Dashboard {
    /// Also the file's name. Links and bookmarks hold its uid: it never changes.
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    pub(crate) description: &'static str,
    pub(crate) rows: Vec<Row>,
}

#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) title: &'static str,
    /// The question that its panels answer.
    pub(crate) answers: &'static str,
    pub(crate) panels: Vec<Panel>,
}

#[derive(Clone, Debug)]
pub(crate) struct Panel {
    pub(crate) title: &'static str,
    pub(crate) description: &'static str,
    pub(crate) kind: Kind,
    /// One of Grafana's unit ids.
    pub(crate) unit: &'static str,
    pub(crate) width: u32,
    pub(crate) height: u32,
    pub(crate) queries: Vec<Query>,
    /// From which value on which colour; below the first it is `base`.
    pub(crate) base: &'static str,
    pub(crate) steps: Vec<(f64, &'static str)>,
    pub(crate) min: Option<f64>,
    pub(crate) max: Option<f64>,
    /// Names for values, with their colours.
    pub(crate) words: Vec<(&'static str, &'static str, &'static str)>,
    /// Alerts whose runbooks say what to do.
    pub(crate) runbooks: Vec<&'static str>,
    /// What has to be scraped besides the service.
    pub(crate) needs: Option<&'static str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The newest value, large, over its history.
    Stat,
    Lines,
    /// Lines on top of one another.
    Stack,
    /// Buckets of a histogram over time.
    Heatmap,
    /// A bar for each series, with its newest value.
    Bars,
    /// A band for each series, coloured by `words`.
    States,
    /// A row for each set of labels, a column for each query; `legend` is the column's title.
    Table,
}

#[derive(Clone, Debug)]
pub(crate) struct Query {
    pub(crate) expr: String,
    pub(crate) legend: &'static str,
    /// In a table: the unit of the column.
    unit: Option<&'static str>,
}

impl Panel {
    fn new(kind: Kind, title: &'static str, unit: &'static str, description: &'static str) -> Self {
        let (width, height) = match kind {
            Kind::Stat => (4, 4),
            Kind::Table => (24, 8),
            _ => (12, 8),
        };
        Self {
            title,
            description,
            kind,
            unit,
            width,
            height,
            queries: Vec::new(),
            base: "green",
            steps: Vec::new(),
            min: None,
            max: None,
            words: Vec::new(),
            runbooks: Vec::new(),
            needs: None,
        }
    }

    pub(crate) fn query(mut self, legend: &'static str, expr: &str) -> Self {
        self.queries.push(Query { expr: select(expr), legend, unit: None });
        self
    }

    /// A column of a table.
    pub(crate) fn column(mut self, title: &'static str, unit: &'static str, expr: &str) -> Self {
        self.queries.push(Query { expr: select(expr), legend: title, unit: Some(unit) });
        self
    }

    /// Of 24 columns.
    pub(crate) fn width(mut self, width: u32) -> Self {
        self.width = width;
        self
    }

    pub(crate) fn height(mut self, height: u32) -> Self {
        self.height = height;
        self
    }

    pub(crate) fn from(mut self, value: f64, colour: &'static str) -> Self {
        self.steps.push((value, colour));
        self
    }

    /// The colour below all steps.
    pub(crate) fn base(mut self, colour: &'static str) -> Self {
        self.base = colour;
        self
    }

    pub(crate) fn min(mut self, min: f64) -> Self {
        self.min = Some(min);
        self
    }

    pub(crate) fn max(mut self, max: f64) -> Self {
        self.max = Some(max);
        self
    }

    /// 0 and 1 by their names.
    pub(crate) fn zero_one(mut self, zero: &'static str, one: &'static str) -> Self {
        self.words = vec![("0", zero, "red"), ("1", one, "green")];
        self.base("red").from(1.0, "green").min(0.0).max(1.0)
    }

    pub(crate) fn runbook(mut self, alert: &'static str) -> Self {
        self.runbooks.push(alert);
        self
    }

    /// It has data only where this is scraped, too.
    pub(crate) fn needs(mut self, exporter: &'static str) -> Self {
        self.needs = Some(exporter);
        self
    }

    /// As the dashboard shows it.
    pub(crate) fn full_description(&self) -> String {
        match self.needs {
            Some(exporter) => format!("{} Needs {exporter}.", self.description),
            None => self.description.to_owned(),
        }
    }
}

pub(crate) fn stat(title: &'static str, unit: &'static str, description: &'static str) -> Panel {
    Panel::new(Kind::Stat, title, unit, description)
}

pub(crate) fn lines(title: &'static str, unit: &'static str, description: &'static str) -> Panel {
    Panel::new(Kind::Lines, title, unit, description).min(0.0)
}

pub(crate) fn stack(title: &'static str, unit: &'static str, description: &'static str) -> Panel {
    Panel::new(Kind::Stack, title, unit, description).min(0.0)
}

pub(crate) fn heatmap(title: &'static str, unit: &'static str, description: &'static str) -> Panel {
    Panel::new(Kind::Heatmap, title, unit, description)
}

pub(crate) fn bars(title: &'static str, unit: &'static str, description: &'static str) -> Panel {
    Panel::new(Kind::Bars, title, unit, description).min(0.0)
}

pub(crate) fn states(title: &'static str, description: &'static str) -> Panel {
    Panel::new(Kind::States, title, "none", description)
}

pub(crate) fn table(title: &'static str, description: &'static str) -> Panel {
    Panel::new(Kind::Table, title, "none", description)
}

fn select(expr: &str) -> String {
    let mut expr = expr.split_whitespace().collect::<Vec<_>>().join(" ");
    for (name, labels) in SELECTORS {
        expr = expr.replace(name, labels);
    }
    expr
}

/// A new version, from its first second on for five minutes.
pub(crate) fn version_annotation() -> String {
    select(
        "count by (version, revision) (chat_build_info{OURS}) unless \
         count by (version, revision) (chat_build_info{OURS} offset 5m)",
    )
}

impl Dashboard {
    pub(crate) fn uid(&self) -> String {
        format!("{TAG}-{}", self.name)
    }

    pub(crate) fn panels(&self) -> impl Iterator<Item = &Panel> {
        self.rows.iter().flat_map(|row| &row.panels)
    }

    /// The variables with what Prometheus is asked for their values.
    pub(crate) fn variables(&self) -> Vec<Variable> {
        let mut variables = vec![
            Variable {
                name: "namespace",
                label: "Namespace",
                query: "label_values(chat_build_info, namespace)",
                // Also what has no such label.
                all: Some(".*"),
                regex: "",
            },
            Variable {
                name: "job",
                label: "Job",
                query: r#"label_values(chat_build_info{namespace=~"$namespace"}, job)"#,
                // The list of ours: others export `process_*`, too.
                all: None,
                regex: "",
            },
            Variable {
                name: "pod",
                label: "Pod",
                query: r#"label_values(chat_build_info{namespace=~"$namespace", job=~"$job"}, pod)"#,
                // Also pods that come while one looks.
                all: Some(".*"),
                regex: "",
            },
        ];
        if self.panels().any(|panel| panel.queries.iter().any(|query| query.expr.contains("$deployment"))) {
            variables.push(Variable {
                name: "deployment",
                label: "Deployment",
                query: r#"query_result(kube_pod_owner{namespace=~"$namespace", owner_kind="ReplicaSet"} and on (namespace, pod) chat_build_info{namespace=~"$namespace", job=~"$job", pod=~"$pod"})"#,
                all: None,
                // A ReplicaSet is named after its Deployment, with a hash behind it.
                regex: r#"/owner_name="(.+)-[^-"]+"/"#,
            });
        }
        variables
    }

    pub(crate) fn json(&self) -> Value {
        let mut list = vec![json!({
            "name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "regex": "",
            "refresh": 1, "hide": 0, "multi": false, "includeAll": false, "options": [],
            "current": { "selected": true, "text": "default", "value": "default" },
            "skipUrlSync": false,
        })];
        list.extend(self.variables().iter().map(Variable::json));
        list.push(json!({
            "name": "runbooks", "label": "Runbooks at", "type": "textbox", "query": RUNBOOKS, "hide": 0,
            "current": { "selected": true, "text": RUNBOOKS, "value": RUNBOOKS },
            "options": [{ "selected": true, "text": RUNBOOKS, "value": RUNBOOKS }], "skipUrlSync": false,
        }));
        json!({
            "uid": self.uid(),
            "title": self.title,
            "description": self.description,
            "tags": [TAG],
            "schemaVersion": SCHEMA_VERSION,
            "version": 1,
            "editable": true,
            // The crosshair in all panels at once.
            "graphTooltip": 1,
            "refresh": "30s",
            "time": { "from": "now-1h", "to": "now" },
            "timezone": "browser",
            "links": [
                {
                    "type": "dashboards", "title": "chat-service", "tags": [TAG], "asDropdown": false,
                    "includeVars": true, "keepTime": true, "targetBlank": false, "icon": "external link",
                    "tooltip": "The other dashboards, with the same time range and pods", "url": "",
                },
                {
                    "type": "link", "title": "Runbooks", "tags": [], "asDropdown": false, "includeVars": false,
                    "keepTime": false, "targetBlank": true, "icon": "doc", "tooltip": "What to do when an alert fires",
                    "url": "${runbooks}",
                },
            ],
            "annotations": { "list": annotations() },
            "templating": { "list": list },
            "panels": self.laid_out(),
        })
    }

    /// Rows below one another, panels side by side until a line is full.
    fn laid_out(&self) -> Vec<Value> {
        let mut panels = Vec::new();
        let mut y = 0;
        for row in &self.rows {
            let id = panels.len() + 1;
            panels.push(json!({
                "id": id, "type": "row", "title": row.title, "collapsed": false, "panels": [],
                "gridPos": { "x": 0, "y": y, "w": COLUMNS, "h": 1 },
            }));
            y += 1;
            let (mut x, mut line_height) = (0, 0);
            for panel in &row.panels {
                if x + panel.width > COLUMNS {
                    y += line_height;
                    (x, line_height) = (0, 0);
                }
                let id = panels.len() + 1;
                let place = json!({ "x": x, "y": y, "w": panel.width, "h": panel.height });
                panels.push(panel.json(id, &place));
                x += panel.width;
                line_height = line_height.max(panel.height);
            }
            y += line_height;
        }
        panels
    }
}

/// What a user chooses at the top.
#[derive(Debug)]
pub(crate) struct Variable {
    pub(crate) name: &'static str,
    label: &'static str,
    pub(crate) query: &'static str,
    /// What `All` matches; `None` for the listed values.
    all: Option<&'static str>,
    regex: &'static str,
}

impl Variable {
    fn json(&self) -> Value {
        let mut variable = json!({
            "name": self.name, "label": self.label, "type": "query", "datasource": datasource(),
            "definition": self.query, "query": { "query": self.query, "refId": self.name }, "regex": self.regex,
            // At each change of the time: pods come and go.
            "refresh": 2, "sort": 1, "hide": 0, "multi": true, "includeAll": true, "options": [],
            "current": { "selected": true, "text": ["All"], "value": ["$__all"] }, "skipUrlSync": false,
        });
        if let Some(all) = self.all {
            variable["allValue"] = json!(all);
        }
        variable
    }
}

fn datasource() -> Value {
    json!({ "type": "prometheus", "uid": "${datasource}" })
}

fn annotations() -> Value {
    json!([
        {
            "name": "Annotations & Alerts", "builtIn": 1, "type": "dashboard", "enable": true, "hide": true,
            "datasource": { "type": "grafana", "uid": "-- Grafana --" }, "iconColor": "rgba(0, 211, 255, 1)",
        },
        {
            "name": "New version", "enable": true, "hide": false, "iconColor": "purple",
            "datasource": datasource(), "expr": version_annotation(), "step": "60s",
            "titleFormat": "{{version}}", "textFormat": "revision {{revision}}", "tagKeys": "version",
            "useValueForTime": false,
        },
    ])
}

fn runbook_link(alert: &str) -> Value {
    json!({
        "type": "link", "title": format!("Runbook {alert}"), "url": format!("${{runbooks}}/{alert}.md"), "icon": "doc",
        "tooltip": "", "tags": [], "asDropdown": false, "includeVars": false, "keepTime": false, "targetBlank": true,
    })
}

impl Panel {
    fn json(&self, id: usize, place: &Value) -> Value {
        let mut panel = json!({
            "id": id,
            "type": self.kind.plugin(),
            "title": self.title,
            "description": self.full_description(),
            "datasource": datasource(),
            "gridPos": place,
            "fieldConfig": { "defaults": self.field_defaults(), "overrides": self.overrides() },
            "options": self.options(),
            "targets": self.targets(),
            "links": self.runbooks.iter().map(|alert| runbook_link(alert)).collect::<Vec<_>>(),
        });
        if self.kind == Kind::Table {
            panel["transformations"] = self.transformations();
        }
        panel
    }

    fn targets(&self) -> Vec<Value> {
        let format = match self.kind {
            Kind::Heatmap => "heatmap",
            Kind::Table => "table",
            _ => "time_series",
        };
        let instant = matches!(self.kind, Kind::Table | Kind::Bars);
        let target = |(index, query): (usize, &Query)| {
            json!({
                "refId": ref_id(index), "datasource": datasource(), "editorMode": "code", "expr": query.expr,
                "legendFormat": query.legend, "format": format, "instant": instant, "range": !instant,
            })
        };
        self.queries.iter().enumerate().map(target).collect()
    }

    fn field_defaults(&self) -> Value {
        let mut steps = vec![json!({ "color": self.base, "value": null })];
        steps.extend(self.steps.iter().map(|(value, color)| json!({ "color": color, "value": value })));
        let lines = matches!(self.kind, Kind::Lines | Kind::Stack);
        let mode = if lines { "palette-classic" } else { "thresholds" };
        let mut defaults = json!({
            "unit": self.unit,
            "color": { "mode": mode },
            "thresholds": { "mode": "absolute", "steps": steps },
            "custom": self.custom(),
        });
        for (name, limit) in [("min", self.min), ("max", self.max)] {
            if let Some(limit) = limit {
                defaults[name] = json!(limit);
            }
        }
        if !self.words.is_empty() {
            let option = |(index, (value, text, color)): (usize, &(&str, &str, &str))| {
                ((*value).to_owned(), json!({ "text": text, "color": color, "index": index }))
            };
            let options: serde_json::Map<String, Value> = self.words.iter().enumerate().map(option).collect();
            defaults["mappings"] = json!([{ "type": "value", "options": options }]);
        }
        defaults
    }

    fn custom(&self) -> Value {
        match self.kind {
            Kind::Lines | Kind::Stack => {
                let stacked = self.kind == Kind::Stack;
                let limit = if self.steps.is_empty() { "off" } else { "dashed" };
                json!({
                    "drawStyle": "line", "lineInterpolation": "linear", "lineWidth": 1, "showPoints": "never",
                    "fillOpacity": if stacked { 40 } else { 8 }, "spanNulls": false, "axisPlacement": "auto",
                    "stacking": { "group": "A", "mode": if stacked { "normal" } else { "none" } },
                    "thresholdsStyle": { "mode": limit },
                })
            }
            Kind::Heatmap => json!({ "scaleDistribution": { "type": "linear" } }),
            Kind::States => json!({ "fillOpacity": 70, "lineWidth": 0 }),
            Kind::Table => json!({ "align": "auto", "cellOptions": { "type": "auto" }, "inspect": false }),
            Kind::Stat | Kind::Bars => json!({}),
        }
    }

    fn options(&self) -> Value {
        let newest = json!({ "calcs": ["lastNotNull"], "fields": "", "values": false });
        match self.kind {
            Kind::Stat => json!({
                "colorMode": "value", "graphMode": "area", "justifyMode": "auto", "orientation": "auto",
                "reduceOptions": newest, "textMode": "auto", "wideLayout": true,
                "showPercentChange": false, "percentChangeColorMode": "standard",
            }),
            Kind::Lines | Kind::Stack => json!({
                "legend": {
                    "displayMode": "table", "placement": "bottom", "showLegend": true,
                    "calcs": ["mean", "max", "lastNotNull"],
                },
                "tooltip": { "mode": "multi", "sort": "desc" },
            }),
            Kind::Heatmap => json!({
                "calculate": false, "cellGap": 1, "showValue": "never",
                "color": {
                    "mode": "scheme", "scheme": "Oranges", "scale": "exponential", "exponent": 0.5, "steps": 64,
                    "reverse": false, "fill": "dark-orange",
                },
                "filterValues": { "le": 1e-9 },
                "rowsFrame": { "layout": "auto" },
                "yAxis": { "axisPlacement": "left", "reverse": false, "unit": self.unit },
                "legend": { "show": true },
                "tooltip": { "mode": "single", "yHistogram": true },
                "exemplars": { "color": "rgba(255,0,255,0.7)" },
            }),
            Kind::Bars => json!({
                "displayMode": "gradient", "orientation": "horizontal", "reduceOptions": newest,
                "showUnfilled": true, "valueMode": "color", "namePlacement": "auto", "sizing": "auto",
                "minVizHeight": 16, "minVizWidth": 8, "maxVizHeight": 300,
                "legend": { "displayMode": "list", "placement": "bottom", "showLegend": false, "calcs": [] },
            }),
            Kind::States => json!({
                "mergeValues": true, "showValue": "never", "alignValue": "left", "rowHeight": 0.8,
                "legend": { "displayMode": "list", "placement": "bottom", "showLegend": true, "calcs": [] },
                "tooltip": { "mode": "single", "sort": "none" },
            }),
            Kind::Table => json!({
                "showHeader": true, "cellHeight": "sm", "frameIndex": 0,
                "footer": { "show": false, "reducer": ["sum"], "countRows": false, "fields": "" },
            }),
        }
    }

    /// The columns of a table, each with its own unit.
    fn overrides(&self) -> Vec<Value> {
        let units = self.queries.iter().filter_map(|query| Some((query.legend, query.unit?)));
        units
            .map(|(title, unit)| {
                json!({
                    "matcher": { "id": "byName", "options": title },
                    "properties": [{ "id": "unit", "value": unit }],
                })
            })
            .collect()
    }

    /// One table of all queries, without the time.
    fn transformations(&self) -> Value {
        let names = self.queries.iter().enumerate();
        let renamed: serde_json::Map<String, Value> =
            names.map(|(index, query)| (format!("Value #{}", ref_id(index)), json!(query.legend))).collect();
        json!([
            { "id": "merge", "options": {} },
            { "id": "organize", "options": { "excludeByName": { "Time": true }, "renameByName": renamed } },
        ])
    }
}

/// A, B, C ...
fn ref_id(index: usize) -> char {
    u8::try_from(index).map_or('Z', |index| char::from(b'A' + index.min(25)))
}

impl Kind {
    pub(crate) fn plugin(self) -> &'static str {
        match self {
            Self::Stat => "stat",
            Self::Lines | Self::Stack => "timeseries",
            Self::Heatmap => "heatmap",
            Self::Bars => "bargauge",
            Self::States => "state-timeline",
            Self::Table => "table",
        }
    }
}
