//! Experts of a GGUF file in MXFP4 against transformers with the numbers of their blocks, golden by
//! `tests/goldens/make_mxfp4_golden.py`; from the file through an expert cache the same bits.

use std::path::{Path, PathBuf};

use crate::offload::Part;
use crate::offload::store::Piece;
use crate::{Batch, CacheOptions, Checkpoint, Decoder, Dtype, LoadOptions, Weights};
use candle_core::{Module, Tensor, Var};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/gguf_mxfp4").join(name)
}

fn words<T>(goldens: &Checkpoint, name: &str, of: fn([u8; 4]) -> T) -> Vec<T> {
    goldens.read(name).unwrap().as_chunks().0.iter().map(|&bytes| of(bytes)).collect()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference, over the largest number.
fn off(ours: &[f32], golden: &[f32]) -> f32 {
    assert_eq!(ours.len(), golden.len());
    let largest = golden.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    ours.iter().zip(golden).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

#[test]
fn blocks_are_the_numbers_they_stand_for() {
    let files = Weights::open(&fixture("olmoe.gguf")).unwrap();
    let goldens = Checkpoint::open_files(&[fixture("goldens.safetensors")]).unwrap();
    let decoder = Decoder::load(&files, &LoadOptions::default()).unwrap();
    let block = words(&goldens, "block.layer", u32::from_le_bytes)[0] as usize;
    let (layer, golden) =
        (decoder.moe_layers().nth(block).unwrap(), words(&goldens, "block.output", f32::from_le_bytes));
    let input = words(&goldens, "block.input", f32::from_le_bytes);
    let input = Tensor::from_vec(input, ((), layer.spec().hidden), &candle_core::Device::Cpu).unwrap();
    // The engine rounds activations, Candle's operations do not.
    let worst = off(&values(&layer.forward(&input).unwrap()), &golden);
    assert!(worst <= 2e-2, "off by {worst}");
    let tracked = Var::from_tensor(&input).unwrap();
    let worst = off(&values(&layer.forward(tracked.as_tensor()).unwrap()), &golden);
    assert!(worst <= 1e-5, "in floats off by {worst}");

    let store = files.expert_store().unwrap();
    let Piece { part, dtype, rows, columns, .. } = files.pieces(1, 2).unwrap()[2];
    assert_eq!((part, dtype, rows, columns), (Part::Down, Dtype::Mxfp4, 32, 64));
    let cache = CacheOptions::new(2 * store.slab_bytes(0)).sparing(&store);
    let cached = Decoder::load(&files, &LoadOptions::default().with_expert_cache(cache)).unwrap();
    let ids = words(&goldens, "prompt.1.ids", u32::from_le_bytes);
    let logits = |decoder: &Decoder| {
        let batch = Batch::new(&[&ids]).unwrap();
        values(&decoder.forward(&batch, &mut decoder.batch_state()).unwrap())
    };
    assert!(logits(&cached) == logits(&decoder), "other bits from a cache");
}
