//! TLS to Postgres and Redis, with certificates that the tests make.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use tests::servers::{daemon, ports, programs};
use tests::{Postgres, PostgresOptions, Redis, RedisOptions, Scratch};

use super::support::{Database, Start};

/// A certificate for the loopback address that is its own authority.
pub(super) struct Certificate {
    pub(super) file: PathBuf,
    certificate: String,
    key: String,
}

pub(super) fn certificate(scratch: &Scratch) -> Result<Certificate> {
    let openssl = programs::in_path("openssl").context("openssl makes the certificates: install it")?;
    let [file, key] = ["certificate.pem", "key.pem"].map(|name| scratch.path().join(name));
    let mut command = Command::new(openssl);
    command.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]);
    command.args(["-days", "2", "-subj", "/CN=a test", "-addext", "subjectAltName=IP:127.0.0.1"]);
    // rustls refuses an authority's certificate as a server's.
    command.args(["-addext", "basicConstraints=critical,CA:FALSE"]);
    command.arg("-out").arg(&file).arg("-keyout").arg(&key);
    daemon::run_ok(command, Duration::from_secs(30))?;
    let [certificate, key] = [&file, &key].map(std::fs::read_to_string);
    Ok(Certificate { certificate: certificate?, key: key?, file })
}

/// Writes a file into the server's directory as the server's user.
fn write_as_postgres(postgres: &Postgres, name: &str, text: &str) -> Result<()> {
    let program = format!("umask 077; cat > {name}");
    let rows = text.trim_end().replace('\n', "'), ('");
    postgres.query(
        "postgres",
        &format!("COPY (SELECT * FROM (VALUES ('{rows}')) AS line) TO PROGRAM '{program}'"),
    )?;
    Ok(())
}

struct TlsPostgres {
    postgres: Postgres,
    certificate: Certificate,
    _scratch: Scratch,
}

fn postgres_with_tls() -> Result<TlsPostgres> {
    let scratch = Scratch::new("tls")?;
    let certificate = certificate(&scratch)?;
    let postgres = Postgres::start(&scratch.path().join("postgres"), PostgresOptions::fast())?;
    write_as_postgres(&postgres, "server.crt", &certificate.certificate)?;
    write_as_postgres(&postgres, "server.key", &certificate.key)?;
    postgres.query("postgres", "ALTER SYSTEM SET ssl = on")?;
    postgres.query("postgres", "SELECT pg_reload_conf()")?;
    let on = daemon::poll(Duration::from_secs(20), || {
        let rows = postgres.query("postgres", "SHOW ssl")?;
        Ok((rows == [[Some("on".to_owned())]]).then_some(()))
    })?;
    if on.is_none() {
        bail!("Postgres does not switch TLS on: {}", std::fs::read_to_string(postgres.log())?);
    }
    Ok(TlsPostgres { postgres, certificate, _scratch: scratch })
}

fn encrypted(postgres: &Postgres) -> Result<Vec<Option<String>>> {
    let rows = postgres.query(
        "postgres",
        "SELECT DISTINCT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
         WHERE application_name = 'chat-service'",
    )?;
    Ok(rows.into_iter().flatten().collect())
}

#[test]
fn sslmode_decides_whether_connections_to_postgres_use_tls() -> Result<()> {
    let TlsPostgres { postgres, certificate, _scratch } = postgres_with_tls()?;
    let database = Database::on(&postgres)?;
    let root = format!("sslrootcert={}", certificate.file.display());
    let cases = [
        (String::new(), "t"),
        ("?sslmode=disable".to_owned(), "f"),
        ("?sslmode=require".to_owned(), "t"),
        (format!("?sslmode=verify-full&{root}"), "t"),
    ];
    for (mode, expected) in cases {
        let url = database.url() + &mode;
        let service = Start::on(&database).env("DATABASE_URL", &url).ready().with_context(|| mode.clone())?;
        let found = encrypted(&postgres)?;
        ensure!(found == [Some(expected.to_owned())], "{mode}: {found:?}");
        service.stop()?;
    }
    Ok(())
}

#[test]
fn an_unknown_certificate_of_postgres_is_refused_with_verify_full() -> Result<()> {
    let TlsPostgres { postgres, _scratch, .. } = postgres_with_tls()?;
    let database = Database::on(&postgres)?;
    let start = Start::on(&database).env("DATABASE_URL", &(database.url() + "?sslmode=verify-full"));
    let service = start.listen()?;
    service.becomes("unavailable")?;
    let line = service.process.logs(&["WARN", "Postgres is unavailable"])?.remove(0);
    ensure!(line.to_lowercase().contains("certificate"), "{line}");
    let report = start.args(&["doctor"]).run()?;
    ensure!(report.code == 1 && report.stdout.to_lowercase().contains("certificate"), "{report:?}");
    Ok(())
}

#[test]
fn sslmode_require_with_a_server_without_tls_fails_and_names_the_cause() -> Result<()> {
    let scratch = Scratch::new("plain")?;
    let postgres = Postgres::start(&scratch.path().join("postgres"), PostgresOptions::fast())?;
    let database = Database::on(&postgres)?;
    let start = Start::on(&database).env("DATABASE_URL", &(database.url() + "?sslmode=require"));
    let service = start.listen()?;
    service.becomes("unavailable")?;
    let line = service.process.logs(&["WARN", "Postgres is unavailable"])?.remove(0);
    ensure!(line.contains("TLS"), "{line}");
    for subcommand in ["doctor", "migrate"] {
        let ended = start.clone().args(&[subcommand]).run()?;
        ensure!(ended.code == 1 && ended.said().contains("TLS"), "{ended:?}");
    }
    Ok(())
}

/// The settings of a Redis that uses the certificate, whose files are put where this one can read them.
pub(super) fn tls_settings(redis: &Redis, certificate: &Certificate) -> Result<Vec<(&'static str, String)>> {
    // The server can always read its own directory.
    let home = redis.log().parent().context("a directory")?.to_owned();
    let [server, key] = ["server.crt", "server.key"].map(|name| home.join(name));
    std::fs::write(&server, &certificate.certificate)?;
    std::fs::write(&key, &certificate.key)?;
    use std::os::unix::fs::PermissionsExt as _;
    for file in [&server, &key] {
        std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o644))?;
    }
    let text = |path: &std::path::Path| path.display().to_string();
    Ok(vec![
        ("tls-cert-file", text(&server)),
        ("tls-key-file", text(&key)),
        ("tls-ca-cert-file", text(&server)),
        ("tls-auth-clients", "no".to_owned()),
        ("tls-port", ports::free()?.to_string()),
    ])
}

/// Makes it listen for TLS, too, and returns the port.
pub(super) fn switch_tls_on(redis: &Redis, certificate: &Certificate) -> Result<String> {
    let settings = tls_settings(redis, certificate)?;
    let arguments = settings.iter().flat_map(|(name, value)| [*name, value.as_str()]);
    redis.cli(&["CONFIG", "SET"].into_iter().chain(arguments).collect::<Vec<_>>())?;
    Ok(settings.last().context("a port")?.1.clone())
}

#[test]
fn rediss_uses_tls_and_trusts_the_authority_of_ssl_cert_file() -> Result<()> {
    let database = Database::create()?;
    let scratch = Scratch::new("rediss")?;
    let certificate = certificate(&scratch)?;
    let redis = Redis::start(&scratch.path().join("redis"), RedisOptions::default())?;
    let port = switch_tls_on(&redis, &certificate)?;
    let start = Start::on(&database).env("REDIS_URL", &format!("rediss://127.0.0.1:{port}/0"));
    let service = start.clone().env("SSL_CERT_FILE", &certificate.file.display().to_string()).ready()?;
    let (ana, ben) = service.two_users()?;
    service.send(&ana, &ben, "hello")?.expect(201)?;
    ensure!(redis.cli(&["KEYS", "*"])?.contains("chat:"), "Redis was not used");
    service.stop()?;

    let distrustful = start.listen()?;
    distrustful.becomes("degraded")?;
    let line = distrustful.process.logs(&["WARN", "Redis is unavailable"])?.remove(0);
    ensure!(line.to_lowercase().contains("certificate"), "{line}");
    Ok(())
}
