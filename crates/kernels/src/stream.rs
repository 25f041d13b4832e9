//! How fast can this machine read memory? The yardstick beside every bandwidth that a benchmark reports.

use crate::isa::Isa;
use crate::pool::Pool;
use crate::simd::{Kernel, Simd, dispatch};
use std::hint::black_box;
use std::time::Instant;

const TASK_FLOATS: usize = 1 << 18;

/// Memory far larger than any cache (512 MiB), to be read from end to end.
pub struct Stream {
    data: Vec<f32>,
}

impl Default for Stream {
    fn default() -> Stream {
        // Not zeros: untouched zero pages are one page of memory.
        Stream { data: vec![1.0; 128 << 20] }
    }
}

impl Stream {
    /// Reads everything once with all threads of `pool` and returns bytes a second.
    pub fn read(&self, isa: Isa, pool: &Pool) -> f64 {
        let start = Instant::now();
        pool.run(self.data.len() / TASK_FLOATS, |i| {
            black_box(dispatch(isa, Sum { data: &self.data[i * TASK_FLOATS..][..TASK_FLOATS] }));
        });
        size_of_val(&*self.data) as f64 / start.elapsed().as_secs_f64()
    }
}

struct Sum<'a> {
    data: &'a [f32],
}

impl Kernel for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.splat(0.0); 4];
        for chunk in self.data.chunks_exact(4 * S::LANES) {
            for (n, sum) in sums.iter_mut().enumerate() {
                // SAFETY: a chunk has 4 * LANES floats.
                *sum = s.add(*sum, unsafe { s.load(chunk.as_ptr().add(n * S::LANES)) });
            }
        }
        s.sum_lanes(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
    }
}
