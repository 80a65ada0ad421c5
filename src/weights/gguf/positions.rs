//! Positions of a GGUF file, as the `rope_parameters` that mean the same.
//!
//! What a file does not say is as llama.cpp has it, whatever the family that it is mapped to: a base of 10000; with a factor and no
//! type positions are divided by the factor, under its old key `rope.scale_linear` too; YaRN's original positions are the context
//! length. Factors of LongRoPE need no type; which of the two holds is a matter of how long a text may become. Rules: llama.cpp's
//! `llama_model::load_hparams`, `llama_context` and `rope_yarn`.

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::Architecture;
use crate::checkpoint::ElementType;
use crate::error::Result;
use crate::zoo::rope::yarn_scale;

/// The base where there is none.
const BASE: f64 = 10_000.0;

/// Turns over YaRN's original positions, as `rope_parameters` has them.
const TURNS: [(&str, &str); 2] = [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")];

/// Tensors of LongRoPE's divisors of each pair's rate, within the positions of the first training and past them.
const FACTORS: [(&str, &str); 2] =
    [("rope_factors_short.weight", "short_factor"), ("rope_factors_long.weight", "long_factor")];

/// What cosines and sines are multiplied by beside them.
const MAGNITUDE: &str = "attn_factor";

/// Numbers that change positions in ways that nothing here does, and those that say nothing.
const REFUSED: [(&str, &[f64]); 4] =
    [("yarn_attn_factor", &[1.0]), ("yarn_ext_factor", &[1.0, -1.0]), (MAGNITUDE, &[1.0]), ("alpha", &[0.0, 1.0])];

impl Architecture<'_> {
    /// `rope_parameters`.
    pub(super) fn positions(&self) -> Result<Value> {
        let base = self.positive("rope.freq_base")?.unwrap_or(BASE);
        let mut rope = Map::from_iter([("rope_theta".into(), json!(base))]);
        // Of the architectures here llama.cpp reads them in this one alone.
        let stretched = self.architecture == "phimoe" && FACTORS.iter().any(|(tensor, _)| self.has(tensor));
        for tensor in ["rope_freqs.weight", FACTORS[0].0, FACTORS[1].0] {
            if self.has(tensor) && (!stretched || tensor == "rope_freqs.weight") {
                return Err(self.metadata.error(tensor, "no tensor of factors of rotations", "one"));
            }
        }
        for (name, neutral) in REFUSED {
            if stretched && name == MAGNITUDE {
                continue;
            }
            let name = format!("rope.scaling.{name}");
            if let Some(number) = self.number(&name)?.filter(|number| !neutral.contains(number)) {
                let expected = format!("nothing or {}", neutral[0]);
                return Err(self.metadata.error(&self.key(&name), &expected, &number.to_string()));
            }
        }
        let factor = self.factor()?;
        let kind = self.metadata.text(&self.key("rope.scaling.type"))?.unwrap_or("linear");
        let mut set = |key: &str, value: Value| drop(rope.insert(key.into(), value));
        match kind {
            _ if stretched => {
                // They need no type, and stand beside no other stretching.
                if !["linear", "longrope"].contains(&kind) || factor != 1.0 {
                    let expected = "longrope or nothing, and no factor, beside factors of each pair";
                    let key = self.key("rope.scaling.type");
                    return Err(self.metadata.error(&key, expected, &format!("{kind}, {factor}")));
                }
                set("rope_type", json!("longrope"));
                for (tensor, key) in FACTORS {
                    set(key, json!(self.factors(tensor)?));
                }
                set("original_max_position_embeddings", json!(self.original()?));
                let magnitude = self.positive(&format!("rope.scaling.{MAGNITUDE}"))?.unwrap_or(1.0);
                set("short_mscale", json!(magnitude));
                set("long_mscale", json!(magnitude));
            }
            "none" => {}
            _ if factor == 1.0 && ["linear", "yarn"].contains(&kind) => {}
            "linear" => {
                set("rope_type", json!("linear"));
                set("factor", json!(factor));
            }
            "yarn" => {
                set("rope_type", json!("yarn"));
                set("factor", json!(factor));
                set("original_max_position_embeddings", json!(self.original()?));
                for (name, key) in TURNS {
                    set(key, json!(self.positive(&format!("rope.scaling.{name}"))?));
                }
                // The model's own, of which the file cannot say it; llama.cpp begins and ends at whole rotations there too.
                set("truncate", json!(self.architecture != "gpt-oss"));
                set("attention_factor", json!(self.rotation_scale(factor)?));
                set("mscale_all_dim", json!(self.log_multiplier(factor)?));
            }
            other => {
                return Err(self.metadata.error(&self.key("rope.scaling.type"), "none, linear or yarn", other));
            }
        }
        Ok(Value::Object(rope))
    }

    /// The numbers of a tensor of factors.
    fn factors(&self, tensor: &str) -> Result<Vec<f64>> {
        let (entry, pairs) = (self.checkpoint.entry(tensor)?, self.head()? / 2);
        if (entry.dtype, entry.shape.as_slice()) != (ElementType::Plain(Dtype::F32), [pairs].as_slice()) {
            let detail = format!("expected {pairs} numbers of dtype F32, got {:?} of {:?}", entry.shape, entry.dtype);
            return Err(self.checkpoint.wrong(entry, tensor, detail));
        }
        let bytes = self.checkpoint.read(tensor)?;
        let factors: Vec<f64> = bytes.as_chunks().0.iter().map(|&bytes| f64::from(f32::from_le_bytes(bytes))).collect();
        match factors.iter().position(|factor| !(factor.is_finite() && *factor > 0.0)) {
            Some(at) => {
                let detail = format!("expected positive numbers, got {} at [{at}]", factors[at]);
                Err(self.checkpoint.wrong(entry, tensor, detail))
            }
            None => Ok(factors),
        }
    }

    /// How many times as far the model looks; its old key counts where the new one is not there, and 0 says nothing.
    fn factor(&self) -> Result<f64> {
        let name = match self.number("rope.scaling.factor")? {
            Some(_) => "rope.scaling.factor",
            None => "rope.scale_linear",
        };
        match self.number(name)? {
            None | Some(0.0) => Ok(1.0),
            Some(factor) if factor > 0.0 => Ok(factor),
            Some(factor) => Err(self.metadata.error(&self.key(name), "a positive number", &factor.to_string())),
        }
    }

    fn original(&self) -> Result<usize> {
        match self.count("rope.scaling.original_context_length")?.filter(|&positions| positions > 0) {
            Some(positions) => Ok(positions),
            None => self.required("context_length"),
        }
    }

    /// What cosines and sines are multiplied by. In DeepSeek's the multiplier of logarithms stands for both of its `mscale`s, whose
    /// quotient is 1.
    fn rotation_scale(&self, factor: f64) -> Result<f64> {
        Ok(if self.architecture == "deepseek2" { 1.0 } else { yarn_scale(factor, 1.0) })
    }

    /// DeepSeek's `mscale_all_dim`, of which the file has a tenth. It must say so: without it llama.cpp and transformers do not mean
    /// the same.
    fn log_multiplier(&self, factor: f64) -> Result<Option<f64>> {
        const NAME: &str = "rope.scaling.yarn_log_multiplier";
        let tenth = match self.number(NAME)? {
            Some(0.0) => None,
            _ => self.positive(NAME)?,
        };
        match (self.architecture, tenth) {
            ("deepseek2", None) if factor > 1.0 => {
                Err(self.metadata.error(&self.key(NAME), "a positive number beside yarn", "nothing"))
            }
            ("deepseek2", tenth) => Ok(tenth.map(|tenth| 10.0 * tenth)),
            (_, None) => Ok(None),
            (_, Some(tenth)) => Err(self.metadata.error(&self.key(NAME), "nothing or 0", &tenth.to_string())),
        }
    }

    fn positive(&self, name: &str) -> Result<Option<f64>> {
        match self.number(name)? {
            Some(number) if number <= 0.0 => {
                Err(self.metadata.error(&self.key(name), "a positive number", &number.to_string()))
            }
            number => Ok(number),
        }
    }
}
