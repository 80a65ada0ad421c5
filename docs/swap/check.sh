#!/usr/bin/env bash
# Applies the diffs of docs/swap.md to the files of candle-transformers as Cargo has them, builds them in a crate of their own and
# compares their logits (check.rs). Leaves nothing behind but what Cargo built.
set -euo pipefail
cd "$(dirname "$0")/../.."

manifest=$(cargo metadata --format-version 1 | grep -o '"manifest_path":"[^"]*/candle-transformers-[^"]*/Cargo.toml"' | cut -d'"' -f4)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$scratch/src/models"
cp "${manifest%/*}"/src/models/{mixtral,qwen2_moe,qwen3,qwen3_moe,deepseek2}.rs "$scratch/src/models"
sed -n '/^```diff$/,/^```$/p' docs/swap.md | grep -v '^```' | patch --fuzz=0 -p1 -d "$scratch/src"
cp docs/swap/check.rs "$scratch/src/main.rs"
cp Cargo.lock "$scratch"
cat > "$scratch/Cargo.toml" <<TOML
[package]
name = "swap-check"
edition = "2021"

[dependencies]
candle = { package = "candle-core", version = "0.11.1" }
candle-nn = "0.11.1"
candle-transformers = "0.11.1"
phase-moe = { path = "$PWD", default-features = false, features = ["layer"] }
rayon = "1"
serde = { version = "1", features = ["derive"] }
serde_json = "1"

[workspace]
TOML
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/target}"
cargo run --quiet --release --manifest-path "$scratch/Cargo.toml" -- tests/goldens/zoo
