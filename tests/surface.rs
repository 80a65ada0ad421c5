//! `docs/surface.txt` is the library's public surface, one item a line, so that a change of it is seen in a diff.
//!
//! Read from what rustdoc writes as JSON, with default features; `.ci/run` says where. Without that there is nothing to compare with.
//!
//! ```text
//! RUSTDOC=$PWD/.ci/rustdoc-json RUSTDOCFLAGS="-Z unstable-options --output-format json" cargo doc --release --no-deps
//! PHASE_MOE_SURFACE=target/doc/phase_moe.json PHASE_MOE_SURFACE_WRITE=1 cargo test --release --test surface
//! ```

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;

use serde_json::Value;

/// The most items that count: what comes in has to be worth what leaves for it.
const MOST: usize = 440;

const HEAD: &str = "\
# The public surface of the library with default features: kind and path, sorted by path. Made and checked by tests/surface.rs.
# Counted: modules, types, traits, functions, constants, macros, inherent methods and constants, what a trait declares; each once.
# Not counted: fields, variants, other paths to the same item (`use`), implementations of traits.
";

/// rustdoc's JSON, and what was found in it.
struct Surface<'a> {
    index: &'a serde_json::Map<String, Value>,
    /// Path and kind.
    lines: BTreeSet<(String, String)>,
    /// Where an item was seen first.
    paths: BTreeMap<u64, String>,
    counted: usize,
}

fn ids(value: &Value) -> Vec<u64> {
    value.as_array().into_iter().flatten().filter_map(Value::as_u64).collect()
}

impl<'a> Surface<'a> {
    fn item(&self, id: u64) -> Option<(&'a Value, &'a str, &'a Value)> {
        let item = self.index.get(&id.to_string())?;
        let (kind, inner) = item["inner"].as_object()?.iter().next()?;
        Some((item, kind.as_str(), inner))
    }

    fn add(&mut self, kind: &str, path: String, counts: bool) {
        self.counted += usize::from(counts);
        self.lines.insert((path, kind.to_owned()));
    }

    /// What belongs to a type or trait: public fields, variants, what it declares itself.
    fn members(&mut self, path: &str, inner: &Value) {
        let fields = inner["kind"]["plain"]["fields"].as_array().map(|_| ids(&inner["kind"]["plain"]["fields"]));
        let tuple = ids(&inner["kind"]["tuple"]);
        for id in fields.unwrap_or_default().into_iter().chain(tuple) {
            if let Some((item, ..)) = self.item(id).filter(|(item, ..)| item["visibility"] == "public") {
                self.add("field", format!("{path}::{}", item["name"].as_str().unwrap_or("_")), false);
            }
        }
        for id in ids(&inner["variants"]) {
            let Some((item, _, variant)) = self.item(id) else { continue };
            let path = format!("{path}::{}", item["name"].as_str().unwrap_or("_"));
            for field in ids(&variant["kind"]["struct"]["fields"]) {
                let name = self.item(field).and_then(|(item, ..)| item["name"].as_str()).unwrap_or("_");
                self.add("field", format!("{path}::{name}"), false);
            }
            self.add("variant", path, false);
        }
        // A trait's own.
        for id in ids(&inner["items"]) {
            let Some((item, kind, _)) = self.item(id) else { continue };
            self.add(kind, format!("{path}::{}", item["name"].as_str().unwrap_or("_")), true);
        }
        for id in ids(&inner["impls"]) {
            let Some((_, "impl", block)) = self.item(id) else { continue };
            if !block["trait"].is_null() {
                continue;
            }
            for id in ids(&block["items"]) {
                if let Some((item, kind, _)) = self.item(id).filter(|(item, ..)| item["visibility"] == "public") {
                    let kind = if kind == "function" { "method" } else { kind };
                    self.add(kind, format!("{path}::{}", item["name"].as_str().unwrap_or("_")), true);
                }
            }
        }
    }

    /// All that is reached from the root, the nearest first.
    fn walk(&mut self, root: u64) {
        let mut queue = VecDeque::from([(root, String::new())]);
        while let Some((id, parent)) = queue.pop_front() {
            let Some((item, kind, inner)) = self.item(id) else { continue };
            if kind == "use" {
                let Some(target) = inner["id"].as_u64() else { continue };
                let Some((_, kind, module)) = self.item(target) else {
                    // Of another crate.
                    self.add("use", format!("{parent}::{}", inner["name"].as_str().unwrap_or("_")), true);
                    continue;
                };
                if inner["is_glob"] == true && kind == "module" {
                    queue.extend(ids(&module["items"]).into_iter().map(|id| (id, parent.clone())));
                } else if inner["is_glob"] != true {
                    // By the name that it has here.
                    let path = format!("{parent}::{}", inner["name"].as_str().unwrap_or("_"));
                    self.visit(target, path, kind, module, &mut queue);
                }
                continue;
            }
            let name = item["name"].as_str().unwrap_or("_");
            let path = if parent.is_empty() { name.to_owned() } else { format!("{parent}::{name}") };
            self.visit(id, path, kind, inner, &mut queue);
        }
    }

    fn visit(&mut self, id: u64, path: String, kind: &str, inner: &Value, queue: &mut VecDeque<(u64, String)>) {
        if let Some(first) = self.paths.get(&id).filter(|first| **first != path) {
            let line = format!("{path} = {first}");
            return self.add("use", line, false);
        }
        self.paths.insert(id, path.clone());
        if kind == "module" {
            queue.extend(ids(&inner["items"]).into_iter().map(|id| (id, path.clone())));
        } else {
            self.members(&path, inner);
        }
        self.add(kind, path, true);
    }
}

/// The listing and how many items count.
fn listing(document: &Value) -> (String, usize) {
    let index = document["index"].as_object().expect("rustdoc's JSON has an index");
    let mut surface = Surface { index, lines: BTreeSet::new(), paths: BTreeMap::new(), counted: 0 };
    surface.walk(document["root"].as_u64().expect("rustdoc's JSON has a root"));
    let lines: String = surface.lines.iter().map(|(path, kind)| format!("{kind:<14} {path}\n")).collect();
    (format!("{HEAD}# {} items.\n{lines}", surface.counted), surface.counted)
}

#[test]
fn the_surface_is_as_listed_and_of_a_size_to_be_read() {
    let Ok(json) = std::env::var("PHASE_MOE_SURFACE") else {
        println!("not compared: PHASE_MOE_SURFACE names no rustdoc JSON");
        return;
    };
    let (now, count) = listing(&serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap());
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/surface.txt");
    if std::env::var_os("PHASE_MOE_SURFACE_WRITE").is_some() {
        std::fs::write(&file, &now).unwrap();
    }
    let listed = std::fs::read_to_string(&file).unwrap_or_default();
    let (old, new): (BTreeSet<&str>, BTreeSet<&str>) = (listed.lines().collect(), now.lines().collect());
    let gone = old.difference(&new).map(|line| format!("- {line}"));
    let came = new.difference(&old).map(|line| format!("+ {line}"));
    let changes: Vec<String> = gone.chain(came).collect();
    assert!(
        changes.is_empty(),
        "docs/surface.txt is out of date (the header of this test says how to write it):\n{}",
        changes.join("\n")
    );
    assert!(count <= MOST, "{count} public items: expected at most {MOST}");
}
