//! One text as it comes: on standard output as soon as the model has said it, with a live line where somebody looks.

use std::io::{Stdout, Write};
use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::Result;
use phase_moe::decoder::{Continuation, DecoderState};

use super::figures::{Reads, percent};
use super::live::Live;
use crate::terminal::is_terminal;

/// A text on standard output as it comes, so that whatever ends the run leaves there what was generated.
pub struct Screen {
    out: Stdout,
    text: Continuation,
    live: Live,
    /// New tokens, and when the first came.
    tokens: usize,
    first: Option<Instant>,
    /// Whether something stands on the line.
    begun: bool,
    failed: Option<anyhow::Error>,
}

impl Screen {
    /// On a terminal the prompt reads on into the continuation; in a pipe there is the continuation alone.
    pub fn new(text: Continuation, prompt: Option<&str>, live: Live) -> Result<Self> {
        let mut screen =
            Self { out: std::io::stdout(), text, live, tokens: 0, first: None, begun: false, failed: None };
        if let Some(prompt) = prompt.filter(|_| is_terminal()) {
            screen.write(prompt)?;
        }
        screen.live.after(|| "reading the prompt".into());
        Ok(screen)
    }

    /// Shows what `id` adds to the text, and how it goes: `slots` and `reads` are of this run so far.
    pub fn show(&mut self, id: u32, state: &DecoderState, reads: impl FnOnce() -> Reads) -> ControlFlow<()> {
        let shown = self.text.push(id).map_err(anyhow::Error::from).and_then(|text| Ok(self.write(&text)?));
        if let Err(error) = shown {
            self.failed = Some(error);
            return ControlFlow::Break(());
        }
        self.tokens += 1;
        let (tokens, first) = (self.tokens, *self.first.get_or_insert_with(Instant::now));
        self.live.after(|| {
            let seconds = first.elapsed().as_secs_f64();
            let rate =
                if tokens > 1 { format!(", {:.0} tokens/s", (tokens - 1) as f64 / seconds) } else { String::new() };
            let kept = format!(", {} of slots kept", percent(state.slots.survival()));
            let hits = reads().hit_rate().map_or(String::new(), |rate| format!(", {} of experts hit", percent(rate)));
            format!("{tokens} tokens{rate}{kept}{hits}")
        });
        ControlFlow::Continue(())
    }

    fn write(&mut self, text: &str) -> std::io::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        self.begun = true;
        self.live.before(text);
        self.out.write_all(text.as_bytes())?;
        self.out.flush()
    }

    /// What was held back, and the end of the line, also of an empty one if the text is `whole`; or what went wrong on the way.
    pub fn finish(mut self, whole: bool) -> Result<()> {
        self.live.wipe();
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        let rest = self.text.finish()?;
        self.write(&rest)?;
        if whole || self.begun {
            self.write("\n")?;
        }
        Ok(())
    }
}
