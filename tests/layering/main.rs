//! The architecture's table of which part may import which, and that no files import each other in a circle, read from the source.

mod examples;
mod source;
mod tokens;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use source::{Crate, Edge, circles};

/// Part, and the parts it may import beside itself. `lib` only declares and re-exports.
const MAY_IMPORT: [(&str, &[&str]); 15] = [
    ("error", &[]),
    ("simd", &[]),
    ("expert", &["error"]),
    ("checkpoint", &["error"]),
    ("routing", &["error", "expert", "simd"]),
    ("experts", &["error", "expert", "routing", "simd"]),
    ("offload", &["checkpoint", "error", "expert", "experts", "routing", "simd", "spec"]),
    ("spec", &["error", "expert", "experts", "routing"]),
    ("parallel", &["error", "expert", "experts", "routing"]),
    ("zoo", &["checkpoint", "error", "experts", "routing", "spec"]),
    ("weights", &["checkpoint", "error", "expert", "experts", "offload", "spec", "zoo"]),
    ("layer", &["error", "expert", "experts", "offload", "parallel", "routing", "spec", "weights"]),
    (
        "decoder",
        &[
            "checkpoint",
            "error",
            "expert",
            "experts",
            "layer",
            "offload",
            "parallel",
            "routing",
            "simd",
            "spec",
            "weights",
            "zoo",
        ],
    ),
    (
        "eval",
        &[
            "checkpoint",
            "decoder",
            "error",
            "expert",
            "experts",
            "layer",
            "offload",
            "parallel",
            "routing",
            "spec",
            "weights",
            "zoo",
        ],
    ),
    ("lib", &[]),
];

fn rust_files(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// A directory's files by their names inside it, with their text.
fn read(directory: &str) -> Vec<(String, String)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join(directory);
    let mut files = Vec::new();
    rust_files(&directory, &mut files);
    let name = |file: &Path| file.strip_prefix(&directory).unwrap().to_string_lossy().replace('\\', "/");
    files.iter().map(|file| (name(file), std::fs::read_to_string(file).unwrap())).collect()
}

/// Which file of the library imports which.
fn edges() -> BTreeSet<Edge> {
    let files = read("src");
    assert!(files.len() > 20, "the walk found {} files", files.len());
    Crate::new(files.iter().map(|(name, text)| (name.as_str(), text.as_str()))).edges()
}

#[test]
fn every_import_is_one_the_architecture_allows() {
    let part = |file: &str| file.split('/').next().unwrap().to_owned();
    let mut wrong = BTreeSet::new();
    for Edge { from, to } in edges() {
        let (importing, imported) = (part(&from), part(&to));
        match MAY_IMPORT.iter().find(|(name, _)| *name == importing) {
            None => wrong.insert(format!("{from}: part `{importing}` is not in the table")),
            Some((_, allowed)) => {
                importing != imported
                    && !allowed.contains(&imported.as_str())
                    && wrong.insert(format!("{from}: `{importing}` may not import `{imported}` ({to})"))
            }
        };
    }
    assert!(wrong.is_empty(), "{}", wrong.into_iter().collect::<Vec<_>>().join("\n"));
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    let all = edges();
    let mut wrong = Vec::new();
    for circle in circles(&all) {
        let inside = all.iter().filter(|edge| circle.contains(&edge.from) && circle.contains(&edge.to));
        let lines: Vec<String> = inside.map(|edge| format!("  {} imports {}", edge.from, edge.to)).collect();
        wrong.push(format!("a circle of {} files:\n{}", circle.len(), lines.join("\n")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_core_names_no_tensor_framework_and_unsafe_stands_in_simd_alone() {
    for (inside, text) in read("src") {
        let code: Vec<&str> = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
        if inside.starts_with("routing") || inside == "expert.rs" || inside.starts_with("checkpoint") {
            assert!(!code.iter().any(|line| line.contains("candle")) || inside == "routing/assignment.rs", "{inside}");
        }
        if !inside.starts_with("simd") {
            assert!(!code.iter().any(|line| line.contains("unsafe ")), "{inside}");
            continue;
        }
        // Every block says why it is sound, on one of the two lines before it.
        let lines: Vec<&str> = text.lines().collect();
        for (at, line) in lines.iter().enumerate().filter(|(_, line)| line.contains("unsafe {")) {
            let said = lines[at.saturating_sub(2)..at].iter().any(|line| line.contains("SAFETY:"));
            assert!(said, "{inside}, line {}: {line}", at + 1);
        }
    }
    // Tests too; but an allocator, which counts, can only be made with it.
    let exceptions = [
        "allocations.rs",
        "decode_allocations.rs",
        "engine_memory.rs",
        "expert_cache_memory.rs",
        "layering/main.rs",
        "prompt_memory.rs",
    ];
    for (inside, text) in read("tests").iter().filter(|(inside, _)| !exceptions.contains(&inside.as_str())) {
        let mut code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        assert!(!code.any(|line| line.contains("unsafe ")), "{inside}");
    }
}

#[test]
fn the_table_has_no_circle() {
    let mut placed: Vec<&str> = Vec::new();
    while placed.len() < MAY_IMPORT.len() {
        let ready = |&&(part, imports): &&(&'static str, &[&str])| {
            !placed.contains(&part) && imports.iter().all(|import| placed.contains(import))
        };
        let next = MAY_IMPORT.iter().find(ready).expect("the remaining parts import each other");
        placed.push(next.0);
    }
}
