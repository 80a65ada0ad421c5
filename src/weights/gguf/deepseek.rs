//! DeepSeek's architecture, whose files are of two families and of two ways to name the widths of heads.

use serde_json::{Map, Value, json};

use super::{Architecture, SIGMOID};
use crate::error::Result;

impl Architecture<'_> {
    /// DeepSeek's own keys; weights are normalised where the file says so.
    pub(super) fn deepseek(
        &self,
        config: &mut Map<String, Value>,
        experts: usize,
        width: Option<usize>,
        norm: bool,
    ) -> Result<()> {
        let biased = self.checkpoint.tensors().keys().any(|name| name.contains(".exp_probs_b"));
        let sigmoid = match self.count("expert_gating_func")?.filter(|&function| function != 0) {
            Some(function @ 1..=SIGMOID) => function == SIGMOID,
            Some(other) => {
                let expected = "1 (softmax) or 2 (sigmoid)";
                return Err(self.metadata.error(&self.key("expert_gating_func"), expected, &other.to_string()));
            }
            // As llama.cpp has it: files of GLM-4.7-Flash from before it wrote the key.
            None => {
                let sizes = (self.blocks()?, self.checkpoint.entry("token_embd.weight")?.shape[0]);
                matches!(sizes, (47 | 48, 154_880))
            }
        };
        // transformers has no softmax beside a bias, and no model has.
        if biased && !sigmoid {
            let expected = "2 (sigmoid) beside biases for selection";
            return Err(self.metadata.error(
                &self.key("expert_gating_func"),
                expected,
                "softmax, or nothing, which is the same",
            ));
        }
        let groups = self.groups()?;
        let rotated = self.required("rope.dimension_count")?;
        // Newer files say how wide heads are before keys and values are left in the narrow vector, older ones have nothing else.
        let either = |new: &str, old: &str| match self.count(new)? {
            Some(width) => Ok(width),
            None => self.required(old),
        };
        let key = either("attention.key_length_mla", "attention.key_length")?;
        let Some(unrotated) = key.checked_sub(rotated).filter(|&width| width > 0) else {
            let (name, expected) = (self.key("attention.key_length_mla"), format!("more than the rotated {rotated}"));
            return Err(self.metadata.error(&name, &expected, &key.to_string()));
        };
        let scale = self.number("expert_weights_scale")?.filter(|&scale| scale != 0.0);
        let set = [
            ("model_type", json!(if sigmoid { "deepseek_v3" } else { "deepseek_v2" })),
            ("num_key_value_heads", Value::Null),
            ("n_routed_experts", json!(experts)),
            ("moe_intermediate_size", json!(width)),
            ("n_shared_experts", json!(self.required("expert_shared_count")?)),
            ("routed_scaling_factor", json!(scale)),
            ("norm_topk_prob", json!(norm)),
            ("n_group", json!(groups.0)),
            ("topk_group", json!(groups.1)),
            (
                "topk_method",
                json!(match (sigmoid, groups) {
                    (true, _) => "noaux_tc",
                    (false, (2.., _)) => "group_limited_greedy",
                    (false, _) => "greedy",
                }),
            ),
            ("first_k_dense_replace", json!(self.count("leading_dense_block_count")?)),
            ("q_lora_rank", json!(self.count("attention.q_lora_rank")?.filter(|&rank| rank > 0))),
            ("kv_lora_rank", json!(self.required("attention.kv_lora_rank")?)),
            ("qk_nope_head_dim", json!(unrotated)),
            ("qk_rope_head_dim", json!(rotated)),
            ("v_head_dim", json!(either("attention.value_length_mla", "attention.value_length")?)),
        ];
        config.extend(set.map(|(key, value)| (key.to_owned(), value)));
        Ok(())
    }
}
