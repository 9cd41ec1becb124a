//! `cargo xtask seed`: users and conversations to look at, through the API of a running service.
//!
//! Through the API, and not straight into Postgres: it works wherever a URL leads, a port-forward included, needs no
//! password of a database, leaves every rule to the service (hashing, folding, numbering, the window in Redis), and
//! moves the metrics that dashboards show. It costs a password hash per user, about 15 ms. The same seed names the same
//! users and the same messages, and what is there already is not sent again.

use std::collections::BTreeSet;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use common::signals;
use common::steps::{Progress, step};
use fastrand::Rng;
use harness::http::Client;
use serde_json::{Value, json};

use crate::dev;

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
/// Sixteen and thirteen have no common divisor: each of the 208 pairs comes before one comes again.
const FIRST: &str = "ana ben chidi dalia emre fatima goran hana ines jonas kofi leila mateo noor olga priya";
const LAST: &str = "abadi berg castro dubois eze fischer garcia haddad ito kowalski larsen mbeki novak";
const OPENINGS: &str = "|Morning! ☕ |Did you see the deploy? |مرحبا، كيف حالك؟ |Bonjour, tu as deux minutes ? |\
                        お疲れさまです |שלום! מה נשמע? |Haha 😂 ";
const MIDDLES: &str = "the dashboards look calm again|can we move our call to three?|my train is late, as always|\
                       shall we have lunch at the corner place?|I left the keys with the neighbour|\
                       the <b>bold</b> text & \"quotes\" come through as they are|\
                       photos are up: https://example.com/album/42|let me read it once more before we send it";
const ENDINGS: &str = "|| 👍| What do you think?| No hurry.| 🎉🎉";

struct User {
    name: String,
    id: String,
    bearer: String,
}

/// Who writes with whom, and how many messages the two have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Conversation {
    users: (usize, usize),
    messages: u32,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    signals::listen()?;
    let running = || Ok(dev::running("API_URL")?.unwrap_or_else(|| "http://127.0.0.1:8000".to_owned()));
    let url = args.url.clone().map_or_else(running, Result::<_>::Ok)?;
    // The limits of this clone's service would make minutes of seconds: another replica of it has none.
    let mut replica = if args.url.is_none() { dev::replica_without_limits()? } else { None };
    let through = replica.as_ref().map_or_else(|| url.clone(), |replica| replica.addresses().api());
    let seeded = seed(args, &through)?;
    replica.as_mut().map_or(Ok(()), dev::Service::stop)?;
    print!("{}\n{}", seeded.summary, seeded.to_try(&url));
    Ok(ExitCode::SUCCESS)
}

/// What there is now.
struct Seeded {
    summary: String,
    plan: Vec<Conversation>,
    users: Vec<User>,
}

fn seed(args: &Args, url: &str) -> Result<Seeded> {
    let (started, address) = (Instant::now(), address(url)?);
    let health = Client::new(address).request("GET", "/healthz", &[], "", PATIENCE);
    ensure!(
        health.is_ok_and(|answer| answer.status == 200),
        "{url} is not ready: start it with `cargo xtask dev`, or name another with --url"
    );
    let (plan, names) = (plan(args), (0..args.users as usize).map(|number| name(number, args.seed)));
    let (users, registered, sent) = step("seed", |progress| {
        let client = Client::new(address);
        let mut seeding = Seeding { address, client, progress, registered: 0, sent: 0 };
        let users = names.map(|name| seeding.user(name)).collect::<Result<Vec<User>>>()?;
        plan.iter().try_for_each(|conversation| seeding.converse(args.seed, conversation, &users))?;
        Ok((users, seeding.registered, seeding.sent))
    })?;
    let summary = format!(
        "{registered} users and {sent} messages added in {:.1} s; {} users and {} messages were there",
        started.elapsed().as_secs_f32(),
        args.users - registered,
        args.messages.saturating_sub(sent),
    );
    Ok(Seeded { summary, plan, users })
}

/// Where the URL leads. TLS is left to those who have it: a port-forward is without.
fn address(url: &str) -> Result<SocketAddr> {
    let place = url.strip_prefix("http://").map(|rest| rest.trim_end_matches('/'));
    let place = place.map(|rest| if rest.contains(':') { rest.to_owned() } else { format!("{rest}:80") });
    let found = place.and_then(|place| place.to_socket_addrs().ok()?.next());
    found.with_context(|| {
        format!("{url} does not lead to http://HOST:PORT: the API is at the root; behind TLS, forward a port to it")
    })
}

/// The same number and seed have the same name; names of the first seed are plain.
fn name(number: usize, seed: u64) -> String {
    let one = |names: &'static str| names.split(' ').cycle().nth(number % 208).unwrap_or_default();
    let again = if number < 208 { String::new() } else { (number / 208 + 1).to_string() };
    let suffix = if seed == 1 { String::new() } else { format!("-{seed:x}") };
    format!("{}.{}{again}{suffix}", one(FIRST), one(LAST))
}

/// Everybody has a conversation with the next one, and most have one more; a few pairs write most of the messages.
fn plan(args: &Args) -> Vec<Conversation> {
    let count = args.users as usize;
    let mut rng = Rng::with_seed(args.seed);
    let mut pairs = BTreeSet::new();
    for user in 0..count {
        pairs.extend([(user + 1) % count, rng.usize(0..count)].map(|peer| (user.min(peer), user.max(peer))));
    }
    pairs.retain(|(one, other)| one != other);
    let mut plan: Vec<_> = pairs.into_iter().map(|users| Conversation { users, messages: 0 }).collect();
    rng.shuffle(&mut plan);
    for _ in 0..args.messages {
        let one = (rng.f64().powi(3) * plan.len() as f64) as usize;
        plan[one].messages += 1;
    }
    plan
}

/// The text of a message, and whether the first of the two writes it.
fn message(seed: u64, users: (usize, usize), number: u32) -> (bool, String) {
    let mut rng =
        Rng::with_seed(seed ^ ((users.0 as u64) << 48) ^ ((users.1 as u64) << 32) ^ u64::from(number));
    let text = [OPENINGS, MIDDLES, ENDINGS].map(|texts| rng.choice(texts.split('|').collect::<Vec<_>>()));
    (rng.bool(), text.into_iter().flatten().collect())
}

struct Seeding<'a> {
    address: SocketAddr,
    client: Client,
    progress: &'a Progress,
    registered: u32,
    sent: u32,
}

impl Seeding<'_> {
    /// Registers the user unless it is there, and logs in.
    fn user(&mut self, name: String) -> Result<User> {
        self.progress.say(&name);
        let body = json!({"username": name, "email": format!("{name}@example.com"), "password": PASSWORD});
        let (status, _) = self.ask(&[201, 409], "POST", "/register", "", &body.to_string())?;
        self.registered += u32::from(status == 201);
        let (status, tokens) = self.ask(&[200, 401], "POST", "/login", "", &body.to_string())?;
        ensure!(
            status == 200,
            "{name} is there with another password, so it is not ours: take another --seed"
        );
        let bearer = format!("Bearer {}", tokens["access_token"].as_str().context("/login has no token")?);
        let (_, me) = self.ask(&[200], "GET", "/me", &bearer, "")?;
        Ok(User { name, id: me["id"].as_str().context("/me has no id")?.to_owned(), bearer })
    }

    /// Sends what the conversation lacks. Its messages are numbered by the service, so the last number tells.
    fn converse(&mut self, seed: u64, plan: &Conversation, users: &[User]) -> Result<()> {
        let (one, other) = (&users[plan.users.0], &users[plan.users.1]);
        let path = format!("/messages?peer_id={}&limit=1", other.id);
        let (_, newest) = self.ask(&[200], "GET", &path, &one.bearer, "")?;
        let there = u32::try_from(newest[0]["seq"].as_u64().unwrap_or(0))?;
        for number in there..plan.messages {
            let (first_writes, content) = message(seed, plan.users, number);
            let (from, to) = if first_writes { (one, other) } else { (other, one) };
            let body = json!({"recipient_id": to.id, "content": content}).to_string();
            self.ask(&[201], "POST", "/send", &from.bearer, &body)?;
            self.sent += 1;
            self.progress.say(&format!("{} messages", self.sent));
        }
        Ok(())
    }

    /// One request, answered with one of these statuses. Waits out a rate limit; after another failure the whole command
    /// can be repeated.
    fn ask(
        &mut self,
        expected: &[u16],
        method: &str,
        path: &str,
        bearer: &str,
        body: &str,
    ) -> Result<(u16, Value)> {
        let headers: &[_] = if bearer.is_empty() { &[] } else { &[("authorization", bearer)] };
        loop {
            signals::check()?;
            let answer = self.client.request(method, path, headers, body, PATIENCE);
            let answer = answer
                .map_err(|lost| anyhow!("{path}: {}; once more, it goes on from here", lost.reason()))?;
            if expected.contains(&answer.status) {
                return Ok((answer.status, serde_json::from_slice(&answer.body)?));
            }
            let (status, text) = (answer.status, String::from_utf8_lossy(&answer.body));
            ensure!(status == 429, "{path} answered {status}: {text}");
            let seconds: u64 = answer.header("retry-after").and_then(|text| text.parse().ok()).unwrap_or(1);
            let limit = path.trim_start_matches('/').to_uppercase();
            self.progress
                .note(&format!("waiting {seconds} s; {limit}_RATE_LIMIT_PER_MINUTE=0 lifts the limit"));
            for _ in 0..seconds * 10 {
                signals::check()?;
                thread::sleep(Duration::from_millis(100));
            }
            // The service may have closed the idle connection.
            self.client = Client::new(self.address);
        }
    }
}

impl Seeded {
    /// Logins, and the liveliest conversation to paste.
    fn to_try(&self, url: &str) -> String {
        let logins: Vec<&str> = self.users.iter().take(4).map(|user| user.name.as_str()).collect();
        let liveliest = self.plan.iter().max_by_key(|conversation| conversation.messages);
        let (one, other) = liveliest.map_or((0, 1), |conversation| conversation.users);
        let (url, one, other) = (url.trim_end_matches('/'), &self.users[one].name, &self.users[other].id);
        format!(
            "
  Logins, all with the password `{PASSWORD}`: {}

token=$(curl -sS {url}/login -H 'Content-Type: application/json' -d '{{\"username\":\"{one}\",\"password\":\"{PASSWORD}\"}}' | \
             sed 's/.*\"access_token\":\"\\([^\"]*\\)\".*/\\1/')
curl -sS \"{url}/messages?peer_id={other}\" -H \"Authorization: Bearer $token\"; echo
",
            logins.join(", "),
        )
    }
}

#[cfg(test)]
mod tests {
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
