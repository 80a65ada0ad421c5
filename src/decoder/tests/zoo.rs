//! Families against Hugging Face transformers: MoE block and whole decoder, goldens by `tests/goldens/make_zoo_goldens.py`.

use std::path::{Path, PathBuf};

use crate::checkpoint::{NamedTensor, tensor_bytes};
use crate::decoder::var_builder;
use crate::offload::Part;
use crate::offload::store::Piece;
use crate::{Batch, CacheOptions, Checkpoint, Decoder, Dtype, LoadOptions, ModelSpec, MoeLayer, Weights, zoo};
use candle_core::{DType, Device, Module, Tensor, Var};

fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/zoo").join(family)
}

fn config(family: &str) -> String {
    std::fs::read_to_string(fixture(family).join("config.json")).unwrap()
}

fn floats(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    let bytes = checkpoint.read(name).unwrap();
    bytes.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

fn integers(checkpoint: &Checkpoint, name: &str) -> Vec<u32> {
    let bytes = checkpoint.read(name).unwrap();
    bytes.as_chunks::<4>().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Fails where two tensors differ by more than 1e-4 (absolute and relative together).
fn assert_close(stage: &str, ours: &[f32], golden: &[f32]) {
    assert_eq!(ours.len(), golden.len(), "{stage}: length");
    let worst = ours.iter().zip(golden).map(|(a, b)| (a - b).abs() / (1.0 + b.abs())).fold(0.0, f32::max);
    assert!(worst <= 1e-4, "{stage}: off by {worst}");
}

fn goldens(family: &str) -> Checkpoint {
    Checkpoint::open_files(&[&fixture(family).join("goldens.safetensors")]).unwrap()
}

/// The MoE block of `family` on its golden input.
fn compare_block(family: &str) {
    let spec = zoo::parse_moe_config(&config(family), "config.json").unwrap();
    let goldens = goldens(family);
    let files = Weights::open(&fixture(family)).unwrap();
    let block = files.spec().unwrap().block_prefix(integers(&goldens, "block.layer")[0] as usize);
    let gate = format!(".{}.weight", spec.names.gate);
    let mut names = files.checkpoint().tensors().keys();
    let name = names
        .find(|name| name.starts_with(&format!("{block}.")) && name.ends_with(&gate))
        .expect("a gate in that block");
    let vb = var_builder(&files, DType::F32, &Device::Cpu);
    let layer = MoeLayer::load(&spec, vb.pp(name.strip_suffix(&gate).unwrap())).unwrap();
    let input = Tensor::from_vec(floats(&goldens, "block.input"), ((), spec.hidden), &Device::Cpu).unwrap();
    let output = layer.forward(&input).unwrap();
    assert_close(&format!("{family} block"), &values(&output), &floats(&goldens, "block.output"));
}

/// Logits of both prompts, at once, one token after another and in two parts.
fn compare_logits(family: &str, decoder: &Decoder) {
    let goldens = goldens(family);
    for prompt in 0..2 {
        let ids = integers(&goldens, &format!("prompt.{prompt}.ids"));
        let golden = floats(&goldens, &format!("prompt.{prompt}.logits"));
        let batch = Batch::new(&[&ids]).unwrap();
        let mut state = decoder.batch_state().keeping_routed();
        let logits = decoder.forward(&batch, &mut state).unwrap();
        assert_close(&format!("{family}, prompt {prompt}"), &values(&logits), &golden);
        assert_eq!(state.routed().len(), decoder.spec().moe_layers(), "MoE layers are counted by themselves");
        let mut state = decoder.generation_state();
        let steps = ids.iter().map(|id| decoder.forward(&Batch::new(&[&[*id]]).unwrap(), &mut state).unwrap());
        let stepped = Tensor::cat(&steps.collect::<Vec<_>>(), 1).unwrap();
        assert_close(&format!("{family}, prompt {prompt} step by step"), &values(&stepped), &golden);
        let (mut state, (first, second)) = (decoder.generation_state(), ids.split_at(3));
        let parts = [first, second].map(|ids| decoder.forward(&Batch::new(&[ids]).unwrap(), &mut state).unwrap());
        let parts = Tensor::cat(&parts, 1).unwrap();
        assert_close(&format!("{family}, prompt {prompt} in two parts"), &values(&parts), &golden);
    }
}

fn compare_decoder(family: &str) {
    let files = Weights::open(&fixture(family)).unwrap();
    let mut decoder = Decoder::load(&files, &LoadOptions::default()).unwrap();
    compare_logits(family, &decoder);
    // The same as Candle's operations.
    let vb = var_builder(&files, DType::F32, &Device::Cpu);
    compare_logits(family, &Decoder::new(files.spec().unwrap(), vb).unwrap());
    // What sees pictures and what guesses further tokens is skipped by its name.
    let is_read = |name: &str| !["model.visual.", "mtp."].iter().any(|start| name.starts_with(start));
    let tensors = files.checkpoint().tensors().iter().filter(|(name, _)| is_read(name));
    let stored: usize = tensors.map(|(_, entry)| entry.bytes / 4).sum();
    assert_eq!(decoder.spec().parameters(), stored, "{family}: parameters");
    let cached = cached(&files);
    compare_logits(family, &cached);
    decoder.set_expert_cache(cached.expert_cache().unwrap()).unwrap();
    compare_logits(family, &decoder);
}

/// The same model with a cache of two experts.
fn cached(files: &Weights) -> Decoder {
    let store = files.expert_store().unwrap();
    assert_eq!(store.layers(), files.spec().unwrap().moe_layers());
    let options = CacheOptions::new(2 * store.slab_bytes(0)).sparing(&store);
    let options = LoadOptions::default().with_expert_cache(options);
    let decoder = Decoder::load(files, &options).unwrap();
    assert!(decoder.expert_cache().is_some());
    decoder
}

/// Each family of the table, some in a second shape; OLMoE's goldens are those of `tests/goldens.rs`.
#[test]
fn every_family_equals_transformers() {
    let second = ["lfm2_moe_bias", "qwen3_next_uneven"];
    let families = zoo::FAMILIES.iter().map(|family| family.name).filter(|&name| name != "olmoe");
    for family in families.chain(second) {
        compare_block(family);
        compare_decoder(family);
    }
}

#[test]
fn blocks_of_qwen3_moe_are_dense_by_step_and_by_name() {
    let spec = zoo::parse_config(&config("qwen3_moe"), "config.json").unwrap();
    assert_eq!((spec.dense.blocks.as_slice(), spec.moe_layers()), ([0, 2, 3].as_slice(), 1));
}

/// How a stack lies.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    Rows,
    Columns,
}

/// A copy of `family` whose experts are stacked, as transformers holds them in memory.
fn stacked(family: &str, order: Order) -> (tempfile::TempDir, ModelSpec) {
    let (directory, spec) = (tempfile::tempdir().unwrap(), zoo::parse_config(&config(family), "config.json").unwrap());
    let checkpoint = Checkpoint::open(fixture(family)).unwrap();
    let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = checkpoint
        .tensors()
        .iter()
        .filter(|(name, _)| !name.contains(".experts."))
        .map(|(name, entry)| (name.clone(), entry.shape.clone(), floats(&checkpoint, name)))
        .collect();
    let (names, experts) = (&spec.moe.names, spec.moe.experts);
    for block in spec.moe_blocks() {
        let ffn = format!("model.layers.{block}.{}", spec.ffn);
        let mut stack = |name: &str, parts: &[&String], rows: usize, columns: usize| {
            let mut numbers = Vec::new();
            for expert in 0..experts {
                let part = |part: &&String| floats(&checkpoint, &format!("{ffn}.experts.{expert}.{part}.weight"));
                let matrix: Vec<f32> = parts.iter().flat_map(part).collect();
                match order {
                    Order::Rows => numbers.extend(matrix),
                    Order::Columns => {
                        numbers.extend(
                            (0..columns)
                                .flat_map(|c| (0..rows).map(move |r| (r, c)))
                                .map(|(r, c)| matrix[r * columns + c]),
                        );
                    }
                }
            }
            let shape = if order == Order::Rows { [rows, columns] } else { [columns, rows] };
            tensors.push((format!("{ffn}.{name}"), vec![experts, shape[0], shape[1]], numbers));
        };
        let (width, hidden) = (spec.moe.expert_width, spec.moe.hidden);
        stack(&names.stacked_gate_up, &[&names.gate_proj, &names.up_proj], 2 * width, hidden);
        stack(&names.stacked_down, &[&names.down_proj], hidden, width);
    }
    let named: Vec<_> =
        tensors.iter().map(|(name, shape, numbers)| NamedTensor::f32(name, shape.clone(), numbers)).collect();
    std::fs::write(directory.path().join("model.safetensors"), tensor_bytes(&named, None).unwrap()).unwrap();
    std::fs::write(directory.path().join("config.json"), config(family)).unwrap();
    (directory, spec)
}

#[test]
fn stacked_experts_are_the_same_whichever_way_they_lie() {
    for family in ["mixtral", "qwen3_moe"] {
        for order in [Order::Rows, Order::Columns] {
            let (directory, _) = stacked(family, order);
            let files = Weights::open(directory.path()).unwrap();
            compare_logits(family, &Decoder::load(&files, &LoadOptions::default()).unwrap());
            compare_logits(family, &cached(&files));
        }
    }
}

#[test]
fn a_stack_of_other_experts_is_an_error() {
    let (directory, _) = stacked("mixtral", Order::Rows);
    let config = config("mixtral").replace("\"num_local_experts\": 6", "\"num_local_experts\": 5");
    std::fs::write(directory.path().join("config.json"), config).unwrap();
    let files = Weights::open(directory.path()).unwrap();
    let error = Decoder::load(&files, &LoadOptions::default()).err().unwrap().to_string();
    let tensors = "tensors `model.layers.0.block_sparse_moe.experts.gate_up_proj` and `model.layers.0.block_sparse_moe.experts.down_proj`";
    let expected = format!("model.safetensors: {tensors}: stacked experts: expected [5, 40, 32] and [5, 32, 20], or ");
    assert!(error.contains(&expected), "{error}");
    assert!(error.ends_with("got [6, 40, 32] and [6, 32, 20]"), "{error}");
}

/// Fails where two tensors differ by more than a part of the largest number.
fn assert_near(stage: &str, ours: &[f32], golden: &[f32], limit: f32) {
    assert_eq!(ours.len(), golden.len(), "{stage}: length");
    let largest = golden.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    let worst = ours.iter().zip(golden).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest;
    println!("{stage}: off by {worst:.1e} of the largest");
    assert!(worst <= limit, "{stage}: off by {worst} of {largest}");
}

#[test]
fn gpt_oss_in_mxfp4_is_what_transformers_computes_with_the_numbers_of_its_blocks() {
    const FAMILY: &str = "gpt_oss_mxfp4";
    let (files, goldens) = (Weights::open(&fixture(FAMILY)).unwrap(), goldens(FAMILY));
    let decoder = Decoder::load(&files, &LoadOptions::default()).unwrap();
    let block = integers(&goldens, "block.layer")[0] as usize;
    let (layer, hidden) = (decoder.moe_layers().nth(block).unwrap(), decoder.spec().moe.hidden);
    let input = Tensor::from_vec(floats(&goldens, "block.input"), ((), hidden), &Device::Cpu).unwrap();
    let golden = floats(&goldens, "block.output");
    // The engine rounds activations, Candle's operations do not.
    assert_near("mxfp4 block", &values(&layer.forward(&input).unwrap()), &golden, 2e-2);
    let tracked = Var::from_tensor(&input).unwrap();
    assert_near("mxfp4 block in floats", &values(&layer.forward(tracked.as_tensor()).unwrap()), &golden, 1e-5);
    // The same weights as floats: all of the decoder, exactly.
    let (directory, spec) = (tempfile::tempdir().unwrap(), decoder.spec());
    in_floats(&files, spec, directory.path());
    let as_floats = Decoder::load(&Weights::open(directory.path()).unwrap(), &LoadOptions::default()).unwrap();
    compare_logits(FAMILY, &as_floats);
    let cached = cached(&files);
    for prompt in 0..2 {
        let batch = Batch::new(&[&integers(&goldens, &format!("prompt.{prompt}.ids"))]).unwrap();
        // Logits, and which experts the tokens got in the last block.
        let run = |decoder: &Decoder| {
            let mut state = decoder.batch_state().keeping_routed();
            let logits = decoder.forward(&batch, &mut state).unwrap();
            (values(&logits), state.routed().last().unwrap().assignment.clone())
        };
        let (held, went) = run(&decoder);
        assert_eq!(run(&cached).0, held, "the same bytes, held or read when they are needed");
        // Rounded activations may send a token elsewhere, where two experts are as good.
        let (golden, would_go) = (floats(&goldens, &format!("prompt.{prompt}.logits")), run(&as_floats).1);
        let agree = |token: &usize| went.slots(*token).map(|slot| slot.0).eq(would_go.slots(*token).map(|slot| slot.0));
        let tokens: Vec<usize> = (0..batch.positions()).filter(agree).collect();
        assert!(4 * tokens.len() >= 3 * batch.positions(), "{} of {} tokens agree", tokens.len(), batch.positions());
        let of = |logits: &[f32]| -> Vec<f32> {
            tokens.iter().flat_map(|token| logits[token * spec.vocab..][..spec.vocab].to_vec()).collect()
        };
        assert_near(&format!("mxfp4, prompt {prompt}"), &of(&held), &of(&golden), 4e-2);
    }
    let Piece { part, dtype, rows, columns, .. } = files.pieces(0, 3).unwrap()[0];
    assert_eq!((part, dtype, rows, columns), (Part::GateUp, Dtype::Mxfp4, 128, 96));
}

/// Writes a checkpoint with the numbers that blocks of MXFP4 stand for, stacked.
fn in_floats(files: &Weights, spec: &ModelSpec, directory: &Path) {
    let store = files.expert_store().unwrap();
    let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
    for (name, entry) in files.checkpoint().tensors() {
        if !name.ends_with("_blocks") && !name.ends_with("_scales") {
            tensors.push((name.clone(), entry.shape.clone(), floats(files.checkpoint(), name)));
        }
    }
    for layer in 0..store.layers() {
        for (part, name) in [(Part::GateUp, "gate_up_proj"), (Part::Down, "down_proj")] {
            let pieces = files.pieces(layer, 0).unwrap();
            let Piece { rows, columns, .. } = *pieces.iter().find(|piece| piece.part == part).unwrap();
            let numbers = (0..spec.moe.experts).flat_map(|expert| {
                let mut slabs = store.slabs(layer, expert).unwrap();
                store.load(layer, expert, &mut slabs).unwrap().matrix(part).unwrap().to_f32()
            });
            let name = format!("model.layers.{layer}.mlp.experts.{name}");
            tensors.push((name, vec![spec.moe.experts, rows, columns], numbers.collect()));
        }
    }
    let named: Vec<_> =
        tensors.iter().map(|(name, shape, numbers)| NamedTensor::f32(name, shape.clone(), numbers)).collect();
    std::fs::write(directory.join("model.safetensors"), tensor_bytes(&named, None).unwrap()).unwrap();
    std::fs::write(directory.join("config.json"), files.config()).unwrap();
}

#[test]
fn blocks_and_scales_of_another_shape_are_named() {
    let directory = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture("gpt_oss_mxfp4").join(file), directory.path().join(file)).unwrap();
    }
    let message = |from: &str, to: &str| {
        let config = config("gpt_oss_mxfp4");
        assert!(config.contains(from));
        std::fs::write(directory.path().join("config.json"), config.replace(from, to)).unwrap();
        let files = Weights::open(directory.path()).unwrap();
        let held = Decoder::load(&files, &LoadOptions::default()).err().unwrap().to_string();
        (held, files.expert_store().unwrap_err().to_string())
    };
    let (held, stored) = message("\"num_local_experts\": 4", "\"num_local_experts\": 3");
    let named = "tensor `model.layers.0.mlp.experts.gate_up_proj_";
    assert_eq!(held, stored);
    assert!(
        stored.contains(&format!("{named}blocks`: expected U8 [3, 128, 3, 16], got U8 [4, 128, 3, 16]")),
        "{stored}"
    );
    let (held, stored) = message("\"intermediate_size\": 64", "\"intermediate_size\": 50");
    assert_eq!(held, stored);
    assert!(
        stored.contains(&format!("{named}blocks`: expected U8 [4, 100, 3, 16], got U8 [4, 128, 3, 16]")),
        "{stored}"
    );
    let other = config("gpt_oss_mxfp4").replace("\"mxfp4\"", "\"awq\"");
    let error = zoo::parse_config(&other, "config.json").unwrap_err().to_string();
    assert_eq!(error, "config.json: key `quantization_config.quant_method`: expected mxfp4, got awq");
}
