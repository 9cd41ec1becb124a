//! `cargo xtask seed`: users and conversations to look at, through the API of a running service.
//!
//! Through the API, and not straight into Postgres: it works wherever a URL leads, a port-forward included, needs no
//! password of a database, leaves every rule to the service (hashing, folding, numbering, the window in Redis), and
//! moves the metrics that dashboards show. It costs a password hash per user, about 15 ms. The same seed names the same
//! users and the same messages, and what is there already is not sent again.

use std::net::{SocketAddr, ToSocketAddrs as _};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use fastrand::Rng;
use harness::http::{Client, Response};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::dev;
use common::signals;

#[derive(clap::Args)]
#[command(after_help = "Examples:
  cargo xtask seed                                 12 users, 300 messages, at the running `cargo xtask dev`
  cargo xtask seed --users 100 --messages 5000     more of them; what is there already stays as it is
  cargo xtask seed --seed 2                        other users
  cargo xtask seed --url http://127.0.0.1:30080    another service

Beside `cargo xtask dev` it starts another replica for so long, which limits nobody. Elsewhere it keeps to the
service's rate limits, and five logins a minute take their time; values-dev.yaml of the chart has lifted them.")]
pub(crate) struct Args {
    /// How many users
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u32).range(2..=10_000))]
    users: u32,
    /// How many messages, over all conversations
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    messages: u32,
    /// Where the API is; the running `cargo xtask dev`, else http://127.0.0.1:8000
    #[arg(long)]
    url: Option<String>,
    /// Another number makes other users and other messages
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=9999))]
    seed: u64,
}

const PASSWORD: &str = "correct horse";
const PATIENCE: Duration = Duration::from_secs(30);
/// More would only wait for the same password hashes.
const WORKERS: usize = 4;
/// A service that is away for longer is not merely restarting.
const RETRIES: u32 = 5;

const FIRST: [&str; 16] = [
    "ana", "ben", "chidi", "dalia", "emre", "fatima", "goran", "hana", "ines", "jonas", "kofi", "leila",
    "mateo", "noor", "olga", "priya",
];
const LAST: [&str; 12] = [
    "abadi", "berg", "castro", "dubois", "eze", "fischer", "garcia", "haddad", "ito", "kowalski", "larsen",
    "mbeki",
];

const OPENINGS: [&str; 12] = [
    "Morning! ☕",
    "Hey, are you around?",
    "Did you see the deploy?",
    "مرحبا، كيف حالك؟",
    "Bonjour, tu as deux minutes ?",
    "¿Qué tal el viaje?",
    "お疲れさまです",
    "Quick question:",
    "שלום! מה נשמע?",
    "One more thing.",
    "Haha 😂",
    "Ok, listen.",
];
const MIDDLES: [&str; 14] = [
    "the dashboards look calm again",
    "I pushed the fix an hour ago",
    "can we move our call to three?",
    "my train is late, as always",
    "the new Postgres is twice as fast",
    "shall we have lunch at the corner place?",
    "the kids are finally asleep",
    "I left the keys with the neighbour",
    "somebody has to water the plants on Friday",
    "the <b>bold</b> text & \"quotes\" come through as they are",
    "photos are up: https://example.com/album/42",
    "I will be there at 18:30",
    "let me read it once more before we send it",
    "we are out of milk, and of bread",
];
const ENDINGS: [&str; 8] = ["", "", "", " 👍", " What do you think?", " Thanks!", " No hurry.", " 🎉🎉"];

#[derive(Clone, Debug)]
struct User {
    name: String,
    id: String,
    token: String,
}

/// Who writes with whom, and how many messages the two have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Conversation {
    users: (usize, usize),
    messages: u32,
}

/// What the work has come to, for all workers.
struct Seeding<'a> {
    args: &'a Args,
    address: SocketAddr,
    bar: ProgressBar,
    registered: AtomicU64,
    sent: AtomicU64,
    told: AtomicBool,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    signals::listen()?;
    let Some(url) = &args.url else { return at_home(args) };
    let seeded = seed(args, url)?;
    println!("{}", seeded.summary);
    print!("{}", seeded.to_try(url));
    Ok(ExitCode::SUCCESS)
}

/// The service of this clone, through another replica of it: its own limits would make minutes of seconds.
fn at_home(args: &Args) -> Result<ExitCode> {
    let url = dev::running("API_URL")?.unwrap_or_else(|| "http://127.0.0.1:8000".to_owned());
    let mut replica = dev::replica_without_limits()?;
    let through = replica.as_ref().map_or_else(|| url.clone(), |replica| replica.addresses().api());
    let seeded = seed(args, &through)?;
    replica.as_mut().map_or(Ok(()), dev::Service::stop)?;
    println!("{}", seeded.summary);
    print!("{}", seeded.to_try(&url));
    Ok(ExitCode::SUCCESS)
}

/// What there is now.
struct Seeded {
    summary: String,
    plan: Vec<Conversation>,
    users: Vec<User>,
}

fn seed(args: &Args, url: &str) -> Result<Seeded> {
    let address = address(url)?;
    match Client::new(address).request("GET", "/healthz", &[], "", PATIENCE) {
        Ok(answer) if answer.status == 200 => {}
        Ok(answer) => bail!("{url}/healthz answers {}: see what the service logs", answer.status),
        Err(lost) => {
            bail!("{url}: {}. Start it with `cargo xtask dev`, or name another with --url", lost.reason())
        }
    }
    let started = Instant::now();
    let plan = plan(args);
    let seeding = Seeding {
        args,
        address,
        bar: bar(u64::from(args.users) + u64::from(args.messages)),
        registered: AtomicU64::new(0),
        sent: AtomicU64::new(0),
        told: AtomicBool::new(false),
    };
    let names: Vec<String> = (0..args.users as usize).map(|number| name(number, args.seed)).collect();
    let users = in_parallel(&names, |name, client| seeding.user(name, client));
    let users = users.inspect_err(|_| seeding.bar.abandon())?;
    let talked = in_parallel(&plan, |conversation, client| seeding.converse(conversation, &users, client));
    talked.inspect_err(|_| seeding.bar.abandon())?;
    seeding.bar.finish_and_clear();
    let (registered, sent) = (seeding.registered.into_inner(), seeding.sent.into_inner());
    let summary = format!(
        "{registered} users and {sent} messages added in {:.1} s; {} users and {} messages were there",
        started.elapsed().as_secs_f32(),
        u64::from(args.users) - registered,
        u64::from(args.messages).saturating_sub(sent),
    );
    Ok(Seeded { summary, plan, users })
}

fn bar(total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    let style = ProgressStyle::with_template("  {bar:30} {pos}/{len} {elapsed} {wide_msg:.dim}");
    bar.set_style(style.expect("a valid template"));
    bar
}

/// Where the URL leads. TLS is left to those who have it: a port-forward is without.
fn address(url: &str) -> Result<SocketAddr> {
    let Some(rest) = url.strip_prefix("http://") else {
        bail!("{url} is not like http://HOST:PORT; to reach a service behind TLS, forward a port to it");
    };
    let authority = rest.trim_end_matches('/');
    ensure!(!authority.contains('/'), "{url} has a path: the API is at the root");
    let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let place = if has_port { authority.to_owned() } else { format!("{authority}:80") };
    let mut found = place.to_socket_addrs().with_context(|| format!("look up {place}"))?;
    found.next().with_context(|| format!("{place} has no address"))
}

/// The same number and seed have the same name; names of the first seed are plain.
fn name(number: usize, seed: u64) -> String {
    let (first, rest) = (FIRST[number % FIRST.len()], number / FIRST.len());
    // Beginning elsewhere for each first name, so that not everybody is called alike.
    let last = LAST[(rest + number) % LAST.len()];
    let mut name = format!("{first}.{last}");
    if rest >= LAST.len() {
        name += &format!("{}", rest / LAST.len() + 1);
    }
    if seed != 1 { format!("{name}-{seed:x}") } else { name }
}

/// Everybody has a conversation with the next one, and a few more; a few pairs write most of the messages.
fn plan(args: &Args) -> Vec<Conversation> {
    let count = args.users as usize;
    let mut rng = Rng::with_seed(args.seed);
    let mut pairs: Vec<(usize, usize)> = Vec::new();
    let next = (0..count).map(|user| (user, (user + 1) % count));
    let random: Vec<_> = (0..count).map(|user| (user, rng.usize(0..count))).collect();
    for (one, other) in next.chain(random) {
        let pair = (one.min(other), one.max(other));
        if one != other && !pairs.contains(&pair) {
            pairs.push(pair);
        }
    }
    // By Zipf: the second pair writes half as much as the first, the third a third.
    let weights: Vec<f64> = (1..=pairs.len()).map(|rank| 1.0 / rank as f64).collect();
    let all: f64 = weights.iter().sum();
    let mut left = args.messages;
    let mut conversations = Vec::with_capacity(pairs.len());
    for (users, weight) in pairs.into_iter().zip(weights) {
        let messages = ((f64::from(args.messages) * weight / all).round() as u32).min(left);
        left -= messages;
        conversations.push(Conversation { users, messages });
    }
    if let Some(first) = conversations.first_mut() {
        first.messages += left;
    }
    conversations
}

/// The text of a message, and whether the first of the two writes it.
fn message(seed: u64, users: (usize, usize), number: u32) -> (bool, String) {
    let mut rng =
        Rng::with_seed(seed ^ ((users.0 as u64) << 48) ^ ((users.1 as u64) << 32) ^ u64::from(number));
    let middle = MIDDLES[rng.usize(0..MIDDLES.len())];
    let ending = ENDINGS[rng.usize(0..ENDINGS.len())];
    let text = match rng.u8(0..10) {
        0..=3 => format!("{} {middle}{ending}", OPENINGS[rng.usize(0..OPENINGS.len())]),
        4..=7 => format!("{middle}{ending}"),
        _ => OPENINGS[rng.usize(0..OPENINGS.len())].to_owned(),
    };
    (rng.bool(), text)
}

/// Does the work for each item on a few threads, each with a connection of its own; the results are in order.
fn in_parallel<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&T, &mut ClientOf) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let mut results: Vec<(usize, Result<R>)> = thread::scope(|scope| {
        let worker = || {
            let (mut done, mut client) = (Vec::new(), ClientOf(None));
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(item) = items.get(index) else { return done };
                let outcome = signals::check().and_then(|()| work(item, &mut client));
                if outcome.is_err() {
                    // What is left is not begun.
                    next.store(items.len(), Ordering::Relaxed);
                }
                done.push((index, outcome));
            }
        };
        let workers: Vec<_> = (0..WORKERS).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("a worker does not panic")).collect()
    });
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}

/// A worker's connection, made when it is first used.
struct ClientOf(Option<Client>);

impl Seeding<'_> {
    /// Registers the user unless it is there, and logs in.
    fn user(&self, name: &str, client: &mut ClientOf) -> Result<User> {
        let email = format!("{name}@example.com");
        let body = json!({"username": name, "email": email, "password": PASSWORD});
        let answer = self.ask(client, "POST", "/register", None, &body.to_string(), &[])?;
        match answer.status {
            201 => self.registered.fetch_add(1, Ordering::Relaxed),
            409 => 0,
            status => bail!("/register answered {status}: {}", text(&answer)),
        };
        let body = json!({"username": name, "password": PASSWORD});
        let answer = self.ask(client, "POST", "/login", None, &body.to_string(), &[])?;
        if answer.status == 401 {
            bail!("{name} is there with another password, so it is not ours: take another --seed");
        }
        let token = field(&answer, 200, "/login", "access_token")?;
        let answer = self.ask(client, "GET", "/me", Some(&token), "", &[])?;
        let id = field(&answer, 200, "/me", "id")?;
        self.bar.inc(1);
        Ok(User { name: name.to_owned(), id, token })
    }

    /// Sends what the conversation lacks. Its messages are numbered by the service, so the last number tells.
    fn converse(&self, conversation: &Conversation, users: &[User], client: &mut ClientOf) -> Result<()> {
        let Conversation { users: pair, messages } = *conversation;
        let (one, other) = (&users[pair.0], &users[pair.1]);
        let path = format!("/messages?peer_id={}&limit=1", other.id);
        let answer = self.ask(client, "GET", &path, Some(&one.token), "", &[])?;
        ensure!(answer.status == 200, "/messages answered {}: {}", answer.status, text(&answer));
        let newest: Value = serde_json::from_slice(&answer.body)?;
        let there = newest[0]["seq"].as_u64().unwrap_or(0).min(messages.into()) as u32;
        self.bar.inc(there.into());
        for number in there..messages {
            signals::check()?;
            let (first_writes, content) = message(self.args.seed, pair, number);
            let (from, to) = if first_writes { (one, other) } else { (other, one) };
            let body = json!({"recipient_id": to.id, "content": content}).to_string();
            // A send that has to be repeated, because its answer was lost, stays one message.
            let key = format!("seed-{}-{}-{}-{number}", self.args.seed, pair.0, pair.1);
            let answer =
                self.ask(client, "POST", "/send", Some(&from.token), &body, &[("idempotency-key", &key)])?;
            ensure!(answer.status == 201, "/send answered {}: {}", answer.status, text(&answer));
            self.sent.fetch_add(1, Ordering::Relaxed);
            self.bar.inc(1);
        }
        Ok(())
    }

    /// One request; waits out a rate limit, and a short absence.
    fn ask(
        &self,
        client: &mut ClientOf,
        method: &str,
        path: &str,
        token: Option<&str>,
        body: &str,
        more: &[(&str, &str)],
    ) -> Result<Response> {
        let authorization = token.map(|token| format!("Bearer {token}"));
        let mut headers = more.to_vec();
        headers.extend(authorization.as_deref().map(|bearer| ("authorization", bearer)));
        let client = client.0.get_or_insert_with(|| Client::new(self.address));
        let mut failures = 0;
        loop {
            signals::check()?;
            match client.request(method, path, &headers, body, PATIENCE) {
                Ok(answer) if answer.status == 429 => self.wait(path, &answer)?,
                Ok(answer) if answer.status != 503 => return Ok(answer),
                outcome if failures == RETRIES => {
                    let why = outcome.map_or_else(|lost| lost.reason().to_owned(), |answer| text(&answer));
                    return Err(anyhow!("{method} {path}: {why}"));
                }
                _ => {
                    failures += 1;
                    thread::sleep(Duration::from_millis(300));
                }
            }
        }
    }

    fn wait(&self, path: &str, answer: &Response) -> Result<()> {
        let seconds: u64 = answer.header("retry-after").and_then(|text| text.parse().ok()).unwrap_or(1);
        if !self.told.swap(true, Ordering::Relaxed) {
            let limit = path.trim_start_matches('/').to_uppercase();
            let advice = format!(
                "  the service limits {path}, so this takes minutes; start it with {limit}_RATE_LIMIT_PER_MINUTE=0 to \
                 lift the limit"
            );
            self.bar.suspend(|| println!("{advice}"));
        }
        self.bar.set_message(format!("waiting {seconds} s for the limit of {path}"));
        let until = Instant::now() + Duration::from_secs(seconds.min(120));
        while Instant::now() < until {
            signals::check()?;
            thread::sleep(Duration::from_millis(100));
        }
        self.bar.set_message("");
        Ok(())
    }
}

fn text(answer: &Response) -> String {
    String::from_utf8_lossy(&answer.body).into_owned()
}

fn field(answer: &Response, status: u16, path: &str, name: &str) -> Result<String> {
    ensure!(answer.status == status, "{path} answered {}: {}", answer.status, text(answer));
    let body: Value = serde_json::from_slice(&answer.body)?;
    Ok(body[name].as_str().with_context(|| format!("{path} has no {name}"))?.to_owned())
}

impl Seeded {
    /// Logins, and the liveliest conversation to paste.
    fn to_try(&self, url: &str) -> String {
        let Self { plan, users, .. } = self;
        let logins: Vec<&str> = users.iter().take(4).map(|user| user.name.as_str()).collect();
        let (one, other) = plan.first().map_or((0, 1), |conversation| conversation.users);
        let url = url.trim_end_matches('/');
        format!(
            "
  Logins, all with the password `{PASSWORD}`: {}

token=$(curl -sS {url}/login -H 'Content-Type: application/json' -d '{{\"username\":\"{}\",\"password\":\"{PASSWORD}\"}}' | \
             sed 's/.*\"access_token\":\"\\([^\"]*\\)\".*/\\1/')
curl -sS \"{url}/messages?peer_id={}\" -H \"Authorization: Bearer $token\"; echo
",
            logins.join(", "),
            users[one].name,
            users[other].id,
        )
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use harness::{Postgres, PostgresOptions, Scratch, service_binary};

    use super::*;

    #[test]
    fn what_was_asked_for_is_there_afterwards_and_what_is_there_is_not_added_again() {
        let scratch = Scratch::new("seed").expect("a directory");
        let postgres = Postgres::start(&scratch.path().join("postgres"), PostgresOptions::fast());
        let postgres = postgres.expect("Postgres");
        postgres.create_database("chat").expect("a database");
        let variables = vec![
            ("DATABASE_URL", postgres.url("chat")),
            // Nobody listens there: it does without.
            ("REDIS_URL", "redis://127.0.0.1:1/0".to_owned()),
            ("SECRET_KEY", "of-the-test-alone-and-long-enough-for-it".to_owned()),
        ];
        let binary = service_binary().expect("the service");
        let mut service = dev::Service::without_limits(binary, variables).expect("ports");
        service.start().expect("it is ready");
        let url = service.addresses().api();
        let count = |table: &str| -> String {
            let rows = postgres.query("chat", &format!("SELECT count(*) FROM {table}")).expect("a count");
            rows[0][0].clone().expect("a number")
        };
        let first = seed(&args(6, 60, 1), &url).expect("seeded");
        assert!(first.summary.starts_with("6 users and 60 messages added"), "{}", first.summary);
        assert_eq!((count("users"), count("messages")), ("6".to_owned(), "60".to_owned()));
        let again = seed(&args(6, 60, 1), &url).expect("seeded");
        assert!(again.summary.starts_with("0 users and 0 messages added"), "{}", again.summary);
        assert_eq!(count("messages"), "60");
        // What it prints to paste works as pasted.
        let shell = std::process::Command::new("bash").arg("-c").arg(pasted(&again.to_try(&url))).output();
        let page: Value = serde_json::from_slice(&shell.expect("bash").stdout).expect("a page of messages");
        assert_eq!(page.as_array().map(Vec::len), Some(5), "{page}");
        let taken = seed(&args(2, 0, 1), "http://127.0.0.1:1").err().expect("nobody is there");
        assert!(format!("{taken:#}").contains("cargo xtask dev"), "{taken:#}");
        service.stop().expect("it ends");
    }

    /// The commands of the text, from the first line at the margin on.
    fn pasted(text: &str) -> &str {
        text.find("\ntoken=").map_or("", |at| &text[at..])
    }

    fn args(users: u32, messages: u32, seed: u64) -> Args {
        Args { users, messages, url: None, seed }
    }

    #[test]
    fn the_plan_has_every_message_once_and_is_the_same_each_time() {
        for (users, messages) in [(2, 0), (2, 7), (12, 300), (100, 5000)] {
            let conversations = plan(&args(users, messages, 1));
            assert_eq!(conversations.iter().map(|one| one.messages).sum::<u32>(), messages);
            let pairs: BTreeSet<_> = conversations.iter().map(|one| one.users).collect();
            assert_eq!(pairs.len(), conversations.len());
            assert!(pairs.iter().all(|(one, other)| one < other && *other < users as usize));
            assert_eq!(conversations, plan(&args(users, messages, 1)));
        }
        assert_eq!(message(1, (0, 1), 5), message(1, (0, 1), 5));
        let texts: BTreeSet<_> = (0..200).map(|number| message(1, (0, 1), number).1).collect();
        assert!(texts.len() > 50, "{}", texts.len());
    }

    #[test]
    fn names_are_unique_and_fit_the_services_rule() {
        for seed in [1, 2, 9999] {
            let names: BTreeSet<_> = (0..3000).map(|number| name(number, seed)).collect();
            assert_eq!(names.len(), 3000);
            let fits = |name: &String| (3..=32).contains(&name.len());
            let wrong: Vec<_> = names.iter().filter(|name| !fits(name)).collect();
            assert!(wrong.is_empty(), "{wrong:?}");
        }
    }

    #[test]
    fn a_url_becomes_an_address_or_says_what_is_wrong_with_it() {
        assert_eq!(address("http://127.0.0.1:8000/").expect("a URL"), ([127, 0, 0, 1], 8000).into());
        assert_eq!(address("http://127.0.0.1").expect("a URL"), ([127, 0, 0, 1], 80).into());
        assert!(address("https://chat.example.com").expect_err("TLS").to_string().contains("forward a port"));
        assert!(address("http://127.0.0.1/api").expect_err("a path").to_string().contains("root"));
    }
}
