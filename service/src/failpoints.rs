//! Failpoints: faults that the service injects into itself, to show that the history checker finds them. They exist
//! only in a debug build with the feature `failpoints`, where `CHAT_FAILPOINT` names one. Elsewhere [`is_on`] is `false`.

#[cfg(all(feature = "failpoints", not(debug_assertions)))]
compile_error!("the feature `failpoints` breaks the service on purpose: a release must not have it");

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "failpoints", derive(strum::IntoStaticStr), strum(serialize_all = "kebab-case"))]
pub enum Failpoint {
    /// The writer neither appends to the windows nor waits until none is used.
    SkipInvalidation,
    /// The writer acknowledges before it commits.
    AckBeforeCommit,
    /// Idempotency keys are ignored.
    IgnoreKey,
    /// A replayed message is acknowledged without an append to its window.
    SkipReplay,
    /// A reader that may not fill the window does not drop an older one either.
    SkipSettle,
    /// A reader fills the window although its right to do so was withdrawn.
    IgnoreToken,
    /// Nothing waits until windows that lack a message are out of use.
    SkipWait,
    /// A permission never expires.
    TrustExpiredPermission,
    /// A new connection to Redis inherits the permission of the one before.
    KeepPermissionOverReconnect,
    /// Windows are used although a replica has suspended them.
    IgnoreSuspension,
    /// Windows of before a suspension are used after it.
    IgnoreEpoch,
    /// Any Redis counts as the one that has the windows.
    IgnoreRedisIdentity,
    /// The writer announces nothing to the streams.
    SkipWakeUp,
    /// It announces before it commits, and not after.
    PublishBeforeCommit,
    /// Streams depend on announcements: nothing looks for what was not announced.
    IgnoreGapCheck,
    /// A stream resumes a little behind its position.
    ResumeTooEarly,
    /// A stream resumes a little ahead of its position.
    ResumeTooLate,
}

#[cfg(not(feature = "failpoints"))]
pub const fn is_on(_: Failpoint) -> bool {
    false
}

#[cfg(feature = "failpoints")]
pub fn is_on(failpoint: Failpoint) -> bool {
    static NAMED: std::sync::LazyLock<String> =
        std::sync::LazyLock::new(|| std::env::var("CHAT_FAILPOINT").unwrap_or_default());
    *NAMED == <&str>::from(failpoint)
}
