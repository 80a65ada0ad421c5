//! `--model org/name`: a model on the Hugging Face hub, fetched once into the cache that its other tools use.
//!
//! Only the files that this binary reads are fetched; what is in the cache already is not, and an interrupted download goes on where it
//! stopped. `HF_HOME`, `HF_ENDPOINT` and `HF_TOKEN` mean what they mean everywhere. Needs the feature `hub`.

use std::path::Path;

#[cfg(feature = "hub")]
pub use self::fetch::directory;

/// True for what can only be a name on the hub: `org/name`, which nothing on this machine is called.
pub fn is_name(model: &Path) -> bool {
    let Some(text) = model.to_str() else { return false };
    let plain = |part: &str| {
        part.chars().all(|letter| letter.is_ascii_alphanumeric() || "-_.".contains(letter))
            && part.starts_with(|first: char| first.is_ascii_alphanumeric())
    };
    text.split_once('/').is_some_and(|(organisation, name)| plain(organisation) && plain(name)) && !model.exists()
}

#[cfg(feature = "hub")]
mod fetch {
    use std::collections::BTreeSet;
    use std::path::PathBuf;
    use std::time::Duration;

    use anyhow::Result;
    use hf_hub::Cache;
    use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
    use phase_moe::checkpoint::parse_json;
    use serde_json::Value;

    use crate::mistake::UserMistake;

    const INDEX: &str = "model.safetensors.index.json";
    const SINGLE: &str = "model.safetensors";

    /// How often a download that broke off goes on by itself.
    const RETRIES: u32 = 2;

    /// What is fetched where it is there, beside the tensors.
    const FILES: [&str; 5] =
        ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];

    /// Where the files of the model called `name` are, after those that were missing have come.
    pub fn directory(name: &str, progress: bool) -> Result<PathBuf> {
        let builder = ApiBuilder::from_env().with_progress(progress);
        let builder = match std::env::var("HF_TOKEN") {
            Ok(token) if !token.trim().is_empty() => builder.with_token(Some(token.trim().to_owned())),
            _ => builder,
        };
        let repository = builder.build().map_err(|error| mistake(name, error))?.model(name.to_owned());
        let listed: BTreeSet<String> = match repository.info() {
            Ok(info) => info.siblings.into_iter().map(|file| file.rfilename).collect(),
            Err(error) => return cached(name).ok_or_else(|| mistake(name, error)),
        };
        let get = |file: &str| fetch(&repository, file).map_err(|error| mistake(name, error));
        let mut config = None;
        for file in FILES.into_iter().filter(|file| listed.contains(*file)) {
            let path = get(file)?;
            config = config.or_else(|| (file == "config.json").then_some(path));
        }
        for file in tensors(name, &repository, &listed)? {
            get(&file)?;
        }
        let config =
            config.ok_or_else(|| UserMistake(format!("--model {name}: expected config.json on the hub, got none")))?;
        Ok(config.parent().map_or(PathBuf::new(), PathBuf::from))
    }

    /// Brings one file, going on a few times where the connection breaks: each time from what has come.
    fn fetch(repository: &ApiRepo, file: &str) -> Result<PathBuf, ApiError> {
        let mut tries = 0;
        loop {
            match repository.get(file) {
                Err(ApiError::IoError(_)) if tries < RETRIES => {
                    tries += 1;
                    std::thread::sleep(Duration::from_millis(300) * tries);
                }
                result => return result,
            }
        }
    }

    /// The files that the tensors are in.
    fn tensors(name: &str, repository: &ApiRepo, listed: &BTreeSet<String>) -> Result<BTreeSet<String>> {
        if listed.contains(SINGLE) {
            return Ok([SINGLE.to_owned()].into());
        }
        if !listed.contains(INDEX) {
            let message = format!("--model {name}: expected {SINGLE} or {INDEX} on the hub, got neither");
            return Err(UserMistake(message).into());
        }
        let path = fetch(repository, INDEX).map_err(|error| mistake(name, error))?;
        let index: Value = parse_json(&std::fs::read_to_string(path)?)
            .map_err(|error| UserMistake(format!("--model {name}: {INDEX}: expected JSON, got {error}")))?;
        let shards = index["weight_map"].as_object().into_iter().flatten().filter_map(|(_, shard)| shard.as_str());
        // What else it says is checked where the checkpoint is opened.
        Ok(shards.filter(|shard| listed.contains(*shard)).map(str::to_owned).collect())
    }

    /// The model as it is in the cache, for those without a network.
    fn cached(name: &str) -> Option<PathBuf> {
        let config = Cache::from_env().model(name.to_owned()).get("config.json")?;
        let directory = config.parent()?;
        let tensors = directory.join(SINGLE).exists() || directory.join(INDEX).exists();
        tensors.then(|| directory.to_owned())
    }

    fn mistake(name: &str, error: ApiError) -> anyhow::Error {
        let reason = match &error {
            ApiError::RequestError(request) => match **request {
                ureq::Error::StatusCode(404) => "the hub has no such model or file".into(),
                ureq::Error::StatusCode(status @ (401 | 403)) => format!(
                    "the hub refuses it ({status}): it is gated, private or not there; accept its terms and set HF_TOKEN"
                ),
                ureq::Error::StatusCode(416) => {
                    "a whole file that was not put in its place is in the way: remove the .part files of it in the cache".into()
                }
                _ => format!("the hub cannot be reached: {error}"),
            },
            _ => format!("the download failed and goes on from there next time: {error}"),
        };
        UserMistake(format!("--model {name}: no such directory, and {}", reason.replace('\n', " "))).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_hub_are_told_from_paths() {
        for name in ["Qwen/Qwen3-30B-A3B", "allenai/OLMoE-1B-7B-0924", "a/b.c_d"] {
            assert!(is_name(Path::new(name)), "{name}");
        }
        for path in ["models", "./models/x", "/models/x", "../x/y", "a/b/c", "a/", "a/..", "src/chat", "a b/c", "~/x"] {
            assert!(!is_name(Path::new(path)), "{path}");
        }
    }
}
