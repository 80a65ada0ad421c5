//! What is timed of a whole model, the same in every program that runs it: prompts, and tokens one by one after so many others.

use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Value, json};

/// A program with a model in it, that keeps one text's keys and values.
pub trait Program {
    /// Begins a new text.
    fn forget(&mut self) -> Result<()>;

    /// Goes on with the text; when it returns there are logits of its last token.
    fn feed(&mut self, tokens: &[u32]) -> Result<()>;

    /// Logits of every token of a text of its own.
    fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>>;
}

/// Tokens of a prompt in one forward pass.
pub const CHUNK_TOKENS: usize = 512;

/// Repetitions that differ by more say nothing.
pub const STEADY: f64 = 0.15;

/// Tokens whose logits are compared.
pub const COMPARED_TOKENS: usize = 64;

#[derive(Args, Clone)]
pub struct Plan {
    /// Lengths of prompts
    #[arg(long, value_delimiter = ',', default_value = "8,64,512")]
    pub prompts: Vec<usize>,
    /// Tokens before those that are decoded
    #[arg(long, value_delimiter = ',', default_value = "8,512,4096")]
    pub depths: Vec<usize>,
    /// Tokens decoded in one repetition
    #[arg(long, default_value_t = 16)]
    pub new_tokens: usize,
    /// Repetitions that the median is of, four times as many where they differ by more than 15 %
    #[arg(long, default_value_t = 5)]
    pub repeat: usize,
}

/// One figure.
#[derive(Clone)]
pub struct Cell {
    pub what: &'static str,
    pub depth: usize,
    pub tokens: usize,
    pub tokens_per_second: f64,
    /// How far the fastest repetition is above the slowest, as a share of it.
    pub spread: f64,
}

impl Cell {
    /// With what it was measured on.
    pub fn json(&self, shape: &str, dtype: &str, isa: &str, share_of_floor: Option<f64>) -> Value {
        json!({
            "what": self.what, "shape": shape, "depth": self.depth, "tokens": self.tokens, "dtype": dtype, "isa": isa,
            "tokens_per_second": self.tokens_per_second, "share_of_floor": share_of_floor, "spread": self.spread,
        })
    }
}

impl Plan {
    /// Positions that the longest text takes.
    #[allow(dead_code)]
    pub fn positions(&self) -> usize {
        let depth = self.depths.iter().max().unwrap_or(&0) + 1 + 4 * self.repeat * self.new_tokens;
        depth.max(*self.prompts.iter().max().unwrap_or(&0)).max(COMPARED_TOKENS)
    }

    /// All cells of a model, each shown as it is done.
    ///
    /// # Errors
    /// Those of the program.
    pub fn measure(&self, vocab: usize, program: &mut impl Program) -> Result<Vec<Cell>> {
        let mut cells = Vec::new();
        let mut random = Random(1);
        let mut done = |cell: Cell| {
            let Cell { what, depth, tokens, tokens_per_second, spread } = cell;
            eprintln!(
                "  {what:6} depth {depth:4}, {tokens:3} tokens: {tokens_per_second:7.2} tokens/s, spread {:.0} %",
                100.0 * spread
            );
            cells.push(cell);
        };
        for &tokens in &self.prompts {
            let (tokens_per_second, spread) = self.steady(|| {
                program.forget()?;
                let text = random.tokens(tokens, vocab);
                let start = Instant::now();
                text.chunks(CHUNK_TOKENS).try_for_each(|chunk| program.feed(chunk))?;
                Ok(tokens as f64 / start.elapsed().as_secs_f64())
            })?;
            done(Cell { what: "prompt", depth: 0, tokens, tokens_per_second, spread });
        }
        for &depth in &self.depths {
            program.forget()?;
            random.tokens(depth, vocab).chunks(CHUNK_TOKENS).try_for_each(|chunk| program.feed(chunk))?;
            // What is prepared at the first token alone is not counted.
            program.feed(&random.tokens(1, vocab))?;
            let (tokens_per_second, spread) = self.steady(|| {
                let text = random.tokens(self.new_tokens, vocab);
                let start = Instant::now();
                text.chunks(1).try_for_each(|token| program.feed(token))?;
                Ok(self.new_tokens as f64 / start.elapsed().as_secs_f64())
            })?;
            done(Cell { what: "decode", depth, tokens: self.new_tokens, tokens_per_second, spread });
        }
        Ok(cells)
    }

    /// Median and spread of repetitions in a row that hardly differ, or of those that differ least.
    fn steady(&self, mut rate: impl FnMut() -> Result<f64>) -> Result<(f64, f64)> {
        let (repeat, mut rates, mut best) = (self.repeat.max(1), Vec::new(), None::<(f64, f64)>);
        while rates.len() < 4 * repeat && best.is_none_or(|(_, spread)| spread > STEADY) {
            rates.push(rate()?);
            if let Some(from) = rates.len().checked_sub(repeat) {
                let mut last = rates[from..].to_vec();
                last.sort_by(f64::total_cmp);
                let spread = last[repeat - 1] / last[0] - 1.0;
                if best.is_none_or(|(_, least)| spread < least) {
                    best = Some((last[repeat / 2], spread));
                }
            }
        }
        best.context("a repetition")
    }
}

/// The text whose logits are compared.
pub fn compared_tokens(vocab: usize) -> Vec<u32> {
    Random(7).tokens(COMPARED_TOKENS, vocab)
}

/// Knuth's linear congruential generator (MMIX).
struct Random(u64);

impl Random {
    fn tokens(&mut self, count: usize, vocab: usize) -> Vec<u32> {
        let mut draw = || {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((self.0 >> 33) % vocab as u64) as u32
        };
        (0..count).map(|_| draw()).collect()
    }
}
