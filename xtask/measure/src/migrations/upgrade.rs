//! Whether the release before and this one both work while the schema changes under them: tried, with requests on the
//! way.
//!
//! With a release tag behind this commit, its binary is built (once per tag, and only when there are migrations since),
//! serves on its own schema, and goes on serving while this binary migrates and comes up beside it: every answer has to
//! be a success. Before the first release nothing older has to go on serving: this binary waits on the schema without
//! the newest migration, live and unready, and has to become ready without a restart. In both cases the statements that
//! were committed before the newest migrations have to be accepted by Postgres after them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use harness::http::Client;
use harness::servers::{daemon, ports};
use harness::{Postgres, Redis, Scratch, places};
use serde_json::{Value, json};

use common::migrations::Script;
use common::steps::Progress;
use common::{git, workspace};

const DATABASE: &str = "migrate_check";
/// Where all migrations are applied in the ordinary way, to take the bookkeeping from.
const REFERENCE: &str = "migrate_reference";

const START_LIMIT: Duration = Duration::from_secs(30);
const PATIENCE: Duration = Duration::from_secs(10);
/// How long requests flow before the migration, and after it.
const BEFORE: Duration = Duration::from_millis(700);
const AFTER: Duration = Duration::from_millis(1500);
/// A request that waited longer met a lock. The tables are small here: what takes so long, takes minutes elsewhere.
const SLOWEST: Duration = Duration::from_secs(3);
const CLIENTS: usize = 4;

pub(super) fn check(
    scripts: &[Script],
    postgres: &Postgres,
    redis: &Redis,
    progress: &Progress,
) -> Result<()> {
    let Some(newest) = scripts.last() else { return Ok(()) };
    let binary = places::target_dir()?.join("debug/chat-service");
    let release = git::last_release();
    let known = match &release {
        Some(tag) => known_at(tag, scripts),
        None => scripts.len() - 1,
    };
    if known == scripts.len() {
        let tag = release.unwrap_or_default();
        progress.note(&format!("no migration since {tag}: nothing to try"));
        return Ok(());
    }
    prepare(postgres, &binary, scripts, known)?;
    let scratch = Scratch::new("upgrade")?;
    let trial = Trial { postgres, redis, dir: scratch.path() };
    let migrate = || trial.migrate(&binary);
    match &release {
        Some(tag) => {
            let old = binary_of(tag, progress)?;
            let slowest = trial.serve_through(&old, migrate, Some(&binary))?;
            progress.note(&format!("{tag} served on; the slowest answer took {} ms", slowest.as_millis()));
        }
        None => {
            trial.wait_through(&binary, migrate)?;
            progress.note(&format!("no release yet: this binary waited for number {:04}", newest.version));
        }
    }
    let before = release.or_else(|| before(&scripts[known].file));
    let statements = before.map(|commit| statements_at(&commit)).unwrap_or_default();
    accepts(postgres, &statements)?;
    progress.note(&match statements.len() {
        0 => "no statement is older than it".to_owned(),
        count => format!("{count} statements of before are accepted after"),
    });
    Ok(())
}

/// How many of the scripts a release has.
fn known_at(tag: &str, scripts: &[Script]) -> usize {
    let is_known =
        |script: &&Script| git::ask(&["cat-file", "-e", &format!("{tag}:{}", script.file)]).is_some();
    scripts.iter().take_while(is_known).count()
}

/// The commit before the one that brought a script.
fn before(file: &str) -> Option<String> {
    let added = git::ask(&["log", "--diff-filter=A", "--format=%H", "--", file])?;
    match added.lines().last() {
        Some(commit) => git::ask(&["rev-parse", "--verify", &format!("{commit}^")]),
        // Not committed yet.
        None => git::ask(&["rev-parse", "--verify", "HEAD"]),
    }
}

/// The statements that a commit's `.sqlx` holds.
fn statements_at(commit: &str) -> Vec<String> {
    let files = git::ask(&["ls-tree", "--name-only", commit, ".sqlx/"]).unwrap_or_default();
    let statement = |file: &str| {
        let text = git::ask(&["show", &format!("{commit}:{file}")])?;
        let query: Value = serde_json::from_str(&text).ok()?;
        Some(query["query"].as_str()?.to_owned())
    };
    files.lines().filter_map(statement).collect()
}

/// Postgres parses each and finds its tables, columns and types.
fn accepts(postgres: &Postgres, statements: &[String]) -> Result<()> {
    for statement in statements {
        postgres.query(DATABASE, &format!("PREPARE old AS {statement}")).with_context(|| {
            format!("after the migration, Postgres refuses what the old binary says:\n{statement}")
        })?;
    }
    Ok(())
}

/// Makes the database as it was with the first `known` migrations, the bookkeeping included.
fn prepare(postgres: &Postgres, binary: &Path, scripts: &[Script], known: usize) -> Result<()> {
    for database in [DATABASE, REFERENCE] {
        postgres.query("postgres", &format!("DROP DATABASE IF EXISTS {database} WITH (FORCE)"))?;
        postgres.create_database(database)?;
    }
    migrate(binary, &postgres.url(REFERENCE))?;
    let newest = postgres.query(REFERENCE, "SELECT max(version) FROM _sqlx_migrations")?;
    let newest = newest.first().and_then(|row| row.first()?.clone()).unwrap_or_default();
    let expected = scripts.last().map_or(0, |script| script.version);
    ensure!(
        newest == expected.to_string(),
        "the binary knows migration {newest}, not {expected}: cargo build -p chat-service"
    );
    let table = "CREATE TABLE _sqlx_migrations (version bigint PRIMARY KEY, description text NOT NULL, installed_on \
                 timestamptz NOT NULL DEFAULT now(), success boolean NOT NULL, checksum bytea NOT NULL, execution_time \
                 bigint NOT NULL)";
    postgres.query(DATABASE, table)?;
    for script in &scripts[..known] {
        postgres.query(DATABASE, &script.sql).with_context(|| script.file.clone())?;
        let row = postgres.query(
            REFERENCE,
            &format!(
                "SELECT description, encode(checksum, 'hex') FROM _sqlx_migrations WHERE version = {}",
                script.version
            ),
        )?;
        let [Some(description), Some(checksum)] = row.first().map(Vec::as_slice).unwrap_or_default() else {
            bail!("{} was not built into the binary: cargo build -p chat-service", script.file);
        };
        postgres.query(
            DATABASE,
            &format!(
                "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
                 VALUES ({}, '{}', true, '\\x{checksum}', 0)",
                script.version,
                description.replace('\'', "''")
            ),
        )?;
    }
    Ok(())
}

fn migrate(binary: &Path, url: &str) -> Result<()> {
    let mut command = Command::new(binary);
    command.arg("migrate").env_clear().env("DATABASE_URL", url).current_dir("/");
    daemon::run_ok(command, Duration::from_secs(120)).map(drop)
}

/// The binary of a release, built once, beside this clone's own artefacts.
fn binary_of(tag: &str, progress: &Progress) -> Result<PathBuf> {
    let commit = git::ask(&["rev-parse", &format!("{tag}^{{commit}}")]).context("the tag's commit")?;
    let dir = places::target_dir()?.join("previous");
    let kept = dir.join(format!("chat-service-{commit}"));
    if kept.is_file() {
        return Ok(kept);
    }
    progress.say(&format!("building {tag}"));
    fs::create_dir_all(&dir)?;
    let sources = dir.join("sources");
    let _ = fs::remove_dir_all(&sources);
    let git = |args: &[&str]| {
        let mut command = Command::new("git");
        command.args(args).current_dir(workspace::root());
        command
    };
    progress.run(git(&["worktree", "prune"]))?;
    let mut add = git(&["worktree", "add", "--detach", "--force"]);
    add.arg(&sources).arg(&commit);
    progress.run(add)?;
    let mut build = workspace::offline_cargo(&["build", "--locked", "-p", "chat-service", "--target-dir"]);
    build.arg(dir.join("target")).current_dir(&sources).env_remove("CARGO_MANIFEST_DIR");
    progress.run(build).with_context(|| format!("build {tag}"))?;
    fs::copy(dir.join("target/debug/chat-service"), &kept)?;
    let mut remove = git(&["worktree", "remove", "--force"]);
    remove.arg(&sources);
    progress.run(remove)?;
    Ok(kept)
}

struct Trial<'a> {
    postgres: &'a Postgres,
    redis: &'a Redis,
    dir: &'a Path,
}

impl Trial<'_> {
    fn migrate(&self, binary: &Path) -> Result<()> {
        migrate(binary, &self.postgres.url(DATABASE))
    }

    /// The old binary answers everything while the schema changes, and the new one beside it then. Returns the time of
    /// the slowest answer.
    fn serve_through(
        &self,
        old: &Path,
        change: impl FnOnce() -> Result<()>,
        new: Option<&Path>,
    ) -> Result<Duration> {
        let first = Server::start(old, self, "old")?;
        first.becomes(200)?;
        let load = Load::start(first.public)?;
        thread::sleep(BEFORE);
        change()?;
        let second = new.map(|new| Server::start(new, self, "new")).transpose()?;
        if let Some(second) = &second {
            second.becomes(200)?;
            Load::start(second.public)?.succeeded("the new binary", AFTER)?;
        }
        load.succeeded("the old binary, while the schema changed,", AFTER)
    }

    /// The binary waits for the schema, live, and serves as soon as it is there.
    fn wait_through(&self, binary: &Path, change: impl FnOnce() -> Result<()>) -> Result<()> {
        let server = Server::start(binary, self, "new")?;
        server.becomes(503).context("on the schema without the newest migration")?;
        // Live all the while, whoever asks for what.
        let stop = Arc::new(AtomicBool::new(false));
        let (asked, operations) = (Arc::clone(&stop), server.operations);
        let live = thread::spawn(move || -> Result<u64> {
            let (mut client, mut count) = (Client::new(operations), 0);
            while !asked.load(Ordering::Relaxed) {
                let answer = client.request("GET", "/livez", &[], "", PATIENCE);
                let status = answer.map_err(|lost| anyhow::anyhow!("/livez: {}", lost.reason()))?.status;
                ensure!(status == 200, "/livez answered {status} while it migrated");
                count += 1;
                thread::sleep(Duration::from_millis(5));
            }
            Ok(count)
        });
        let changed = change();
        let ready =
            changed.and_then(|()| server.becomes(200).context("after the migration, without a restart"));
        stop.store(true, Ordering::Relaxed);
        let asked = live.join().map_err(|_| anyhow::anyhow!("the prober panicked"))?;
        ready?;
        ensure!(asked? > 0, "nobody asked whether it lives");
        Load::start(server.public)?.succeeded("after the migration, the binary", BEFORE).map(drop)
    }
}

/// A process of the service; dropping it ends it.
struct Server {
    child: Child,
    public: SocketAddr,
    operations: SocketAddr,
    log: PathBuf,
}

impl Server {
    fn start(binary: &Path, trial: &Trial<'_>, name: &str) -> Result<Self> {
        let (port, operations) = (ports::free()?, ports::free()?);
        let log = trial.dir.join(format!("{name}-{port}.log"));
        let mut serve = daemon::dies_with_us(binary, "KILL");
        serve.arg("serve").env_clear().current_dir(trial.dir).stdin(Stdio::null());
        serve.env("DATABASE_URL", trial.postgres.url(DATABASE)).env("REDIS_URL", trial.redis.url(0));
        serve.env("HOST", "127.0.0.1").env("PORT", port.to_string()).env("OPS_PORT", operations.to_string());
        serve.env("MIGRATE_ON_START", "false").env("SECRET_KEY", "of-the-check-alone-and-long-enough-for-it");
        for limit in ["LOGIN", "SEND", "REGISTER"] {
            serve.env(format!("{limit}_RATE_LIMIT_PER_MINUTE"), "0");
        }
        let output = File::create(&log)?;
        serve.stdout(output.try_clone()?).stderr(output);
        let child = daemon::spawn(serve).with_context(|| format!("start {}", binary.display()))?;
        let local = |port| SocketAddr::from(([127, 0, 0, 1], port));
        Ok(Self { child, public: local(port), operations: local(operations), log })
    }

    /// Waits until readiness has this status.
    fn becomes(&self, status: u16) -> Result<()> {
        let mut client = Client::new(self.public);
        let answers = daemon::poll(START_LIMIT, || {
            let answer = client.request("GET", "/healthz", &[], "", PATIENCE);
            Ok(answer.ok().filter(|answer| answer.status == status))
        })?;
        let said = || daemon::tail(&fs::read_to_string(&self.log).unwrap_or_default(), 12);
        answers.map(drop).with_context(|| {
            format!("/healthz was not {status} within {} s:\n{}", START_LIMIT.as_secs(), said())
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Pairs of users who write to each other and read what they wrote, over and over.
struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Tried>>,
}

#[derive(Debug, Default)]
struct Tried {
    succeeded: u64,
    slowest: Duration,
    /// What else came, with how often.
    failures: BTreeMap<String, u64>,
}

impl Load {
    fn start(address: SocketAddr) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let clients = (0..CLIENTS)
            .map(|_| {
                let mut pair = Pair::register(address)?;
                let stop = Arc::clone(&stop);
                Ok(thread::spawn(move || pair.talk(&stop)))
            })
            .collect::<Result<_>>()?;
        Ok(Self { stop, clients })
    }

    /// Lets it go on for so long, ends it, and returns the time of the slowest answer, if all of them were successes.
    fn succeeded(self, who: &str, more: Duration) -> Result<Duration> {
        thread::sleep(more);
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Tried::default();
        for client in self.clients {
            let tried = client.join().map_err(|_| anyhow::anyhow!("a client panicked"))?;
            all.succeeded += tried.succeeded;
            all.slowest = all.slowest.max(tried.slowest);
            for (what, count) in tried.failures {
                *all.failures.entry(what).or_default() += count;
            }
        }
        ensure!(
            all.failures.is_empty(),
            "{who} failed: {:?}, and succeeded {} times",
            all.failures,
            all.succeeded
        );
        ensure!(all.succeeded > 0, "{who} answered nothing");
        ensure!(
            all.slowest <= SLOWEST,
            "{who} took {:.1} s for an answer, more than {} s: what did the migration lock?",
            all.slowest.as_secs_f32(),
            SLOWEST.as_secs()
        );
        Ok(all.slowest)
    }
}

struct Pair {
    client: Client,
    token: String,
    peer: String,
}

impl Pair {
    fn register(address: SocketAddr) -> Result<Self> {
        let mut client = Client::new(address);
        let mut post = |path: &str, body: Value, status: u16| -> Result<Value> {
            let answer = client.request("POST", path, &[], &body.to_string(), PATIENCE);
            let answer = answer.map_err(|lost| anyhow::anyhow!("{path}: {}", lost.reason()))?;
            let text = String::from_utf8_lossy(&answer.body).into_owned();
            ensure!(answer.status == status, "{path} answered {}: {text}", answer.status);
            serde_json::from_str(&text).with_context(|| text.clone())
        };
        let mut user = |name: &str| {
            let email = format!("{name}@example.com");
            post("/register", json!({"username": name, "email": email, "password": "correct horse"}), 201)
        };
        let name = format!("u{:x}", fastrand_u64()?);
        user(&name)?;
        let peer = user(&format!("{name}p"))?["id"].as_str().context("an id")?.to_owned();
        let login = post("/login", json!({"username": name, "password": "correct horse"}), 200)?;
        let token = login["access_token"].as_str().context("a token")?.to_owned();
        Ok(Self { client, token, peer })
    }

    fn talk(&mut self, stop: &AtomicBool) -> Tried {
        let mut tried = Tried::default();
        let authorization = format!("Bearer {}", self.token);
        let headers = [("authorization", authorization.as_str())];
        let body = json!({"recipient_id": self.peer, "content": "while it migrates"}).to_string();
        // Beyond the window of the cache, so that Postgres is asked.
        let read = format!("/messages?peer_id={}&before=1000000&limit=3", self.peer);
        while !stop.load(Ordering::Relaxed) {
            for (method, path, body, status) in
                [("POST", "/send", body.as_str(), 201), ("GET", &read, "", 200)]
            {
                let started = Instant::now();
                let answer = self.client.request(method, path, &headers, body, PATIENCE);
                tried.slowest = tried.slowest.max(started.elapsed());
                match answer {
                    Ok(answer) if answer.status == status => tried.succeeded += 1,
                    Ok(answer) => {
                        *tried.failures.entry(format!("{path:.9} {}", answer.status)).or_default() += 1
                    }
                    Err(lost) => {
                        *tried.failures.entry(format!("{path:.9} {}", lost.reason())).or_default() += 1
                    }
                }
            }
            thread::sleep(Duration::from_millis(2));
        }
        tried
    }
}

/// A name that nobody has.
fn fastrand_u64() -> Result<u64> {
    let mut bytes = [0_u8; 8];
    std::io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use common::migrations::{DIR, scripts};
    use harness::{PostgresOptions, RedisOptions, service_binary};

    use super::*;

    /// The checker checked: this binary serves as the old one while a script changes the schema under it.
    #[test]
    fn a_migration_that_breaks_the_serving_binary_is_caught_and_one_that_adds_is_not() {
        let scratch = Scratch::new("upgrade-test").expect("a directory");
        let start = PostgresOptions::fast();
        let postgres = Postgres::start(&scratch.path().join("postgres"), start).expect("Postgres");
        let redis = Redis::start(&scratch.path().join("redis"), RedisOptions::default()).expect("Redis");
        let binary = service_binary().expect("the service");
        let trial = Trial { postgres: &postgres, redis: &redis, dir: scratch.path() };
        let scripts = scripts(&workspace::root().join(DIR)).expect("scripts");
        let verdict = |sql: &str| {
            prepare(&postgres, &binary, &scripts, scripts.len()).expect("a database");
            trial.serve_through(&binary, || postgres.query(DATABASE, sql).map(drop), None)
        };
        verdict("ALTER TABLE messages ADD COLUMN note text").expect("harmless");
        let renamed = verdict("ALTER TABLE messages RENAME COLUMN content TO body").expect_err("it breaks");
        assert!(format!("{renamed:#}").contains("/send"), "{renamed:#}");
        let statement = "SELECT content FROM messages WHERE seq = $1".to_owned();
        let refused = accepts(&postgres, std::slice::from_ref(&statement)).expect_err("the column is gone");
        assert!(format!("{refused:#}").contains(&statement), "{refused:#}");
        let locked = "BEGIN; LOCK TABLE messages IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep(4); COMMIT";
        verdict(locked).expect_err("requests wait for the lock");
        let mut more = scripts.clone();
        more.push(Script { version: 9999, ..scripts[0].clone() });
        let unknown = prepare(&postgres, &binary, &more, scripts.len()).expect_err("it is not in the binary");
        assert!(format!("{unknown:#}").contains("not 9999"), "{unknown:#}");
        // And the wait for the newest migration, which is what the check does before the first release.
        prepare(&postgres, &binary, &scripts, scripts.len() - 1).expect("a database");
        trial.wait_through(&binary, || trial.migrate(&binary)).expect("it waits");
    }
}
