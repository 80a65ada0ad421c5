//! The figures, for people and as JSON.

use std::fmt;

use serde_json::{Value, json};

use crate::ceilings::Ceilings;
use crate::common::shape::{Format, Shape};

/// Median milliseconds; `None` for a side that cannot run the format or was not asked to.
#[derive(Clone, Copy)]
pub struct Times {
    pub ours: Option<f64>,
    pub candle: Option<f64>,
    /// Gigabytes per second that all threads read meanwhile, in turns with the two.
    pub read_gb_per_second: f64,
}

pub struct Row {
    pub shape: Shape,
    pub format: Format,
    pub tokens: usize,
    /// Experts that an input touches, on average.
    pub touched: f64,
    pub times: Times,
}

pub struct Table {
    pub ceilings: Ceilings,
    pub rows: Vec<Row>,
}

impl Table {
    fn floor_millis(&self, row: &Row, gb_per_second: f64) -> f64 {
        self.ceilings.floor_millis(row.shape, row.format, row.tokens, row.touched, gb_per_second)
    }

    pub fn json(&self) -> Value {
        let threads = rayon::current_num_threads();
        let cell = |row: &Row| {
            json!({
                "shape": row.shape.name, "dtype": row.format.name, "tokens": row.tokens, "threads": threads,
                "millis": row.times.ours, "floor_millis": self.floor_millis(row, self.ceilings.reads.gb_per_second),
                "candle_millis": row.times.candle, "read_gb_per_second": row.times.read_gb_per_second,
            })
        };
        json!({
            "read_gb_per_second": self.ceilings.reads.gb_per_second,
            "matmul_gflops": { "f32": self.ceilings.f32_gflops, "bf16": self.ceilings.bf16_gflops },
            "cells": self.rows.iter().map(cell).collect::<Vec<_>>(),
        })
    }
}

/// Nothing where there is no value.
fn shown(value: Option<f64>) -> String {
    value.map_or("–".into(), |value| format!("{value:.2}"))
}

/// While the table is made: floors are not known yet.
impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Times { ours, candle, .. } = self.times;
        let (shape, format, tokens) = (self.shape.name, self.format.name, self.tokens);
        write!(f, "{shape} {format}, {tokens} tokens: {} ms, candle {} ms", shown(ours), shown(candle))
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ceilings { ref reads, f32_gflops, bf16_gflops } = self.ceilings;
        let threads = rayon::current_num_threads();
        write!(f, "{threads} threads; reads {:.1} GB/s; ", reads.gb_per_second)?;
        writeln!(f, "products f32 {f32_gflops:.0}, bf16 {bf16_gflops:.0} GFLOP/s")?;
        writeln!(
            f,
            "| shape | dtype | tokens | ms | floor ms | of the floor's speed | of the floor's then | candle ms | candle / ours |"
        )?;
        write!(f, "|---|---|---|---|---|---|---|---|---|")?;
        for row in &self.rows {
            let Times { ours, candle, read_gb_per_second: then } = row.times;
            let floor = self.floor_millis(row, reads.gb_per_second);
            let fraction = |floor: f64| ours.map_or("–".into(), |ours| format!("{:.0} %", 100.0 * floor / ours));
            let (fraction, fraction_then) = (fraction(floor), fraction(self.floor_millis(row, then)));
            let ratio = candle.zip(ours).map(|(candle, ours)| candle / ours);
            let (shape, format, tokens) = (row.shape.name, row.format.name, row.tokens);
            write!(f, "\n| {shape} | {format} | {tokens} | {} | {} | ", shown(ours), shown(Some(floor)))?;
            write!(f, "{fraction} | {fraction_then} | {} | {} |", shown(candle), shown(ratio))?;
        }
        Ok(())
    }
}
