//! Wrong checkpoints through the binary: exit code 2, nothing on standard output, and one line that names the file, the tensor or
//! key, what was expected and what came. Each case is a sound model of a family with one thing spoilt; `tests/checkpoint.rs` has
//! the library's own errors, `tests/layer.rs` those of hidden states.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A tensor to be written: dtype, shape, bytes.
type Stored = (Dtype, Vec<usize>, Vec<u8>);

/// A model of which one thing can be spoilt before it is written.
struct Spoilt {
    config: Value,
    tensors: BTreeMap<String, Stored>,
}

impl Spoilt {
    fn new(family: &str) -> Self {
        let directory = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("tests/goldens/zoo").join(family);
        let bytes = std::fs::read(directory.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors =
            file.iter().map(|(name, view)| (name.into(), (view.dtype(), view.shape().into(), view.data().into())));
        let config = std::fs::read_to_string(directory.join("config.json")).unwrap();
        Self { config: serde_json::from_str(&config).unwrap(), tensors: tensors.collect() }
    }

    /// The experts of `block`, one by one until now, in two tensors.
    fn stack(&mut self, block: usize, ffn: &str, [gate, up, down]: [&str; 3]) {
        let experts = (0..).take_while(|id| self.tensors.contains_key(&single(block, ffn, *id, up))).count();
        let mut take = |id: usize, part: &str| self.tensors.remove(&single(block, ffn, id, part)).unwrap();
        let (mut inner, mut outer) = (Vec::new(), Vec::new());
        let (mut width, mut hidden) = (0, 0);
        for id in 0..experts {
            for part in [gate, up] {
                let (_, shape, bytes) = take(id, part);
                (width, hidden) = (shape[0], shape[1]);
                inner.extend(bytes);
            }
            outer.extend(take(id, down).2);
        }
        let stack = |name: &str| format!("model.layers.{block}.{ffn}.experts.{name}");
        self.tensors.insert(stack("gate_up_proj"), (Dtype::F32, vec![experts, 2 * width, hidden], inner));
        self.tensors.insert(stack("down_proj"), (Dtype::F32, vec![experts, hidden, width], outer));
    }

    fn tensor(&mut self, name: &str) -> &mut Stored {
        self.tensors.get_mut(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    fn write(&self) -> TempDir {
        let directory = tempfile::tempdir().unwrap();
        write(&directory.path().join("model.safetensors"), self.tensors.iter());
        self.write_config(directory.path());
        directory
    }

    fn write_config(&self, directory: &Path) {
        std::fs::write(directory.join("config.json"), self.config.to_string()).unwrap();
    }
}

fn write<'a>(path: &Path, tensors: impl Iterator<Item = (&'a String, &'a Stored)>) {
    let views =
        tensors.map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn single(block: usize, ffn: &str, expert: usize, part: &str) -> String {
    format!("model.layers.{block}.{ffn}.experts.{expert}.{part}.weight")
}

/// Ways to open a model that look at its experts: headers alone, all in memory, on an expert cache.
const COMMANDS: [&[&str]; 3] = [
    &["inspect"],
    &["logits", "--ids", "1,2", "--out"],
    &["logits", "--expert-cache", "64KiB", "--ids", "1,2", "--out"],
];

/// Runs a command on the model in `directory`; code, standard output, and standard error without the directory's name.
fn run(command: &[&str], directory: &Path) -> (Option<i32>, String, String) {
    let (out, model) = (directory.join("out.safetensors"), directory.to_str().unwrap());
    let mut arguments = command.to_vec();
    if command.contains(&"--out") {
        arguments.push(out.to_str().unwrap());
    }
    arguments.extend(["--model", model]);
    let output = Command::new(env!("CARGO_BIN_EXE_phase-moe")).args(arguments).output().unwrap();
    assert!(!out.exists() || output.status.success(), "{command:?} left a file behind");
    let text = |bytes| String::from_utf8(bytes).unwrap().replace(&format!("{model}/"), "");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// Fails unless each of `commands` ends with code 2 and one line with `expected` in it.
fn assert_refused_by(commands: &[&[&str]], what: &str, directory: &Path, expected: &str) {
    for command in commands {
        let (code, stdout, stderr) = run(command, directory);
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{what}, {command:?}: {stderr}");
        let one_line = stderr.starts_with("phase-moe: ") && stderr.ends_with('\n') && stderr.lines().count() == 1;
        assert!(one_line && stderr.contains(expected), "{what}, {command:?}: expected {expected}\n{stderr}");
    }
}

fn assert_refused(what: &str, model: &Spoilt, expected: &str) {
    assert_refused_by(&COMMANDS, what, model.write().path(), expected);
}

const MIXTRAL: &str = "block_sparse_moe";
const LETTERS: [&str; 3] = ["w1", "w3", "w2"];
const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

#[test]
fn sound_models_are_read() {
    let mut stacked = Spoilt::new("mixtral");
    stacked.stack(0, MIXTRAL, LETTERS);
    let deepseek = Spoilt::new("deepseek_v3");
    for model in [Spoilt::new("mixtral"), stacked, deepseek] {
        let directory = model.write();
        for command in COMMANDS {
            let (code, _, stderr) = run(command, directory.path());
            let warnings = stderr.lines().all(|line| line.starts_with("warning: "));
            assert!(code == Some(0) && warnings, "{command:?}: {stderr}");
        }
    }
}

#[test]
fn a_file_that_is_cut_or_something_else() {
    let spoil = |what: &str, change: &dyn Fn(&mut Vec<u8>), expected: &str| {
        let directory = Spoilt::new("qwen3_moe").write();
        let path = directory.path().join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        change(&mut bytes);
        std::fs::write(&path, bytes).unwrap();
        assert_refused_by(&COMMANDS, what, directory.path(), expected);
    };
    let file = "model.safetensors: expected ";
    let header = format!("{file}a safetensors header ");
    spoil("cut in its data", &|bytes| bytes.truncate(bytes.len() - 1), file);
    spoil("cut in its header", &|bytes| bytes.truncate(300), &header);
    spoil("cut in its first word", &|bytes| bytes.truncate(5), &format!("{header}of at least 8 bytes, got 5 bytes"));
    spoil("longer", &|bytes| bytes.push(0), file);
    for magic in [&b"PK\x03\x04archive/data.pkl"[..], b"\x93NUMPY\x01\x00\x76\x00", b"version https://git-lfs"] {
        spoil("another magic", &|bytes| bytes[..magic.len()].copy_from_slice(magic), &header);
    }
}

/// The model's file with other byte ranges of `tensor` in its header.
fn with_offsets(tensor: &str, change: impl Fn(usize, usize) -> [usize; 2]) -> TempDir {
    let directory = Spoilt::new("mixtral").write();
    let path = directory.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let [start, end] = [0, 1].map(|at| header[tensor]["data_offsets"][at].as_u64().unwrap() as usize);
    header[tensor]["data_offsets"] = json!(change(start, end));
    let header = header.to_string().into_bytes();
    let data = &bytes[8 + length..];
    std::fs::write(&path, [&(header.len() as u64).to_le_bytes(), &header[..], data].concat()).unwrap();
    directory
}

#[test]
fn tensors_that_overlap_or_lie_outside_of_the_file() {
    let up = single(1, MIXTRAL, 3, "w3");
    type Change = fn(usize, usize) -> [usize; 2];
    let cases: [(&str, Change); 4] = [
        ("overlaps the one before", |start, end| [start - 4, end - 4]),
        ("past the end", |start, end| [start, end + 100_000_000]),
        ("backwards", |start, end| [end, start]),
        ("too short", |start, end| [start, end - 4]),
    ];
    for (what, change) in cases {
        for expected in ["model.safetensors: tensor `model.layers.", " to fill the bytes from "] {
            assert_refused_by(&COMMANDS, what, with_offsets(&up, change).path(), expected);
        }
    }
}

#[test]
fn experts_that_are_missing_or_too_many() {
    for (family, block, ffn, parts) in
        [("mixtral", 1, MIXTRAL, LETTERS), ("qwen2_moe", 2, "mlp", PROJECTIONS), ("deepseek_v2", 1, "mlp", PROJECTIONS)]
    {
        for expert in [0, 5] {
            for part in parts {
                let (mut model, name) = (Spoilt::new(family), single(block, ffn, expert, part));
                model.tensors.remove(&name).unwrap();
                let expected = format!("model.safetensors: tensor `{name}`: expected in the checkpoint, got none");
                assert_refused("missing", &model, &expected);
            }
        }
        let mut model = Spoilt::new(family);
        let spare = model.tensor(&single(block, ffn, 0, parts[1])).clone();
        let extra = single(block, ffn, 11, parts[1]);
        model.tensors.insert(extra.clone(), spare);
        let expected = format!("model.safetensors: tensor `{extra}`: expected experts 0 to ");
        assert_refused("too many", &model, &expected);
    }
    let mut model = Spoilt::new("qwen3_moe");
    let spare = model.tensor(&single(1, "mlp", 0, "up_proj")).clone();
    let dense = single(3, "mlp", 0, "up_proj");
    model.tensors.insert(dense.clone(), spare);
    let expected = format!("tensor `{dense}`: expected no experts in block 3 as the configuration says, got one");
    assert_refused("in a dense block", &model, &expected);
}

#[test]
fn what_is_missing_beside_the_experts() {
    let cases = [
        ("mixtral", "model.layers.1.block_sparse_moe.gate.weight"),
        ("qwen2_moe", "model.layers.0.mlp.shared_expert.up_proj.weight"),
        ("qwen2_moe", "model.layers.2.mlp.shared_expert_gate.weight"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("deepseek_v2", "model.layers.1.self_attn.kv_b_proj.weight"),
        ("granitemoe", "model.layers.0.block_sparse_moe.router.layer.weight"),
        ("glm4_moe", "model.layers.0.self_attn.q_proj.bias"),
    ];
    for (family, name) in cases {
        let mut model = Spoilt::new(family);
        model.tensors.remove(name).unwrap();
        let expected = format!("model.safetensors: tensor `{name}`: expected in the checkpoint, got none");
        assert_refused_by(&COMMANDS[1..], family, model.write().path(), &expected);
    }
}

#[test]
fn wrong_shapes_and_dtypes() {
    let name = single(1, MIXTRAL, 2, "w2");
    let mut model = Spoilt::new("mixtral");
    model.tensor(&name).1.reverse();
    let expected = format!("model.safetensors: tensor `{name}`: expected shape [32, 20], got [20, 32]");
    assert_refused("turned", &model, &expected);
    model.tensor(&name).1 = vec![640];
    assert_refused("flat", &model, &format!("tensor `{name}`: expected shape [32, 20], got [640]"));
    model.tensor(&name).1 = vec![1, 32, 20];
    assert_refused("rank 3", &model, &format!("tensor `{name}`: expected shape [32, 20], got [1, 32, 20]"));
    for dtype in [Dtype::I32, Dtype::U32] {
        let mut model = Spoilt::new("mixtral");
        model.tensor(&name).0 = dtype;
        assert_refused("integers", &model, &format!("model.safetensors: tensor `{name}`: expected "));
        assert_refused("integers", &model, &format!("got {dtype:?}"));
    }
    let gate = "model.layers.1.block_sparse_moe.gate.weight";
    let mut model = Spoilt::new("mixtral");
    model.tensor(gate).1 = vec![32, 6];
    let expected = format!("model.safetensors: tensor `{gate}`: expected shape [6, 32], got [32, 6]");
    assert_refused_by(&COMMANDS[1..], "gate", model.write().path(), &expected);
}

#[test]
fn stacks_that_do_not_fit() {
    let stacked = |change: &dyn Fn(&mut Spoilt)| {
        let mut model = Spoilt::new("mixtral");
        model.stack(1, MIXTRAL, LETTERS);
        change(&mut model);
        model
    };
    let [gate_up, down] = ["gate_up_proj", "down_proj"].map(|name| format!("model.layers.1.{MIXTRAL}.experts.{name}"));
    let shapes = format!(
        "model.safetensors: tensors `{gate_up}` and `{down}`: stacked experts: expected [6, 40, 32] and [6, 32, 20], or \
         [6, 32, 40] and [6, 20, 32], got "
    );
    for (what, shape) in [("flat", vec![7680]), ("split", vec![12, 20, 32]), ("matrices", vec![240, 32])] {
        let model = stacked(&|model| model.tensor(&gate_up).1 = shape.clone());
        assert_refused(what, &model, &format!("{shapes}{shape:?} and [6, 32, 20]"));
    }
    // One of the two transposed is neither.
    let model = stacked(&|model| model.tensor(&down).1 = vec![6, 20, 32]);
    assert_refused("half transposed", &model, &format!("{shapes}[6, 40, 32] and [6, 20, 32]"));
    let model = stacked(&|model| model.config["num_local_experts"] = json!(5));
    assert_refused("too many", &model, "expected experts 0 to 4 as the configuration says, got 5");
    let model = stacked(&|model| drop(model.tensors.remove(&down).unwrap()));
    assert_refused(
        "half",
        &model,
        &format!("model.safetensors: tensor `{down}`: expected in the checkpoint, got none"),
    );
    let spare = Spoilt::new("mixtral").tensor(&single(1, MIXTRAL, 4, "w1")).clone();
    let model = stacked(&|model| drop(model.tensors.insert(single(1, MIXTRAL, 4, "w1"), spare.clone())));
    let expected = format!(
        "model.safetensors: tensor `{}`: expected experts one by one or stacked, got it beside `{gate_up}`",
        single(1, MIXTRAL, 4, "w1")
    );
    assert_refused("both", &model, &expected);
    for name in [&gate_up, &down] {
        let model = stacked(&|model| model.tensor(name).0 = Dtype::I32);
        assert_refused("integers", &model, &format!("model.safetensors: tensor `{name}`: expected "));
    }
    let model = stacked(&|model| {
        let spare = model.tensor(&gate_up).clone();
        model.tensors.insert(format!("model.layers.2.{MIXTRAL}.experts.gate_up_proj"), spare);
    });
    assert_refused("a block too many", &model, "expected blocks 0 to 1 as the configuration says, got 2");
}

#[test]
fn configurations_with_missing_null_or_contradictory_keys() {
    let cases = [
        ("mixtral", "num_local_experts", json!(null), "expected a positive integer, got null"),
        ("mixtral", "num_local_experts", json!(-1), "expected a positive integer, got -1"),
        ("mixtral", "num_local_experts", json!(2.5), "expected a positive integer, got 2.5"),
        ("mixtral", "num_experts_per_tok", json!(7), "expected at most num_local_experts 6, got 7"),
        ("mixtral", "num_key_value_heads", json!(3), "expected a divisor of num_attention_heads 4, got 3"),
        ("qwen2_moe", "moe_intermediate_size", json!("12"), "expected a positive integer, got \"12\""),
        ("qwen3_moe", "mlp_only_layers", json!([9]), "expected blocks of num_hidden_layers 4, got 9"),
        ("deepseek_v3", "topk_group", json!(5), "expected at most n_group 4, got 5"),
    ];
    for (family, key, value, expected) in cases {
        let mut model = Spoilt::new(family);
        model.config[key] = value;
        assert_refused(family, &model, &format!("config.json: key `{key}`: {expected}"));
    }
    for key in ["hidden_size", "num_hidden_layers", "vocab_size", "model_type", "num_local_experts"] {
        let mut model = Spoilt::new("mixtral");
        model.config.as_object_mut().unwrap().remove(key).unwrap();
        assert_refused(key, &model, &format!("config.json: key `{key}`: expected "));
        assert_refused(key, &model, "got nothing: the key is missing");
    }
    // Against the tensors.
    let up = single(0, MIXTRAL, 0, "w1");
    for (key, value, expected) in [
        ("num_local_experts", 5, "expected experts 0 to 4 as the configuration says, got 5".to_string()),
        ("num_hidden_layers", 1, "expected blocks 0 to 0 as the configuration says, got 1".to_string()),
        ("intermediate_size", 24, format!("tensor `{up}`: expected shape [24, 32], got [20, 32]")),
    ] {
        let mut model = Spoilt::new("mixtral");
        model.config[key] = json!(value);
        assert_refused(key, &model, &expected);
    }
    for (what, text) in [("empty", ""), ("cut", "{\"model_type\": \"mixt"), ("a list", "[]"), ("null", "null")] {
        let directory = Spoilt::new("mixtral").write();
        std::fs::write(directory.path().join("config.json"), text).unwrap();
        assert_refused_by(&COMMANDS, what, directory.path(), "config.json: ");
    }
}

#[test]
fn shards_that_do_not_match_their_index() {
    let model = Spoilt::new("mixtral");
    let shard = |name: &str| if name.contains("layers.1.") { "two.safetensors" } else { "one.safetensors" };
    let up = single(1, MIXTRAL, 3, "w3");
    let sharded = |change: &dyn Fn(&mut Value, &Path)| {
        let directory = tempfile::tempdir().unwrap();
        model.write_config(directory.path());
        for file in ["one.safetensors", "two.safetensors"] {
            write(&directory.path().join(file), model.tensors.iter().filter(|(name, _)| shard(name) == file));
        }
        let map: BTreeMap<_, _> = model.tensors.keys().map(|name| (name, shard(name))).collect();
        let mut index = json!({ "weight_map": map });
        change(&mut index, directory.path());
        std::fs::write(directory.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        directory
    };
    let sound = sharded(&|_, _| ());
    for command in COMMANDS {
        assert_eq!(run(command, sound.path()).0, Some(0));
    }
    let refused = |what: &str, expected: &str, change: &dyn Fn(&mut Value, &Path)| {
        assert_refused_by(&COMMANDS, what, sharded(change).path(), expected);
    };
    let index = "model.safetensors.index.json: ";
    refused("lost", "two.safetensors: ", &|_, directory| {
        std::fs::remove_file(directory.join("two.safetensors")).unwrap();
    });
    refused("cut", "two.safetensors: expected ", &|_, directory| {
        let path = directory.join("two.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    });
    refused("elsewhere", &format!("{index}tensor `{up}`: expected in one.safetensors, got none"), &|index, _| {
        index["weight_map"][&up] = json!("one.safetensors");
    });
    refused("not named", "one.safetensors: tensor `model.layers.1.", &|index, _| {
        index["weight_map"].as_object_mut().unwrap().retain(|_, shard| shard == "one.safetensors");
    });
    refused("outside", &format!("{index}tensor `{up}`: expected a file name, got "), &|index, _| {
        index["weight_map"][&up] = json!("../two.safetensors");
    });
    refused("no map", &format!("{index}expected an object `weight_map`, got none"), &|index, _| *index = json!({}));
    let twice = |directory: &Path| {
        write(
            &directory.join("two.safetensors"),
            model.tensors.iter().filter(|(name, _)| shard(name) == "two.safetensors" || name.ends_with("norm.weight")),
        );
    };
    refused("twice", "expected in one file, got in two", &|index, directory| {
        index["weight_map"].as_object_mut().unwrap().retain(|name, _| !name.ends_with("norm.weight"));
        twice(directory);
    });
    let decided = sharded(&|_, directory| twice(directory));
    for command in COMMANDS {
        assert_eq!(run(command, decided.path()).0, Some(0), "the index says which of the two");
    }
}
