//! Little crates whose imports the reader must see.

use std::collections::BTreeSet;

use super::source::{Crate, Edge, circles};

/// Edges as `from -> to`.
fn seen(sources: &[(&str, &str)]) -> Vec<String> {
    edges(sources).iter().map(|edge| format!("{} -> {}", edge.from, edge.to)).collect()
}

fn edges(sources: &[(&str, &str)]) -> BTreeSet<Edge> {
    Crate::new(sources.iter().copied()).edges()
}

const LIB: (&str, &str) = ("lib.rs", "pub mod a; pub mod b; mod c;");

/// What `a.rs` imports if this is its source, beside `b/mod.rs` with a child `b/inner.rs`, and `c.rs`.
fn imports_of_a(source: &str) -> Vec<String> {
    let inner = ("b/inner.rs", "pub struct Deep; pub fn deep() {}");
    let b = ("b/mod.rs", "mod inner; pub use inner::Deep; pub struct Flat;");
    let all = seen(&[LIB, ("a.rs", source), b, inner, ("c.rs", "pub struct Low;")]);
    all.iter().filter_map(|edge| edge.strip_prefix("a -> ").map(str::to_owned)).collect()
}

#[test]
fn every_way_to_import_is_seen() {
    assert_eq!(imports_of_a("use crate::b::Flat;"), ["b"]);
    assert_eq!(imports_of_a("use crate::{b::{Flat, inner::Deep}, c::Low as L};"), ["b", "b/inner", "c"]);
    assert_eq!(imports_of_a("use crate::{\n    b::{self},\n    c,\n};"), ["b", "c"]);
    assert_eq!(imports_of_a("use super::{b, c::*};"), ["b", "c"]);
    assert_eq!(imports_of_a("fn f() -> super::c::Low { crate::b::inner::deep(); }"), ["b/inner", "c"]);
    assert_eq!(imports_of_a("fn f() { use crate::c::Low; let x: Vec<crate::b::Flat>; }"), ["b", "c"]);
    assert_eq!(imports_of_a("macro_rules! m { () => { $crate::c::Low }; }"), ["c"]);
    assert_eq!(imports_of_a("mod within { use super::super::c::Low; }"), ["c"]);
    assert_eq!(imports_of_a("impl crate::b::Flat { fn f(&self) -> <crate::c::Low as X>::Y {} }"), ["b", "c"]);
}

#[test]
fn what_is_no_import_is_not_seen() {
    let nothing: [&str; 0] = [];
    assert_eq!(imports_of_a("// use crate::b;\n/* crate::c /* inner */ crate::b */ //! crate::c::Low"), nothing);
    assert_eq!(
        imports_of_a(r##"const TEXT: &str = "crate::b::Flat \" crate::c"; const R: &str = r#"" crate::b"#;"##),
        nothing
    );
    assert_eq!(imports_of_a("const C: char = '\"'; fn f<'a>(x: &'a str) {} const D: char = '\\'';"), nothing);
    assert_eq!(
        imports_of_a("pub(in crate::b) struct X; pub(crate) fn f() {} use std::fmt; use serde::de::Error;"),
        nothing
    );
    assert_eq!(imports_of_a("#[doc = \"crate::b\"] #[serde(default = \"crate::c\")] struct X;"), nothing);
    assert_eq!(imports_of_a("mod within { use super::own; } fn own() {} use self::own as other;"), nothing);
    // Tests may look anywhere.
    let test = "#[cfg(test)] mod tests { use crate::b::Flat; } #[cfg(test)] use crate::c; fn f() {}";
    assert_eq!(imports_of_a(test), nothing);
    assert_eq!(imports_of_a("#[cfg(test)] use crate::c; use crate::b;"), ["b"]);
    assert_eq!(imports_of_a("#[cfg(not(test))] use crate::c;"), ["c"]);
}

#[test]
fn a_re_export_leads_to_the_file_that_has_the_item() {
    assert_eq!(imports_of_a("use crate::b::Deep;"), ["b/inner"]);
    let root = ("lib.rs", "pub mod a; mod b; pub use b::Deep; pub use b::{Flat as Even};");
    let b = ("b.rs", "pub struct Deep; pub struct Flat;");
    assert_eq!(seen(&[root, b, ("a.rs", "use crate::{Deep, Even};")]), ["a -> b"]);
    // But what a room re-exports of another is its own word.
    let other = ("b.rs", "pub use crate::c::Low;");
    assert_eq!(seen(&[LIB, other, ("c.rs", "pub struct Low;"), ("a.rs", "use crate::b::Low;")]), ["a -> b", "b -> c"]);
    let globs = ("lib.rs", "pub mod a; mod b; pub use b::*;");
    assert_eq!(seen(&[globs, b, ("a.rs", "use crate::Deep;")]), ["a -> b"]);
}

#[test]
fn circles_inside_a_room_are_found_and_a_parent_that_only_declares_is_in_none() {
    let circle = |sources: &[(&str, &str)]| circles(&edges(sources));
    let room = |mod_rs: &'static str, x: &'static str, y: &'static str| {
        circle(&[("lib.rs", "mod room;"), ("room/mod.rs", mod_rs), ("room/x.rs", x), ("room/y.rs", y)])
    };
    let none: [Vec<String>; 0] = [];
    let declares = "mod x; mod y; pub use x::X; pub(crate) use y::Y;";
    assert_eq!(room(declares, "use super::Y; pub struct X;", "pub struct Y;"), none);
    assert_eq!(room(declares, "use super::y::Y;", "use super::x::X;"), [["room/x", "room/y"]]);
    assert_eq!(room(declares, "use super::Y; pub struct X;", "use super::X; pub struct Y;"), [["room/x", "room/y"]]);
    // The parent uses a child that uses the parent: with and without `self::`.
    let own = "mod x; mod y; pub struct Own; fn f() { x::go(); }";
    assert_eq!(room(own, "use super::Own; pub fn go() {}", ""), [["room", "room/x"]]);
    assert_eq!(room(own, "pub fn go() {}", "use super::Own;"), none);
    let named = "mod x; mod y; use self::x::X; pub struct Own;";
    assert_eq!(room(named, "use super::y::Y;", "use super::Own;"), [["room", "room/x", "room/y"]]);
    // Not through tests.
    assert_eq!(
        room("#[cfg(test)] mod x; mod y; fn f() { y::g(); }", "use super::*; use super::y;", "pub fn g() {}"),
        none
    );
}
