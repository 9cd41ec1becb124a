//! How the process ends: gracefully on a signal, at once on a second one, and without loss when it is killed.

use std::collections::HashSet;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;

use tests::servers::{daemon, ports};

use super::support::{
    Database, Held, LIMIT, Service, Start, User, closed_port, eventually, shared_redis, within,
};

/// Two users of a service with long timeouts, and one message between them. Their conversation is locked in Postgres, so
/// that the next send waits.
struct Blocked {
    ana: User,
    ben: User,
    held: Held,
    service: Service,
    database: Database,
}

fn blocked(grace_seconds: &str) -> Result<Blocked> {
    let database = Database::create()?;
    let start =
        Start::on(&database).env("REQUEST_TIMEOUT_MS", "50000").env("DB_STATEMENT_TIMEOUT_MS", "50000");
    let service = start.env("SHUTDOWN_GRACE_SECONDS", grace_seconds).ready()?;
    let (ana, ben) = service.two_users()?;
    service.send(&ana, &ben, "first")?.expect(201)?;
    let held = database.hold_conversations()?;
    Ok(Blocked { ana, ben, held, service, database })
}

/// The signal arrives while a send waits for a lock in Postgres.
fn completes_the_request_in_flight(signal: Signal) -> Result<()> {
    let Blocked { database, mut service, ana, ben, held } = blocked("40")?;
    thread::scope(|scope| -> Result<()> {
        let sending = scope.spawn(|| service.send(&ana, &ben, "in flight"));
        database.blocks(1)?;
        service.process.signal(signal)?;
        service.becomes("unavailable")?;
        let health = service.operations("/healthz")?.expect(503)?.json()?;
        ensure!(health["checks"]["process"] == "draining", "{health}");
        // Requests in flight go on after the process has stopped accepting new ones.
        thread::sleep(Duration::from_millis(1500));
        ensure!(service.health()?.0 == 503, "it is ready again");
        service.operations("/livez")?.expect(200)?;
        if sending.is_finished() {
            bail!("the request ended with the signal: {:?}", sending.join());
        }
        held.release();
        let message = sending.join().expect("no panic")?.expect(201)?.json()?;
        ensure!(message["seq"] == 2 && message["content"] == "in flight", "{message}");
        Ok(())
    })?;
    ensure!(service.process.exit(LIMIT)? == 0, "{}", service.process.said());
    ensure!(database.contents()? == ["first", "in flight"]);
    ensure!(service.process.lines_with(&["the grace is over"]).is_empty());
    Ok(())
}

#[test]
fn sigterm_makes_the_process_unready_and_a_request_in_flight_completes() -> Result<()> {
    completes_the_request_in_flight(Signal::TERM)
}

#[test]
fn sigint_does_the_same() -> Result<()> {
    completes_the_request_in_flight(Signal::INT)
}

#[test]
fn an_idle_process_exits_with_zero_and_logs_it() -> Result<()> {
    let database = Database::create()?;
    let said = Start::on(&database).ready()?.stop()?;
    assert!(said.contains("stopping: no longer ready") && said.contains("stopped"), "{said}");
    assert!(!said.contains("ERROR"), "{said}");
    Ok(())
}

#[test]
fn an_open_connection_without_a_request_does_not_delay_the_shutdown() -> Result<()> {
    let database = Database::create()?;
    let mut service = Start::on(&database).env("SHUTDOWN_GRACE_SECONDS", "50").ready()?;
    let _silent = std::net::TcpStream::connect(service.public)?;
    let mut partial = std::net::TcpStream::connect(service.public)?;
    std::io::Write::write_all(&mut partial, b"GET /healthz HT")?;
    let mut used = std::net::TcpStream::connect(service.public)?;
    std::io::Write::write_all(&mut used, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")?;
    used.set_read_timeout(Some(LIMIT))?;
    ensure!(std::io::Read::read(&mut used, &mut [0; 4096])? > 0);
    service.process.signal(Signal::TERM)?;
    let code = within(Duration::from_secs(30), "the end", || service.process.exit(LIMIT))?;
    ensure!(code == 0, "{}", service.process.said());
    Ok(())
}

#[test]
fn a_stdout_that_is_not_read_does_not_stop_the_process_from_ending() -> Result<()> {
    let database = Database::create()?;
    let (port, ops_port) = (ports::free()?, ports::free()?);
    let mut command = daemon::dies_with_us(&tests::service_binary()?, "KILL");
    command.env_clear().stdout(Stdio::piped()).stdin(Stdio::null()).envs([
        ("DATABASE_URL", database.url()),
        ("REDIS_URL", shared_redis()),
        ("HOST", "127.0.0.1".to_owned()),
        ("PORT", port.to_string()),
        ("OPS_PORT", ops_port.to_string()),
        ("RUST_LOG", "trace".to_owned()),
    ]);
    let mut child = daemon::spawn(command)?;
    let health = format!("http://127.0.0.1:{port}/healthz");
    let client = reqwest::blocking::Client::builder().timeout(Duration::from_secs(5)).build()?;
    let ready = || client.get(&health).send().is_ok_and(|answer| answer.status() == 200);
    eventually("the process to be ready", || ready().then_some(()))?;
    // A pipe holds 64 KiB; the logs of this many requests at this level are many times that.
    for _ in 0..200 {
        ensure!(ready(), "the process stopped serving");
    }
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), Signal::TERM)?;
    let status = daemon::poll(Duration::from_secs(15), || Ok(child.try_wait()?))?;
    child.kill().ok();
    ensure!(status.context("the process did not end")?.success(), "{status:?}");
    Ok(())
}

#[test]
fn queued_messages_are_committed_before_the_process_ends() -> Result<()> {
    const SENDERS: usize = 12;
    let Blocked { database, mut service, ana, ben, held } = blocked("40")?;
    let acknowledged = thread::scope(|scope| -> Result<HashSet<String>> {
        // The first one blocks the writer, the others wait in its queue.
        let first = scope.spawn(|| service.send(&ana, &ben, "second"));
        database.blocks(1)?;
        let (service, ana, ben) = (&service, &ana, &ben);
        let queued: Vec<_> = (0..SENDERS)
            .map(|number| scope.spawn(move || service.send(ben, ana, &format!("queued {number}"))))
            .collect();
        eventually("the queue to fill", || {
            service.metric("http_server_active_requests").ok().filter(|active| *active > SENDERS as f64)
        })?;
        service.process.signal(Signal::TERM)?;
        service.becomes("unavailable")?;
        held.release();
        let mut acknowledged = HashSet::new();
        for sending in queued.into_iter().chain([first]) {
            let message = sending.join().expect("no panic")?.expect(201)?.json()?;
            acknowledged.insert(message["content"].as_str().context("content")?.to_owned());
        }
        Ok(acknowledged)
    })?;
    ensure!(service.process.exit(LIMIT)? == 0, "{}", service.process.said());
    ensure!(acknowledged.len() == SENDERS + 1, "{acknowledged:?}");
    database.keeps(&acknowledged).map(drop)
}

/// Ends the process while a send waits, which must not be acknowledged. Returns the exit code and the log.
fn ends_without_acknowledging(
    grace_seconds: &str,
    end: impl FnOnce(&Service) -> Result<()>,
) -> Result<(i32, String)> {
    let Blocked { database, mut service, ana, ben, held: _held } = blocked(grace_seconds)?;
    thread::scope(|scope| -> Result<()> {
        let sending = scope.spawn(|| service.send(&ana, &ben, "never"));
        database.blocks(1)?;
        service.process.signal(Signal::TERM)?;
        end(&service)?;
        let unanswered = sending.join().expect("no panic");
        ensure!(!unanswered.is_ok_and(|answer| answer.status == 201), "what was not stored was acknowledged");
        Ok(())
    })?;
    let code = within(Duration::from_secs(30), "the end", || service.process.exit(LIMIT))?;
    Ok((code, service.process.stdout()))
}

#[test]
fn after_the_grace_the_process_ends_despite_requests_in_flight() -> Result<()> {
    // The request itself would wait for 50 s.
    ends_without_acknowledging("2", |service| service.process.logs(&["the grace is over"]).map(drop))?;
    Ok(())
}

#[test]
fn a_second_signal_ends_the_process_at_once() -> Result<()> {
    let (code, log) = ends_without_acknowledging("600", |service| {
        service.becomes("unavailable")?;
        service.process.signal(Signal::INT)
    })?;
    ensure!(code == 1, "exit code {code}");
    ensure!(log.matches("a second signal").count() == 1, "{log}");
    Ok(())
}

#[test]
fn a_signal_ends_a_process_that_waits_for_postgres() -> Result<()> {
    let url = format!("postgres://nobody@127.0.0.1:{}/nothing", closed_port()?);
    let mut service = Start::bare().env("DATABASE_URL", &url).env("SHUTDOWN_GRACE_SECONDS", "40").listen()?;
    service.becomes("unavailable")?;
    service.process.signal(Signal::TERM)?;
    ensure!(within(Duration::from_secs(30), "the end", || service.process.exit(LIMIT))? == 0);
    Ok(())
}

/// Sends from several threads until `stop` is set; returns what was acknowledged.
pub(super) fn send_until(
    service: &Service,
    (ana, ben): &(User, User),
    stop: &AtomicBool,
) -> Result<Vec<String>> {
    const SENDERS: usize = 4;
    thread::scope(|scope| {
        let senders: Vec<_> = (0..SENDERS)
            .map(|sender| {
                scope.spawn(move || {
                    let mut acknowledged = Vec::new();
                    for number in 0.. {
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                        let content = format!("{sender}:{number}");
                        let (from, to) = if sender % 2 == 0 { (ana, ben) } else { (ben, ana) };
                        match service.send(from, to, &content) {
                            Ok(answer) if answer.status == 201 => acknowledged.push(content),
                            // Everything else promises nothing.
                            _ => thread::sleep(Duration::from_millis(20)),
                        }
                    }
                    acknowledged
                })
            })
            .collect();
        Ok(senders.into_iter().flat_map(|sender| sender.join().expect("no panic")).collect())
    })
}

#[test]
fn a_kill_under_load_loses_no_acknowledged_message() -> Result<()> {
    let database = Database::create()?;
    let mut service = Start::on(&database).ready()?;
    let users = service.two_users()?;
    let stop = AtomicBool::new(false);
    let acknowledged = thread::scope(|scope| -> Result<Vec<String>> {
        let sending = scope.spawn(|| send_until(&service, &users, &stop));
        eventually("some messages", || database.contents().ok().filter(|stored| stored.len() > 50))?;
        service.process.signal(Signal::KILL)?;
        stop.store(true, Ordering::Relaxed);
        sending.join().expect("no panic")
    })?;
    ensure!(service.process.exit(LIMIT)? == 128 + 9, "{}", service.process.said());
    ensure!(acknowledged.len() > 10, "too few were acknowledged: {}", acknowledged.len());
    // A statement of the killed process may still be running.
    eventually("its sessions to end", || {
        let sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                        AND application_name = 'chat-service'";
        database.value(sessions).ok().filter(|count| count == "0")
    })?;
    let stored = database.keeps(&acknowledged)?;

    // The next process continues the same conversation.
    let next = Start::on(&database).ready()?;
    let (ana, ben) = &users;
    let message = next.send(ana, ben, "afterwards")?.expect(201)?.json()?;
    ensure!(message["seq"] == stored + 1, "{message}");
    ensure!(next.contents(ben, ana, 1)? == ["afterwards"]);
    Ok(())
}
