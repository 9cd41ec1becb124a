//! Whether the release before and this one both work while the schema changes under them: tried, with requests on the
//! way.
//!
//! With a release tag behind this commit, its binary is built (once per tag, and only when there are migrations since),
//! serves on its own schema, and goes on serving while this binary migrates and comes up beside it: every answer has to
//! be a success. Before the first release nothing older has to go on serving: this binary waits on the schema without
//! the newest migration, live and unready, and has to become ready without a restart. In both cases the statements that
//! were committed before the newest migrations have to be accepted by Postgres after them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use common::conversation::{self, Pair};
use common::migrations::Script;
use common::steps::Progress;
use common::{git, workspace};
use harness::http::Client;
use harness::servers::daemon;
use harness::{Postgres, Redis, Replica, Scratch, places};
use serde_json::Value;

const DATABASE: &str = "migrate_check";
/// Has all migrations applied by the binary; the bookkeeping is copied from it.
const REFERENCE: &str = "migrate_reference";

/// A request that took longer waited for a lock. The tables are small here: in production it would wait for minutes.
const SLOWEST: Duration = Duration::from_secs(3);
const PAIRS: usize = 4;
const PAUSE: Duration = Duration::from_millis(2);

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
        let first = self.start(old, "old")?;
        first.await_ready()?;
        succeeds(&first, "the old binary, while the schema changed,", || {
            change()?;
            let Some(new) = new else { return Ok(()) };
            let second = self.start(new, "new")?;
            second.await_ready()?;
            succeeds(&second, "the new binary", || Ok(())).map(drop)
        })
    }

    /// The binary waits for the schema, live, and serves as soon as it is there.
    fn wait_through(&self, binary: &Path, change: impl FnOnce() -> Result<()>) -> Result<()> {
        let replica = self.start(binary, "new")?;
        replica.await_health(503, "unavailable").context("on the schema without the newest migration")?;
        let over = AtomicBool::new(false);
        // It has to be live all the time.
        let asked = thread::scope(|scope| {
            let probe = scope.spawn(|| -> Result<u64> {
                let (mut client, mut count) = (Client::new(replica.operations), 0);
                while !over.load(Ordering::Relaxed) {
                    client.expect(200, "GET", "/livez", None, "").context("while it migrated")?;
                    count += 1;
                    thread::sleep(Duration::from_millis(5));
                }
                Ok(count)
            });
            let ready = change()
                .and_then(|()| replica.await_ready().context("after the migration, without a restart"));
            over.store(true, Ordering::Relaxed);
            let asked = probe.join().expect("no panic")?;
            ready.map(|()| asked)
        })?;
        ensure!(asked > 0, "/livez was not asked");
        succeeds(&replica, "after the migration, the binary", || Ok(())).map(drop)
    }

    fn start(&self, binary: &Path, name: &str) -> Result<Replica> {
        let environment = [
            ("DATABASE_URL", self.postgres.url(DATABASE)),
            ("REDIS_URL", self.redis.url(0)),
            ("MIGRATE_ON_START", "false".to_owned()),
        ];
        Replica::start(binary, self.dir.join(format!("{name}-{:08x}.log", fastrand::u32(..))), environment)
    }
}

/// Conversations go on while `work` is done, and none of their requests may fail or wait long. Returns the time of the
/// slowest answer.
fn succeeds(replica: &Replica, who: &str, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let pair = |_| Pair::new(replica.public, &format!("u{:08x}", fastrand::u32(..)));
    let mut pairs = (0..PAIRS).map(pair).collect::<Result<Vec<_>>>()?;
    let ((), report) = conversation::during(&mut pairs, replica.public, PAUSE, work)?;
    report.verdict().with_context(|| format!("{who} failed"))?;
    ensure!(
        report.slowest <= SLOWEST,
        "{who} took {:.1} s for an answer, more than {} s: what did the migration lock?",
        report.slowest.as_secs_f32(),
        SLOWEST.as_secs()
    );
    Ok(report.slowest)
}

#[cfg(test)]
mod tests {
    use common::migrations::{DIR, scripts};
    use harness::{PostgresOptions, RedisOptions, service_binary};

    use super::*;

    /// Checks the check: this binary serves as the old one while a script changes the schema under it.
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
