//! What compressing a layer needs to know and no other layer changes, worked out while later layers still read the prompt (arXiv
//! 2607.00760, s. 5: layer `i - 1` beside layer `i`). The plan, which shares out bytes among all layers, waits for the last one.

use super::encode::Job;
use super::importance::Samples;
use super::plan::Head;
use super::window::Newest;
use super::{Calibration, Scales};
use crate::KvShape;
use crate::exact::ExactHead;
use mosaickv_kernels::Pool;
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

/// A layer that has all of its prompt.
#[derive(Debug)]
pub(crate) struct Complete {
    pub(crate) layer: usize,
    pub(crate) heads: Vec<ExactHead>,
    pub(crate) samples: Samples,
}

/// What is known of a layer's heads, of the tokens that are to be planned.
#[derive(Debug)]
pub(crate) struct Known {
    pub(super) layer: usize,
    pub(super) tokens: Range<usize>,
    pub(super) heads: Vec<(Scales, Head)>,
}

/// A thread that takes one layer after the other.
#[derive(Debug)]
pub(crate) struct Early {
    layers: mpsc::Sender<Complete>,
    /// No further layer is to be begun: others have more threads.
    ends: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Known>>,
}

impl Early {
    /// On so many threads.
    pub(crate) fn new(threads: usize, shape: KvShape, calibration: Arc<Calibration>) -> Early {
        let (layers, complete) = mpsc::channel::<Complete>();
        let thread = thread::Builder::new().name("mosaickv-observe".to_owned());
        let ends = Arc::new(AtomicBool::new(false));
        let ended = ends.clone();
        let thread = thread.spawn(move || {
            let pool = Pool::new(threads);
            let wanted = complete.into_iter().take_while(|_| !ended.load(Ordering::Relaxed));
            wanted.map(|layer| known(&pool, shape, &calibration, layer)).collect()
        });
        Early { layers, ends, thread: thread.expect("the system refused a thread") }
    }

    /// Another layer.
    pub(crate) fn add(&self, layer: Complete) {
        // If the thread panicked, `finish` tells.
        let _ = self.layers.send(layer);
    }

    /// What is known of layers that were begun.
    pub(crate) fn finish(self) -> Vec<Known> {
        self.ends.store(true, Ordering::Relaxed);
        drop(self.layers);
        self.thread.join().unwrap_or_else(|panic| resume_unwind(panic))
    }
}

fn known(pool: &Pool, shape: KvShape, calibration: &Arc<Calibration>, of: Complete) -> Known {
    let Complete { layer, heads, samples } = of;
    // Which tokens are the newest depends on no bits.
    let newest = Newest::new(heads[0].tokens(), 0.0, (layer, shape.layers));
    let jobs = Job::of_layer((layer, &heads[..]), &samples, (shape, calibration), newest);
    let tokens = jobs[0].middle();
    let mut found: Vec<_> = jobs.iter().map(|_| None).collect();
    pool.for_each(&mut found, |g, found| *found = Some(jobs[g].observe()));
    Known { layer, tokens, heads: found.into_iter().flatten().collect() }
}
