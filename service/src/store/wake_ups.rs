//! Announcements among replicas, through Redis: whose messages were just committed. They may get lost; nothing but a delay
//! depends on them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use deadpool_redis::redis::{PushInfo, PushKind, Value};
use tokio::sync::{Mutex, Notify, mpsc, watch};
use uuid::Uuid;

use super::redis::{Pushes, Redis};

/// Announcements on their way, so that a burst of messages does not become as many commands at once. Those that do not fit
/// are for the comparison with Postgres.
const QUEUE_MAX: usize = 256;

/// Users in one announcement: a batch's, more or less.
const USERS_MAX: usize = 512;

/// Between two attempts to subscribe.
const RETRY: Duration = Duration::from_millis(500);

const ID_BYTES: usize = 16;

pub(crate) struct WakeUps {
    redis: Arc<Redis>,
    /// Begins what this process announces, which it need not hear.
    own: Uuid,
    outgoing: mpsc::Sender<Vec<Uuid>>,
    queue: Mutex<mpsc::Receiver<Vec<Uuid>>>,
    heard: mpsc::Sender<Vec<Uuid>>,
    hearing: Mutex<mpsc::Receiver<Vec<Uuid>>>,
    /// Nobody listens before there is a stream.
    wanted: watch::Sender<bool>,
    listening: AtomicBool,
    reconnected: Notify,
}

impl WakeUps {
    pub(crate) fn new(redis: Arc<Redis>) -> Arc<Self> {
        let (outgoing, queue) = mpsc::channel(QUEUE_MAX);
        let (heard, hearing) = mpsc::channel(QUEUE_MAX);
        Arc::new(Self {
            redis,
            own: Uuid::new_v4(),
            outgoing,
            queue: Mutex::new(queue),
            heard,
            hearing: Mutex::new(hearing),
            wanted: watch::Sender::new(false),
            listening: AtomicBool::new(false),
            reconnected: Notify::new(),
        })
    }

    /// Announces new messages of these users to the other replicas, without a wait.
    pub(crate) fn publish(&self, users: Vec<Uuid>) {
        self.outgoing.try_send(users).ok();
    }

    /// Has other replicas' announcements be heard from now on.
    pub(crate) fn want(&self) {
        self.wanted.send_if_modified(|wanted| !std::mem::replace(wanted, true));
    }

    /// Users whose messages another replica has announced.
    pub(crate) async fn next(&self) -> Vec<Uuid> {
        match self.hearing.lock().await.recv().await {
            Some(users) => users,
            // This holds a sender itself.
            None => std::future::pending().await,
        }
    }

    /// True while announcements of other replicas arrive here.
    pub(crate) fn is_listening(&self) -> bool {
        self.listening.load(Ordering::Relaxed)
    }

    /// Returns when they arrive again, because some may have been lost, or arrive no more.
    pub(crate) async fn reconnected(&self) {
        self.reconnected.notified().await;
    }

    /// Sends what is to be announced, until the process ends.
    pub(crate) async fn send(self: Arc<Self>) {
        let mut queue = self.queue.lock().await;
        let mut batches = Vec::new();
        while queue.recv_many(&mut batches, QUEUE_MAX).await > 0 {
            let mut users: Vec<Uuid> = batches.drain(..).flatten().collect();
            users.sort_unstable();
            users.dedup();
            let Some(live) = self.redis.live() else { continue };
            for users in users.chunks(USERS_MAX) {
                let ids = std::iter::once(&self.own).chain(users);
                let payload: Vec<u8> = ids.flat_map(|id| *id.as_bytes()).collect();
                self.redis.publish(&live, &payload).await;
            }
        }
    }

    /// Listens until the process ends. It begins anew whenever Redis was unavailable.
    pub(crate) async fn listen(self: Arc<Self>) {
        self.wanted.subscribe().wait_for(|wanted| *wanted).await.ok();
        let mut unavailable = self.redis.watch_unavailable();
        loop {
            if unavailable.wait_for(|unavailable| !*unavailable).await.is_err() {
                return;
            }
            let (sender, mut pushed) = mpsc::channel(QUEUE_MAX);
            match self.redis.subscribe(Pushes(sender)).await {
                Ok(_subscription) => {
                    self.listening.store(true, Ordering::Relaxed);
                    self.reconnected.notify_one();
                    tokio::select! {
                        () = self.hear(&mut pushed) => {}
                        _ = unavailable.wait_for(|unavailable| *unavailable) => {}
                    }
                    self.listening.store(false, Ordering::Relaxed);
                    // Who waits has to ask more often from now on.
                    self.reconnected.notify_one();
                }
                Err(error) => tracing::debug!(%error, "announcements of other replicas are not heard"),
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Returns when the connection is lost.
    async fn hear(&self, pushed: &mut mpsc::Receiver<PushInfo>) {
        while let Some(push) = pushed.recv().await {
            match push.kind {
                PushKind::Disconnection => return,
                PushKind::Message | PushKind::SMessage => {
                    if let Some(Value::BulkString(payload)) = push.data.last()
                        && let Some(users) = self.users(payload)
                    {
                        self.heard.send(users).await.ok();
                    }
                }
                _ => {}
            }
        }
    }

    /// The users that another process announces.
    fn users(&self, payload: &[u8]) -> Option<Vec<Uuid>> {
        let (own, users) = payload.split_at_checked(ID_BYTES)?;
        if own == self.own.as_bytes() {
            return None;
        }
        users.chunks(ID_BYTES).map(|id| Uuid::from_slice(id).ok()).collect()
    }
}

impl std::fmt::Debug for WakeUps {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("WakeUps").field("listening", &self.is_listening()).finish_non_exhaustive()
    }
}
