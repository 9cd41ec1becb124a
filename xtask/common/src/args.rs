//! The arguments of the commands that are crates of their own. With these, the front door shows their help, completes
//! them and refuses wrong arguments before it builds the crate.

use std::path::PathBuf;

use clap::ValueEnum;

#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  cargo xtask bench                        all of it, about fifteen minutes on a quiet machine
  cargo xtask bench --only send,messages   two of the measurements
  cargo xtask bench --only send --rounds 3 --seconds 2 --json")]
pub struct Bench {
    /// Only these: send, messages, tracing, login, storm, startup, memory, connections, replicas, conversations, stream, reconnect, reads, depth
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Measure this build instead of a fresh one, to compare two
    #[arg(long, value_name = "PATH")]
    pub binary: Option<PathBuf>,
    /// Print JSON instead of the table
    #[arg(long)]
    pub json: bool,
    /// Rounds of each pair
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=50))]
    pub rounds: u32,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=120))]
    pub seconds: u64,
}

impl Bench {
    pub fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == name)
    }
}

#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  cargo xtask soak                     ten minutes of faults, each answer checked
  cargo xtask soak --minutes 60        an hour
  cargo xtask soak --redis cluster     the same with a Redis cluster, whose nodes fail over
  cargo xtask soak --seed 42           the choices of an earlier run
  cargo xtask soak --self-check --only skip-wait    one broken build")]
pub struct Soak {
    /// For how long faults are injected
    #[arg(long, default_value_t = 10.0, value_name = "N", value_parser = minutes)]
    pub minutes: f64,
    /// Which deployment of Redis
    #[arg(long, default_value = "single")]
    pub redis: RedisMode,
    /// The same choices as in an earlier run; how they interleave differs
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// Check this build instead of a fresh one
    #[arg(long, value_name = "PATH")]
    pub binary: Option<PathBuf>,
    /// Check the history checker: it has to find the fault of each broken build
    #[arg(long, conflicts_with_all = ["minutes", "binary", "memory", "redis"])]
    pub self_check: bool,
    /// With --self-check: only the builds that are broken in this way
    #[arg(long, value_name = "NAME", requires = "self_check")]
    pub only: Option<String>,
    /// Instead: check that more load than the queues hold, on a slow Postgres, ends in 503s
    #[arg(long, conflicts_with = "redis")]
    pub memory: bool,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum RedisMode {
    Single,
    Sentinel,
    Cluster,
}

fn minutes(text: &str) -> Result<f64, String> {
    let minutes: f64 = text.parse().map_err(|_| "not a number of minutes".to_owned())?;
    if (0.1..=1440.0).contains(&minutes) { Ok(minutes) } else { Err("choose 0.1 to 1440 minutes".to_owned()) }
}

#[derive(clap::Args, Debug, Default)]
#[command(after_help = "Examples:
  cargo xtask drill                                   every alert: about five minutes
  cargo xtask drill ChatServicePostgresDown --keep    one, and then look at its Prometheus
  cargo xtask drill --list                            which fault fires which alert")]
pub struct Drill {
    /// Only the drill of this alert
    pub alert: Option<String>,
    /// List every alert with its fault, and start nothing
    #[arg(long)]
    pub list: bool,
    /// At the end, leave everything running until Ctrl-C
    #[arg(long)]
    pub keep: bool,
}

#[derive(clap::Args, Debug, Default)]
#[command(after_help = "Examples:
  cargo xtask e2e                      all of it, on a kind cluster of its own
  cargo xtask e2e --only upgrade --keep    one check, and the cluster stays
  cargo xtask e2e --same-image         after a change of the chart alone")]
pub struct E2e {
    /// The node image of a new cluster, as of `cargo xtask kind up`
    #[arg(long, value_name = "NAME|build")]
    pub node_image: Option<String>,
    /// Keep the cluster and the release
    #[arg(long)]
    pub keep: bool,
    /// Use the image of the last run instead of building one
    #[arg(long)]
    pub same_image: bool,
    /// Only the checks with this in their name; the installation always comes first
    #[arg(long, value_name = "NAME")]
    pub only: Option<String>,
}

#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  cargo xtask dashboards               after a change in xtask/measure/src/dashboards: write the JSON files
  cargo xtask dashboards --check http://127.0.0.1:9090")]
pub struct Dashboards {
    /// Instead of writing the files, ask this Prometheus every panel's query and list those without data
    #[arg(long, value_name = "URL")]
    pub check: Option<String>,
    /// With --check: how far to look back, in seconds
    #[arg(long, default_value_t = 900, value_name = "N", requires = "check")]
    pub seconds: u64,
    /// With --check: the namespace, as a regular expression
    #[arg(long, default_value = ".*", value_name = "RE", requires = "check")]
    pub namespace: String,
    /// With --check: also the panels that need more than the service's own metrics
    #[arg(long, requires = "check")]
    pub cluster: bool,
}
