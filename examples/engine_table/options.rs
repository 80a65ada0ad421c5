//! What to time and how to show it.

use std::time::Duration;

use phase_moe::Isa;

use crate::Failure;
use crate::common::shape::{FORMATS, Format, Shape};

pub struct Options {
    pub json: bool,
    pub smoke: bool,
    pub candle: bool,
    pub threads: Option<usize>,
    pub shapes: Vec<Shape>,
    pub formats: Vec<Format>,
    pub tokens: Vec<usize>,
}

impl Options {
    /// # Errors
    /// Arguments that mean nothing.
    pub fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, Failure> {
        let (mut json, mut smoke, mut candle, mut threads) = (false, false, true, None);
        let (mut shapes, mut formats, mut tokens) = (None, None, None);
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} wants a value"));
            match argument.as_str() {
                "--json" => json = true,
                "--smoke" => smoke = true,
                "--no-candle" => candle = false,
                // Before anything is made.
                "--isa" => value()?.parse::<Isa>()?.limit(),
                "--threads" => threads = Some(value()?.parse().ok().filter(|&n| n > 0).ok_or("--threads: no number")?),
                "--shapes" => shapes = Some(list(&value()?, Shape::named)?),
                "--dtypes" => formats = Some(list(&value()?, Format::named)?),
                "--tokens" => tokens = Some(list(&value()?, |word| word.parse().ok().filter(|&n| n > 0))?),
                unknown => {
                    let known = "--json, --smoke, --no-candle, --isa, --threads, --shapes, --dtypes, --tokens";
                    return Err(format!("unknown argument {unknown}: expected {known}").into());
                }
            }
        }
        let shapes = match shapes {
            Some(shapes) => shapes,
            None => list(if smoke { "tiny" } else { "tiny,B,C" }, Shape::named)?,
        };
        let formats = formats.unwrap_or_else(|| FORMATS.to_vec());
        Ok(Self { json, smoke, candle, threads, shapes, formats, tokens: tokens.unwrap_or(vec![1, 8, 64, 512]) })
    }

    /// How long a cell is timed, and how often each side at least.
    pub fn patience(&self) -> (Duration, usize) {
        if self.smoke { (Duration::ZERO, 2) } else { (Duration::from_millis(1500), 7) }
    }
}

fn list<T>(words: &str, read: impl Fn(&str) -> Option<T>) -> Result<Vec<T>, Failure> {
    words.split(',').map(|word| read(word).ok_or_else(|| format!("{word} is unknown").into())).collect()
}
