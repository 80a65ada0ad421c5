//! Experts over the processes that `mpirun` starts: the answers of one process, each rank with its own experts, and an end with a word
//! where something goes wrong. Built with feature `mpi` alone; without `mpirun` a line says that nothing was tried.
#![cfg(feature = "mpi")]

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_phase-moe");

/// More than any run here takes; what is not done then hangs.
const PATIENCE: Duration = Duration::from_secs(300);

/// `mpirun`, as root and with more ranks than cores too; none where it is not installed.
fn mpirun() -> Option<Command> {
    let found = Command::new("mpirun").arg("--version").output().is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("skipped: there is no mpirun here");
        return None;
    }
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]).env("RAYON_NUM_THREADS", "1");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Some(command)
}

/// Waits for a command, and ends it where it hangs.
fn finished(mut command: Command) -> Output {
    let mut child = command.spawn().unwrap();
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("{command:?} hangs");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.wait_with_output().unwrap()
}

/// Runs the command on so many ranks, if it can.
fn on_ranks(ranks: usize, arguments: &[&str]) -> Option<Output> {
    let mut command = mpirun()?;
    command.args(["-n", &ranks.to_string(), PROGRAM]).args(arguments);
    Some(finished(command))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", text(&output.stdout)))
}

fn alone(arguments: &[&str]) -> Value {
    json(&Command::new(PROGRAM).args(arguments).env("RAYON_NUM_THREADS", "1").output().unwrap())
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("`{key}` of {value}"))
}

fn loads(row: &Value) -> Vec<u64> {
    let layers = row["loads"].as_array().unwrap().iter().flat_map(|layer| layer.as_array().unwrap());
    layers.map(|load| load.as_u64().unwrap()).collect()
}

#[test]
fn ranks_compare_as_one_process_does_and_are_filled_exactly() {
    let common =
        ["--quiet", "compare", "--tokens", "3000", "--router", "top-k,phase,top-k-arrival", "--loads", "--json"];
    for ranks in [2, 3, 4] {
        let (count, extra) = (ranks.to_string(), ["--expert-parallel"]);
        let Some(output) = on_ranks(ranks, &[&common[..], &extra].concat()) else { return };
        let (ours, one) = (json(&output), alone(&[&common[..], &["--devices", &count]].concat()));
        let off = number(&ours["dropless"], "perplexity") / number(&one["dropless"], "perplexity") - 1.0;
        assert!(off.abs() <= 1e-4, "{ranks} ranks: dropless off by {off}");
        let (ours, one) = (ours["rows"].as_array().unwrap(), one["rows"].as_array().unwrap());
        assert_eq!((ours.len(), one.len()), (3, 3));
        for (ours, one) in ours.iter().zip(one) {
            let what = format!("{ranks} ranks, {}", ours["router"]);
            assert_eq!((&ours["router"], &ours["survival"]), (&one["router"], &one["survival"]), "{what}");
            let off = number(ours, "perplexity") / number(one, "perplexity") - 1.0;
            assert!(off.abs() <= 1e-3, "{what}: perplexity off by {off}");
            let (loads, expected) = (loads(ours), loads(one));
            let moved = loads.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b)).sum::<u64>() / 2;
            // Sums over experts differ in their last bits, and `phase` has several assignments within its certificate.
            let most = if ours["router"] == "phase" { 10 } else { 1 };
            assert!(moved * 1000 <= most * loads.iter().sum::<u64>(), "{what}: {moved} slots elsewhere");
            assert_eq!(ours["ranks"], ranks, "{what}");
            assert!(one["ranks"].is_null(), "{what}");
            let of_ranks: Vec<u64> =
                ours["rank_loads"].as_array().unwrap().iter().map(|load| load.as_u64().unwrap()).collect();
            assert_eq!((of_ranks.len(), of_ranks.iter().sum::<u64>()), (ranks, loads.iter().sum()), "{what}");
            assert!(number(ours, "bytes_exchanged_per_token") > 0.0, "{what}");
            assert!((0.0..1.0).contains(&number(ours, "exchange_share_of_time")), "{what}");
        }
        let straggler = |name: &str| number(ours.iter().find(|row| row["router"] == name).unwrap(), "straggler_ratio");
        assert!(straggler("phase") <= 1.01, "{ranks} ranks: {}", straggler("phase"));
        assert!(straggler("top-k") > straggler("top-k-arrival") && straggler("top-k-arrival") > 1.01);
    }
}

#[test]
fn ranks_of_unequal_speed_hold_and_take_what_they_can() {
    let arguments = ["--quiet", "compare", "--tokens", "3000", "--router", "phase", "--expert-parallel", "--json"];
    let run = |extra: &[&str]| Some(json(&on_ranks(2, &[&arguments[..], extra].concat())?));
    let Some(by_speed) = run(&["--device-speeds", "3,1"]) else { return };
    let row = &by_speed["rows"][0];
    let of_ranks: Vec<f64> = row["rank_loads"].as_array().unwrap().iter().map(|load| load.as_f64().unwrap()).collect();
    assert!((of_ranks[0] / of_ranks[1] - 3.0).abs() < 0.03, "{of_ranks:?}");
    assert!(number(row, "straggler_ratio") <= 1.01 && number(row, "perplexity_increase") <= 0.005, "{row}");
    let equal = run(&["--device-speeds", "3,1", "--placement", "equal"]).unwrap();
    assert!(number(&equal["rows"][0], "perplexity_increase") > number(row, "perplexity_increase"));
}

#[test]
fn texts_are_the_same_and_one_rank_writes_them() {
    let common = ["--quiet", "generate", "--prompt", "And it came to pass", "--new-tokens", "24"];
    let one = Command::new(PROGRAM).args(common).output().unwrap();
    for extra in [&[][..], &["--expert-cache", "2MiB"], &["--expert-cache", "1MiB", "--router", "cache"]] {
        let arguments = [&common[..], &["--expert-parallel"], extra].concat();
        let Some(output) = on_ranks(3, &arguments) else { return };
        assert!(output.status.success(), "{}", text(&output.stderr));
        if !extra.contains(&"cache") {
            assert_eq!(text(&output.stdout), text(&one.stdout), "{extra:?}");
        }
        let figures = text(&output.stderr);
        assert_eq!(figures.matches("3 ranks, the slowest with ").count(), 1, "{figures}");
    }
    // Several texts: each rank has some of them.
    let several = ["generate", "--prompt", "In the beginning", "--prompt", "fn main", "--new-tokens", "9", "--json"];
    let one = alone(&several);
    let both = json(&on_ranks(2, &[&several[..], &["--expert-parallel"]].concat()).unwrap());
    assert_eq!((&both["texts"], &both["ranks"]), (&one["texts"], &Value::from(2)));
}

#[test]
fn mistakes_are_told_once() {
    let cases: [(&[&str], &str); 4] = [
        (
            &["compare", "--expert-parallel", "--devices", "3"],
            "phase-moe: --expert-parallel: expected as many devices as ranks, 2, got 3",
        ),
        (&["compare", "--expert-parallel", "--capacity-factor", "x"], "invalid value 'x'"),
        (&["compare", "--expert-parallel", "--model", "no/such/place/here"], "phase-moe: --model no/such/place/here"),
        (
            &["generate", "--expert-parallel", "--chat"],
            "expected --prompt or a --prompt-file, which all ranks can read, got standard input",
        ),
    ];
    for (arguments, message) in cases {
        let Some(output) = on_ranks(2, arguments) else { return };
        let said = text(&output.stderr);
        assert!(!output.status.success() && said.matches(message).count() == 1, "{arguments:?}: {said}");
        assert!(output.stdout.is_empty() || !text(&output.stdout).contains('{'), "{}", text(&output.stdout));
    }
}

/// One rank in each directory, with the same command line.
fn in_directories(directories: [&Path; 2], arguments: &[&str]) -> Option<Output> {
    let mut command = mpirun()?;
    for (at, directory) in directories.iter().enumerate() {
        command.args(if at > 0 { &[":"][..] } else { &[] });
        command.args(["-n", "1", "--wdir", directory.to_str().unwrap(), PROGRAM]).args(arguments);
    }
    Some(finished(command))
}

#[test]
fn ranks_that_are_not_alike_end_with_a_word() {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let [first, second, nothing] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let copy = |from: &str, to: &Path| {
        std::fs::create_dir(to.join("model")).unwrap();
        for file in ["config.json", "model.safetensors", "tokenizer.json"] {
            let _ = std::fs::copy(root.join(from).join(file), to.join("model").join(file));
        }
    };
    copy("models/tiny-moe", first.path());
    copy("models/tiny-moe", second.path());
    // The same shapes, another weight.
    let file = second.path().join("model/model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[header] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let arguments = ["compare", "--model", "model", "--tokens", "512", "--expert-parallel", "--json"];
    let Some(output) = in_directories([first.path(), second.path()], &arguments) else { return };
    let said = text(&output.stderr);
    assert!(!output.status.success() && said.matches("phase-moe: rank 1: model: expected ").count() == 1, "{said}");
    // A model that one rank alone lacks.
    let output = in_directories([first.path(), nothing.path()], &arguments).unwrap();
    let said = text(&output.stderr);
    assert!(!output.status.success() && said.contains("phase-moe: rank 1: --model model"), "{said}");
    // Another command line.
    let mut command = mpirun().unwrap();
    for (at, tokens) in ["512", "1024"].into_iter().enumerate() {
        command.args(if at > 0 { &[":"][..] } else { &[] });
        command.args(["-n", "1", PROGRAM, "compare", "--expert-parallel", "--tokens", tokens]);
    }
    let said = text(&finished(command).stderr);
    assert!(
        said.contains(
            "phase-moe: rank 1: command line: expected compare --expert-parallel --tokens 512 as on rank 0, got "
        ),
        "{said}"
    );
}

/// Processes that `parent` started.
fn children(parent: u32) -> Vec<i32> {
    let of = |stat: String| {
        let rest = stat.rsplit_once(')')?.1;
        (rest.split_whitespace().nth(1)?.parse::<u32>().ok()? == parent)
            .then(|| stat.split(' ').next()?.parse().ok())?
    };
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(|entry| Some(entry.ok()?.path().join("stat")));
    let mut found: Vec<i32> = processes.filter_map(|stat| std::fs::read_to_string(stat).ok()).filter_map(of).collect();
    found.sort_unstable();
    found
}

#[cfg(target_os = "linux")]
#[test]
fn a_rank_that_is_killed_ends_the_job() {
    let Some(mut command) = mpirun() else { return };
    // Far more than is run before the signal comes.
    command.args(["-n", "3", PROGRAM, "--quiet", "compare", "--expert-parallel"]);
    let mut job = command.spawn().unwrap();
    let ticks = |process: i32| {
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        let used = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(11)?.parse::<u64>().ok());
        used.unwrap_or(0)
    };
    let started = Instant::now();
    // Where each has computed for a second, the model runs.
    let ranks = loop {
        let ranks = children(job.id());
        if ranks.len() == 3 && ranks.iter().all(|&rank| ticks(rank) > 100) {
            break ranks;
        }
        assert!(started.elapsed() < PATIENCE && job.try_wait().unwrap().is_none(), "the job did not start");
        std::thread::sleep(Duration::from_millis(20));
    };
    let process = rustix::process::Pid::from_raw(ranks[1]).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
    while job.try_wait().unwrap().is_none() {
        assert!(started.elapsed() < PATIENCE, "the others wait for ever");
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = job.wait_with_output().unwrap();
    let said = text(&output.stderr) + &text(&output.stdout);
    assert!(!output.status.success() && said.contains("signal 9") && said.contains("rank 1"), "{said}");
    for rank in ranks {
        assert!(!Path::new(&format!("/proc/{rank}/exe")).exists(), "rank of process {rank} goes on");
    }
}
