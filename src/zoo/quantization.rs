//! How a configuration says that its weights are stored: `quantization_config`. Of what it may name, MXFP4 alone is read here.

use serde_json::Value;

use crate::error::{Error, Result};

/// Refuses a configuration whose weights are quantised in a way that is not read.
///
/// # Errors
/// [`Error::Config`] with the method and what to give instead. A text that is no JSON is left to who parses it.
pub(crate) fn check(config: &str, file: &str) -> Result<()> {
    let Ok(config) = crate::checkpoint::json::parse(config) else { return Ok(()) };
    let places = [&config, &config["text_config"], &config["language_config"], &config["llm_config"]];
    let keys = ["quantization_config", "compression_config"];
    let said = places.into_iter().flat_map(|place| keys.map(|key| (key, &place[key])));
    let is_said = |value: &Value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::Object(map) => !map.is_empty(),
        _ => true,
    };
    let Some((key, quantization)) = said.into_iter().find(|(_, value)| is_said(value)) else { return Ok(()) };
    let method = quantization["quant_method"].as_str().or_else(|| quantization["quant_algo"].as_str());
    if method.is_some_and(|method| method.eq_ignore_ascii_case("mxfp4")) {
        return Ok(());
    }
    let wrong = |detail: String| Err(Error::Config { file: file.into(), detail: format!("`{key}`: {detail}") });
    if !quantization.is_object() {
        return wrong(format!("expected an object, got {quantization}"));
    }
    let bits = ["bits", "w_bit", "nbits", "weight_bits"].into_iter().find_map(|key| quantization[key].as_u64());
    let bits = bits.or_else(|| {
        let is_on = |(key, bits)| quantization[key].as_bool().unwrap_or(false).then_some(bits);
        [("load_in_4bit", 4), ("_load_in_4bit", 4), ("load_in_8bit", 8), ("_load_in_8bit", 8)]
            .into_iter()
            .find_map(is_on)
    });
    let format =
        ["format", "fmt", "checkpoint_format", "weights"].into_iter().find_map(|key| quantization[key].as_str());
    let details = [bits.map(|bits| format!("{bits} bits")), format.map(str::to_owned)];
    let details: Vec<String> = details.into_iter().flatten().collect();
    let details = if details.is_empty() { String::new() } else { format!(" ({})", details.join(", ")) };
    let method = method.unwrap_or("a method without a name");
    wrong(format!(
        "expected weights in f32, bf16, f16 or mxfp4, got {method}{details}: give the model before it was quantised, or a GGUF file"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_read_is_named() {
        let message = |config: &str| check(config, "config.json").err().map(|error| error.to_string());
        for (config, expected) in [
            (r#"{"quantization_config": {"quant_method": "gptq", "bits": 4}}"#, Some("got gptq (4 bits): give")),
            (
                r#"{"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemm"}}"#,
                Some("got awq (4 bits)"),
            ),
            (r#"{"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}"#, Some("got fp8 (e4m3)")),
            (
                r#"{"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true}}"#,
                Some("got bitsandbytes (4 bits)"),
            ),
            (
                r#"{"text_config": {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}}"#,
                Some("got compressed-tensors (pack-quantized)"),
            ),
            (r#"{"quantization_config": {"bits": 8}}"#, Some("got a method without a name (8 bits)")),
            (r#"{"quantization_config": 4}"#, Some("expected an object, got 4")),
            (r#"{"quantization_config": {"quant_method": "mxfp4"}}"#, None),
            (r#"{"quantization_config": null}"#, None),
            (r#"{"quantization_config": {}}"#, None),
            ("{}", None),
            ("[1]", None),
            ("no JSON", None),
        ] {
            let got = message(config);
            assert_eq!(got.is_some(), expected.is_some(), "{config}: {got:?}");
            let got = got.unwrap_or_default();
            assert!(got.contains(expected.unwrap_or_default()), "{config}: {got}");
        }
    }
}
