//! Password hashing, on threads of its own that take what the other requests leave of the machine.
//!
//! A hash costs 15 ms of a core. On a thread that the scheduler treats like any other, a storm of logins would
//! make every other request wait for a slice of time; a lower priority does not mend that, because it shortens
//! the hash's share and not the wait. These together do:
//!
//! - The threads are of the scheduling class `SCHED_IDLE`, which gives way at once to whatever else wakes up.
//! - While requests with a token are served, one core stays free of hashing. A core that hashes never runs out
//!   of work, and the kernel moves waiting threads only to cores that do.
//! - After a hash its thread rests, the longer the more such requests there were, so that few of them meet a hash at
//!   all. Logins alone are not slowed down.
//! - What has waited for too long, on a machine that is busy with others, is taken by one more thread of an ordinary
//!   class.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use argon2::password_hash::phc::PasswordHash;
use argon2::{Algorithm, Argon2, Params, PasswordHasher as _, PasswordVerifier as _, Version};
use tokio::sync::oneshot;

use crate::error::Error;
use crate::metrics::Metrics;
use crate::trace;

/// OWASP's parameters for argon2id: 19 MiB, two passes, one lane; about 15 ms of a core.
const ARGON2_PARAMS: (u32, u32, u32) = (19_456, 2, 1);

/// What a login of an unknown user is checked against, so that it costs the same and answers the same. It has
/// the parameters above and fits no password.
const NOBODY: &str =
    "$argon2id$v=19$m=19456,t=2,p=1$bm9ib2R5bm9ib2R5bm9ib2R5$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// Waiting jobs per core. At 15 ms each the last one waits a second, and a few when the threads rest in between;
/// after that a client has lost patience.
const QUEUE_PER_CORE: usize = 64;

/// A job that has waited for longer than the whole queue takes by itself has met a machine that is busy with others.
const STARVED: Duration = Duration::from_secs(1);

/// How long after a request with a token the next one is expected.
const BUSY: Duration = Duration::from_millis(20);

/// What each request with a token that was served during a hash adds to the pause after it, and how many times as
/// long as the hash the pause may get.
const PAUSE_PER_REQUEST: Duration = Duration::from_micros(500);
const PAUSE_MAX: u32 = 4;

/// Hashes passwords one per core at a time, behind a bounded queue.
pub struct Passwords {
    queue: Arc<Queue>,
    threads: usize,
    metrics: Arc<Metrics>,
}

struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    capacity: usize,
    started: Instant,
    /// Milliseconds from `started` to the last request with a token, and [`BUSY`].
    busy_until: AtomicU64,
    /// Requests with a token so far.
    others: AtomicU64,
}

/// Which jobs a thread takes.
#[derive(Clone, Copy)]
enum Share {
    /// Any.
    All,
    /// Any, while nothing else is asked for.
    WhenQuiet,
    /// Those that nobody else took.
    Starved,
}

#[derive(Default)]
struct State {
    /// Oldest first.
    jobs: VecDeque<(Instant, Job)>,
    closed: bool,
}

type Job = Box<dyn FnOnce(&Argon2<'static>) + Send>;

impl Passwords {
    pub fn start(metrics: Arc<Metrics>) -> Result<Self, std::io::Error> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let queue = Arc::new(Queue::new(QUEUE_PER_CORE * cores));
        for number in 0..cores {
            let share = if number > 0 && number == cores - 1 { Share::WhenQuiet } else { Share::All };
            queue.spawn_worker(&format!("argon2-{number}"), share)?;
        }
        queue.spawn_worker("argon2-starved", Share::Starved)?;
        Ok(Self { queue, threads: cores + 1, metrics })
    }

    /// Passwords that are hashed, or wait, at the very most.
    pub fn capacity(&self) -> usize {
        self.queue.capacity + self.threads
    }

    /// Told of every request that comes with a token.
    pub fn make_way(&self) {
        self.queue.make_way();
    }

    /// The password's hash in PHC form.
    pub async fn hash(&self, password: String) -> Result<String, Error> {
        let hash =
            self.run(move |argon2| argon2.hash_password(password.as_bytes()).map(|hash| hash.to_string()));
        hash.await?.map_err(Error::internal)
    }

    /// True when the password is the one that was hashed. Without a hash it takes as long, and is false.
    pub async fn verify(&self, password: String, hash: Option<String>) -> Result<bool, Error> {
        self.run(move |argon2| {
            let known = hash.is_some();
            let hash = hash.as_deref().unwrap_or(NOBODY);
            let hash = PasswordHash::new(hash).map_err(|error| Error::internal(error.to_string()))?;
            Ok(argon2.verify_password(password.as_bytes(), &hash).is_ok() && known)
        })
        .await?
    }

    async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&Argon2<'static>) -> T + Send + 'static,
    ) -> Result<T, Error> {
        let (answer, answered) = oneshot::channel();
        let waiting = self.metrics.hashing_started();
        let span = trace::work("hash password");
        let hashed = span.clone();
        let job: Job = Box::new(move |argon2| {
            let _waiting = waiting;
            if let Some(span) = hashed {
                span.event("taken from the queue");
            }
            // Whoever gave up waiting needs no hash.
            if !answer.is_closed() {
                answer.send(job(argon2)).ok();
            }
        });
        if !self.queue.push(job) {
            return Err(Error::Unavailable("too many logins and registrations at once: try again"));
        }
        let answer = answered.await.map_err(|_| Error::internal("hashing panicked"));
        if let Some(span) = span {
            if answer.is_err() {
                span.fail("panic");
            }
            span.end();
        }
        answer
    }
}

impl Queue {
    fn new(capacity: usize) -> Self {
        Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            capacity,
            started: Instant::now(),
            busy_until: AtomicU64::new(0),
            others: AtomicU64::new(0),
        }
    }

    fn spawn_worker(self: &Arc<Self>, name: &str, share: Share) -> Result<(), std::io::Error> {
        let queue = Arc::clone(self);
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            if !matches!(share, Share::Starved) {
                give_way();
            }
            work(&queue, share);
        })?;
        Ok(())
    }

    /// False when the queue is full.
    fn push(&self, job: Job) -> bool {
        let mut state = self.lock();
        if state.jobs.len() >= self.capacity {
            return false;
        }
        state.jobs.push_back((Instant::now(), job));
        drop(state);
        // All of them: one alone might be a thread that may not take it yet.
        self.changed.notify_all();
        true
    }

    /// The next job of this share; nothing when there will be none any more.
    fn next(&self, share: Share) -> Option<Job> {
        let mut state = self.lock();
        loop {
            let wait = state.jobs.front().map(|(since, _)| self.wait_for(share, *since));
            state = match wait {
                Some(Duration::ZERO) => return state.jobs.pop_front().map(|(_, job)| job),
                _ if state.closed => return None,
                Some(wait) => {
                    let timed = self.changed.wait_timeout(state, wait);
                    timed.unwrap_or_else(|poisoned| poisoned.into_inner()).0
                }
                None => self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner()),
            }
        }
    }

    /// How much longer a job that came at `since` is not for this share.
    fn wait_for(&self, share: Share, since: Instant) -> Duration {
        match share {
            Share::All => Duration::ZERO,
            Share::WhenQuiet => {
                Duration::from_millis(self.busy_until.load(Ordering::Relaxed).saturating_sub(self.now()))
            }
            Share::Starved => STARVED.saturating_sub(since.elapsed()),
        }
    }

    fn make_way(&self) {
        self.others.fetch_add(1, Ordering::Relaxed);
        self.busy_until.store(self.now() + BUSY.as_millis() as u64, Ordering::Relaxed);
    }

    fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    fn now(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Drop for Passwords {
    fn drop(&mut self) {
        self.queue.close();
    }
}

/// A thread's life: one job after another until the queue is closed.
fn work(queue: &Queue, share: Share) {
    let (memory_kib, passes, lanes) = ARGON2_PARAMS;
    let params = Params::new(memory_kib, passes, lanes, None).unwrap_or_default();
    let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
    while let Some(job) = queue.next(share) {
        let (began, others) = (Instant::now(), queue.others.load(Ordering::Relaxed));
        // A panic must cost one request, not the thread.
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job(&argon2))).is_err() {
            tracing::error!("hashing a password panicked");
        }
        let others = queue.others.load(Ordering::Relaxed) - others;
        std::thread::sleep(pause(began.elapsed(), others));
    }
}

/// How long a thread rests after a hash, so that most requests meet no hash at all: the more there were meanwhile,
/// the longer.
fn pause(hash: Duration, others: u64) -> Duration {
    let others = u32::try_from(others).unwrap_or(u32::MAX);
    PAUSE_PER_REQUEST.saturating_mul(others).min(hash * PAUSE_MAX)
}

/// Any process may do this to its own threads. Elsewhere than on Linux, or where a sandbox forbids it, hashing
/// competes as an equal.
fn give_way() {
    #[cfg(target_os = "linux")]
    {
        use thread_priority::{NormalThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy, unix};
        let idle = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle);
        let this = unix::thread_native_id();
        if let Err(error) = unix::set_thread_priority_and_policy(this, ThreadPriority::Min, idle) {
            tracing::warn!(?error, "password hashing cannot give way to other work");
        }
    }
}

impl std::fmt::Debug for Passwords {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Passwords").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue_with_a_job(capacity: usize) -> Queue {
        let queue = Queue::new(capacity);
        assert!(queue.push(Box::new(|_| ())));
        queue
    }

    #[test]
    fn a_full_queue_takes_no_more() {
        let queue = queue_with_a_job(1);
        assert!(!queue.push(Box::new(|_| ())));
        assert!(queue.next(Share::All).is_some());
        assert!(queue.push(Box::new(|_| ())));
    }

    #[test]
    fn one_core_stays_free_while_requests_with_a_token_come() {
        let queue = queue_with_a_job(1);
        let waited = |queue: &Queue| queue.wait_for(Share::WhenQuiet, Instant::now());
        assert_eq!(waited(&queue), Duration::ZERO);
        queue.make_way();
        assert!(waited(&queue) > Duration::ZERO);
        assert_eq!(queue.wait_for(Share::All, Instant::now()), Duration::ZERO, "the other threads go on");
        let asked = Instant::now();
        assert!(queue.next(Share::WhenQuiet).is_some());
        assert!(asked.elapsed() + Duration::from_millis(2) > BUSY, "taken before the requests had stopped");
    }

    #[test]
    fn the_pause_grows_with_the_other_requests_up_to_a_bound() {
        let hash = Duration::from_millis(10);
        assert_eq!(pause(hash, 0), Duration::ZERO);
        assert_eq!(pause(hash, 4), Duration::from_millis(2));
        for many in [80, 1_000_000, u64::MAX] {
            assert_eq!(pause(hash, many), Duration::from_millis(40));
        }
    }

    #[test]
    fn what_nobody_takes_is_taken_in_the_end() {
        let queue = queue_with_a_job(1);
        let came = Instant::now();
        assert!(queue.next(Share::Starved).is_some());
        assert!(came.elapsed() >= STARVED - Duration::from_millis(5));
    }

    #[test]
    fn the_threads_end_with_the_queue() {
        let queue = Queue::new(1);
        queue.close();
        for share in [Share::All, Share::WhenQuiet, Share::Starved] {
            assert!(queue.next(share).is_none());
        }
    }

    #[test]
    fn the_hash_of_nobody_parses_with_the_same_parameters() {
        let nobody = PasswordHash::new(NOBODY).expect("a valid PHC string");
        let params = Params::try_from(&nobody).expect("argon2 parameters");
        let expected = Params::new(ARGON2_PARAMS.0, ARGON2_PARAMS.1, ARGON2_PARAMS.2, None).expect("valid");
        assert_eq!((params.m_cost(), params.t_cost(), params.p_cost()), (expected.m_cost(), 2, 1));
        assert_eq!(nobody.hash.map(|hash| hash.len()), Some(32));
    }
}
