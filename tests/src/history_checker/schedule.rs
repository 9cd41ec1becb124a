//! Every choice, as a function of the seed: what a client does as its n-th step, and which fault comes n-th.

use std::time::Duration;

use fastrand::Rng;

use crate::proxy::Line;

/// Each conversation's two users.
pub(super) const CONVERSATIONS: [[usize; 2]; 3] = [[0, 1], [0, 2], [3, 4]];
pub(super) const USERS: usize = 5;
pub(super) const REPLICAS: usize = 2;

/// One for each side of each conversation, so that every sender's messages come one after another.
pub(super) const WRITERS: u32 = 2 * CONVERSATIONS.len() as u32;
pub(super) const READERS: u32 = 6;

/// Longer than the service itself lets a request take.
pub(super) const PATIENT: Duration = Duration::from_secs(12);

const CLIENTS: u64 = 1 << 32;
const LINES: u64 = 2 << 32;
const PROCESSES: u64 = 3 << 32;

fn choices(seed: u64, stream: u64, index: u64) -> Rng {
    // Seeds that are close to one another must not give choices that are.
    let mut rng = Rng::with_seed(seed);
    let stream = rng.u64(..) ^ stream;
    let mut rng = Rng::with_seed(stream);
    Rng::with_seed(rng.u64(..) ^ index)
}

fn ms(rng: &mut Rng, range: std::ops::Range<u64>) -> Duration {
    Duration::from_millis(rng.u64(range))
}

/// What a writer does with its next message.
#[derive(Debug)]
pub(super) struct Send {
    pub(super) pause: Duration,
    pub(super) replica: usize,
    /// Under an Idempotency-Key, and so repeated until its fate is known, on these replicas in turn.
    pub(super) retries: Option<Vec<usize>>,
    /// How long the first answer is waited for.
    pub(super) patience: Duration,
    /// Sent once more under its key although it was acknowledged.
    pub(super) repeated_on: Option<usize>,
    /// The padding of the content.
    pub(super) length: usize,
    /// Replicas that are read from directly afterwards.
    pub(super) looks: Vec<usize>,
}

pub(super) fn send(seed: u64, client: u32, index: u64) -> Send {
    let mut rng = choices(seed, CLIENTS + u64::from(client), index);
    let keyed = rng.u8(..10) < 6;
    let replica = rng.usize(..REPLICAS);
    // Whoever gives up early and tries elsewhere meets the first attempt half done.
    let hasty = keyed && rng.u8(..10) < 4;
    let elsewhere = if rng.u8(..4) == 0 { replica } else { (replica + 1) % REPLICAS };
    let retries = std::iter::once(elsewhere).chain((0..7).map(|_| rng.usize(..REPLICAS))).collect();
    Send {
        pause: ms(&mut rng, 2..50),
        replica,
        patience: match rng.u8(..4) {
            _ if !hasty => PATIENT,
            0 => ms(&mut rng, 150..1200),
            _ => ms(&mut rng, 10..150),
        },
        repeated_on: (keyed && rng.u8(..10) == 0).then(|| rng.usize(..REPLICAS)),
        length: if rng.u8(..20) == 0 { rng.usize(..3000) } else { rng.usize(..40) },
        looks: (0..rng.usize(..3) + usize::from(hasty)).map(|_| rng.usize(..REPLICAS)).collect(),
        retries: keyed.then_some(retries),
    }
}

/// What a reader does next: reads on a replica each, directly one after another.
#[derive(Debug)]
pub(super) struct Reads {
    pub(super) pause: Duration,
    pub(super) conversation: usize,
    /// Which of the two asks.
    pub(super) side: usize,
    pub(super) reads: Vec<(usize, Look)>,
}

/// A page relative to what the reader knows.
#[derive(Clone, Copy, Debug)]
pub(super) enum Look {
    Newest { offset: i64, limit: i64 },
    Before { back: i64, limit: i64 },
    After { back: i64, limit: i64 },
}

pub(super) fn reads(seed: u64, client: u32, index: u64) -> Reads {
    let mut rng = choices(seed, CLIENTS + u64::from(client), index);
    let look = |rng: &mut Rng| match rng.u8(..20) {
        0..=12 => Look::Newest { offset: 0, limit: rng.i64(1..12) },
        13 => Look::Newest { offset: rng.i64(0..60), limit: rng.i64(1..20) },
        14 => Look::Newest { offset: 0, limit: rng.i64(30..101) },
        15 => Look::Before { back: rng.i64(0..80), limit: rng.i64(1..30) },
        _ => Look::After { back: rng.i64(0..6), limit: rng.i64(1..30) },
    };
    Reads {
        pause: ms(&mut rng, 0..20),
        conversation: rng.usize(..CONVERSATIONS.len()),
        side: rng.usize(..2),
        reads: (0..rng.usize(1..4)).map(|_| (rng.usize(..REPLICAS), look(&mut rng))).collect(),
    }
}

/// The server at the other end of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Server {
    Postgres,
    Redis,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    RedisFlush,
    RedisPause(Duration),
    RedisDropsClients,
    RedisKill {
        down: Duration,
    },
    /// Comes back with what it knew that long before.
    RedisRollback {
        age: Duration,
    },
    Line {
        server: Server,
        replica: usize,
        line: Line,
        time: Duration,
    },
    PostgresPause(Duration),
    PostgresRestart,
    PostgresKill {
        down: Duration,
    },
    ReplicaKill {
        replica: usize,
        down: Duration,
    },
    ReplicaPause {
        replica: usize,
        time: Duration,
    },
    ReplicaStop {
        replica: usize,
    },
}

impl Fault {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::RedisFlush => "Redis flushed",
            Self::RedisPause(_) => "Redis paused",
            Self::RedisDropsClients => "Redis drops its clients",
            Self::RedisKill { .. } => "Redis killed",
            Self::RedisRollback { .. } => "Redis rolled back",
            Self::Line { server: Server::Redis, line, .. } => match line {
                Line::Cut => "line to Redis cut",
                Line::Stalled => "line to Redis stalled",
                Line::Muted => "answers of Redis withheld",
                Line::Slow(_) | Line::Open => "line to Redis slow",
            },
            Self::Line { server: Server::Postgres, line, .. } => match line {
                Line::Cut => "line to Postgres cut",
                Line::Stalled => "line to Postgres stalled",
                Line::Muted => "answers of Postgres withheld",
                Line::Slow(_) | Line::Open => "line to Postgres slow",
            },
            Self::PostgresPause(_) => "Postgres paused",
            Self::PostgresRestart => "Postgres restarted",
            Self::PostgresKill { .. } => "Postgres killed",
            Self::ReplicaKill { .. } => "replica killed",
            Self::ReplicaPause { .. } => "replica paused",
            Self::ReplicaStop { .. } => "replica stopped in order",
        }
    }
}

/// Faults of the lines and of Redis, and the pause before each.
///
/// A replica that loses Redis suspends the windows for ten seconds, and what goes wrong with a window in use can
/// only be seen between such times. So most faults are soft, shorter than the time after which Redis counts as
/// away, and a hard one comes about when the windows are in use again; sometimes two directly after one another.
pub(super) fn line_fault(seed: u64, index: u64) -> (Duration, Fault) {
    const CYCLE: u64 = 16;
    let offset = choices(seed, LINES, u64::MAX).u64(..CYCLE);
    let mut rng = choices(seed, LINES, index);
    let hard = match (index + offset) % CYCLE {
        0 => true,
        1 => rng.u8(..3) == 0,
        _ => false,
    };
    (ms(&mut rng, 50..500), if hard { hard_fault(&mut rng) } else { soft_fault(&mut rng) })
}

fn soft_fault(rng: &mut Rng) -> Fault {
    let replica = rng.usize(..REPLICAS);
    let (server, line, time) = match rng.u8(..17) {
        0..=2 => return Fault::RedisFlush,
        3 => return Fault::RedisPause(ms(rng, 50..400)),
        4..=10 => (Server::Redis, Line::Slow(ms(rng, 5..200)), ms(rng, 500..2000)),
        11 => (Server::Redis, Line::Stalled, ms(rng, 50..400)),
        12 => (Server::Redis, Line::Muted, ms(rng, 50..400)),
        13..=14 => (Server::Postgres, Line::Slow(ms(rng, 5..150)), ms(rng, 300..1000)),
        15 => (Server::Postgres, Line::Stalled, ms(rng, 100..1000)),
        _ => (Server::Postgres, Line::Muted, ms(rng, 100..1000)),
    };
    Fault::Line { server, replica, line, time }
}

fn hard_fault(rng: &mut Rng) -> Fault {
    let replica = rng.usize(..REPLICAS);
    let (server, line, time) = match rng.u8(..16) {
        0 => return Fault::RedisPause(ms(rng, 400..3000)),
        1 => return Fault::RedisKill { down: ms(rng, 0..1500) },
        2..=3 => return Fault::RedisRollback { age: ms(rng, 0..1200) },
        4 => return Fault::RedisDropsClients,
        5..=9 => (Server::Redis, Line::Cut, ms(rng, 50..2000)),
        10..=11 => (Server::Redis, Line::Stalled, ms(rng, 400..2500)),
        12..=13 => (Server::Redis, Line::Muted, ms(rng, 400..2500)),
        14 => (Server::Postgres, Line::Cut, ms(rng, 50..2000)),
        _ => (Server::Postgres, Line::Muted, ms(rng, 500..2000)),
    };
    Fault::Line { server, replica, line, time }
}

/// Faults of Postgres and of the replicas, and the pause before each.
pub(super) fn process_fault(seed: u64, index: u64) -> (Duration, Fault) {
    let mut rng = choices(seed, PROCESSES, index);
    let pause = ms(&mut rng, 1000..6000);
    let replica = rng.usize(..REPLICAS);
    let fault = match rng.u8(..12) {
        0..=3 => Fault::ReplicaKill { replica, down: ms(&mut rng, 0..1500) },
        4..=6 => Fault::ReplicaPause { replica, time: ms(&mut rng, 200..3000) },
        7 => Fault::ReplicaStop { replica },
        8 => Fault::PostgresRestart,
        9 => Fault::PostgresKill { down: ms(&mut rng, 0..1000) },
        _ => Fault::PostgresPause(ms(&mut rng, 100..2000)),
    };
    (pause, fault)
}
