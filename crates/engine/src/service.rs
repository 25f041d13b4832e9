//! An engine on a thread of its own, and how others speak to it.

use crate::refused::refusal;
use crate::{Compute, Context, Engine, Event, Kept, Look, ModelCompute, Refused, Request, Settings};
use mosaickv_kernels::Pool;
use mosaickv_kv::{Background, KvFormat};
use mosaickv_model::Model;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

/// What an engine does now and has done since it began; for metrics.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figures {
    /// Requests with a cache.
    pub running: usize,
    /// Of those, the ones whose prompts are being compressed.
    pub compressing: usize,
    /// Requests without.
    pub waiting: usize,
    /// Bytes that the caches may take.
    pub kv_budget: usize,
    /// Bytes reserved of them.
    pub kv_reserved: usize,
    /// Bytes allocated of those.
    pub kv_allocated: usize,
    /// The same by the names of formats.
    pub kv_by_format: BTreeMap<&'static str, usize>,
    /// Prompts that were read, and what followed them, kept for others.
    pub prefixes: usize,
    /// Bytes allocated for them, among `kv_allocated`.
    pub kv_prefixes: usize,
    /// Bytes of them that nobody needs now.
    pub kv_droppable: usize,
    /// Prompt tokens of requests that began, once for each time.
    pub prefix_queries: u64,
    /// Those that were found among the prefixes.
    pub prefix_hits: u64,
    /// Bytes that the tokens of all caches would take as f16.
    pub kv_exact: usize,
    /// Bytes of keys and values read by attention.
    pub kv_read: u64,
    /// Requests that lost their caches.
    pub preemptions: u64,
    /// Requests whose caches were compressed harder, to make room.
    pub harder: u64,
    /// Prompt tokens read, once for each time.
    pub prompt_tokens: u64,
    /// Tokens after prompts that were read though nothing was sampled of what follows: given ones, and those of answers that had lost their caches.
    pub known_tokens: u64,
    /// Tokens sampled.
    pub output_tokens: u64,
    /// What answers in the first few formats that were held against their exact caches had of them.
    pub shadowed: Vec<(KvFormat, Shadowed)>,
    /// Seconds spent compressing prompts.
    pub compress_seconds: f64,
    /// Segments and pages that prompts were compressed into: see [`KvCache::strategies`](mosaickv_kv::KvCache::strategies).
    pub strategies: BTreeMap<String, u64>,
}

/// What answers had of their exact caches' distributions.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Shadowed {
    /// Sampled tokens that were looked at.
    pub steps: u64,
    /// KL divergences of their distributions from the exact caches', summed up, in nats.
    pub kl: f64,
    /// Those whose most probable token was the same.
    pub agreed: u64,
}

/// Raw keys and values that strategies in the making may hold.
const MOST_RAW_BYTES: usize = 64 << 20;

/// An engine over a model, on a thread of its own.
pub struct Service {
    model: Arc<Model>,
    background: Arc<Background>,
    settings: Settings,
    commands: Mutex<Option<Sender<Command>>>,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the engine's thread and others both see.
#[derive(Default)]
struct Shared {
    figures: Arc<Mutex<Figures>>,
    /// Requests that were sent and not yet taken.
    sent: AtomicUsize,
}

enum Command {
    Submit { request: Box<Request>, emit: Box<dyn FnMut(Event) + Send>, cancelled: Arc<AtomicBool> },
    Find { kv: KvFormat, tokens: Vec<u32>, prompt: usize, tell: Sender<Option<Kept>> },
    Look { tag: u64, tell: Sender<Option<Look>> },
    Cancel { tag: u64, tell: Sender<bool> },
    Restore { context: Box<Context>, tell: Sender<Result<Kept, String>> },
}

/// A request's place in the engine: dropping it cancels the request, if it has not ended.
#[must_use = "a ticket that is dropped cancels its request"]
pub struct Ticket(Arc<AtomicBool>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Service {
    /// Begins; `threads` compute.
    pub fn start(model: Arc<Model>, threads: usize, settings: Settings) -> Service {
        let (commands, received) = mpsc::channel();
        let shared = Arc::new(Shared::default());
        let background = Arc::new(Background::new(1, MOST_RAW_BYTES));
        let thread = thread::Builder::new().name("mosaickv-engine".to_owned()).spawn({
            let (model, background, shared) = (model.clone(), background.clone(), shared.clone());
            move || {
                let pool = Pool::new(threads);
                let compute = ModelCompute::new(&model, &pool, background);
                let compute = compute.remember_places(settings.remember_places);
                let engine = Engine::new(compute, settings, shared.figures.clone());
                run(engine, &received, &shared.sent);
            }
        });
        let thread = Mutex::new(Some(thread.expect("the system refused a thread")));
        Service { model, background, settings, commands: Mutex::new(Some(commands)), shared, thread }
    }

    /// Takes a request, or refuses it at once. `emit` is called on the engine's thread with the request's events, of which
    /// [`Event::Ended`] is the last; it must not block.
    pub fn submit(
        &self,
        request: Request,
        emit: impl FnMut(Event) + Send + 'static,
    ) -> Result<Ticket, Refused> {
        let pool = Pool::new(1);
        let compute = ModelCompute::new(&self.model, &pool, self.background.clone());
        let compute = compute.remember_places(self.settings.remember_places);
        refusal(&compute, self.settings.kv_memory, &request)?;
        let waiting = self.figures().waiting + self.shared.sent.load(Ordering::Relaxed);
        if waiting >= self.settings.most_waiting {
            return Err(Refused::QueueFull { waiting });
        }
        let cancelled = Arc::new(AtomicBool::new(false));
        let (request, emit) = (Box::new(request), Box::new(emit));
        let command = Command::Submit { request, emit, cancelled: cancelled.clone() };
        self.shared.sent.fetch_add(1, Ordering::Relaxed);
        self.send(command)?;
        Ok(Ticket(cancelled))
    }

    /// Takes a context in that was kept before, or says why it can't be. Waits for the engine's next step.
    pub fn restore(&self, context: Context) -> Result<Result<Kept, String>, Refused> {
        self.ask(|tell| Command::Restore { context: Box::new(context), tell })
    }

    /// The longest context that `tokens` begin with, of a prompt of the first `prompt` of them. Waits for the engine's next step.
    pub fn find(&self, kv: KvFormat, tokens: Vec<u32>, prompt: usize) -> Result<Option<Kept>, Refused> {
        self.ask(|tell| Command::Find { kv, tokens, prompt, tell })
    }

    /// What the request with this tag has read; `None` if none runs, or while its prompt is being compressed. Waits for the engine's next
    /// step.
    pub fn look(&self, tag: u64) -> Result<Option<Look>, Refused> {
        self.ask(|tell| Command::Look { tag, tell })
    }

    /// Cancels the request with this tag: whether there was one.
    pub fn cancel(&self, tag: u64) -> Result<bool, Refused> {
        self.ask(|tell| Command::Cancel { tag, tell })
    }

    /// What the engine says to a command.
    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Result<T, Refused> {
        let (tell, told) = mpsc::channel();
        self.send(command(tell))?;
        told.recv().map_err(|_| Refused::Stopped)
    }

    fn send(&self, command: Command) -> Result<(), Refused> {
        let commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        let is_sent = commands.as_ref().is_some_and(|commands| commands.send(command).is_ok());
        if is_sent { Ok(()) } else { Err(Refused::Stopped) }
    }

    /// What is going on.
    pub fn figures(&self) -> Figures {
        self.shared.figures.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends all requests with [`End::Shutdown`](crate::End::Shutdown) after the step that runs, and takes no more.
    pub fn stop(&self) {
        drop(self.commands.lock().unwrap_or_else(PoisonError::into_inner).take());
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take()
            && thread.join().is_err()
        {
            tracing::error!("the engine's thread panicked; its requests ended without an answer");
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Steps until nobody can send any more. Sleeps while there is nothing to do.
fn run(mut engine: Engine<impl Compute>, received: &Receiver<Command>, sent: &AtomicUsize) {
    loop {
        let first = if engine.is_idle() {
            match received.recv() {
                Ok(command) => Some(command),
                Err(mpsc::RecvError) => break,
            }
        } else {
            None
        };
        let mut is_over = false;
        let rest = std::iter::from_fn(|| match received.try_recv() {
            Ok(command) => Some(command),
            Err(error) => {
                is_over = error == mpsc::TryRecvError::Disconnected;
                None
            }
        });
        for command in first.into_iter().chain(rest) {
            match command {
                Command::Submit { request, emit, cancelled } => {
                    engine.submit(*request, emit, cancelled);
                    sent.fetch_sub(1, Ordering::Relaxed);
                }
                // Whoever does not wait any more needs no answer.
                Command::Find { kv, tokens, prompt, tell } => {
                    drop(tell.send(engine.find(kv, &tokens, prompt)))
                }
                Command::Look { tag, tell } => drop(tell.send(engine.look(tag))),
                Command::Cancel { tag, tell } => drop(tell.send(engine.cancel(tag))),
                Command::Restore { context, tell } => drop(tell.send(engine.restore(*context))),
            }
        }
        if is_over {
            break;
        }
        engine.step();
    }
    engine.stop();
}
