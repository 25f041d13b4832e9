//! How is a whole step asked for at once? What its work writes and launches is noted instead of done, and then asked for together.
//!
//! What is written goes into a letter of page-locked memory, which one launch delivers before the others. The launches become a graph of the
//! device when the same ones, with the same parameters to the byte, come twice in a row, and the graph is launched as long as they are the same:
//! what follows from lengths, tables and pages is read from the device's memory and no parameter. The work is done anew each time, with
//! all that it checks; so a graph stands for launches that were just asked for, and none outlives what they use.

use super::aside::{Copied, Pinned};
use super::device::{Device, Error, Gpu, Kernel};
use super::gemm::Product;
use super::parameters::{DeliverParameters, DeliverPiece};
use std::cell::RefCell;
use std::fmt;
use std::ops::Range;

const DELIVER: Kernel = Kernel { name: "deliver", threads: 256 };

/// Blocks that deliver a letter.
const DELIVER_BLOCKS: usize = 128;

/// Bytes that a block delivers at a time.
const PIECE: usize = 4096;

/// Bytes of a letter at first.
const LETTER: usize = 1 << 20;

/// Bytes of a letter before what is to be delivered: how many pieces, and where they are told.
const HEAD: usize = 16;

/// What is asked for together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tape {
    asked: Vec<Noted>,
    /// Of all launches, one after the other.
    parameters: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq)]
enum Noted {
    Launch { kernel: Kernel, blocks: usize, shared: usize, parameters: Range<usize> },
    Multiply(Product),
}

/// One thing that is asked for.
#[derive(Clone, Copy, Debug)]
pub enum Asked<'a> {
    /// A launch of a kernel by so many blocks, with bytes of shared memory, and with these parameters.
    Launch(Kernel, usize, usize, &'a [u8]),
    /// A product.
    Multiply(&'a Product),
}

/// Launches that a device knows.
pub trait Captured: fmt::Debug + Send + Sync {
    /// Asks for all of them, in order.
    ///
    /// # Safety
    /// They may be asked for one by one now.
    unsafe fn launch(&self) -> Result<(), Error>;
}

impl Tape {
    /// In order.
    pub fn asked(&self) -> impl Iterator<Item = Asked<'_>> {
        self.asked.iter().map(|noted| match noted {
            Noted::Launch { kernel, blocks, shared, parameters } => {
                Asked::Launch(*kernel, *blocks, *shared, &self.parameters[parameters.clone()])
            }
            Noted::Multiply(product) => Asked::Multiply(product),
        })
    }

    /// Asks for one after the other.
    ///
    /// # Safety
    /// Each may be asked for.
    pub unsafe fn ask(&self, device: &dyn Device) -> Result<(), Error> {
        self.asked().try_for_each(|asked| match asked {
            // SAFETY: by the caller's promise.
            Asked::Launch(kernel, blocks, shared, parameters) => unsafe {
                device.launch(kernel, blocks, shared, parameters)
            },
            // SAFETY: as above.
            Asked::Multiply(product) => unsafe { device.multiply(product) },
        })
    }

    fn launch(&mut self, kernel: Kernel, (blocks, shared): (usize, usize), bytes: &[u8]) {
        let start = self.parameters.len();
        self.parameters.extend_from_slice(bytes);
        self.asked.push(Noted::Launch { kernel, blocks, shared, parameters: start..self.parameters.len() });
    }
}

/// What is to be delivered: page-locked memory, written from its head on, and what goes where.
#[derive(Debug)]
struct Letter {
    gpu: Gpu,
    memory: Pinned,
    used: usize,
    pieces: Vec<DeliverPiece>,
}

impl Letter {
    fn new(gpu: &Gpu) -> Result<Letter, Error> {
        Ok(Letter { gpu: gpu.clone(), memory: Pinned::new(gpu, LETTER)?, used: HEAD, pieces: vec![] })
    }

    /// Adds bytes of whole words, for as many at `to`.
    fn add(&mut self, to: u64, bytes: &[u8]) -> Result<(), Error> {
        assert!(to.is_multiple_of(4) && bytes.len().is_multiple_of(4), "{} bytes to {to}", bytes.len());
        let from = self.put(bytes)?;
        self.pieces.push(DeliverPiece { to, from: from as u32, bytes: bytes.len() as u32 });
        Ok(())
    }

    /// Where the bytes are.
    fn put(&mut self, bytes: &[u8]) -> Result<usize, Error> {
        let (at, end) = (self.used, self.used + bytes.len());
        assert!(end <= u32::MAX as usize, "a letter of {end} bytes");
        if end > self.memory.bytes() {
            let mut larger = Pinned::new(&self.gpu, 2 * end)?;
            larger.numbers_mut::<u8>(0, at).copy_from_slice(self.memory.numbers(0, at));
            self.memory = larger;
        }
        self.memory.numbers_mut::<u8>(at, bytes.len()).copy_from_slice(bytes);
        self.used = end.next_multiple_of(16);
        Ok(at)
    }

    /// Tells what goes where. What goes to one place twice is refused: nobody knows what comes last.
    fn close(&mut self) -> Result<DeliverParameters, Error> {
        self.pieces.sort_unstable_by_key(|piece| piece.to);
        let apart = |two: &[DeliverPiece]| two[0].to + u64::from(two[0].bytes) <= two[1].to;
        assert!(self.pieces.windows(2).all(apart), "something is written twice before one launch");
        let parts = |piece: &DeliverPiece| {
            let DeliverPiece { to, from, bytes } = *piece;
            (0..bytes).step_by(PIECE).map(move |at| DeliverPiece {
                to: to + u64::from(at),
                from: from + at,
                bytes: (bytes - at).min(PIECE as u32),
            })
        };
        let pieces: Vec<DeliverPiece> = self.pieces.iter().flat_map(parts).collect();
        let table = self.put(bytemuck::cast_slice(&pieces))?;
        self.memory.numbers_mut::<u64>(0, 2).copy_from_slice(&[pieces.len() as u64, table as u64]);
        (self.used, self.pieces) = (HEAD, vec![]);
        Ok(DeliverParameters { letter: self.memory.address() })
    }
}

/// What a thread notes.
struct Recording {
    gpu: Gpu,
    tape: Tape,
    letter: Letter,
}

thread_local! {
    static RECORDING: RefCell<Option<Recording>> = const { RefCell::new(None) };
}

/// What `note` makes of what this thread notes of the device; `None` if it notes nothing.
fn noting<T>(gpu: &Gpu, note: impl FnOnce(&mut Recording) -> T) -> Option<T> {
    RECORDING.with_borrow_mut(|recording| recording.as_mut().filter(|of| of.gpu.is(gpu)).map(note))
}

/// Notes a launch, or does not.
pub(super) fn note_launch(gpu: &Gpu, kernel: Kernel, grid: (usize, usize), bytes: &[u8]) -> bool {
    noting(gpu, |recording| recording.tape.launch(kernel, grid, bytes)).is_some()
}

/// Notes a product, or does not.
pub(super) fn note_product(gpu: &Gpu, product: &Product) -> bool {
    noting(gpu, |recording| recording.tape.asked.push(Noted::Multiply(*product))).is_some()
}

/// Notes what is written, or does not.
pub(super) fn note_write(gpu: &Gpu, to: u64, bytes: &[u8]) -> Option<Result<(), Error>> {
    noting(gpu, |recording| {
        assert!(recording.tape.asked.is_empty(), "written after a launch that is noted");
        recording.letter.add(to, bytes)
    })
}

/// What touches the device's memory at once may not follow what was only noted.
pub(super) fn check_order(gpu: &Gpu, address: u64, bytes: usize) {
    noting(gpu, |recording| {
        let is_apart = |piece: &DeliverPiece| {
            address + bytes as u64 <= piece.to || piece.to + u64::from(piece.bytes) <= address
        };
        let is_apart = recording.tape.asked.is_empty() && recording.letter.pieces.iter().all(is_apart);
        assert!(is_apart, "done at once after what is only noted");
    });
}

/// Stops noting, however the work ends; what was freed meanwhile goes back to the device at last.
struct Ending<'a>(&'a Gpu);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        RECORDING.with_borrow_mut(Option::take);
        self.0.let_go();
    }
}

/// Work that is asked for again and again, mostly the same.
#[derive(Debug)]
pub struct Graph {
    gpu: Gpu,
    /// What was asked for last.
    last: Tape,
    /// The same as a graph.
    captured: Option<Box<dyn Captured>>,
    captures: usize,
    letter: Option<Letter>,
    /// The end of what was asked for last, before which its letter stays as it is.
    end: Option<Box<dyn Copied>>,
}

impl Graph {
    /// Nothing was asked for yet.
    pub fn new(gpu: &Gpu) -> Graph {
        let (last, captured, letter, end) = Default::default();
        Graph { gpu: gpu.clone(), last, captured, captures: 0, letter, end }
    }

    /// Has the device do what `work` writes, each place once, and then what it launches and multiplies; if `work` fails, nothing of it. It may
    /// neither write after a launch nor read.
    pub fn run<T, E: From<Error>>(&mut self, work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        if let Some(end) = &self.end {
            end.wait()?;
            self.end = None;
        }
        let letter = match self.letter.take() {
            Some(letter) => letter,
            None => Letter::new(&self.gpu)?,
        };
        let gpu = self.gpu.clone();
        gpu.keep();
        let ending = Ending(&gpu);
        let recording = Recording { gpu: gpu.clone(), tape: Tape::default(), letter };
        let before = RECORDING.replace(Some(recording));
        assert!(before.is_none(), "work that is noted while other work is");
        let done = work()?;
        let recording = RECORDING.take().expect("only this function takes it");
        let Recording { mut tape, mut letter, .. } = recording;
        if !letter.pieces.is_empty() {
            tape.launch(DELIVER, (DELIVER_BLOCKS, 0), bytemuck::bytes_of(&letter.close()?));
            tape.asked.rotate_right(1);
        }
        // Where asking fails, the letter goes, which waits for who may be reading it, and nobody knows what of the tape was asked for.
        self.ask(tape).inspect_err(|_| (self.last, self.captured) = Default::default())?;
        self.letter = Some(letter);
        drop(ending);
        Ok(done)
    }

    fn ask(&mut self, tape: Tape) -> Result<(), Error> {
        let device = self.gpu.device();
        if tape != self.last {
            (self.last, self.captured) = (tape, None);
            // SAFETY: each was asked for by one who may, and all that has been freed since is still there.
            unsafe { self.last.ask(device) }?;
        } else {
            if self.captured.is_none() {
                // SAFETY: as above.
                self.captured = Some(unsafe { device.graph(&self.last) }?);
                self.captures += 1;
            }
            // SAFETY: as above.
            unsafe { self.captured.as_ref().expect("it was just made").launch() }?;
        }
        // SAFETY: it copies nothing.
        self.end = Some(unsafe { device.fetch(&[]) }?);
        Ok(())
    }

    /// How often the device made a graph.
    pub fn captures(&self) -> usize {
        self.captures
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.end.take().is_some_and(|end| end.wait().is_err()) {
            // Nobody knows whether it is still read.
            std::mem::forget(self.letter.take());
        }
    }
}

#[cfg(all(test, emulated))]
mod tests {
    use super::*;
    use crate::cuda::Buffer;
    use crate::cuda::dense::narrow;
    use crate::cuda::emulated::Emulated;
    use crate::cuda::gemm::{Into, Weights};
    use half::bf16;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    struct Bench {
        gpu: Gpu,
        x: Buffer,
        narrow: Buffer,
        out: Buffer,
        weights: Weights,
    }

    const COUNT: usize = 5000;

    /// A matrix that doubles eight numbers.
    fn bench() -> Bench {
        let gpu = Emulated::gpu(3);
        let twice = |row: usize, out: &mut [f32]| {
            out.fill(0.0);
            out[row] = 2.0;
        };
        let weights = Weights::new(&gpu, (8, 8), twice).unwrap();
        let (x, narrow) = (gpu.alloc(COUNT * 4).unwrap(), gpu.alloc(COUNT * 2).unwrap());
        let out = gpu.alloc(COUNT * 4).unwrap();
        Bench { gpu, x, narrow, out, weights }
    }

    impl Bench {
        /// Writes numbers, narrows `count` of them, and doubles those.
        fn work(&self, x: &[f32], count: usize) -> Result<(), Error> {
            // Not in one piece, and not all in sixteens of bytes.
            self.x.write(0, &x[..8])?;
            self.x.write(32, &x[8..9])?;
            self.x.write(36, &x[9..])?;
            narrow(&self.gpu, &self.x, count, &self.narrow)?;
            self.weights.multiply(&self.narrow, count / 8, &self.out, Into::F32)
        }

        fn doubled(&self, count: usize) -> Vec<f32> {
            self.out.read(count).unwrap()
        }
    }

    fn numbers(first: usize) -> Vec<f32> {
        (first..first + COUNT).map(|i| bf16::from_f32(i as f32).to_f32()).collect()
    }

    #[test]
    fn what_is_the_same_again_is_one_graph_and_what_is_not_is_asked_for_anew() {
        let bench = bench();
        let mut graph = Graph::new(&bench.gpu);
        for (i, count) in [4000, 4000, 4000, 4000, 2000, 4000, 4000].into_iter().enumerate() {
            bench.out.poison().unwrap();
            let x = numbers(100 * i);
            graph.run(|| bench.work(&x, count)).unwrap();
            assert_eq!(bench.doubled(count), x[..count].iter().map(|x| 2.0 * x).collect::<Vec<_>>());
            let of_letter = graph.letter.as_ref().unwrap();
            assert!(of_letter.pieces.is_empty() && of_letter.used == HEAD);
            assert_eq!(graph.captures(), [0, 1, 1, 1, 1, 1, 2][i], "graphs after run {i}");
        }
    }

    /// A letter that is too small is replaced, with what it says.
    #[test]
    fn much_may_be_written() {
        let gpu = Emulated::gpu(1);
        let all: Vec<u32> = (0..LETTER as u32 / 4).collect();
        let buffers = [0, 1].map(|_| gpu.alloc(all.len() * 4).unwrap());
        Graph::new(&gpu).run(|| buffers.iter().try_for_each(|buffer| buffer.write(0, &all))).unwrap();
        buffers.iter().for_each(|buffer| assert_eq!(buffer.read::<u32>(all.len()).unwrap(), all));
    }

    #[test]
    fn of_work_that_fails_nothing_is_done() {
        let bench = bench();
        let (before, after) = (numbers(1), numbers(2));
        let mut graph = Graph::new(&bench.gpu);
        graph.run(|| bench.work(&before, 800)).unwrap();
        let failed = graph.run(|| {
            bench.work(&after, 800)?;
            Err::<(), Error>(Error::NoLibrary("of letters".into()))
        });
        assert!(failed.is_err());
        assert_eq!(bench.x.read::<f32>(COUNT).unwrap(), before);
        graph.run(|| bench.work(&after, 800)).unwrap();
        assert_eq!(bench.doubled(800)[..], after[..800].iter().map(|x| 2.0 * x).collect::<Vec<_>>());
    }

    /// Memory that the work drops is there until its launches are asked for.
    #[test]
    fn what_is_dropped_meanwhile_is_still_read() {
        let bench = bench();
        let used = bench.gpu.used().0;
        let mut graph = Graph::new(&bench.gpu);
        graph
            .run(|| {
                let x = bench.gpu.upload(&numbers(7))?;
                narrow(&bench.gpu, &x, 800, &bench.narrow)
            })
            .unwrap();
        let want: Vec<bf16> = numbers(7)[..800].iter().map(|x| bf16::from_f32(*x)).collect();
        assert_eq!(bench.narrow.read::<bf16>(800).unwrap(), want);
        assert_eq!(bench.gpu.used().0, used);
    }

    #[test]
    fn what_would_come_in_another_order_is_refused() {
        let bench = bench();
        let x = numbers(1);
        let refused = |work: &dyn Fn() -> Result<(), Error>| {
            let mut graph = Graph::new(&bench.gpu);
            let run = || graph.run(work);
            catch_unwind(AssertUnwindSafe(run)).is_err()
        };
        let launch = || narrow(&bench.gpu, &bench.x, 800, &bench.narrow);
        assert!(!refused(&launch));
        assert!(refused(&|| launch().and_then(|()| bench.x.write(0, &x))));
        assert!(refused(&|| launch().and_then(|()| bench.narrow.fill(0))));
        assert!(refused(&|| launch().and_then(|()| bench.x.read::<f32>(1).map(|_| ()))));
        assert!(refused(&|| bench.x.write(0, &x).and_then(|()| bench.x.write(16, &x[..4]))));
        assert!(refused(&|| bench.x.write(0, &x).and_then(|()| bench.out.copy_from(0, (&bench.x, 0), 16))));
        assert!(!refused(&|| bench.x.write(0, &x).and_then(|()| bench.out.fill(0))));
        // And what is asked for after all that is done at once.
        bench.work(&x, 8).unwrap();
        assert_eq!(bench.doubled(8), x[..8].iter().map(|x| 2.0 * x).collect::<Vec<_>>());
    }
}
