//! All that the service asks of Postgres and Redis, by fixed names, so that each call can be timed and traced.

/// A call, whatever its parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// The writer's statement: a batch of messages.
    StoreMessages,
    ReadMessages,
    /// By id or by name.
    FindUser,
    /// What a login is checked against.
    FindCredentials,
    /// Whether a name or an address is taken.
    CheckTaken,
    InsertUser,
    /// What readiness stands on.
    CheckSchema,
    SuspendWindows,
    DeleteExpiredKeys,
    /// Counts a request against a rate limit.
    CountAttempt,
    LookUpWindow,
    /// Asks for the right to store a window.
    ClaimWindow,
    SettleWindow,
    AppendWindow,
}

impl Call {
    /// In the order of declaration, so that one is the index of its neighbours in any table of them.
    pub const ALL: [Self; 14] = [
        Self::StoreMessages,
        Self::ReadMessages,
        Self::FindUser,
        Self::FindCredentials,
        Self::CheckTaken,
        Self::InsertUser,
        Self::CheckSchema,
        Self::SuspendWindows,
        Self::DeleteExpiredKeys,
        Self::CountAttempt,
        Self::LookUpWindow,
        Self::ClaimWindow,
        Self::SettleWindow,
        Self::AppendWindow,
    ];

    /// As the semantic conventions call it.
    pub fn system(self) -> &'static str {
        if (self as usize) < Self::CountAttempt as usize { "postgresql" } else { "redis" }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::StoreMessages => "store_messages",
            Self::ReadMessages => "read_messages",
            Self::FindUser => "find_user",
            Self::FindCredentials => "find_credentials",
            Self::CheckTaken => "check_taken",
            Self::InsertUser => "insert_user",
            Self::CheckSchema => "check_schema",
            Self::SuspendWindows => "suspend_windows",
            Self::DeleteExpiredKeys => "delete_expired_keys",
            Self::CountAttempt => "count_attempt",
            Self::LookUpWindow => "look_up_window",
            Self::ClaimWindow => "claim_window",
            Self::SettleWindow => "settle_window",
            Self::AppendWindow => "append_window",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_stands_at_its_own_place() {
        for (place, call) in Call::ALL.into_iter().enumerate() {
            assert_eq!(call as usize, place);
        }
        assert_eq!(Call::DeleteExpiredKeys.system(), "postgresql");
        assert_eq!(Call::CountAttempt.system(), "redis");
    }
}
