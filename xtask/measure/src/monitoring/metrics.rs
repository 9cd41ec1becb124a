//! The metrics in an expression, whose syntax Prometheus's own parser checks.

use std::collections::BTreeSet;

/// What looks like a name and is none.
const WORDS: [&str; 15] = [
    "and",
    "or",
    "unless",
    "by",
    "without",
    "on",
    "ignoring",
    "group_left",
    "group_right",
    "offset",
    "bool",
    "inf",
    "nan",
    "atan2",
    "start",
];

/// The names outside of labels, strings and functions.
pub(super) fn of(expr: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut rest = expr;
    while let Some(first) = rest.chars().next() {
        let length = match first {
            '"' | '\'' | '`' => rest[1..].find(first).map_or(rest.len(), |end| end + 2),
            '{' => closing(rest, '}'),
            '[' => closing(rest, ']'),
            _ if first.is_ascii_digit() => word_length(rest),
            _ if is_part(first) => {
                let length = word_length(rest);
                let (word, after) = rest.split_at(length);
                let after = after.trim_start();
                let called =
                    after.starts_with('(') || ["by", "without"].contains(&&after[..word_length(after)]);
                if !called && !WORDS.contains(&word) {
                    names.insert(word.to_owned());
                }
                // The labels that follow are none either.
                let labels = ["by", "without", "on", "ignoring", "group_left", "group_right"].contains(&word);
                let skipped = if labels && after.starts_with('(') { closing(after, ')') } else { 0 };
                rest.len() - after.len() + skipped
            }
            _ => first.len_utf8(),
        };
        rest = &rest[length..];
    }
    names
}

fn is_part(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == ':'
}

fn word_length(text: &str) -> usize {
    text.find(|c| !is_part(c)).unwrap_or(text.len())
}

/// Up to and with this character, not counting those in strings.
fn closing(text: &str, end: char) -> usize {
    let mut quoted = false;
    let found = text.find(|c| {
        quoted ^= c == '"';
        c == end && !quoted
    });
    found.map_or(text.len(), |found| found + 1)
}

#[cfg(test)]
mod tests {
    use super::of;

    fn names(expr: &str) -> Vec<String> {
        of(expr).into_iter().collect()
    }

    #[test]
    fn metrics_are_told_from_functions_labels_and_words() {
        assert_eq!(names(r#"sum by (le, pod) (rate(a_bucket{x="}", y=~"b(c)"}[5m])) / 1e3"#), ["a_bucket"]);
        assert_eq!(names("max(ns:a:rate5m{}) or vector(0)"), ["ns:a:rate5m"]);
        assert_eq!(names("sum(a) by (b) unless on (c) d offset 5m"), ["a", "d"]);
        assert_eq!(names("count(a < bool b) and on (x, y) group_left (z) c"), ["a", "b", "c"]);
        assert_eq!(names("time() - a"), ["a"]);
    }
}
