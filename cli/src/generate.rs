//! `generate`: continues a prompt.

use std::io::{IsTerminal, Read, Stdout, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Args;
use phase_moe::checkpoint::text;
use phase_moe::decoder::{Continuation, generate_batch};
use phase_moe::{Batch, Error, GenerateOptions, Generation, Model, Router, RouterKind, Sampler};
use serde::Serialize;
use serde_json::to_value;

use crate::chat::Chat;
use crate::global::Global;
use crate::mistake::UserMistake;
use crate::notice::notice;
use crate::options::{
    CacheOptions, CapacityOptions, MemoryOptions, ModelOptions, parse, print_json, read_text, set_routing,
    warn_streamed, warn_unlimited,
};
use crate::output::{self, Inputs};
use crate::report::compare::ModelSummary;
use crate::report::option::{Document, ReportOption};
use crate::report::seen::{MOST_TOKENS, Recorder, ShownText};

/// Continues prompts with a chosen router and prints statistics at the end.
///
/// One prompt is printed token by token, several and --json at the end. A prompt begins with the tokens that the model's tokenizer
/// has begin a text; with --chat that is left to the template.
///
/// Example: phase-moe generate --prompt "And it came to pass" --new-tokens 60 --temperature 0.7
#[derive(Args)]
pub struct Generate {
    #[command(flatten)]
    model: ModelOptions,
    /// Text to continue, repeatable: several are continued side by side in one batch
    #[arg(long, value_name = "TEXT", required_unless_present = "prompt_file")]
    prompt: Vec<String>,
    /// File of the one text to continue, - for standard input; one end of line at its end is not of the text
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompt_file: Option<PathBuf>,
    /// Take each prompt as a user's message, written as the model's chat template has it
    #[arg(long)]
    chat: bool,
    /// What the chat is to be like: its system message
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// Tokens of the prompts in one forward pass; a limit is on each of them
    #[arg(long, value_name = "N", default_value_t = GenerateOptions::new(0).chunk_tokens)]
    chunk_tokens: usize,
    /// Tokens to add at most, to each prompt
    #[arg(long, value_name = "N", default_value_t = 100)]
    new_tokens: usize,
    /// 0 always takes the most likely token
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f64,
    /// Draw from the fewest tokens that hold this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f64,
    /// Router to use
    #[arg(long, value_name = "NAME", default_value = "top-k", value_parser = parse::<RouterKind>)]
    router: RouterKind,
    /// Experts per token [default: the model's]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Room over demand while the prompt is read; decoding one text has no limit [default: none]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    capacity_factor: Option<f64>,
    #[command(flatten)]
    capacity: CapacityOptions,
    /// Keep account of a memory with room for this many experts of a layer, for its hit rate and for the routers cache and
    /// cache+phase [default: none]
    #[arg(long, value_name = "N")]
    cached_experts: Option<usize>,
    #[command(flatten)]
    memory: MemoryOptions,
    #[command(flatten)]
    cache: CacheOptions,
    #[command(flatten)]
    report: ReportOption,
    /// One JSON document instead of the text
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Output {
    /// Of one prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    /// Of several; the figures below are then of all.
    #[serde(skip_serializing_if = "Option::is_none")]
    texts: Option<Vec<Text>>,
    prompt_tokens: usize,
    new_tokens: usize,
    prefill_tokens_per_second: f64,
    decode_tokens_per_second: Option<f64>,
    survival: f64,
    /// Needs `--expert-cache` or `--cached-experts`.
    hit_rate: Option<f64>,
    /// These two need `--expert-cache`.
    expert_bytes_read: Option<u64>,
    peak_resident_expert_bytes: Option<u64>,
}

#[derive(Clone, Serialize)]
struct Text {
    prompt: String,
    text: String,
    prompt_tokens: usize,
    new_tokens: usize,
}

impl Generate {
    pub fn run(self, global: &Global) -> Result<()> {
        let rule = self.capacity.rule_if(self.router, self.capacity_factor, "--capacity-factor")?;
        let settings = self.cache.settings(&[self.router])?;
        let sampler = Sampler::new(self.temperature, self.top_p, self.capacity.seed)?;
        if self.chunk_tokens == 0 {
            return Err(UserMistake("--chunk-tokens is 0: expected at least 1".into()).into());
        }
        self.model.check_memory(self.cached_experts, &self.memory)?;
        let prompts = self.prompts()?;
        let files = self.model.files()?;
        let prompt_file = self.prompt_file.iter().filter(|path| path.as_os_str() != "-");
        let inputs = prompt_file.fold(Inputs::default(), |inputs, path| inputs.file("--prompt-file", path));
        let page = self.report.open(&inputs.model(&files))?;
        let chat = self.chat.then(|| Chat::of(&files)).transpose()?;
        let written = |prompt: &String| match &chat {
            Some(chat) => chat.write(self.system.as_deref(), prompt),
            None => Ok(prompt.clone()),
        };
        let written: Vec<String> = prompts.iter().map(written).collect::<Result<_>>()?;
        let mut model = self.model.load_from(&files, &self.memory)?;
        let mut router: Arc<dyn Router> = Arc::from(self.router.build_with(self.capacity.seed, &settings));
        // Batches of several texts are no text that could be shown.
        let recorder = (page.is_some() && prompts.len() == 1).then(|| {
            let layers = (0..model.decoder().moe_layers().count()).collect();
            Recorder::new(router.clone(), self.router.name().into(), layers)
        });
        if let Some(recorder) = &recorder {
            router = recorder.clone();
        }
        set_routing(&mut model, router, rule.clone(), self.top_k)?;
        let mut state = model.decoder().generation_state();
        if let Some(cached) = self.cached_experts {
            let (policy, admission) = (self.memory.policy(), self.memory.admission());
            state = state.with_memory(model.decoder().expert_memory(cached, policy, admission)?);
        }
        let encode = |prompt: &String| -> Result<Vec<u32>> {
            let ids = model.encode(prompt)?;
            match self.chat {
                _ if ids.is_empty() => Err(self.no_text()),
                true => Ok(ids),
                false => Ok(model.encode_sequence(prompt)?),
            }
        };
        let ids: Vec<Vec<u32>> = written.iter().map(encode).collect::<Result<_>>()?;
        let ids: Vec<&[u32]> = ids.iter().map(Vec::as_slice).collect();
        if let Some(rule) = &rule {
            let (moe, batch) = (&model.decoder().spec().moe, Batch::new(&ids)?);
            let (mut chunks, mut unlimited) = (0, 0);
            for chunk in batch.chunks(self.chunk_tokens) {
                let capacity = rule.capacity(chunk.live_tokens() as usize, moe.experts, moe.top_k)?;
                chunks += 1;
                unlimited += usize::from(capacity.limits().is_none());
            }
            warn_unlimited(rule, unlimited, chunks);
        }
        let options = GenerateOptions { new_tokens: self.new_tokens, chunk_tokens: self.chunk_tokens };
        let mut samplers = vec![sampler; ids.len()];
        let generation = match (ids.as_slice(), self.json) {
            ([prompt], false) => {
                let mut screen = Screen::new(model.continuation(prompt)?, (!self.chat).then_some(&prompts[0]))?;
                let on_token = |_, id| screen.show(id);
                let generation = generate_batch(&model, &ids, options, &mut state, &mut samplers, on_token);
                // The line ends before anything else is said, an error too.
                let shown = screen.finish(generation.is_ok());
                let generation = generation?;
                shown?;
                generation
            }
            _ => {
                let bar = global.progress((ids.len() as u64).saturating_mul(self.new_tokens as u64));
                bar.set_message("generating");
                generate_batch(&model, &ids, options, &mut state, &mut samplers, |_, _| {
                    bar.inc(1);
                    ControlFlow::Continue(())
                })?
            }
        };
        warn_streamed(model.decoder());
        let hit_rate = state.memory().and_then(|memory| rate(memory.hits(), memory.requests()));
        let page = page.map(|page| (page, recorder));
        self.print(&model, &prompts, &ids, &generation, hit_rate, page)
    }

    /// The texts to continue.
    fn prompts(&self) -> Result<Vec<String>> {
        let Some(path) = &self.prompt_file else { return Ok(self.prompt.clone()) };
        let mut prompt = match path.as_os_str() == "-" {
            true => {
                let mut bytes = Vec::new();
                std::io::stdin().read_to_end(&mut bytes).context("standard input")?;
                text(bytes).map_err(|error| Error::Io { path: "standard input".into(), reason: error })?
            }
            false => read_text(path)?,
        };
        // Editors and `echo` end the last line, which is seldom what is to be continued.
        if prompt.ends_with('\n') {
            prompt.pop();
            prompt.truncate(prompt.strip_suffix('\r').map_or(prompt.len(), str::len));
        }
        Ok(vec![prompt])
    }

    fn no_text(&self) -> anyhow::Error {
        let source =
            self.prompt_file.as_ref().map_or("--prompt".into(), |path| format!("--prompt-file {}", path.display()));
        UserMistake(format!("{source}: expected at least one token of text, got none")).into()
    }

    fn print(
        &self,
        model: &Model,
        prompts: &[String],
        before: &[&[u32]],
        generation: &Generation,
        hit_rate: Option<f64>,
        page: Option<(output::Output, Option<Arc<Recorder>>)>,
    ) -> Result<()> {
        let cache = model.decoder().expert_cache().map(|cache| cache.statistics());
        let text = |((prompt, before), ids): ((&String, &&[u32]), &Vec<u32>)| {
            let (text, prompt) = (model.decode_after(before, ids)?, prompt.clone());
            Ok(Text { prompt, text, prompt_tokens: before.len(), new_tokens: ids.len() })
        };
        let texts: Vec<Text> = prompts.iter().zip(before).zip(&generation.texts).map(text).collect::<Result<_>>()?;
        let decoded = generation.decode_tokens > 0;
        let (alone, several) = match texts.as_slice() {
            [alone] => (Some(alone.text.clone()), None),
            _ => (None, Some(texts.clone())),
        };
        let output = Output {
            text: alone,
            texts: several,
            prompt_tokens: texts.iter().map(|text| text.prompt_tokens).sum(),
            new_tokens: texts.iter().map(|text| text.new_tokens).sum(),
            prefill_tokens_per_second: generation.prompt_tokens.iter().sum::<usize>() as f64
                / generation.prefill_time.as_secs_f64(),
            decode_tokens_per_second: decoded
                .then(|| generation.decode_tokens as f64 / generation.decode_time.as_secs_f64()),
            survival: generation.slots.survival(),
            hit_rate: cache.as_ref().map_or(hit_rate, |cache| rate(cache.hits, cache.requests)),
            expert_bytes_read: cache.as_ref().map(|cache| cache.bytes_read),
            peak_resident_expert_bytes: cache.as_ref().map(|cache| cache.peak_bytes as u64),
        };
        if let Some((page, recorder)) = page {
            let spec = model.decoder().spec();
            let document = Document::new("generate", Some(ModelSummary::new(model.name(), spec)), &output)?;
            let mut document = document.with_layers(spec.moe_blocks().collect(), spec.moe.experts, spec.moe.top_k);
            if let (Some(recorder), [before], [new]) = (recorder, before, generation.texts.as_slice()) {
                // The last token has not been through the model.
                let ids = [before, &new[..new.len().saturating_sub(1)]].concat();
                let text = ShownText::of_ids(model, &ids, "text", Some(before.len()), MOST_TOKENS)?;
                let cached = self.cached_experts.or(model.decoder().expert_cache().map(|cache| cache.capacity(0)));
                let bytes = cache.as_ref().map(|cache| cache.bytes_read).zip(cache.as_ref().map(|cache| cache.misses));
                let bytes = bytes.and_then(|(bytes, misses)| bytes.checked_div(misses));
                document.runs.push(recorder.run()?);
                document.cache.extend(cached.and_then(|cached| recorder.cache(self.router.name(), cached, bytes)));
                document.text = Some(to_value(text)?);
            }
            document.write(page)?;
        }
        if self.json {
            return print_json(&output);
        }
        let positions = model.decoder().spec().max_positions;
        let cut = |text: &Text| text.new_tokens < self.new_tokens && text.prompt_tokens + text.new_tokens >= positions;
        if texts.iter().any(cut) {
            notice(format_args!("stopped at the model's {positions} positions"));
        }
        // One alone is on the screen already.
        let several = if texts.len() > 1 { texts.as_slice() } else { &[] };
        let mut out = std::io::stdout();
        for (index, text) in several.iter().enumerate() {
            if index > 0 {
                writeln!(out)?;
            }
            if out.is_terminal() && !self.chat {
                write!(out, "{}", text.prompt)?;
            }
            writeln!(out, "{}", text.text)?;
        }
        let decode = output.decode_tokens_per_second.map_or("–".into(), |rate| format!("{rate:.0}"));
        let hits = output.hit_rate.map_or(String::new(), |rate| format!(", {:.1} % of experts hit", 100.0 * rate));
        let ahead = cache.map(|cache| cache.prefetch).filter(|ahead| ahead.issued > 0);
        let ahead =
            ahead.map_or(String::new(), |ahead| format!(", {} of {} reads ahead used", ahead.used, ahead.issued));
        notice(format_args!(
            "{} tokens of prompt{} at {:.0} tokens/s, {} new at {decode} tokens/s, {:.1} % of slots kept{hits}{ahead}",
            output.prompt_tokens,
            if texts.len() > 1 { "s" } else { "" },
            output.prefill_tokens_per_second,
            output.new_tokens,
            100.0 * output.survival
        ));
        Ok(())
    }
}

/// A text on standard output as it comes, so that whatever ends the run leaves there what was generated.
struct Screen {
    out: Stdout,
    text: Continuation,
    /// Whether something stands on the line.
    begun: bool,
    failed: Option<anyhow::Error>,
}

impl Screen {
    /// On a terminal the prompt reads on into the continuation; in a pipe there is the continuation alone.
    fn new(text: Continuation, prompt: Option<&String>) -> Result<Self> {
        let mut screen = Self { out: std::io::stdout(), text, begun: false, failed: None };
        if let Some(prompt) = prompt.filter(|_| screen.out.is_terminal()) {
            screen.write(prompt)?;
        }
        Ok(screen)
    }

    fn show(&mut self, id: u32) -> ControlFlow<()> {
        let shown = self.text.push(id).map_err(anyhow::Error::from).and_then(|text| Ok(self.write(&text)?));
        match shown {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                self.failed = Some(error);
                ControlFlow::Break(())
            }
        }
    }

    fn write(&mut self, text: &str) -> std::io::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        self.begun = true;
        self.out.write_all(text.as_bytes())?;
        self.out.flush()
    }

    /// What was held back, and the end of the line, also of an empty one if the text is `whole`; or what went wrong on the way.
    fn finish(mut self, whole: bool) -> Result<()> {
        if let Some(error) = self.failed {
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

/// Hits of requests; `None` without any.
fn rate(hits: u64, requests: u64) -> Option<f64> {
    (requests > 0).then(|| hits as f64 / requests as f64)
}
