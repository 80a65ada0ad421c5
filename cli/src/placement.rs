//! Which expert is on which device: what `--placement` takes, and the file that `place` writes for it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use phase_moe::Placement;
use serde::{Deserialize, Serialize};

use crate::mistake::UserMistake;
use crate::options::read_text;

/// Where the experts of a layer are.
#[derive(Clone, Debug, PartialEq)]
pub enum PlacementChoice {
    /// Contiguous groups as large as devices are fast.
    Speed,
    /// Contiguous groups, equally large.
    Equal,
    /// As a file says.
    File(PathBuf),
}

/// Its words on the command line: a file of the name of a word is `./speed`.
impl From<&str> for PlacementChoice {
    fn from(typed: &str) -> Self {
        match typed {
            "speed" | "by-speed" => Self::Speed,
            "equal" => Self::Equal,
            file => Self::File(file.into()),
        }
    }
}

/// A placement of every MoE layer, or of all alike: `{"devices": 2, "layers": [[0, 0, 1, 1], ..]}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlacementFile {
    /// How many devices there are.
    pub devices: usize,
    /// Of each MoE layer the device of each expert; a single one is for all layers.
    pub layers: Vec<Vec<u16>>,
}

impl PlacementFile {
    /// Reads and checks it.
    pub fn read(path: &Path) -> Result<(usize, Vec<Placement>)> {
        let named = || format!("--placement {}", path.display());
        let file: Self = serde_json::from_str(&read_text(path).with_context(named)?).map_err(|error| {
            let expected = r#"expected {"devices": N, "layers": [[device of expert 0, ..], ..]}"#;
            UserMistake(format!("{}: {expected}, got {error}", named()))
        })?;
        let experts = file.layers.first().map(Vec::len).ok_or_else(|| {
            UserMistake(format!("{}: layers: expected one for all, or one for each MoE layer, got none", named()))
        })?;
        let of_layer = |(layer, device_of): (usize, &Vec<u16>)| -> Result<Placement> {
            if device_of.len() != experts {
                let got = device_of.len();
                let message = format!("layer {layer}: expected {experts} experts, as in layer 0, got {got}");
                return Err(UserMistake(message).into());
            }
            Placement::new(device_of.clone(), file.devices).with_context(|| format!("layer {layer}"))
        };
        let placements = file.layers.iter().enumerate().map(of_layer).collect::<Result<_>>().with_context(named)?;
        Ok((file.devices, placements))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_file_is_named_with_what_was_expected() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("p.json");
        let message = |text: &str| {
            std::fs::write(&path, text).unwrap();
            let error = format!("{:#}", PlacementFile::read(&path).unwrap_err());
            error.strip_prefix(&format!("--placement {}: ", path.display())).unwrap().to_owned()
        };
        let shape = r#"expected {"devices": N, "layers": [[device of expert 0, ..], ..]}, got "#;
        for text in ["", "[", "[1]", r#"{"devices": 2}"#, r#"{"devices": 2, "layers": [[0, -1]]}"#] {
            let message = message(text);
            assert!(message.starts_with(shape), "{text}: {message}");
        }
        let none = "layers: expected one for all, or one for each MoE layer, got none";
        assert_eq!(message(r#"{"devices": 2, "layers": []}"#), none);
        let other = "layer 1: expected 2 experts, as in layer 0, got 3";
        assert_eq!(message(r#"{"devices": 2, "layers": [[0, 1], [0, 1, 1]]}"#), other);
        let range = "layer 1: device of an expert is 2: expected below devices 2";
        assert_eq!(message(r#"{"devices": 2, "layers": [[0, 1], [0, 2]]}"#), range);
        assert_eq!(message(r#"{"devices": 0, "layers": [[0]]}"#), "layer 0: devices is 0: expected 1 to 65535");
        std::fs::write(&path, r#"{"devices": 2, "layers": [[0, 1, 0]]}"#).unwrap();
        let expected = (2, vec![Placement::new(vec![0, 1, 0], 2).unwrap()]);
        assert_eq!(PlacementFile::read(&path).unwrap(), expected);
    }
}
