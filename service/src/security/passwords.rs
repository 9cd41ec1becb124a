//! Password hashing, on dedicated low-priority threads.
//!
//! A hash costs 15 ms of a core. On ordinary threads a storm of logins would make every other request wait for a slice
//! of time. A lower priority alone does not help: it shortens the hash's slice and not the wait for it. Together these
//! three mechanisms do:
//!
//! - The threads have the scheduling class `SCHED_IDLE`, which every other thread preempts at once.
//! - After a hash its thread pauses, for longer the more requests with a token arrived during it, so that few of them
//!   coincide with a hash. Without such requests it does not pause.
//! - A thread of the ordinary scheduling class takes jobs that have waited for too long. Without it, no login succeeded on
//!   two cores with eight busy processes; with it, a login took 1.1 s.
//!
//! A password is counted, hashed and compared in normal form C, because devices compose one text in different ways.
//!
//! `cargo xtask bench --only storm` divides the p99 of reads during a storm by the p99 without. Its median was 1.1, and 1.8
//! without the scheduling class or without the pauses.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use argon2::password_hash::phc::PasswordHash;
use argon2::{Algorithm, Argon2, Params, PasswordHasher as _, PasswordVerifier as _, Version};
use tokio::sync::oneshot;

use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace;
use crate::text;

/// The characters that a password may have, counted in normal form C.
pub(crate) const PASSWORD_LENGTH: RangeInclusive<usize> = 8..=128;

/// OWASP's parameters for argon2id: 19 MiB, two passes, one lane; about 15 ms of a core.
const ARGON2_PARAMS: (u32, u32, u32) = (19_456, 2, 1);

/// The hash against which the login of an unknown user is verified, so that it takes the same time. It has the parameters
/// above and matches no password.
const UNKNOWN_USER_HASH: &str =
    "$argon2id$v=19$m=19456,t=2,p=1$bm9ib2R5bm9ib2R5bm9ib2R5$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// Waiting jobs per core. At 15 ms each the last one waits for a second, and for a few with the threads' pauses: about as
/// long as a client's patience.
const QUEUE_PER_CORE: usize = 64;

/// A job that has waited for longer than the whole queue takes is starved by other processes.
const STARVED_AFTER: Duration = Duration::from_secs(1);

/// The pause after a hash for each request with a token that arrived during it, and the longest pause in multiples of the
/// hash's duration.
const PAUSE_PER_REQUEST: Duration = Duration::from_micros(500);
const PAUSE_MAX: u32 = 4;

/// Hashes passwords one per core at a time, behind a bounded queue.
pub struct Passwords {
    queue: Arc<JobQueue>,
    threads: usize,
    metrics: Arc<Metrics>,
}

struct JobQueue {
    state: Mutex<State>,
    changed: Condvar,
    capacity: usize,
    /// Requests with a token so far.
    requests: AtomicU64,
}

#[derive(Default)]
struct State {
    /// Oldest first.
    jobs: VecDeque<(Instant, Job)>,
    closed: bool,
}

type Job = Box<dyn FnOnce(&Argon2<'static>) + Send>;

#[derive(thiserror::Error, Debug)]
pub enum HashError {
    #[error("the queue is full")]
    QueueFull,
    #[error("hashing panicked")]
    Panicked,
    #[error("argon2: {0}")]
    Argon2(#[from] argon2::password_hash::Error),
    #[error("the stored hash does not parse: {0}")]
    StoredHash(argon2::password_hash::phc::Error),
}

impl Passwords {
    pub fn start(metrics: Arc<Metrics>) -> Result<Self, std::io::Error> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let queue = Arc::new(JobQueue::new(QUEUE_PER_CORE * cores));
        for number in 0..cores {
            queue.spawn_worker(&format!("argon2-{number}"), Duration::ZERO)?;
        }
        queue.spawn_worker("argon2-starved", STARVED_AFTER)?;
        Ok(Self { queue, threads: cores + 1, metrics })
    }

    /// The most passwords that may be hashed or wait at once.
    pub fn capacity(&self) -> usize {
        self.queue.capacity + self.threads
    }

    /// Makes hashing yield to a request with a token that has just arrived.
    pub fn note_authenticated_request(&self) {
        self.queue.note_request();
    }

    /// The password's hash in PHC form.
    pub async fn hash(&self, password: String) -> Result<String, HashError> {
        let password = canonical(&password).into_owned();
        let hash =
            self.run(move |argon2| argon2.hash_password(password.as_bytes()).map(|hash| hash.to_string()));
        Ok(hash.await??)
    }

    /// True if the password is the one that was hashed. Without a hash it takes the same time and is false.
    pub async fn verify(&self, password: String, hash: Option<String>) -> Result<bool, HashError> {
        let canonical = canonical(&password).into_owned();
        // Older releases hashed the text as it was given. The second comparison is a job of its own, so that a thread
        // pauses between the two; whether it is made depends on the text alone, not on the user.
        let may_be_old = canonical != password && password.chars().count() <= *PASSWORD_LENGTH.end();
        if !may_be_old {
            return self.compare(canonical, hash).await;
        }
        Ok(self.compare(canonical, hash.clone()).await? || self.compare(password, hash).await?)
    }

    async fn compare(&self, password: String, hash: Option<String>) -> Result<bool, HashError> {
        self.run(move |argon2| {
            let known = hash.is_some();
            let hash = hash.as_deref().unwrap_or(UNKNOWN_USER_HASH);
            let hash = PasswordHash::new(hash).map_err(HashError::StoredHash)?;
            Ok(argon2.verify_password(password.as_bytes(), &hash).is_ok() && known)
        })
        .await?
    }

    async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&Argon2<'static>) -> T + Send + 'static,
    ) -> Result<T, HashError> {
        let (answer, answered) = oneshot::channel();
        let waiting = self.metrics.hashing_started();
        let span = trace::work("hash password");
        let hashed = span.clone();
        let job: Job = Box::new(move |argon2| {
            let _waiting = waiting;
            if let Some(span) = hashed {
                span.event("taken from the queue");
            }
            // A request that was cancelled needs no hash.
            if !answer.is_closed() {
                answer.send(job(argon2)).ok();
            }
        });
        if !self.queue.push(job) {
            return Err(HashError::QueueFull);
        }
        let answer = answered.await.map_err(|_| HashError::Panicked);
        if let Some(span) = span {
            if answer.is_err() {
                span.fail("panic");
            }
            span.end();
        }
        answer
    }
}

/// How many characters a password counts as.
pub(crate) fn password_length(password: &str) -> usize {
    canonical(password).chars().count()
}

/// The form in which a password is hashed. What is too long in every form is left as it is: normalising a large text of
/// hostile marks has a price.
fn canonical(password: &str) -> Cow<'_, str> {
    let longest = PASSWORD_LENGTH.end() * text::NFC_SHRINKS_MAX;
    if password.chars().nth(longest).is_some() { Cow::Borrowed(password) } else { text::nfc(password) }
}

impl JobQueue {
    fn new(capacity: usize) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), capacity, requests: AtomicU64::new(0) }
    }

    /// The thread takes only jobs that have waited for `min_wait`; without one it has a low priority.
    fn spawn_worker(self: &Arc<Self>, name: &str, min_wait: Duration) -> Result<(), std::io::Error> {
        let queue = Arc::clone(self);
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            if min_wait.is_zero() {
                lower_priority();
            }
            work(&queue, min_wait);
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
        // Wakes all threads: a single one might not be allowed to take the job yet.
        self.changed.notify_all();
        true
    }

    /// The oldest job, once it has waited for `min_wait`; `None` when the queue is closed and empty.
    fn next(&self, min_wait: Duration) -> Option<Job> {
        let mut state = self.lock();
        loop {
            let wait = state.jobs.front().map(|(since, _)| min_wait.saturating_sub(since.elapsed()));
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

    fn note_request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
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

/// Runs one job after another until the queue is closed.
fn work(queue: &JobQueue, min_wait: Duration) {
    let (memory_kib, passes, lanes) = ARGON2_PARAMS;
    let params = Params::new(memory_kib, passes, lanes, None).unwrap_or_default();
    let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
    while let Some(job) = queue.next(min_wait) {
        let (began, before) = (Instant::now(), queue.requests.load(Ordering::Relaxed));
        // A panic must cost one request, not the thread.
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job(&argon2))).is_err() {
            tracing::error!("hashing a password panicked");
        }
        let requests = queue.requests.load(Ordering::Relaxed) - before;
        std::thread::sleep(pause(began.elapsed(), requests));
    }
}

/// How long a thread pauses after a hash during which this many requests with a token arrived.
fn pause(hash: Duration, requests: u64) -> Duration {
    let requests = u32::try_from(requests).unwrap_or(u32::MAX);
    PAUSE_PER_REQUEST.saturating_mul(requests).min(hash * PAUSE_MAX)
}

/// Every process may do this to its own threads. On other systems than Linux, or in a sandbox that forbids it, hashing has
/// the ordinary priority.
fn lower_priority() {
    #[cfg(target_os = "linux")]
    {
        use thread_priority::{NormalThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy, unix};
        let idle = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle);
        let this = unix::thread_native_id();
        if let Err(error) = unix::set_thread_priority_and_policy(this, ThreadPriority::Min, idle) {
            tracing::warn!(?error, "password hashing runs with ordinary priority");
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

    fn queue_with_a_job(capacity: usize) -> JobQueue {
        let queue = JobQueue::new(capacity);
        assert!(queue.push(Box::new(|_| ())));
        queue
    }

    #[test]
    fn a_full_queue_refuses_jobs() {
        let queue = queue_with_a_job(1);
        assert!(!queue.push(Box::new(|_| ())));
        assert!(queue.next(Duration::ZERO).is_some());
        assert!(queue.push(Box::new(|_| ())));
    }

    #[test]
    fn the_pause_grows_with_the_requests_up_to_a_bound() {
        let hash = Duration::from_millis(10);
        assert_eq!(pause(hash, 0), Duration::ZERO);
        assert_eq!(pause(hash, 4), Duration::from_millis(2));
        for many in [80, 1_000_000, u64::MAX] {
            assert_eq!(pause(hash, many), Duration::from_millis(40));
        }
    }

    #[test]
    fn a_starved_job_is_taken_in_the_end() {
        let queue = queue_with_a_job(1);
        let came = Instant::now();
        assert!(queue.next(STARVED_AFTER).is_some());
        assert!(came.elapsed() >= STARVED_AFTER - Duration::from_millis(5));
    }

    #[test]
    fn the_threads_end_with_the_queue() {
        let queue = JobQueue::new(1);
        queue.close();
        for min_wait in [Duration::ZERO, STARVED_AFTER] {
            assert!(queue.next(min_wait).is_none());
        }
    }

    #[test]
    fn the_hash_for_unknown_users_has_the_same_parameters() {
        let unknown = PasswordHash::new(UNKNOWN_USER_HASH).expect("a valid PHC string");
        let params = Params::try_from(&unknown).expect("argon2 parameters");
        let expected = Params::new(ARGON2_PARAMS.0, ARGON2_PARAMS.1, ARGON2_PARAMS.2, None).expect("valid");
        assert_eq!((params.m_cost(), params.t_cost(), params.p_cost()), (expected.m_cost(), 2, 1));
        assert_eq!(unknown.hash.map(|hash| hash.len()), Some(32));
    }
}
