//! What routers did inside a model, gathered while it runs, as the page of a report wants it.
//!
//! | file | one sentence |
//! |---|---|
//! | `layer` | one layer: sums over batches, and what became of each token |
//! | `text` | which tokens are shown, as text |
//! | `recorder` | a router that writes down what another one does |

mod layer;
mod recorder;
mod text;

use phase_moe::eval::EvalText;
use phase_moe::{Batch, DecoderState, Logits, Model, Result, RouteContext, RouteRequest, Scoring};
use serde::Serialize;
use serde_json::{json, to_value};

use self::layer::{Answered, LayerSeen, Words};
pub use self::recorder::Recorder;
pub use self::text::ShownText;
use super::option::Document;

/// Slots of shown tokens in all runs and layers together: about a third of a page.
const MOST_SLOTS: usize = 250_000;

/// Tokens that are shown at most, and at least of the runs that show any.
pub const MOST_TOKENS: usize = 1024;
const FEW_TOKENS: usize = 192;

/// What one router did.
#[derive(Serialize)]
pub struct RunSeen {
    name: String,
    router: &'static str,
    capacity_factor: Option<f64>,
    devices: Option<usize>,
    /// Its row in the result; `None` for the gate's own choice.
    row: Option<usize>,
    layers: Vec<LayerSeen>,
    /// `None` where so many routers ran that not all of them can show the text.
    words: Option<Vec<Words>>,
}

impl RunSeen {
    fn new(name: String, router: &'static str, layers: usize, words: bool) -> Self {
        let words = words.then(|| (0..layers).map(|_| Words::default()).collect());
        let layers = (0..layers).map(|_| LayerSeen::default()).collect();
        Self { name, router, capacity_factor: None, devices: None, row: None, layers, words }
    }
}

/// Tokens that can be shown of `runs` routers, and how many of those show any.
fn shown_tokens(runs: usize, layers: usize, top_k: usize) -> (usize, usize) {
    let per_run = MOST_SLOTS / (layers * top_k).max(1);
    let showing = (per_run / FEW_TOKENS).clamp(1, runs.max(1));
    ((per_run / showing).clamp(1, MOST_TOKENS), showing)
}

/// Gathers what the routers of `compare` do, run after run over the same batches.
pub struct Gathered {
    scoring: Scoring,
    biases: Vec<Option<Vec<f32>>>,
    experts: usize,
    names: Vec<String>,
    text: ShownText,
    /// Runs that may still show the text.
    showing: usize,
    runs: Vec<RunSeen>,
    batch: usize,
    /// Of the first run, per layer: in how many tokens each two experts met, `[experts, experts]`; and per kind and layer each expert's slots.
    together: Vec<Vec<u32>>,
    kinds: Vec<Vec<Vec<u32>>>,
    kind_tokens: Vec<u64>,
}

/// Which run comes.
pub struct Begun {
    pub name: String,
    pub router: &'static str,
    pub capacity_factor: Option<f64>,
    pub devices: Option<usize>,
    pub row: Option<usize>,
}

impl Gathered {
    /// For so many `runs`.
    pub fn new(model: &Model, texts: &[EvalText], batches: &[Batch], runs: usize) -> Result<Self> {
        let decoder = model.decoder();
        let (moe, layers) = (&decoder.spec().moe, decoder.moe_layers().count());
        let (most, showing) = shown_tokens(runs, layers, moe.top_k);
        Ok(Self {
            scoring: moe.scoring,
            biases: decoder.moe_layers().map(|layer| layer.selection_bias()).collect::<Result<_>>()?,
            experts: moe.experts,
            names: texts.iter().map(|text| text.name.clone()).collect(),
            text: ShownText::of_batches(model, texts, batches, most)?,
            showing,
            runs: Vec::with_capacity(runs),
            batch: 0,
            together: vec![vec![0; moe.experts * moe.experts]; layers],
            kinds: vec![vec![vec![0; moe.experts]; layers]; texts.len()],
            kind_tokens: vec![0; texts.len()],
        })
    }

    /// The next run begins.
    pub fn begin(&mut self, run: Begun) {
        let Begun { name, router, capacity_factor, devices, row } = run;
        let words = self.showing > 0;
        self.showing -= usize::from(words);
        let new = RunSeen::new(name, router, self.biases.len(), words);
        self.runs.push(RunSeen { capacity_factor, devices, row, ..new });
        self.batch = 0;
    }

    /// The next batch of the run went through the model: `bounds` are per layer.
    pub fn batch(&mut self, state: &DecoderState, bounds: &[Option<f64>]) -> phase_moe::Result<()> {
        let first = self.runs.len() == 1;
        let Some(run) = self.runs.last_mut() else { return Ok(()) };
        for (layer, routed) in state.routed().iter().enumerate() {
            let (tokens, values) = (routed.assignment.tokens(), routed.logits.flatten_all()?.to_vec1::<f32>()?);
            let logits = Logits::new(&values, tokens, self.experts)?;
            let scores = self.scoring.scores(&logits, self.biases[layer].as_deref())?;
            let context = RouteContext { layer, padding: routed.padding.as_deref(), ..RouteContext::default() };
            let request = RouteRequest::new(&scores, routed.assignment.top_k(), &routed.capacity, context)?;
            let prices = state.routes().get(layer).map_or(&[][..], |state| state.prices());
            let bound = bounds.get(layer).copied().flatten();
            let answered = Answered { request: &request, assignment: &routed.assignment, prices, bound };
            let choice = answered.choice()?;
            run.layers[layer].add(&answered, &choice);
            if let Some(words) = &mut run.words {
                words[layer].add(&answered, &choice, self.text.rows(self.batch).iter().copied(), None);
            }
            if !first {
                continue;
            }
            for (token, kind) in self.text.kinds(self.batch).iter().enumerate() {
                let experts: Vec<usize> = choice.slots(token).map(|(expert, _)| expert.index()).collect();
                for &one in &experts {
                    experts.iter().for_each(|&other| self.together[layer][one * self.experts + other] += 1);
                    if let Some(kind) = *kind {
                        self.kinds[kind][layer][one] += 1;
                    }
                }
            }
        }
        if first {
            let kinds = self.text.kinds(self.batch).iter().flatten();
            kinds.for_each(|&kind| self.kind_tokens[kind] += 1);
        }
        self.batch += 1;
        Ok(())
    }

    /// Puts it into the document.
    pub fn fill(self, document: &mut Document) -> anyhow::Result<()> {
        document.runs = self.runs.iter().map(to_value).collect::<Result<_, _>>()?;
        let kinds = self.names.iter().zip(&self.kind_tokens).zip(&self.kinds);
        let kind = |((name, tokens), layers)| json!({"name": name, "tokens": tokens, "layers": layers});
        document.kinds = kinds.map(kind).collect();
        document.together = self.together.iter().map(to_value).collect::<Result<_, _>>()?;
        document.text = Some(to_value(&self.text)?);
        Ok(())
    }
}
