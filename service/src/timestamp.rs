//! The one rendering of a time in JSON: RFC 3339 in UTC, with six digits after the second.
//!
//! Six, because Postgres stores microseconds. Always six, so that texts sort like the times they stand for, and a client's
//! parser meets one form only.

use serde::Serializer;
use serde::ser::Error as _;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;
use time::{OffsetDateTime, UtcOffset};

/// Parsed by the compiler.
const FORMAT: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z");

const LENGTH: usize = "2026-01-31T12:00:00.123456Z".len();

/// For `#[serde(serialize_with = "...")]`. On the path of each message, so it writes to the stack.
pub(crate) fn serialize<S: Serializer>(at: &OffsetDateTime, serializer: S) -> Result<S::Ok, S::Error> {
    let mut text = [0; LENGTH];
    at.to_offset(UtcOffset::UTC).format_into(&mut &mut text[..], &FORMAT).map_err(S::Error::custom)?;
    serializer.serialize_str(std::str::from_utf8(&text).map_err(S::Error::custom)?)
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    fn rendered(at: OffsetDateTime) -> String {
        #[derive(serde::Serialize)]
        struct At(#[serde(serialize_with = "serialize")] OffsetDateTime);
        serde_json::to_string(&At(at)).expect("a time")
    }

    #[test]
    fn a_time_has_six_digits_after_the_second_and_is_utc() {
        for (at, expected) in [
            (datetime!(2026-01-31 12:00:00.123456 UTC), "2026-01-31T12:00:00.123456Z"),
            (datetime!(2026-01-31 12:00:00.12 UTC), "2026-01-31T12:00:00.120000Z"),
            (datetime!(2026-01-31 12:00:00 UTC), "2026-01-31T12:00:00.000000Z"),
            (datetime!(2026-01-31 12:00:00.000001 UTC), "2026-01-31T12:00:00.000001Z"),
            // What is below a microsecond is cut off, never rounded up into the next second.
            (datetime!(2026-12-31 23:59:59.999_999_999 UTC), "2026-12-31T23:59:59.999999Z"),
            (datetime!(2026-01-01 00:30:00 +01:00), "2025-12-31T23:30:00.000000Z"),
            (datetime!(0001-01-01 00:00:00 UTC), "0001-01-01T00:00:00.000000Z"),
            (datetime!(9999-12-31 23:59:59.5 UTC), "9999-12-31T23:59:59.500000Z"),
        ] {
            assert_eq!(rendered(at), format!("\"{expected}\""));
        }
    }
}
