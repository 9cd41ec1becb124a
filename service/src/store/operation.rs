//! The names of all operations on Postgres and Redis, by which they are timed and traced.

use strum::VariantArray as _;

use crate::telemetry::metrics::OperationName;

/// An operation, whatever its parameters. Its name in metrics and spans is the variant's in snake case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Operation {
    /// The writer's statement: a batch of messages.
    StoreMessages,
    ReadMessages,
    /// By id or by name.
    FindUser,
    /// What a login is checked against.
    FindCredentials,
    /// Whether a username or an email address is taken.
    CheckTaken,
    InsertUser,
    BeginSession,
    FindSession,
    RotateRefreshToken,
    ListSessions,
    EndSessions,
    ChangePassword,
    /// What an operator does to a user.
    ChangeUser,
    DeleteUser,
    /// Waits for the statements that may not have seen a change.
    AwaitWriters,
    /// What readiness depends on.
    CheckSchema,
    /// What the permission to use the windows depends on: an epoch, a suspension, deleted users.
    ReadPermission,
    /// Suspends the windows, or names the Redis that has them.
    ChangePermission,
    /// Whether windows lack a message.
    CheckWindows,
    /// A user's conversations.
    ListConversations,
    /// Where a stream begins.
    ReadPosition,
    /// What was committed since, for all streams.
    ReadNewMessages,
    /// What one stream lacks.
    ReadMissedMessages,
    DeleteExpiredKeys,
    DeleteOldDeletions,
    DeleteUnusedSessions,
    DeleteEndedSessions,
    /// The hours by which conversations are listed.
    NoteActiveHours,
    DeleteOldCounts,
    Block,
    Unblock,
    ListBlocks,
    /// Takes the lease of an export.
    BeginExport,
    ExtendExport,
    EndExport,
    /// A page of an export, without messages.
    ReadExport,
    /// Which replica removes old messages, and how far it has come.
    TakeRetentionTurn,
    FindOldMessages,
    DeleteOldMessages,
    DeleteReservedNames,
    DeleteErasedConversations,
    /// A deleted user of whom something is left.
    FindErasure,
    DeleteKeysOfUser,
    /// In which conversations a deleted user's messages are.
    ListErasure,
    EraseMessages,
    FinishErasure,
    /// Counts a request against a rate limit.
    CountAttempt,
    /// Which Redis it is.
    IdentifyRedis,
    LookUpWindow,
    /// Asks for the right to fill a window.
    ClaimWindow,
    SettleWindow,
    AppendWindow,
    /// Gives windows that lack nothing another while.
    ExtendWindow,
    /// Deletes a window whose messages were erased.
    ForgetWindow,
    /// Tells other replicas of new messages.
    Announce,
}

impl Operation {
    /// The name of every operation, at the index of its variant.
    pub fn names() -> impl Iterator<Item = OperationName> {
        Self::VARIANTS.iter().map(|operation| operation.name())
    }

    pub fn name(self) -> OperationName {
        OperationName { index: self as usize, system: self.system(), operation: self.into() }
    }

    /// The database system, as the semantic conventions call it.
    fn system(self) -> &'static str {
        match self {
            Self::StoreMessages
            | Self::ReadMessages
            | Self::FindUser
            | Self::FindCredentials
            | Self::CheckTaken
            | Self::InsertUser
            | Self::BeginSession
            | Self::FindSession
            | Self::RotateRefreshToken
            | Self::ListSessions
            | Self::EndSessions
            | Self::ChangePassword
            | Self::ChangeUser
            | Self::DeleteUser
            | Self::AwaitWriters
            | Self::CheckSchema
            | Self::ReadPermission
            | Self::ChangePermission
            | Self::CheckWindows
            | Self::ListConversations
            | Self::ReadPosition
            | Self::ReadNewMessages
            | Self::ReadMissedMessages
            | Self::DeleteExpiredKeys
            | Self::DeleteOldDeletions
            | Self::DeleteUnusedSessions
            | Self::DeleteEndedSessions
            | Self::NoteActiveHours
            | Self::DeleteOldCounts
            | Self::Block
            | Self::Unblock
            | Self::ListBlocks
            | Self::BeginExport
            | Self::ExtendExport
            | Self::EndExport
            | Self::ReadExport
            | Self::TakeRetentionTurn
            | Self::FindOldMessages
            | Self::DeleteOldMessages
            | Self::DeleteReservedNames
            | Self::DeleteErasedConversations
            | Self::FindErasure
            | Self::DeleteKeysOfUser
            | Self::ListErasure
            | Self::EraseMessages
            | Self::FinishErasure => "postgresql",
            Self::CountAttempt
            | Self::IdentifyRedis
            | Self::LookUpWindow
            | Self::ClaimWindow
            | Self::SettleWindow
            | Self::AppendWindow
            | Self::ExtendWindow
            | Self::ForgetWindow
            | Self::Announce => "redis",
        }
    }
}
