//! What does Ctrl-C do while a model is being fetched?
//!
//! For the length of a fetch SIGINT and SIGTERM only raise a flag, which the fetch polls: it ends pip, removes its
//! temporary folder and returns `Interrupted`. Before and after, the signals end the process as they always do.
//! A process cannot give its signals back to the system in safe Rust, so the default is imitated after the fetch.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use super::FetchError;

static REGISTERED: Mutex<Option<Registered>> = Mutex::new(None);

struct Registered {
    stop: Arc<AtomicBool>,
    /// While true, the signals do what they do by default.
    default: Arc<AtomicBool>,
}

/// A fetch under way; at its end the signals end the process again. One at a time.
pub(super) struct Watch {
    registered: MutexGuard<'static, Option<Registered>>,
    stop: Arc<AtomicBool>,
}

impl Watch {
    /// True once the process was asked to end.
    pub(super) fn flag(&self) -> &AtomicBool {
        &self.stop
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(registered) = self.registered.as_ref() {
            registered.default.store(true, Ordering::SeqCst);
        }
    }
}

/// Takes SIGINT and SIGTERM until the result is dropped.
pub(super) fn watch() -> Result<Watch, FetchError> {
    let mut registered = REGISTERED.lock().unwrap_or_else(PoisonError::into_inner);
    if registered.is_none() {
        *registered = Some(register().map_err(FetchError::io("answer signals for", "the fetch".as_ref()))?);
    }
    let taken = registered.as_ref().expect("registered above");
    taken.stop.store(false, Ordering::SeqCst);
    taken.default.store(false, Ordering::SeqCst);
    let stop = taken.stop.clone();
    Ok(Watch { registered, stop })
}

/// From now on somebody else answers the signals: what is registered here no longer ends the process.
pub fn hand_over() {
    if let Some(registered) = REGISTERED.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
        registered.default.store(false, Ordering::SeqCst);
    }
}

fn register() -> std::io::Result<Registered> {
    let (stop, default) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    for signal in [SIGINT, SIGTERM] {
        flag::register(signal, stop.clone())?;
        flag::register_conditional_default(signal, default.clone())?;
    }
    Ok(Registered { stop, default })
}
