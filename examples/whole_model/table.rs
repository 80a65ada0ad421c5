//! The figures, for people and as JSON.

use std::fmt;

use phase_moe::Isa;
use serde_json::{Value, json};

use crate::cells::Cell;
use crate::floor::Floors;
use crate::shape::{Mixture, Shape};

pub struct Row {
    pub mixture: Mixture,
    pub cell: Cell,
}

pub struct Table {
    pub shape: Shape,
    /// Their dtype.
    pub activations: String,
    pub floors: Floors,
    pub rows: Vec<Row>,
}

impl Table {
    /// Shares of the floor of reads and of that of products; prompts have none.
    fn shares(&self, row: &Row) -> [Option<f64>; 2] {
        let Row { mixture, cell } = row;
        if cell.what != "decode" {
            return [None; 2];
        }
        let read = self.floors.read_tokens_per_second(&self.shape, *mixture, cell.depth);
        let product = self.floors.product_tokens_per_second(&self.shape, *mixture);
        [Some(read), product].map(|floor| floor.map(|floor| cell.tokens_per_second / floor))
    }

    pub fn json(&self) -> Value {
        let isa = Isa::default().to_string();
        let cell = |row: &Row| {
            let [read, product] = self.shares(row);
            let mut cell = row.cell.json(self.shape.name, row.mixture.name(), &isa, read);
            cell["share_of_product_floor"] = json!(product);
            cell
        };
        json!({
            "read_gb_per_second": self.floors.read_gb_per_second(),
            "product_gb_per_second": self.floors.products,
            "threads": rayon::current_num_threads(),
            "layers": self.shape.layers,
            "vocab": self.shape.vocab,
            "activations": self.activations,
            "cells": self.rows.iter().map(cell).collect::<Vec<_>>(),
        })
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shape { name, layers, vocab, .. } = self.shape;
        let (threads, isa) = (rayon::current_num_threads(), Isa::default());
        writeln!(
            f,
            "{name}, {layers} layers, {vocab} words; {threads} threads, {isa}, activations {}",
            self.activations
        )?;
        write!(f, "reads {:.1} GB/s; products in cache", self.floors.read_gb_per_second())?;
        for (name, rate) in &self.floors.products {
            write!(f, " {name} {rate:.1}")?;
        }
        writeln!(f, " GB/s")?;
        writeln!(f, "| type | what | depth | tokens | tokens/s | of the reads' floor | of the products' | spread |")?;
        write!(f, "|---|---|---|---|---|---|---|---|")?;
        for row in &self.rows {
            let Cell { what, depth, tokens, tokens_per_second, spread } = row.cell;
            let shares = self.shares(row);
            let [read, product] =
                shares.map(|share| share.map_or("–".into(), |share| format!("{:.0} %", 100.0 * share)));
            write!(f, "\n| {} | {what} | {depth} | {tokens} | {tokens_per_second:.2} | ", row.mixture.name())?;
            write!(f, "{read} | {product} | {:.0} % |", 100.0 * spread)?;
        }
        Ok(())
    }
}
