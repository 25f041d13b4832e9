//! What does each KV format make of the same prompt?
//!
//! A prompt is read once, exactly. Every format then gets a compressed copy of that one cache and goes on by itself,
//! so that differences between rows of one sample are the format's doing and nothing else's. The first token of an
//! answer follows from the exact prompt in all of them; what comes after it reads the compressed cache.

use crate::longbench::Item;
use crate::results::{AnswerRow, Cost, Row};
use crate::{EvalError, Sample};
use mosaickv_kernels::Pool;
use mosaickv_kernels::matrix::Precision;
use mosaickv_kv::{KvCache, KvFormat};
use mosaickv_model::{Decoder, Model, Sequence, Text, greedy, step_each};
use std::time::{Duration, Instant};

/// A model and the formats that are compared on it.
pub struct Run<'a> {
    /// The model.
    pub model: &'a Model,
    /// Its tokenizer.
    pub text: &'a Text,
    /// The threads to compute on.
    pub pool: &'a Pool,
    /// The formats, in the order of their rows.
    pub formats: &'a [KvFormat],
    /// Of activations where they meet quantized weights.
    pub precision: Precision,
    /// Tokens of a prompt after which it is compressed, if it has more; the others are read through what is compressed.
    pub most_exact: Option<usize>,
    /// Where the time went so far.
    pub times: Times,
}

/// Where a run's time went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// Reading prompts, shared by all formats.
    pub prefill: Duration,
    /// Making compressed copies.
    pub compress: Duration,
    /// Decode steps of all formats.
    pub decode: Duration,
}

impl<'a> Run<'a> {
    /// Nothing run yet; activations of 8 bits, as models are served.
    pub fn new(model: &'a Model, text: &'a Text, pool: &'a Pool, formats: &'a [KvFormat]) -> Run<'a> {
        let (precision, times) = (Precision::EightBits, Times::default());
        Run { model, text, pool, formats, precision, most_exact: None, times }
    }

    /// Lets every format answer the sample greedily: one row a format, in their order. They go on in step with each
    /// other, so that the weights are read once for all of them.
    pub fn answers(&mut self, sample: &Sample) -> Result<Vec<Row>, EvalError> {
        let prompt = self.prompt(sample)?;
        let (first, rest) = prompt.split_at(prompt.len().min(self.most_exact.unwrap_or(usize::MAX)));
        let (exact, logits) = self.read(first)?;
        let mut answers = Vec::with_capacity(self.formats.len());
        for &format in self.formats {
            let mut fork = self.fork(&exact, format, None)?;
            let next = match rest {
                [] => greedy(&logits),
                rest => self.go_on(&mut fork, rest)?,
            };
            answers.push(Answering::new(format, fork, next));
        }
        drop(exact);
        let start = Instant::now();
        loop {
            let mut going = Vec::with_capacity(answers.len());
            for answer in &mut answers {
                if answer.take(self.text, sample)? {
                    going.push(answer);
                }
            }
            if going.is_empty() {
                break;
            }
            let tokens: Vec<u32> = going.iter().map(|answer| answer.next).collect();
            let mut forks: Vec<_> = going.iter_mut().map(|answer| &mut answer.fork).collect();
            let logits = step_each(&mut forks, &tokens)?;
            let vocab = self.model.config.vocab;
            for (answer, logits) in going.into_iter().zip(logits.chunks_exact(vocab)) {
                answer.next = greedy(logits);
            }
        }
        self.times.decode += start.elapsed();
        answers.into_iter().map(|answer| answer.row(self.text, sample)).collect()
    }

    /// A LongBench item's sample, truncated in the middle to what the model's context leaves for a prompt, and whether
    /// it had to be.
    pub fn longbench(&self, item: &Item) -> Result<(Sample, bool), EvalError> {
        let encode = |text: &str| Ok::<_, EvalError>(self.text.encode_plain(text)?);
        let decode = |tokens: &[u32]| Ok::<_, EvalError>(self.text.decode(tokens)?);
        let (mut sample, tokens) = item.sample(encode, decode, usize::MAX)?;
        // What is left of the context shows once the chat template is around the prompt, and the two halves of a
        // truncated one may have a token more than they were cut to: cut again until it fits.
        let (mut limit, mut truncated) = (tokens, false);
        while let Err(error) = self.prompt(&sample) {
            let EvalError::TooLong { tokens, context, .. } = error else { return Err(error) };
            if limit < 2 + tokens - context {
                return Err(error);
            }
            limit -= tokens - context;
            (sample, truncated) = (item.sample(encode, decode, limit)?.0, true);
        }
        Ok((sample, truncated))
    }

    /// The prompt's tokens; an error if they and the answer exceed the model's context.
    fn prompt(&self, sample: &Sample) -> Result<Vec<u32>, EvalError> {
        let tokens = match sample.chat && self.text.has_template() {
            true => self.text.encode_chat(&sample.prompt)?,
            false => self.text.encode_plain(&sample.prompt)?,
        };
        let (tokens_in_all, context) = (tokens.len() + sample.max_new_tokens, self.model.context());
        if tokens_in_all > context {
            let which = format!("{} {}", sample.task, sample.index);
            return Err(EvalError::TooLong { which, tokens: tokens_in_all, context });
        }
        Ok(tokens)
    }

    /// Reads a prompt exactly: the sequence, and the logits `[vocab]` that follow.
    pub(crate) fn read(&mut self, prompt: &[u32]) -> Result<(Sequence<'a>, Vec<f32>), EvalError> {
        let start = Instant::now();
        let exact = Sequence::new(self.model, self.pool, KvFormat::Exact)?;
        let mut exact = exact.with_precision(self.precision).remember_queries();
        let logits = exact.prefill(prompt, &mut |_, _| ())?;
        self.times.prefill += start.elapsed();
        Ok((exact, logits))
    }

    /// Reads the rest of a prompt, through what is compressed: the token that follows.
    fn go_on(&mut self, fork: &mut Sequence<'a>, rest: &[u32]) -> Result<u32, EvalError> {
        let start = Instant::now();
        let logits = fork.prefill(rest, &mut |_, _| ())?;
        self.times.prefill += start.elapsed();
        Ok(greedy(&logits))
    }

    /// A copy that is compressed, in all layers or in one.
    pub(crate) fn fork(
        &mut self,
        exact: &Sequence<'a>,
        format: KvFormat,
        layer: Option<usize>,
    ) -> Result<Sequence<'a>, EvalError> {
        let start = Instant::now();
        let fork = match layer {
            None => exact.compressed(format)?,
            Some(layer) => exact.compressed_layer(layer, format)?,
        };
        self.times.compress += start.elapsed();
        Ok(fork)
    }
}

/// One format's answer to a sample, as far as it has come.
struct Answering<'a> {
    format: KvFormat,
    fork: Sequence<'a>,
    meter: Meter,
    decoder: Decoder,
    answer: String,
    /// Tokens taken.
    made: usize,
    /// The token that comes next.
    next: u32,
    is_over: bool,
}

impl<'a> Answering<'a> {
    fn new(format: KvFormat, fork: Sequence<'a>, next: u32) -> Answering<'a> {
        let (meter, decoder, answer) = (Meter::new(&fork), Decoder::new(), String::new());
        Answering { format, fork, meter, decoder, answer, made: 0, next, is_over: false }
    }

    /// Takes the next token into the answer; whether the answer goes on after it.
    fn take(&mut self, text: &Text, sample: &Sample) -> Result<bool, EvalError> {
        if self.is_over || text.eos().contains(&self.next) {
            self.is_over = true;
            return Ok(false);
        }
        self.answer += &self.decoder.push(text, self.next)?;
        self.made += 1;
        let line_is_over = sample.one_line && self.answer.trim_start_matches('\n').contains('\n');
        let is_settled = sample.metric.is_settled(&self.answer, &sample.answers);
        self.is_over = line_is_over || is_settled || self.made >= sample.max_new_tokens;
        Ok(!self.is_over)
    }

    fn row(mut self, text: &Text, sample: &Sample) -> Result<Row, EvalError> {
        self.answer += &self.decoder.finish(text)?;
        Ok(Row::Answer(AnswerRow {
            task: sample.task.clone(),
            length: sample.length,
            sample: sample.index,
            kv: self.format.to_string(),
            cost: self.meter.cost(&self.fork),
            depth: sample.depth,
            score: sample.metric.score(&self.answer, &sample.answers),
            prediction: self.answer,
            answers: sample.answers.clone(),
        }))
    }
}

/// What a compressed copy holds when the prompt is in, and what it reads from then on.
#[derive(Clone)]
pub(crate) struct Meter {
    cost: Cost,
    /// Tokens held and bytes read when the prompt was in.
    before: (usize, Option<u64>),
}

impl Meter {
    pub(crate) fn new(fork: &Sequence) -> Meter {
        let cache = fork.cache();
        let (tokens, bytes) = (cache.tokens(), cache.bytes().total());
        let cost = Cost {
            prompt_tokens: tokens,
            kv_bytes: bytes,
            ratio: ratio(cache),
            end_ratio: None,
            bits_per_scalar: bytes as f64 * 8.0 / cache.shape().scalars(tokens) as f64,
            bytes_read_per_step: None,
        };
        Meter { cost, before: (tokens, fork.bytes_read()) }
    }

    /// The cost, with what the steps since then led to, if there were any.
    pub(crate) fn cost(self, fork: &Sequence) -> Cost {
        let cache = fork.cache();
        let steps = cache.tokens() - self.before.0;
        if steps == 0 {
            return self.cost;
        }
        let read = fork.bytes_read().zip(self.before.1);
        let bytes_read_per_step = read.map(|(after, before)| (after - before) as f64 / steps as f64);
        Cost { bytes_read_per_step, end_ratio: Some(ratio(cache)), ..self.cost }
    }
}

/// Exact f16 bytes of the tokens held to stored bytes.
fn ratio(cache: &KvCache) -> f64 {
    cache.shape().exact_bytes(cache.tokens()) as f64 / cache.bytes().total() as f64
}
