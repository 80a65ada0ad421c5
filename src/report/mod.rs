//! What was measured, for people: tables at 100 columns. Figures for programs are the same structs as JSON.

pub mod compare;
pub mod replay;
pub mod tune;
