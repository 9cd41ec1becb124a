//! Streams: every message that a user sends or receives, as it is committed, exactly once, on any replica.
//!
//! # Positions
//!
//! A position is a snapshot of Postgres: the set of transactions that had committed at one moment. Each message carries the
//! transaction that stored it (`messages.xact`). What a client lacks is what its position does not see and Postgres shows
//! now. Nothing has to be locked or counted for it when a message is sent, and it does not matter in which order
//! transactions commit: one that was running when the position was taken is named in it.
//!
//! In one conversation the messages that a snapshot does not see are always the newest ones, because the statement that
//! stores a message waits for the lock of the conversation's row, and so begins to store only when the one before has
//! committed. So what is delivered in the order of seq leaves no gap, across any number of snapshots.
//!
//! A position can lie between two snapshots: then it names both, and the last message delivered in the order of
//! conversation and seq. So a client that breaks off anywhere resumes behind the last message that it got.
//!
//! Transaction numbers mean something only to the server that counts them. A position names the server and its timeline,
//! which changes with a failover. After that, and in a database that was restored elsewhere, it is refused, and the client
//! reloads.
//!
//! # Delivery
//!
//! One task per replica, the [`tail`], keeps a snapshot. It asks Postgres for what the snapshot does not see, gives that to
//! the [`mailbox`] of each stream that it concerns, and keeps the newer snapshot. It asks when something was announced: by
//! this replica's writers, directly, or by others', through Redis. An announcement says only whose messages there are, so
//! nothing depends on it but the delay. The tail asks every few seconds anyway.
//!
//! *Why no message is missed or doubled.* A stream first opens its mailbox, and then takes its snapshot, or reads what it
//! missed, in a statement that begins later. So its own snapshot sees all that the tail's saw when the mailbox was opened,
//! and whatever it does not see comes into the mailbox. Of that it drops what its own snapshot sees. A mailbox holds few
//! messages; when there are more, or the tail cannot tell, it is emptied and marked, and the stream reads from Postgres from
//! its own position on.
//!
//! *Rejected*: a number per user, counted in the statement that stores a message (two more rows to lock and write for each
//! message, and senders to one user wait for one another); a sequence (its numbers commit out of order); the write-ahead log
//! (a slot that holds it back when nobody reads).
//!
//! # Erased messages
//!
//! When the messages of a deleted user in a conversation have lost their content, the peer gets one event. It comes from a
//! row with its transaction (`erased_conversations.xact`), found and delivered like a message, after those of its conversation.

mod catch_up;
mod erased;
mod mailbox;
mod position;
mod registry;
mod start;
mod stream;
mod tail;

pub(crate) use self::registry::Streams;
pub(crate) use self::stream::{Event, Request, Stream, StreamError};
pub(crate) use self::tail::follow;
