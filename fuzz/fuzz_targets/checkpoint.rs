//! Raw bytes as safetensors and GGUF files and as a configuration: an error, or tensors that can be read whole.

#![no_main]

use libfuzzer_sys::fuzz_target;
use phase_moe::{Checkpoint, Weights};
use phase_moe::checkpoint::ByteSource;
use phase_moe::zoo::parse_config;

#[derive(Debug)]
struct Memory(Vec<u8>);

impl ByteSource for Memory {
    fn len(&self) -> std::io::Result<u64> {
        Ok(self.0.len() as u64)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
        let start = usize::try_from(offset).ok();
        let range = start.and_then(|start| Some(start..start.checked_add(buffer.len())?));
        match range.and_then(|range| self.0.get(range)) {
            Some(bytes) => buffer.copy_from_slice(bytes),
            None => return Err(std::io::ErrorKind::UnexpectedEof.into()),
        }
        Ok(())
    }
}

/// A file with `header` behind its own length, so that not every input ends at the first eight bytes.
fn framed(header: &[u8], body: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, body].concat()
}

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = parse_config(text, "config.json");
    }
    let (header, body) = data.split_at(data.iter().position(|&byte| byte == 0).unwrap_or(data.len()));
    let opened = |file: Vec<u8>| {
        let Ok(checkpoint) = Checkpoint::from_sources(vec![("fuzz".into(), Box::new(Memory(file)))]) else { return };
        for name in checkpoint.tensors().keys() {
            let bytes = checkpoint.read(name).expect("a checked header");
            assert!(bytes.len() <= data.len());
        }
        if checkpoint.gguf().is_some() {
            let weights = Weights::from_gguf("fuzz", checkpoint);
            let _ = weights.map(|weights| (weights.spec().map(|_| ()), weights.tokenizer_json()));
        }
    };
    opened(data.to_vec());
    opened(framed(header, body));
    opened([b"GGUF\x03\0\0\0", data].concat());
});
