//! The architecture's table of who may import whom, read against the `use crate::` lines of the source.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Part, and the parts it may import beside itself.
const MAY_IMPORT: [(&str, &[&str]); 14] = [
    ("error", &[]),
    ("simd", &[]),
    ("expert", &["error"]),
    ("checkpoint", &["error"]),
    ("routing", &["error", "expert", "simd"]),
    ("experts", &["error", "expert", "routing", "simd"]),
    ("offload", &["checkpoint", "error", "expert", "experts", "routing", "simd"]),
    ("spec", &["error", "expert", "experts", "routing"]),
    ("zoo", &["checkpoint", "error", "experts", "routing", "spec"]),
    ("weights", &["checkpoint", "error", "expert", "experts", "offload", "spec", "zoo"]),
    ("layer", &["error", "expert", "experts", "offload", "routing", "spec", "weights"]),
    ("decoder", &["checkpoint", "error", "expert", "experts", "layer", "offload", "routing", "spec", "weights", "zoo"]),
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

/// Parts that a file names after `crate::`, outside its comments.
fn imports(source: &str) -> BTreeSet<String> {
    let code = source.lines().filter(|line| !line.trim_start().starts_with("//"));
    code.flat_map(|line| line.split("crate::").skip(1).map(str::to_owned).collect::<Vec<_>>())
        .map(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default().to_owned())
        .filter(|part| !part.is_empty())
        .collect()
}

#[test]
fn every_import_is_one_the_architecture_allows() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&source, &mut files);
    assert!(files.len() > 20, "the walk found {} files", files.len());
    let mut wrong = Vec::new();
    for file in files {
        let inside = file.strip_prefix(&source).unwrap();
        let part = inside.iter().next().unwrap().to_string_lossy().trim_end_matches(".rs").to_owned();
        let text = std::fs::read_to_string(&file).unwrap();
        let Some((_, allowed)) = MAY_IMPORT.iter().find(|(name, _)| *name == part) else {
            wrong.push(format!("{}: part `{part}` is not in the table", inside.display()));
            continue;
        };
        for import in imports(&text) {
            if import != part && !allowed.contains(&import.as_str()) {
                wrong.push(format!("{}: `{part}` may not import `{import}`", inside.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_core_names_no_tensor_framework_and_unsafe_stands_in_simd_alone() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&source, &mut files);
    for file in files {
        let inside = file.strip_prefix(&source).unwrap().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&file).unwrap();
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
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let mut files = Vec::new();
    rust_files(&tests, &mut files);
    let exceptions =
        ["allocations.rs", "engine_memory.rs", "expert_cache_memory.rs", "layering.rs", "prompt_memory.rs"];
    for file in files.iter().filter(|file| !exceptions.iter().any(|name| file.ends_with(name))) {
        let text = std::fs::read_to_string(file).unwrap();
        let mut code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        assert!(!code.any(|line| line.contains("unsafe ")), "{}", file.display());
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
