//! The chart's README as a script: its commands are the ones that are tried.

use std::fs;

use anyhow::{Context, Result};
use common::workspace;

/// The shell commands of a section, block by block.
pub(super) fn blocks(section: &str) -> Result<Vec<String>> {
    let path = workspace::root().join("helm/chat-service/README.md");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    Ok(shell_blocks(&text, section))
}

fn shell_blocks(text: &str, section: &str) -> Vec<String> {
    let title = format!("## {section}");
    let mut blocks: Vec<String> = Vec::new();
    let (mut inside, mut open) = (false, false);
    for line in text.lines() {
        if open {
            match (line, blocks.last_mut()) {
                ("```", _) | (_, None) => open = false,
                (line, Some(block)) => block.extend([line, "\n"]),
            }
        } else if line.starts_with("## ") {
            inside = line == title;
        } else if inside && line == "```sh" {
            open = true;
            blocks.push(String::new());
        }
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_is_its_shell_blocks_up_to_the_next_section() {
        let text = "## A\n```sh\none\n```\n## B\nprose\n```yaml\nno: sh\n```\n```sh\ntwo\nthree\n```\n## C\n";
        assert_eq!(shell_blocks(text, "B"), ["two\nthree\n"]);
        assert_eq!(shell_blocks(text, "A"), ["one\n"]);
        assert!(shell_blocks(text, "C").is_empty());
    }
}
