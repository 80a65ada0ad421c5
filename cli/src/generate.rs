//! `generate`: continues prompts, or holds a conversation.

mod conversation;
mod figures;
mod interrupt;
mod limits;
mod live;
mod screen;

use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Args;
use phase_moe::checkpoint::text;
use phase_moe::decoder::{DecoderState, generate_batch};
use phase_moe::parallel::ExpertParallel;
use phase_moe::{
    CacheRouter, CapacityRule, Error, GenerateOptions, Generation, Model, Router, RouterKind, Sampler, Weights,
};
use serde::Serialize;
use serde_json::to_value;

use self::conversation::Conversation;
use self::figures::{Figures, Reads, Sums};
use self::limits::Limits;
use self::live::Live;
use self::screen::Screen;
use crate::chat::{Chat, Message};
use crate::global::Global;
use crate::mistake::UserMistake;
use crate::notice::notice;
use crate::options::{
    CacheOptions, CapacityOptions, MemoryOptions, ModelOptions, TopKOptions, parse, print_json, read_text, set_routing,
    warn_streamed,
};
use crate::output::{self, Inputs};
use crate::ranks::{self, ParallelOptions, Ranks, digest};
use crate::report::compare::ModelSummary;
use crate::report::option::{Document, ReportOption};
use crate::report::seen::{MOST_TOKENS, Recorder, ShownText};
use crate::terminal::is_terminal;

/// Continues prompts with a chosen router and prints statistics at the end.
///
/// One prompt is printed token by token, several and --json at the end. A prompt begins with the tokens that the model's tokenizer
/// has begin a text; with --chat that is left to the template.
///
/// --chat without a prompt is a conversation: messages are read from standard input, a line each; what was said before stays in
/// the model's memory. /clear begins another, /exit or the end of input ends it, Ctrl-C stops an answer. With --json each turn is a
/// line of JSON.
///
/// Example: phase-moe generate --prompt "And it came to pass" --new-tokens 60 --temperature 0.7
#[derive(Args)]
pub struct Generate {
    #[command(flatten)]
    model: ModelOptions,
    /// Text to continue, repeatable: several are continued side by side in one batch
    #[arg(long, value_name = "TEXT", required_unless_present_any = ["prompt_file", "chat"])]
    prompt: Vec<String>,
    /// File of the one text to continue, - for standard input; one end of line at its end is not of the text
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompt_file: Option<PathBuf>,
    /// Take each prompt as a user's message, written as the model's chat template has it; without one, hold a conversation
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
    #[command(flatten)]
    top_k: TopKOptions,
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
    parallel: ParallelOptions,
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
    /// Of several; the figures are then of all.
    #[serde(skip_serializing_if = "Option::is_none")]
    texts: Option<Vec<Text>>,
    #[serde(flatten)]
    figures: Figures,
}

#[derive(Clone, Serialize)]
struct Text {
    prompt: String,
    text: String,
    prompt_tokens: usize,
    new_tokens: usize,
}

/// What is there before the model is loaded.
struct Opened {
    rule: Option<CapacityRule>,
    settings: CacheRouter,
    sampler: Sampler,
    prompts: Vec<String>,
    /// The same as they go to the tokenizer.
    written: Vec<String>,
    chat: Option<Chat>,
    files: Weights,
    page: Option<output::Output>,
}

impl Generate {
    pub fn run(mut self, global: &Global) -> Result<()> {
        let ranks = self.parallel.start()?;
        ranks.together(self.capacity.over(&ranks))?;
        let (opened, facts) = ranks.together(self.open(&ranks))?;
        ranks.agree(&facts)?;
        let (model, ids) = ranks.together(self.load(&ranks, &opened))?;
        ranks.agree(&[("text", digest(ids.iter().flatten().copied()))])?;
        self.go_on(global, opened, model, &ids)
    }

    /// Everything that can be found wrong before the model is loaded.
    fn open(&self, ranks: &Ranks) -> Result<(Opened, [(&'static str, String); 3])> {
        let rule = self.capacity.rule_if(self.router, self.capacity_factor, "--capacity-factor")?;
        let settings = self.cache.settings(&[self.router])?;
        let sampler = Sampler::new(self.temperature, self.top_p, self.capacity.seed)?;
        if self.chunk_tokens == 0 {
            return Err(UserMistake("--chunk-tokens is 0: expected at least 1".into()).into());
        }
        self.model.check_memory(self.cached_experts, &self.memory)?;
        if ranks.count().is_some() {
            let from_input = self.prompt_file.as_ref().is_some_and(|path| path.as_os_str() == "-");
            if from_input || (self.prompt.is_empty() && self.prompt_file.is_none()) {
                let message = "--expert-parallel: expected --prompt or a --prompt-file, which all ranks can read, got standard input";
                return Err(UserMistake(message.into()).into());
            }
        }
        let prompts = self.prompts()?;
        let files = self.model.files()?;
        let prompt_file = self.prompt_file.iter().filter(|path| path.as_os_str() != "-");
        let inputs = prompt_file.fold(Inputs::default(), |inputs, path| inputs.file("--prompt-file", path));
        let page = self.report.open(&inputs.model(&files))?;
        if page.is_some() && prompts.is_empty() {
            let message = "--report: expected --prompt or --prompt-file beside it, a conversation has no page";
            return Err(UserMistake(message.into()).into());
        }
        let chat = self.chat.then(|| Chat::of(&files)).transpose()?;
        let write = |prompt: &String| match &chat {
            Some(chat) => {
                let system = self.system.iter().map(|system| Message::new("system", system));
                chat.write(&system.chain([Message::new("user", prompt)]).collect::<Vec<_>>())
            }
            None => Ok(prompt.clone()),
        };
        let written: Vec<String> = prompts.iter().map(write).collect::<Result<_>>()?;
        let facts = ranks::facts(&files)?;
        Ok((Opened { rule, settings, sampler, prompts, written, chat, files, page }, facts))
    }

    /// The model, and the tokens to continue.
    fn load(&self, ranks: &Ranks, opened: &Opened) -> Result<(Model, Vec<Vec<u32>>)> {
        let parallel = match ranks.count() {
            Some(_) => ranks.spread(&self.capacity.rule(1.0)?)?,
            None => None,
        };
        let mut model = self.model.load_from(&opened.files, &self.memory, parallel)?;
        self.top_k.set(model.decoder_mut())?;
        let ids = self.ids(&model, &opened.written)?;
        Ok((model, ids))
    }

    fn go_on(self, global: &Global, opened: Opened, mut model: Model, ids: &[Vec<u32>]) -> Result<()> {
        let Opened { rule, settings, sampler, prompts, chat, page, .. } = opened;
        let mut router: Arc<dyn Router> = Arc::from(self.router.build_with(self.capacity.seed, &settings));
        // Batches of several texts are no text that could be shown.
        let recorder = (page.is_some() && prompts.len() == 1).then(|| {
            let layers = (0..model.decoder().moe_layers().count()).collect();
            Recorder::new(router.clone(), self.router.name().into(), layers)
        });
        if let Some(recorder) = &recorder {
            router = recorder.clone();
        }
        set_routing(model.decoder_mut(), router, rule.clone());
        let mut state = model.decoder().generation_state();
        if let Some(cached) = self.cached_experts {
            let (policy, admission) = (self.memory.policy(), self.memory.admission());
            state = state.with_memory(model.decoder().expert_memory(cached, policy, admission)?);
        }
        let mut limits = Limits::new(rule);
        match (&chat, prompts.as_slice()) {
            (Some(chat), []) => {
                let (system, options) = (self.system.as_deref(), self.generate_options());
                let conversation =
                    Conversation { model: &model, chat, system, state, sampler, options, limits: &mut limits };
                let (sums, state) = conversation.run(self.json, global.quiet())?;
                limits.warn();
                warn_streamed(model.decoder());
                self.say(&model, &sums.figures(Reads::of(model.decoder(), &state), None), "messages");
                Ok(())
            }
            (_, prompts) => {
                let ids: Vec<&[u32]> = ids.iter().map(Vec::as_slice).collect();
                limits.count(model.decoder(), &ids, self.chunk_tokens)?;
                limits.warn();
                let before = model.decoder().parallel().map(ExpertParallel::totals);
                let generation = self.generate(global, &model, prompts, &ids, &mut state, sampler)?;
                warn_streamed(model.decoder());
                let mut sums = Sums::default();
                sums.add(&generation);
                let over = model.decoder().parallel().zip(before);
                let shares = over.map(|(ranks, before)| sums.over_ranks(ranks, &before)).transpose()?;
                let figures = sums.figures(Reads::of(model.decoder(), &state), shares);
                let page = page.map(|page| (page, recorder));
                self.print(&model, prompts, &ids, &generation, figures, page)
            }
        }
    }

    fn generate_options(&self) -> GenerateOptions {
        GenerateOptions { new_tokens: self.new_tokens, chunk_tokens: self.chunk_tokens }
    }

    /// The tokens to continue.
    fn ids(&self, model: &Model, written: &[String]) -> Result<Vec<Vec<u32>>> {
        let encode = |prompt: &String| -> Result<Vec<u32>> {
            let ids = model.encode(prompt)?;
            match self.chat {
                _ if ids.is_empty() => Err(self.no_text()),
                true => Ok(ids),
                false => Ok(model.encode_sequence(prompt)?),
            }
        };
        written.iter().map(encode).collect()
    }

    /// Continues `ids`: one text on the screen as it comes.
    fn generate(
        &self,
        global: &Global,
        model: &Model,
        prompts: &[String],
        ids: &[&[u32]],
        state: &mut DecoderState,
        mut sampler: Sampler,
    ) -> Result<Generation> {
        let options = self.generate_options();
        let ([prompt], false) = (ids, self.json) else {
            let bar = global.progress((ids.len() as u64).saturating_mul(self.new_tokens as u64));
            bar.set_message("generating");
            let mut samplers = vec![sampler; ids.len()];
            return Ok(generate_batch(model, ids, options, state, &mut samplers, |_, _, _| {
                bar.inc(1);
                ControlFlow::Continue(())
            })?);
        };
        let shown = prompts.first().filter(|_| !self.chat).map(String::as_str);
        let mut screen = Screen::new(model.continuation(prompt)?, shown, Live::new(global.quiet()))?;
        let generation = stream(model, prompt, options, state, &mut sampler, |id, state| {
            screen.show(id, state, || Reads::of(model.decoder(), state))
        });
        // The line ends before anything else is said, an error too.
        let shown = screen.finish(generation.is_ok());
        let generation = generation?;
        shown?;
        Ok(generation)
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
        figures: Figures,
        page: Option<(output::Output, Option<Arc<Recorder>>)>,
    ) -> Result<()> {
        let text = |((prompt, before), ids): ((&String, &&[u32]), &Vec<u32>)| {
            let (text, prompt) = (model.decode_after(before, ids)?, prompt.clone());
            Ok(Text { prompt, text, prompt_tokens: before.len(), new_tokens: ids.len() })
        };
        let texts: Vec<Text> = prompts.iter().zip(before).zip(&generation.texts).map(text).collect::<Result<_>>()?;
        let output = match texts.as_slice() {
            [alone] => Output { text: Some(alone.text.clone()), texts: None, figures },
            _ => Output { text: None, texts: Some(texts.clone()), figures },
        };
        if let Some((page, recorder)) = page {
            let spec = model.decoder().spec();
            let document = Document::new("generate", Some(ModelSummary::new(model.name(), spec)), &output)?;
            let mut document = document.with_layers(spec.moe_blocks().collect(), spec.moe.experts, spec.moe.top_k);
            if let (Some(recorder), [before], [new]) = (recorder, before, generation.texts.as_slice()) {
                // The last token has not been through the model.
                let ids = [before, &new[..new.len().saturating_sub(1)]].concat();
                let text = ShownText::of_ids(model, &ids, "text", Some(before.len()), MOST_TOKENS)?;
                let cache = model.decoder().expert_cache();
                let rooms = (0..model.decoder().moe_layers().count())
                    .map(|layer| self.cached_experts.or(cache.map(|cache| cache.capacity(layer))))
                    .collect::<Option<Vec<_>>>();
                let read = cache.map(|cache| cache.statistics()).map(|read| (read.bytes_read, read.misses));
                let bytes = read.and_then(|(bytes, misses)| bytes.checked_div(misses));
                document.runs.push(recorder.run()?);
                document.cache.extend(rooms.and_then(|rooms| recorder.cache(self.router.name(), &rooms, bytes)));
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
            if is_terminal() && !self.chat {
                write!(out, "{}", text.prompt)?;
            }
            writeln!(out, "{}", text.text)?;
        }
        self.say(model, &output.figures, if texts.len() > 1 { "prompts" } else { "prompt" });
        Ok(())
    }

    /// Says on standard error how it went.
    fn say(&self, model: &Model, figures: &Figures, prompts: &str) {
        let ahead = model.decoder().expert_cache().map(|cache| cache.statistics().prefetch);
        figures.say(prompts, ahead);
    }
}

/// Continues one prompt; `on_token` sees the state as it is then.
fn stream(
    model: &Model,
    prompt: &[u32],
    options: GenerateOptions,
    state: &mut DecoderState,
    sampler: &mut Sampler,
    mut on_token: impl FnMut(u32, &DecoderState) -> ControlFlow<()>,
) -> phase_moe::Result<Generation> {
    let samplers = std::slice::from_mut(sampler);
    generate_batch(model, &[prompt], options, state, samplers, |_, id, state| on_token(id, state))
}
