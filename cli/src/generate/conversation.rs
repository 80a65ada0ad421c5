//! A conversation: messages come from standard input, a line each, and keys and values stay from turn to turn.
//!
//! Each turn the template writes the whole conversation, which becomes tokens. The first of them are those that the model has seen, and
//! only what comes after goes through it. Where the template writes earlier turns otherwise than before (some leave out what the model
//! thought), or the tokenizer otherwise than the model did, the state is cut back to what still is the same. A recurrent state goes back
//! to where it was marked, which is before an answer begins. So a turn is answered as the whole conversation would be in a prompt, but for
//! limits, which are of what goes through at a time.
//!
//! The template gets an answer back as its text with all its marks, or, where it reads thoughts apart, as those and what was said.

use std::io::{BufRead, IsTerminal, Write};
use std::ops::{ControlFlow, Range};
use std::time::Instant;

use anyhow::{Context, Result};
use phase_moe::checkpoint::text;
use phase_moe::decoder::{DecoderState, Slots};
use phase_moe::{Batch, Error, GenerateOptions, Generation, Model, Sampler, generate};
use serde::Serialize;

use super::figures::{Figures, Reads, Sums};
use super::interrupt::Interrupt;
use super::limits::Limits;
use super::live::Live;
use super::screen::Screen;
use crate::chat::{Chat, Message};
use crate::notice::notice;
use crate::terminal::is_terminal;

/// Where messages come from, to error messages.
const INPUT: &str = "standard input";

/// What a line may ask for instead of saying something to the model.
const CLEAR: &str = "/clear";
const EXIT: &str = "/exit";

/// A model and what was said to it.
pub struct Conversation<'a> {
    pub model: &'a Model,
    pub chat: &'a Chat,
    pub system: Option<&'a str>,
    pub state: DecoderState,
    pub sampler: Sampler,
    pub options: GenerateOptions,
    pub limits: &'a mut Limits,
}

/// What has been said, what the chat is to be like first, and what of it the model has seen.
struct Past {
    messages: Vec<Message>,
    /// Tokens whose keys and values the state keeps.
    seen: Vec<u32>,
}

/// A turn as JSON.
#[derive(Serialize)]
struct Turn<'a> {
    user: &'a str,
    /// What the model answered; `None` where there was no room for an answer.
    text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
    /// Tokens of the whole conversation whose keys and values were there already; `prompt_tokens` are those that went through.
    kept_tokens: usize,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    figures: Option<Figures>,
}

impl Conversation<'_> {
    /// Answers line after line until there are no more. Gives sums over all turns.
    pub fn run(mut self, json: bool, quiet: bool) -> Result<(Sums, DecoderState)> {
        let (mut past, mut sums, interrupt) = (self.begin(), Sums::default(), Interrupt::new()?);
        if std::io::stdin().is_terminal() && !quiet {
            notice(format_args!(
                "each line is a message; {CLEAR} begins another conversation, {EXIT} ends, Ctrl-C stops an answer"
            ));
        }
        while let Some(line) = next_line()? {
            match line.trim() {
                "" => continue,
                EXIT => break,
                CLEAR => {
                    past = self.begin();
                    self.state.truncate(0)?;
                    continue;
                }
                _ => {}
            }
            past.messages.push(Message::new("user", line.as_str()));
            let prompt = self.chat.write(&past.messages)?;
            let ids = self.model.encode(&prompt)?;
            let most = self.model.decoder().spec().max_positions;
            if ids.len() > most {
                let message = format!(
                    "the conversation would have {} tokens, and the model has {most} positions: this message is left out; \
                     {CLEAR} begins another conversation, {EXIT} ends this one",
                    ids.len()
                );
                past.messages.pop();
                match json {
                    true => self.print(&Turn {
                        user: &line,
                        text: None,
                        error: Some(&message),
                        kept_tokens: past.seen.len(),
                        figures: None,
                    })?,
                    false => notice(message),
                }
                continue;
            }
            let kept = self.keep(&mut past, &ids)?;
            let mark = self.place_to_mark(&past, &ids)?;
            let read = kept..mark.max(kept);
            for part in [&ids[read.clone()], &ids[read.end..]].into_iter().filter(|part| !part.is_empty()) {
                self.limits.count(self.model.decoder(), &[part], self.options.chunk_tokens)?;
            }
            let before = Reads::of(self.model.decoder(), &self.state);
            let parts = {
                let _answering = interrupt.answering();
                self.answer(&ids, read, mark >= kept, (!json).then(|| Live::new(quiet)), &interrupt)?
            };
            let answer = parts[1].texts.first().map_or(&[][..], Vec::as_slice);
            let text = self.model.decode_after(&ids, answer)?;
            past.seen = [ids.as_slice(), answer].concat();
            past.seen.truncate(self.state.position());
            parts.iter().for_each(|part| sums.add(part));
            if json {
                let mut turn = Sums::default();
                parts.iter().for_each(|part| turn.add(part));
                let reads = Reads::of(self.model.decoder(), &self.state).since(before);
                self.print(&Turn {
                    user: &line,
                    text: Some(&text),
                    error: None,
                    kept_tokens: kept,
                    figures: Some(turn.figures(reads, None)),
                })?;
            } else if answer.len() < self.options.new_tokens && ids.len() + answer.len() >= most {
                notice(format_args!("stopped at the model's {most} positions"));
            }
            past.messages.push(self.chat.answer(&prompt, text));
        }
        Ok((sums, self.state))
    }

    fn begin(&self) -> Past {
        let system = self.system.map(|system| Message::new("system", system));
        Past { messages: system.into_iter().collect(), seen: Vec::new() }
    }

    /// Cuts the state back to what it has seen of `ids`; how many of them that is. The last one goes through in any case, for what
    /// comes after it.
    fn keep(&mut self, past: &mut Past, ids: &[u32]) -> Result<usize> {
        let same = past.seen.iter().zip(ids).take_while(|(seen, id)| seen == id).count();
        let kept = same.min(ids.len().saturating_sub(1));
        if kept == past.seen.len() {
            return Ok(kept);
        }
        // A recurrent state goes back less far, or to nothing.
        let kept = self.state.truncate(kept)?;
        past.seen.truncate(kept);
        Ok(kept)
    }

    /// How many tokens of a prompt there are before the answer begins, for models whose state does not go back anywhere: what comes after
    /// them the next turn may write otherwise. 0 for the others.
    fn place_to_mark(&self, past: &Past, ids: &[u32]) -> Result<usize> {
        if self.model.decoder().spec().state_numbers() == 0 {
            return Ok(0);
        }
        // A template that refuses this has no such place.
        let Ok(closed) = self.chat.write_closed(&past.messages) else { return Ok(0) };
        let closed = self.model.encode(&closed)?;
        let same = closed.iter().zip(ids).take_while(|(closed, id)| closed == id).count();
        Ok(same.min(ids.len().saturating_sub(1)))
    }

    /// Reads a part of a prompt, which may be empty, and marks where it ends.
    fn read(&mut self, ids: &[u32], marks: bool) -> Result<Generation> {
        let mut read = Generation::default();
        if !ids.is_empty() {
            let (started, before) = (Instant::now(), self.state.slots);
            self.model.decoder().prefill(&Batch::new(&[ids])?, self.options.chunk_tokens, &mut self.state)?;
            read.prompt_tokens = vec![ids.len()];
            read.prefill_time = started.elapsed();
            let after = self.state.slots;
            read.slots = Slots { asked: after.asked - before.asked, kept: after.kept - before.kept };
        }
        if marks {
            self.state.mark();
        }
        Ok(read)
    }

    /// Reads those of `ids` that come after what is in the state, marks their end where that is wanted, and continues after all of them; on the
    /// screen where there is a `live` line. What the two parts did.
    fn answer(
        &mut self,
        ids: &[u32],
        read: Range<usize>,
        marks: bool,
        live: Option<Live>,
        interrupt: &Interrupt,
    ) -> Result<[Generation; 2]> {
        let (model, rest) = (self.model, &ids[read.end..]);
        let go_on = |shown: ControlFlow<()>| if interrupt.is_asked() { ControlFlow::Break(()) } else { shown };
        let Some(live) = live else {
            let read = self.read(&ids[read], marks)?;
            let on_token = |_| go_on(ControlFlow::Continue(()));
            return Ok([read, generate(model, rest, self.options, &mut self.state, &mut self.sampler, on_token)?]);
        };
        let mut screen = Screen::new(model.continuation(ids)?, None, live)?;
        let parts = self.read(&ids[read], marks).and_then(|read| {
            let Self { state, sampler, options, .. } = self;
            let generation = super::stream(model, rest, *options, state, sampler, |id, state| {
                go_on(screen.show(id, state, || Reads::of(model.decoder(), state)))
            });
            Ok([read, generation?])
        });
        // The line ends before anything else is said, an error too.
        let shown = screen.finish(parts.is_ok());
        let parts = parts?;
        shown?;
        Ok(parts)
    }

    /// One line of JSON.
    fn print(&self, turn: &Turn<'_>) -> Result<()> {
        let mut out = std::io::stdout();
        writeln!(out, "{}", serde_json::to_string(turn)?)?;
        Ok(out.flush()?)
    }
}

/// The next message, asked for where a person types it; `None` at the end.
fn next_line() -> Result<Option<String>> {
    let mut input = std::io::stdin().lock();
    let is_typed = input.is_terminal();
    if is_typed {
        prompt("> ")?;
    }
    let mut bytes = Vec::new();
    if input.read_until(b'\n', &mut bytes).context(INPUT)? == 0 {
        if is_typed {
            prompt("\n")?;
        }
        return Ok(None);
    }
    let mut line = text(bytes).map_err(|reason| Error::Io { path: INPUT.into(), reason })?;
    line.truncate(line.trim_end_matches(['\n', '\r']).len());
    Ok(Some(line))
}

/// Text for who types: not among the answers where these go to a file.
fn prompt(text: &str) -> Result<()> {
    let mut out = std::io::stdout();
    match is_terminal() {
        true => out.write_all(text.as_bytes()).and_then(|()| out.flush())?,
        false => {
            // Nothing depends on whether anybody sees it.
            let _ = std::io::stderr().write_all(text.as_bytes());
        }
    }
    Ok(())
}
