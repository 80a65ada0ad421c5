//! Runs of the built command: many at a time, in bounded memory, under a watchdog.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Debug;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};

/// No run of a tiny model takes a hundredth of it: longer is a hang.
const HANG: Duration = Duration::from_secs(60);

/// Address space of a run: far above what any of these models needs, far below what a wrong count asks for.
const MEMORY_BYTES: u64 = 4 << 30;

/// What a run left.
pub struct Ran {
    /// None where a signal ended it.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub hung: bool,
}

/// When the runs that are under way began.
static UNDER_WAY: Mutex<BTreeMap<i32, Instant>> = Mutex::new(BTreeMap::new());

/// Limits this process and so those it starts, and begins to watch them.
fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let limit = Rlimit { current: Some(MEMORY_BYTES), ..getrlimit(Resource::As) };
        setrlimit(Resource::As, limit).expect("a lower limit");
        std::thread::spawn(|| {
            loop {
                std::thread::sleep(Duration::from_secs(1));
                for (&pid, _) in UNDER_WAY.lock().unwrap().iter().filter(|(_, began)| began.elapsed() > HANG) {
                    let _ = Pid::from_raw(pid).map(|pid| kill_process(pid, Signal::KILL));
                }
            }
        });
    });
}

/// Runs the command with nothing on standard input.
pub fn run<S: AsRef<OsStr>>(arguments: &[S]) -> Ran {
    watch();
    let mut command = Command::new(env!("CARGO_BIN_EXE_phase-moe"));
    // As the command sets them before it starts itself over, which is then saved; see `Global::apply`.
    command.args(arguments).env("RAYON_NUM_THREADS", "1").env("CANDLE_NUM_THREADS", "1");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let began = Instant::now();
    let child = command.spawn().expect("the built command");
    let pid = i32::try_from(child.id()).expect("a process id");
    UNDER_WAY.lock().unwrap().insert(pid, began);
    let output = child.wait_with_output();
    UNDER_WAY.lock().unwrap().remove(&pid);
    let output = output.expect("what the command wrote");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ran {
        code: output.status.code(),
        stdout: text(&output.stdout),
        stderr: text(&output.stderr),
        hung: began.elapsed() > HANG,
    }
}

/// Does all `jobs`, as many at a time as there are cores. A job that is not as it should be gives what is wrong.
pub fn all<J: Sync + Debug>(what: &str, jobs: &[J], job: impl Fn(usize, &J) -> Result<(), String> + Sync) {
    assert!(!jobs.is_empty(), "{what}: nothing to do");
    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for worker in 0..workers {
            let (next, wrong, job) = (&next, &wrong, &job);
            scope.spawn(move || {
                // Relaxed: the counter hands out numbers and orders nothing else.
                while let Some((index, case)) = next_of(jobs, next.fetch_add(1, Ordering::Relaxed)) {
                    if index > 0 && index % 10_000 == 0 {
                        eprintln!("{what}: {index} of {}, {} wrong", jobs.len(), wrong.lock().unwrap().len());
                    }
                    if let Err(message) = job(worker, case) {
                        wrong.lock().unwrap().push(format!("{case:?}\n    {message}"));
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    eprintln!("{what}: {} done, {} wrong", jobs.len(), wrong.len());
    let most = number("PHASE_MOE_SHOWN", 20) as usize;
    let shown = wrong.iter().take(most).map(String::as_str).collect::<Vec<_>>().join("\n");
    assert!(wrong.is_empty(), "{what}: {} of {} are wrong, the first of them:\n{shown}", wrong.len(), jobs.len());
}

fn next_of<J>(jobs: &[J], index: usize) -> Option<(usize, &J)> {
    jobs.get(index).map(|job| (index, job))
}

/// A number from the environment.
fn number(name: &str, default: u64) -> u64 {
    let parse = |text: String| text.parse().unwrap_or_else(|_| panic!("{name} is {text}: expected a whole number"));
    std::env::var(name).map_or(default, parse)
}

/// How many times as many cases as usual.
pub fn times() -> usize {
    number("PHASE_MOE_CASES", 1) as usize
}

/// What they are drawn by.
pub fn seed() -> u64 {
    number("PHASE_MOE_SEED", 0)
}
