//! How does a decode step use every core, two hundred times a token?
//!
//! A small pool whose workers spin for a moment between jobs before they sleep: a join costs a few microseconds
//! instead of a futex round trip. Tasks are claimed one by one, so uneven ones balance; what a task computes
//! must not depend on who runs it, so results do not depend on the number of threads. Nobody waits for a worker that
//! came too late to claim a task: on a machine with other work it may have no core.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};

/// Iterations of a spinning wait before a worker sleeps: about 100 microseconds.
const SPINS: usize = 4_000;

/// A bit above any number of workers.
const OPEN: usize = 1 << 31;

/// A fixed set of threads that run one job at a time; the caller of a job is one of them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    sleepers: Vec<Thread>,
    /// Held for the length of a job, so that a pool shared by two callers runs their jobs in turn.
    turn: Mutex<()>,
}

struct Shared {
    /// Counts jobs; a change wakes the workers.
    epoch: Line<AtomicUsize>,
    /// Workers inside the current job, and [`OPEN`] as long as more may enter.
    gate: Line<AtomicUsize>,
    next: Line<AtomicUsize>,
    /// Written while the gate is closed and nobody inside, read by those inside.
    job: UnsafeCell<Option<Job>>,
    /// Workers that sleep, or are about to.
    asleep: AtomicUsize,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: the job is only touched as told there, and the gate orders writers and readers; the job's closure is `Sync`, and `Pool::run`
// keeps it alive until the last worker inside has left.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

/// What many cores write, apart from what others do.
#[repr(align(128))]
#[derive(Default)]
struct Line<T>(T);

#[derive(Clone, Copy)]
struct Job {
    tasks: usize,
    /// Borrowed from the stack of `Pool::run`, which does not return before every worker that entered is done with it.
    body: *const (dyn Fn(usize) + Sync),
}

impl Pool {
    /// A pool of `threads` threads in all, the caller included. Panics if `threads` is 0.
    pub fn new(threads: usize) -> Pool {
        assert!(threads > 0, "a pool needs at least one thread, got 0");
        let shared = Arc::new(Shared {
            epoch: Line::default(),
            gate: Line::default(),
            next: Line::default(),
            job: UnsafeCell::new(None),
            asleep: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let workers: Vec<_> = (1..threads)
            .map(|i| {
                let shared = Arc::clone(&shared);
                thread::Builder::new()
                    .name(format!("mosaickv-{i}"))
                    .spawn(move || work(&shared))
                    .expect("the system refused a worker thread")
            })
            .collect();
        let sleepers = workers.iter().map(|w| w.thread().clone()).collect();
        Pool { shared, workers, sleepers, turn: Mutex::new(()) }
    }

    /// Threads in all, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `body(task)` once for each task below `tasks`, on any thread, and returns when all are done.
    /// Must not be called from inside a task. A panic in a task is passed on to the caller.
    pub fn run(&self, tasks: usize, body: impl Fn(usize) + Sync) {
        if tasks <= 1 || self.workers.is_empty() {
            (0..tasks).for_each(body);
            return;
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        let body: &(dyn Fn(usize) + Sync) = &body;
        // SAFETY: only the lifetime is forgotten; this function waits below until no worker uses the borrow, and none
        // can begin to.
        let body = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync), *const (dyn Fn(usize) + Sync + 'static)>(
                body,
            )
        };
        let job = Job { tasks, body };
        // SAFETY: the last job ended with its gate closed and nobody inside, and this one's turn is ours.
        unsafe { *shared.job.get() = Some(job) };
        shared.next.0.store(0, Ordering::Relaxed);
        shared.gate.0.store(OPEN, Ordering::Release);
        self.wake();
        shared.claim_all(job);
        shared.gate.0.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0;
        while shared.gate.0.load(Ordering::Acquire) != 0 {
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { thread::yield_now() }
        }
        if let Some(payload) = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take() {
            resume_unwind(payload);
        }
    }

    /// Begins the next epoch. Who is not asleep sees it by itself.
    fn wake(&self) {
        self.shared.epoch.0.fetch_add(1, Ordering::SeqCst);
        if self.shared.asleep.load(Ordering::SeqCst) > 0 {
            self.sleepers.iter().for_each(Thread::unpark);
        }
    }

    /// Calls `body(i, item)` once for each item, on any thread.
    pub fn for_each<T: Send>(&self, items: &mut [T], body: impl Fn(usize, &mut T) + Sync) {
        self.for_each_chunk(items, 1, |i, chunk| body(i, &mut chunk[0]));
    }

    /// Cuts `items` into chunks of `size` (the last may be shorter) and calls `body(i, chunk)` once for each.
    pub fn for_each_chunk<T: Send>(
        &self,
        items: &mut [T],
        size: usize,
        body: impl Fn(usize, &mut [T]) + Sync,
    ) {
        assert!(size > 0, "chunks need at least one item, got 0");
        let len = items.len();
        let start = SendPtr(items.as_mut_ptr());
        self.run(len.div_ceil(size), |i| {
            let at = i * size;
            // SAFETY: `run` gives each `i` once, so the chunks are disjoint parts of the borrowed `items`.
            let chunk = unsafe { std::slice::from_raw_parts_mut(start.get().add(at), size.min(len - at)) };
            body(i, chunk);
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.wake();
        for worker in self.workers.drain(..) {
            // A worker's panic was passed on by the job that it happened in.
            let _ = worker.join();
        }
    }
}

struct SendPtr<T>(*mut T);
impl<T> SendPtr<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}
// SAFETY: the tasks of `for_each_chunk` take disjoint ranges, and `T` is `Send`.
unsafe impl<T: Send> Sync for SendPtr<T> {}

impl Shared {
    /// The current job, once a worker is inside: none if all of its tasks are claimed.
    fn enter(&self) -> Option<Job> {
        let more = |gate| if gate & OPEN == 0 { None } else { Some(gate + 1) };
        self.gate.0.fetch_update(Ordering::AcqRel, Ordering::Relaxed, more).ok()?;
        // SAFETY: it was written before the gate opened, and is not again before this worker has left.
        unsafe { *self.job.get() }
    }

    fn claim_all(&self, job: Job) {
        // SAFETY: `Pool::run` keeps the closure alive until every worker that entered has left this function.
        let body = unsafe { &*job.body };
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let task = self.next.0.fetch_add(1, Ordering::Relaxed);
                if task >= job.tasks {
                    break;
                }
                body(task);
            }
        }));
        if let Err(payload) = result {
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
        }
    }
}

fn work(shared: &Shared) {
    let mut seen = 0;
    loop {
        wait(shared, seen);
        // Before `stop`, whose epoch is the last: seen first, it would be waited for in vain.
        seen = shared.epoch.0.load(Ordering::SeqCst);
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        // Whichever job is open now, perhaps a later one: while somebody is inside, none is replaced.
        if let Some(job) = shared.enter() {
            shared.claim_all(job);
            shared.gate.0.fetch_sub(1, Ordering::Release);
        }
    }
}

/// Waits for an epoch after this one.
fn wait(shared: &Shared, seen: usize) {
    let same = |order| shared.epoch.0.load(order) == seen;
    for _ in 0..SPINS {
        if !same(Ordering::Acquire) {
            return;
        }
        std::hint::spin_loop();
    }
    // Counted before the epoch is looked at again: who begins the next one after that look sees the count.
    shared.asleep.fetch_add(1, Ordering::SeqCst);
    while same(Ordering::SeqCst) {
        thread::park();
    }
    shared.asleep.fetch_sub(1, Ordering::SeqCst);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_threads() {
        for threads in 1..5 {
            let pool = Pool::new(threads);
            for tasks in [0, 1, 2, 7, 1000] {
                let mut seen = vec![0; tasks];
                pool.for_each(&mut seen, |i, n| *n += i + 1);
                assert!(
                    seen.iter().enumerate().all(|(i, &n)| n == i + 1),
                    "{threads} threads, {tasks} tasks"
                );
            }
        }
    }

    #[test]
    fn chunks_cover_the_slice() {
        let pool = Pool::new(3);
        let mut items = vec![0; 103];
        pool.for_each_chunk(&mut items, 10, |i, chunk| chunk.fill(i));
        assert!(items.iter().enumerate().all(|(at, &i)| i == at / 10));
    }

    /// Jobs in quick succession, more workers than cores: some come late to a job, and enter a later one or none.
    #[test]
    fn late_workers_run_no_task_twice() {
        let pool = Pool::new(9);
        let mut seen = vec![0; 6];
        for round in 1..3_000 {
            pool.for_each(&mut seen, |_, n| *n += 1);
            assert!(seen.iter().all(|&n| n == round), "round {round}: {seen:?}");
        }
    }

    #[test]
    fn a_pool_ends_whatever_its_workers_are_at() {
        for tasks in (0..2_000).map(|i| i % 5) {
            let pool = Pool::new(3);
            pool.run(tasks, |_| ());
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_survives() {
        let pool = Pool::new(2);
        let result = catch_unwind(AssertUnwindSafe(|| pool.run(10, |i| assert!(i != 5, "task five"))));
        assert!(result.is_err());
        let count = AtomicUsize::new(0);
        pool.run(10, |_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 10);
    }
}
