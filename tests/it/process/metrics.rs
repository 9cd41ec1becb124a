//! What Prometheus scrapes from the built binary.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use anyhow::{Result, ensure};

use super::support::{Database, LIMIT, Service, Start};

/// The series of a scrape, without their values.
fn series(service: &Service) -> Result<BTreeSet<String>> {
    let text = service.operations("/metrics")?.expect(200)?.body;
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    Ok(lines.filter_map(|line| Some(line.rsplit_once(' ')?.0.to_owned())).collect())
}

/// Sends requests for random paths over one connection, and reads their responses.
fn ask_at_random(service: &Service, requests: usize, seed: u64) -> Result<()> {
    const METHODS: [&str; 6] = ["GET", "POST", "PUT", "DELETE", "PATCH", "BREW"];
    const AT_ONCE: usize = 50;
    let mut random = fastrand::Rng::with_seed(seed);
    let mut stream = TcpStream::connect(service.public)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let mut buffer = vec![0; 1 << 16];
    for _ in 0..requests / AT_ONCE {
        let mut batch = String::new();
        for _ in 0..AT_ONCE {
            let method = METHODS[random.usize(..METHODS.len())];
            // No shorter, or else one in fifteen runs would come upon `/me`, which is no 404.
            let path: String = (0..random.usize(5..40)).map(|_| random.alphanumeric()).collect();
            let query = random.u64(..);
            batch += &format!("{method} /{path}?{query} HTTP/1.1\r\nHost: chat\r\nContent-Length: 0\r\n\r\n");
        }
        stream.write_all(batch.as_bytes())?;
        let mut answers = String::new();
        while answers.matches("HTTP/1.1 404").count() < AT_ONCE || !answers.ends_with('}') {
            let length = stream.read(&mut buffer)?;
            ensure!(length > 0, "the connection ended after {answers}");
            answers += &String::from_utf8_lossy(&buffer[..length]);
        }
    }
    Ok(())
}

#[test]
fn ten_thousand_random_paths_make_no_series() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).ready()?;
    let before = series(&service)?;
    ask_at_random(&service, 10_000, tests::history_checker::random_seed())?;
    let after = series(&service)?;
    let new: Vec<_> = after.difference(&before).collect();
    ensure!(
        new.is_empty() && after.len() == before.len(),
        "{} series became {}: {new:?}",
        before.len(),
        after.len()
    );
    let unmatched = "http_server_request_duration_seconds_count{http_request_method=\"GET\",\
                     http_response_status_code=\"404\",http_route=\"unmatched\"}";
    ensure!(service.metric(unmatched)? > 1000.0, "{}", service.metric(unmatched)?);
    println!("{} series", after.len());
    Ok(())
}
