//! A database for one test, copied from a template that is migrated once per run.

use std::str::FromStr as _;
use std::sync::atomic::{AtomicU32, Ordering};

use chat_service::store::migrations;
use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::sync::OnceCell;

use super::{given, now_seconds};

/// A run drops what killed runs left behind this long ago.
const LEFTOVER_SECONDS: u64 = 3600;

/// Makes a database look as if a newer release had migrated it.
pub(crate) const FUTURE_MIGRATION: &str = "
    INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
    VALUES (9999, 'of the future', true, '\\x00', 0)";

static TEMPLATE: OnceCell<String> = OnceCell::const_new();
static NEXT: AtomicU32 = AtomicU32::new(0);

#[derive(Debug)]
pub(crate) struct Database {
    name: String,
    url: String,
}

impl Database {
    /// A database with the current schema.
    pub(crate) async fn migrated() -> Self {
        let template = TEMPLATE.get_or_init(template).await;
        Self::create(&format!("TEMPLATE {template}")).await
    }

    /// A database without any schema.
    pub(crate) async fn empty() -> Self {
        Self::create("").await
    }

    async fn create(clause: &str) -> Self {
        let name = next_name();
        execute(&mut admin().await, format!("CREATE DATABASE {name} {clause}")).await;
        Self { url: url_of(&name), name }
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    pub(crate) fn options(&self) -> PgConnectOptions {
        PgConnectOptions::from_str(&self.url).expect("a URL of Postgres")
    }

    /// A connection for the test itself.
    pub(crate) async fn connect(&self) -> PgConnection {
        PgConnection::connect_with(&self.options()).await.expect("the test's database answers")
    }

    /// Locks a table until the lock is released: `conversations IN EXCLUSIVE MODE`.
    pub(crate) async fn lock(&self, table: &str) -> TableLock {
        let mut connection = self.connect().await;
        execute(&mut connection, format!("BEGIN; LOCK TABLE {table}")).await;
        TableLock(connection)
    }

    /// A number.
    pub(crate) async fn count(&self, sql: &str) -> i64 {
        sqlx::query_scalar(sqlx::AssertSqlSafe(sql))
            .fetch_one(&mut self.connect().await)
            .await
            .expect("a number")
    }

    pub(crate) async fn execute(&self, sql: &str) {
        execute(&mut self.connect().await, sql.to_owned()).await;
    }
}

/// A transaction that holds the lock of a table.
#[derive(Debug)]
pub(crate) struct TableLock(PgConnection);

impl TableLock {
    pub(crate) async fn release(mut self) {
        execute(&mut self.0, "ROLLBACK".to_owned()).await;
    }
}

impl Drop for Database {
    /// On another thread, because the test's runtime is blocked by this drop.
    fn drop(&mut self) {
        let name = std::mem::take(&mut self.name);
        let dropped = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async { drop_database(&mut admin().await, &name).await });
        });
        dropped.join().ok();
    }
}

async fn template() -> String {
    let mut admin = admin().await;
    drop_leftovers(&mut admin).await;
    let name = next_name();
    execute(&mut admin, format!("CREATE DATABASE {name}")).await;
    let options = PgConnectOptions::from_str(&url_of(&name)).expect("a URL of Postgres");
    migrations::migrate(&options).await.expect("an empty database can be migrated");
    name
}

/// The name has the time, so that later runs recognise leftovers.
fn next_name() -> String {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("it_{}_{}_{number}", now_seconds(), std::process::id())
}

async fn drop_leftovers(admin: &mut PgConnection) {
    let names: Vec<String> =
        sqlx::query_scalar("SELECT datname::text FROM pg_database WHERE datname ~ '^it_[0-9]+_'")
            .fetch_all(&mut *admin)
            .await
            .expect("Postgres lists its databases");
    for name in names {
        let created = name.split('_').nth(1).and_then(|seconds| seconds.parse::<u64>().ok());
        if created.is_some_and(|created| created + LEFTOVER_SECONDS < now_seconds()) {
            drop_database(admin, &name).await;
        }
    }
}

async fn drop_database(admin: &mut PgConnection, name: &str) {
    let sql = format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)");
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(admin).await.ok();
}

async fn admin() -> PgConnection {
    let url = given("TEST_DATABASE_URL");
    PgConnection::connect(&url).await.unwrap_or_else(|error| panic!("Postgres at TEST_DATABASE_URL: {error}"))
}

async fn execute(connection: &mut PgConnection, sql: String) {
    let done = sqlx::raw_sql(AssertSqlSafe(sql.clone())).execute(connection).await;
    done.unwrap_or_else(|error| panic!("{sql}: {error}"));
}

/// The admin's URL with another database in it.
fn url_of(name: &str) -> String {
    let url = given("TEST_DATABASE_URL");
    let (url, query) =
        url.split_once('?').map_or((url.as_str(), String::new()), |(url, query)| (url, format!("?{query}")));
    let server = url.rsplit_once('/').map(|(server, _)| server).expect("a URL with a database");
    format!("{server}/{name}{query}")
}
