//! Every choice as a function of the seed: the n-th step of each client, and the n-th fault.

use std::time::Duration;

use fastrand::Rng;

use super::redis::RedisMode;
use crate::proxy::Link;

/// Each conversation's two users. The last one is quiet: in the others somebody always waits until the windows settle, and
/// drops one that is too old before anybody can read it.
pub(super) const CONVERSATIONS: [[usize; 2]; 4] = [[0, 1], [0, 2], [3, 4], [1, 4]];
const QUIET: usize = CONVERSATIONS.len() - 1;
pub(super) const USERS: usize = 5;
pub(super) const REPLICAS: usize = 2;

/// One for each user of each conversation: a sender's messages follow one another.
pub(super) const WRITERS: u32 = 2 * CONVERSATIONS.len() as u32;
pub(super) const READERS: u32 = 6;

/// One for each user, and a second one for the first.
pub(super) const FOLLOWERS: u32 = USERS as u32 + 1;

/// Longer than the service's own request timeout.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(12);

/// How many positions a follower remembers.
pub(super) const BACK_MAX: usize = 20;

/// Streams of random numbers, one for each user of them.
const CLIENTS: u64 = 1 << 32;
const LINKS: u64 = 2 << 32;
const PROCESSES: u64 = 3 << 32;
const STREAMS: u64 = 4 << 32;

/// With [`Plan::LostWakeUps`]: the replica that gets all messages, and the one that loses Redis.
const WRITTEN_TO: usize = 0;
const UNINFORMED: usize = 1;

fn choices(seed: u64, stream: u64, index: u64) -> Rng {
    // Close seeds must not give similar choices.
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
pub(super) struct WriteStep {
    pub(super) pause: Duration,
    pub(super) replica: usize,
    /// Where it is sent with an Idempotency-Key: the replicas on which it is repeated in turn until it is acknowledged.
    pub(super) retries: Option<Vec<usize>>,
    /// For the first attempt.
    pub(super) timeout: Duration,
    /// The replica on which it is sent once more under its key, although it was acknowledged.
    pub(super) repeated_on: Option<usize>,
    /// Padding of the content.
    pub(super) padding: usize,
    /// Replicas to read from directly afterwards.
    pub(super) reads_after: Vec<usize>,
}

pub(super) fn write_step(plan: Plan, seed: u64, client: u32, index: u64) -> WriteStep {
    let mut rng = choices(seed, CLIENTS + u64::from(client), index);
    if plan == Plan::LostWakeUps {
        return rare_write_step(&mut rng, index);
    }
    let keyed = rng.u8(..10) < 6;
    let replica = rng.usize(..REPLICAS);
    // A client that gives up early and tries another replica meets its first attempt half done.
    let hasty = keyed && rng.u8(..10) < 4;
    let elsewhere = if rng.u8(..4) == 0 { replica } else { (replica + 1) % REPLICAS };
    let retries = std::iter::once(elsewhere).chain((0..7).map(|_| rng.usize(..REPLICAS))).collect();
    let is_quiet = client as usize / 2 == QUIET;
    WriteStep {
        pause: ms(&mut rng, if is_quiet { 1000..4000 } else { 2..50 }),
        replica,
        timeout: match rng.u8(..4) {
            _ if !hasty => REQUEST_TIMEOUT,
            0 => ms(&mut rng, 150..1200),
            _ => ms(&mut rng, 10..150),
        },
        repeated_on: (keyed && rng.u8(..10) == 0).then(|| rng.usize(..REPLICAS)),
        padding: if rng.u8(..20) == 0 { rng.usize(..3000) } else { rng.usize(..40) },
        reads_after: (0..rng.usize(..3) + usize::from(hasty)).map(|_| rng.usize(..REPLICAS)).collect(),
        retries: keyed.then_some(retries),
    }
}

/// So few messages that none is found with the next one, each on the same replica and once.
fn rare_write_step(rng: &mut Rng, index: u64) -> WriteStep {
    WriteStep {
        pause: ms(rng, if index == 0 { 0..30_000 } else { 20_000..45_000 }),
        replica: WRITTEN_TO,
        retries: None,
        timeout: REQUEST_TIMEOUT,
        repeated_on: None,
        padding: rng.usize(..40),
        reads_after: Vec::new(),
    }
}

/// One stream of a follower: how it begins, and when the follower leaves.
#[derive(Debug)]
pub(super) struct FollowStep {
    pub(super) pause: Duration,
    pub(super) replica: usize,
    /// It begins now, without a position.
    pub(super) anew: bool,
    /// So many events before the last one that it has handled.
    pub(super) back: usize,
    /// The position is in the query, and not in the header.
    pub(super) in_query: bool,
    /// The follower leaves after this time, or after so many messages, whether more have arrived or not.
    pub(super) time: Duration,
    pub(super) messages: usize,
}

pub(super) fn follow_step(seed: u64, follower: u32, index: u64) -> FollowStep {
    let mut rng = choices(seed, STREAMS + u64::from(follower), index);
    FollowStep {
        pause: ms(&mut rng, 0..400),
        replica: rng.usize(..REPLICAS),
        anew: rng.u8(..50) == 0,
        back: if rng.u8(..8) == 0 { rng.usize(1..BACK_MAX) } else { 0 },
        in_query: rng.u8(..4) == 0,
        time: match rng.u8(..10) {
            0..=2 => ms(&mut rng, 0..300),
            3..=6 => ms(&mut rng, 300..4000),
            _ => ms(&mut rng, 5000..40_000),
        },
        messages: if rng.u8(..3) == 0 { rng.usize(..60) } else { usize::MAX },
    }
}

/// What a reader does next: some reads, one directly after another.
#[derive(Debug)]
pub(super) struct ReadStep {
    pub(super) pause: Duration,
    pub(super) conversation: usize,
    /// Which of the two users reads.
    pub(super) side: usize,
    /// Each on its replica.
    pub(super) reads: Vec<(usize, RelativePage)>,
}

/// A page relative to the newest seq that the run has seen.
#[derive(Clone, Copy, Debug)]
pub(super) enum RelativePage {
    Newest { offset: i64, limit: i64 },
    Before { back: i64, limit: i64 },
    After { back: i64, limit: i64 },
}

pub(super) fn read_step(seed: u64, client: u32, index: u64) -> ReadStep {
    let mut rng = choices(seed, CLIENTS + u64::from(client), index);
    let page = |rng: &mut Rng| match rng.u8(..20) {
        0..=12 => RelativePage::Newest { offset: 0, limit: rng.i64(1..12) },
        13 => RelativePage::Newest { offset: rng.i64(0..60), limit: rng.i64(1..20) },
        14 => RelativePage::Newest { offset: 0, limit: rng.i64(30..101) },
        15 => RelativePage::Before { back: rng.i64(0..80), limit: rng.i64(1..30) },
        _ => RelativePage::After { back: rng.i64(0..6), limit: rng.i64(1..30) },
    };
    ReadStep {
        pause: ms(&mut rng, 0..20),
        conversation: if rng.u8(..100) == 0 { QUIET } else { rng.usize(..QUIET) },
        side: rng.usize(..2),
        reads: (0..rng.usize(1..4)).map(|_| (rng.usize(..REPLICAS), page(&mut rng))).collect(),
    }
}

/// Which faults a run injects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Plan {
    /// All kinds, as the seed chooses.
    #[default]
    Mixed,
    /// A slow link to Redis, again and again.
    SlowRedis,
    /// A cut link to Redis, once the windows are used again after the cut before. So it is with those below.
    Cuts,
    /// One replica without Postgres while the other one is without Redis.
    Apart,
    /// Replicas that use different Redis for longer than the windows are suspended.
    Splits,
    /// A Redis that is back with older data before a replica has heard of it from Postgres.
    UnseenRollbacks,
    /// Few messages, all on one replica, while the other one is often without Redis.
    LostWakeUps,
}

/// The server behind a proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Server {
    Postgres,
    Redis,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    /// The shard counts modulo the number of shards.
    Redis {
        fault: RedisFault,
        shard: usize,
    },
    Link {
        server: Server,
        replica: usize,
        link: Link,
        time: Duration,
    },
    /// This replica uses another Redis than the other replica.
    Split {
        replica: usize,
        time: Duration,
    },
    /// This replica does not learn from Postgres what the other one does, which loses Redis after `lead`.
    Apart {
        uninformed: usize,
        link: Link,
        lead: Duration,
        time: Duration,
    },
    /// This replica loses Redis, and is frozen once it has acted on that.
    Frozen {
        replica: usize,
        lead: Duration,
        time: Duration,
    },
    /// Redis restarts with the data that it had `age` before, while this replica is that far from Postgres.
    UnseenRollback {
        replica: usize,
        delay: Duration,
        age: Duration,
    },
    PostgresPause(Duration),
    /// Its clock is set ahead by this much, or back, and later set right.
    PostgresClock {
        seconds: i64,
        time: Duration,
    },
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

/// What happens to one master of Redis.
#[derive(Clone, Copy, Debug)]
pub(super) enum RedisFault {
    Flush,
    Pause(Duration),
    DropClients,
    /// Its replicas miss what it wrote during the last `lag`. One of them takes over unless the master is back before.
    Kill {
        lag: Duration,
        down: Duration,
    },
    /// Restarts at once with the data that it had this long before.
    Rollback {
        age: Duration,
    },
    /// Its clock is set ahead by this much, or back, and later set right.
    Clock {
        seconds: i64,
        time: Duration,
    },
    /// A failover is asked for although the master is alive; its replicas miss what it wrote during the last `lag`.
    HandOver {
        lag: Duration,
    },
    /// Two failovers, the second one back to the first master.
    ThereAndBack {
        stay: Duration,
    },
}

impl Fault {
    pub(super) fn sets_a_clock(self) -> bool {
        matches!(self, Self::PostgresClock { .. } | Self::Redis { fault: RedisFault::Clock { .. }, .. })
    }

    pub(super) fn is_of_redis_only(self) -> bool {
        matches!(self, Self::Redis { .. } | Self::Link { server: Server::Redis, .. } | Self::Split { .. })
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Redis { fault: RedisFault::Flush, .. } => "Redis flushed",
            Self::Redis { fault: RedisFault::Pause(_), .. } => "Redis paused",
            Self::Redis { fault: RedisFault::DropClients, .. } => "Redis drops its clients",
            Self::Redis { fault: RedisFault::Kill { .. }, .. } => "Redis killed",
            Self::Redis { fault: RedisFault::Rollback { .. }, .. } => "Redis rolled back",
            Self::Redis { fault: RedisFault::Clock { .. }, .. } => "clock of Redis set",
            Self::Redis { fault: RedisFault::HandOver { .. }, .. } => "Redis failed over",
            Self::Redis { fault: RedisFault::ThereAndBack { .. }, .. } => "Redis failed over and back",
            Self::Link { server: Server::Redis, link, .. } => match link {
                Link::Cut | Link::Lost => "link to Redis cut",
                Link::Stalled => "link to Redis stalled",
                Link::Muted => "responses of Redis withheld",
                Link::Slow(_) | Link::Open => "link to Redis slow",
            },
            Self::Link { server: Server::Postgres, link, .. } => match link {
                Link::Cut | Link::Lost => "link to Postgres cut",
                Link::Stalled => "link to Postgres stalled",
                Link::Muted => "responses of Postgres withheld",
                Link::Slow(_) | Link::Open => "link to Postgres slow",
            },
            Self::Split { .. } => "replicas use different Redis",
            Self::Apart { .. } => "one replica without Postgres, one without Redis",
            Self::Frozen { .. } => "replica without Redis frozen",
            Self::UnseenRollback { .. } => "Redis rolled back, Postgres slow",
            Self::PostgresPause(_) => "Postgres paused",
            Self::PostgresClock { .. } => "clock of Postgres set",
            Self::PostgresRestart => "Postgres restarted",
            Self::PostgresKill { .. } => "Postgres killed",
            Self::ReplicaKill { .. } => "replica killed",
            Self::ReplicaPause { .. } => "replica paused",
            Self::ReplicaStop { .. } => "replica shut down gracefully",
        }
    }
}

/// Faults of the links and of Redis, and the pause before each.
///
/// A replica that loses Redis suspends the windows for seconds, and errors of a window show only while windows are used.
/// So most faults are soft: shorter than the time after which Redis counts as unavailable. A hard one follows once the
/// windows are used again, and sometimes two in a row.
pub(super) fn link_fault(redis: RedisMode, seed: u64, index: u64) -> (Duration, Fault) {
    let cycle = match redis {
        RedisMode::Single => 10,
        // A hard fault takes the seconds until the nodes have their roles again, most of them without effect on clients.
        RedisMode::Sentinel => 8,
        RedisMode::Cluster => 12,
    };
    let offset = choices(seed, LINKS, u64::MAX).u64(..cycle);
    let mut rng = choices(seed, LINKS, index);
    let hard = match (index + offset) % cycle {
        0 => true,
        1 => rng.u8(..3) == 0,
        _ => false,
    };
    let pause = ms(&mut rng, 50..500);
    let fault = match (redis, hard) {
        (RedisMode::Single, false) => soft_fault(&mut rng),
        (RedisMode::Single, true) => hard_fault(&mut rng),
        (_, false) => soft_fault_of_many(&mut rng),
        (_, true) => hard_fault_of_many(redis, &mut rng),
    };
    (pause, fault)
}

/// The only faults of a plan that is not mixed, and the pause before each.
pub(super) fn aimed_fault(plan: Plan, seed: u64, index: u64) -> (Duration, Fault) {
    let mut rng = choices(seed, LINKS, index);
    let replica = rng.usize(..REPLICAS);
    let to_redis = |link, time| Fault::Link { server: Server::Redis, replica, link, time };
    let fault = match plan {
        Plan::Mixed | Plan::SlowRedis => {
            let slow = Link::Slow(ms(&mut rng, 50..200));
            return (ms(&mut rng, 50..500), to_redis(slow, ms(&mut rng, 500..2000)));
        }
        Plan::Cuts => to_redis(Link::Cut, ms(&mut rng, 500..1500)),
        Plan::Apart => {
            let (lead, time) = (ms(&mut rng, 0..200), ms(&mut rng, 2000..4000));
            Fault::Apart { uninformed: replica, link: Link::Stalled, lead, time }
        }
        Plan::Splits => Fault::Split { replica, time: ms(&mut rng, 6000..9000) },
        Plan::UnseenRollbacks => unseen_rollback(&mut rng),
        Plan::LostWakeUps => {
            let (pause, time) = (ms(&mut rng, 10_000..15_000), ms(&mut rng, 15_000..20_000));
            let (server, link) = (Server::Redis, Link::Cut);
            return (pause, Fault::Link { server, replica: UNINFORMED, link, time });
        }
    };
    // Windows are suspended for three seconds, and then have to settle.
    let pause = ms(&mut rng, 4500..6000);
    (pause, fault)
}

fn unseen_rollback(rng: &mut Rng) -> Fault {
    let replica = rng.usize(..REPLICAS);
    Fault::UnseenRollback { replica, delay: ms(rng, 50..120), age: ms(rng, 200..800) }
}

/// A fault of Redis, in any shard.
fn redis_fault(fault: RedisFault, rng: &mut Rng) -> Fault {
    Fault::Redis { fault, shard: rng.usize(..60) }
}

fn soft_fault(rng: &mut Rng) -> Fault {
    let replica = rng.usize(..REPLICAS);
    let (server, link, time) = match rng.u8(..18) {
        17 => {
            let (seconds, time) = (clock(rng), ms(rng, 500..3000));
            return redis_fault(RedisFault::Clock { seconds, time }, rng);
        }
        0..=2 => return redis_fault(RedisFault::Flush, rng),
        3 => return redis_fault(RedisFault::Pause(ms(rng, 50..400)), rng),
        4..=10 => (Server::Redis, Link::Slow(ms(rng, 5..200)), ms(rng, 500..2000)),
        11 => (Server::Redis, Link::Stalled, ms(rng, 50..400)),
        12 => (Server::Redis, Link::Muted, ms(rng, 50..400)),
        13..=14 => (Server::Postgres, Link::Slow(ms(rng, 5..150)), ms(rng, 300..1000)),
        15 => (Server::Postgres, Link::Stalled, ms(rng, 100..1000)),
        _ => (Server::Postgres, Link::Muted, ms(rng, 100..1000)),
    };
    Fault::Link { server, replica, link, time }
}

fn hard_fault(rng: &mut Rng) -> Fault {
    let replica = rng.usize(..REPLICAS);
    let (server, link, time) = match rng.u8(..26) {
        24..=25 => return unseen_rollback(rng),
        0 => return redis_fault(RedisFault::Pause(ms(rng, 400..3000)), rng),
        1 => return redis_fault(RedisFault::Kill { lag: Duration::ZERO, down: ms(rng, 0..1500) }, rng),
        2..=4 => return redis_fault(RedisFault::Rollback { age: ms(rng, 0..1200) }, rng),
        5 => return redis_fault(RedisFault::DropClients, rng),
        // Windows are suspended for more than three seconds first.
        6..=8 => return Fault::Split { replica, time: ms(rng, 1000..9000) },
        9..=11 => {
            let link = if rng.bool() { Link::Stalled } else { Link::Muted };
            let (lead, time) = (ms(rng, 0..500), ms(rng, 500..4000));
            return Fault::Apart { uninformed: replica, link, lead, time };
        }
        12..=13 => return Fault::Frozen { replica, lead: ms(rng, 0..1500), time: ms(rng, 2000..6000) },
        14..=17 => (Server::Redis, Link::Cut, ms(rng, 50..2000)),
        18..=19 => (Server::Redis, Link::Stalled, ms(rng, 400..2500)),
        20..=21 => (Server::Redis, Link::Muted, ms(rng, 400..2500)),
        22 => (Server::Postgres, Link::Cut, ms(rng, 50..2000)),
        _ => (Server::Postgres, Link::Muted, ms(rng, 500..2000)),
    };
    Fault::Link { server, replica, link, time }
}

/// Several nodes tell their addresses to the clients, so there are no proxies in front of them.
fn soft_fault_of_many(rng: &mut Rng) -> Fault {
    let replica = rng.usize(..REPLICAS);
    let (link, time) = match rng.u8(..12) {
        0..=2 => return redis_fault(RedisFault::Flush, rng),
        3..=5 => return redis_fault(RedisFault::Pause(ms(rng, 50..400)), rng),
        6..=9 => (Link::Slow(ms(rng, 5..150)), ms(rng, 300..1500)),
        10 => (Link::Stalled, ms(rng, 100..1000)),
        _ => (Link::Muted, ms(rng, 100..1000)),
    };
    Fault::Link { server: Server::Postgres, replica, link, time }
}

fn hard_fault_of_many(redis: RedisMode, rng: &mut Rng) -> Fault {
    let fault = match rng.u8(..16) {
        // Shorter than the time after which a replica takes over, and longer.
        0 => RedisFault::Pause(ms(rng, 400..900)),
        1..=2 => RedisFault::Pause(ms(rng, 1500..5000)),
        3 => RedisFault::Kill { lag: lag(rng), down: ms(rng, 0..800) },
        4..=8 => RedisFault::Kill { lag: lag(rng), down: ms(rng, 2500..5000) },
        9..=10 => RedisFault::Rollback { age: ms(rng, 0..1200) },
        11 => RedisFault::DropClients,
        12..=13 => RedisFault::ThereAndBack { stay: ms(rng, 100..3000) },
        // A cluster's node hands over only what it has handed on.
        _ if redis == RedisMode::Cluster => RedisFault::HandOver { lag: Duration::ZERO },
        _ => RedisFault::HandOver { lag: lag(rng) },
    };
    redis_fault(fault, rng)
}

/// How far a clock is set ahead or back, in seconds.
fn clock(rng: &mut Rng) -> i64 {
    let seconds = match rng.u8(..3) {
        0 => rng.i64(1..5),
        1 => rng.i64(5..120),
        _ => 3600,
    };
    if rng.bool() { seconds } else { -seconds }
}

fn lag(rng: &mut Rng) -> Duration {
    if rng.u8(..4) == 0 { Duration::ZERO } else { ms(rng, 100..1000) }
}

/// Faults of Postgres and of the replicas, and the pause before each.
pub(super) fn process_fault(seed: u64, index: u64) -> (Duration, Fault) {
    let mut rng = choices(seed, PROCESSES, index);
    let pause = ms(&mut rng, 1000..6000);
    let replica = rng.usize(..REPLICAS);
    let fault = match rng.u8(..15) {
        13..=14 => {
            let (seconds, time) = (clock(&mut rng), ms(&mut rng, 500..6000));
            Fault::PostgresClock { seconds, time }
        }
        0..=3 => Fault::ReplicaKill { replica, down: ms(&mut rng, 0..1500) },
        4..=6 => Fault::ReplicaPause { replica, time: ms(&mut rng, 200..3000) },
        // Longer than a suspension of the windows.
        7 => Fault::ReplicaPause { replica, time: ms(&mut rng, 3000..6000) },
        8 => Fault::ReplicaStop { replica },
        9 => Fault::PostgresRestart,
        10 => Fault::PostgresKill { down: ms(&mut rng, 0..1000) },
        _ => Fault::PostgresPause(ms(&mut rng, 100..2000)),
    };
    (pause, fault)
}
