//! The service's layers: a module imports only from lower layers, as ARCHITECTURE.md lists them, and no modules import
//! one another in a circle.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../service/src");
const ARCHITECTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../ARCHITECTURE.md");

/// What each module imports, both as paths such as `chat::history`. Unit tests do not count.
type Imports = BTreeMap<String, BTreeSet<String>>;

#[test]
fn imports_point_to_lower_layers_only() {
    let ranks = ranks(&fs::read_to_string(ARCHITECTURE).expect("ARCHITECTURE.md"));
    let top = |module: &str| module.split("::").next().unwrap_or_default().to_owned();
    let rank = |module: &str| {
        *ranks.get(&top(module)).unwrap_or_else(|| panic!("ARCHITECTURE.md lists no layer for {module}"))
    };
    for (module, imports) in imports() {
        for import in imports.iter().filter(|import| top(import) != top(&module)) {
            assert!(rank(import) < rank(&module), "{module} imports {import}, which is not in a lower layer");
        }
    }
}

#[test]
fn no_modules_import_one_another_in_a_circle() {
    let mut left = imports();
    loop {
        let names: BTreeSet<String> = left.keys().cloned().collect();
        let before = left.len();
        left.retain(|_, imports| imports.iter().any(|import| names.contains(import)));
        if left.len() == before {
            break;
        }
    }
    assert!(left.is_empty(), "these import one another in a circle, or such modules: {:?}", left.keys());
}

/// The rank of each top-level module: the number of its line in the list of layers.
fn ranks(architecture: &str) -> BTreeMap<String, usize> {
    let (_, list) = architecture.split_once("<!-- layers -->").expect("the list begins");
    let (list, _) = list.split_once("<!-- /layers -->").expect("the list ends");
    let lines = list.lines().filter_map(|line| line.split_once(':')).map(|(modules, _)| modules).enumerate();
    lines
        .flat_map(|(rank, modules)| {
            modules.split('`').skip(1).step_by(2).map(move |name| (name.to_owned(), rank))
        })
        .collect()
}

fn imports() -> Imports {
    let mut sources = BTreeMap::new();
    read_sources(Path::new(SOURCE), "", &mut sources);
    let names: BTreeSet<String> = sources.keys().cloned().collect();
    let imports = |module: &str, text: &str| {
        let parent = module.rsplit_once("::").map_or("", |(parent, _)| parent);
        let starts = [("crate::", ""), ("chat_service::", ""), ("super::", parent), ("self::", module)];
        let paths = starts.into_iter().flat_map(|(start, base)| {
            text.match_indices(start).flat_map(move |(at, _)| {
                let rest = &text[at + start.len()..];
                let items = match rest.strip_prefix('{') {
                    Some(list) => list.split('}').next().unwrap_or_default(),
                    None => rest
                        .split(|c: char| c != ':' && c != '_' && !c.is_alphanumeric())
                        .next()
                        .unwrap_or_default(),
                };
                items
                    .split(',')
                    .map(move |item| format!("{base}::{}", item.trim()).trim_matches(':').to_owned())
            })
        });
        // The longest part of a path that is a module; what follows is an item in it.
        let module_of = |path: String| {
            let ends = path.match_indices("::").map(|(at, _)| at).chain([path.len()]);
            ends.filter_map(|end| names.get(&path[..end]).cloned()).last()
        };
        paths.filter_map(module_of).filter(|import| import != module).collect()
    };
    sources.iter().map(|(module, text)| (module.clone(), imports(module, text))).collect()
}

fn read_sources(folder: &Path, parent: &str, sources: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path()) {
        let name = entry.file_stem().expect("a name").to_string_lossy().into_owned();
        let module = if name == "mod" { parent.to_owned() } else { format!("{parent}::{name}") };
        let module = module.trim_start_matches(':').to_owned();
        if entry.is_dir() {
            read_sources(&entry, &module, sources);
        } else if entry.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&entry).expect("a source file");
            let code = text.split("\n#[cfg(test)]\nmod tests").next().unwrap_or_default().to_owned();
            sources.insert(module, code);
        }
    }
}
