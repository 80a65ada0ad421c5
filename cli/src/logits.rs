//! `logits`: the model's logits for given token ids, for parity checks.

use std::path::PathBuf;

use anyhow::Result;
use candle_core::DType;
use clap::Args;
use phase_moe::Batch;
use phase_moe::checkpoint::{NamedTensor, tensor_bytes};

use crate::global::Global;
use crate::mistake::UserMistake;
use crate::options::{ModelOptions, TopKOptions, read_text, warn_streamed};
use crate::output::{Destination, Inputs};

/// Writes the model's logits for given token ids: one tensor `logits`, f32 [tokens, vocab].
///
/// Example: phase-moe logits --ids 1,2,3 --out logits.safetensors
#[derive(Args)]
#[group(id = "source", required = true, multiple = false, args = ["ids", "ids_file"])]
pub struct Logits {
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    top_k: TopKOptions,
    /// Token ids
    #[arg(long, value_name = "ID,..", value_delimiter = ',')]
    ids: Option<Vec<u32>>,
    /// File of token ids, separated by commas or white space
    #[arg(long, value_name = "FILE")]
    ids_file: Option<PathBuf>,
    /// Where the logits go
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

impl Logits {
    pub fn run(self, global: &Global) -> Result<()> {
        let out = Destination::open("--out", &self.out)?;
        let ids = match (&self.ids, &self.ids_file) {
            (Some(ids), _) => ids.clone(),
            (None, Some(path)) => {
                let text = read_text(path)?;
                let words = text.split([',', ' ', '\n', '\t', '\r']).filter(|word| !word.is_empty());
                let id = |word: &str| {
                    let wrong = || UserMistake(format!("{}: expected token ids, got `{word}`", path.display()));
                    word.parse::<u32>().map_err(|_| wrong().into())
                };
                words.map(id).collect::<Result<_>>()?
            }
            (None, None) => Vec::new(),
        };
        if ids.is_empty() {
            return Err(UserMistake("token ids: expected at least one, got none".into()).into());
        }
        let files = self.model.files()?;
        let inputs = self.ids_file.iter().fold(Inputs::default(), |inputs, path| inputs.file("--ids-file", path));
        let out = out.apart_from(&inputs.model(&files))?;
        let loading = global.waiting("loading the model");
        let mut decoder = self.model.decoder_from(&files)?;
        self.top_k.set(&mut decoder)?;
        drop(loading);
        let passing = global.waiting(format!("one pass over {} tokens", ids.len()));
        let logits = decoder.forward(&Batch::new(&[&ids])?, &mut decoder.batch_state())?;
        drop(passing);
        warn_streamed(&decoder);
        let logits = logits.squeeze(0)?.to_dtype(DType::F32)?;
        let values = logits.flatten_all()?.to_vec1::<f32>()?;
        out.write(&tensor_bytes(&[NamedTensor::f32("logits", logits.dims(), &values)], None)?)
    }
}
