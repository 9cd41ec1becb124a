//! A client that a public generator makes from the served OpenAPI document: it compiles, and speaks with the service.
//! `cargo xtask test` builds the generator where Go is installed, and runs this test; it alone:
//! `cargo xtask test -- --test it -- --ignored generated_client`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tests::Scratch;
use tests::servers::daemon;

use super::support::{Database, LIMIT, Start};

/// A first build downloads the client's one library, and compiles Go's own.
const BUILD_LIMIT: Duration = Duration::from_secs(300);

/// The program is an example for authors of clients, and checks each value that it gets.
const FILES: [&str; 5] = ["go.mod", "go.sum", "main.go", "oapi-codegen.yaml", "chat/doc.go"];

#[test]
#[ignore = "needs Go: cargo xtask test"]
fn a_client_generated_from_the_document_compiles_and_has_a_conversation() -> Result<()> {
    let [go, generator] = [program("TEST_GO")?, program("TEST_CLIENT_GENERATOR")?];
    let database = Database::create()?;
    let service = Start::on(&database).ready()?;
    let url = format!("http://{}", service.public);
    let module = Scratch::new("client")?;
    fs::create_dir(module.path().join("chat"))?;
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples/go");
    for file in FILES {
        fs::copy(example.join(file), module.path().join(file)).with_context(|| format!("copy {file}"))?;
    }
    let run = |program: &Path, arguments: &[&str], limit| {
        let mut command = Command::new(program);
        command.current_dir(module.path()).args(arguments);
        command.env("CGO_ENABLED", "0").env("GOWORK", "off").env_remove("GOFLAGS");
        daemon::run_ok(command, limit)
    };
    let document = format!("{url}/openapi.json");
    run(&generator, &["-config", "oapi-codegen.yaml", &document], LIMIT).context("generate the client")?;
    // As xtask builds its programs, which shares the compiled packages.
    let build = ["build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", "client", "."];
    run(&go, &build, BUILD_LIMIT).context("compile the client")?;
    run(&module.path().join("client"), &[&url], LIMIT).context("run the client")?;
    Ok(())
}

fn program(variable: &str) -> Result<PathBuf> {
    std::env::var_os(variable)
        .map(PathBuf::from)
        .with_context(|| format!("{variable}: run by `cargo xtask test`"))
}
