//! The numbers of threads of a run.

/// Candle takes its numbers of threads from the environment alone, so the program starts over with them. Candle's second pool,
/// which waits by spinning, stays off unless the environment names its size.
pub fn fix_threads(threads: Option<usize>) -> std::io::Result<()> {
    let (products, rest) = ("RAYON_NUM_THREADS", "CANDLE_NUM_THREADS");
    let set = |name| std::env::var(name).ok();
    let wanted = match threads.map(|threads| threads.to_string()).or_else(|| set(products)) {
        Some(wanted) => wanted,
        None => std::thread::available_parallelism()?.to_string(),
    };
    let others = set(rest).unwrap_or("1".into());
    if set(products).as_ref() == Some(&wanted) && set(rest).as_ref() == Some(&others) {
        return Ok(());
    }
    let mut again = std::process::Command::new(std::env::current_exe()?);
    let status = again.args(std::env::args_os().skip(1)).env(products, wanted).env(rest, others).status()?;
    std::process::exit(status.code().unwrap_or(1));
}
