//! `deploy/docs/privacy.md` names everything that the service stores.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use crate::support::Database;

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../service/src");
const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/docs/privacy.md");

/// The rows of tables below this heading: the names in the first cell, and those in the second.
fn rows(heading: &str) -> BTreeMap<String, BTreeSet<String>> {
    let page = fs::read_to_string(PAGE).expect("the page");
    let section = page.split("\n## ").find(|section| section.starts_with(heading)).expect("the section");
    let names = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<BTreeSet<_>>();
    let rows = section.lines().filter(|line| line.starts_with("| `")).flat_map(|line| {
        let cells: Vec<&str> = line.split('|').collect();
        names(cells[1]).into_iter().map(|name| (name, names(cells[2]))).collect::<Vec<_>>()
    });
    rows.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_names_every_table_and_every_column() {
    let columns: Vec<(String, String)> = sqlx::query_as(
        "SELECT table_name::text, column_name::text FROM information_schema.columns WHERE table_schema = 'public'",
    )
    .fetch_all(&mut Database::migrated().await.connect().await)
    .await
    .expect("the columns");
    let named = rows("Postgres");
    let lacking: Vec<_> = columns
        .iter()
        .filter(|(table, column)| named.get(table).is_none_or(|columns| !columns.contains(column)))
        .collect();
    assert!(columns.len() > 50 && lacking.is_empty(), "deploy/docs/privacy.md lacks {lacking:?}");
}

/// In the source they are literals, whose end may be filled in.
#[test]
fn the_page_names_every_key_and_channel_of_redis() {
    fn read(folder: &Path, found: &mut BTreeSet<String>) {
        for entry in fs::read_dir(folder).expect("a folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                read(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).expect("a file");
                found.extend(text.split("\"chat:").skip(1).map(|rest| {
                    let end = rest.find(|one: char| !one.is_ascii_lowercase()).unwrap_or(rest.len());
                    let is_prefix = rest[end..].starts_with(':');
                    format!("chat:{}{}", &rest[..end], if is_prefix { ":" } else { "" })
                }));
            }
        }
    }
    let mut found = BTreeSet::new();
    read(Path::new(SOURCE), &mut found);
    let named: BTreeSet<String> = rows("Redis").into_keys().collect();
    assert_eq!(found, named);
}
