//! What the binary is made of, in CycloneDX 1.5: the crates that are linked, by `cargo tree`, with their checksums from
//! Cargo.lock, and the C library, which is linked statically.
//!
//! Not by cargo-cyclonedx or cargo-sbom: both follow `cargo metadata`, which also lists what no feature of this binary
//! turns on (ring, SQLite, QUIC) and what only runs in the compiler. A scanner would report their advisories.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::places;
use harness::servers::daemon;
use serde_json::{Value, json};

use super::binary::{self, Origin};
use super::{Image, Options};
use crate::steps::Progress;
use crate::{dry_run, workspace};

/// A crate's name and version.
type Package = (String, String);

/// Writes the file beside the image.
pub(super) fn write(options: &Options, image: &Image, progress: &Progress) -> Result<PathBuf> {
    let origin = Origin::of_this_clone()?;
    let mut tree = workspace::offline_cargo(&["tree", "--locked", "--package", "chat-service"]);
    tree.args(["--target", binary::target(options.platform), "--edges", "normal,no-proc-macro"]);
    tree.args(["--prefix", "depth", "--format", "|{p}|{l}"]);
    let tree = progress.run(tree)?;
    let file = places::target_dir()?.join("image").join(format!("chat-service-{}.cdx.json", options.tag));
    if dry_run::is_on() {
        return Ok(file);
    }
    let tree = Tree::parse(&tree)?;
    let lock = fs::read_to_string(workspace::root().join("Cargo.lock")).context("read Cargo.lock")?;
    let document = document(&tree, &checksums(&lock), &origin, image);
    fs::write(&file, serde_json::to_string_pretty(&document)? + "\n")?;
    progress.note(&format!("{} crates", tree.licences.len()));
    Ok(file)
}

/// The crates with their licences, and what each one uses.
#[derive(Debug, Default)]
struct Tree {
    root: Package,
    licences: BTreeMap<Package, String>,
    uses: BTreeMap<Package, BTreeSet<Package>>,
}

impl Tree {
    /// Reads lines such as `2|itoa v1.0.15|MIT OR Apache-2.0`, where the number is the depth.
    fn parse(lines: &str) -> Result<Self> {
        let mut tree = Self::default();
        let mut path: Vec<Package> = Vec::new();
        for line in lines.lines() {
            let mut fields = line.split('|');
            let (Some(depth), Some(package), Some(licence)) = (fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            let depth: usize = depth.parse().with_context(|| format!("not a line of cargo tree: {line}"))?;
            let (name, version) = package.split_once(" v").with_context(|| format!("no version: {line}"))?;
            let version = version.split(' ').next().unwrap_or(version);
            let package = (name.to_owned(), version.to_owned());
            path.truncate(depth);
            match path.last() {
                Some(user) => tree.uses.entry(user.clone()).or_default().insert(package.clone()),
                None => {
                    tree.root = package.clone();
                    true
                }
            };
            // What was shown before comes again as `MIT (*)`.
            let licence =
                licence.trim_end_matches("(*)").split('/').map(str::trim).collect::<Vec<_>>().join(" OR ");
            tree.licences.insert(package.clone(), licence);
            path.push(package);
        }
        ensure!(tree.licences.len() > 1, "cargo tree names no crates:\n{lines}");
        Ok(tree)
    }
}

/// The SHA-256 of each crate of a registry.
fn checksums(lock: &str) -> BTreeMap<Package, String> {
    let packages = lock.split("[[package]]").filter_map(|package| {
        let field = |name: &str| {
            let line = package.lines().find_map(|line| line.strip_prefix(&format!("{name} = \"")))?;
            Some(line.trim_end_matches('"').to_owned())
        };
        Some(((field("name")?, field("version")?), field("checksum")?))
    });
    packages.collect()
}

fn document(tree: &Tree, checksums: &BTreeMap<Package, String>, origin: &Origin, image: &Image) -> Value {
    let mut components: Vec<Value> = tree
        .licences
        .iter()
        .filter(|(package, _)| **package != tree.root)
        .map(|(package, licence)| {
            let mut component = component("library", package);
            component["licenses"] = json!([{"expression": licence}]);
            if let Some(checksum) = checksums.get(package) {
                component["hashes"] = json!([{"alg": "SHA-256", "content": checksum}]);
            }
            component
        })
        .collect();
    components.extend(c_library());
    let dependencies: Vec<Value> = tree
        .licences
        .keys()
        .map(|package| {
            let uses = tree.uses.get(package).into_iter().flatten().map(purl).collect::<Vec<_>>();
            json!({"ref": purl(package), "dependsOn": uses})
        })
        .collect();
    let mut application = component("application", &tree.root);
    application["licenses"] = json!([{"expression": env!("CARGO_PKG_LICENSE")}]);
    application["properties"] = json!([
        {"name": "chat-service:revision", "value": origin.revision},
        {"name": "chat-service:image", "value": format!("{}, sha256:{}", image.name, image.id)},
    ]);
    json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"timestamp": origin.created, "component": application},
        "components": components,
        "dependencies": dependencies,
    })
}

fn component(kind: &str, package: &Package) -> Value {
    let (name, version) = package;
    json!({"type": kind, "bom-ref": purl(package), "name": name, "version": version, "purl": purl(package)})
}

fn purl((name, version): &Package) -> String {
    // A plus means a space in a URL.
    format!("pkg:cargo/{name}@{}", version.replace('+', "%2B"))
}

/// glibc, as the machine that builds has it.
fn c_library() -> Option<Value> {
    let mut ldd = Command::new("ldd");
    ldd.arg("--version");
    let said = daemon::run_ok(ldd, Duration::from_secs(10)).ok()?;
    let version = said.lines().next()?.split_whitespace().last()?.to_owned();
    let licence = json!([{"expression": "LGPL-2.1-or-later"}]);
    Some(
        json!({"type": "library", "bom-ref": "glibc", "name": "glibc", "version": version, "licenses": licence}),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const TREE: &str = "0|chat-service v0.1.0 (/src/service)|Apache-2.0\n\
                        1|tokio v1.54.0|MIT\n2|bytes v1.12.0|MIT\n1|zstd v2.0.16+zstd.1.5.7|MIT / Apache-2.0\n\
                        2|bytes v1.12.0|MIT (*)\n";

    #[test]
    fn the_tree_becomes_crates_and_what_they_use() {
        let tree = Tree::parse(TREE).expect("a tree");
        let names: Vec<_> = tree.licences.keys().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["bytes", "chat-service", "tokio", "zstd"]);
        assert_eq!(tree.root.0, "chat-service");
        let bytes = ("bytes".to_owned(), "1.12.0".to_owned());
        let zstd = ("zstd".to_owned(), "2.0.16+zstd.1.5.7".to_owned());
        assert_eq!(tree.licences[&bytes], "MIT");
        assert_eq!(tree.licences[&zstd], "MIT OR Apache-2.0");
        assert!(tree.uses[&zstd].contains(&bytes) && tree.uses[&tree.root].contains(&zstd));
        assert!(!tree.uses[&tree.root].contains(&bytes));
        assert_eq!(purl(&zstd), "pkg:cargo/zstd@2.0.16%2Bzstd.1.5.7");
        assert!(Tree::parse("").is_err());
    }

    #[test]
    fn checksums_come_from_the_lock_file() {
        let lock = "version = 4\n\n[[package]]\nname = \"bytes\"\nversion = \"1.12.0\"\nsource = \"registry\"\n\
                    checksum = \"abc\"\n\n[[package]]\nname = \"chat-service\"\nversion = \"0.1.0\"\n";
        let expected = (("bytes".to_owned(), "1.12.0".to_owned()), "abc".to_owned());
        assert_eq!(checksums(lock).into_iter().collect::<Vec<_>>(), [expected]);
    }
}
