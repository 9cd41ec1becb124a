//! Races of sends with a change that refuses them: nothing may be stored after the change was answered.

use std::time::{Duration, Instant};

use sqlx::{Connection as _, PgConnection};
use tokio::time::sleep;

use super::{TestApp, User, together};

/// How many rounds `RACE_ROUNDS` asks for, such as 1000 for a long run by hand.
pub(crate) fn wanted_rounds() -> Option<u64> {
    let rounds = std::env::var("RACE_ROUNDS").ok()?;
    Some(rounds.parse().expect("RACE_ROUNDS is a number"))
}

/// As many rounds as are wanted, or rounds for some seconds.
pub(crate) fn rounds() -> impl Iterator<Item = u64> {
    let (started, wanted) = (Instant::now(), wanted_rounds());
    (0..wanted.unwrap_or(300)).take_while(move |round| {
        let is_over = wanted.is_none() && started.elapsed() > Duration::from_secs(10);
        assert!(!is_over || *round > 30, "{round} rounds");
        !is_over
    })
}

/// Holds the conversation for a few milliseconds again and again, so that statements wait with snapshots from before.
pub(crate) async fn jam(app: &TestApp) {
    let mut connection = app.database.connect().await;
    loop {
        let mut holding = connection.begin().await.expect("a transaction");
        let locked = sqlx::query("SELECT FROM conversations FOR UPDATE").execute(&mut *holding).await;
        locked.expect("a lock");
        sleep(Duration::from_millis(6)).await;
        holding.rollback().await.expect("a rollback");
        sleep(Duration::from_millis(2)).await;
    }
}

/// Makes the change while a statement that has its snapshot stores a message: the change is answered after that has ended. The
/// count is above 0 once the change is committed. The conversation is the only one, and has one message.
pub(crate) async fn waits_for_statements_in_flight(
    app: &TestApp,
    [from, to]: [&User; 2],
    change: impl Future<Output = ()>,
    committed: &str,
) {
    let mut connection = app.database.connect().await;
    let mut holding = connection.begin().await.expect("a transaction");
    let locked = sqlx::query("SELECT FROM conversations FOR UPDATE").execute(&mut *holding).await;
    locked.expect("a lock");
    let sending = app.send(from, to, "before").response();
    let changing = async {
        sleep(Duration::from_millis(300)).await;
        change.await;
        Instant::now()
    };
    let releasing = async {
        while app.database.count(committed).await == 0 {
            sleep(Duration::from_millis(20)).await;
        }
        sleep(Duration::from_millis(900)).await;
        let now = Instant::now();
        holding.rollback().await.expect("a rollback");
        now
    };
    let (sent, answered, released) = tokio::join!(sending, changing, releasing);
    assert_eq!(sent.json(201)["seq"], 2);
    assert!(answered > released, "answered while a message could still be stored");
}

/// Sends through both replicas until it is refused, and makes the change meanwhile. The conversation is the only one.
pub(crate) async fn race(
    replicas: &[&TestApp; 2],
    connection: &mut PgConnection,
    [from, to]: [&User; 2],
    round: u64,
    change: impl Future<Output = ()>,
) {
    let sending = together((0..6).map(|task| async move {
        while replicas[task % 2].send(from, to, "racing").response().await.status == 201 {}
    }));
    let changing = async {
        sleep(Duration::from_micros(500 * (round % 20))).await;
        change.await;
        last_seq(connection).await
    };
    let (_, at_answer) = tokio::join!(sending, changing);
    assert_eq!(last_seq(connection).await, at_answer, "round {round}: stored after the answer");
}

async fn last_seq(connection: &mut PgConnection) -> i64 {
    sqlx::query_scalar("SELECT last_seq FROM conversations")
        .fetch_one(connection)
        .await
        .expect("a conversation")
}
