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
        description: "Versions, rollouts, the schema, restarts, and the resources of the processes.",
        rows: vec![versions(), rollout(), process(), container(), telemetry()],
    }
}

fn versions() -> Row {
    Row {
        title: "Versions",
        answers: "Which versions run, and does the schema match them?",
        panels: vec![
            stack("Replicas by version", "none", "Running processes by version and revision. Two versions mean a rollout; for longer than minutes, a stuck one.")
                .query("{{version}} {{revision}}", "count by (version, revision) (chat_build_info{OURS})")
                .width(8),
            states("Ready", "Whether the replica's `/healthz` answers 200: it reaches Postgres, the schema is current, and it is not shutting down.")
                .query("{{pod}}", "max by (pod) (chat_ready{OURS})")
                .zero_one("not ready", "ready")
                .runbook("ChatServiceNotReady")
                .runbook("ChatServiceReplicaNotReady")
                .width(8),
            stat("Schema too old", "none", "Replicas that need a newer schema than the database has. They wait for the migration Job, live and unready.")
                .query("replicas", "count(chat_schema_version{OURS} < chat_schema_version_expected{OURS}) or vector(0)")
                .from(1.0, "red")
                .runbook("ChatServiceSchemaBehind")
                .width(4)
                .height(8),
            table("Schema version", "For each replica, the newest migration in the database, and the newest that the binary needs.")
                .column("Applied", "none", "max by (pod) (chat_schema_version{OURS})")
                .column("Expected", "none", "max by (pod) (chat_schema_version_expected{OURS})")
                .width(4),
        ],
    }
}

fn rollout() -> Row {
    Row {
        title: "Rollout",
        answers: "Does the rollout proceed, did the migration succeed, can the autoscaler add replicas?",
        panels: vec![
            lines("Replicas of the Deployment", "none", "Replicas that are wanted, updated to the newest template, and available. All three are equal after a rollout.")
                .query("wanted", r#"sum(kube_deployment_spec_replicas{CLUSTER, deployment=~"$deployment"})"#)
                .query("updated", r#"sum(kube_deployment_status_replicas_updated{CLUSTER, deployment=~"$deployment"})"#)
                .query("available", r#"sum(kube_deployment_status_replicas_available{CLUSTER, deployment=~"$deployment"})"#)
                .runbook("ChatServiceRolloutStuck")
                .runbook("ChatServiceReplicasUnavailable")
                .needs("kube-state-metrics")
                .width(8),
            lines("Autoscaler", "none", "Replicas that the HorizontalPodAutoscaler runs and wants, and its limits. At the upper limit more load increases latency.")
                .query("running", r#"sum(kube_horizontalpodautoscaler_status_current_replicas{CLUSTER, horizontalpodautoscaler=~"$deployment"})"#)
                .query("wanted", r#"sum(kube_horizontalpodautoscaler_status_desired_replicas{CLUSTER, horizontalpodautoscaler=~"$deployment"})"#)
                .query("most", r#"sum(kube_horizontalpodautoscaler_spec_max_replicas{CLUSTER, horizontalpodautoscaler=~"$deployment"})"#)
                .query("least", r#"sum(kube_horizontalpodautoscaler_spec_min_replicas{CLUSTER, horizontalpodautoscaler=~"$deployment"})"#)
                .runbook("ChatServiceHpaAtLimit")
                .needs("kube-state-metrics, and `autoscaling.enabled`")
                .width(8),
            lines("Migration Job", "none", "Running, succeeded and failed pods of the migration Job. Kubernetes deletes the Job some minutes after it has finished.")
                .query("running {{job_name}}", r#"sum by (job_name) (kube_job_status_active{CLUSTER, job_name=~".+-migrate-[0-9a-f]{8}"})"#)
                .query("succeeded {{job_name}}", r#"sum by (job_name) (kube_job_status_succeeded{CLUSTER, job_name=~".+-migrate-[0-9a-f]{8}"})"#)
                .query("failed {{job_name}}", r#"sum by (job_name) (kube_job_status_failed{CLUSTER, job_name=~".+-migrate-[0-9a-f]{8}"})"#)
                .runbook("ChatServiceMigrationFailed")
                .needs("kube-state-metrics")
                .width(8),
            lines("Process starts", "none", "How often the replica's process restarted in the last ten minutes, by its start time.")
                .query("{{pod}}", "sum by (pod) (changes(process_start_time_seconds{OURS}[10m]))")
                .from(3.0, "red")
                .width(8),
            lines("Container restarts", "none", "How often the kubelet restarted the container in the last ten minutes.")
                .query("{{pod}}", concat!("sum by (pod) (increase(", pods!("kube_pod_container_status_restarts_total"), "}[10m]))"))
                .from(3.0, "red")
                .runbook("ChatServiceCrashLooping")
                .needs("kube-state-metrics")
                .width(8),
            stack("Waiting and terminated containers", "none", "Containers by the reason why they wait, such as CrashLoopBackOff, or last terminated, such as OOMKilled.")
                .query("waiting: {{reason}}", concat!("sum by (reason) (", pods!("kube_pod_container_status_waiting_reason"), "})"))
                .query("ended: {{reason}}", concat!("sum by (reason) (", pods!("kube_pod_container_status_last_terminated_reason"), "})"))
                .needs("kube-state-metrics, and has data only after a failure")
                .width(8),
        ],
    }
}

fn process() -> Row {
    Row {
        title: "Process",
        answers: "Which resources does a replica use?",
        panels: vec![
            lines(
                "CPU",
                "none",
                "Cores in use. A login costs 15 ms of CPU, by design; any other request tens of microseconds.",
            )
            .query("{{pod}}", "sum by (pod) (rate(process_cpu_seconds_total{OURS}[$__rate_interval]))")
            .width(8),
            lines(
                "Resident memory",
                "bytes",
                "Resident set of the process. Each password that is being hashed takes 19 MiB.",
            )
            .query("{{pod}}", "sum by (pod) (process_resident_memory_bytes{OURS})")
            .width(8),
            lines("File descriptors", "none", "Open files and connections. Each client connection takes one.")
                .query("{{pod}}", "sum by (pod) (process_open_fds{OURS})")
                .width(8),
            lines(
                "Password queue",
                "none",
                "Passwords that are being hashed or wait for it. Above the capacity, logins and registrations get 503.",
            )
            .query("{{pod}}", "sum by (pod) (chat_password_queue_depth{OURS})")
            .query("capacity of one replica", "max(chat_password_queue_capacity{OURS})")
            .runbook("ChatServicePasswordQueueFilling")
            .width(8),
            lines(
                "Threads",
                "none",
                "Threads of the process: the runtimes (one per core, eight at most), one per core for hashing, and a few more.",
            )
            .query("{{pod}}", "sum by (pod) (process_threads{OURS})")
            .width(8),
            lines("Uptime", "s", "Age of the process. A drop to 0 is a restart.")
                .query("{{pod}}", "max by (pod) (time() - process_start_time_seconds{OURS})")
                .width(8),
        ],
    }
}

fn container() -> Row {
    Row {
        title: "Container",
        answers: "Are the resource requests and limits right?",
        panels: vec![
            lines("Memory utilization", "percentunit", "Working set as a share of the limit. At 100 % the kernel kills the container.")
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
            lines("CPU utilization", "percentunit", "Cores in use as a share of the request. The autoscaler scales on this.")
                .query(
                    "{{pod}}",
                    concat!(
                        "sum by (pod) (rate(", pods!("container_cpu_usage_seconds_total"), r#", container!="", container!="POD"}[$__rate_interval]))
                        / sum by (pod) ("#, pods!("kube_pod_container_resource_requests"), r#", resource="cpu"})"#
                    ),
                )
                .needs("cAdvisor's metrics and kube-state-metrics")
                .width(8),
            lines("CPU throttling", "percentunit", "Share of the scheduler's periods in which a CPU limit throttled the container. The chart sets no CPU limit.")
                .query(
                    "{{pod}}",
                    concat!(
                        "sum by (pod) (rate(", pods!("container_cpu_cfs_throttled_periods_total"), r#"}[$__rate_interval]))
                        / sum by (pod) (rate("#, pods!("container_cpu_cfs_periods_total"), "}[$__rate_interval]))"
                    ),
                )
                .max(1.0)
                .from(0.25, "red")
                .needs("cAdvisor's metrics, and a CPU limit")
                .width(8),
        ],
    }
}

fn telemetry() -> Row {
    Row {
        title: "Telemetry",
        answers: "Are these dashboards reliable: are metrics scraped and traces exported?",
        panels: vec![
            states("Scraped", "Whether Prometheus reaches the replica's operations port. A replica that is not scraped is missing in every other panel.")
                .query("{{pod}}", "max by (pod) (up{OURS})")
                .zero_one("not scraped", "scraped")
                .runbook("ChatServiceReplicaDown")
                .width(8),
            lines("Scrape duration", "s", "How long the replica takes to export its metrics.")
                .query("{{pod}}", "max by (pod) (scrape_duration_seconds{OURS})")
                .from(1.0, "red")
                .width(8),
            lines("Samples per scrape", "none", "Number of series of a replica. It must not grow with users or paths; if it does, a label is wrong.")
                .query("{{pod}}", "max by (pod) (scrape_samples_scraped{OURS})")
                .width(8),
            lines("Trace spans", "ops", "Spans per second that ended, were exported, or could not be exported. All are 0 without a configured collector.")
                .query("{{outcome}}", "sum by (outcome) (rate(chat_trace_spans_total{OURS}[$__rate_interval]))"),
            lines("Lost trace spans", "percentunit", "Share of the spans of the last ten minutes that did not reach the collector: the export failed, or the queue was full.")
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
