//! `--report FILE.html`: the option, and what of a run its page shows.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use phase_moe::Isa;
use serde::Serialize;
use serde_json::{Value, to_value};

use super::compare::ModelSummary;
use super::page::page;
use crate::output::{Destination, Inputs, Output};
use crate::ranks;
use crate::shell::quoted;

#[derive(Args)]
pub struct ReportOption {
    /// Write a page to look at: one HTML file that needs no network
    #[arg(long = "report", value_name = "FILE.html")]
    report: Option<PathBuf>,
}

impl ReportOption {
    /// The place for the page, if one is asked for and it is none of `inputs`; to be called before the model runs.
    pub fn open(&self, inputs: &Inputs) -> Result<Option<Output>> {
        let open = |path: &PathBuf| Destination::open("--report", path)?.apart_from(inputs);
        self.report.as_ref().map(open).transpose()
    }
}

/// What a page shows. Lists may be empty: the page leaves their sections out.
#[derive(Serialize)]
pub struct Document {
    command: &'static str,
    run: Run,
    model: Option<ModelSummary>,
    /// The very document that `--json` prints.
    result: Value,
    /// Sentences about what the figures mean.
    pub notes: Vec<String>,
    /// Indices of the MoE layers in the model.
    pub layers: Vec<usize>,
    pub experts: usize,
    pub top_k: usize,
    /// What each router did, the gate's own choice first.
    pub runs: Vec<Value>,
    /// Tokens as text.
    pub text: Option<Value>,
    /// Which kind of text went to which expert.
    pub kinds: Vec<Value>,
    /// Per layer how many tokens chose both of two experts.
    pub together: Vec<Value>,
    /// What each cache held and read.
    pub cache: Vec<Value>,
}

/// Which run it was.
#[derive(Serialize)]
struct Run {
    command_line: String,
    version: &'static str,
    machine: String,
    date: String,
}

/// A command line that holds a whole text is not shown to its end.
const MOST_COMMAND_LINE: usize = 2000;

impl Document {
    /// What every command knows of its run.
    pub fn new(command: &'static str, model: Option<ModelSummary>, result: &impl Serialize) -> Result<Self> {
        let (runs, kinds, together, cache) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (result, layers) = (to_value(result)?, Vec::new());
        // Where a command says what its figures mean, the page begins with it.
        let notes = result["meaning"].as_str().filter(|text| !text.is_empty()).map(String::from).into_iter().collect();
        let (experts, top_k, text) = (0, 0, None);
        Ok(Self {
            command,
            run: Run::now(),
            model,
            result,
            notes,
            layers,
            experts,
            top_k,
            runs,
            text,
            kinds,
            together,
            cache,
        })
    }

    /// The same of so many layers with so many experts.
    pub fn with_layers(self, layers: Vec<usize>, experts: usize, top_k: usize) -> Self {
        Self { layers, experts, top_k, ..self }
    }

    /// Writes the page.
    pub fn write(&self, to: Output) -> Result<()> {
        if !ranks::speaks() {
            return Ok(());
        }
        to.write(page(&to_value(self)?).as_bytes())
    }
}

impl Run {
    fn now() -> Self {
        let typed: Vec<String> = std::env::args_os().skip(1).map(|word| quoted(&word.to_string_lossy())).collect();
        let mut command_line = format!("phase-moe {}", typed.join(" "));
        if let Some((end, _)) = command_line.char_indices().nth(MOST_COMMAND_LINE) {
            command_line.truncate(end);
            command_line.push('…');
        }
        let (architecture, system) = (std::env::consts::ARCH, std::env::consts::OS);
        let threads = std::env::var("RAYON_NUM_THREADS").unwrap_or_else(|_| "1".into());
        let threads = if threads == "1" { "1 thread".into() } else { format!("{threads} threads") };
        Self {
            command_line,
            version: env!("CARGO_PKG_VERSION"),
            machine: format!("{architecture} {system}, {}, {threads}", Isa::default()),
            date: jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M UTC").to_string(),
        }
    }
}
