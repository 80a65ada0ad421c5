//! A checkpoint of 60 GB is opened and inspected by its headers alone: as long files as Qwen3-30B-A3B has, without their data.
#![cfg(target_os = "linux")]

#[path = "../../examples/true_shape/shape.rs"]
mod shape;

use std::process::Command;

use phase_moe::Weights;
use serde_json::Value;
use shape::Shape;

/// Bytes that this process has read from files.
fn bytes_read() -> u64 {
    let text = std::fs::read_to_string("/proc/self/io").unwrap();
    text.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
}

#[test]
fn a_checkpoint_of_60_gb_is_inspected_by_its_headers() {
    let directory = tempfile::tempdir().unwrap();
    let shape = Shape::named("qwen3-30b").unwrap();
    let [layers, words] = shape.size();
    shape.cut(layers, words).write(directory.path(), false).unwrap();
    let files = || std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap());
    let lengths = |shards: bool| -> u64 {
        let of = |entry: &std::fs::DirEntry| {
            entry.path().extension().is_some_and(|ending| ending == "safetensors") == shards
        };
        files().filter(of).map(|entry| entry.metadata().unwrap().len()).sum()
    };
    assert!(lengths(true) > 60_000_000_000, "{}", lengths(true));
    let headers: u64 = files()
        .filter(|entry| entry.path().extension().is_some_and(|ending| ending == "safetensors"))
        .map(|entry| {
            let mut length = [0; 8];
            std::io::Read::read_exact(&mut std::fs::File::open(entry.path()).unwrap(), &mut length).unwrap();
            8 + u64::from_le_bytes(length)
        })
        .sum();

    let before = bytes_read();
    let model = Weights::open(directory.path()).unwrap();
    let (spec, store) = (model.spec().unwrap(), model.expert_store().unwrap());
    let read = bytes_read() - before;
    assert_eq!((spec.layers, spec.moe.experts, store.slab_bytes(47) > 0), (48, 128, true));
    // The headers, the index, the configuration, and what else the process reads of itself.
    assert!(read <= headers + lengths(false) + 100_000, "{read} bytes read, headers have {headers}");
    assert!(headers + lengths(false) < 6_000_000);

    let mut command = Command::new(env!("CARGO_BIN_EXE_phase-moe"));
    let output = command.args(["inspect", "--json", "--model"]).arg(directory.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    let experts = 48 * 128 * 3 * 2048 * 768 * 2u64;
    assert_eq!(told["expert_bytes"], experts);
    assert_eq!(told["bytes_per_expert"], experts / 48 / 128);
    assert_eq!(
        (&told["family"], &told["dtype"], &told["experts"], &told["top_k"]),
        (&"qwen3_moe".into(), &"bf16".into(), &128.into(), &8.into())
    );
    assert!(told["parameters"].as_u64().is_some_and(|all| all / 1_000_000 == 30_532), "{told}");
    assert!(told["active_parameters"].as_u64().is_some_and(|active| active / 1_000_000 == 3_353), "{told}");
}
