//! `src/simd` with its own tests, for Miri, which has no vector instructions: what runs is the scalar path.

#![deny(unsafe_code)]
// Others use it.
#![allow(dead_code)]

#[path = "../../src/simd/mod.rs"]
pub mod simd;
