//! Options in any mixture, with values that fit, that do not, and that are none: code 0, 1 or 2, and what belongs to it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::SystemTime;

use phase_moe::RouterKind;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::answer;
use crate::fixtures::{self, Ready};
use crate::runner::{self, run};

/// Mixes of a usual run.
const CASES: usize = 2_000;

/// Models that the mixes run on, one with blocks that have no experts, one in a GGUF file.
const MODELS: [&str; 3] = ["zoo/qwen2_moe", "zoo/deepseek_v3", "gguf/olmoe.gguf"];

/// What values of an option look like.
#[derive(Clone, Copy)]
enum Kind {
    Count,
    Number,
    Numbers,
    Counts,
    Bytes,
    Seed,
    Router,
    Routers,
    Profile,
    One(&'static [&'static str]),
    Text,
    /// A model, given by its place in a worker's directory; as those below.
    Model,
    TextFile,
    IdsFile,
    Trace,
    /// A word, or a file of a worker's directory.
    Placement,
    Out,
    Flag,
    Threads,
}

const COMMANDS: [&str; 9] = ["compare", "generate", "tune", "trace", "route", "replay", "place", "logits", "inspect"];

/// Every option of every command.
const OPTIONS: [(&str, Kind); 48] = [
    ("--admission", Kind::One(&["affinity", "all"])),
    ("--batch-tokens", Kind::Count),
    ("--batches", Kind::One(&["one-kind", "mixed"])),
    ("--cache-bonus", Kind::Numbers),
    ("--cached-experts", Kind::Counts),
    ("--capacities", Kind::Counts),
    ("--capacity", Kind::One(&["exact", "ceil"])),
    ("--capacity-factor", Kind::Numbers),
    ("--chat", Kind::Flag),
    ("--chunk-tokens", Kind::Count),
    ("--color", Kind::One(&["auto", "always", "never"])),
    ("--device-speeds", Kind::Numbers),
    ("--devices", Kind::Count),
    ("--dtype", Kind::One(&["f32", "bf16", "f16"])),
    ("--expert-cache", Kind::Bytes),
    ("--expert-parallel", Kind::Flag),
    ("--ids", Kind::Counts),
    ("--ids-file", Kind::IdsFile),
    ("--json", Kind::Flag),
    ("--keep-top", Kind::Count),
    ("--kv-dtype", Kind::One(&["f32", "bf16", "f16"])),
    ("--layer-top-k", Kind::Counts),
    ("--loads", Kind::Flag),
    ("--logits", Kind::Trace),
    ("--max-mass-loss", Kind::Number),
    ("--max-perplexity-increase", Kind::Number),
    ("--model", Kind::Model),
    ("--new-tokens", Kind::Count),
    ("--out", Kind::Out),
    ("--placement", Kind::Placement),
    ("--policy", Kind::One(&["lru", "lfu", "lfru", "affinity"])),
    ("--prefer", Kind::One(&["speed", "quality", "memory"])),
    ("--prefetch", Kind::One(&["auto", "off", "always"])),
    ("--profile", Kind::Profile),
    ("--prompt", Kind::Text),
    ("--prompt-file", Kind::TextFile),
    ("--quiet", Kind::Flag),
    ("--report", Kind::Out),
    ("--router", Kind::Routers),
    ("--seed", Kind::Seed),
    ("--shuffle", Kind::Seed),
    ("--system", Kind::Text),
    ("--target-hit-rate", Kind::Number),
    ("--temperature", Kind::Number),
    ("--text", Kind::TextFile),
    ("--threads", Kind::Threads),
    ("--tokens", Kind::Count),
    ("--top-k", Kind::Counts),
];
const MORE_OPTIONS: [(&str, Kind); 2] = [("--top-p", Kind::Number), ("--trace", Kind::Trace)];

/// What fits an option, mostly.
const COUNTS: [&str; 9] = ["0", "1", "2", "3", "4", "6", "8", "16", "64"];
const NUMBERS: [&str; 10] = ["0", "0.1", "0.25", "0.5", "0.9", "1", "1.0", "1.25", "2", "4"];
const BYTES: [&str; 6] = ["16KiB", "32KiB", "64KiB", "200KB", "1MiB", "1GiB"];

/// What seldom does.
const ODD: [&str; 28] = [
    "",
    " ",
    "-",
    "--",
    "-1",
    "-0",
    "+1",
    "0x10",
    "1e3",
    "1.5",
    "1e308",
    "1e-320",
    "1e999",
    "NaN",
    "nan",
    "inf",
    "-inf",
    "4294967295",
    "4294967296",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "4611686018427387904",
    "576460752303423488",
    "all",
    "½ 漢字 🦀",
    "1,2,3",
    "16EiB",
];

const THREADS: [&str; 6] = ["0", "1", "2", "1025", "-1", "18446744073709551616"];
const TEXTS: [&str; 8] = ["w1 w2 w3", "w1", "", " ", "½ 漢字 🦀", "w1\0w2", "\u{feff}w5", "-w1"];

/// Files of a worker's directory by name.
const TEXT_FILES: [&str; 9] = [
    "text0.txt",
    "text1.txt",
    "empty.txt",
    "bom.txt",
    "binary.txt",
    "missing.txt",
    ".",
    "model.safetensors",
    "one.txt",
];
const TRACES: [&str; 6] = ["trace.safetensors", "routes.safetensors", "model.safetensors", "missing", ".", "empty.txt"];
const PLACEMENTS: [&str; 7] =
    ["speed", "equal", "placement.json", "layers.json", "model.safetensors", "empty.txt", "missing"];
const OUTS: [&str; 9] = [
    "out.safetensors",
    "out.safetensors",
    "out.safetensors",
    "trace.safetensors",
    "model.safetensors",
    "text0.txt",
    "missing/out",
    ".",
    "tokenizer.json",
];

/// A run: the model it is on and the words of its command line; `@name` stands for a file of the worker's directory.
#[derive(Clone)]
struct Mix {
    model: usize,
    words: Vec<String>,
}

impl fmt::Debug for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quoted = |word: &String| {
            if word.contains([' ', '\0']) || word.is_empty() { format!("{word:?}") } else { word.clone() }
        };
        write!(f, "{}: {}", MODELS[self.model], self.words.iter().map(quoted).collect::<Vec<_>>().join(" "))
    }
}

fn pick<R: Rng>(random: &mut R, from: &[&str]) -> String {
    (*from.choose(random).unwrap()).to_owned()
}

/// One value, mostly one that fits.
fn value<R: Rng>(random: &mut R, kind: Kind) -> String {
    let file = |name: String| format!("@{name}");
    let odd = random.random_ratio(1, 6);
    let list = |random: &mut R, from: &[&str]| {
        let values = (0..random.random_range(1..4)).map(|_| pick(random, from));
        values.collect::<Vec<_>>().join(",")
    };
    let single = |random: &mut R| random.random_ratio(3, 4);
    match kind {
        Kind::Threads => pick(random, &THREADS),
        Kind::Model if odd => file(pick(random, &["missing", "empty", "text0.txt", "model.safetensors", ""])),
        Kind::Model => "@@".into(),
        Kind::TextFile => file(pick(random, &TEXT_FILES[..if odd { TEXT_FILES.len() } else { 2 }])),
        Kind::IdsFile => file(pick(random, &["ids.txt", "text0.txt", "empty.txt", "binary.txt", "missing"])),
        Kind::Placement => match pick(random, &PLACEMENTS[..if odd { PLACEMENTS.len() } else { 3 }]).as_str() {
            word @ ("speed" | "equal") => word.into(),
            name => file(name.into()),
        },
        Kind::Trace => file(pick(random, &TRACES[..if odd { TRACES.len() } else { 1 }])),
        Kind::Out if odd => match random.random_range(0..4) {
            0 => pick(random, &["/dev/full", "/dev/null", "", "/dev/stdout"]),
            _ => file(pick(random, &OUTS)),
        },
        Kind::Out => file(OUTS[0].into()),
        Kind::Text => pick(random, &TEXTS[..if odd { TEXTS.len() } else { 2 }]),
        _ if odd => pick(random, &ODD),
        Kind::Count => pick(random, &COUNTS),
        Kind::Counts if single(random) => pick(random, &COUNTS),
        Kind::Counts => list(random, &COUNTS),
        Kind::Number => pick(random, &NUMBERS),
        Kind::Numbers if single(random) => pick(random, &NUMBERS),
        Kind::Numbers => list(random, &NUMBERS),
        Kind::Bytes if single(random) => pick(random, &BYTES),
        Kind::Bytes => list(random, &BYTES),
        Kind::Seed => pick(random, &["0", "1", "42", "18446744073709551615"]),
        Kind::Router => pick(random, &RouterKind::ALL.map(RouterKind::name)),
        Kind::Routers if single(random) => value(random, Kind::Router),
        Kind::Routers => list(random, &RouterKind::ALL.map(RouterKind::name)),
        Kind::Profile => pick(random, &["uniform", "mild", "strong", "extreme"]),
        Kind::One(names) => pick(random, names),
        Kind::Flag => String::new(),
    }
}

/// What a command needs, most of the time.
fn needed(command: &str) -> &'static [(&'static str, Kind)] {
    match command {
        "compare" | "tune" => &[("--model", Kind::Model), ("--text", Kind::TextFile), ("--tokens", Kind::Count)],
        "trace" => &[("--model", Kind::Model), ("--text", Kind::TextFile), ("--out", Kind::Out)],
        "generate" => &[("--model", Kind::Model), ("--prompt", Kind::Text), ("--new-tokens", Kind::Count)],
        "route" => &[("--logits", Kind::Trace)],
        "replay" => &[("--logits", Kind::Trace)],
        "place" => &[("--trace", Kind::Trace), ("--devices", Kind::Count)],
        "logits" => &[("--model", Kind::Model), ("--ids", Kind::Counts), ("--out", Kind::Out)],
        _ => &[("--model", Kind::Model)],
    }
}

/// The options that `phase-moe COMMAND --help` lists.
fn options_of(command: &str) -> Vec<(&'static str, Kind)> {
    let ran = run(&[command, "--help"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let listed =
        ran.stdout.lines().filter_map(|line| line.trim_start().split([' ', ',']).find(|word| word.starts_with("--")));
    let listed: BTreeSet<&str> = listed.filter(|option| *option != "--help").collect();
    let known: BTreeMap<&str, (&'static str, Kind)> =
        OPTIONS.iter().chain(&MORE_OPTIONS).map(|&(name, kind)| (name, (name, kind))).collect();
    let of = |option: &str| *known.get(option).unwrap_or_else(|| panic!("{command} has {option}, the table has not"));
    listed.into_iter().map(of).collect()
}

/// A run of `command`; of `options` those that `needed` does not give.
fn mix<R: Rng>(random: &mut R, command: &str, options: &[(&'static str, Kind)]) -> Mix {
    let mut words = vec![command.to_owned()];
    let mut given: Vec<(&str, Kind)> = Vec::new();
    let needed = match command {
        "replay" if random.random_ratio(1, 3) => &[("--model", Kind::Model), ("--text", Kind::TextFile)],
        _ => needed(command),
    };
    // Text is always given: the bundled one takes longer than anything else here.
    given.extend(needed.iter().filter(|(name, _)| *name == "--text" || random.random_ratio(19, 20)));
    let rest: Vec<_> = options.iter().filter(|(name, _)| needed.iter().all(|(other, _)| other != name)).collect();
    let more = random.random_range(0..=5);
    given.extend((0..more).filter_map(|_| rest.choose(random).map(|option| **option)));
    if random.random_ratio(1, 50) {
        given.extend(needed.choose(random)); // Twice.
    }
    if random.random_ratio(1, 50) {
        given.extend(OPTIONS.choose(random)); // Perhaps another command's.
    }
    for (name, kind) in given {
        let value = value(random, kind);
        match kind {
            Kind::Flag => words.push(name.into()),
            // Most of what begins with a dash is an option's value only so.
            _ if value.starts_with('-') => words.push(format!("{name}={value}")),
            _ => words.extend([name.to_owned(), value]),
        }
    }
    Mix { model: random.random_range(0..MODELS.len()), words }
}

/// A model's directory with the files that the mixes name.
struct Place {
    ready: Ready,
    /// Sizes and times of all files that are there before a run.
    before: BTreeMap<PathBuf, (u64, SystemTime)>,
}

impl Place {
    fn new(model: &str) -> Self {
        let ready = Ready::new(&fixtures::named(model));
        let write = |name: &str, bytes: &[u8]| std::fs::write(ready.file(name), bytes).unwrap();
        write("empty.txt", b"");
        write("one.txt", b"w1");
        write("bom.txt", "\u{feff}w1 w2 w3 w4".as_bytes());
        write("binary.txt", &[0xff, 0xfe, 0, 1]);
        write("ids.txt", b"1,2, 3\n4");
        // Fits one of the models, and none.
        write("placement.json", br#"{"devices": 2, "layers": [[0, 1, 1, 0, 0, 1, 1, 0]]}"#);
        write("layers.json", br#"{"devices": 3, "layers": [[0, 1, 2, 2], [0, 1, 2, 2], [2, 1, 0, 0]]}"#);
        std::fs::create_dir(ready.file("empty")).unwrap();
        let [model, text] = [&ready.model, &ready.texts[0]].map(|path| path.to_str().unwrap());
        let [trace, routes] = ["trace.safetensors", "routes.safetensors"].map(|name| ready.file(name));
        let [trace, routes] = [&trace, &routes].map(|path| path.to_str().unwrap());
        let made = [
            run(&["trace", "--model", model, "--text", text, "--out", trace]),
            run(&["route", "--logits", trace, "--capacity-factor", "1", "--out", routes]),
        ];
        made.iter().for_each(|ran| answer::good(ran).unwrap());
        if !ready.file("model.safetensors").exists() {
            std::fs::copy(trace, ready.file("model.safetensors")).unwrap();
        }
        let before = files(&ready);
        Self { ready, before }
    }

    fn words(&self, mix: &Mix) -> Vec<String> {
        let word = |word: &String| match word.strip_prefix('@') {
            Some("@") => self.ready.model.to_str().unwrap().to_owned(),
            Some(name) => self.ready.file(name).to_str().unwrap().to_owned(),
            None => word.replace('\0', "\u{1}"), // No word of a command line can hold a NUL.
        };
        mix.words.iter().map(word).collect()
    }
}

fn files(ready: &Ready) -> BTreeMap<PathBuf, (u64, SystemTime)> {
    let entries = std::fs::read_dir(ready.directory.path()).unwrap();
    let file = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.unwrap();
        let metadata = entry.metadata().unwrap();
        metadata.is_file().then(|| (entry.path(), (metadata.len(), metadata.modified().unwrap())))
    };
    entries.filter_map(file).collect()
}

/// What belongs to the code, and that no file of before has changed. Files that may be written over are put back.
fn check(place: &mut Option<Place>, mix: &Mix) -> Result<(), String> {
    let here = place.get_or_insert_with(|| Place::new(MODELS[mix.model]));
    let words = here.words(mix);
    let ran = run(&words);
    let full = words.iter().any(|word| word == "/dev/full");
    let result = answer::result_or_line(&ran, |line| answer::is_not_finite(line) || full);
    let after = files(&here.ready);
    let new: Vec<&PathBuf> = after.keys().filter(|path| !here.before.contains_key(*path)).collect();
    let out = here.ready.file(OUTS[0]);
    let checked = result.and_then(|result| {
        let is_json = words.iter().any(|word| word == "--json");
        let writes = matches!(words[0].as_str(), "trace" | "logits") || words.iter().any(|word| word == "--help");
        let own_output = words.iter().any(|word| word == "/dev/stdout");
        match result {
            true if own_output => {}
            true if is_json && !writes => drop(answer::json(&ran)?),
            true if ran.stdout.is_empty() || words[0] == "generate" => {}
            true => answer::table(&ran)?,
            false => {}
        }
        let unexpected = new.iter().find(|path| !result || **path != &out);
        if let Some(path) = unexpected {
            return Err(format!("code {:?}, left {} behind", ran.code, path.display()));
        }
        match result && out.exists() {
            true if words.iter().any(|word| word == "--report") => answer::page(&out)?,
            true if words[0] == "place" => answer::placement(&out)?,
            true => drop(answer::tensors(&out)?),
            false => {}
        }
        Ok(())
    });
    // What is no input of a run may be its output.
    let outputs: BTreeSet<PathBuf> = words.iter().map(PathBuf::from).filter(|word| !is_input(&words, word)).collect();
    let changed = here.before.iter().find(|(path, stamp)| after.get(*path) != Some(stamp));
    let checked = match changed {
        Some((path, _)) if !outputs.contains(path) => Err(format!("code {:?}, changed {}", ran.code, path.display())),
        _ => checked,
    };
    if changed.is_some() || checked.is_err() {
        *place = None;
    } else {
        let _ = std::fs::remove_file(out);
    }
    checked
}

/// Files of a model's directory that a run on it may read.
const MODEL_FILES: [&str; 3] = ["config.json", "model.safetensors", "tokenizer.json"];

/// True for a path that the run reads: named by an option that is not for output, or of the model that is named.
fn is_input(words: &[String], path: &Path) -> bool {
    let is_of_a_model = path.file_name().is_some_and(|name| MODEL_FILES.iter().any(|file| name == *file));
    words.windows(2).any(|pair| {
        let (option, given) = (pair[0].as_str(), Path::new(&pair[1]));
        // Beside a GGUF file lies its tokenizer at most.
        let model = match given.is_file() {
            true => given.parent().filter(|_| !path.ends_with("model.safetensors")),
            false => Some(given),
        };
        let reads = ["--model", "--text", "--logits", "--trace", "--ids-file", "--placement", "--prompt-file"]
            .contains(&option);
        (reads && given == path) || (option == "--model" && is_of_a_model && path.parent() == model)
    })
}

#[test]
fn any_mixture_of_options_gives_a_result_or_one_clear_line() {
    let options: Vec<(&str, Vec<(&'static str, Kind)>)> =
        COMMANDS.iter().map(|command| (*command, options_of(command))).collect();
    let mut random = ChaCha8Rng::seed_from_u64(runner::seed());
    let mixes: Vec<Mix> = (0..CASES * runner::times())
        .map(|_| {
            let (command, options) = options.choose(&mut random).unwrap();
            mix(&mut random, command, options)
        })
        .collect();
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let places: Vec<Mutex<[Option<Place>; MODELS.len()]>> = (0..workers).map(|_| Default::default()).collect();
    runner::all("mixes", &mixes, |worker, mix| check(&mut places[worker].lock().unwrap()[mix.model], mix));
}
