//! One round trip to Redis for all requests that ask at the same time.
//!
//! The client's multiplexed connection writes a command as soon as it is given one, so each of many requests that are
//! served at once would cost both sides a system call to write it and one to read it. Here a task first lets every
//! request that can run now say what it wants, then sends all of it together. Nothing waits for a batch to fill: a
//! request that is alone goes out at once.

use deadpool_redis::redis::aio::{ConnectionLike as _, MultiplexedConnection};
use deadpool_redis::redis::{Cmd, Pipeline, RedisError, Value};
use tokio::sync::{mpsc, oneshot};

/// Calls in one round trip, so that the first of them does not wait for the last of thousands: 256 look-ups take Redis
/// about half a millisecond.
const CALLS_MAX: usize = 256;

/// What is sent through it shares its round trips. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct RoundTrips {
    /// Without a bound of its own: a call waits here for its request, so there are never more than requests in flight.
    calls: mpsc::UnboundedSender<Call>,
}

#[derive(Debug)]
struct Call {
    commands: Vec<Cmd>,
    answer: oneshot::Sender<Result<Vec<Value>, RedisError>>,
}

impl RoundTrips {
    /// Shares this connection. The task ends when the last clone is gone.
    pub fn over(connection: MultiplexedConnection) -> Self {
        let (calls, waiting) = mpsc::unbounded_channel();
        tokio::spawn(depart(connection, waiting));
        Self { calls }
    }

    /// Runs the commands; a value each comes back, of which any may be a server error.
    pub async fn run(&self, commands: Vec<Cmd>) -> Result<Vec<Value>, RedisError> {
        let (answer, answered) = oneshot::channel();
        self.calls.send(Call { commands, answer }).map_err(|_| closed())?;
        answered.await.map_err(|_| closed())?
    }
}

async fn depart(connection: MultiplexedConnection, mut waiting: mpsc::UnboundedReceiver<Call>) {
    let mut calls = Vec::new();
    while waiting.recv_many(&mut calls, CALLS_MAX).await > 0 {
        // Behind everything that this thread can run now: requests whose bytes are here join.
        tokio::task::yield_now().await;
        while calls.len() < CALLS_MAX
            && let Ok(call) = waiting.try_recv()
        {
            calls.push(call);
        }
        // The next ones need not wait for the answer.
        tokio::spawn(travel(connection.clone(), std::mem::take(&mut calls)));
    }
}

/// One round trip. When it fails, it fails for all: the connection is of no use any more.
async fn travel(mut connection: MultiplexedConnection, calls: Vec<Call>) {
    let mut pipeline = Pipeline::with_capacity(2 * calls.len());
    let mut passengers = Vec::with_capacity(calls.len());
    for Call { commands, answer } in calls {
        passengers.push((commands.len(), answer));
        for command in commands {
            pipeline.add_command(command);
        }
    }
    let outcome = connection.req_packed_commands(&pipeline, 0, pipeline.len()).await;
    let mut values = outcome.map(Vec::into_iter);
    for (count, answer) in passengers {
        let share = match &mut values {
            Ok(values) => Ok(values.take(count).collect()),
            Err(error) => Err(error.clone()),
        };
        // Who does not listen any more has given up waiting.
        answer.send(share).ok();
    }
}

fn closed() -> RedisError {
    RedisError::from(std::io::Error::new(std::io::ErrorKind::ConnectionAborted, "the connection is closed"))
}
