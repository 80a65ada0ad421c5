//! Writes a model of random weights as GGUF, version 3 (`docs/gguf.md` of ggml), with a tokenizer that llama.cpp reads too.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Result, Write};
use std::path::Path;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor as Candle};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::shape::{Fill, INTERVAL, Mixture, Net, Shape, Tensor};

/// Tensors begin at multiples of so many bytes.
const ALIGNMENT: usize = 32;

/// Weights that are drawn at once: a whole number of blocks of any type.
const PIECE: usize = 256;

/// Pieces to draw from.
const PIECES: usize = 4096;

/// Metadata in the making: how many, and their bytes.
#[derive(Default)]
struct Metadata {
    count: u64,
    bytes: Vec<u8>,
}

impl Metadata {
    fn set(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.count += 1;
        self.bytes.extend(text(key));
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend(value);
    }

    fn count(&mut self, key: &str, value: usize) {
        self.set(key, 4, &(value as u32).to_le_bytes());
    }

    fn number(&mut self, key: &str, value: f32) {
        self.set(key, 6, &value.to_le_bytes());
    }

    fn flag(&mut self, key: &str, value: bool) {
        self.set(key, 7, &[u8::from(value)]);
    }

    fn text(&mut self, key: &str, value: &str) {
        self.set(key, 8, &text(value));
    }

    /// An array of texts (8) or of 32-bit integers (5).
    fn array(&mut self, key: &str, kind: u32, values: impl ExactSizeIterator<Item = Vec<u8>>) {
        let mut bytes = [&kind.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
        bytes.extend(values.flatten());
        self.set(key, 9, &bytes);
    }
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// Writes the file; one that was begun is never taken for a whole one.
pub fn write(path: &Path, shape: &Shape, mixture: Mixture) -> Result<()> {
    let begun = path.with_extension("part");
    let mut file = BufWriter::with_capacity(1 << 20, File::create(&begun)?);
    let (metadata, tensors) = (metadata(shape, mixture), shape.tensors(mixture));
    let mut head = b"GGUF".to_vec();
    head.extend(3u32.to_le_bytes());
    head.extend((tensors.len() as u64).to_le_bytes());
    head.extend(metadata.count.to_le_bytes());
    head.extend(metadata.bytes);
    let mut offset = 0;
    for tensor in &tensors {
        head.extend(text(&tensor.name));
        head.extend((tensor.shape.len() as u32).to_le_bytes());
        // Innermost first.
        head.extend(tensor.shape.iter().rev().flat_map(|&size| (size as u64).to_le_bytes()));
        head.extend(type_id(tensor.dtype).to_le_bytes());
        head.extend((offset as u64).to_le_bytes());
        offset += tensor.bytes().next_multiple_of(ALIGNMENT);
    }
    head.resize(head.len().next_multiple_of(ALIGNMENT), 0);
    file.write_all(&head)?;
    let mut pieces = Pieces { random: ChaCha8Rng::seed_from_u64(7), tables: BTreeMap::new() };
    for tensor in &tensors {
        match tensor.fill {
            Fill::Ones => (0..tensor.count()).try_for_each(|_| file.write_all(&1f32.to_le_bytes()))?,
            Fill::MinusOnes => (0..tensor.count()).try_for_each(|_| file.write_all(&(-1f32).to_le_bytes()))?,
            Fill::Random(deviation) => pieces.write(&mut file, tensor, deviation)?,
        }
        let padding = tensor.bytes().next_multiple_of(ALIGNMENT) - tensor.bytes();
        file.write_all(&[0; ALIGNMENT][..padding])?;
    }
    file.flush()?;
    std::fs::rename(begun, path)
}

/// What both programs read of a model of this shape.
fn metadata(shape: &Shape, mixture: Mixture) -> Metadata {
    let mut metadata = Metadata::default();
    let key = |name: &str| format!("{}.{name}", shape.architecture);
    metadata.text("general.architecture", shape.architecture);
    metadata.text("general.name", shape.name);
    metadata.count("general.file_type", mixture.file_type() as usize);
    metadata.count("general.quantization_version", 2);
    metadata.count("general.alignment", ALIGNMENT);
    // Longer than OLMoE's own 4096, for what is decoded at that depth.
    metadata.count(&key("context_length"), 40_960);
    metadata.count(&key("embedding_length"), shape.hidden);
    metadata.count(&key("block_count"), shape.layers);
    metadata.count(&key("feed_forward_length"), shape.width);
    metadata.count(&key("expert_feed_forward_length"), shape.width);
    metadata.count(&key("attention.head_count"), shape.heads);
    metadata.count(&key("attention.head_count_kv"), shape.kv_heads);
    metadata.count(&key("attention.key_length"), shape.head_dim);
    metadata.count(&key("attention.value_length"), shape.head_dim);
    metadata.count(&key("expert_count"), shape.experts);
    metadata.count(&key("expert_used_count"), shape.top_k);
    metadata.count(&key("vocab_size"), shape.vocab);
    metadata.number(&key("attention.layer_norm_rms_epsilon"), shape.epsilon);
    metadata.number(&key("rope.freq_base"), shape.rope_base);
    if shape.shared > 0 {
        metadata.count(&key("expert_shared_feed_forward_length"), shape.shared);
    }
    if let Some(Net { key_heads, value_heads, width, conv }) = shape.net {
        metadata.count(&key("ssm.conv_kernel"), conv);
        metadata.count(&key("ssm.state_size"), width);
        metadata.count(&key("ssm.group_count"), key_heads);
        metadata.count(&key("ssm.time_step_rank"), value_heads);
        metadata.count(&key("ssm.inner_size"), value_heads * width);
        metadata.count(&key("full_attention_interval"), INTERVAL);
        // A quarter of each head, its pairs shared out over three kinds of positions.
        let rotated = shape.head_dim / 4;
        let sections = [rotated / 6 + 1, rotated / 6 + 1, rotated / 2 - 2 * (rotated / 6 + 1), 0];
        metadata.count(&key("rope.dimension_count"), rotated);
        metadata.array(
            &key("rope.dimension_sections"),
            5,
            sections.iter().map(|&size| (size as i32).to_le_bytes().to_vec()),
        );
    }
    tokenizer(&mut metadata, shape);
    metadata
}

/// Byte pairs with a few merges; the rest of the vocabulary is unused.
fn tokenizer(metadata: &mut Metadata, shape: &Shape) {
    const MERGES: [(&str, &str); 6] = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("Ġ", "a"), ("e", "r")];
    const NORMAL: i32 = 1;
    const CONTROL: i32 = 3;
    const UNUSED: i32 = 5;
    // The letters that GPT-2 writes bytes with: printable ones stand for themselves, the others are moved up.
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let moved = (0..=255).filter(|&byte| !printable(byte)).zip(0x100..).map(|(byte, letter)| (byte, letter as u32));
    let moved: BTreeMap<u8, u32> = moved.collect();
    let letter = |byte: u8| char::from_u32(moved.get(&byte).copied().unwrap_or(byte.into())).unwrap_or_default();
    let mut tokens: Vec<(String, i32)> = (0..=255).map(|byte| (letter(byte).to_string(), NORMAL)).collect();
    tokens.extend(MERGES.map(|(left, right)| (format!("{left}{right}"), NORMAL)));
    let end = tokens.len();
    tokens.push(("<|endoftext|>".into(), CONTROL));
    tokens.extend((tokens.len()..shape.vocab).map(|id| (format!("[PAD{id}]"), UNUSED)));
    metadata.text("tokenizer.ggml.model", "gpt2");
    metadata.text(
        "tokenizer.ggml.pre",
        match shape.architecture {
            "olmoe" => "olmo",
            "qwen35moe" => "qwen35",
            _ => "qwen2",
        },
    );
    metadata.array("tokenizer.ggml.tokens", 8, tokens.iter().map(|(token, _)| text(token)));
    metadata.array("tokenizer.ggml.token_type", 5, tokens.iter().map(|(_, kind)| kind.to_le_bytes().to_vec()));
    metadata.array("tokenizer.ggml.merges", 8, MERGES.iter().map(|(left, right)| text(&format!("{left} {right}"))));
    metadata.count("tokenizer.ggml.bos_token_id", end);
    metadata.count("tokenizer.ggml.eos_token_id", end);
    metadata.flag("tokenizer.ggml.add_bos_token", false);
}

/// ggml's number of a type (`ggml_type`).
fn type_id(dtype: GgmlDType) -> u32 {
    match dtype {
        GgmlDType::Q8_0 => 8,
        GgmlDType::Q4K => 12,
        GgmlDType::Q6K => 14,
        GgmlDType::BF16 => 30,
        _ => 0,
    }
}

/// Pieces of random weights, quantised once and drawn again and again: fast, and no two rows are alike.
struct Pieces {
    random: ChaCha8Rng,
    /// By type and deviation.
    tables: BTreeMap<(u32, u32), Vec<u8>>,
}

impl Pieces {
    fn write(&mut self, file: &mut impl Write, tensor: &Tensor, deviation: f32) -> Result<()> {
        let Self { random, tables } = self;
        let table = match tables.entry((type_id(tensor.dtype), deviation.to_bits())) {
            std::collections::btree_map::Entry::Occupied(there) => there.into_mut(),
            std::collections::btree_map::Entry::Vacant(room) => {
                room.insert(table(random, tensor.dtype, deviation).map_err(std::io::Error::other)?)
            }
        };
        let size = table.len() / PIECES;
        (0..tensor.count() / PIECE).try_for_each(|_| {
            let from = random.random_range(0..PIECES) * size;
            file.write_all(&table[from..][..size])
        })
    }
}

/// Uniform weights of this standard deviation.
fn table(random: &mut ChaCha8Rng, dtype: GgmlDType, deviation: f32) -> candle_core::Result<Vec<u8>> {
    let reach = deviation * 3f32.sqrt();
    let weights: Vec<f32> = (0..PIECES * PIECE).map(|_| random.random_range(-reach..reach)).collect();
    let weights = Candle::from_vec(weights, (PIECES, PIECE), &Device::Cpu)?;
    Ok(QTensor::quantize(&weights, dtype)?.data()?.into_owned())
}
