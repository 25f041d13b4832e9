//! What does a request have running in the engine? Its answers' tickets, and their events in one queue.
//!
//! Whoever drops a job, because the client went away or an answer failed, cancels what is left of it.

use crate::app::{App, Loaded};
use crate::error::ApiError;
use crate::slots::{Rest, Slot};
use mosaickv_engine::{Event, Pin, Request, Ticket};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio_util::task::task_tracker::TaskTrackerToken;

/// The answers of one request.
pub struct Job {
    app: App,
    events: UnboundedReceiver<(usize, Event)>,
    answers: Vec<Running>,
    /// Answers that have not ended.
    left: usize,
    start: Instant,
    _running: TaskTrackerToken,
    _pin: Option<Pin>,
}

struct Running {
    /// While somebody wants the answer.
    ticket: Option<Ticket>,
    /// Until it has ended; and what it will leave there, if others may have it.
    slot: Option<(Slot, Option<Rest>)>,
    timeline: Timeline,
}

/// When the tokens of an answer came.
pub struct Timeline {
    last: Option<Instant>,
}

impl Timeline {
    /// Whether none came.
    pub fn is_first(&self) -> bool {
        self.last.is_none()
    }
}

/// Who asks, since when.
pub struct Caller {
    /// The request's id.
    pub id: String,
    /// When it came.
    pub start: Instant,
    /// Keeps a drain waiting.
    pub running: TaskTrackerToken,
}

impl Job {
    /// Gives the engine all of the requests, or none of them.
    pub fn submit(
        app: &App,
        loaded: &Loaded,
        (caller, pin): (Caller, Option<Pin>),
        requests: Vec<Request>,
    ) -> Result<Job, ApiError> {
        let (send, events) = mpsc::unbounded_channel();
        let mut answers = Vec::with_capacity(requests.len());
        for (index, mut request) in requests.into_iter().enumerate() {
            let tokens = request.prompt.len() + request.given.len();
            let slot = app.slots().enter(&caller.id, tokens, request.kv);
            request.tag = Some(slot.task());
            let rest = request.salt.is_none().then(|| Rest {
                kv: request.kv,
                tokens: request.prompt.iter().chain(&request.given).copied().collect(),
                prompt: request.prompt.len(),
            });
            let (most, send) = (request.most_tokens, send.clone());
            // A closed queue means that nobody listens any more; the ticket is dropped with it.
            let ticket = loaded.service.submit(request, move |event| drop(send.send((index, event))));
            let ticket = ticket.map_err(|refused| ApiError::refused(&refused, most, "prompt"))?;
            answers.push(Running {
                ticket: Some(ticket),
                slot: Some((slot, rest)),
                timeline: Timeline { last: None },
            });
        }
        let left = answers.len();
        let (app, start, _running) = (app.clone(), caller.start, caller.running);
        Ok(Job { app, events, answers, left, start, _running, _pin: pin })
    }

    /// The next event of any answer; `None` when all have ended.
    pub async fn next(&mut self) -> Result<Option<(usize, Event)>, ApiError> {
        if self.left == 0 {
            return Ok(None);
        }
        let limit = self.app.options().request_timeout;
        let received = match limit {
            Some(limit) => {
                let until = (self.start + limit).into();
                let late = |_| ApiError::timed_out(limit.as_secs_f64());
                tokio::time::timeout_at(until, self.events.recv()).await.map_err(late)?
            }
            None => self.events.recv().await,
        };
        let (index, event) =
            received.ok_or_else(|| ApiError::internal("The engine has ended unexpectedly"))?;
        match event {
            Event::Sampled(ref token) => self.count(index, token.id),
            Event::Ended(..) => {
                self.left -= 1;
                if let Some((mut slot, Some(rest))) = self.answers[index].slot.take()
                    && self.app.keeps_slot(slot.id())
                {
                    slot.leave(rest);
                }
            }
            Event::Prompt(_) | Event::Given(_) => {}
        }
        Ok(Some((index, event)))
    }

    /// Nobody wants more of this answer.
    pub fn cancel(&mut self, index: usize) {
        self.answers[index].ticket = None;
    }

    /// Since the request came.
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    fn count(&mut self, index: usize, token: u32) {
        let Running { slot, timeline, .. } = &mut self.answers[index];
        if let Some((slot, rest)) = slot {
            slot.count();
            if let Some(rest) = rest {
                rest.tokens.push(token);
            }
        }
        let now = Instant::now();
        self.app.meters().token(timeline, now - timeline.last.unwrap_or(self.start));
        timeline.last = Some(now);
    }
}
