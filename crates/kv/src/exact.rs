//! A KV head whose tokens are all exact: the `exact` format, every prompt until it is compressed, and layers with a
//! sliding window, which drop the pages that no query can see any more.

use crate::{KvBytes, Step, cleared};
use half::f16;
use half::slice::HalfFloatSliceExt;
use mosaickv_kernels::AttnState;
use mosaickv_kernels::exact::{ExactPage, PAGE_TOKENS, Visible, attend, attend_pages};
use mosaickv_kernels::saved::{Input, Malformed, write_count};
use std::io::{self, Write};
use std::ops::Range;
use std::sync::Arc;

/// Pages that one task of a decode step folds (1,024 tokens). Fixed, so that the order of additions, and with it
/// the result, does not depend on the number of threads.
const PAGES_PER_TASK: usize = 16;

/// Query positions that one task of prefill takes.
const QUERIES_PER_TASK: usize = 16;

/// Bytes that an `Arc` adds to what it holds: its two counts.
pub(crate) const ARC_BYTES: usize = 2 * size_of::<usize>();

#[derive(Clone, Debug)]
pub(crate) struct ExactHead {
    sealed: Vec<Arc<ExactPage>>,
    /// The update buffer: the page that is being filled, never full.
    open: ExactPage,
    /// Tokens that a query sees, itself included; `None`: all.
    window: Option<usize>,
    /// Pages before the first of `sealed`, which were dropped.
    dropped: usize,
}

impl ExactHead {
    pub(crate) fn new(head_dim: usize, window: Option<usize>) -> ExactHead {
        ExactHead { sealed: Vec::new(), open: ExactPage::new(head_dim, PAGE_TOKENS), window, dropped: 0 }
    }

    /// Tokens appended so far, those in dropped pages too.
    pub(crate) fn tokens(&self) -> usize {
        (self.dropped + self.sealed.len()) * PAGE_TOKENS + self.open.tokens()
    }

    /// Where the page with the first token that position `position` sees is in the sequence.
    fn first_page(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window) / PAGE_TOKENS)
    }

    /// Drops the pages that neither the newest token nor any later one can see.
    pub(crate) fn forget(&mut self) {
        let seen = self.first_page(self.tokens().saturating_sub(1));
        if seen > self.dropped {
            self.sealed.drain(..seen - self.dropped);
            // Else the list would stay as long as the longest prompt's.
            self.sealed.shrink_to(2 * self.sealed.len());
            self.dropped = seen;
        }
    }

    /// Appends the elements from `offset` of each row of `keys` and `values`.
    pub(crate) fn append(&mut self, keys: &[f32], values: &[f32], (offset, row): (usize, usize)) {
        let d = self.open.head_dim();
        for (key, value) in keys.chunks_exact(row).zip(values.chunks_exact(row)) {
            self.push(&key[offset..][..d], &value[offset..][..d]);
        }
    }

    /// The same from rows of `row` keys, then `row` values.
    pub(crate) fn append_halves(&mut self, rows: &[f16], (offset, row): (usize, usize)) {
        let d = self.open.head_dim();
        let (mut key, mut value) = (vec![0.0; d], vec![0.0; d]);
        for token in rows.chunks_exact(2 * row) {
            token[offset..][..d].convert_to_f32_slice(&mut key);
            token[row + offset..][..d].convert_to_f32_slice(&mut value);
            self.push(&key, &value);
        }
    }

    fn push(&mut self, key: &[f32], value: &[f32]) {
        self.open.push(key, value);
        if self.open.is_full() {
            let empty = ExactPage::new(self.open.head_dim(), PAGE_TOKENS);
            self.sealed.push(Arc::new(std::mem::replace(&mut self.open, empty)));
        }
    }

    /// All pages that are kept, in order, the update buffer last.
    pub(crate) fn pages(&self) -> impl Iterator<Item = &ExactPage> {
        self.sealed.iter().map(|page| &**page).chain([&self.open])
    }

    /// Page `i` of the sequence.
    pub(crate) fn page(&self, i: usize) -> &ExactPage {
        let kept = i.checked_sub(self.dropped).expect("a page that some query sees was dropped");
        self.sealed.get(kept).map_or(&self.open, |page| page)
    }

    /// Calls `each(key, value)` for every token in order, both `[D]`.
    pub(crate) fn each_token(&self, mut each: impl FnMut(&[f32], &[f32])) {
        let (mut key, mut value) = (vec![0.0; self.open.head_dim()], vec![0.0; self.open.head_dim()]);
        for page in self.pages() {
            for t in 0..page.tokens() {
                page.key(t, &mut key);
                page.value(t, &mut value);
                each(&key, &value);
            }
        }
    }

    /// Gives back the room that the list of pages grew for further ones.
    pub(crate) fn shrink(&mut self) {
        self.sealed.shrink_to_fit();
    }

    /// Pages of the sequence, dropped ones and the update buffer included.
    fn page_count(&self) -> usize {
        self.dropped + self.sealed.len() + 1
    }

    /// Pages of the sequence that the newest token sees.
    fn seen(&self) -> Range<usize> {
        self.first_page(self.tokens().saturating_sub(1))..self.page_count()
    }

    /// What rows from position `position` on see of page `i`.
    fn visible(&self, i: usize, position: usize, rows_per_token: usize) -> Visible {
        let first = (position + 1) as isize - (i * PAGE_TOKENS) as isize;
        match self.window {
            Some(window) => Visible::Window { rows_per_token, first, window },
            None => Visible::Causal { rows_per_token, first },
        }
    }

    pub(crate) fn count(&self, bytes: &mut KvBytes) {
        // The open page's header is inside this head, which the list of heads counts.
        bytes.exact += self.pages().map(ExactPage::bytes).sum::<usize>() - size_of::<ExactPage>();
        bytes.lists += self.sealed.capacity() * size_of::<Arc<ExactPage>>() + self.sealed.len() * ARC_BYTES;
    }

    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        write_count(out, self.dropped)?;
        write_count(out, self.sealed.len())?;
        self.pages().try_for_each(|page| page.write(out))
    }

    pub(crate) fn read(
        input: &mut Input,
        head_dim: usize,
        window: Option<usize>,
    ) -> Result<ExactHead, Malformed> {
        let (dropped, sealed) = (input.count()?, input.count()?);
        let fits = dropped <= u32::MAX as usize && sealed <= input.left();
        Malformed::unless(fits, || format!("{sealed} exact pages after {dropped} that were dropped"))?;
        let mut page = || ExactPage::read(input, head_dim);
        let pages: Result<Vec<_>, _> = (0..sealed).map(|_| page().map(Arc::new)).collect();
        let head = ExactHead { sealed: pages?, open: page()?, window, dropped };
        let room = head.pages().all(|page| page.capacity() == PAGE_TOKENS);
        Malformed::unless(room, || "an exact page that does not have room for 64 tokens".into())?;
        head.check().map_err(Malformed)?;
        Ok(head)
    }

    /// Of pages that are the same in both.
    pub(crate) fn bytes_shared_with(&self, other: &ExactHead) -> usize {
        let first = self.dropped.max(other.dropped);
        let (ours, theirs) = (self.sealed.iter().skip(first - self.dropped), other.sealed.iter());
        let both =
            ours.zip(theirs.skip(first - other.dropped)).filter(|(ours, theirs)| Arc::ptr_eq(ours, theirs));
        both.map(|(page, _)| page.bytes() + ARC_BYTES).sum()
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        match self.sealed.iter().position(|page| !page.is_full()) {
            Some(i) => Err(format!("sealed page {i} holds {} tokens", self.sealed[i].tokens())),
            None if self.open.is_full() => Err("the update buffer is full and was not sealed".into()),
            None if self.dropped > self.first_page(self.tokens().saturating_sub(1)) => {
                Err(format!("{} pages were dropped, some inside the window {:?}", self.dropped, self.window))
            }
            None => Ok(()),
        }
    }
}

/// One cache in a step.
pub(crate) struct Lane<'a> {
    pub(crate) heads: &'a [ExactHead],
    /// `[H, D]`
    pub(crate) queries: &'a [f32],
    /// Likewise.
    pub(crate) out: &'a mut [f32],
    pub(crate) states: &'a mut Vec<AttnState>,
    /// Bytes read, to be added to.
    pub(crate) read: &'a mut u64,
}

/// Some pages of one head, to be folded.
struct Run<'a> {
    head: &'a ExactHead,
    queries: &'a [f32],
    /// Whether they begin with the first page that is seen.
    begins: bool,
    pages: Range<usize>,
    state: &'a mut AttnState,
}

/// One token in each of some caches. Tasks are runs of pages of one KV head; their states are merged in order.
pub(crate) fn decode(step: Step, lanes: &mut [Lane]) {
    let of_head = step.shape.group() * step.shape.head_dim;
    let scaled: Vec<Vec<f32>> =
        lanes.iter().map(|lane| lane.queries.iter().map(|q| q * step.scale).collect()).collect();
    let mut runs = vec![];
    for (lane, queries) in lanes.iter_mut().zip(&scaled) {
        let seen = lane.heads[0].seen();
        let count = seen.len().div_ceil(PAGES_PER_TASK);
        let states = cleared(lane.states, lane.heads.len() * count, step.shape.group(), step.shape.head_dim);
        let heads = lane.heads.iter().zip(queries.chunks_exact(of_head)).zip(states.chunks_exact_mut(count));
        for ((head, queries), states) in heads {
            for (first, state) in seen.clone().step_by(PAGES_PER_TASK).zip(states) {
                let pages = first..seen.end.min(first + PAGES_PER_TASK);
                runs.push(Run { head, queries, begins: first == seen.start, pages, state });
            }
        }
    }
    step.pool.for_each(&mut runs, |_, run| run.fold(step));
    for Lane { heads, out, states, read, .. } in lanes {
        let count = states.len() / heads.len();
        for (states, out) in states.chunks_exact_mut(count).zip(out.chunks_exact_mut(of_head)) {
            let (first, rest) = states.split_first_mut().expect("a head has at least its open page");
            rest.iter().for_each(|state| first.merge(state));
            first.finish(out);
        }
        let of_head = |head: &ExactHead| head.seen().map(|i| head.page(i).bytes_read() as u64).sum::<u64>();
        **read += heads.iter().map(of_head).sum::<u64>();
    }
}

impl Run<'_> {
    fn fold(&mut self, step: Step) {
        let (head, mut pages) = (self.head, self.pages.clone());
        if head.window.is_some() && self.begins {
            // The window may begin inside its first page.
            let visible = head.visible(pages.start, head.tokens().saturating_sub(1), step.shape.group());
            attend(step.isa, self.queries, head.page(pages.start), visible, self.state);
            pages.start += 1;
        }
        attend_pages(step.isa, self.queries, pages.map(|i| head.page(i)), self.state);
    }
}

/// Many tokens: `queries` `[T, H, D]`. A task takes a block of positions in every head and never holds more
/// scores than one page has.
pub(crate) fn prefill(step: Step, heads: &[ExactHead], queries: &[f32], out: &mut [f32]) -> u64 {
    let (group, d, row) = (step.shape.group(), step.shape.head_dim, step.shape.heads * step.shape.head_dim);
    let tokens = queries.len() / row;
    let start = heads[0].tokens() - tokens;
    let mut blocks: Vec<_> = out.chunks_mut(QUERIES_PER_TASK * row).enumerate().collect();
    // The last positions see the most: begin with them, and the small tasks fill the gaps at the end.
    blocks.reverse();
    step.pool.for_each(&mut blocks, |_, (block, out)| {
        let first = *block * QUERIES_PER_TASK;
        let count = out.len() / row;
        let pages = heads[0].first_page(start + first)..(start + first + count).div_ceil(PAGE_TOKENS);
        let mut local = vec![0.0; count * group * d];
        let mut state = AttnState::new(count * group, d);
        for (g, head) in heads.iter().enumerate() {
            let span = |t: usize| t * row + g * group * d..t * row + (g + 1) * group * d;
            for (t, to) in local.chunks_exact_mut(group * d).enumerate() {
                let from = &queries[span(first + t)];
                to.iter_mut().zip(from).for_each(|(x, q)| *x = q * step.scale);
            }
            state.clear();
            for i in pages.clone() {
                let visible = head.visible(i, start + first, group);
                attend(step.isa, &local, head.page(i), visible, &mut state);
            }
            state.finish(&mut local);
            for (t, from) in local.chunks_exact(group * d).enumerate() {
                out[span(t)].copy_from_slice(from);
            }
        }
    });
    let page_bytes = d * PAGE_TOKENS * 2 * 2;
    let read = |block: usize| {
        let first = start + block * QUERIES_PER_TASK;
        let end = (first + QUERIES_PER_TASK).min(start + tokens).div_ceil(PAGE_TOKENS);
        end - heads[0].first_page(first)
    };
    (0..tokens.div_ceil(QUERIES_PER_TASK)).map(|b| (read(b) * page_bytes * heads.len()) as u64).sum()
}
