//! How do tasks write columns of one row-major output at the same time?

/// `[T, rows]` f32, not initialized until every task has written its columns.
pub(super) struct Output {
    /// Empty, with room for all.
    room: Vec<f32>,
    at: *mut f32,
    rows: usize,
    tokens: usize,
}

// SAFETY: tasks write disjoint columns, which `write` and `pointer` demand of their callers.
unsafe impl Sync for Output {}
// SAFETY: it owns what it points to.
unsafe impl Send for Output {}

impl Output {
    /// Of `rows` columns for each of `tokens`.
    pub fn new(tokens: usize, rows: usize) -> Output {
        let mut room = Vec::with_capacity(tokens * rows);
        let at = room.as_mut_ptr();
        Output { room, at, rows, tokens }
    }

    /// All of it.
    ///
    /// # Safety
    /// Every column of every token has been written.
    pub unsafe fn finish(mut self) -> Vec<f32> {
        // SAFETY: there is room, and what is in it was written, as the caller promises.
        unsafe { self.room.set_len(self.tokens * self.rows) };
        self.room
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
        // SAFETY: inside the room, as just checked.
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
            // SAFETY: inside the room, as checked above; the caller promises that no one else is there.
            unsafe {
                let to = self.at.add((token + n) * self.rows + row);
                std::ptr::copy_nonoverlapping(values.as_ptr(), to, len);
            }
        }
    }
}
