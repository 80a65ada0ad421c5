//! The models of candle-transformers with the diffs of `docs/swap.md` in them, against the unchanged ones, and where those
//! fail against Hugging Face transformers. Built by `check.sh`, which lays the patched files beside this one.

/// As the guide says, with what nobody uses any more still there.
#[allow(dead_code, unexpected_cfgs)]
mod models {
    pub use candle_transformers::models::with_tracing;
    pub mod deepseek2;
    pub mod mixtral;
    pub mod qwen2_moe;
    pub mod qwen3;
    pub mod qwen3_moe;
}
use candle_transformers::{fused_moe, models as unchanged, utils};

use candle::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use serde_json::{Value, json};

/// A family's tiny checkpoint.
struct Fixture {
    directory: String,
    config: Value,
}

impl Fixture {
    /// With the keys that candle-transformers wants beside those there are, and others.
    fn open(zoo: &str, family: &str, keys: Value) -> Self {
        let directory = format!("{zoo}/{family}");
        let text = std::fs::read_to_string(format!("{directory}/config.json")).unwrap();
        let mut config: Value = serde_json::from_str(&text).unwrap();
        let experts = config.get("num_experts").or(config.get("num_local_experts")).cloned();
        let theta = config["rope_parameters"]["rope_theta"].clone();
        let beside = json!({"rope_theta": theta, "num_experts": experts, "use_flash_attn": false, "max_window_layers": 28});
        for keys in [beside, keys] {
            config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        }
        Self { directory, config }
    }

    fn config<T: serde::de::DeserializeOwned>(&self) -> T {
        serde_json::from_value(self.config.clone()).unwrap()
    }

    fn weights(&self, dtype: DType) -> VarBuilder<'static> {
        let bytes = std::fs::read(format!("{}/model.safetensors", self.directory)).unwrap();
        VarBuilder::from_buffered_safetensors(bytes, dtype, &Device::Cpu).unwrap()
    }

    /// A prompt of the goldens, and transformers' logits for its last token.
    fn golden(&self) -> Result<(Tensor, Tensor)> {
        let goldens = candle::safetensors::load(format!("{}/goldens.safetensors", self.directory), &Device::Cpu)?;
        let logits = &goldens["prompt.1.logits"];
        let ids = goldens["prompt.1.ids"].to_vec1::<i32>()?.into_iter().map(|id| id as u32).collect::<Vec<_>>();
        Ok((Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?, logits.get(logits.dim(0)? - 1)?))
    }
}

/// Says how far two rows of logits are apart, and ends the program where that is too far.
fn compare(what: &str, swapped: Result<Tensor>, other: Result<Tensor>, tolerance: f32) {
    let row = |logits: Result<Tensor>| logits.unwrap().to_dtype(DType::F32).unwrap().flatten_all().unwrap();
    let off = (row(swapped) - row(other)).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    println!("{what}: largest difference {off:.1e}");
    assert!(off <= tolerance, "{what}: expected at most {tolerance}");
}

fn main() -> Result<()> {
    let zoo = std::env::args().nth(1).expect("tests/goldens/zoo");
    let f32 = DType::F32;

    let fixture = Fixture::open(&zoo, "mixtral", json!({"sliding_window": 64}));
    let (ids, golden) = fixture.golden()?;
    let before = unchanged::mixtral::Model::new(&fixture.config(), fixture.weights(f32))?.forward(&ids, 0);
    let swapped = |dtype| models::mixtral::Model::new(&fixture.config(), fixture.weights(dtype))?.forward(&ids, 0);
    compare("mixtral.rs and the unchanged one", swapped(f32), before, 1e-4);
    // What is left is rounding; theirs fails.
    compare("mixtral.rs in bf16 and transformers", swapped(DType::BF16), Ok(golden.clone()), 0.2);
    compare("mixtral.rs in f16 and transformers", swapped(DType::F16), Ok(golden), 0.02);

    // Its blocks 0 and 2, which have experts; output weights are the embedding's.
    let fixture = Fixture::open(&zoo, "qwen2_moe", json!({"num_hidden_layers": 2, "sliding_window": 64}));
    let rename = |name: &str| name.replace("layers.1.", "layers.2.").replace("lm_head", "model.embed_tokens");
    let weights = || fixture.weights(f32).rename_f(rename);
    let (ids, _) = fixture.golden()?;
    let before = unchanged::qwen2_moe::Model::new(&fixture.config(), weights())?.forward(&ids, 0);
    let swapped = models::qwen2_moe::Model::new(&fixture.config(), weights())?.forward(&ids, 0);
    compare("qwen2_moe.rs and the unchanged one", swapped, before, 1e-4);

    let fixture = Fixture::open(&zoo, "qwen3_moe", json!({"num_hidden_layers": 3}));
    let (ids, _) = fixture.golden()?;
    let before = unchanged::qwen3_moe::ModelForCausalLM::new(&fixture.config(), fixture.weights(f32))?.forward(&ids, 0);
    let swapped = models::qwen3_moe::ModelForCausalLM::new(&fixture.config(), fixture.weights(f32))?.forward(&ids, 0);
    compare("qwen3_moe.rs and the unchanged one", swapped, before, 1e-4);

    let fixture = Fixture::open(&zoo, "deepseek_v2", json!({"topk_method": "greedy"}));
    let (ids, _) = fixture.golden()?;
    let before = unchanged::deepseek2::DeepSeekV2::new(&fixture.config(), fixture.weights(f32))?.forward(&ids, 0);
    let swapped = models::deepseek2::DeepSeekV2::new(&fixture.config(), fixture.weights(f32))?.forward(&ids, 0);
    compare("deepseek2.rs and the unchanged one", swapped, before, 1e-4);

    let mut fixture = Fixture::open(&zoo, "deepseek_v2", json!({}));
    let mut scaling = fixture.config["rope_parameters"].clone();
    scaling["type"] = json!("yarn");
    fixture.config["rope_scaling"] = scaling;
    let (ids, golden) = fixture.golden()?;
    let swapped = models::deepseek2::DeepSeekV2::new(&fixture.config(), fixture.weights(f32))?.forward(&ids, 0);
    compare("deepseek2.rs with groups and transformers", swapped, Ok(golden), 1e-4);
    Ok(())
}
