//! How does a request become answers? It is submitted, its events become text, and what it took is added up.

use crate::app::{App, Loaded};
use crate::choice::{Choice, Delta};
use crate::error::ApiError;
use crate::grammar::Restriction;
use crate::job::{Caller, Job};
use crate::kv::KvReport;
use crate::plan::Plan;
use crate::reply::{Timings, Usage};
use mosaickv_engine::{Bill, Pin, PromptLogprobs, Request};
use mosaickv_kv::KvFormat;
use mosaickv_model::Text;
use std::collections::VecDeque;
use std::sync::Arc;

/// A request that has been understood.
pub struct Order {
    /// What is to be answered.
    pub prompts: Vec<Asked>,
    /// How.
    pub plan: Plan,
    /// How keys and values are kept.
    pub kv: KvFormat,
    /// Of how many tokens log probabilities are wanted at each place.
    pub logprobs: Option<usize>,
    /// What restricts each answer, if anything does.
    pub restriction: Option<Restriction>,
    /// Why what the prompts go on from stays in memory.
    pub pin: Option<Pin>,
}

/// A prompt.
pub struct Asked {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Tokens of it that are read before compression; the others are read through what is compressed.
    pub read: usize,
    /// Whether log probabilities of those others are sent.
    pub is_scored: bool,
    /// Most tokens to be answered.
    pub most_tokens: usize,
    /// Whether the answer begins with it.
    pub echo: Echo,
}

/// Whether an answer begins with its prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Echo {
    /// It does not.
    Off,
    /// It does, with this text, or else that of the tokens.
    On(Option<String>),
}

/// What all answers of a request took.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// Tokens of the prompts, each counted once.
    pub prompt_tokens: usize,
    /// Tokens of the answers.
    pub output_tokens: usize,
    /// The engine's bills of those that ended.
    pub bills: Vec<Bill>,
    /// Of each prompt, the tokens that no answer to it had to read, as far as answers have ended.
    pub cached: Vec<Option<usize>>,
}

impl Tally {
    /// Tokens of prompts that had been read before.
    pub fn cached_tokens(&self) -> usize {
        self.cached.iter().flatten().sum()
    }
}

/// The answers of a request while they are made.
pub struct Answering {
    app: App,
    /// The model that answers.
    pub loaded: Arc<Loaded>,
    job: Job,
    choices: Vec<Choice>,
    /// What can be said before anything is computed.
    opening: VecDeque<(usize, Delta)>,
    tally: Tally,
    kv: KvFormat,
    with_report: bool,
}

impl Answering {
    /// Submits what is asked for.
    pub fn begin(
        app: &App,
        loaded: &Arc<Loaded>,
        caller: Caller,
        order: Order,
    ) -> Result<Answering, ApiError> {
        let Order { prompts, plan, kv, logprobs, restriction, pin } = order;
        let most = loaded.settings.most_waiting.max(1);
        if prompts.len().saturating_mul(plan.choices) > most {
            let message = format!(
                "{} prompts with {} answers each; this server takes at most {most} answers a request.",
                prompts.len(),
                plan.choices
            );
            return Err(ApiError::invalid(if plan.choices > 1 { "n" } else { "prompt" }, message));
        }
        let (mut requests, mut choices, mut opening) = (vec![], vec![], VecDeque::new());
        let prompt_tokens = prompts.iter().map(|prompt| prompt.tokens.len()).sum();
        for asked in &prompts {
            for number in 0..plan.choices {
                let (choice, delta) = open(&plan, asked, logprobs, &loaded.text)?;
                opening.extend(delta.map(|delta| (choices.len(), delta)));
                choices.push(choice);
                let mut request = request(&plan, asked, logprobs, kv);
                request.sampling.seed = plan.sampling.seed.wrapping_add(number as u64);
                request.grammar = restriction.as_ref().map(|restriction| Box::new(restriction.copy()) as _);
                requests.push(request);
            }
        }
        Ok(Answering {
            app: app.clone(),
            loaded: loaded.clone(),
            job: Job::submit(app, loaded, (caller, pin), requests)?,
            choices,
            opening,
            tally: Tally { prompt_tokens, cached: vec![None; prompts.len()], ..Tally::default() },
            kv,
            with_report: plan.with_report,
        })
    }

    /// How many answers there are.
    pub fn count(&self) -> usize {
        self.choices.len()
    }

    /// What is new of any answer; `None` when all have ended.
    pub async fn next(&mut self) -> Result<Option<(usize, Delta)>, ApiError> {
        if let Some(delta) = self.opening.pop_front() {
            return Ok(Some(delta));
        }
        let Some((index, event)) = self.job.next().await? else { return Ok(None) };
        let choice = &mut self.choices[index];
        let delta = choice.take(&self.loaded.text, event)?;
        if choice.is_stopped() {
            self.job.cancel(index);
        }
        if let Some((finish, bill)) = &delta.finish {
            self.tally.output_tokens += choice.sampled();
            self.tally.bills.push(*bill);
            let of_prompt = self.choices.len() / self.tally.cached.len();
            let cached = &mut self.tally.cached[index / of_prompt];
            *cached = Some(cached.unwrap_or(usize::MAX).min(bill.cached_tokens));
            self.app.meters().finished(*finish, bill, self.job.elapsed());
        }
        Ok(Some((index, delta)))
    }

    /// Whether all have ended.
    pub fn is_over(&self) -> bool {
        self.tally.bills.len() == self.choices.len()
    }

    /// The tokens used so far.
    pub fn usage(&self) -> Usage {
        Usage::new(&self.tally)
    }

    /// How long it took.
    pub fn timings(&self) -> Timings {
        Timings::new(&self.tally)
    }

    /// What keys and values took, unless the request wants no report.
    pub fn kv_report(&self) -> Option<KvReport> {
        self.with_report.then(|| KvReport::new(self.kv, &self.tally.bills, self.tally.cached_tokens()))
    }
}

/// An answer, and what of it is there before anything is computed.
fn open(
    plan: &Plan,
    asked: &Asked,
    logprobs: Option<usize>,
    text: &Text,
) -> Result<(Choice, Option<Delta>), ApiError> {
    let Asked { tokens, read, is_scored, .. } = asked;
    let has_entries = logprobs.is_some();
    // Scored tokens come as events; of others the answer has nothing.
    let before = if *is_scored && has_entries { &tokens[..*read] } else { &tokens[..] };
    if asked.echo == Echo::Off || tokens.is_empty() {
        return Ok((Choice::new(plan, before, has_entries), None));
    }
    if has_entries {
        let mut choice = Choice::new(plan, &[], has_entries);
        let delta = choice.first(text, tokens[0])?;
        return Ok((choice, Some(delta)));
    }
    let mut choice = Choice::new(plan, before, has_entries);
    let echoed = match &asked.echo {
        Echo::On(Some(written)) if before.len() == tokens.len() => written.clone(),
        _ => text.decode(before).map_err(|error| ApiError::text("prompt", &error))?,
    };
    let delta = choice.echo(echoed);
    Ok((choice, Some(delta)))
}

fn request(plan: &Plan, asked: &Asked, logprobs: Option<usize>, kv: KvFormat) -> Request {
    let (prompt, given) = asked.tokens.split_at(asked.read);
    Request {
        prompt: prompt.to_vec(),
        given: given.to_vec(),
        kv,
        most_tokens: asked.most_tokens,
        least_tokens: plan.least_tokens.min(asked.most_tokens),
        ends: plan.ends.clone(),
        sampling: plan.sampling.clone(),
        logprobs,
        prompt_logprobs: match (&asked.echo, logprobs) {
            (Echo::On(_), Some(_)) => PromptLogprobs::All,
            _ if asked.is_scored => PromptLogprobs::Given,
            _ => PromptLogprobs::Off,
        },
        priority: plan.priority,
        salt: plan.salt.clone(),
        grammar: None,
        keep: None,
        // Its slot's, which it gets when it is submitted.
        tag: None,
    }
}
