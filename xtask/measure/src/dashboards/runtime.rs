//! The processes and their pods: what runs in which version, what it uses, and whether a rollout gets on.

use super::model::{Dashboard, Row, lines, stack, stat, states, table};

/// A pod of the Deployment, and not of a StatefulSet or a Job whose name begins alike.
macro_rules! pods {
    ($metric:literal) => {
        concat!($metric, r#"{CLUSTER, pod=~"($deployment)-[0-9a-z]+-[0-9a-z]{5}""#)
    };
}

pub(super) fn dashboard() -> Dashboard {
    Dashboard {
        name: "runtime",
        title: "chat-service / Runtime and rollout",
        description: "Versions, rollouts, the schema, restarts, and what the processes use.",
        rows: vec![versions(), rollout(), process(), container(), telemetry()],
    }
}

fn versions() -> Row {
    Row {
        title: "Versions",
        answers: "Which version runs where, and does the schema fit it?",
        panels: vec![
            stack("Replicas by version", "none", "Running processes by version and revision. Two at once is a rollout; for longer than minutes, one that is stuck.")
                .query("{{version}} {{revision}}", "count by (version, revision) (chat_build_info{OURS})")
                .width(8),
            states("Ready", "Whether the replica's `/healthz` answers 200: Postgres answers, the schema is current, and it is not ending.")
                .query("{{pod}}", "max by (pod) (chat_ready{OURS})")
                .zero_one("not ready", "ready")
                .runbook("ChatServiceNotReady")
                .runbook("ChatServiceReplicaNotReady")
                .width(8),
            stat("Schema too old", "none", "Replicas that know a newer schema than the database has. They wait, live and unready, for the migration Job.")
                .query("replicas", "count(chat_schema_version{OURS} < chat_schema_version_expected{OURS}) or vector(0)")
                .from(1.0, "red")
                .runbook("ChatServiceSchemaBehind")
                .width(4)
                .height(8),
            table("Schema version", "The newest migration that is applied, and the newest that the binary knows, of each replica.")
                .column("Applied", "none", "max by (pod) (chat_schema_version{OURS})")
                .column("Expected", "none", "max by (pod) (chat_schema_version_expected{OURS})")
                .width(4),
        ],
    }
}

fn rollout() -> Row {
    Row {
        title: "Rollout",
        answers: "Does the rollout get on, did the migration succeed, does the autoscaler have room?",
        panels: vec![
            lines("Replicas of the Deployment", "none", "Wanted, updated to the newest template, and available. They meet at the end of a rollout.")
                .query("wanted", r#"sum(kube_deployment_spec_replicas{CLUSTER, deployment=~"$deployment"})"#)
                .query("updated", r#"sum(kube_deployment_status_replicas_updated{CLUSTER, deployment=~"$deployment"})"#)
                .query("available", r#"sum(kube_deployment_status_replicas_available{CLUSTER, deployment=~"$deployment"})"#)
                .runbook("ChatServiceRolloutStuck")
                .runbook("ChatServiceReplicasUnavailable")
                .needs("kube-state-metrics")
                .width(8),
            lines("Autoscaler", "none", "Replicas that the HorizontalPodAutoscaler runs and wants, and its limits. At the upper limit more load is more latency.")
                .query("running", r#"sum(kube_horizontalpodautoscaler_status_current_replicas{CLUSTER, horizontalpodautoscaler=~"$deployment"})"#)
                .query("wanted", r#"sum(kube_horizontalpodautoscaler_status_desired_replicas{CLUSTER, horizontalpodautoscaler=~"$deployment"})"#)
                .query("most", r#"sum(kube_horizontalpodautoscaler_spec_max_replicas{CLUSTER, horizontalpodautoscaler=~"$deployment"})"#)
                .query("least", r#"sum(kube_horizontalpodautoscaler_spec_min_replicas{CLUSTER, horizontalpodautoscaler=~"$deployment"})"#)
                .runbook("ChatServiceHpaAtLimit")
                .needs("kube-state-metrics, and `autoscaling.enabled`")
                .width(8),
            lines("Migration Job", "none", "Pods of the migration Job that run, succeeded and failed. The Job goes some minutes after it is done.")
                .query("running {{job_name}}", r#"sum by (job_name) (kube_job_status_active{CLUSTER, job_name=~".+-migrate-[0-9a-f]{8}"})"#)
                .query("succeeded {{job_name}}", r#"sum by (job_name) (kube_job_status_succeeded{CLUSTER, job_name=~".+-migrate-[0-9a-f]{8}"})"#)
                .query("failed {{job_name}}", r#"sum by (job_name) (kube_job_status_failed{CLUSTER, job_name=~".+-migrate-[0-9a-f]{8}"})"#)
                .runbook("ChatServiceMigrationFailed")
                .needs("kube-state-metrics")
                .width(8),
            lines("Starts of the process", "none", "How often the replica's process was started anew in the last ten minutes, as Prometheus saw it.")
                .query("{{pod}}", "sum by (pod) (changes(process_start_time_seconds{OURS}[10m]))")
                .from(3.0, "red")
                .width(8),
            lines("Restarts of containers", "none", "How often the kubelet restarted the container in the last ten minutes.")
                .query("{{pod}}", concat!("sum by (pod) (increase(", pods!("kube_pod_container_status_restarts_total"), "}[10m]))"))
                .from(3.0, "red")
                .runbook("ChatServiceCrashLooping")
                .needs("kube-state-metrics")
                .width(8),
            stack("Why containers wait or ended", "none", "Containers by the reason for which they wait, such as CrashLoopBackOff, or last ended, such as OOMKilled.")
                .query("waiting: {{reason}}", concat!("sum by (reason) (", pods!("kube_pod_container_status_waiting_reason"), "})"))
                .query("ended: {{reason}}", concat!("sum by (reason) (", pods!("kube_pod_container_status_last_terminated_reason"), "})"))
                .needs("kube-state-metrics, and something that went wrong")
                .width(8),
        ],
    }
}

fn process() -> Row {
    Row {
        title: "Process",
        answers: "What does a replica use?",
        panels: vec![
            lines(
                "Processor",
                "none",
                "Cores in use. A login costs 15 ms of one, by design; everything else tens of microseconds.",
            )
            .query("{{pod}}", "sum by (pod) (rate(process_cpu_seconds_total{OURS}[$__rate_interval]))")
            .width(8),
            lines(
                "Resident memory",
                "bytes",
                "Memory that the process holds. 19 MiB come with each password that is being hashed.",
            )
            .query("{{pod}}", "sum by (pod) (process_resident_memory_bytes{OURS})")
            .width(8),
            lines("File descriptors", "none", "Open files and connections; each client connection is one.")
                .query("{{pod}}", "sum by (pod) (process_open_fds{OURS})")
                .width(8),
            lines(
                "Passwords being hashed, or waiting",
                "none",
                "Logins and registrations in the hashing queue. Over its capacity they are refused with 503.",
            )
            .query("{{pod}}", "sum by (pod) (chat_password_queue_depth{OURS})")
            .query("capacity of one replica", "max(chat_password_queue_capacity{OURS})")
            .runbook("ChatServicePasswordQueueFilling")
            .width(8),
            lines(
                "Threads",
                "none",
                "Threads of the process: the runtime's, one per core for hashing, and a few more.",
            )
            .query("{{pod}}", "sum by (pod) (process_threads{OURS})")
            .width(8),
            lines("Running since", "s", "Age of the process. A fall to 0 is a restart.")
                .query("{{pod}}", "max by (pod) (time() - process_start_time_seconds{OURS})")
                .width(8),
        ],
    }
}

fn container() -> Row {
    Row {
        title: "Container",
        answers: "Do the requests and limits fit?",
        panels: vec![
            lines("Memory of its limit", "percentunit", "Working set as a share of the limit. At 100 % the kernel kills the container.")
                .query(
                    "{{pod}}",
                    concat!(
                        "sum by (pod) (", pods!("container_memory_working_set_bytes"), r#", container!="", container!="POD"})
                        / sum by (pod) ("#, pods!("kube_pod_container_resource_limits"), r#", resource="memory"})"#
                    ),
                )
                .max(1.0)
                .from(0.9, "red")
                .needs("cAdvisor's metrics and kube-state-metrics")
                .width(8),
            lines("Processor of its request", "percentunit", "Cores in use as a share of those requested, which is what the autoscaler goes by.")
                .query(
                    "{{pod}}",
                    concat!(
                        "sum by (pod) (rate(", pods!("container_cpu_usage_seconds_total"), r#", container!="", container!="POD"}[$__rate_interval]))
                        / sum by (pod) ("#, pods!("kube_pod_container_resource_requests"), r#", resource="cpu"})"#
                    ),
                )
                .needs("cAdvisor's metrics and kube-state-metrics")
                .width(8),
            lines("Throttled", "percentunit", "Share of the scheduler's periods in which a limit of the processor held the container back. The chart sets no such limit.")
                .query(
                    "{{pod}}",
                    concat!(
                        "sum by (pod) (rate(", pods!("container_cpu_cfs_throttled_periods_total"), r#"}[$__rate_interval]))
                        / sum by (pod) (rate("#, pods!("container_cpu_cfs_periods_total"), "}[$__rate_interval]))"
                    ),
                )
                .max(1.0)
                .from(0.25, "red")
                .needs("cAdvisor's metrics, and a limit of the processor")
                .width(8),
        ],
    }
}

fn telemetry() -> Row {
    Row {
        title: "Telemetry",
        answers: "Can these dashboards be believed: are metrics scraped and traces exported?",
        panels: vec![
            states("Scraped", "Whether Prometheus reaches the replica's operations port. What is not scraped is missing in every other panel.")
                .query("{{pod}}", "max by (pod) (up{OURS})")
                .zero_one("not scraped", "scraped")
                .runbook("ChatServiceReplicaDown")
                .width(8),
            lines("Duration of a scrape", "s", "How long the replica takes to answer a scrape.")
                .query("{{pod}}", "max by (pod) (scrape_duration_seconds{OURS})")
                .from(1.0, "red")
                .width(8),
            lines("Samples of a scrape", "none", "How many series a replica has. It does not grow with users or paths; if it does, a label is wrong.")
                .query("{{pod}}", "max by (pod) (scrape_samples_scraped{OURS})")
                .width(8),
            lines("Trace spans", "ops", "Spans per second that ended, were exported, or failed to be. All are 0 where no collector is configured.")
                .query("{{outcome}}", "sum by (outcome) (rate(chat_trace_spans_total{OURS}[$__rate_interval]))"),
            lines("Trace spans lost", "percentunit", "Share of the spans of the last ten minutes that ended and did not reach the collector: it failed, or the queue was full.")
                .query("{{pod}}", r#"
                    clamp_min(1 - sum by (pod) (increase(chat_trace_spans_total{OURS, outcome="exported"}[10m]))
                    / (sum by (pod) (increase(chat_trace_spans_total{OURS, outcome="ended"}[10m])) > 0), 0)"#)
                .max(1.0)
                .from(0.05, "red")
                .runbook("ChatServiceTraceExportFailing")
                .needs("a collector (OTEL_EXPORTER_OTLP_ENDPOINT)"),
        ],
    }
}
