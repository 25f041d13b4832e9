//! How do tasks write columns of one row-major output at the same time?

use std::marker::PhantomData;

/// `[T, rows]` f32, of which every task writes other columns.
pub(super) struct Output<'a> {
    at: *mut f32,
    rows: usize,
    tokens: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: tasks write disjoint columns, which `write` and `column` demand of their callers.
unsafe impl Sync for Output<'_> {}
// SAFETY: it stands for a `&mut [f32]`.
unsafe impl Send for Output<'_> {}

impl<'a> Output<'a> {
    /// Borrows `out`, of `rows` columns for each token.
    pub fn new(out: &'a mut [f32], rows: usize) -> Output<'a> {
        Output { at: out.as_mut_ptr(), rows, tokens: out.len() / rows, borrowed: PhantomData }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Where `out[token, row]` is; tokens are `rows` apart.
    pub fn pointer(&self, token: usize, row: usize) -> *mut f32 {
        assert!(token < self.tokens && row < self.rows, "output [{token}, {row}] is out of range");
        // SAFETY: inside the borrowed slice, as just checked.
        unsafe { self.at.add(token * self.rows + row) }
    }

    /// Writes `values` at rows `row..` of the tokens from `token` on; what lies beyond the last row is dropped.
    ///
    /// # Safety
    /// No other thread touches these rows meanwhile.
    #[inline(always)]
    pub unsafe fn write<const R: usize, const N: usize>(
        &self,
        token: usize,
        row: usize,
        values: [[f32; R]; N],
    ) {
        assert!(row < self.rows && token + N <= self.tokens, "output [{token} + {N}, {row}] is out of range");
        let len = R.min(self.rows - row);
        for (n, values) in values.iter().enumerate() {
            // SAFETY: inside the slice, as checked above; the caller promises that no one else is there.
            unsafe {
                let to = self.at.add((token + n) * self.rows + row);
                std::ptr::copy_nonoverlapping(values.as_ptr(), to, len);
            }
        }
    }
}
