//! A sound configuration of a family with one value replaced by any other: an error, or a specification.
//!
//! Input: a byte that chooses the configuration, one that chooses the value in it, and JSON to put there.

#![no_main]

use libfuzzer_sys::fuzz_target;
use phase_moe::zoo::parse_config;
use serde_json::Value;

const CONFIGS: [&str; 9] = [
    include_str!("../../tests/goldens/zoo/deepseek_v2/config.json"),
    include_str!("../../tests/goldens/zoo/deepseek_v3/config.json"),
    include_str!("../../tests/goldens/zoo/glm4_moe/config.json"),
    include_str!("../../tests/goldens/zoo/gpt_oss/config.json"),
    include_str!("../../tests/goldens/zoo/granitemoe/config.json"),
    include_str!("../../tests/goldens/zoo/mixtral/config.json"),
    include_str!("../../tests/goldens/zoo/phimoe/config.json"),
    include_str!("../../tests/goldens/zoo/qwen2_moe/config.json"),
    include_str!("../../tests/goldens/zoo/qwen3_moe/config.json"),
];

/// Calls `change` on every value within `value` until it says that it has changed one.
fn any(value: &mut Value, change: &mut impl FnMut(&mut Value) -> bool) -> bool {
    let mut one = |value: &mut Value| change(value) || any(value, change);
    match value {
        Value::Object(values) => values.iter_mut().any(|(_, value)| one(value)),
        Value::Array(values) => values.iter_mut().any(one),
        _ => false,
    }
}

fuzz_target!(|data: &[u8]| {
    let [which, at, replacement @ ..] = data else { return };
    let Ok(replacement) = serde_json::from_slice::<Value>(replacement) else { return };
    let mut config: Value = serde_json::from_str(CONFIGS[usize::from(*which) % CONFIGS.len()]).expect("sound JSON");
    let mut left = *at;
    any(&mut config, &mut |value| {
        if left == 0 {
            *value = replacement.clone();
            return true;
        }
        left -= 1;
        false
    });
    if let Ok(spec) = parse_config(&config.to_string(), "config.json") {
        // What follows from it takes no more than counting.
        let _ = (spec.parameters(), spec.active_parameters(), spec.moe_blocks().count());
    }
});
