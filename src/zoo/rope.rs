//! Positions: the one place that reads what a `config.json` says of them, as transformers 5 does.
//!
//! `rope_scaling`, where it says anything, stands for `rope_parameters` as a whole. What is in the object comes before what stands
//! beside it: `rope_theta`, `partial_rotary_factor`. Of `original_max_position_embeddings` it is the other way round. Its kind is
//! `rope_type`, or `type`. Null, false, `{}` and whatever else Python takes for false say nothing.
//!
//! A key that belongs to another kind than the object's, or to no family like this one, and that would change something if it were
//! read, is an error.

use serde_json::Value;

use super::config::Config;
use super::defaults::{Defaults, Rotated};
use crate::error::Result;
use crate::spec::{EachRate, Llama3, RopeScaling, Yarn};

/// What a family rotates by.
pub(super) struct Positions {
    pub(super) theta: f64,
    pub(super) scaling: RopeScaling,
    pub(super) rotary_dim: usize,
    /// The longest sequence whose rotation is known.
    pub(super) longest: usize,
}

/// Keys that say how positions are stretched, and the kinds that read them.
const KEYS: [(&str, &[&str]); 13] = [
    ("factor", &["linear", "dynamic", "yarn", "llama3", "longrope"]),
    ("attention_factor", &["yarn", "longrope"]),
    ("mscale", &["yarn"]),
    ("mscale_all_dim", &["yarn"]),
    ("beta_fast", &["yarn"]),
    ("beta_slow", &["yarn"]),
    ("low_freq_factor", &["llama3"]),
    ("high_freq_factor", &["llama3"]),
    ("short_factor", &["longrope"]),
    ("long_factor", &["longrope"]),
    ("short_mscale", &["longrope"]),
    ("long_mscale", &["longrope"]),
    ("alpha", &[]),
];

/// Positions of the first training, in the object or beside it.
const ORIGINAL: &str = "original_max_position_embeddings";

/// Kinds that there is a rotation for.
const KINDS: &str = "default, linear, dynamic, yarn, llama3 or longrope";

/// Positions of a family whose heads are `head_dim` wide.
pub(super) fn positions(config: &Config, head_dim: usize, defaults: &Defaults) -> Result<Positions> {
    let longest = config.optional_size("max_position_embeddings")?.unwrap_or(defaults.max_positions);
    let said = Said { config, object: object(config)?, longest, magnitudes: defaults.magnitudes };
    let theta = match said.number("rope_theta")? {
        Some(theta) => theta,
        None => config.optional_number("rope_theta")?.unwrap_or(defaults.rope_theta),
    };
    let rotary_dim = said.rotary_dim(head_dim, defaults.rotated)?;
    // Where there is an object, though an empty one, it says that positions are as they are.
    let unsaid = said.object.is_none() && !matches!(config.value("rope_parameters"), Some(Value::Object(_)));
    if unsaid && defaults.scaling != RopeScaling::None {
        let mut scaling = defaults.scaling.clone();
        if let (RopeScaling::Yarn(yarn), Some(original)) = (&mut scaling, config.optional_size(ORIGINAL)?) {
            yarn.original_positions = original;
        }
        return Ok(Positions { theta, scaling, rotary_dim, longest });
    }
    let (scaling, longest) = said.scaling(theta, rotary_dim)?;
    Ok(Positions { theta, scaling, rotary_dim, longest })
}

/// `mscale_all_dim` of the object that counts.
pub(super) fn mscale_all_dim(config: &Config) -> Result<Option<f64>> {
    match object(config)? {
        Some(object) => config.optional_number_or_zero(&format!("{object}.mscale_all_dim")),
        None => Ok(None),
    }
}

/// The object that counts, if one says something.
fn object(config: &Config) -> Result<Option<&'static str>> {
    for key in ["rope_scaling", "rope_parameters"] {
        match config.value(key) {
            None | Some(Value::Bool(false)) => {}
            Some(Value::Object(object)) if object.is_empty() => {}
            Some(Value::Object(object)) => {
                if let Some((kind, _)) = object.iter().find(|(_, value)| value.is_object()) {
                    let expected = "the same positions in all blocks";
                    return Err(config.error(&format!("{key}.{kind}"), expected, "an object"));
                }
                return Ok(Some(key));
            }
            Some(Value::Array(list)) if list.is_empty() => {}
            Some(Value::String(text)) if text.is_empty() => {}
            Some(other) if other.as_f64() == Some(0.0) => {}
            Some(other) => {
                let expected = "an object, or null where positions are as they are";
                return Err(config.error(key, expected, &other.to_string()));
            }
        }
    }
    Ok(None)
}

/// What a configuration says of positions.
struct Said<'a> {
    config: &'a Config,
    object: Option<&'static str>,
    /// `max_position_embeddings`.
    longest: usize,
    /// [`Defaults::magnitudes`].
    magnitudes: bool,
}

impl Said<'_> {
    /// A key of the object.
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.object.unwrap_or("rope_parameters"))
    }

    fn number(&self, name: &str) -> Result<Option<f64>> {
        match self.object {
            Some(_) => self.config.optional_number(&self.key(name)),
            None => Ok(None),
        }
    }

    fn required(&self, name: &str) -> Result<f64> {
        self.config.number(&self.key(name))
    }

    /// Numbers of a head that are rotated.
    fn rotary_dim(&self, head_dim: usize, rotated: Rotated) -> Result<usize> {
        const SHARE: &str = "partial_rotary_factor";
        let in_object = self.number(SHARE)?;
        let key = if in_object.is_some() { self.key(SHARE) } else { SHARE.into() };
        let share = in_object.or(self.config.optional_number(SHARE)?);
        let (whole, share) = match rotated {
            Rotated::Whole => (head_dim, share.unwrap_or(1.0)),
            Rotated::Key(key) => (self.config.size(key)?, share.unwrap_or(1.0)),
            // Null is not nothing here: transformers takes its own 1 for it.
            Rotated::Share(otherwise) => {
                let unsaid = if self.config.is_absent(SHARE) { otherwise } else { 1.0 };
                (head_dim, share.unwrap_or(unsaid))
            }
        };
        if share != 1.0 && !matches!(rotated, Rotated::Share(_)) {
            return Err(self.config.error(&key, "1, as this family rotates", &share.to_string()));
        }
        let dim = (whole as f64 * share) as usize;
        if dim == 0 || dim > whole || !dim.is_multiple_of(2) {
            return Err(match rotated {
                Rotated::Share(_) => {
                    self.config.error(&key, &format!("an even part of head_dim {whole}"), &share.to_string())
                }
                Rotated::Key(key) => self.config.error(key, "an even number (rotary embedding)", &whole.to_string()),
                Rotated::Whole => {
                    self.config.error("head_dim", "an even number (rotary embedding)", &whole.to_string())
                }
            });
        }
        Ok(dim)
    }

    /// What positions are stretched by, and the longest sequence for which that is known.
    fn scaling(&self, theta: f64, rotary_dim: usize) -> Result<(RopeScaling, usize)> {
        let Some(object) = self.object else { return Ok((RopeScaling::None, self.longest)) };
        let mut kind = None;
        for key in ["rope_type", "type"] {
            kind = kind.or(self.config.optional_string(&self.key(key))?);
        }
        let kind = match kind.unwrap_or("default") {
            "su" => "longrope", // its first name
            kind @ ("default" | "linear" | "dynamic" | "yarn" | "llama3" | "longrope") => kind,
            other => return Err(self.config.error(object, &format!("rope_type {KINDS}"), other)),
        };
        if self.magnitudes && !["default", "longrope"].contains(&kind) {
            return Err(self.config.error(object, "rope_type default or longrope, as this family has", kind));
        }
        self.check_keys(kind)?;
        let scaling = match kind {
            "linear" => RopeScaling::Linear(self.required("factor")?),
            // It is the default up to `max_position_embeddings`, and no sequence is longer.
            "dynamic" => {
                self.required("factor")?;
                RopeScaling::None
            }
            "yarn" => RopeScaling::Yarn(self.yarn(theta)?),
            "llama3" => RopeScaling::Llama3(self.llama3()?),
            "longrope" => return self.longrope(rotary_dim),
            _ => RopeScaling::None,
        };
        Ok((scaling, self.longest))
    }

    /// Refuses keys of other kinds than `kind`, but for those that would change nothing.
    fn check_keys(&self, kind: &str) -> Result<()> {
        for (name, kinds) in KEYS {
            let Some(value) = self.config.value(&self.key(name)) else { continue };
            let neutral = match name {
                "factor" | "attention_factor" | "short_mscale" | "long_mscale" | "alpha" => value.as_f64() == Some(1.0),
                // Without a factor they say nothing.
                "beta_fast" | "beta_slow" => true,
                "mscale" | "mscale_all_dim" => value.as_f64() == Some(0.0),
                _ => false,
            };
            let reads = kinds.contains(&kind) && (self.magnitudes || !name.ends_with("_mscale"));
            if !neutral && !reads {
                let expected = format!("nothing beside rope_type {kind}");
                return Err(self.config.error(&self.key(name), &expected, &value.to_string()));
            }
        }
        Ok(())
    }

    /// Positions of the first training: what stands beside the object comes first, as transformers has it.
    fn original(&self) -> Result<usize> {
        let (inside, beside) = (self.config.optional_size(&self.key(ORIGINAL))?, self.config.optional_size(ORIGINAL)?);
        // Phi-3.5-MoE has it in both places, and in transformers the object counts there.
        let first = if self.magnitudes { inside.or(beside) } else { beside.or(inside) };
        Ok(first.unwrap_or(self.longest))
    }

    /// The factor of kinds that may leave it to be how many times as far the model now looks.
    fn stretch(&self, original: usize) -> Result<f64> {
        Ok(self.number("factor")?.unwrap_or(self.longest as f64 / original as f64))
    }

    fn yarn(&self, theta: f64) -> Result<Yarn> {
        if theta == 1.0 {
            return Err(self.config.error("rope_theta", "another number than 1 beside rope_type yarn", "1"));
        }
        let original_positions = self.original()?;
        let object = self.object.and_then(|object| self.config.value(object));
        let factor = match object.is_some_and(|object| object.get("factor").is_some()) {
            true => self.stretch(original_positions)?,
            false => self.required("factor")?,
        };
        let or_zero = |name: &str| self.config.optional_number_or_zero(&self.key(name));
        let (above, below) = (or_zero("mscale")?, or_zero("mscale_all_dim")?);
        let rotation_scale = match (self.number("attention_factor")?, above, below) {
            (Some(scale), ..) => scale,
            (None, Some(above), Some(below)) => yarn_scale(factor, above) / yarn_scale(factor, below),
            (None, ..) => yarn_scale(factor, 1.0),
        };
        let truncate = self.key("truncate");
        Ok(Yarn {
            factor,
            original_positions,
            beta_fast: or_zero("beta_fast")?.unwrap_or(32.0),
            beta_slow: or_zero("beta_slow")?.unwrap_or(1.0),
            rotation_scale,
            score_scale: 1.0,
            // Null is false to Python.
            whole_rotations: match object.and_then(|object| object.get("truncate")) {
                Some(Value::Null) => false,
                _ => self.config.optional_flag(&truncate)?.unwrap_or(true),
            },
        })
    }

    fn llama3(&self) -> Result<Llama3> {
        let (low_freq_factor, high_freq_factor) =
            (self.required("low_freq_factor")?, self.required("high_freq_factor")?);
        if high_freq_factor <= low_freq_factor {
            let expected = format!("more than low_freq_factor {low_freq_factor}");
            return Err(self.config.error(&self.key("high_freq_factor"), &expected, &high_freq_factor.to_string()));
        }
        let factor = self.required("factor")?;
        Ok(Llama3 { factor, original_positions: self.original()?, low_freq_factor, high_freq_factor })
    }

    /// LongRoPE: within the positions of the first training each pair has one divisor, past them another. Which of them a text that
    /// grows past them has is another thing in each program, so that no sequence here is longer.
    fn longrope(&self, rotary_dim: usize) -> Result<(RopeScaling, usize)> {
        let pairs = rotary_dim / 2;
        for name in ["short_factor", "long_factor"] {
            let got = self.config.numbers(&self.key(name))?.len();
            if got != pairs {
                let expected = format!("{pairs} numbers, one for each pair that is rotated");
                return Err(self.config.error(&self.key(name), &expected, &got.to_string()));
            }
        }
        let original = self.original()?;
        let rotation_scale = match (self.magnitudes, self.number("attention_factor")?, self.stretch(original)?) {
            (true, ..) => {
                self.required("long_mscale")?;
                self.required("short_mscale")?
            }
            (false, Some(scale), _) => scale,
            (false, None, factor) if factor <= 1.0 => 1.0,
            (false, None, _) if original == 1 => {
                return Err(self.config.error(&self.key(ORIGINAL), "more than 1", "1"));
            }
            (false, None, factor) => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
        };
        let each = EachRate { divisors: self.config.numbers(&self.key("short_factor"))?, rotation_scale };
        Ok((RopeScaling::Each(each), self.longest.min(original)))
    }
}

/// How much sharper attention has to be at `factor` times the positions (arXiv 2309.00071, section 3.4).
pub(crate) fn yarn_scale(factor: f64, weight: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
}
