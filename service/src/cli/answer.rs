//! What the subcommands that are clients of the API share: addresses, and what an answer says.

use anyhow::{Context as _, Result, bail};
use reqwest::Url;
use serde_json::Value;

/// How much of an unexpected answer is shown.
const EXCERPT_CHARS: usize = 200;

/// An answer, read to its end.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) url: Url,
    pub(super) status: u16,
    pub(super) retry_after: Option<String>,
    pub(super) body: String,
}

impl Answer {
    /// The answer's JSON, if its status is this one.
    pub(super) fn expect(&self, expected: u16) -> Result<Value> {
        let Self { url, status, retry_after, body } = self;
        let json = serde_json::from_str::<Value>(body).ok();
        match json {
            Some(json) if *status == expected => return Ok(json),
            _ if *status == expected => bail!(
                "{url} answers, but not as chat-service does: correct --url; it says {:?}",
                excerpt(body)
            ),
            _ => {}
        }
        let detail = json.and_then(|problem| problem["detail"].as_str().map(str::to_owned));
        let detail = detail.unwrap_or_else(|| excerpt(body));
        match (status, retry_after) {
            (429, seconds) => bail!(
                "{url} answers 429, over a rate limit: repeat this in {} s, or raise *_RATE_LIMIT_PER_MINUTE",
                seconds.as_deref().unwrap_or("60")
            ),
            (503, _) => bail!("{url} answers 503, the service is not ready: {detail}"),
            _ => bail!("{url} answers {status} instead of {expected}: {detail}"),
        }
    }
}

/// Appends to the base's own path, which an ingress may require.
pub(super) fn address(base: &Url, path: &[&str]) -> Url {
    let mut url = base.clone();
    // A URL that cannot have segments, such as `mailto:`, fails when it is requested.
    if let Ok(mut segments) = url.path_segments_mut() {
        segments.pop_if_empty().extend(path);
    }
    url
}

pub(super) fn text(value: &Value, field: &str) -> Result<String> {
    Ok(value[field].as_str().with_context(|| format!("the answer has no {field}"))?.to_owned())
}

fn excerpt(body: &str) -> String {
    body.chars().take(EXCERPT_CHARS).collect()
}
