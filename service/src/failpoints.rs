//! Failpoints: faults that the service injects into itself, to show that the history checker finds them. They exist
//! only in a debug build with the feature `failpoints`, where `CHAT_FAILPOINT` names one. Elsewhere [`is_on`] is `false`.

#[cfg(all(feature = "failpoints", not(debug_assertions)))]
compile_error!("the feature `failpoints` breaks the service on purpose: a release must not have it");

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "failpoints", derive(strum::IntoStaticStr), strum(serialize_all = "kebab-case"))]
pub enum Failpoint {
    /// The writer does not append to the windows, and does not wait for the leases either.
    SkipInvalidation,
    /// The writer acknowledges before it commits.
    AckBeforeCommit,
    /// A reader that may not fill the window does not drop an older one either.
    SkipSettle,
    /// Nothing waits for leases to expire while Redis is unavailable.
    SkipWait,
    /// A window without a lease counts as complete.
    TrustExpiredLease,
    /// Leases are granted although a replica has suspended the windows.
    IgnoreSuspension,
    /// A replayed message is acknowledged without an append to its window.
    SkipReplay,
    /// Idempotency keys are ignored.
    IgnoreKey,
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
