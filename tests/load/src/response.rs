//! What is parsed of a response.

use anyhow::{Context as _, Result};

/// The status of a response, once all of it has arrived.
pub(crate) fn status_if_complete(buffer: &[u8]) -> Result<Option<u16>> {
    let Some(head) = find(buffer, b"\r\n\r\n") else { return Ok(None) };
    let status = std::str::from_utf8(buffer.get(9..12).unwrap_or_default())?.parse()?;
    let length = content_length(&buffer[..head]).context("a response without content-length")?;
    Ok((buffer.len() >= head + 4 + length).then_some(status))
}

pub(crate) fn body(response: &[u8]) -> &[u8] {
    find(response, b"\r\n\r\n").map_or(&[], |head| &response[head + 4..])
}

/// Whether the service closes the connection after it.
pub(crate) fn closes(response: &[u8]) -> bool {
    find(response, b"\r\n\r\n")
        .is_some_and(|head| find(&response[..head], b"\r\nconnection: close").is_some())
}

/// The last message's, which is the oldest. Within a message's text the quotes are escaped.
pub(crate) fn oldest_seq(body: &[u8]) -> Option<u64> {
    const NAME: &[u8] = b"\"seq\":";
    let start = body.windows(NAME.len()).rposition(|window| window == NAME)? + NAME.len();
    leading_number(&body[start..])
}

fn content_length(head: &[u8]) -> Option<usize> {
    const NAME: &[u8] = b"\r\ncontent-length: ";
    let start = find(head, NAME)? + NAME.len();
    leading_number(&head[start..])?.try_into().ok()
}

pub(crate) fn leading_number(text: &[u8]) -> Option<u64> {
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(&text[..digits]).ok()?.parse().ok()
}

fn find(text: &[u8], pattern: &[u8]) -> Option<usize> {
    text.windows(pattern.len()).position(|window| window == pattern)
}
