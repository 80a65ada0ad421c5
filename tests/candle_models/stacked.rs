//! Models of candle-transformers, as they are, on checkpoints whose experts are stacked.

use std::sync::Arc;

use candle_core::DType;
use phase_moe::decoder::unstacked_var_builder;
use phase_moe::{ExpertNames, zoo};
use serde_json::json;

use super::*;

/// How a stack lies.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Order {
    Rows,
    Columns,
}

/// The checkpoint in `directory` with all experts of a layer in two tensors, called as `names` says.
fn stacked(directory: &Path, names: &ExpertNames, order: Order) -> TempDir {
    let config = std::fs::read_to_string(directory.join("config.json")).unwrap();
    let spec = zoo::parse_config(&config, "config.json").unwrap();
    let vb = tensors(directory, DType::F32);
    let floats = |name: String, tensor: &Tensor| NamedTensor::f32(name, tensor.dims(), &values(tensor));
    let checkpoint = Checkpoint::open(directory).unwrap();
    let others = checkpoint.tensors().keys().filter(|name| !name.contains(".experts."));
    let mut tensors: Vec<_> = others.map(|name| floats(name.clone(), &vb.get_unchecked(name).unwrap())).collect();
    for block in spec.moe_blocks() {
        let ffn = format!("model.layers.{block}.{}", spec.ffn);
        let stack = |parts: &[&String]| {
            let matrix = |expert: usize| {
                let part = |part| vb.get_unchecked(&format!("{ffn}.experts.{expert}.{part}.weight")).unwrap();
                let rows = Tensor::cat(&parts.iter().map(part).collect::<Vec<_>>(), 0).unwrap();
                if order == Order::Rows { rows } else { rows.t().unwrap() }
            };
            Tensor::stack(&(0..spec.moe.experts).map(matrix).collect::<Vec<_>>(), 0).unwrap()
        };
        tensors.push(floats(format!("{ffn}.{}", names.stacked_gate_up), &stack(&[&names.gate_proj, &names.up_proj])));
        tensors.push(floats(format!("{ffn}.{}", names.stacked_down), &stack(&[&names.down_proj])));
    }
    written(&serde_json::from_str(&config).unwrap(), &tensors)
}

/// Theirs on stacks against theirs on single experts, to the bit, and against ours.
fn compare(directory: &Path, family: &str) {
    let config: Value = serde_json::from_str(&std::fs::read_to_string(directory.join("config.json")).unwrap()).unwrap();
    let names = zoo::parse_moe_config(&config.to_string(), "config.json").unwrap().names;
    let [stacked_gate_up, stacked_down] = ["input_linear.weight", "output_linear.weight"].map(String::from);
    let granite = ExpertNames { stacked_gate_up, stacked_down, ..names.clone() };
    let single = ours(directory, DType::F32);
    for (names, order) in [(&names, Order::Rows), (&names, Order::Columns), (&granite, Order::Rows)] {
        let stacks = stacked(directory, names, order);
        let checkpoint = Arc::new(Checkpoint::open(stacks.path()).unwrap());
        assert!(checkpoint.tensors().keys().all(|name| !name.contains("experts.0.")));
        let builder = || unstacked_var_builder(checkpoint.clone(), names.clone(), DType::F32, &Device::Cpu);
        let build = || theirs(&for_candle(&config), builder()).unwrap();
        assert_same(&single, family, build);
        let ids = Tensor::new(golden(family, 1).0, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let mut before = theirs(&for_candle(&config), tensors(directory, DType::F32)).unwrap();
        assert_eq!(values(&build()(&ids, 0).unwrap()), values(&before(&ids, 0).unwrap()), "{family}, {order:?}");
        // Without it they ask for what is not there.
        let refusal = refusal(&for_candle(&config), tensors(stacks.path(), DType::F32));
        assert!(refusal.contains(&format!(".experts.0.{}.weight", names.gate_proj)), "{refusal}");
    }
}

#[test]
fn mixtral() {
    let config = changed(config("mixtral"), json!({ "sliding_window": 64 }));
    compare(derived("mixtral", &config, |name| vec![name.into()]).path(), "mixtral");
}

#[test]
fn qwen3_moe() {
    let config = changed(config("qwen3_moe"), json!({ "num_hidden_layers": 3, "mlp_only_layers": [] }));
    let keep = |name: &str| if name.starts_with("model.layers.3.") { vec![] } else { vec![name.into()] };
    compare(derived("qwen3_moe", &config, keep).path(), "qwen3_moe");
}

#[test]
fn deepseek_v2() {
    let mut config = changed(config("deepseek_v2"), json!({ "topk_method": "greedy" }));
    config["rope_parameters"] = json!({ "rope_type": "default", "rope_theta": 20.0 });
    compare(derived("deepseek_v2", &config, |name| vec![name.into()]).path(), "deepseek_v2");
}
