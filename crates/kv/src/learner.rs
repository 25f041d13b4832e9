//! Who works out the strategies of what is generated?
//!
//! A [`Learner`] hears of every token that was packed with a borrowed strategy, adds it to the sums of its segment, and
//! when the segment closes makes it anew from the raw keys and values that it kept. A cache has a learner of its own,
//! which works between two steps, or shares the one of a [`Background`] thread, and decoding goes on meanwhile
//! (arXiv 2607.00760, s. 5: heterogeneous double compression buffering). The same threads do what the layered format has to do
//! when a segment closes.
//!
//! A forward pass takes no lock and sends no message: news is handed over, and finished segments are swapped in,
//! between steps ([`KvCache::between_steps`](crate::KvCache::between_steps)).

use crate::KvBytes;
use crate::layered::Closing;
use crate::packed::{FLUSH, News, Packed, PackedHead, Raw, Segment, Sums};
use half::slice::HalfFloatSliceExt;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use thread_priority::{ThreadPriority, set_current_thread_priority};

/// Tokens after a closing at which its segment is swapped in, where swaps do not depend on the time that work takes.
const SWAP_AFTER: usize = 64;

/// A KV head, as long as nothing of it was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Place {
    /// Of the caches that share a learner.
    cache: u64,
    layer: usize,
    head: usize,
    epoch: usize,
}

/// Segments in the making.
#[derive(Debug, Default)]
struct Learner {
    growing: HashMap<Place, Growing>,
}

#[derive(Debug)]
struct Growing {
    sums: Sums,
    raw: Vec<Raw>,
}

impl Learner {
    /// Takes one piece of news in; a closed segment comes back with a strategy of its own.
    fn hear(&mut self, place: Place, (settings, d): (Packed, usize), news: News) -> Option<Segment> {
        match news {
            News::Packed(raw) => {
                let growing = (self.growing.entry(place))
                    .or_insert_with(|| Growing { sums: Sums::new(d), raw: Vec::new() });
                growing.sums.add(&widened([&raw.keys]), &widened([&raw.values]));
                growing.raw.push(raw);
                None
            }
            News::Closed => {
                let Growing { sums, raw } = self.growing.remove(&place)?;
                let keys = widened(raw.iter().map(|raw| &raw.keys));
                let values = widened(raw.iter().map(|raw| &raw.values));
                drop(raw);
                Some(Segment::learn(settings, &sums, &keys, &values))
            }
        }
    }

    fn forget_cache(&mut self, cache: u64) {
        self.growing.retain(|place, _| place.cache != cache);
    }
}

fn widened<'a>(parts: impl IntoIterator<Item = &'a Vec<half::f16>>) -> Vec<f32> {
    let mut out = Vec::new();
    for part in parts {
        let from = out.len();
        out.resize(from + part.len(), 0.0);
        part.convert_to_f32_slice(&mut out[from..]);
    }
    out
}

/// When finished segments are swapped in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timing {
    /// As soon as they are there: decoding never waits.
    Live,
    /// A fixed number of tokens after a segment closed, waiting if need be: what is generated does not depend on the
    /// time that the work takes.
    Fixed,
}

/// Threads of low priority that learn for any number of caches. Dropping it waits for them.
#[derive(Debug)]
pub struct Background {
    senders: Vec<Sender<Message>>,
    threads: Vec<JoinHandle<()>>,
    /// Raw bytes that caches told it of and whose segments they have not yet swapped in.
    held: AtomicUsize,
    most_held: usize,
    caches: AtomicU64,
}

#[derive(Debug)]
enum Message {
    News {
        place: Place,
        settings: (Packed, usize),
        news: News,
        mailbox: Arc<Mailbox>,
    },
    /// A segment of the layered format, unless its cache has done the work itself meanwhile.
    Close(Weak<Closing>),
    /// The growing segment at this place is given up.
    Forget(Place),
    /// This cache is no more.
    Gone(u64),
}

/// Finished segments of one cache.
#[derive(Debug, Default)]
struct Mailbox {
    segments: Mutex<Vec<(Place, Segment)>>,
    arrived: Condvar,
}

impl Background {
    /// `threads` threads (at least 1) that together hold at most `most_held` bytes of raw keys and values: segments that
    /// would exceed it keep their borrowed strategy.
    pub fn new(threads: usize, most_held: usize) -> Background {
        let (senders, threads) = (0..threads.max(1))
            .map(|i| {
                let (sender, messages) = channel();
                let thread = thread::Builder::new().name(format!("mosaickv-learn-{i}"));
                let thread = thread.spawn(move || work(&messages));
                (sender, thread.expect("the system refused a background thread"))
            })
            .unzip();
        Background { senders, threads, held: AtomicUsize::new(0), most_held, caches: AtomicU64::new(0) }
    }

    /// Bytes of raw keys and values that it holds, is about to hear of, or has made segments of that wait.
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// A place always goes to the same thread, so that its news stays in order.
    fn send(&self, place: Place, message: Message) {
        let thread = (place.cache as usize + place.layer * 31 + place.head) % self.senders.len();
        // A thread ends early only by a panic, which dropping this passes on.
        let _ = self.senders[thread].send(message);
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.senders.clear();
        for thread in self.threads.drain(..) {
            let panicked = thread.join().is_err();
            assert!(!panicked || thread::panicking(), "a background thread panicked");
        }
    }
}

fn work(messages: &Receiver<Message>) {
    // Where the system refuses, the thread works at normal priority.
    if let Err(error) = set_current_thread_priority(ThreadPriority::Min) {
        tracing::warn!("background threads run at normal priority: {error}");
    }
    let mut learner = Learner::default();
    for message in messages {
        match message {
            Message::News { place, settings, news, mailbox } => {
                if let Some(segment) = learner.hear(place, settings, news) {
                    mailbox.lock().push((place, segment));
                    mailbox.arrived.notify_all();
                }
            }
            Message::Close(closing) => {
                if let Some(closing) = closing.upgrade() {
                    closing.stored();
                }
            }
            Message::Forget(place) => drop(learner.growing.remove(&place)),
            Message::Gone(cache) => learner.forget_cache(cache),
        }
    }
}

impl Mailbox {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(Place, Segment)>> {
        self.segments.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What has become of a cache's growing segments so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swaps {
    /// Segments that got a strategy, or in the layered format a plan, of their own.
    pub swapped: usize,
    /// Segments that keep a borrowed one, because the background held too much.
    pub given_up: usize,
}

/// A cache's side of learning.
#[derive(Debug)]
pub(crate) struct Learning {
    learner: Where,
    cache: u64,
    /// Finished and not yet swapped in.
    ready: HashMap<Place, VecDeque<Segment>>,
    pub(crate) swaps: Swaps,
}

#[derive(Debug)]
enum Where {
    /// Works between steps.
    Own(Learner),
    Shared {
        background: Arc<Background>,
        mailbox: Arc<Mailbox>,
        timing: Timing,
        held: usize,
    },
}

impl Default for Learning {
    fn default() -> Learning {
        let learner = Where::Own(Learner::default());
        Learning { learner, cache: 0, ready: HashMap::new(), swaps: Swaps::default() }
    }
}

/// Of a cache whose temporary segments stay as they are, as a clone's do.
impl Clone for Learning {
    fn clone(&self) -> Learning {
        match &self.learner {
            Where::Own(_) => Learning::default(),
            Where::Shared { background, timing, .. } => Learning::shared(Arc::clone(background), *timing),
        }
    }
}

impl Learning {
    pub(crate) fn shared(background: Arc<Background>, timing: Timing) -> Learning {
        let cache = background.caches.fetch_add(1, Ordering::Relaxed);
        let learner = Where::Shared { background, mailbox: Arc::default(), timing, held: 0 };
        Learning { learner, cache, ready: HashMap::new(), swaps: Swaps::default() }
    }

    /// Tells the learner what happened in a head since the last step, and swaps in what is due.
    pub(crate) fn attend_to(&mut self, (layer, g): (usize, usize), head: &mut PackedHead) {
        let d = head.buffer.head_dim();
        let news = head.take_news();
        for news in news {
            let place = self.place((layer, g), head);
            if !self.tell(place, (head.settings, d), news) {
                self.give_up(place, head);
                break;
            }
        }
        while let Some(since) = head.tokens_since_close() {
            let place = self.place((layer, g), head);
            let Some(segment) = self.take(place, since) else { break };
            self.release(segment.tokens() * bytes_of_raw(d));
            head.swap(segment);
            self.swaps.swapped += 1;
        }
    }

    /// Lets a background, if there is one, do the work of a segment of this layer.
    pub(crate) fn hand_over(&self, layer: usize, closing: &Arc<Closing>) {
        if let Where::Shared { background, .. } = &self.learner {
            let place = Place { cache: self.cache, layer, head: 0, epoch: 0 };
            background.send(place, Message::Close(Arc::downgrade(closing)));
        }
    }

    fn place(&self, (layer, head): (usize, usize), of: &PackedHead) -> Place {
        Place { cache: self.cache, layer, head, epoch: of.epoch() }
    }

    /// Whether the learner had room for the news.
    fn tell(&mut self, place: Place, settings: (Packed, usize), news: News) -> bool {
        match &mut self.learner {
            Where::Own(learner) => {
                if let Some(segment) = learner.hear(place, settings, news) {
                    self.ready.entry(place).or_default().push_back(segment);
                }
                true
            }
            Where::Shared { background, mailbox, held, .. } => {
                if let News::Packed(raw) = &news {
                    let bytes = size_of_val(&*raw.keys) + size_of_val(&*raw.values);
                    if background.held() + bytes > background.most_held {
                        return false;
                    }
                    *held += bytes;
                    background.held.fetch_add(bytes, Ordering::Relaxed);
                }
                let mailbox = Arc::clone(mailbox);
                background.send(place, Message::News { place, settings, news, mailbox });
                true
            }
        }
    }

    /// Decoding goes on, and nothing is lost: temporary segments become final.
    fn give_up(&mut self, place: Place, head: &mut PackedHead) {
        if let Where::Shared { background, .. } = &self.learner {
            background.send(place, Message::Forget(place));
        }
        // The last flush was refused, the others were told.
        self.release((head.raw_tokens() - FLUSH) * bytes_of_raw(head.buffer.head_dim()));
        self.ready.remove(&place);
        head.settle();
        self.swaps.given_up += 1;
    }

    fn release(&mut self, bytes: usize) {
        if let Where::Shared { background, held, .. } = &mut self.learner {
            *held -= bytes;
            background.held.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    /// The oldest finished segment of a head if it is due, `since` tokens after it closed.
    fn take(&mut self, place: Place, since: usize) -> Option<Segment> {
        let due = since >= SWAP_AFTER;
        let Where::Shared { background, mailbox, timing, .. } = &self.learner else {
            return if due { self.ready.get_mut(&place)?.pop_front() } else { None };
        };
        if *timing == Timing::Fixed && !due {
            return None;
        }
        let mut arrived = mailbox.lock();
        loop {
            for (place, segment) in arrived.drain(..) {
                self.ready.entry(place).or_default().push_back(segment);
            }
            let segment = self.ready.get_mut(&place).and_then(VecDeque::pop_front);
            if segment.is_some() || *timing == Timing::Live {
                return segment;
            }
            let ended = background.threads.iter().any(JoinHandle::is_finished);
            assert!(!ended, "a background thread panicked: the segment that is due will never come");
            let waited = mailbox.arrived.wait_timeout(arrived, Duration::from_millis(100));
            arrived = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Bytes that a learner allocates for a head beside its segments, and of finished ones that wait.
    pub(crate) fn count(&self, heads: &[PackedHead], bytes: &mut KvBytes) {
        for head in heads {
            let (tokens, d) = (head.raw_tokens(), head.buffer.head_dim());
            bytes.raw += tokens * bytes_of_raw(d) + tokens / FLUSH * size_of::<Raw>();
            bytes.raw += if tokens > 0 { Sums::bytes(d) } else { 0 };
        }
    }
}

impl Drop for Learning {
    fn drop(&mut self) {
        if let Where::Shared { background, held, .. } = &self.learner {
            for thread in &background.senders {
                // A thread that ended holds nothing.
                let _ = thread.send(Message::Gone(self.cache));
            }
            background.held.fetch_sub(*held, Ordering::Relaxed);
        }
    }
}

/// Of one token's key and value.
fn bytes_of_raw(d: usize) -> usize {
    2 * d * size_of::<half::f16>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_that_is_gone_leaves_nothing_with_the_learner() {
        let mut learner = Learner::default();
        let raw = || Raw { keys: vec![half::f16::ONE; 32 * 64], values: vec![half::f16::ONE; 32 * 64] };
        let place = |cache| Place { cache, layer: 0, head: 0, epoch: 0 };
        for cache in [1, 2] {
            learner.hear(place(cache), (Packed::default(), 64), News::Packed(raw()));
        }
        learner.forget_cache(1);
        let left: Vec<u64> = learner.growing.keys().map(|place| place.cache).collect();
        assert_eq!(left, [2]);
    }

    #[test]
    fn a_dropped_cache_tells_every_thread() {
        let (sender, messages) = channel();
        let mut watched = Background::new(1, usize::MAX);
        watched.senders = vec![sender.clone(), sender];
        let watched = Arc::new(watched);
        drop(Learning::shared(Arc::clone(&watched), Timing::Live));
        drop(watched);
        let gone: Vec<Message> = messages.iter().collect();
        assert!(
            gone.len() == 2 && gone.iter().all(|message| matches!(message, Message::Gone(0))),
            "{gone:?}"
        );
    }
}
