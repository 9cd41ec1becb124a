//! Ways to break the service on purpose, to show that the history checker notices. They exist only in a debug
//! build with the feature `sabotage`, where `CHAT_SABOTAGE` names one; everywhere else this is `false`.

#[cfg(all(feature = "sabotage", not(debug_assertions)))]
compile_error!("the feature `sabotage` breaks the service on purpose: a release must not have it");

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// The writer leaves the windows alone, and does not wait either.
    SkipInvalidation,
    /// The writer answers, and commits a moment later.
    AckBeforeCommit,
    /// A reader without the right to store does not make sure that no window shows less.
    SkipSettle,
    /// Without Redis, nobody waits for leases to end.
    SkipWait,
    /// A list without a lease is good enough.
    TrustExpiredLease,
    /// Leases are granted although a replica has suspended the windows.
    IgnoreSuspension,
    /// A repeated key is answered without a look at the window.
    SkipReplay,
    /// Idempotency keys are not heeded.
    IgnoreKey,
}

#[cfg(not(feature = "sabotage"))]
pub const fn is_on(_: Sabotage) -> bool {
    false
}

#[cfg(feature = "sabotage")]
pub fn is_on(sabotage: Sabotage) -> bool {
    static NAMED: std::sync::LazyLock<String> =
        std::sync::LazyLock::new(|| std::env::var("CHAT_SABOTAGE").unwrap_or_default());
    *NAMED
        == match sabotage {
            Sabotage::SkipInvalidation => "skip-invalidation",
            Sabotage::AckBeforeCommit => "ack-before-commit",
            Sabotage::SkipSettle => "skip-settle",
            Sabotage::SkipWait => "skip-wait",
            Sabotage::TrustExpiredLease => "trust-expired-lease",
            Sabotage::IgnoreSuspension => "ignore-suspension",
            Sabotage::SkipReplay => "skip-replay",
            Sabotage::IgnoreKey => "ignore-key",
        }
}
