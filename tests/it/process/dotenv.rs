//! A `.env` file counts exactly as it is written, or it is refused without quoting it.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::support::{Database, PASSWORD, Response, Start, closed_port};
use crate::support::claims;

const EX_CONFIG: i32 = 78;

/// A file after whose reading nothing but an unavailable Postgres keeps the migration from its work.
fn migration_with(file: &str) -> Result<Start> {
    let closed = format!("postgres://chat@127.0.0.1:{}/chat", closed_port()?);
    let start = Start::bare().env("DATABASE_URL", &closed).args(&["migrate"]);
    Ok(if file.is_empty() { start } else { start.file(".env", file) })
}

/// Exit code 78 and one line that names the line and the variable, says how to write it, and quotes nothing.
fn refused(file: &str, place: &str) -> Result<()> {
    let ended = migration_with(file)?.env("word", "of-the-environment").run()?;
    ensure!(ended.code == EX_CONFIG, "{file:?}: exit code {}: {}", ended.code, ended.said());
    ensure!(ended.stdout.is_empty() && ended.stderr.lines().count() == 1, "{file:?}: {}", ended.said());
    ensure!(ended.stderr.contains(place) && ended.stderr.contains("; for example "), "{}", ended.stderr);
    ensure!(!ended.stderr.contains("secret") && !ended.stderr.contains("word"), "{}", ended.stderr);
    Ok(())
}

#[test]
fn a_dotenv_value_that_would_change_is_refused() -> Result<()> {
    for value in [
        // Substitution.
        "secret$word",
        "secret${word}",
        "secret$",
        "\"secret$word\"",
        "$word",
        // Escapes.
        r"secret\$word",
        r"secret\nword",
        r"secret\\word",
        "secret\\",
        r#""secret\nword""#,
        r#""secret\"word""#,
        // Quotes within.
        r#"secret"wo"rd"#,
        "secret'wo'rd",
        "'secret'word",
        "'secret' 'word'",
        "\"secret'",
        "'secret\\'",
        // A comment where the value begins.
        "#secret",
        // Blanks within.
        "secret word",
        "secret\u{a0}",
        // Several lines.
        "'secret\nword'",
        "\"secret\nword\"",
        "'secret",
    ] {
        let file = format!("# a comment, it's ignored\nSECRET_KEY={value}\nLOG_FORMAT='text'\n");
        refused(&file, ".env: line 2: SECRET_KEY: ")?;
    }
    Ok(())
}

#[test]
fn a_dotenv_line_that_is_no_pair_and_a_name_that_is_there_twice_are_refused() -> Result<()> {
    refused("LOG_FORMAT=text\nsecret-word\n", ".env: line 2: ")?;
    refused("LOG_FORMAT=text\nexport SECRET_KEY\n", ".env: line 2: ")?;
    refused("SECRET_KEY=secret1\nLOG_FORMAT=text\nSECRET_KEY=secret2\n", ".env: line 3: SECRET_KEY: ")?;
    refused("SECRET_KEY=sec\0ret\n", ".env: line 1: SECRET_KEY: ")
}

/// The variables of OpenTelemetry are read from the process's environment, where the file's lines have to arrive, too.
#[test]
fn a_dotenv_file_is_refused_before_its_values_reach_the_environment() -> Result<()> {
    refused("OTEL_EXPORTER_OTLP_HEADERS=authorization=secret$word\n", "OTEL_EXPORTER_OTLP_HEADERS: ")
}

#[test]
fn a_dotenv_file_that_cannot_be_read_is_refused() -> Result<()> {
    let start = migration_with("")?;
    for start in [
        // A folder, and bytes that are no text.
        start.clone().file(".env/file", ""),
        start.file(".env", b"SECRET_KEY=secret-\xff\n"),
    ] {
        let ended = start.run()?;
        ensure!(ended.code == EX_CONFIG && ended.stderr.contains(".env: "), "{}", ended.said());
        ensure!(ended.stderr.lines().count() == 1 && !ended.said().contains("secret"), "{}", ended.said());
    }
    Ok(())
}

/// The signature of a token shows the key with which it was signed.
#[test]
fn a_dotenv_value_survives_exactly() -> Result<()> {
    const KEY: &str = r##"p4$word ${x}\n"#=and-more-than-32-bytes"##;
    let database = Database::create()?;
    Start::on(&database).ready()?.user("ana")?;
    for (begin, end) in [("", "\n"), ("\u{feff}", "\n"), ("# it's\r\n\r\n", "\r\n")] {
        let mut file = format!("{begin}export ACCESS_TOKEN_EXP_MINUTES = 7 # minutes, isn't it{end}");
        // The last line does not have to end.
        file += &format!("SECRET_KEY='{KEY}' # the quotes don't count");
        let service = Start::on(&database).file(".env", &file).ready()?;
        let body = json!({"username": "ana", "password": PASSWORD});
        let answer = Response::of(service.post("/login", &body))?.expect(200)?.json()?;
        claims(answer["access_token"].as_str().context("a token")?, KEY);
        assert_eq!(answer["expires_in"], 420, "{file:?}");
    }
    Ok(())
}

#[test]
fn a_variable_of_the_environment_that_is_not_utf_8_is_refused() -> Result<()> {
    let start = migration_with("")?;
    let ended = start.env_bytes("SECRET_KEY", b"secret-\xff-of-more-than-32-bytes").run()?;
    ensure!(ended.code == EX_CONFIG && ended.stderr.contains("SECRET_KEY: "), "{}", ended.said());
    ensure!(!ended.said().contains("secret"), "{}", ended.said());
    Ok(())
}
