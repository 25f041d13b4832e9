//! How far is it, for somebody who waits?
//!
//! A bar on stderr when that is a terminal; otherwise a line at the start and at every quarter, for log files.

use std::io::{self, IsTerminal};

use indicatif::{ProgressBar, ProgressStyle};

/// One piece of work of known size, in bytes.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    what: &'static str,
    total: u64,
    quarters: u64,
}

impl Progress {
    /// Announces `what`; `total` bytes are to come.
    pub(super) fn start(what: &'static str, total: u64) -> Progress {
        assert!(total > 0, "{what}: no bytes to wait for");
        let bar = io::stderr().is_terminal().then(|| {
            let template = "{msg:12} [{bar:32}] {bytes:>9} / {total_bytes} {bytes_per_sec:>11} {eta:>4}";
            let style = ProgressStyle::with_template(template).expect("a template known at compile time");
            ProgressBar::new(total).with_style(style.progress_chars("=> ")).with_message(what)
        });
        if bar.is_none() {
            eprintln!("{what}: {:.1} MB", total as f64 / 1e6);
        }
        Progress { bar, what, total, quarters: 0 }
    }

    /// `done` bytes of the total are there; more than the total counts as the total.
    pub(super) fn reached(&mut self, done: u64) {
        let done = done.min(self.total);
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        } else if done * 4 / self.total > self.quarters {
            self.quarters = done * 4 / self.total;
            eprintln!("{}: {} %", self.what, self.quarters * 25);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }
}
