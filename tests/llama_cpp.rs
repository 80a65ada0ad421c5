//! The bundled weights in f32 against llama.cpp, goldens by `tests/goldens/make_llama_cpp_goldens.py`.
#![cfg(feature = "model")]

use std::path::Path;

use half::bf16;
use phase_moe::checkpoint::{NamedTensor, tensor_bytes};
use phase_moe::{Batch, CacheOptions, Checkpoint, Decoder, LoadOptions, Weights};
use safetensors::SafeTensors;

/// How far a logit may be from llama.cpp's: what summing in another order makes of f32.
const LOGIT: f32 = 1e-4;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The bundled model with every weight as the f32 that it stands for.
fn widen(directory: &Path) {
    let bundled = root().join("models/tiny-moe");
    let checkpoint = Checkpoint::open(&bundled).unwrap();
    let wide = |(name, entry): (&String, &phase_moe::checkpoint::TensorEntry)| {
        let bytes = checkpoint.read(name).unwrap();
        let values: Vec<f32> = bytes.as_chunks().0.iter().map(|&bytes| bf16::from_le_bytes(bytes).to_f32()).collect();
        NamedTensor::f32(name.as_str(), entry.shape.as_slice(), &values)
    };
    let tensors: Vec<NamedTensor> = checkpoint.tensors().iter().map(wide).collect();
    std::fs::write(directory.join("model.safetensors"), tensor_bytes(&tensors, None).unwrap()).unwrap();
    std::fs::copy(bundled.join("config.json"), directory.join("config.json")).unwrap();
}

#[test]
fn bundled_weights_give_the_logits_and_the_perplexity_of_llama_cpp() {
    let bytes = std::fs::read(root().join("tests/goldens/llama_cpp.safetensors")).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let perplexity: f64 = metadata.metadata().as_ref().unwrap()["perplexity"].parse().unwrap();
    assert!((perplexity - 25.4445).abs() < 1e-4);
    let goldens = SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: &str| goldens.tensor(name).unwrap().data().as_chunks::<4>().0.to_vec();
    let integers = |name: &str| words(name).into_iter().map(u32::from_le_bytes).collect::<Vec<_>>();
    let floats = |name: &str| words(name).into_iter().map(f32::from_le_bytes).collect::<Vec<_>>();
    let (ids, positions) = (integers("ids"), integers("positions"));
    let (nll, golden) = (floats("nll"), floats("logits"));
    let vocabulary = golden.len() / positions.len();
    assert_eq!((ids.len(), positions.len(), nll.len()), (512, 34, 511));

    let directory = tempfile::tempdir().unwrap();
    widen(directory.path());
    let files = Weights::open(directory.path()).unwrap();
    let cached = LoadOptions::default().with_expert_cache(CacheOptions::new(4 << 20));
    for options in [LoadOptions::default(), cached] {
        let decoder = Decoder::load(&files, &options).unwrap();
        let logits = decoder.forward(&Batch::new(&[&ids]).unwrap(), &mut decoder.batch_state()).unwrap();
        let logits: Vec<f32> = logits.flatten_all().unwrap().to_vec1().unwrap();
        let rows: Vec<&[f32]> = logits.chunks(vocabulary).collect();
        assert_eq!(rows.len(), ids.len());

        let pairs = positions.iter().zip(golden.chunks(vocabulary));
        let off = pairs.flat_map(|(&at, golden)| rows[at as usize].iter().zip(golden).map(|(a, b)| (a - b).abs()));
        let off = off.fold(0.0, f32::max);
        let ours: Vec<f64> = rows.iter().zip(&ids[1..]).map(|(row, &next)| surprise(row, next)).collect();
        let mean = ours.iter().sum::<f64>() / ours.len() as f64;
        let most = ours.iter().zip(&nll).map(|(a, b)| (a - f64::from(*b)).abs()).fold(0.0, f64::max);
        println!("logits off by {off:e}, surprises by {most:e}, perplexity {} for {perplexity}", mean.exp());
        assert!(off <= LOGIT, "a logit is off by {off}");
        assert!(most <= 2.0 * f64::from(LOGIT), "a surprise is off by {most}");
        assert!((mean.exp() - perplexity).abs() <= 1e-4, "perplexity {}", mean.exp());
    }
}

/// −log of the probability of `next`.
fn surprise(logits: &[f32], next: u32) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - most).exp()).sum();
    sum.ln() + f64::from(most - logits[next as usize])
}
