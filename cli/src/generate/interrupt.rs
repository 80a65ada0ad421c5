//! Ctrl-C in a conversation: it stops an answer, and ends the command where none is under way or where it comes twice.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;

/// What Ctrl-C is to do now. No data hangs on these flags but themselves.
pub struct Interrupt {
    asked: Arc<AtomicBool>,
    /// No answer is under way.
    idle: Arc<AtomicBool>,
}

/// While it lives, Ctrl-C stops the answer.
pub struct Answering<'a>(&'a Interrupt);

impl Interrupt {
    /// Takes the signal over, where there are signals.
    pub fn new() -> Result<Self> {
        let (asked, idle) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(true)));
        #[cfg(unix)]
        {
            use signal_hook::{consts::SIGINT, flag};
            // In this order: the second signal finds what the first one set.
            flag::register_conditional_default(SIGINT, idle.clone())?;
            flag::register_conditional_default(SIGINT, asked.clone())?;
            flag::register(SIGINT, asked.clone())?;
        }
        Ok(Self { asked, idle })
    }

    /// An answer begins.
    pub fn answering(&self) -> Answering<'_> {
        self.asked.store(false, Ordering::Relaxed);
        self.idle.store(false, Ordering::Relaxed);
        Answering(self)
    }

    /// True once the answer is to stop.
    pub fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }
}

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        self.0.idle.store(true, Ordering::Relaxed);
    }
}
