//! Weights as stored, keys and values as kept: what their dtypes do to logits, and that a state belongs to its model.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use half::bf16;
use safetensors::Dtype as Stored;

use crate::checkpoint::{NamedTensor, tensor_bytes};
use crate::decoder::var_builder;
use crate::{Batch, Decoder, LoadOptions, Weights};

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn open(family: &str) -> Weights {
    Weights::open(&root("tests/goldens/zoo").join(family)).unwrap()
}

fn ids(decoder: &Decoder, count: usize) -> Vec<u32> {
    (0..count).map(|at| ((at * at * 31 + at * 7 + 3) % decoder.spec().vocab) as u32).collect()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Logits of a prompt, then of some tokens one by one.
fn logits(decoder: &Decoder) -> Vec<f32> {
    let (mut state, ids) = (decoder.generation_state(), ids(decoder, 20));
    let mut all = values(&decoder.forward(&Batch::new(&[&ids[..15]]).unwrap(), &mut state).unwrap());
    for id in &ids[15..] {
        all.extend(values(&decoder.forward(&Batch::new(&[&[*id]]).unwrap(), &mut state).unwrap()));
    }
    all
}

fn off(left: &[f32], right: &[f32]) -> f32 {
    assert_eq!(left.len(), right.len());
    left.iter().zip(right).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn keys_and_values_are_kept_in_the_dtype_that_was_asked_for() {
    for family in ["qwen3_moe", "deepseek_v2", "gpt_oss", "phimoe"] {
        let files = open(family);
        let of = |kv_dtype: Option<DType>| {
            let options = LoadOptions { kv_dtype, ..LoadOptions::default() };
            logits(&Decoder::load(&files, &options).unwrap())
        };
        let exact = of(None);
        assert_eq!(exact, of(Some(DType::F32)), "{family}");
        for (dtype, most) in [(DType::F16, 2e-2), (DType::BF16, 2e-1)] {
            let off = off(&of(Some(dtype)), &exact);
            assert!(off > 1e-6 && off < most, "{family}, {dtype:?}: off by {off}");
        }
        let options = LoadOptions { kv_dtype: Some(DType::U8), ..LoadOptions::default() };
        let error = Decoder::load(&files, &options).unwrap_err().to_string();
        assert_eq!(error, "dtype of keys and values is U8: expected F32, F16 or BF16");
    }
}

#[test]
fn weights_in_bf16_are_the_numbers_that_they_stand_for_beside_activations_in_f32() {
    for family in ["mixtral", "qwen2_moe", "deepseek_v3", "granitemoe"] {
        let files = open(family);
        let checkpoint = files.checkpoint();
        let directories = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let (mut wide, mut narrow) = (Vec::new(), Vec::new());
        for (name, entry) in checkpoint.tensors() {
            let bytes = checkpoint.read(name).unwrap();
            let rounded: Vec<bf16> =
                bytes.as_chunks::<4>().0.iter().map(|word| bf16::from_f32(f32::from_le_bytes(*word))).collect();
            let floats: Vec<f32> = rounded.iter().map(|number| number.to_f32()).collect();
            wide.push(NamedTensor::f32(name.clone(), entry.shape.clone(), &floats));
            let bytes = rounded.iter().flat_map(|number| number.to_le_bytes()).collect();
            narrow.push(NamedTensor { name: name.clone(), dtype: Stored::BF16, shape: entry.shape.clone(), bytes });
        }
        let [of_wide, of_narrow] = [(&directories[0], wide), (&directories[1], narrow)].map(|(directory, tensors)| {
            let path = directory.path();
            std::fs::write(path.join("model.safetensors"), tensor_bytes(&tensors, None).unwrap()).unwrap();
            std::fs::copy(root("tests/goldens/zoo").join(family).join("config.json"), path.join("config.json"))
                .unwrap();
            logits(&Decoder::load(&Weights::open(path).unwrap(), &LoadOptions::default()).unwrap())
        });
        let off = off(&of_wide, &of_narrow);
        assert!(off < 1e-5, "{family}: off by {off}");
    }
}

#[test]
fn a_state_of_another_model_is_refused() {
    let load = |family: &str| Decoder::load(&open(family), &LoadOptions::default()).unwrap();
    let (mixtral, deepseek) = (load("mixtral"), load("deepseek_v3"));
    let batch = Batch::new(&[&[1, 2, 3]]).unwrap();
    let files = open("mixtral");
    let by_candle = Decoder::new(files.spec().unwrap(), var_builder(&files, DType::F32, &Device::Cpu)).unwrap();
    for (decoder, other) in
        [(&mixtral, &deepseek), (&deepseek, &mixtral), (&by_candle, &mixtral), (&mixtral, &by_candle)]
    {
        let error = decoder.forward(&batch, &mut other.generation_state()).unwrap_err().to_string();
        assert!(error.starts_with("decoder state: expected"), "{error}");
    }
    let half = LoadOptions { kv_dtype: Some(DType::F16), ..LoadOptions::default() };
    let half = Decoder::load(&files, &half).unwrap();
    let mut state = mixtral.generation_state();
    mixtral.forward(&batch, &mut state).unwrap();
    let error = half.forward(&batch, &mut state).unwrap_err().to_string();
    assert!(error.ends_with("kept as it keeps them, got those of another decoder"), "{error}");
    // Nothing has happened to it.
    mixtral.forward(&batch, &mut state).unwrap();
    // Memory of passes that keep nothing is anybody's.
    let mut state = mixtral.batch_state();
    let first = values(&mixtral.forward(&batch, &mut state).unwrap());
    half.forward(&batch, &mut state).unwrap();
    assert_eq!(values(&mixtral.forward(&batch, &mut state).unwrap()), first);
}

#[test]
fn logits_are_the_same_bits_on_any_number_of_threads() {
    let decoder = Decoder::load(&Weights::open(&root("models/tiny-moe")).unwrap(), &LoadOptions::default()).unwrap();
    let count = decoder.spec().max_positions - 4;
    let ids = ids(&decoder, count + 4);
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut state = decoder.generation_state();
            let mut all = values(&decoder.forward(&Batch::new(&[&ids[..count]]).unwrap(), &mut state).unwrap());
            for id in &ids[count..] {
                all.extend(values(&decoder.forward(&Batch::new(&[&[*id]]).unwrap(), &mut state).unwrap()));
            }
            all
        })
    };
    let alone = run(1);
    assert!([2, 3, 5].into_iter().all(|threads| run(threads) == alone));
}
