//! Architectures of which some blocks keep a recurrent state in place of keys and values: which blocks those are, and their sizes.
//!
//! llama.cpp: `conversion/lfm2.py`, `conversion/qwen.py`, `src/models/{lfm2moe,qwen3next,qwen35moe}.cpp`.

use serde_json::{Map, Value, json};

use super::Architecture;
use crate::checkpoint::metadata;
use crate::error::Result;
use crate::zoo::qwen3_next::{APART, TILED, WHOLE_NORMS};

impl Architecture<'_> {
    /// LFM2-MoE's own keys. Its weights are always normalised, and there is always a bias for selection.
    pub(super) fn short_convolutions(
        &self,
        config: &mut Map<String, Value>,
        experts: usize,
        width: Option<usize>,
    ) -> Result<()> {
        self.expect_sigmoid()?;
        let (kv_heads, attends) = self.kv_heads()?;
        let set = [
            ("model_type", json!("lfm2_moe")),
            ("num_experts", json!(experts)),
            ("moe_intermediate_size", json!(width)),
            ("num_dense_layers", json!(self.count("leading_dense_block_count")?.unwrap_or(0))),
            ("norm_eps", json!(config.get("rms_norm_eps"))),
            ("num_key_value_heads", json!(kv_heads)),
            ("layer_types", kinds(&attends, "conv")),
            ("conv_L_cache", json!(self.required("shortconv.l_cache")?)),
        ];
        config.extend(set.map(|(key, value)| (key.to_owned(), value)));
        Ok(())
    }

    /// Heads of keys and values, and which blocks have any.
    fn kv_heads(&self) -> Result<(Option<usize>, Vec<bool>)> {
        const NAME: &str = "attention.head_count_kv";
        let blocks = self.blocks()?;
        let Some(metadata::Value::Integers(list)) = self.metadata.get(&self.key(NAME)) else {
            let heads = self.count(NAME)?;
            return Ok((heads, vec![heads != Some(0); blocks]));
        };
        let heads = list.iter().copied().find(|&heads| heads != 0).unwrap_or(0);
        let known = u32::try_from(heads).ok().filter(|_| list.iter().all(|&other| other == 0 || other == heads));
        match known {
            Some(heads) if list.len() == blocks => {
                let heads = Some(heads as usize).filter(|&heads| heads > 0);
                Ok((heads, list.iter().map(|&heads| heads != 0).collect()))
            }
            _ => {
                let expected = format!(
                    "a number for each of {blocks} blocks, the same in all that have attention and 0 in others"
                );
                Err(self.metadata.error(&self.key(NAME), &expected, &shown(list)))
            }
        }
    }

    /// Qwen3-Next's and Qwen3.5-MoE's own keys. Weights are always normalised.
    pub(super) fn delta_nets(
        &self,
        config: &mut Map<String, Value>,
        experts: usize,
        width: Option<usize>,
    ) -> Result<()> {
        let is_next = self.architecture == "qwen3next";
        if !is_next {
            self.check_sections()?;
        }
        let shared = self.count("expert_shared_feed_forward_length")?.filter(|&width| width > 0);
        let shared = shared.or(self.count("feed_forward_length")?);
        let [inner, value_heads] = [self.required("ssm.inner_size")?, self.required("ssm.time_step_rank")?];
        if value_heads == 0 || !inner.is_multiple_of(value_heads) {
            let expected = format!("a multiple of {} {value_heads}", self.key("ssm.time_step_rank"));
            return Err(self.metadata.error(&self.key("ssm.inner_size"), &expected, &inner.to_string()));
        }
        let set = [
            ("model_type", json!(if is_next { "qwen3_next" } else { "qwen3_5_moe" })),
            ("num_experts", json!(experts)),
            ("moe_intermediate_size", json!(width)),
            ("shared_expert_intermediate_size", json!(shared)),
            ("norm_topk_prob", json!(true)),
            ("head_dim", json!(self.head()?)),
            ("partial_rotary_factor", json!(self.rotated_share()?)),
            ("layer_types", kinds(&self.attends()?, "linear_attention")),
            ("linear_num_key_heads", json!(self.required("ssm.group_count")?)),
            ("linear_num_value_heads", json!(value_heads)),
            ("linear_key_head_dim", json!(self.required("ssm.state_size")?)),
            ("linear_value_head_dim", json!(inner / value_heads)),
            ("linear_conv_kernel_dim", json!(self.required("ssm.conv_kernel")?)),
            // Older files have one tensor as it was.
            (APART, json!(!self.checkpoint.tensors().keys().any(|name| name.ends_with(".ssm_in.weight")))),
            (TILED, json!(!is_next)),
            (WHOLE_NORMS, json!(true)),
        ];
        config.extend(set.map(|(key, value)| (key.to_owned(), value)));
        Ok(())
    }

    /// Which blocks have attention: those that a list says, else every fourth or each so many-th.
    fn attends(&self) -> Result<Vec<bool>> {
        const LIST: &str = "attention.recurrent_layers";
        const INTERVAL: &str = "full_attention_interval";
        let (blocks, all) = (self.blocks()?, self.required("block_count")?);
        if let Some(list) = self.metadata.integers(&self.key(LIST))? {
            if list.len() != all {
                let expected = format!("one for each of {all} blocks");
                return Err(self.metadata.error(&self.key(LIST), &expected, &list.len().to_string()));
            }
            return Ok(list[..blocks].iter().map(|&recurrent| recurrent == 0).collect());
        }
        let interval = self.count(INTERVAL)?.unwrap_or(4);
        if interval == 0 {
            return Err(self.metadata.error(&self.key(INTERVAL), "at least 1", "0"));
        }
        Ok((1..=blocks).map(|block| block.is_multiple_of(interval)).collect())
    }

    /// Checks that every pair is rotated by one of the three kinds of positions that are the same number in a text: by a fourth, which is 0
    /// there, it would not be rotated at all.
    fn check_sections(&self) -> Result<()> {
        let key = self.key("rope.dimension_sections");
        let Some(sections) = self.metadata.integers(&key)? else {
            return Err(self.metadata.error(&key, "a list of integers", "nothing: the key is missing"));
        };
        // Before anything counts its pairs.
        self.rotated_share()?;
        let rotated = self.count("rope.dimension_count")?.unwrap_or(self.head()?);
        let pair_has = |pair: usize| sections.get(pair % 3).is_some_and(|&section| ((pair / 3) as i64) < section);
        if (0..rotated / 2).all(pair_has) {
            return Ok(());
        }
        let expected = format!("three kinds of positions in turns over {} pairs", rotated / 2);
        Err(self.metadata.error(&key, &expected, &shown(sections)))
    }
}

/// A list in an error, which is one line of some length.
fn shown(list: &[i64]) -> String {
    if list.len() > 8 { format!("{} integers", list.len()) } else { format!("{list:?}") }
}

/// `layer_types` of blocks with attention and of others.
fn kinds(attends: &[bool], other: &str) -> Value {
    attends.iter().map(|&attends| if attends { "full_attention" } else { other }).collect()
}
