//! The shipped rules on a faster clock: every time window is divided by one factor, and nothing else changes.
//!
//! | in the rules | in a drill | |
//! | --- | --- | --- |
//! | 5 m, the shortest window of a burn rate | 2.5 s | five scrapes |
//! | 30 m | 15 s | |
//! | 1 h | 30 s | |
//! | 6 h, after which the slowest burn rate is forgotten | 180 s | it sets the length of a drill |
//! | 3 d | 36 min | longer than a drill: it holds all that happened in it, as 3 d hold an incident |
//! | `for: 5m` | 2.5 s | ten evaluations |
//!
//! A share of errors, a rate and a latency do not depend on the length of the window, so the thresholds stay as they are.
//! How far back Prometheus looks for the newest sample is not scaled as much ([`LOOKBACK`]). A window under four scrapes
//! would make `rate` a matter of luck: the rules may have none, or the drill does not start.
//!
//! The service is not scaled: it still takes two seconds to notice that Postgres is unavailable.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// The factor of the faster clock.
pub const FACTOR: u32 = 120;

/// Of each replica.
pub const SCRAPE_INTERVAL: Duration = Duration::from_millis(500);

pub const EVALUATION_INTERVAL: Duration = Duration::from_millis(250);

const SCRAPES_MIN: u32 = 4;

/// How far back Prometheus looks for a sample. Its usual 5 minutes would be 2.5 s, and a busy machine may let no rule be
/// evaluated for longer: alerts would lose sight of what is recorded for them, and begin their `for` anew. What is really
/// gone is marked so by the next scrape, and found at once.
pub const LOOKBACK: Duration = Duration::from_secs(15);

/// Whether `key` means an alert of this name, with one of these labels if it names one.
pub fn is(key: &str, name: &str, labels: [&str; 2]) -> bool {
    match key.split_once(' ') {
        None => key == name,
        Some((its_name, which)) => its_name == name && labels.contains(&which),
    }
}

/// The files with every window scaled, below `to`.
pub fn write(files: &[PathBuf], to: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(to).with_context(|| format!("create {}", to.display()))?;
    let mut written = Vec::new();
    for file in files {
        let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
        let scaled = scale(&text).with_context(|| format!("scale {}", file.display()))?;
        let path = to.join(file.file_name().context("a file name")?);
        fs::write(&path, scaled).with_context(|| format!("write {}", path.display()))?;
        written.push(path);
    }
    Ok(written)
}

/// A rule file on the faster clock.
fn scale(text: &str) -> Result<String> {
    let mut scaled = String::with_capacity(text.len());
    for line in text.lines() {
        let (indent, rest) = line.split_at(line.len() - line.trim_start().len());
        scaled += indent;
        let key = ["for: ", "keep_firing_for: ", "interval: "].iter().find_map(|key| {
            let dash = if rest.starts_with("- ") { "- " } else { "" };
            Some((dash, *key, rest[dash.len()..].strip_prefix(key)?))
        });
        match key {
            Some((dash, key, value)) => {
                let value = value.split('#').next().unwrap_or_default().trim();
                let duration = parse(value).with_context(|| format!("not a duration: {rest}"))?;
                scaled += &format!("{dash}{key}{}", render(faster(duration)));
            }
            None => scaled += &scale_expression(rest)?,
        }
        scaled.push('\n');
    }
    Ok(scaled)
}

/// Every `[5m]`, `[1h:5m]` and `offset 5m`.
fn scale_expression(line: &str) -> Result<String> {
    let mut scaled = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(open) = rest.find(['[', 'o']) {
        let (before, from) = rest.split_at(open);
        scaled += before;
        if let Some(inside) = from.strip_prefix('[').and_then(|inside| Some(&inside[..inside.find(']')?])) {
            scaled += &scale_range(inside)?;
            rest = &from[inside.len() + 2..];
            continue;
        }
        if let Some(after) = from.strip_prefix("offset ") {
            let end = after.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(after.len());
            if let Some(duration) = parse(&after[..end]) {
                scaled += &format!("offset {}", render(faster(duration)));
                rest = &after[end..];
                continue;
            }
        }
        scaled.push_str(&from[..1]);
        rest = &from[1..];
    }
    Ok(scaled + rest)
}

fn scale_range(inside: &str) -> Result<String> {
    let (range, step) = match inside.split_once(':') {
        Some((range, step)) => (range, Some(step)),
        None => (inside, None),
    };
    let step_duration = step.filter(|step| !step.is_empty()).map(parse);
    let (Some(range), None | Some(Some(_))) = (parse(range), step_duration) else {
        // A class of characters, or a list in an annotation.
        return Ok(format!("[{inside}]"));
    };
    let range = faster(range);
    let least = SCRAPE_INTERVAL * SCRAPES_MIN;
    if range < least {
        bail!(
            "[{inside}] is {} in a drill, under {SCRAPES_MIN} scrapes: {} at least, or a smaller FACTOR",
            render(range),
            render(least * FACTOR)
        );
    }
    let step = match (step, step_duration.flatten()) {
        (Some(_), Some(step)) => format!(":{}", render(faster(step).max(EVALUATION_INTERVAL))),
        (Some(_), None) => ":".to_owned(),
        (None, _) => String::new(),
    };
    Ok(format!("[{}{step}]", render(range)))
}

fn faster(duration: Duration) -> Duration {
    duration / FACTOR
}

/// Prometheus's notation, such as `1h30m`.
fn parse(text: &str) -> Option<Duration> {
    const UNITS: [(&str, u64); 7] = [
        ("ms", 1),
        ("s", 1000),
        ("m", 60_000),
        ("h", 3_600_000),
        ("d", 86_400_000),
        ("w", 604_800_000),
        ("y", 31_536_000_000),
    ];
    let mut milliseconds = 0;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let (name, unit) = UNITS.iter().find(|(name, _)| rest.starts_with(name))?;
        milliseconds += number * unit;
        rest = &rest[name.len()..];
    }
    (!text.is_empty()).then(|| Duration::from_millis(milliseconds))
}

pub fn render(duration: Duration) -> String {
    match duration.as_millis() {
        milliseconds if milliseconds % 1000 == 0 => format!("{}s", milliseconds / 1000),
        milliseconds => format!("{milliseconds}ms"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_scaled_and_nothing_else() {
        let rules = "groups:\n  - name: x\n    interval: 30s\n    rules:\n      - alert: Burn\n        expr: |\n          \
                     rate(a{b=~\"[a-z]+\"}[1h30m]) > 0.5 and max_over_time(c[6h:5m] offset 5m) > on (d) 1\n        \
                     for: 2m # why\n        keep_firing_for: 5m\n";
        let scaled = "groups:\n  - name: x\n    interval: 250ms\n    rules:\n      - alert: Burn\n        expr: |\n          \
                      rate(a{b=~\"[a-z]+\"}[45s]) > 0.5 and max_over_time(c[180s:2500ms] offset 2500ms) > on (d) 1\n        \
                      for: 1s\n        keep_firing_for: 2500ms\n";
        assert_eq!(scale(rules).expect("valid rules"), scaled);
    }

    #[test]
    fn a_window_that_would_hold_too_few_scrapes_is_refused() {
        let error = scale("expr: rate(a[1m])\n").expect_err("half a second");
        assert!(format!("{error:#}").contains("[1m]"), "{error:#}");
    }
}
