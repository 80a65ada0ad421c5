//! Where a chat template is rendered: it comes with a model's files, and may ask for more than there is.

use std::io;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// What the engine does in steps, it counts; this is for what it does in one.
const MAX_TIME: Duration = Duration::from_secs(30);
/// A list may hold a list and so on, as often as the engine has steps for it. Address space alone, where it does not.
const STACK: usize = 512 << 20;

/// What `work` gives, or which limit it passed. It goes on in that case, to end with the process.
pub fn bounded<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    let (sender, receiver) = channel();
    let spawned = std::thread::Builder::new().name("chat template".into()).stack_size(STACK).spawn(move || {
        // Nobody listens once the time is over.
        let _ = sender.send(work());
    });
    spawned.map_err(|error: io::Error| format!("no thread to render it: {error}"))?;
    receiver.recv_timeout(MAX_TIME).map_err(|error| match error {
        RecvTimeoutError::Timeout => format!("does not end within {} seconds", MAX_TIME.as_secs()),
        RecvTimeoutError::Disconnected => "the engine failed on it".into(),
    })
}
