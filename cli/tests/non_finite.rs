//! No NaN and no infinity leaves a model as a figure: every weight of every fixture is made one in turn.

use std::path::{Path, PathBuf};

use candle_core::DType;
use half::bf16;
use phase_moe::checkpoint::{ByteSource, ElementType};
use phase_moe::{Batch, CacheOptions, Checkpoint, Decoder, Error, LoadOptions, Result, Weights};
use safetensors::Dtype;

const IDS: [u32; 7] = [3, 14, 15, 9, 26, 5, 35];

fn goldens(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("tests/goldens").join(name)
}

#[derive(Debug)]
struct InMemory(Vec<u8>);

impl ByteSource for InMemory {
    fn len(&self) -> std::io::Result<u64> {
        Ok(self.0.len() as u64)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
        let start = offset as usize;
        buffer.copy_from_slice(&self.0[start..start + buffer.len()]);
        Ok(())
    }
}

/// A model whose file is in memory, to be changed.
struct Fixture {
    path: PathBuf,
    file: String,
    bytes: Vec<u8>,
}

impl Fixture {
    fn of(path: PathBuf) -> Self {
        let file = if path.is_dir() { path.join("model.safetensors") } else { path.clone() };
        Self { bytes: std::fs::read(&file).unwrap(), file: file.display().to_string(), path }
    }

    fn checkpoint(&self) -> Checkpoint {
        let source = vec![(self.file.clone(), Box::new(InMemory(self.bytes.clone())) as Box<_>)];
        Checkpoint::from_sources(source).unwrap()
    }

    /// The model's logits.
    fn logits(&self, options: &LoadOptions) -> Result<Vec<f32>> {
        let files = match std::fs::read_to_string(self.path.join("config.json")) {
            Ok(config) => Weights::from_parts("m", config, self.checkpoint()),
            Err(_) => Weights::from_gguf("m", self.checkpoint())?,
        };
        let decoder = Decoder::load(&files, options)?;
        let logits = decoder.forward(&Batch::new(&[&IDS])?, &mut decoder.batch_state())?;
        Ok(logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }

    /// The same with `value` written at a byte of the file.
    fn logits_with(&mut self, at: usize, value: &[u8], options: &LoadOptions) -> Result<Vec<f32>> {
        let before = self.bytes[at..at + value.len()].to_vec();
        self.bytes[at..at + value.len()].copy_from_slice(value);
        let logits = self.logits(options);
        self.bytes[at..at + value.len()].copy_from_slice(&before);
        logits
    }
}

/// Where a number of the first element or block is, and the bytes of a NaN, an infinity and the largest number there.
fn numbers(dtype: ElementType, name: &str) -> Option<(usize, [Vec<u8>; 3])> {
    let f16 = || [[0x00, 0x7e], [0x00, 0x7c], [0xff, 0x7b]].map(|bytes| bytes.to_vec());
    Some(match dtype {
        ElementType::Plain(Dtype::F32) => {
            (0, [f32::NAN, f32::INFINITY, f32::MAX].map(|value| value.to_le_bytes().to_vec()))
        }
        ElementType::Plain(Dtype::BF16) => (0, [[0xc0, 0x7f], [0x80, 0x7f], [0x7f, 0x7f]].map(|bytes| bytes.to_vec())),
        ElementType::Plain(Dtype::F16) => (0, f16()),
        // Exponents: the last is no number.
        ElementType::Plain(Dtype::U8) if name.ends_with("_scales") => (0, [vec![255], vec![255], vec![254]]),
        ElementType::Plain(_) => return None,
        ElementType::Blocks(blocks) => match blocks.name {
            "mxfp4" => (0, [vec![255], vec![255], vec![254]]),
            "q6_K" => (208, f16()),
            "q3_K" => (108, f16()),
            "q2_K" => (80, f16()),
            _ => (0, f16()),
        },
    })
}

fn fixtures() -> Vec<Fixture> {
    let families = std::fs::read_dir(goldens("zoo")).unwrap().map(|entry| entry.unwrap().path());
    let files = std::fs::read_dir(goldens("gguf")).unwrap().map(|entry| entry.unwrap().path());
    // A tokenizer without a model.
    let files = files.filter(|path| {
        path.extension().is_some_and(|extension| extension == "gguf") && !path.ends_with("sentencepiece.gguf")
    });
    let mut paths: Vec<PathBuf> = families.chain(files).chain([goldens("gguf_mxfp4/olmoe.gguf")]).collect();
    paths.sort();
    paths.into_iter().map(Fixture::of).collect()
}

#[test]
fn a_weight_that_is_no_number_is_named_or_meets_no_token() {
    let plain = LoadOptions::default();
    let of = |dtype: DType| LoadOptions::default().with_dtype(dtype);
    let cached = |dtype: DType| of(dtype).with_expert_cache(CacheOptions::new(1 << 22));
    let all = [of(DType::F32), of(DType::BF16), of(DType::F16), cached(DType::F32), cached(DType::BF16)];
    let (mut named, mut untouched) = (0, 0);
    for mut fixture in fixtures() {
        let checkpoint = fixture.checkpoint();
        let whole = all.each_ref().map(|options| fixture.logits(options).unwrap());
        for (name, entry) in checkpoint.tensors() {
            let Some((at, [nan, infinity, largest])) = numbers(entry.dtype, name) else { continue };
            let at = entry.offset as usize + at;
            for (options, whole) in all.iter().zip(&whole) {
                let place = format!("{}: {name}, {options:?}", fixture.file);
                match fixture.logits_with(at, &nan, options) {
                    Ok(logits) => {
                        assert_eq!(&logits, whole, "{place}: a NaN gave other figures");
                        untouched += 1;
                    }
                    Err(error) => {
                        let message = error.to_string();
                        // What positions are stretched by is read before anything runs.
                        let is_said = name.starts_with("rope_factors") && error.is_user_error();
                        let is_found = matches!(error, Error::NonFinite { .. }) && !error.is_user_error();
                        assert!(is_found || is_said, "{place}: {message}");
                        assert!(message.contains(name), "{place}: {message}");
                        assert_eq!(message.lines().count(), 1, "{message}");
                        named += 1;
                    }
                }
            }
            for bytes in [infinity, largest] {
                match fixture.logits_with(at, &bytes, &plain) {
                    Ok(logits) => assert!(logits.iter().all(|logit| logit.is_finite()), "{name}"),
                    Err(error) => {
                        // A delta net forgets by what is below 0.
                        let is_said = name.starts_with("rope_factors") || name.ends_with(".ssm_a");
                        let is_said = is_said && error.is_user_error();
                        assert!(matches!(error, Error::NonFinite { .. }) || is_said, "{name}: {error}");
                    }
                }
            }
        }
    }
    // Most are in everybody's way.
    assert!(named > 500 && untouched > 0 && untouched < named, "{named} named, {untouched} untouched");
}

#[test]
fn a_key_that_f16_does_not_hold_is_named() {
    let mut fixture = Fixture::of(goldens("zoo/mixtral"));
    let checkpoint = fixture.checkpoint();
    // Activations are floats on the CPU; keys and values are kept in f16 beside others than f32.
    let half = LoadOptions::default().with_dtype(DType::F16);
    assert!(fixture.logits(&half).is_ok());
    let output = checkpoint.entry("model.layers.1.self_attn.o_proj.weight").unwrap().offset as usize;
    assert!(fixture.logits_with(output, &1e6f32.to_le_bytes(), &half).is_ok());
    let name = "model.layers.1.self_attn.k_proj.weight";
    let at = checkpoint.entry(name).unwrap().offset as usize;
    let message = fixture.logits_with(at, &1e7f32.to_le_bytes(), &half).unwrap_err().to_string();
    assert!(message.starts_with("layer 1 of the model, attention"), "{message}");
    assert!(message.contains(&format!("the largest is 1e7 in tensor `{name}`: an overflow")), "{message}");
    assert!(fixture.logits_with(at, &1e7f32.to_le_bytes(), &LoadOptions::default()).is_ok());
}

mod command {
    use std::process::{Command, Output};

    use super::*;

    fn run(directory: &Path, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_phase-moe")).args(arguments).current_dir(directory).output().unwrap()
    }

    /// The bundled model with other bytes at the beginning of a tensor.
    fn changed(directory: &Path, tensor: &str, change: impl Fn(&mut [u8])) {
        let bundled = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("models/tiny-moe");
        for name in ["config.json", "tokenizer.json"] {
            std::fs::copy(bundled.join(name), directory.join(name)).unwrap();
        }
        let fixture = Fixture::of(bundled);
        let (checkpoint, mut bytes) = (fixture.checkpoint(), fixture.bytes);
        let entry = checkpoint.entry(tensor).unwrap();
        let at = entry.offset as usize;
        change(&mut bytes[at..at + entry.bytes]);
        std::fs::write(directory.join("model.safetensors"), bytes).unwrap();
    }

    #[test]
    fn every_command_ends_with_code_1_and_writes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let tensor = "model.layers.2.self_attn.o_proj.weight";
        changed(directory.path(), tensor, |bytes| bytes[..2].copy_from_slice(&bf16::NAN.to_le_bytes()));
        let commands: [&[&str]; 7] = [
            &["logits", "--ids", "1,2", "--out", "out"],
            &["trace", "--tokens", "64", "--out", "out"],
            &["generate", "--prompt", "In the", "--new-tokens", "3"],
            &["generate", "--prompt", "In the", "--new-tokens", "3", "--temperature", "1", "--json"],
            &["compare", "--tokens", "64", "--router", "top-k", "--json"],
            &["replay", "--tokens", "64", "--json"],
            &["tune", "--tokens", "64", "--json"],
        ];
        for command in commands {
            let output = run(directory.path(), &[command, &["--model", "."]].concat());
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{command:?}: {said}");
            assert!(said.contains("layer 2 of the model, attention") && said.contains(tensor), "{command:?}: {said}");
            assert_eq!((said.lines().count(), output.stdout.len()), (1, 0), "{command:?}: {said}");
            assert!(!directory.path().join("out").exists());
        }
    }

    #[test]
    fn a_perplexity_beyond_all_numbers_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        // Logits are finite, but thousands of nats apart, and all for the wrong tokens.
        changed(directory.path(), "model.norm.weight", |bytes| {
            bytes.as_chunks_mut().0.iter_mut().for_each(|number| *number = bf16::from_f32(-1e6).to_le_bytes());
        });
        for command in
            [&["compare", "--tokens", "64", "--router", "top-k"][..], &["tune", "--tokens", "64", "--cache-bonus", "0"]]
        {
            let output = run(directory.path(), &[command, &["--model", ".", "--json"]].concat());
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{command:?}: {said}");
            assert!(said.contains("perplexity: expected finite numbers, got inf; the mean loss of "), "{said}");
            assert!(output.stdout.is_empty());
        }
    }
}
