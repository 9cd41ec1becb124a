//! Migrations: many at once, and on a database of a newer release.

use std::collections::BTreeSet;

use chat_service::config::Config;
use chat_service::serve;
use chat_service::store::access::NEEDED;
use chat_service::store::migrations::{self, MigrationError};

use crate::support::{Database, FUTURE_MIGRATION, together};

#[tokio::test(flavor = "multi_thread")]
async fn fifty_concurrent_migrations_of_an_empty_database_all_succeed() {
    let database = Database::empty().await;
    let options = database.options();
    for round in ["empty", "migrated"] {
        for outcome in together((0..50).map(|_| migrations::migrate(&options))).await {
            assert_eq!(
                outcome.unwrap_or_else(|error| panic!("{round}: {error}")),
                migrations::known_version()
            );
        }
    }
    let applied: Vec<i64> =
        sqlx::query_scalar("SELECT version FROM _sqlx_migrations WHERE success ORDER BY version")
            .fetch_all(&mut database.connect().await)
            .await
            .expect("the migrations are recorded");
    assert_eq!(applied, (1..=migrations::known_version()).collect::<Vec<_>>(), "each once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_newer_than_the_binary_is_refused_with_a_clear_line() {
    let database = Database::migrated().await;
    database.execute(FUTURE_MIGRATION).await;
    let error = migrations::migrate(&database.options()).await.expect_err("a newer schema");
    assert!(matches!(error, MigrationError::DatabaseIsNewer { applied: 9999, .. }), "{error:?}");
    let line = error.to_string();
    for word in ["version 9999", "newer than this binary", &migrations::known_version().to_string()] {
        assert!(line.contains(word), "{line}");
    }
    assert!(!line.contains('\n'), "{line}");
    // A service does not start on it either.
    let variables =
        [("DATABASE_URL", database.url()), ("HOST", "127.0.0.1"), ("PORT", "0"), ("OPS_PORT", "0")];
    let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    rustls::crypto::aws_lc_rs::default_provider().install_default().ok();
    let started = serve::start(Config::from_variables(&variables).expect("a valid configuration")).await;
    assert_eq!(started.expect_err("refused").to_string(), line);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_old_addresses_that_are_one_now_both_stay() {
    let database = Database::migrated().await;
    // Their keys as older releases made them.
    for (number, (email, key)) in [
        ("ΑΣ@example.com", "ας@example.com"),
        ("ασ@Example.com", "ασ@example.com"),
        ("Ü@x.example", "ü@x.example"),
    ]
    .into_iter()
    .enumerate()
    {
        let id = format!("00000000-0000-7000-8000-00000000000{number}");
        let columns = "id, username, username_key, email, email_key, password_hash";
        let row = format!("'{id}', 'u{number}', 'u{number}', '{email}', '{key}', 'hash'");
        database.execute(&format!("INSERT INTO users ({columns}) VALUES ({row})")).await;
    }
    // Twice: the second time finds nothing to do.
    for _ in 0..2 {
        migrations::migrate(&database.options()).await.expect("users that collide do not stop it");
        let keys: Vec<(String, String)> = sqlx::query_as("SELECT email, email_key FROM users ORDER BY id")
            .fetch_all(&mut database.connect().await)
            .await
            .expect("users");
        let keys: Vec<_> = keys.iter().map(|(email, key)| (email.as_str(), key.as_str())).collect();
        assert_eq!(
            keys,
            [
                ("ΑΣ@example.com", "ας@example.com"),
                ("ασ@Example.com", "ασ@example.com"),
                ("Ü@x.example", "ü@x.example")
            ]
        );
    }
    database.execute("DELETE FROM users WHERE username = 'u1'").await;
    migrations::migrate(&database.options()).await.expect("migrated");
    let key: String = sqlx::query_scalar("SELECT email_key FROM users WHERE username = 'u0'")
        .fetch_one(&mut database.connect().await)
        .await
        .expect("a user");
    assert_eq!(key, "ασ@example.com");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_was_edited_after_it_was_applied_is_refused() {
    let database = Database::migrated().await;
    database.execute("UPDATE _sqlx_migrations SET checksum = 'x' WHERE version = 2").await;
    let error = migrations::migrate(&database.options()).await.expect_err("another checksum");
    assert!(matches!(error, MigrationError::Edited(2)), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_privileges_that_are_asked_for_name_every_table() {
    let tables: Vec<String> =
        sqlx::query_scalar("SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'S', 'v')")
            .fetch_all(&mut Database::migrated().await.connect().await)
            .await
            .expect("the tables");
    let named: BTreeSet<&str> = NEEDED.iter().map(|(table, _)| *table).collect();
    assert_eq!(tables.iter().map(String::as_str).collect::<BTreeSet<_>>(), named);
}
