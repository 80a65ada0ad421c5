//! What the files of a crate name in each other: `use` declarations and paths, followed through re-exports to the file that has the item.

use std::collections::{BTreeMap, BTreeSet};

use super::tokens::{Token, tokens};

/// A module's path from the crate's root: `[]` is `lib.rs`, `["routing", "phase"]` is `routing/phase/mod.rs` or `routing/phase.rs`.
pub type Module = Vec<String>;

/// Something a file names.
#[derive(Clone, Debug, PartialEq)]
struct Named {
    /// From the crate's root, made absolute.
    path: Vec<String>,
    /// Only where tests are built.
    test: bool,
    /// What it is called here and whether others see it, where a `use` declares it.
    declared: Option<(String, bool)>,
}

/// A file: what it names and what it defines.
#[derive(Default)]
struct File {
    named: Vec<Named>,
    /// Names of items, whatever kind and however deep: enough to tell them from what a glob brings.
    items: BTreeSet<String>,
    /// Modules inside that are declared for tests alone.
    tests: BTreeSet<String>,
}

/// A crate's files.
pub struct Crate {
    files: BTreeMap<Module, File>,
}

/// One file names another.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Edge {
    pub from: String,
    pub to: String,
}

/// `routing/phase/mod.rs` as a module; the name of a file is relative to `src/`.
fn module_of(file: &str) -> Module {
    let path = file.trim_end_matches(".rs").trim_end_matches("/mod");
    path.split('/').filter(|part| *part != "lib" && *part != "mod").map(str::to_owned).collect()
}

/// A module for people and for tables: `routing/phase`.
pub fn name_of(module: &[String]) -> String {
    if module.is_empty() { "lib".to_owned() } else { module.join("/") }
}

/// Reads one file.
struct Reader<'a> {
    module: &'a Module,
    tokens: Vec<Token>,
    at: usize,
    modules: &'a BTreeSet<Module>,
    file: File,
}

impl Reader<'_> {
    fn peek(&self, ahead: usize) -> Option<&Token> {
        self.tokens.get(self.at + ahead)
    }

    fn word(&self, ahead: usize) -> Option<&str> {
        self.peek(ahead).and_then(Token::word)
    }

    /// A path from the crate's root, if this one does not leave the crate.
    fn absolute(&self, path: &[String], inside: &[String]) -> Option<Vec<String>> {
        let mut here: Vec<String> = self.module.iter().chain(inside).cloned().collect();
        let mut rest = path;
        match path.first()?.as_str() {
            "crate" => {
                here.clear();
                rest = &path[1..];
            }
            "self" => rest = &path[1..],
            "super" => {
                while rest.first().is_some_and(|part| part == "super") {
                    here.pop();
                    rest = &rest[1..];
                }
            }
            // A child without `self::`.
            child => {
                here.push(child.to_owned());
                let known = self.modules.contains(&here);
                here.pop();
                if !known {
                    return None;
                }
            }
        }
        here.extend_from_slice(rest);
        Some(here)
    }

    /// The leaves of a `use` tree from here on: path, and the name it gets.
    fn tree(&mut self, before: &[String], leaves: &mut Vec<(Vec<String>, String)>) {
        let mut path = before.to_vec();
        if self.peek(0) == Some(&Token::Colons) {
            self.at += 1;
        }
        loop {
            match self.peek(0).cloned() {
                Some(Token::Word(word)) => {
                    self.at += 1;
                    if self.peek(0) == Some(&Token::Colons) {
                        self.at += 1;
                        path.push(word);
                        continue;
                    }
                    // `a::{self}` is `a`.
                    if word != "self" || path.is_empty() {
                        path.push(word);
                    }
                    let mut name = path.last().cloned().unwrap_or_default();
                    if self.word(0) == Some("as") {
                        name = self.word(1).unwrap_or("_").to_owned();
                        self.at += 2;
                    }
                    leaves.push((path, name));
                    return;
                }
                Some(Token::Sign('*')) => {
                    self.at += 1;
                    leaves.push((path, "*".to_owned()));
                    return;
                }
                Some(Token::Sign('{')) => {
                    self.at += 1;
                    while let Some(token) = self.peek(0) {
                        if token.is('}') {
                            self.at += 1;
                            break;
                        }
                        if token.is(',') {
                            self.at += 1;
                            continue;
                        }
                        self.tree(&path, leaves);
                    }
                    return;
                }
                _ => {
                    self.at += 1;
                    return;
                }
            }
        }
    }

    fn add(&mut self, path: &[String], inside: &[String], test: bool, declared: Option<(String, bool)>) {
        if let Some(path) = self.absolute(path, inside) {
            self.file.named.push(Named { path, test, declared });
        }
    }

    /// Reads items up to the closing brace of the block that this is in.
    fn items(&mut self, inside: &mut Vec<String>, test: bool) {
        // A test's attribute holds for the item that follows: up to its `;` or through its braces.
        let mut next_is_test = false;
        let mut visible = false;
        while let Some(token) = self.peek(0).cloned() {
            let now_test = test || next_is_test;
            match token {
                Token::CfgTest => {
                    next_is_test = true;
                    self.at += 1;
                }
                Token::Sign('}') => {
                    self.at += 1;
                    return;
                }
                Token::Sign('{') => {
                    self.at += 1;
                    self.items(inside, now_test);
                    (next_is_test, visible) = (false, false);
                }
                Token::Sign(';') => {
                    self.at += 1;
                    (next_is_test, visible) = (false, false);
                }
                Token::Word(word) if word == "pub" => {
                    visible = true;
                    self.at += 1;
                    // `pub(in path)` says who sees it; nothing is imported.
                    if self.peek(0).is_some_and(|token| token.is('('))
                        && matches!(self.word(1), Some("crate" | "super" | "self" | "in"))
                    {
                        while self.peek(0).is_some_and(|token| !token.is(')')) {
                            self.at += 1;
                        }
                    }
                }
                Token::Word(word) if word == "use" => {
                    self.at += 1;
                    // `impl Trait + use<'a>` declares nothing.
                    if self.peek(0).is_some_and(|token| token.is('<')) {
                        continue;
                    }
                    let mut leaves = Vec::new();
                    self.tree(&[], &mut leaves);
                    for (path, name) in leaves {
                        self.add(&path, inside, now_test, Some((name, visible)));
                    }
                }
                Token::Word(word) if word == "mod" && self.word(1).is_some() => {
                    let name = self.word(1).unwrap().to_owned();
                    self.at += 2;
                    if self.peek(0).is_some_and(|token| token.is('{')) {
                        self.at += 1;
                        inside.push(name);
                        self.items(inside, now_test);
                        inside.pop();
                    } else if now_test {
                        self.file.tests.insert(name);
                    }
                    (next_is_test, visible) = (false, false);
                }
                Token::Word(word)
                    if ["fn", "struct", "enum", "trait", "type", "const", "static", "union"]
                        .contains(&word.as_str()) =>
                {
                    self.at += 1;
                    if let Some(name) = self.word(0) {
                        self.file.items.insert(name.to_owned());
                    }
                }
                // A path in code or in a type.
                Token::Word(first) => {
                    let mut path = vec![first];
                    self.at += 1;
                    while self.peek(0) == Some(&Token::Colons) && self.word(1).is_some() {
                        path.push(self.word(1).unwrap().to_owned());
                        self.at += 2;
                    }
                    if path.len() > 1 {
                        self.add(&path, inside, now_test, None);
                    }
                }
                // `::` after something that is no path, as in `<T as Trait>::name`.
                Token::Colons => self.at += 1 + usize::from(self.word(1).is_some()),
                Token::Sign(_) => self.at += 1,
            }
        }
    }
}

impl Crate {
    /// Files by their names relative to `src/`, with their text.
    pub fn new<'a>(sources: impl IntoIterator<Item = (&'a str, &'a str)> + Clone) -> Self {
        let modules: BTreeSet<Module> = sources.clone().into_iter().map(|(name, _)| module_of(name)).collect();
        let files = sources.into_iter().map(|(name, text)| {
            let module = module_of(name);
            let mut reader =
                Reader { module: &module, tokens: tokens(text), at: 0, modules: &modules, file: File::default() };
            while reader.at < reader.tokens.len() {
                reader.items(&mut Vec::new(), false);
            }
            let file = reader.file;
            (module, file)
        });
        Self { files: files.collect() }
    }

    /// The file that a path leads to: the longest module of it and, where that only re-exports an item of its own room, the file
    /// that the item comes from. What a room re-exports of another one is its own word; the root's words are those of their rooms.
    fn resolve(&self, path: &[String], depth: usize) -> Module {
        let length = (0..=path.len()).rev().find(|&length| self.files.contains_key(&path[..length])).unwrap_or(0);
        let module = &path[..length];
        let (Some(item), Some(file)) = (path.get(length), self.files.get(module)) else { return module.to_vec() };
        if depth > 8 || file.items.contains(item) {
            return module.to_vec();
        }
        fn declared<'a>(file: &'a File, name: &'a str) -> impl Iterator<Item = &'a Named> {
            file.named.iter().filter(move |named| named.declared.as_ref().is_some_and(|(called, _)| called == name))
        }
        let ours = |named: &&Named| module.is_empty() || named.path.first() == module.first();
        if let Some(named) = declared(file, item).filter(ours).find(|named| named.path != path) {
            return self.resolve(&named.path, depth + 1);
        }
        for glob in declared(file, "*") {
            let inner: Vec<String> = glob.path.iter().chain([item]).cloned().collect();
            let found = self.resolve(&inner, depth + 1);
            if self.files.get(&found).is_some_and(|file| file.items.contains(item)) {
                return found;
            }
        }
        module.to_vec()
    }

    fn is_test(&self, module: &[String]) -> bool {
        (1..=module.len()).any(|length| {
            let (parent, child) = (&module[..length - 1], &module[length - 1]);
            self.files.get(parent).is_some_and(|file| file.tests.contains(child))
        })
    }

    /// Which file names which, without itself. What a file declares as its child or re-exports for others is no import;
    /// tests may import anything.
    pub fn edges(&self) -> BTreeSet<Edge> {
        let mut edges = BTreeSet::new();
        for (module, file) in &self.files {
            if self.is_test(module) {
                continue;
            }
            for named in &file.named {
                let re_export = named.declared.as_ref().is_some_and(|(_, visible)| *visible);
                if named.test || (re_export && named.path.starts_with(module)) {
                    continue;
                }
                let to = self.resolve(&named.path, 0);
                if to != *module {
                    edges.insert(Edge { from: name_of(module), to: name_of(&to) });
                }
            }
        }
        edges
    }
}

/// Files that import each other, directly or through others: each group once, sorted.
pub fn circles(edges: &BTreeSet<Edge>) -> Vec<Vec<String>> {
    let mut reach: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for edge in edges {
        reach.entry(&edge.from).or_default().insert(&edge.to);
    }
    let files: Vec<&str> = reach.keys().copied().collect();
    for &through in &files {
        let further = reach[through].clone();
        for seen in reach.values_mut().filter(|seen| seen.contains(through)) {
            seen.extend(&further);
        }
    }
    let together = |a: &str, b: &str| reach[a].contains(b) && reach.get(b).is_some_and(|seen| seen.contains(a));
    let mut circles: Vec<Vec<String>> = Vec::new();
    for &file in &files {
        let circle: Vec<String> = files.iter().filter(|other| together(file, other)).map(|&f| f.to_owned()).collect();
        if circle.len() > 1 && !circles.contains(&circle) {
            circles.push(circle);
        }
    }
    circles
}
