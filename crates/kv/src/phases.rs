//! Where does a decode step over compressed layers spend its time?

use std::time::Duration;

/// Time that a cache waited for the phases of attention over compressed segments, in all layers and steps, and for its
/// update buffers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Phases {
    /// Queries are turned into the segments' channels, and sinks and update buffer attended to.
    pub turn: Duration,
    /// Block keys or sketches are scored.
    pub score: Duration,
    /// Blocks or tiles are selected.
    pub select: Duration,
    /// What was selected is attended to.
    pub attend: Duration,
    /// Outputs leave the segments' channels and are merged.
    pub merge: Duration,
    /// The oldest tokens of full update buffers are packed.
    pub flush: Duration,
}

impl Phases {
    pub(crate) fn add(&mut self, more: Phases) {
        self.turn += more.turn;
        self.score += more.score;
        self.select += more.select;
        self.attend += more.attend;
        self.merge += more.merge;
        self.flush += more.flush;
    }

    /// About what was waited for, if these are the times of so many threads together: that they end at different times is left out.
    pub(crate) fn divided(self, threads: usize) -> Phases {
        let part = |time: Duration| time / threads as u32;
        Phases {
            turn: part(self.turn),
            score: part(self.score),
            select: part(self.select),
            attend: part(self.attend),
            merge: part(self.merge),
            flush: part(self.flush),
        }
    }
}
