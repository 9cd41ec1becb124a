//! A `.env` file, whose values arrive exactly as they are written, or not at all.
//!
//! dotenvy substitutes `$NAME`, takes backslashes for escapes and joins quoted parts, so a password would silently become
//! another one. It has no option against that: so each of its values is compared with the text of the line.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

/// The text of a file, and what it says.
#[derive(Default)]
pub(super) struct Dotenv {
    pub text: String,
    pub pairs: BTreeMap<String, String>,
}

/// Nothing when there is no such file. The error names the line and its variable, and never quotes a value.
pub(super) fn read(path: &Path) -> Result<Dotenv, String> {
    match fs::read_to_string(path) {
        Ok(text) => parse(text),
        // Also the answer to a link that leads nowhere, which somebody meant to be read.
        Err(error) if error.kind() == ErrorKind::NotFound && path.symlink_metadata().is_err() => {
            Ok(Dotenv::default())
        }
        Err(error) => Err(format!("{error}; for example make it a text file with one line PORT=8000")),
    }
}

fn parse(text: String) -> Result<Dotenv, String> {
    let mut pairs = BTreeMap::new();
    for (index, line) in text.strip_prefix('\u{feff}').unwrap_or(&text).split('\n').enumerate() {
        let Some((name, value)) = pair(line).map_err(|fault| format!("line {}: {fault}", index + 1))? else {
            continue;
        };
        if pairs.contains_key(&name) {
            let fault = "an earlier line sets it, too; for example remove one of them";
            return Err(format!("line {}: {name}: {fault}", index + 1));
        }
        pairs.insert(name, value);
    }
    Ok(Dotenv { text, pairs })
}

/// What a line says; nothing if it is empty or a comment.
fn pair(line: &str) -> Result<Option<(String, String)>, String> {
    let line = line.strip_suffix('\r').unwrap_or(line);
    // With the end that dotenvy needs in order to know that a line ends.
    let parsed = dotenvy::from_read_iter(format!("{line}\n").as_bytes()).next().transpose();
    let Some((name, raw)) = name_and_rest(line) else {
        return match parsed {
            Ok(None) => Ok(None),
            _ => Err("this is not NAME=value; for example PORT=8000".to_owned()),
        };
    };
    let changed = |fault: &str| {
        format!(
            "{name}: {fault}: put it between single quotes, on one line; for example {name}='a $b \\c #d'"
        )
    };
    let written = as_written(raw).ok_or_else(|| changed("a quote is not closed"))?;
    match parsed {
        Ok(None) => Ok(None),
        // No variable of a process can hold NUL.
        Ok(Some((_, value))) if value == written && !value.contains('\0') => {
            Ok(Some((name.to_owned(), value)))
        }
        _ => {
            Err(changed("its value would not arrive as it is written, because of a $, \\, # or quote in it"))
        }
    }
}

/// The name, and what follows the first `=`.
fn name_and_rest(line: &str) -> Option<(&str, &str)> {
    let (name, rest) = line.split_once('=')?;
    let name = name.trim();
    let name =
        name.strip_prefix("export").filter(|rest| rest.starts_with([' ', '\t'])).unwrap_or(name).trim();
    let known = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
    (!name.is_empty() && name.chars().all(known)).then_some((name, rest))
}

/// The value without the quotes around it, the blanks around those, and a comment, which begins with ` #`. `None` if a
/// quote is not closed.
fn as_written(raw: &str) -> Option<&str> {
    const BLANKS: [char; 2] = [' ', '\t'];
    let value = raw.trim_start_matches(BLANKS);
    if let Some(quote) = value.chars().next().filter(|first| ['\'', '"'].contains(first)) {
        return value[1..].split_once(quote).map(|(quoted, _)| quoted);
    }
    let comment = raw.match_indices('#').map(|(at, _)| at).find(|at| raw[..*at].ends_with(BLANKS));
    Some(raw[..comment.unwrap_or(raw.len())].trim_matches(BLANKS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_is_what_is_written() {
        for (line, value) in [
            ("A=", ""),
            ("A=pa#word", "pa#word"),
            ("A=pa#word # a comment, isn't it", "pa#word"),
            ("A=pa\t# a comment", "pa"),
            ("A= # a comment", ""),
            ("  export\tA \t= \t pa=word \t", "pa=word"),
            ("A='pa$word ${x} \\n \"#\"'", "pa$word ${x} \\n \"#\""),
            ("A=\"it's # not\" # a comment", "it's # not"),
            ("A=''", ""),
            ("A=é…\u{1f600}", "é…\u{1f600}"),
            ("A='last'\r", "last"),
        ] {
            let read = pair(line).unwrap_or_else(|fault| panic!("{line:?}: {fault}"));
            assert_eq!(read, Some(("A".to_owned(), value.to_owned())), "{line:?}");
        }
        for nothing in ["", " \t", "# A=b", "  # it's"] {
            assert_eq!(pair(nothing), Ok(None), "{nothing:?}");
        }
        // A variable may be called that.
        assert_eq!(pair("export=a"), Ok(Some(("export".to_owned(), "a".to_owned()))));
    }

    #[test]
    fn a_quoted_comment_or_trailing_text_is_refused() {
        for line in [
            "A='pa'#word",
            "A='pa' word",
            "A='pa'word",
            "A=\"pa\"'word'",
            "A=pa'",
            "A=\u{a0}pa",
            "1A=b",
            "A B=c",
        ] {
            assert!(pair(line).is_err(), "{line:?}");
        }
    }
}
