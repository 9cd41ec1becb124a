//! What `cargo xtask dev` prints of the running service: its addresses, and a conversation to paste.

use std::time::SystemTime;

use anyhow::Result;

use super::backends::{Backend, Backends, DATABASE};
use super::observe::Observers;
use super::service::Addresses;

pub(crate) fn text(addresses: &Addresses, backends: &Backends, observers: Option<&Observers>) -> String {
    let Addresses { host, port, ops_port } = addresses;
    let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
    let api = format!("http://{host}:{port}");
    format!(
        "
  API       {api}
  page      {api}/
  docs      {api}/docs
  metrics   http://{host}:{ops_port}/metrics
  Postgres  {postgres}
  Redis     {redis}
{observers}
  A conversation, to paste into another shell:

{conversation}
  Ctrl-C ends it all; the data is kept (--reset empties it).

",
        postgres = backends.postgres.shown(),
        redis = backends.redis.shown(),
        observers = observers.map(Observers::text).unwrap_or_default(),
        conversation = conversation(&api, &suffix(&backends.postgres)),
    )
}

/// No comments and no `jq`: it has to work as pasted in the shell of a bare machine.
fn conversation(api: &str, suffix: &str) -> String {
    let (ana, ben) = (format!("ana{suffix}"), format!("ben{suffix}"));
    let user = |name: &str| {
        format!(r#"{{"username":"{name}","email":"{name}@example.com","password":"correct horse"}}"#)
    };
    let login = |name: &str| format!(r#"{{"username":"{name}","password":"correct horse"}}"#);
    let token = r#"sed 's/.*"access_token":"\([^"]*\)".*/\1/'"#;
    let id = r#"sed 's/.*"id":"\([^"]*\)".*/\1/'"#;
    format!(
        r#"api={api} json='Content-Type: application/json'
curl -sS $api/register -H "$json" -d '{user_ana}'; echo
curl -sS $api/register -H "$json" -d '{user_ben}'; echo
ana=$(curl -sS $api/login -H "$json" -d '{login_ana}' | {token})
ben=$(curl -sS $api/login -H "$json" -d '{login_ben}' | {token})
ana_id=$(curl -sS $api/users/{ana} -H "Authorization: Bearer $ben" | {id})
ben_id=$(curl -sS $api/users/{ben} -H "Authorization: Bearer $ana" | {id})
curl -sS $api/send -H "$json" -H "Authorization: Bearer $ana" -d '{{"recipient_id":"'$ben_id'","content":"Hello Ben"}}'; echo
curl -sS $api/send -H "$json" -H "Authorization: Bearer $ben" -d '{{"recipient_id":"'$ana_id'","content":"Hello Ana, here I am 👋"}}'; echo
curl -sS "$api/messages?peer_id=$ben_id" -H "Authorization: Bearer $ana"; echo
"#,
        user_ana = user(&ana),
        user_ben = user(&ben),
        login_ana = login(&ana),
        login_ben = login(&ben),
    )
}

/// What makes the two names new: nothing in an empty database, else the first number that is free.
fn suffix(postgres: &Backend) -> String {
    const TAKEN: &str = "SELECT lower(username) FROM users WHERE username ~* '^(ana|ben)[0-9]*$'";
    let taken: Result<Vec<String>> = match postgres {
        Backend::Postgres(postgres) => {
            postgres.query(DATABASE, TAKEN).map(|rows| rows.into_iter().flatten().flatten().collect())
        }
        Backend::Container(container) => {
            container.psql(TAKEN).map(|names| names.lines().map(str::to_owned).collect())
        }
        _ => return clock(),
    };
    let Ok(taken) = taken else { return clock() };
    let is_free =
        |suffix: &String| ["ana", "ben"].iter().all(|name| !taken.contains(&format!("{name}{suffix}")));
    let numbers = (2..).map(|number: u32| number.to_string());
    [String::new()].into_iter().chain(numbers).find(is_free).unwrap_or_default()
}

/// For a database that we cannot query, the time is new.
fn clock() -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    now.as_secs().to_string()
}
