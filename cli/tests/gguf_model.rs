//! Models written to GGUF files here, by Candle's own writer: every type of weights against the same numbers in safetensors, and the
//! bundled model with its tokenizer.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use phase_moe::checkpoint::{NamedTensor, tensor_bytes};
use phase_moe::{Batch, CacheOptions, Decoder, LoadOptions, Model, Weights};
use serde_json::json;

const IDS: [u32; 9] = [0, 60, 5, 17, 5, 5, 42, 31, 3];

fn stack(block: usize, part: &str) -> String {
    format!("blk.{block}.ffn_{part}_exps.weight")
}

/// In files from before experts were stacked.
fn single(block: usize, part: &str, expert: usize) -> String {
    format!("blk.{block}.ffn_{part}.{expert}.weight")
}

/// Numbers that are the same in every run.
fn drawn(seed: usize, shape: &[usize]) -> Tensor {
    let size = (shape.last().unwrap() * 2) as f32;
    let count: usize = shape.iter().product();
    let number =
        |at: usize| (((seed * 7919 + at * 104_729 + at / 11) % 2003) as f32 / 1001.5 - 1.0) / size.sqrt() * 2.4;
    Tensor::from_vec((0..count).map(number).collect(), shape, &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn logits(decoder: &Decoder, ids: &[u32]) -> Vec<f32> {
    values(&decoder.forward(&Batch::new(&[ids]).unwrap(), &mut decoder.batch_state()).unwrap())
}

fn write(path: &Path, metadata: &[(&str, Value)], tensors: &[(String, QTensor)]) {
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut std::fs::File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

const HIDDEN: usize = 256;
const WIDTH: usize = 256;
const EXPERTS: usize = 4;

/// How the experts of a layer lie.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    /// A tensor for each of their parts.
    Stacked,
    /// Gate and up projection in one.
    Joined,
    /// A tensor for each part of each expert, as in old files.
    Single,
}

/// A model whose experts are of one type and whose other matrices are of another, as a GGUF file; and as safetensors, the same
/// numbers in `f32`.
fn two_forms(directory: &Path, experts: fn(usize, &str) -> GgmlDType, others: GgmlDType, form: Form) {
    let (mut stored, mut plain, mut plain_parts) = (Vec::new(), Vec::new(), Vec::new());
    let mut add = |name: String, plain_names: Vec<String>, tensor: Tensor, dtype: GgmlDType| {
        let tensor = QTensor::quantize(&tensor, dtype).unwrap();
        let numbers = tensor.dequantize(&Device::Cpu).unwrap();
        for (index, plain_name) in plain_names.iter().enumerate() {
            let part = if numbers.rank() == 3 { numbers.get(index).unwrap() } else { numbers.clone() };
            plain.push(NamedTensor::f32(plain_name, part.dims(), &values(&part)));
        }
        stored.push((name, tensor));
    };
    add("token_embd.weight".into(), vec!["model.embed_tokens.weight".into()], drawn(1, &[61, HIDDEN]), others);
    add("output.weight".into(), vec!["lm_head.weight".into()], drawn(2, &[61, HIDDEN]), others);
    let ones = |width: usize| Tensor::ones(width, DType::F32, &Device::Cpu).unwrap();
    add("output_norm.weight".into(), vec!["model.norm.weight".into()], ones(HIDDEN), GgmlDType::F32);
    for block in 0..2 {
        let matrices = [
            ("attn_q", "self_attn.q_proj", [128, HIDDEN]),
            ("attn_k", "self_attn.k_proj", [64, HIDDEN]),
            ("attn_v", "self_attn.v_proj", [64, HIDDEN]),
            ("ffn_gate_inp", "mlp.gate", [EXPERTS, HIDDEN]),
        ];
        for (seed, (name, plain_name, shape)) in matrices.into_iter().enumerate() {
            // llama.cpp leaves gates in f32.
            let dtype = if name == "ffn_gate_inp" { GgmlDType::F32 } else { others };
            let plain_name = format!("model.layers.{block}.{plain_name}.weight");
            add(format!("blk.{block}.{name}.weight"), vec![plain_name], drawn(10 * block + seed, &shape), dtype);
        }
        // Rows of 128: too short for blocks of 256.
        let plain_name = format!("model.layers.{block}.self_attn.o_proj.weight");
        add(
            format!("blk.{block}.attn_output.weight"),
            vec![plain_name],
            drawn(5 + block, &[HIDDEN, 128]),
            GgmlDType::F16,
        );
        let norms = [
            ("attn_norm", "input_layernorm", HIDDEN),
            ("ffn_norm", "post_attention_layernorm", HIDDEN),
            ("attn_q_norm", "self_attn.q_norm", 32),
            ("attn_k_norm", "self_attn.k_norm", 32),
        ];
        for (name, plain_name, width) in norms {
            let plain_name = format!("model.layers.{block}.{plain_name}.weight");
            add(format!("blk.{block}.{name}.weight"), vec![plain_name], ones(width), GgmlDType::F32);
        }
        let parts =
            [("gate", [EXPERTS, WIDTH, HIDDEN]), ("up", [EXPERTS, WIDTH, HIDDEN]), ("down", [EXPERTS, HIDDEN, WIDTH])];
        let parts =
            parts.into_iter().enumerate().map(|(seed, (part, shape))| (part, drawn(100 + 10 * block + seed, &shape)));
        let parts: Vec<(&str, Tensor)> = parts.collect();
        let plain_name = |part: &str, id: usize| format!("model.layers.{block}.mlp.experts.{id}.{part}_proj.weight");
        for (part, tensor) in &parts {
            match form {
                Form::Single => {
                    for id in 0..EXPERTS {
                        // Candle quantises all of the storage behind a view.
                        let tensor = tensor.get(id).unwrap().force_contiguous().unwrap();
                        add(single(block, part, id), vec![plain_name(part, id)], tensor, experts(block, part));
                    }
                }
                // Without a name: its numbers are among the plain tensors as parts of their own.
                Form::Joined if *part == "up" => {
                    let both = Tensor::cat(&[&parts[0].1, tensor], 1).unwrap();
                    add(stack(block, "gate_up"), Vec::new(), both, experts(block, part));
                    plain_parts.push((tensor.clone(), block, "up"));
                    plain_parts.push((parts[0].1.clone(), block, "gate"));
                }
                Form::Joined if *part == "gate" => {}
                _ => {
                    let names = (0..EXPERTS).map(|id| plain_name(part, id)).collect();
                    add(stack(block, part), names, tensor.clone(), experts(block, part));
                }
            }
        }
    }
    for (tensor, block, part) in plain_parts {
        let numbers = QTensor::quantize(&tensor, experts(block, part)).unwrap().dequantize(&Device::Cpu).unwrap();
        for id in 0..EXPERTS {
            let name = format!("model.layers.{block}.mlp.experts.{id}.{part}_proj.weight");
            let part = numbers.get(id).unwrap();
            plain.push(NamedTensor::f32(name, part.dims(), &values(&part)));
        }
    }
    let metadata = [
        ("general.architecture", Value::String("qwen3moe".into())),
        ("qwen3moe.block_count", Value::U32(2)),
        ("qwen3moe.context_length", Value::U32(64)),
        ("qwen3moe.embedding_length", Value::U32(HIDDEN as u32)),
        ("qwen3moe.expert_feed_forward_length", Value::U32(WIDTH as u32)),
        ("qwen3moe.attention.head_count", Value::U32(4)),
        ("qwen3moe.attention.head_count_kv", Value::U32(2)),
        ("qwen3moe.attention.key_length", Value::U32(32)),
        ("qwen3moe.attention.value_length", Value::U32(32)),
        ("qwen3moe.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("qwen3moe.rope.freq_base", Value::F32(5000.0)),
        ("qwen3moe.expert_count", Value::U32(EXPERTS as u32)),
        ("qwen3moe.expert_used_count", Value::U32(2)),
    ];
    let config = json!({
        "model_type": "qwen3_moe", "vocab_size": 61, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "num_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": true,
        "moe_intermediate_size": WIDTH, "rms_norm_eps": 1e-5, "rope_theta": 5000.0, "max_position_embeddings": 64,
    });
    write(&directory.join("model.gguf"), &metadata, &stored);
    let plain_directory = directory.join("plain");
    std::fs::create_dir_all(&plain_directory).unwrap();
    std::fs::write(plain_directory.join("model.safetensors"), tensor_bytes(&plain, None).unwrap()).unwrap();
    std::fs::write(plain_directory.join("config.json"), config.to_string()).unwrap();
}

/// Types of `q4_K_M`.
fn four_bits(block: usize, part: &str) -> GgmlDType {
    if (block, part) == (0, "down") { GgmlDType::Q6K } else { GgmlDType::Q4K }
}

/// Another mix in every block.
fn by_block_and_part(block: usize, part: &str) -> GgmlDType {
    match (block, part) {
        (0, "gate") => GgmlDType::Q6K,
        (0, "up") | (1, "down") => GgmlDType::Q4K,
        (1, "gate") => GgmlDType::BF16,
        _ => GgmlDType::Q8_0,
    }
}

/// The share of `right`'s size that `left` is off by.
fn off(left: &[f32], right: &[f32]) -> f32 {
    assert_eq!(left.len(), right.len());
    let size = right.iter().map(|value| value.abs()).fold(0.0, f32::max);
    left.iter().zip(right).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / size
}

#[test]
fn every_type_of_weights_is_the_numbers_it_stands_for() {
    // Activations meet blocks as bytes, those of attention and output weights too.
    type Kind = (fn(usize, &str) -> GgmlDType, GgmlDType, Form, f32);
    let kinds: [Kind; 14] = [
        (|_, _| GgmlDType::F32, GgmlDType::Q4_0, Form::Stacked, 1e-5),
        (|_, _| GgmlDType::F32, GgmlDType::F32, Form::Joined, 1e-5),
        (|_, _| GgmlDType::F16, GgmlDType::F16, Form::Single, 1e-5),
        (|_, _| GgmlDType::BF16, GgmlDType::Q8_0, Form::Stacked, 1e-2),
        (|_, _| GgmlDType::Q8_0, GgmlDType::BF16, Form::Joined, 3e-3),
        (|_, _| GgmlDType::Q4K, GgmlDType::Q6K, Form::Stacked, 1e-2),
        (|_, _| GgmlDType::Q4K, GgmlDType::Q4K, Form::Single, 1e-2),
        (|_, _| GgmlDType::Q6K, GgmlDType::Q5K, Form::Stacked, 1e-2),
        (|_, _| GgmlDType::Q5K, GgmlDType::Q5K, Form::Stacked, 1e-2),
        // As in most files of four bits: some down projections have six.
        (four_bits, GgmlDType::Q4K, Form::Stacked, 1e-2),
        // Gate and up projection of two types, as files of mixed bits have them.
        (|_, part| if part == "gate" { GgmlDType::Q4K } else { GgmlDType::Q6K }, GgmlDType::Q8_0, Form::Stacked, 1e-2),
        (by_block_and_part, GgmlDType::F32, Form::Single, 6e-3),
        (|_, part| if part == "up" { GgmlDType::F32 } else { GgmlDType::Q8_0 }, GgmlDType::F32, Form::Stacked, 6e-3),
        (|_, part| if part == "up" { GgmlDType::F16 } else { GgmlDType::BF16 }, GgmlDType::F32, Form::Stacked, 2e-3),
    ];
    for (dtype, others, form, tolerance) in kinds {
        let experts = [dtype(0, "up"), dtype(0, "down"), dtype(1, "down")];
        let directory = tempfile::tempdir().unwrap();
        two_forms(directory.path(), dtype, others, form);
        let files = Weights::open(directory.path()).unwrap();
        let plain = Weights::open(&directory.path().join("plain")).unwrap();
        assert_eq!(files.spec().unwrap(), plain.spec().unwrap());
        let expected = logits(&Decoder::load(&plain, &LoadOptions::default()).unwrap(), &IDS);
        let ours = logits(&Decoder::load(&files, &LoadOptions::default()).unwrap(), &IDS);
        let error = off(&ours, &expected);
        assert!(error <= tolerance, "{experts:?}: off by {error}");

        let store = files.expert_store().unwrap();
        let slab = store.slab_bytes(0).max(store.slab_bytes(1));
        for room in [1, 2, 2 * EXPERTS] {
            let cache = CacheOptions::new(room * slab).sparing(&store);
            let options = LoadOptions::default().with_expert_cache(cache);
            assert!(logits(&Decoder::load(&files, &options).unwrap(), &IDS) == ours, "{experts:?}: room for {room}");
        }

        // All but the experts in bf16.
        let narrow = LoadOptions::default().with_dtype(DType::BF16);
        let ours = logits(&Decoder::load(&files, &narrow).unwrap(), &IDS);
        let error = off(&ours, &expected);
        assert!(error <= 5e-2, "{experts:?} beside bf16: off by {error}");
        let cache = CacheOptions::new(2 * slab).sparing(&store);
        let options = narrow.with_expert_cache(cache);
        assert!(
            logits(&Decoder::load(&files, &options).unwrap(), &IDS) == ours,
            "{experts:?} beside bf16, from a cache"
        );
    }
}

#[test]
fn experts_that_only_candle_reads_run_on_its_operations_and_not_from_a_cache() {
    let directory = tempfile::tempdir().unwrap();
    two_forms(directory.path(), |_, _| GgmlDType::Q3K, GgmlDType::Q2K, Form::Stacked);
    let files = Weights::open(directory.path()).unwrap();
    let plain = Weights::open(&directory.path().join("plain")).unwrap();
    let expected = logits(&Decoder::load(&plain, &LoadOptions::default()).unwrap(), &IDS);
    let error = off(&logits(&Decoder::load(&files, &LoadOptions::default()).unwrap(), &IDS), &expected);
    assert!(error <= 1e-4, "off by {error}");
    let sizes = files.expert_sizes().unwrap();
    let expert = 3 * (HIDDEN * WIDTH / 256 * 110) as u64;
    assert_eq!((sizes.first, sizes.all, sizes.dtypes), (expert, 2 * EXPERTS as u64 * expert, vec!["q3_K".to_owned()]));
    let options = LoadOptions::default().with_expert_cache(CacheOptions::new(1 << 30));
    let error = Decoder::load(&files, &options).err().unwrap().to_string();
    assert!(
        error
            .ends_with("tensor `blk.0.ffn_gate_exps.weight`: expected dtype q8_0, q4_K, q5_K, q6_K or mxfp4, got q3_K"),
        "{error}"
    );
}

/// The bundled model as a GGUF file, its weights as they are.
fn bundled(path: &Path) {
    bundled_with(path, &[]);
}

/// What llama.cpp calls a tensor of OLMoE (`gguf-py/gguf/tensor_mapping.py`).
fn stored_name(name: &str) -> String {
    const NAMES: [(&str, &str); 13] = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate", "ffn_gate_inp"),
    ];
    NAMES.iter().fold(name.to_owned(), |name, (theirs, stored)| name.replace(theirs, stored))
}

/// The same with more metadata.
fn bundled_with(path: &Path, more: &[(&str, Value)]) {
    let directory = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("models/tiny-moe");
    let files = Weights::open(&directory).unwrap();
    let spec = files.spec().unwrap();
    let config = std::fs::read_to_string(directory.join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    let number = |key: &str| Value::U32(config[key].as_u64().unwrap() as u32);
    let tokenizer: serde_json::Value = serde_json::from_str(&files.beside("tokenizer.json").unwrap().unwrap()).unwrap();
    let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
    let by_id: BTreeMap<u64, &String> = vocab.iter().map(|(token, id)| (id.as_u64().unwrap(), token)).collect();
    let texts = |texts: Vec<String>| Value::Array(texts.into_iter().map(Value::String).collect());
    let merge = |pair: &serde_json::Value| match pair.as_str() {
        Some(pair) => pair.to_owned(),
        None => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
    };
    let mut metadata = vec![
        ("general.architecture", Value::String("olmoe".into())),
        ("olmoe.block_count", number("num_hidden_layers")),
        ("olmoe.context_length", number("max_position_embeddings")),
        ("olmoe.embedding_length", number("hidden_size")),
        ("olmoe.feed_forward_length", number("intermediate_size")),
        ("olmoe.attention.head_count", number("num_attention_heads")),
        ("olmoe.attention.head_count_kv", number("num_key_value_heads")),
        ("olmoe.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("olmoe.rope.freq_base", Value::F32(10_000.0)),
        ("olmoe.expert_count", number("num_experts")),
        ("olmoe.expert_used_count", number("num_experts_per_tok")),
        ("tokenizer.ggml.model", Value::String("gpt2".into())),
        ("tokenizer.ggml.pre", Value::String("gpt-2".into())),
        ("tokenizer.ggml.tokens", texts(by_id.values().map(|token| token.to_string()).collect())),
        (
            "tokenizer.ggml.token_type",
            Value::Array(by_id.keys().map(|&id| Value::I32(if id == 0 { 3 } else { 1 })).collect()),
        ),
        ("tokenizer.ggml.merges", texts(tokenizer["model"]["merges"].as_array().unwrap().iter().map(merge).collect())),
        ("tokenizer.ggml.eos_token_id", Value::U32(0)),
    ];
    metadata.extend_from_slice(more);
    let read = |name: &str| {
        let entry = files.checkpoint().entry(name).unwrap();
        Tensor::from_raw_buffer(&files.checkpoint().read(name).unwrap(), DType::BF16, &entry.shape, &Device::Cpu)
            .unwrap()
    };
    let keep = |tensor: &Tensor| QTensor::quantize(&tensor.to_dtype(DType::F32).unwrap(), GgmlDType::BF16).unwrap();
    let mut tensors = Vec::new();
    for name in files.checkpoint().tensors().keys().filter(|name| !name.contains(".experts.")) {
        tensors.push((stored_name(name), keep(&read(name))));
    }
    for block in 0..spec.layers {
        for part in ["gate", "up", "down"] {
            let name = |id: usize| format!("model.layers.{block}.mlp.experts.{id}.{part}_proj.weight");
            let experts: Vec<Tensor> = (0..spec.moe.experts).map(|id| read(&name(id))).collect();
            tensors.push((stack(block, part), keep(&Tensor::stack(&experts, 0).unwrap())));
        }
    }
    write(path, &metadata, &tensors);
}

#[test]
fn the_bundled_model_is_the_same_bits_and_the_same_tokens_from_a_gguf_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tiny-moe.gguf");
    bundled(&path);
    let plain_directory = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("models/tiny-moe");
    let options = LoadOptions::default().with_dtype(DType::BF16);
    let [plain, ours] = [plain_directory.as_path(), &path].map(|path| Model::load(path, &options).unwrap());
    assert_eq!((plain.name(), plain.decoder().spec()), (ours.name(), ours.decoder().spec()));
    for text in ["scripture.txt", "code.txt", "reference.txt"] {
        let text = std::fs::read_to_string(plain_directory.join("eval").join(text)).unwrap();
        let ids = plain.encode(&text).unwrap();
        assert!(ours.encode(&text).unwrap() == ids);
        assert_eq!(ours.decode_after(&[], &ids[..200]).unwrap(), plain.decode_after(&[], &ids[..200]).unwrap());
        assert!(logits(ours.decoder(), &ids[..100]) == logits(plain.decoder(), &ids[..100]), "other bits");
    }
    assert_eq!(ours.encode("a<|endoftext|>b").unwrap(), plain.encode("a<|endoftext|>b").unwrap());
}

#[test]
fn a_chat_is_written_as_the_template_in_the_file_has_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tiny-moe.gguf");
    let template =
        "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}assistant: ";
    bundled_with(&path, &[("tokenizer.chat_template", Value::String(template.into()))]);
    let run = |model: &Path, arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_phase-moe"));
        command.args(["generate", "--json", "--dtype", "bf16", "--new-tokens", "8", "--model"]).arg(model);
        command.args(arguments).output().unwrap()
    };
    let told = |output: std::process::Output| -> serde_json::Value {
        let errors = String::from_utf8_lossy(&output.stderr);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {errors}"))
    };
    let chat = told(run(&path, &["--chat", "--system", "Be short.", "--prompt", "Who was Moses?"]));
    let written = "system: Be short.<|endoftext|>user: Who was Moses?<|endoftext|>assistant: ";
    let plain = told(run(&path, &["--prompt", written]));
    assert_eq!((&chat["text"], &chat["prompt_tokens"]), (&plain["text"], &plain["prompt_tokens"]));
    bundled(&path);
    let output = run(&path, &["--chat", "--prompt", "Who was Moses?"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && said.contains("or `tokenizer.chat_template` in the file"), "{said}");
}

#[test]
fn every_command_takes_a_gguf_file() {
    let run = |arguments: &[&str]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_phase-moe")).args(arguments).output().unwrap();
        (output.status.code(), output.stdout, String::from_utf8(output.stderr).unwrap())
    };
    let json = |arguments: &[&str]| -> serde_json::Value {
        let (code, out, errors) = run(arguments);
        assert_eq!(code, Some(0), "{arguments:?}: {errors}");
        serde_json::from_slice(&out).unwrap_or_else(|error| panic!("{arguments:?}: {error}"))
    };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tiny-moe.gguf");
    bundled(&path);
    // The file, and the directory that holds it.
    let [file, folder] = [path.as_path(), directory.path()].map(|path| path.to_str().unwrap());
    let (ours, plain) = (json(&["inspect", "--json", "--model", file]), json(&["inspect", "--json"]));
    assert_eq!(ours, plain, "inspect");
    assert_eq!(json(&["inspect", "--json", "--model", folder]), plain);

    let generate = ["generate", "--prompt", "And the LORD said", "--new-tokens", "12", "--dtype", "bf16", "--json"];
    let with = |more: &[&'static str]| [generate.as_slice(), more].concat();
    let expected = json(&with(&[]))["text"].clone();
    for more in [vec![], vec!["--expert-cache", "1MiB"], vec!["--cached-experts", "16"]] {
        let mut arguments = with(&more);
        arguments.extend(["--model", file]);
        assert_eq!(json(&arguments)["text"], expected, "{more:?}");
    }
    let compare =
        ["compare", "--router", "phase", "--capacity-factor", "1", "--tokens", "1024", "--dtype", "bf16", "--json"];
    let perplexity = |more: &[&str]| {
        let report = json(&[compare.as_slice(), more].concat());
        (report["model"].clone(), report["dropless"]["perplexity"].clone(), report["rows"][0]["perplexity"].clone())
    };
    let expected = perplexity(&[]);
    assert_eq!(perplexity(&["--model", file]), expected);
    assert_eq!(perplexity(&["--model", file, "--expert-cache", "4MiB"]), expected);
    json(&["replay", "--tokens", "256", "--model", file, "--json"]);
    json(&["tune", "--tokens", "128", "--cached-experts", "8", "--cache-bonus", "0.1", "--model", file, "--json"]);

    let [out, cached, trace] = ["a", "b", "trace"].map(|name| directory.path().join(format!("{name}.safetensors")));
    let [out, cached, trace] = [&out, &cached, &trace].map(|path| path.to_str().unwrap());
    for (out, more) in [(out, &[][..]), (cached, &["--expert-cache", "1MiB"][..])] {
        let logits = ["logits", "--ids", "1,2,3", "--model", file, "--out", out];
        assert_eq!(run(&[&logits[..], more].concat()).0, Some(0));
    }
    assert!(std::fs::read(out).unwrap() == std::fs::read(cached).unwrap(), "other bits");
    assert_eq!(run(&["trace", "--tokens", "256", "--model", file, "--out", trace]).0, Some(0));

    let fixture = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("tests/goldens/gguf/llama.gguf");
    let (code, _, errors) = run(&["generate", "--model", fixture.to_str().unwrap(), "--prompt", "a"]);
    assert_eq!((code, errors.lines().count()), (Some(2), 1), "{errors}");
    assert!(
        errors.contains("llama.gguf: key `tokenizer.ggml.tokens`: expected tokens, got none: put the model's tokenizer.json beside it"),
        "{errors}"
    );
}

/// A matrix, and how it is stored in a file of mixed types.
type Mixed = (String, Vec<usize>, GgmlDType);

/// Metadata and matrices of a small model with recurrent blocks, `lfm2moe` or `qwen35moe`; what is not here is in [`small_tensors`].
fn recurrent_model(architecture: &str) -> (Vec<(String, Value)>, Vec<Mixed>) {
    let key = |name: &str| format!("{architecture}.{name}");
    let count = |name: &str, value: usize| (key(name), Value::U32(value as u32));
    let mut metadata = vec![
        ("general.architecture".to_owned(), Value::String(architecture.into())),
        count("block_count", 3),
        count("context_length", 64),
        count("embedding_length", HIDDEN),
        count("feed_forward_length", WIDTH),
        count("expert_feed_forward_length", WIDTH),
        count("attention.head_count", 4),
        count("expert_count", EXPERTS),
        count("expert_used_count", 2),
        (key("attention.layer_norm_rms_epsilon"), Value::F32(1e-6)),
        (key("rope.freq_base"), Value::F32(5000.0)),
    ];
    use GgmlDType::{BF16, F32, Q4K, Q6K, Q8_0};
    let mut all: Vec<Mixed> = vec![("token_embd.weight".into(), vec![61, HIDDEN], Q6K)];
    for block in 0..3 {
        let mut add =
            |name: &str, shape: &[usize], dtype| all.push((format!("blk.{block}.{name}"), shape.to_vec(), dtype));
        let attends = block == 1;
        match architecture {
            "lfm2moe" if !attends => {
                add("shortconv.in_proj.weight", &[3 * HIDDEN, HIDDEN], Q4K);
                add("shortconv.out_proj.weight", &[HIDDEN, HIDDEN], Q6K);
                add("shortconv.conv.weight", &[HIDDEN, 3], F32);
            }
            _ if attends => {
                let rows = if architecture == "lfm2moe" { 256 } else { 512 };
                add("attn_q.weight", &[rows, HIDDEN], Q8_0);
                add("attn_k.weight", &[128, HIDDEN], Q4K);
                add("attn_v.weight", &[128, HIDDEN], Q6K);
                add("attn_output.weight", &[HIDDEN, 256], Q4K);
            }
            // 2 key heads and 4 value heads, 64 wide.
            _ => {
                add("attn_qkv.weight", &[512, HIDDEN], Q8_0);
                add("attn_gate.weight", &[256, HIDDEN], Q4K);
                add("ssm_alpha.weight", &[4, HIDDEN], if block == 0 { F32 } else { Q8_0 });
                add("ssm_beta.weight", &[4, HIDDEN], BF16);
                add("ssm_out.weight", &[HIDDEN, 256], Q6K);
                add("ssm_conv1d.weight", &[512, 4], F32);
            }
        }
        add("ffn_gate_inp.weight", &[EXPERTS, HIDDEN], F32);
        add("ffn_gate_exps.weight", &[EXPERTS, WIDTH, HIDDEN], Q4K);
        add("ffn_up_exps.weight", &[EXPERTS, WIDTH, HIDDEN], if block == 2 { Q8_0 } else { Q4K });
        add("ffn_down_exps.weight", &[EXPERTS, HIDDEN, WIDTH], if block == 0 { Q6K } else { Q4K });
        if architecture == "qwen35moe" {
            add("ffn_gate_inp_shexp.weight", &[HIDDEN], F32);
            add("ffn_gate_shexp.weight", &[WIDTH, HIDDEN], Q8_0);
            add("ffn_up_shexp.weight", &[WIDTH, HIDDEN], Q8_0);
            add("ffn_down_shexp.weight", &[HIDDEN, WIDTH], Q6K);
        }
    }
    let list = |values: [i32; 4], length: usize| {
        Value::Array(values[..length].iter().map(|&value| Value::I32(value)).collect())
    };
    match architecture {
        "lfm2moe" => metadata.extend([
            (key("attention.head_count_kv"), list([0, 2, 0, 0], 3)),
            count("shortconv.l_cache", 3),
            count("expert_gating_func", 2),
        ]),
        _ => metadata.extend([
            count("attention.head_count_kv", 2),
            count("attention.key_length", 64),
            count("attention.value_length", 64),
            count("expert_shared_feed_forward_length", WIDTH),
            count("ssm.conv_kernel", 4),
            count("ssm.state_size", 64),
            count("ssm.group_count", 2),
            count("ssm.time_step_rank", 4),
            count("ssm.inner_size", 256),
            count("full_attention_interval", 2),
            count("rope.dimension_count", 32),
            (key("rope.dimension_sections"), list([6, 5, 5, 0], 4)),
        ]),
    }
    (metadata, all)
}

/// Norms, and what else a block has one number of for each channel or head.
fn small_tensors(architecture: &str) -> Vec<(String, Vec<f32>)> {
    let near_one = |seed: usize, width: usize| {
        (0..width).map(|at| 1.0 + ((at * 31 + seed) % 17) as f32 / 40.0).collect::<Vec<_>>()
    };
    let is_lfm2 = architecture == "lfm2moe";
    let last = if is_lfm2 { "token_embd_norm.weight" } else { "output_norm.weight" };
    let mut all = vec![(last.to_owned(), near_one(0, HIDDEN))];
    for block in 0..3 {
        let mut add = |name: &str, numbers: Vec<f32>| all.push((format!("blk.{block}.{name}"), numbers));
        add("attn_norm.weight", near_one(block, HIDDEN));
        add(if is_lfm2 { "ffn_norm.weight" } else { "post_attention_norm.weight" }, near_one(block + 5, HIDDEN));
        if is_lfm2 {
            add("exp_probs_b.bias", vec![0.1, -0.2, 0.0, 0.05]);
        }
        if block == 1 {
            add("attn_q_norm.weight", near_one(3, 64));
            add("attn_k_norm.weight", near_one(4, 64));
        } else if !is_lfm2 {
            add("ssm_a", vec![-0.2, -1.0, -2.5, -0.6]);
            add("ssm_dt.bias", vec![0.5, -0.5, 0.1, 0.0]);
            add("ssm_norm.weight", near_one(6, 64));
        }
    }
    all
}

/// Their numbers beside the same in f32, at once, token by token, and from a cache, which gives the same bits.
#[test]
fn recurrent_blocks_of_mixed_types_are_the_numbers_they_stand_for() {
    for architecture in ["lfm2moe", "qwen35moe"] {
        let (metadata, matrices) = recurrent_model(architecture);
        let metadata: Vec<(&str, Value)> = metadata.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
        let directory = tempfile::tempdir().unwrap();
        let (mut mixed, mut plain) = (Vec::new(), Vec::new());
        for (seed, (name, shape, dtype)) in matrices.into_iter().enumerate() {
            let stored = QTensor::quantize(&drawn(seed, &shape), dtype).unwrap();
            let numbers = stored.dequantize(&Device::Cpu).unwrap();
            plain.push((name.clone(), QTensor::quantize(&numbers, GgmlDType::F32).unwrap()));
            mixed.push((name, stored));
        }
        for (name, numbers) in small_tensors(architecture) {
            let tensor = Tensor::new(numbers, &Device::Cpu).unwrap();
            let stored = || QTensor::quantize(&tensor, GgmlDType::F32).unwrap();
            plain.push((name.clone(), stored()));
            mixed.push((name, stored()));
        }
        let [mixed_path, plain_path] = ["mixed.gguf", "plain.gguf"].map(|name| directory.path().join(name));
        write(&mixed_path, &metadata, &mixed);
        write(&plain_path, &metadata, &plain);
        let (files, plain) = (Weights::open(&mixed_path).unwrap(), Weights::open(&plain_path).unwrap());
        let expected = logits(&Decoder::load(&plain, &LoadOptions::default()).unwrap(), &IDS);
        let decoder = Decoder::load(&files, &LoadOptions::default()).unwrap();
        let ours = logits(&decoder, &IDS);
        let error = off(&ours, &expected);
        assert!(error <= 3e-2, "{architecture}: off by {error}");
        let mut state = decoder.generation_state();
        let steps =
            IDS.iter().flat_map(|&id| values(&decoder.forward(&Batch::new(&[&[id]]).unwrap(), &mut state).unwrap()));
        let error = off(&steps.collect::<Vec<_>>(), &expected);
        assert!(error <= 3e-2, "{architecture} step by step: off by {error}");
        let store = files.expert_store().unwrap();
        let options =
            LoadOptions::default().with_expert_cache(CacheOptions::new(2 * store.slab_bytes(0)).sparing(&store));
        assert!(logits(&Decoder::load(&files, &options).unwrap(), &IDS) == ours, "{architecture}: from a cache");
    }
}
