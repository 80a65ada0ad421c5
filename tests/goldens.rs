//! Parity with Hugging Face transformers: the decoder against goldens made by `tests/goldens/make_goldens.py`.
#![cfg(feature = "model")]

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use phase_moe::{Batch, Checkpoint, Decoder, LoadOptions, Weights};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn golden(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    let bytes = checkpoint.read(name).unwrap();
    bytes.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

fn golden_ids(checkpoint: &Checkpoint, name: &str) -> Vec<i32> {
    let bytes = checkpoint.read(name).unwrap();
    bytes.as_chunks::<4>().0.iter().map(|&bytes| i32::from_le_bytes(bytes)).collect()
}

/// Fails where two tensors differ by more than 1e-4 (absolute and relative together).
fn assert_close(stage: &str, ours: &[f32], golden: &[f32]) {
    assert_eq!(ours.len(), golden.len(), "{stage}: length");
    let worst = ours.iter().zip(golden).map(|(a, b)| (a - b).abs() / (1.0 + b.abs())).fold(0.0, f32::max);
    assert!(worst <= 1e-4, "{stage}: off by {worst}");
}

fn compare(model: &Path, goldens: &Path) {
    let decoder = Decoder::load(&Weights::open(model).unwrap(), &LoadOptions::default()).unwrap();
    let goldens = Checkpoint::open(goldens).unwrap();
    let ids: Vec<u32> = golden_ids(&goldens, "ids").into_iter().map(|id| id as u32).collect();

    let batch = Batch::new(&[&ids]).unwrap();
    let mut state = decoder.batch_state().keeping_routed();
    let logits = decoder.forward(&batch, &mut state).unwrap();
    assert_eq!(state.routed().len(), decoder.spec().moe_blocks().count());
    for (layer, routed) in state.routed().iter().enumerate() {
        let router_logits = routed.logits.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_close(
            &format!("layer {layer} router logits"),
            &router_logits,
            &golden(&goldens, &format!("layer.{layer}.router_logits")),
        );
        let experts: Vec<i32> = routed.assignment.ids().collect();
        assert_eq!(experts, golden_ids(&goldens, &format!("layer.{layer}.top_k")), "layer {layer} experts");
        let weights = golden(&goldens, &format!("layer.{layer}.top_k_weights"));
        assert_close(&format!("layer {layer} combine weights"), routed.assignment.weights(), &weights);
    }
    let positions: Vec<u32> = golden_ids(&goldens, "logit_positions").into_iter().map(|at| at as u32).collect();
    let kept = logits.squeeze(0).unwrap().index_select(&Tensor::new(positions, &Device::Cpu).unwrap(), 0).unwrap();
    assert_close("logits", &kept.flatten_all().unwrap().to_vec1::<f32>().unwrap(), &golden(&goldens, "logits"));

    // One token at a time, with kept keys and values, must come to the same.
    let mut state = decoder.generation_state();
    let steps = ids.iter().map(|id| decoder.forward(&Batch::new(&[&[*id]]).unwrap(), &mut state).unwrap());
    let stepped = Tensor::cat(&steps.collect::<Vec<_>>(), 1).unwrap();
    let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_close("logits step by step", &values(&stepped), &values(&logits));
}

#[test]
fn a_random_olmoe_equals_transformers() {
    let fixture = root().join("tests/goldens/olmoe_random");
    compare(&fixture, &fixture.join("goldens.safetensors"));
}

#[test]
fn a_random_olmoe_with_normalised_weights_ties_and_clipping_equals_transformers() {
    let fixture = root().join("tests/goldens/olmoe_random_norm");
    compare(&fixture, &fixture.join("goldens.safetensors"));
}

#[test]
fn the_bundled_model_equals_transformers() {
    compare(&root().join("models/tiny-moe"), &root().join("tests/goldens/tiny_moe.safetensors"));
}
