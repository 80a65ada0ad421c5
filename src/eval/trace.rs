//! Gate traces: the logits of every MoE layer over a text, in a safetensors file that routers can be run on offline.
//!
//! One tensor `layer.{i}` f32 `[tokens, experts]` per MoE layer (raw, before scoring), `tokens` i32 `[tokens]` vocabulary
//! ids, `kinds` i32 `[tokens]` numbers of the texts they are of, `layer.{i}.bias` f32 `[experts]` where the model has a selection bias;
//! metadata says how logits become scores. `tokens`, `kinds` and all metadata but `experts` and `top_k` are optional on reading. Logits and biases are read from f16, bf16 and f64 too,
//! and ids and numbers from i64 and u32: what torch writes.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use half::{bf16, f16};
use safetensors::Dtype;

use crate::checkpoint::{Checkpoint, ElementType, NamedTensor, tensor_bytes};
use crate::decoder::{Batch, Decoder};
use crate::error::{Error, Result};
use crate::layer::MoeLayer;
use crate::routing::logits::Logits;
use crate::routing::scores::{GroupLimit, GroupScore, ScoreFunction, Scoring};

/// The gate logits of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerTrace {
    /// Index of the layer in the model.
    pub layer: usize,
    /// `[tokens, experts]` row-major.
    pub logits: Vec<f32>,
    /// Bias for selection only.
    pub selection_bias: Option<Vec<f32>>,
}

/// The gate logits of a model over a text.
#[derive(Clone, Debug, PartialEq)]
pub struct GateTrace {
    /// What model it is of.
    pub model: Option<String>,
    /// Experts per layer.
    pub experts: usize,
    /// Experts per token; where layers had numbers of their own, the largest.
    pub top_k: usize,
    /// Experts per token of each layer where they were not all alike, else empty.
    pub layer_top_k: Vec<usize>,
    /// How logits become scores.
    pub scoring: Scoring,
    /// Tokens per forward pass when it was taken.
    pub batch_tokens: Option<usize>,
    /// Vocabulary ids of the tokens.
    pub token_ids: Option<Vec<u32>>,
    /// Which text each token is of, where there were several kinds.
    pub kinds: Option<Vec<u32>>,
    /// MoE layers in order.
    pub layers: Vec<LayerTrace>,
}

impl GateTrace {
    /// Tokens in the trace.
    pub fn tokens(&self) -> usize {
        self.layers.first().map_or(0, |layer| layer.logits.len() / self.experts)
    }

    /// Runs `decoder` as it is over `batches` and keeps the gate logits of every token but padding. `progress` is called
    /// after each batch with its tokens. [`GateTrace::model`], [`GateTrace::batch_tokens`] and [`GateTrace::kinds`] are left for the
    /// caller.
    ///
    /// # Errors
    /// Whatever the forward pass reports.
    pub fn capture(decoder: &Decoder, batches: &[Batch], mut progress: impl FnMut(u64)) -> Result<Self> {
        let moe = &decoder.spec().moe;
        let empty = |(layer, moe): (usize, &MoeLayer)| -> Result<LayerTrace> {
            Ok(LayerTrace { layer, logits: Vec::new(), selection_bias: moe.gate().selection_bias()? })
        };
        let mut layers = decoder.moe_layers().enumerate().map(empty).collect::<Result<Vec<_>>>()?;
        let (mut token_ids, mut state) = (Vec::new(), decoder.batch_state().keeping_routed());
        for batch in batches {
            let live = |token: &usize| !batch.padding().is_some_and(|padding| padding[*token]);
            token_ids.extend((0..batch.ids().len()).filter(live).map(|token| batch.ids()[token]));
            decoder.forward(batch, &mut state)?;
            for (layer, routed) in layers.iter_mut().zip(state.routed()) {
                let values = routed.logits.flatten_all()?.to_vec1::<f32>()?;
                let rows = values.chunks_exact(moe.experts).enumerate().filter(|(token, _)| live(token));
                layer.logits.extend(rows.flat_map(|(_, row)| row));
            }
            progress(batch.live_tokens());
        }
        Ok(Self {
            model: None,
            experts: moe.experts,
            top_k: moe.top_k,
            layer_top_k: decoder.spec().layer_top_k.clone(),
            scoring: moe.scoring,
            batch_tokens: None,
            token_ids: Some(token_ids),
            kinds: None,
            layers,
        })
    }

    /// The bytes of the trace's file.
    ///
    /// # Errors
    /// As [`tensor_bytes`].
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let (tokens, experts) = (self.tokens(), self.experts);
        let mut tensors = Vec::new();
        for layer in &self.layers {
            let name = format!("layer.{}", layer.layer);
            if let Some(bias) = &layer.selection_bias {
                tensors.push(NamedTensor::f32(format!("{name}.bias"), [experts], bias));
            }
            tensors.push(NamedTensor::f32(name, [tokens, experts], &layer.logits));
        }
        for (name, ids) in [(TOKENS, &self.token_ids), (KINDS, &self.kinds)] {
            if let Some(ids) = ids {
                let ids: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
                tensors.push(NamedTensor::i32(name, [tokens], &ids));
            }
        }
        let mut metadata = HashMap::from([
            ("experts".to_owned(), experts.to_string()),
            ("top_k".to_owned(), self.top_k.to_string()),
            (
                "score".to_owned(),
                match self.scoring.function {
                    ScoreFunction::Softmax => "softmax".into(),
                    ScoreFunction::Sigmoid => "sigmoid".into(),
                    ScoreFunction::SparseMixer { .. } => "sparse-mixer".into(),
                },
            ),
            ("normalize".to_owned(), self.scoring.normalize.to_string()),
            ("scale".to_owned(), self.scoring.scale.to_string()),
        ]);
        if !self.layer_top_k.is_empty() {
            let each: Vec<String> = self.layer_top_k.iter().map(usize::to_string).collect();
            metadata.insert("layer_top_k".into(), each.join(","));
        }
        if let ScoreFunction::SparseMixer { jitter } = self.scoring.function {
            metadata.insert("jitter".into(), jitter.to_string());
        }
        metadata.extend(self.model.clone().map(|model| ("model".to_owned(), model)));
        metadata.extend(self.batch_tokens.map(|tokens| ("batch_tokens".to_owned(), tokens.to_string())));
        if let Some(limit) = self.scoring.groups {
            metadata.insert("groups".into(), limit.groups.to_string());
            metadata.insert("top_groups".into(), limit.top_groups.to_string());
            let score = match limit.score {
                GroupScore::Max => "max",
                GroupScore::TopTwo => "top-two",
            };
            metadata.insert("group_score".into(), score.into());
        }
        tensor_bytes(&tensors, Some(metadata))
    }

    /// Reads a trace from `path`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Checkpoint`] for a file that is no trace, naming the tensor or the key of the metadata.
    pub fn read(path: &Path) -> Result<Self> {
        let file = Checkpoint::open_files(&[path])?;
        let wrong = |detail: String| Error::Checkpoint { file: path.display().to_string(), detail };
        // Before its metadata: a file of another kind has none of them.
        if let Some(other) = other_kind(&file) {
            return Err(wrong(other));
        }
        let metadata = file.metadata();
        let text = |key: &str| metadata.get(key).map(String::as_str);
        let bad =
            |key: &str, expected: &str, got: &str| wrong(format!("metadata `{key}`: expected {expected}, got {got}"));
        let size = |key: &str| -> Result<Option<usize>> {
            let parse = |value: &str| value.parse().ok().filter(|&size: &usize| size > 0);
            text(key).map(|value| parse(value).ok_or_else(|| bad(key, "a positive integer", value))).transpose()
        };
        let required = |key: &str| size(key)?.ok_or_else(|| bad(key, "a positive integer", "nothing"));
        let (experts, top_k) = (required("experts")?, required("top_k")?);
        let function = match text("score") {
            None | Some("softmax") => ScoreFunction::Softmax,
            Some("sigmoid") => ScoreFunction::Sigmoid,
            Some("sparse-mixer") => {
                let jitter = text("jitter").unwrap_or("nothing");
                let parsed = jitter.parse().ok().filter(|jitter: &f32| jitter.is_finite() && *jitter >= 0.0);
                let expected = "0 or a positive finite number";
                ScoreFunction::SparseMixer { jitter: parsed.ok_or_else(|| bad("jitter", expected, jitter))? }
            }
            Some(other) => return Err(bad("score", "softmax, sigmoid or sparse-mixer", other)),
        };
        let normalize = match text("normalize") {
            None | Some("false") => false,
            Some("true") => true,
            Some(other) => return Err(bad("normalize", "true or false", other)),
        };
        let scale = match text("scale") {
            None => 1.0,
            Some(value) => value
                .parse()
                .ok()
                .filter(|scale: &f32| scale.is_finite())
                .ok_or_else(|| bad("scale", "a finite number", value))?,
        };
        let groups = match (size("groups")?, size("top_groups")?) {
            (None | Some(1), _) => None,
            (Some(_), None) => return Err(bad("top_groups", "a positive integer", "nothing")),
            (Some(groups), Some(top_groups)) => {
                let score = match (text("group_score"), function) {
                    (Some("max"), _) => GroupScore::Max,
                    (Some("top-two"), _) => GroupScore::TopTwo,
                    (Some(other), _) => return Err(bad("group_score", "max or top-two", other)),
                    // The models that score groups by their best two are those with sigmoid scores (DeepSeek-V3).
                    (None, ScoreFunction::Softmax | ScoreFunction::SparseMixer { .. }) => GroupScore::Max,
                    (None, ScoreFunction::Sigmoid) => GroupScore::TopTwo,
                };
                Some(GroupLimit { groups, top_groups, score })
            }
        };

        let (mut layers, mut tokens) = (Vec::new(), None);
        for (layer, name) in named_layers(&file).map_err(wrong)? {
            let (rows, logits) = floats(&file, &name, &[tokens, Some(experts)]).map_err(wrong)?;
            if rows == 0 {
                return Err(wrong(format!("tensor `{name}`: expected at least one token, got none")));
            }
            tokens = Some(rows);
            Logits::new(&logits, rows, experts).map_err(|error| wrong(format!("tensor `{name}`: {error}")))?;
            let bias = format!("{name}.bias");
            let selection_bias = match file.tensors().contains_key(&bias) {
                true => Some(floats(&file, &bias, &[Some(experts)]).map_err(wrong)?.1),
                false => None,
            };
            if let Some(value) = selection_bias.iter().flatten().find(|value| !value.is_finite()) {
                return Err(wrong(format!("tensor `{bias}`: expected finite numbers, got {value}")));
            }
            layers.push(LayerTrace { layer, logits, selection_bias });
        }
        let layer_top_k = match text("layer_top_k") {
            None => Vec::new(),
            Some(each) => {
                let size = |value: &str| value.parse().ok().filter(|size| (1..=experts).contains(size));
                let sizes: Option<Vec<usize>> = each.split(',').map(size).collect();
                let expected = format!("{} numbers from 1 to {experts}", layers.len());
                sizes.filter(|sizes| sizes.len() == layers.len()).ok_or_else(|| bad("layer_top_k", &expected, each))?
            }
        };
        let of_tokens = |name: &str| match file.tensors().contains_key(name) {
            true => ids(&file, name, &[tokens]).map(Some).map_err(wrong),
            false => Ok(None),
        };
        let (token_ids, kinds) = (of_tokens(TOKENS)?, of_tokens(KINDS)?);
        Ok(Self {
            model: text("model").map(str::to_owned),
            experts,
            top_k,
            layer_top_k,
            scoring: Scoring { function, normalize, scale, groups },
            batch_tokens: size("batch_tokens")?,
            token_ids,
            kinds,
            layers,
        })
    }
}

/// The tensor of vocabulary ids.
const TOKENS: &str = "tokens";

/// The tensor of numbers of texts.
const KINDS: &str = "kinds";

/// The number of a layer and what follows it in a tensor's name, `layer.3.bias` for one.
fn of_layer(name: &str) -> Option<(usize, &str)> {
    let rest = name.strip_prefix("layer.")?;
    let digits = rest.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(rest.len());
    let (number, rest) = rest.split_at(digits);
    Some((number.parse().ok()?, rest))
}

/// What a file is that has no gate logits, and what to give in its place.
fn other_kind(file: &Checkpoint) -> Option<String> {
    let names = || file.tensors().keys().map(String::as_str);
    if names().any(|name| of_layer(name).is_some_and(|(_, rest)| rest.is_empty())) {
        return None;
    }
    let expected = "expected gate logits `layer.0`, `layer.1`, … as `trace` writes them";
    let routed = |name: &&str| of_layer(name).is_some_and(|(_, rest)| rest == ".experts" || rest == ".weights");
    let got = if let Some(name) = names().find(routed) {
        format!("`{name}`, what `route` wrote: give the trace that it was made of")
    } else if names().eq(["logits"]) {
        "`logits`, what `logits` wrote: make a trace with `trace`".into()
    } else if let Some(name) = names().find(|name| name.starts_with("model.") || name.starts_with("lm_head.")) {
        format!("`{name}`, a model's weights: make a trace of it with `trace --model`")
    } else {
        names().next().map_or("none".into(), |name| format!("`{name}`"))
    };
    Some(format!("{expected}, got {got}"))
}

/// The tensors of gate logits by layer.
fn named_layers(file: &Checkpoint) -> Result<BTreeMap<usize, String>, String> {
    let mut found = BTreeMap::<usize, String>::new();
    for name in file.tensors().keys() {
        match of_layer(name) {
            Some((layer, "")) => {
                if let Some(other) = found.insert(layer, name.clone()) {
                    return Err(format!("tensor `{name}`: expected each layer once, got it beside `{other}`"));
                }
            }
            Some((_, ".bias")) => {
                let logits = name.trim_end_matches(".bias");
                if !file.tensors().contains_key(logits) {
                    return Err(format!("tensor `{name}`: expected beside tensor `{logits}`, got it alone"));
                }
            }
            _ => {}
        }
    }
    Ok(found)
}

/// The bytes of a tensor, after its first size; an open size is `None`.
fn sized(
    file: &Checkpoint,
    name: &str,
    kinds: &[Dtype],
    shape: &[Option<usize>],
) -> Result<(Dtype, usize, Vec<u8>), String> {
    let entry = file.entry(name).map_err(|error| error.to_string())?;
    let sizes: Vec<String> = shape.iter().map(|size| size.map_or("tokens".into(), |size| size.to_string())).collect();
    let got = || format!("got {:?} {:?}", entry.dtype, entry.shape);
    let ElementType::Plain(dtype) = entry.dtype else { return Err(format!("tensor `{name}`: {}", got())) };
    if !kinds.contains(&dtype) {
        let kinds: Vec<String> = kinds.iter().map(|kind| format!("{kind:?}")).collect();
        return Err(format!("tensor `{name}`: expected {} [{}], {}", kinds.join(" or "), sizes.join(", "), got()));
    }
    let same = |(expected, got): (&Option<usize>, &usize)| expected.is_none_or(|expected| expected == *got);
    if entry.shape.len() != shape.len() || !shape.iter().zip(&entry.shape).all(same) {
        return Err(format!("tensor `{name}`: expected {dtype:?} [{}], {}", sizes.join(", "), got()));
    }
    let bytes = file.read(name).map_err(|error| error.to_string())?;
    Ok((dtype, entry.shape[0], bytes))
}

/// A tensor of floats, the narrow ones widened, `f64` rounded once.
fn floats(file: &Checkpoint, name: &str, shape: &[Option<usize>]) -> Result<(usize, Vec<f32>), String> {
    let (dtype, rows, bytes) = sized(file, name, &[Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F64], shape)?;
    let values = match dtype {
        Dtype::F16 => bytes.as_chunks().0.iter().map(|half| f16::from_le_bytes(*half).to_f32()).collect(),
        Dtype::BF16 => bytes.as_chunks().0.iter().map(|half| bf16::from_le_bytes(*half).to_f32()).collect(),
        Dtype::F64 => {
            let value = |bytes: &[u8; 8]| match f64::from_le_bytes(*bytes) {
                // Rounded to an infinity it would mean something else.
                value if value.is_finite() && !(value as f32).is_finite() => {
                    Err(format!("tensor `{name}`: expected numbers that F32 holds, got {value:e}"))
                }
                value => Ok(value as f32),
            };
            bytes.as_chunks().0.iter().map(value).collect::<Result<_, _>>()?
        }
        _ => bytes.as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect(),
    };
    Ok((rows, values))
}

/// A tensor of ids: of the vocabulary, or of texts.
fn ids(file: &Checkpoint, name: &str, shape: &[Option<usize>]) -> Result<Vec<u32>, String> {
    let (dtype, _, bytes) = sized(file, name, &[Dtype::I32, Dtype::I64, Dtype::U32], shape)?;
    let id = |id: i64| {
        u32::try_from(id).map_err(|_| match id < 0 {
            true => format!("tensor `{name}`: expected ids from 0, got {id}"),
            false => format!("tensor `{name}`: expected ids below 2³², got {id}"),
        })
    };
    match dtype {
        Dtype::I64 => bytes.as_chunks().0.iter().map(|bytes| id(i64::from_le_bytes(*bytes))).collect(),
        Dtype::U32 => Ok(bytes.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect()),
        _ => bytes.as_chunks().0.iter().map(|bytes| id(i64::from(i32::from_le_bytes(*bytes)))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::tensor_bytes;

    fn trace() -> GateTrace {
        let layer = |layer: usize, bias: Option<Vec<f32>>| LayerTrace {
            layer,
            logits: (0..6).map(|value| value as f32 - layer as f32).collect(),
            selection_bias: bias,
        };
        GateTrace {
            model: Some("m".into()),
            experts: 3,
            top_k: 2,
            layer_top_k: Vec::new(),
            scoring: Scoring { scale: 2.5, ..Scoring::sigmoid().normalized(true) },
            batch_tokens: Some(512),
            token_ids: Some(vec![7, 9]),
            kinds: Some(vec![0, 1]),
            layers: vec![layer(1, None), layer(10, Some(vec![0.5, 0.0, -0.5]))],
        }
    }

    #[test]
    fn a_trace_reads_back_as_it_was_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("t.safetensors");
        std::fs::write(&path, trace().to_bytes().unwrap()).unwrap();
        assert_eq!(GateTrace::read(&path).unwrap(), trace());
    }

    #[test]
    fn what_ranks_groups_is_written_and_guessed_only_where_it_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("t.safetensors");
        for score in [GroupScore::Max, GroupScore::TopTwo] {
            let groups = Some(GroupLimit { groups: 3, top_groups: 2, score });
            let scoring = Scoring { groups, ..Scoring::sigmoid() };
            let grouped = GateTrace { scoring, layer_top_k: vec![1, 2], ..trace() };
            std::fs::write(&path, grouped.to_bytes().unwrap()).unwrap();
            assert_eq!(GateTrace::read(&path).unwrap(), grouped);
        }
        let metadata = [("experts", "2"), ("top_k", "1"), ("score", "sigmoid"), ("groups", "2"), ("top_groups", "1")];
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        std::fs::write(
            &path,
            tensor_bytes(&[NamedTensor::f32("layer.0", [1, 2], &[0.0, 1.0])], Some(metadata)).unwrap(),
        )
        .unwrap();
        assert_eq!(GateTrace::read(&path).unwrap().scoring.groups.unwrap().score, GroupScore::TopTwo);
    }

    #[test]
    fn what_is_no_trace_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("t.safetensors");
        let error = |tensors: &[NamedTensor], metadata: &[(&str, &str)]| {
            let metadata = metadata.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
            std::fs::write(&path, tensor_bytes(tensors, Some(metadata)).unwrap()).unwrap();
            GateTrace::read(&path).unwrap_err().to_string().split_once(": ").unwrap().1.to_owned()
        };
        let good = [("experts", "2"), ("top_k", "1")];
        let layer = NamedTensor::f32("layer.0", [1, 2], &[0.0, 1.0]);
        assert_eq!(
            error(std::slice::from_ref(&layer), &good[..1]),
            "metadata `top_k`: expected a positive integer, got nothing"
        );
        assert_eq!(error(&[], &good), "expected gate logits `layer.0`, `layer.1`, … as `trace` writes them, got none");
        let wide = NamedTensor::f32("layer.0", [1, 3], &[0.0; 3]);
        assert_eq!(error(&[wide], &good), "tensor `layer.0`: expected F32 [tokens, 2], got F32 [1, 3]");
        let longer = NamedTensor::f32("layer.1", [2, 2], &[0.0; 4]);
        assert_eq!(error(&[layer.clone(), longer], &good), "tensor `layer.1`: expected F32 [1, 2], got F32 [2, 2]");
        for each in ["3", "1,1", "x"] {
            assert_eq!(
                error(std::slice::from_ref(&layer), &[good[0], good[1], ("layer_top_k", each)]),
                format!("metadata `layer_top_k`: expected 1 numbers from 1 to 2, got {each}")
            );
        }
        let nan = NamedTensor::f32("layer.0", [1, 2], &[0.0, f32::NAN]);
        assert!(error(&[nan], &good).starts_with("tensor `layer.0`: logit of token 0, expert 1 is NaN"));
        let tokens = NamedTensor::i32("tokens", [1], &[-1]);
        assert_eq!(error(&[layer.clone(), tokens], &good), "tensor `tokens`: expected ids from 0, got -1");
        let kinds = NamedTensor::i32("kinds", [2], &[0, 0]);
        assert_eq!(error(&[layer.clone(), kinds], &good), "tensor `kinds`: expected I32 [1], got I32 [2]");
        let score = [good[0], good[1], ("score", "tanh")];
        let other = NamedTensor { name: "layer.00".into(), ..layer.clone() };
        assert_eq!(
            error(&[layer.clone(), other], &good),
            "tensor `layer.00`: expected each layer once, got it beside `layer.0`"
        );
        assert_eq!(error(&[layer], &score), "metadata `score`: expected softmax, sigmoid or sparse-mixer, got tanh");
    }
}
