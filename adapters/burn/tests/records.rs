//! What is saved comes back: configurations as JSON, weights as Burn's records.

mod common;

use burn::config::Config;
use burn::module::Module;
use burn::store::ModuleRecord;
use burn::tensor::{DType, Device, Tensor};
use common::{Numbers, filled, numbers};
use phase_moe::experts::Function;
use phase_moe::{Activation, Placement, Scoring, SharedExperts};
use phase_moe_burn::{CapacityRule, MoeConfig, MoeSpec, RouterKind};

fn config() -> MoeConfig {
    let spec = MoeSpec {
        activation: Activation { function: Function::ClampedSilu { alpha: 1.702, limit: 7.0 }, gated: true },
        expert_bias: true,
        gate_bias: true,
        selection_bias: true,
        shared: Some(SharedExperts { width: 6, gated: true }),
        scoring: Scoring::sigmoid().normalized(true),
        ..MoeSpec::new(12, 4, 2, 8).unwrap()
    };
    let placement = Placement::new(vec![0, 1, 1, 0], 2).unwrap();
    MoeConfig::of(spec).with_router(RouterKind::Phase).with_capacity(CapacityRule::placed(
        1.0,
        placement,
        vec![1.0, 1.0],
    ))
}

#[test]
fn a_configuration_comes_back_from_its_file() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("moe.json");
    config().save(&file).unwrap();
    assert_eq!(MoeConfig::load(&file).unwrap(), config());
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains("\"phase\"") && text.contains("\"device_of\""), "{text}");
    // A placement is checked on its way in.
    let wrong = text.replace("\"devices\": 2", "\"devices\": 1").replace("\"devices\":2", "\"devices\":1");
    assert_ne!(wrong, text);
    std::fs::write(&file, wrong).unwrap();
    let error = MoeConfig::load(&file).unwrap_err().to_string();
    assert!(error.contains("device of an expert"), "{error}");
}

/// A model's configuration that has a layer's in it.
#[derive(Config, Debug)]
struct ModelConfig {
    moe: MoeConfig,
    #[config(default = 2)]
    layers: usize,
}

#[test]
fn a_configuration_is_a_part_of_others() {
    let model = ModelConfig::new(config()).with_layers(3);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("model.json");
    model.save(&file).unwrap();
    let loaded = ModelConfig::load(&file).unwrap();
    assert_eq!((loaded.moe, loaded.layers), (config(), 3));
}

#[test]
fn weights_come_back_from_a_record() {
    let device = Device::flex();
    let mut saved = filled(config().init(&device), 5, 0.5, DType::F32);
    saved.set_selection_bias(&[0.5, 0.0, -0.5, 0.25]).unwrap();
    let hidden: Tensor<3> = Numbers(6).tensor([2, 9, 12], &device);
    let expected = numbers(saved.forward(hidden.clone()));

    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("moe.bpk");
    saved.into_record().save(&file).unwrap();
    let loaded = config().init(&device);
    assert_ne!(numbers(loaded.forward(hidden.clone())), expected);
    let loaded = loaded.load_record(ModuleRecord::load(&file).unwrap());
    assert_eq!(numbers(loaded.forward(hidden.clone())), expected);
    // What it was set to is its configuration's, not the record's.
    assert_eq!(loaded.spec(), &config().spec);

    // Trained on, it is the same still.
    let trained = loaded.train().valid();
    assert_eq!(numbers(trained.forward(hidden)), expected);
}
