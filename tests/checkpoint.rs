//! Loading a model from a directory whose files are wrong: each fault is an error that names the file and the operand.
//! The sound model is the random OLMoE of the goldens; every test spoils a copy of it in a directory of its own.
#![cfg(feature = "model")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use phase_moe::decoder::var_builder;
use phase_moe::{Batch, Decoder, Error, LoadOptions, Model, Result, Weights, zoo};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

const TOKENIZER: &str = r#"{"version":"1.0","added_tokens":[],"normalizer":null,"pre_tokenizer":null,
    "post_processor":null,"decoder":null,"model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}}"#;
const UP_PROJ: &str = "model.layers.1.mlp.experts.3.up_proj.weight";

/// A tensor to be written: dtype, shape, bytes.
type Stored = (Dtype, Vec<usize>, Vec<u8>);

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/olmoe_random")
}

fn tensors() -> BTreeMap<String, Stored> {
    let bytes = std::fs::read(fixture().join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.iter().map(|(name, view)| (name.into(), (view.dtype(), view.shape().into(), view.data().into()))).collect()
}

fn write<'a>(path: &Path, tensors: impl IntoIterator<Item = (&'a String, &'a Stored)>) {
    let views = tensors
        .into_iter()
        .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// A model in a directory of its own.
struct Copy(TempDir);

impl Copy {
    /// The sound model.
    fn new() -> Self {
        let copy = Self(tempfile::tempdir().unwrap());
        std::fs::copy(fixture().join("config.json"), copy.path("config.json")).unwrap();
        std::fs::copy(fixture().join("model.safetensors"), copy.path("model.safetensors")).unwrap();
        std::fs::write(copy.path("tokenizer.json"), TOKENIZER).unwrap();
        copy
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The model with other tensors.
    fn with_tensors(change: impl FnOnce(&mut BTreeMap<String, Stored>)) -> Self {
        let (copy, mut tensors) = (Self::new(), tensors());
        change(&mut tensors);
        write(&copy.path("model.safetensors"), &tensors);
        copy
    }

    /// The model with other bytes in its file.
    fn with_bytes(change: impl FnOnce(&mut Vec<u8>)) -> Self {
        let copy = Self::new();
        let mut bytes = std::fs::read(copy.path("model.safetensors")).unwrap();
        change(&mut bytes);
        std::fs::write(copy.path("model.safetensors"), bytes).unwrap();
        copy
    }

    /// The model with another value of a key in its configuration.
    fn with_key(key: &str, value: Value) -> Self {
        let copy = Self::new();
        let mut config: Value =
            serde_json::from_str(&std::fs::read_to_string(copy.path("config.json")).unwrap()).unwrap();
        config[key] = value;
        std::fs::write(copy.path("config.json"), config.to_string()).unwrap();
        copy
    }

    /// The model in two shards, its index changed by `change`.
    fn sharded(change: impl FnOnce(&mut Value)) -> Self {
        let (copy, tensors) = (Self::new(), tensors());
        std::fs::remove_file(copy.path("model.safetensors")).unwrap();
        let shard = |name: &str| if name.contains("layers.1") { "two.safetensors" } else { "one.safetensors" };
        for file in ["one.safetensors", "two.safetensors"] {
            write(&copy.path(file), tensors.iter().filter(|(name, _)| shard(name) == file));
        }
        let map: BTreeMap<_, _> = tensors.keys().map(|name| (name, shard(name))).collect();
        let mut index = json!({ "weight_map": map });
        change(&mut index);
        std::fs::write(copy.path("model.safetensors.index.json"), index.to_string()).unwrap();
        copy
    }

    fn load(&self) -> Result<Model> {
        Model::load(self.0.path(), &LoadOptions::default())
    }

    /// The message of a [`Error::Checkpoint`], the directory cut off.
    fn checkpoint_error(&self) -> String {
        match self.load().map(|_| ()) {
            Err(error @ Error::Checkpoint { .. }) if error.is_user_error() => self.shown(&error),
            other => panic!("expected a checkpoint error, got {other:?}"),
        }
    }

    fn config_error(&self) -> String {
        match self.load().map(|_| ()) {
            Err(error @ Error::Config { .. }) if error.is_user_error() => self.shown(&error),
            other => panic!("expected a configuration error, got {other:?}"),
        }
    }

    fn io_error(&self) -> String {
        match self.load().map(|_| ()) {
            Err(error @ Error::Io { .. }) if error.is_user_error() => self.shown(&error),
            other => panic!("expected an input error, got {other:?}"),
        }
    }

    fn shown(&self, error: &Error) -> String {
        error.to_string().replace(&format!("{}/", self.0.path().display()), "")
    }
}

fn logits(model: &Model) -> Vec<f32> {
    let (decoder, batch) = (model.decoder(), Batch::new(&[&[5, 17, 96, 3, 0, 44]]).unwrap());
    let logits = decoder.forward(&batch, &mut decoder.batch_state()).unwrap();
    logits.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn the_sound_model_loads_whole_and_in_shards() {
    let whole = logits(&Copy::new().load().unwrap());
    assert_eq!(whole, logits(&Copy::sharded(|_| ()).load().unwrap()));
    // A whole file beside an index is what counts, as in transformers.
    let both = Copy::sharded(|index| *index = json!("not an index"));
    std::fs::copy(fixture().join("model.safetensors"), both.path("model.safetensors")).unwrap();
    assert_eq!(whole, logits(&both.load().unwrap()));
}

#[test]
fn weights_stored_in_half_precision_load_too() {
    let whole = logits(&Copy::new().load().unwrap());
    type Narrow = fn(f32) -> u16;
    let formats: [(Dtype, Narrow, f32); 2] = [
        (Dtype::BF16, |value| half::bf16::from_f32(value).to_bits(), 1e-1),
        (Dtype::F16, |value| half::f16::from_f32(value).to_bits(), 1e-2),
    ];
    for (dtype, narrow, tolerance) in formats {
        let copy = Copy::with_tensors(|tensors| {
            for (stored, _, bytes) in tensors.values_mut() {
                let values = bytes.as_chunks::<4>().0.iter().map(|&value| f32::from_le_bytes(value));
                (*stored, *bytes) = (dtype, values.flat_map(|value| narrow(value).to_le_bytes()).collect());
            }
        });
        let off = |other: &[f32]| whole.iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let loaded = off(&logits(&copy.load().unwrap()));
        assert!(loaded < tolerance, "{dtype:?}: off by {loaded}");
    }
}

#[test]
fn a_file_that_is_no_whole_safetensors_file_is_named() {
    let whole = std::fs::metadata(fixture().join("model.safetensors")).unwrap().len() as usize;
    let cut = |length: usize| Copy::with_bytes(|bytes| bytes.truncate(length)).checkpoint_error();
    assert_eq!(cut(0), "model.safetensors: expected a safetensors header of at least 8 bytes, got 0 bytes");
    assert!(cut(1000).contains("expected a safetensors header within the file's 1000 bytes, got a header length of"));
    for length in [whole - 1, whole / 2] {
        let expected = format!("model.safetensors: expected {whole} bytes as the header says, got {length}");
        assert_eq!(cut(length), expected);
    }
    let longer = Copy::with_bytes(|bytes| bytes.push(0)).checkpoint_error();
    assert_eq!(longer, format!("model.safetensors: expected {whole} bytes as the header says, got {}", whole + 1));

    let foreign: [&[u8]; 4] = [
        b"GGUF\x03\x00\x00\x00\x10\x00\x00\x00",
        b"PK\x03\x04\x00\x00\x08\x08archive/data.pkl",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 135\n",
        b"<!DOCTYPE html><html>404</html>",
    ];
    for bytes in foreign {
        let error = Copy::with_bytes(|file| *file = bytes.into()).checkpoint_error();
        assert!(error.ends_with("truncated, or not a safetensors file"), "{error}");
    }
}

#[test]
fn tensors_that_overlap_are_named() {
    let copy = Copy::with_bytes(|bytes| {
        let (from, to) = (b"\"data_offsets\":[13968,27936]", b"\"data_offsets\":[13964,27932]");
        let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
        bytes[at..at + to.len()].copy_from_slice(to);
    });
    let tensor = "model.safetensors: tensor `model.embed_tokens.weight`: ";
    let expected = format!("{tensor}expected F32 [97, 36] to fill the bytes from 13968, got the span 13964..27932");
    assert_eq!(copy.checkpoint_error(), expected);
}

#[test]
fn a_missing_tensor_is_named() {
    for name in [UP_PROJ, "lm_head.weight", "model.norm.weight", "model.layers.0.mlp.gate.weight"] {
        let error = Copy::with_tensors(|tensors| drop(tensors.remove(name).unwrap())).checkpoint_error();
        assert_eq!(error, format!("model.safetensors: tensor `{name}`: expected in the checkpoint, got none"));
    }
    let missing = Copy::with_tensors(|tensors| tensors.retain(|name, _| !name.contains("layers.0.mlp.experts.7.")));
    let name = "model.layers.0.mlp.experts.7.gate_proj.weight";
    let expected = format!("model.safetensors: tensor `{name}`: expected in the checkpoint, got none");
    assert_eq!(missing.checkpoint_error(), expected);
}

#[test]
fn an_expert_that_the_configuration_does_not_have_is_named() {
    for id in [8, 21] {
        let extra = format!("model.layers.1.mlp.experts.{id}.up_proj.weight");
        let copy = Copy::with_tensors(|tensors| drop(tensors.insert(extra.clone(), tensors[UP_PROJ].clone())));
        let expected =
            format!("model.safetensors: tensor `{extra}`: expected experts 0 to 7 as the configuration says, got {id}");
        assert_eq!(copy.checkpoint_error(), expected);
    }
    let block = "model.layers.2.mlp.experts.0.up_proj.weight";
    let copy = Copy::with_tensors(|tensors| drop(tensors.insert(block.into(), tensors[UP_PROJ].clone())));
    let expected =
        format!("model.safetensors: tensor `{block}`: expected blocks 0 to 1 as the configuration says, got 2");
    assert_eq!(copy.checkpoint_error(), expected);
    // Other tensors that nobody asks for are left alone: checkpoints carry rotary tables and heads for more tokens ahead.
    let copy = Copy::with_tensors(|tensors| {
        let spare = tensors["model.norm.weight"].clone();
        tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), spare.clone());
        tensors.insert("model.layers.0.mlp.experts.extra".into(), spare.clone());
        tensors.insert("model.layers.2.input_layernorm.weight".into(), spare);
    });
    assert!(copy.load().is_ok());
}

#[test]
fn a_wrong_shape_is_named() {
    let shaped = |name: &str, shape: &[usize]| {
        Copy::with_tensors(|tensors| tensors.get_mut(name).unwrap().1 = shape.into()).checkpoint_error()
    };
    assert_eq!(
        shaped(UP_PROJ, &[36, 44]),
        format!("model.safetensors: tensor `{UP_PROJ}`: expected shape [44, 36], got [36, 44]")
    );
    assert_eq!(
        shaped("model.layers.0.mlp.gate.weight", &[288]),
        "model.safetensors: tensor `model.layers.0.mlp.gate.weight`: expected shape [8, 36], got [288]"
    );
    assert_eq!(
        shaped("model.norm.weight", &[36, 1]),
        "model.safetensors: tensor `model.norm.weight`: expected shape [36], got [36, 1]"
    );
}

#[test]
fn a_dtype_that_is_no_weight_is_named() {
    for dtype in [Dtype::I32, Dtype::U32] {
        let error = Copy::with_tensors(|tensors| tensors.get_mut(UP_PROJ).unwrap().0 = dtype).checkpoint_error();
        let expected = format!("model.safetensors: tensor `{UP_PROJ}`: expected dtype F32, BF16 or F16, got {dtype:?}");
        assert_eq!(error, expected);
    }
}

#[test]
fn a_configuration_that_contradicts_the_tensors_is_an_error() {
    let error = |key: &str, value: usize| Copy::with_key(key, json!(value)).checkpoint_error();
    let tensor = |name: &str, rest: &str| format!("model.safetensors: tensor `model.{name}.weight`: expected {rest}");
    assert_eq!(
        error("num_experts", 7),
        tensor("layers.0.mlp.experts.7.down_proj", "experts 0 to 6 as the configuration says, got 7")
    );
    assert_eq!(error("num_experts", 9), tensor("layers.0.mlp.experts.8.gate_proj", "in the checkpoint, got none"));
    assert_eq!(error("num_hidden_layers", 3), tensor("layers.2.input_layernorm", "in the checkpoint, got none"));
    assert_eq!(error("vocab_size", 98), tensor("embed_tokens", "shape [98, 36], got [97, 36]"));
    assert_eq!(error("hidden_size", 48), tensor("embed_tokens", "shape [97, 48], got [97, 36]"));
    assert_eq!(
        error("intermediate_size", 43),
        tensor("layers.0.mlp.experts.0.gate_proj", "shape [43, 36], got [44, 36]")
    );
    assert_eq!(error("num_key_value_heads", 6), tensor("layers.0.self_attn.k_proj", "shape [36, 36], got [12, 36]"));
}

#[test]
fn a_configuration_that_contradicts_itself_is_an_error() {
    let error = |key: &str, value: Value| Copy::with_key(key, value).config_error();
    assert_eq!(
        error("num_experts_per_tok", json!(9)),
        "config.json: key `num_experts_per_tok`: expected at most num_experts 8, got 9"
    );
    assert_eq!(
        error("num_attention_heads", json!(5)),
        "config.json: key `num_key_value_heads`: expected a divisor of num_attention_heads 5, got 2"
    );
    assert_eq!(
        error("num_experts", Value::Null),
        "config.json: key `num_experts`: expected a positive integer, got null"
    );
    assert_eq!(error("hidden_act", json!("gelu")), "config.json: key `hidden_act`: expected silu, got gelu");
    let family = Copy::with_key("model_type", json!("mamba")).load().err().unwrap();
    assert!(matches!(family, Error::UnknownName { .. }), "{family}");
}

#[test]
fn a_missing_or_unreadable_file_is_named() {
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let copy = Copy::new();
        std::fs::remove_file(copy.path(name)).unwrap();
        assert!(copy.io_error().starts_with(&format!("{name}: ")), "{}", copy.io_error());
    }
    let nowhere = Model::load(Path::new("/nowhere/at/all"), &LoadOptions::default()).err().unwrap();
    assert!(nowhere.to_string().starts_with("/nowhere/at/all/config.json: "), "{nowhere}");

    let text = |name: &str, bytes: &[u8]| {
        let copy = Copy::new();
        std::fs::write(copy.path(name), bytes).unwrap();
        copy
    };
    for bytes in [&b""[..], b"{\"model_type\": ", b"[]", b"\xff\xfe{}"] {
        assert!(text("config.json", bytes).config_error().starts_with("config.json: "));
    }
    for bytes in [&b""[..], b"{}", b"\xff"] {
        let error = text("tokenizer.json", bytes).load().err().unwrap();
        assert!(matches!(&error, Error::Tokenizer(_)) && error.is_user_error(), "{error:?}");
    }
}

#[test]
fn shards_that_do_not_match_their_index_are_named() {
    let lost = Copy::sharded(|_| ());
    std::fs::remove_file(lost.path("two.safetensors")).unwrap();
    assert!(lost.io_error().starts_with("two.safetensors: "), "{}", lost.io_error());

    let unlisted = Copy::sharded(|index| drop(index["weight_map"].as_object_mut().unwrap().remove(UP_PROJ)));
    assert!(unlisted.load().is_ok(), "the shard is read for its neighbours: the tensor is there");

    let index = "model.safetensors.index.json";
    let promised = Copy::sharded(|index| index["weight_map"]["ghost"] = json!("two.safetensors"));
    assert_eq!(promised.checkpoint_error(), format!("{index}: tensor `ghost`: expected in two.safetensors, got none"));
    let half = Copy::sharded(|index| {
        index["weight_map"].as_object_mut().unwrap().retain(|_, shard| shard == "one.safetensors");
    });
    let first = "model.layers.1.input_layernorm.weight";
    let expected = format!("one.safetensors: tensor `{first}`: expected in the checkpoint, got none");
    assert_eq!(half.checkpoint_error(), expected);
    let unnamed = Copy::sharded(|index| drop(index["weight_map"].as_object_mut().unwrap().remove(UP_PROJ)));
    write(
        &unnamed.path("two.safetensors"),
        tensors().iter().filter(|(name, _)| name.contains("layers.1") && *name != UP_PROJ),
    );
    let expected = format!("one.safetensors and 1 more: tensor `{UP_PROJ}`: expected in the checkpoint, got none");
    assert_eq!(unnamed.checkpoint_error(), expected);
    let empty = Copy::sharded(|index| *index = json!({ "weight_map": {} }));
    assert_eq!(empty.checkpoint_error(), format!("{index}: expected tensors in `weight_map`, got none"));
    let none = Copy::sharded(|index| *index = json!({ "metadata": {} }));
    assert_eq!(none.checkpoint_error(), format!("{index}: expected an object `weight_map`, got none"));
    for shard in [json!("../two.safetensors"), json!(7)] {
        let outside = Copy::sharded(|index| index["weight_map"][UP_PROJ] = shard.clone());
        let expected = format!("{index}: tensor `{UP_PROJ}`: expected a file name, got ");
        assert!(outside.checkpoint_error().starts_with(&expected), "{}", outside.checkpoint_error());
    }
}

#[test]
fn the_decoder_alone_names_file_and_tensor_as_well() {
    let copy = Copy::with_tensors(|tensors| drop(tensors.remove(UP_PROJ)));
    let spec = zoo::parse_config(&std::fs::read_to_string(copy.path("config.json")).unwrap(), "config.json").unwrap();
    let weights = Weights::open(copy.0.path()).unwrap();
    let error = Decoder::new(&spec, var_builder(&weights, DType::F32, &Device::Cpu)).err().unwrap();
    let expected = format!("model.safetensors: tensor `{UP_PROJ}`: expected in the checkpoint, got none");
    assert!(matches!(error, Error::Checkpoint { .. }) && copy.shown(&error) == expected, "{error}");
}

#[test]
fn weights_that_are_no_numbers_load_and_fail_at_the_gate() {
    let copy = Copy::with_tensors(|tensors| {
        let (_, _, bytes) = tensors.get_mut("model.layers.1.mlp.gate.weight").unwrap();
        bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    let model = copy.load().unwrap();
    let (decoder, batch) = (model.decoder(), Batch::new(&[&[1, 2]]).unwrap());
    let error = decoder.forward(&batch, &mut decoder.batch_state()).unwrap_err();
    let expected = "layer 1 of the model, feed-forward, gate logit of token 0, expert 0: expected finite numbers, got NaN; \
                    tensor `model.layers.1.mlp.gate.weight` of model.safetensors has NaN at [0, 0]";
    assert!(matches!(error, Error::NonFinite { .. }) && copy.shown(&error) == expected, "{error}");
}
