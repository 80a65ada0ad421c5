//! Mixers with a recurrent state as Candle's operations: their backward pass, and dtypes of half the width.

use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};

use crate::decoder::var_builder;
use crate::{Batch, Decoder, ModelSpec, Weights};

const FAMILIES: [&str; 4] = ["lfm2_moe_bias", "qwen3_next", "qwen3_next_uneven", "qwen3_5_moe"];

fn files(family: &str) -> Weights {
    Weights::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/zoo").join(family)).unwrap()
}

/// Numbers that all logits of a padded batch have a part in.
fn loss(decoder: &Decoder) -> Tensor {
    let batch = Batch::new(&[&[3, 14, 15, 9, 2, 6], &[5, 3, 5]]).unwrap();
    let logits = decoder.forward(&batch, &mut decoder.batch_state()).unwrap();
    (logits.narrow(0, 1, 1).unwrap().narrow(1, 0, 3).unwrap().sqr().unwrap().mean_all().unwrap()
        + logits.narrow(0, 0, 1).unwrap().sqr().unwrap().mean_all().unwrap())
    .unwrap()
}

/// The decoder of a family's fixture, its weights as variables.
fn trained(family: &str) -> (ModelSpec, VarMap) {
    let files = files(family);
    let spec = files.spec().unwrap().clone();
    let map = VarMap::new();
    Decoder::new(&spec, VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu)).unwrap();
    let stored = var_builder(&files, DType::F32, &Device::Cpu);
    for (name, var) in map.data().lock().unwrap().iter() {
        var.set(&stored.get(var.shape(), name).unwrap()).unwrap();
    }
    (spec, map)
}

#[test]
fn gradients_reach_all_weights_and_are_those_of_differences() {
    // The experts of the last one are stacked in its file, where variables are one by one.
    for family in &FAMILIES[..3] {
        let (spec, map) = trained(family);
        let decoder = Decoder::new(&spec, VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu)).unwrap();
        let gradients = loss(&decoder).backward().unwrap();
        let variables: Vec<(String, Var)> =
            map.data().lock().unwrap().iter().map(|(name, var)| (name.clone(), var.clone())).collect();
        let mut compared = 0;
        for (name, var) in &variables {
            // Of experts only those that some token got have one, and what counts for selection alone has none.
            let rare = name.contains(".experts.") || name.ends_with("expert_bias");
            let Some(gradient) = gradients.get(var) else {
                assert!(rare, "{family}: no gradient of {name}");
                continue;
            };
            if rare
                || !["conv", "linear_attn", "operator_norm", "input_layernorm"].iter().any(|part| name.contains(part))
            {
                continue;
            }
            // Along the gradient the loss grows by the square of its length.
            let length = gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            assert!(length.is_finite(), "{family}, {name}: a gradient that is no number");
            let start = var.as_tensor().copy().unwrap();
            let size = start.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            let at = |by: f32| {
                var.set(&(&start + (gradient * f64::from(by)).unwrap()).unwrap()).unwrap();
                f64::from(loss(&decoder).to_scalar::<f32>().unwrap())
            };
            // A long step is bent, or sends a token elsewhere; a short one has noise.
            let expected = f64::from(length * length);
            let offs = [1e-3, 3e-4, 1e-4, 3e-5].map(|share| {
                let step = share * size.max(0.1) / length.max(1e-6);
                let got = (at(step) - at(-step)) / f64::from(2.0 * step);
                (got - expected).abs() / expected.max(1e-6)
            });
            var.set(&start).unwrap();
            let off = offs.into_iter().fold(f64::INFINITY, f64::min);
            assert!(off < 0.05, "{family}, {name}: off by {offs:?} of {expected}");
            compared += 1;
        }
        assert!(compared > 8, "{family}: {compared} compared");
    }
}

#[test]
fn half_precision_is_near() {
    for family in FAMILIES {
        let files = files(family);
        let of = |dtype: DType| {
            let vb = var_builder(&files, dtype, &Device::Cpu);
            let decoder = Decoder::new(files.spec().unwrap(), vb).unwrap();
            f64::from(loss(&decoder).to_dtype(DType::F32).unwrap().to_scalar::<f32>().unwrap())
        };
        let exact = of(DType::F32);
        for dtype in [DType::BF16, DType::F16] {
            let off = (of(dtype) - exact).abs() / exact;
            assert!(off < 0.25, "{family} in {dtype:?}: off by {off} of {exact}");
        }
    }
}
