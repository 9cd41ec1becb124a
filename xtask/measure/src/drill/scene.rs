//! The service that the alerts of one lane watch: a Postgres, a Redis, two replicas of the service, each with its own proxy to
//! Postgres, a collector of traces, and clients that send and read.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::Result;
use common::prometheus::ScrapeJob;
use harness::http::Client;
use harness::{Postgres, PostgresOptions, Redis, RedisOptions, Replica, User};
use load::Script;
use serde_json::{Value, json};
use tests::proxy::{Link, Proxy};
use tokio::runtime::Runtime;

use super::collector::Collector;
use super::faults::Lane;
use crate::canary::Canary;

pub(super) const DATABASE: &str = "drill";
/// The chart's name of the Service behind its ServiceMonitor, so that `job` is as in a cluster.
const SERVICE: &str = "chat-chat-service-ops";
/// Of the canary.
const CANARY_SERVICE: &str = "chat-chat-service-canary";
const REPLICAS: usize = 2;
/// Clients per replica, and their pause between two requests: 40 requests a second and replica when all is well, and
/// some even when each takes a second.
const TALKERS: usize = 4;
const PAUSE: Duration = Duration::from_millis(100);
/// Between two sends of which a stream's mailbox holds all that come between two comparisons with Postgres. Where there are
/// more, the stream reads them itself, and their delay is not measured.
const SLOW_PAUSE: Duration = Duration::from_millis(500);
/// Clients per replica that come back at once when their stream is refused.
const LOOPS: usize = 6;
/// A crowd ends after this time, even if the drill fails.
const CROWD_LIMIT: Duration = Duration::from_secs(120);

pub(super) struct Scene {
    /// Also the namespace in the labels, which separates the lanes.
    pub(super) namespace: &'static str,
    pub(super) users: Vec<User>,
    pub(super) replicas: Vec<Replica>,
    /// The proxy of each replica.
    pub(super) to_postgres: Vec<Proxy>,
    pub(super) redis: Mutex<Redis>,
    pub(super) postgres: Mutex<Postgres>,
    /// Started by a fault, and stopped when it is healed.
    crowds: Mutex<Vec<Crowd>>,
    /// Streams that are opened again and again, also until the fault is healed.
    loops: Mutex<Option<Talkers>>,
    pub(super) collector: Collector,
    talkers: Mutex<Option<Talkers>>,
    followers: Option<Talkers>,
    /// Where its alerts are drilled.
    canary: Option<Canary>,
    _runtime: Runtime,
}

/// Connections that all wait for an answer, on one thread.
struct Crowd {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<load::Report>>,
}

/// Threads that repeat something until the value is dropped.
struct Talkers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Scene {
    pub(super) fn start(dir: &Path, binary: &Path, lane: Lane) -> Result<Self> {
        let dir = dir.join(lane.namespace());
        let collector = Collector::start()?;
        let more = lane.environment(collector.port);
        let postgres = Postgres::start(&dir.join("postgres"), PostgresOptions::fast())?;
        postgres.create_database(DATABASE)?;
        let redis = Redis::start(&dir.join("redis"), RedisOptions::default())?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (mut replicas, mut lines) = (Vec::new(), Vec::new());
        for number in 0..REPLICAS {
            let to_postgres = Proxy::start(runtime.handle(), postgres.port())?;
            let log = dir.join(format!("replica-{number}.log"));
            let (direct, line) = (format!(":{}/", postgres.port()), format!(":{}/", to_postgres.port()));
            let urls = [
                ("DATABASE_URL", postgres.url(DATABASE).replace(&direct, &line)),
                ("REDIS_URL", redis.url(0)),
            ];
            let environment = urls.into_iter().chain(more.iter().cloned());
            let replica = Replica::start(binary, log, environment)?;
            // The first one migrates.
            replica.await_ready()?;
            replicas.push(replica);
            lines.push(to_postgres);
        }
        let users = (0..4)
            .map(|number| User::register(replicas[0].public, &format!("user{number}")))
            .collect::<Result<Vec<_>>>()?;
        let address = replicas[0].public;
        let canary = (lane == Lane::Errors)
            .then(|| Canary::start(binary, &dir.join("canary.log"), address))
            .transpose()?;
        let mut scene = Self {
            namespace: lane.namespace(),
            users,
            replicas,
            to_postgres: lines,
            redis: Mutex::new(redis),
            postgres: Mutex::new(postgres),
            crowds: Mutex::default(),
            loops: Mutex::default(),
            collector,
            talkers: Mutex::default(),
            followers: None,
            canary,
            _runtime: runtime,
        };
        scene.talk();
        scene.followers = Some(scene.follow());
        Ok(scene)
    }

    /// The scrape job that the chart's ServiceMonitor would make: the Service's name as the job, the pod's as a label.
    pub(super) fn scrape_job(&self) -> ScrapeJob {
        let mut targets: Vec<Value> = self
            .replicas
            .iter()
            .enumerate()
            .map(|(number, replica)| {
                json!({
                    "targets": [replica.operations.to_string()],
                    "labels": {
                        "job": SERVICE,
                        "service": SERVICE,
                        "namespace": self.namespace,
                        "pod": format!("chat-chat-service-{number}"),
                        "container": "chat-service",
                        "endpoint": "ops",
                    },
                })
            })
            .collect();
        targets.extend(self.canary.iter().map(|canary| {
            json!({
            "targets": [canary.operations.to_string()],
            "labels": {
                "job": CANARY_SERVICE,
                "service": CANARY_SERVICE,
                "namespace": self.namespace,
                "pod": CANARY_SERVICE,
                "container": "canary",
                "endpoint": "ops",
            },
            })
        }));
        ScrapeJob(json!({"job_name": self.namespace, "static_configs": targets}))
    }

    /// Both replicas, ready again.
    pub(super) fn await_ready(&self) -> Result<()> {
        self.replicas.iter().try_for_each(Replica::await_ready)
    }

    pub(super) fn sql(&self, statements: &str) -> Result<()> {
        lock(&self.postgres).query(DATABASE, statements).map(drop)
    }

    pub(super) fn links_to_postgres(&self, link: Link) {
        self.to_postgres.iter().for_each(|to_postgres| to_postgres.set(link));
    }

    /// Runs a script on so many connections per replica, until the fault is healed.
    pub(super) fn crowd(&self, per_replica: usize, request: impl Fn(SocketAddr, &User, &User) -> Script) {
        let scripts = (0..per_replica * self.replicas.len())
            .map(|number| {
                let (from, to) = (number % self.users.len(), (number + 1) % self.users.len());
                let address = self.replicas[number % self.replicas.len()].public;
                request(address, &self.users[from], &self.users[to])
            })
            .collect();
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = thread::spawn(move || load::run_until(scripts, CROWD_LIMIT, &seen));
        lock(&self.crowds).push(Crowd { stop, thread });
    }

    /// More clients of the same user than may follow, which come back as soon as they are refused.
    pub(super) fn follow_in_a_loop(&self) {
        let token = self.users[1].token.clone();
        let follow = move |client: &mut Client, go_on: &dyn Fn() -> bool| drop(client.follow(&token, go_on));
        *lock(&self.loops) = Some(Talkers::start(&self.replicas, LOOPS, follow));
    }

    /// Stops the crowds.
    pub(super) fn disperse(&self) -> Result<()> {
        drop(lock(&self.loops).take());
        for crowd in std::mem::take(&mut *lock(&self.crowds)) {
            crowd.stop.store(true, Ordering::Relaxed);
            crowd.thread.join().expect("no panic")?;
        }
        Ok(())
    }

    /// A stream of the first user on each replica.
    fn follow(&self) -> Talkers {
        let token = self.users[0].token.clone();
        Talkers::start(&self.replicas, 1, move |client, go_on| {
            // It ends with its replica, and begins again.
            let _ = client.follow(&token, go_on);
            thread::sleep(PAUSE);
        })
    }

    /// From now on all replicas are talked to: a send and a read of the newest page, in turn.
    pub(super) fn talk(&self) {
        let users = self.users.clone();
        self.talk_to(&self.replicas, TALKERS, move |client, _| {
            let number = fastrand::usize(..users.len());
            let (from, to) = (&users[number], &users[(number + 1) % users.len()]);
            // Any answer will do: this makes traffic, which the service counts.
            let _ = client.ask("POST", "/send", Some(&from.token), &message(to));
            thread::sleep(PAUSE);
            let _ = client.ask("GET", &format!("/messages?peer_id={}", to.id), Some(&from.token), "");
            thread::sleep(PAUSE);
        });
    }

    /// From now on only the first replica is talked to, slowly: the other one's streams depend on announcements.
    pub(super) fn talk_to_one(&self) {
        let (from, to) = (self.users[1].clone(), self.users[0].clone());
        self.talk_to(&self.replicas[..1], 1, move |client, _| {
            let _ = client.ask("POST", "/send", Some(&from.token), &message(&to));
            thread::sleep(SLOW_PAUSE);
        });
    }

    fn talk_to(
        &self,
        replicas: &[Replica],
        per_replica: usize,
        work: impl Fn(&mut Client, &dyn Fn() -> bool) + Clone + Send + 'static,
    ) {
        let mut talking = lock(&self.talkers);
        drop(talking.take());
        *talking = Some(Talkers::start(replicas, per_replica, work));
    }
}

fn message(to: &User) -> String {
    json!({"recipient_id": to.id, "content": "Shall we meet at the station at seven?"}).to_string()
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = self.disperse();
        drop(lock(&self.talkers).take());
        self.followers = None;
    }
}

impl Talkers {
    fn start(
        replicas: &[Replica],
        per_replica: usize,
        work: impl Fn(&mut Client, &dyn Fn() -> bool) + Clone + Send + 'static,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = replicas
            .iter()
            .flat_map(|replica| std::iter::repeat_n(replica.public, per_replica))
            .map(|address| {
                let (stop, work) = (Arc::clone(&stop), work.clone());
                thread::spawn(move || {
                    let mut client = Client::new(address);
                    let go_on = || !stop.load(Ordering::Relaxed);
                    while go_on() {
                        work(&mut client, &go_on);
                        // A replica that refuses connections is not asked in a tight loop.
                        thread::sleep(Duration::from_millis(5));
                    }
                })
            })
            .collect();
        Self { stop, threads }
    }
}

impl Drop for Talkers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A panic there has been printed.
            let _ = thread.join();
        }
    }
}
