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
use mosaickv_kv::KvFormat;
use mosaickv_model::{Decoder, Model, Sequence, Text, greedy};
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
        Run { model, text, pool, formats, precision: Precision::EightBits, times: Times::default() }
    }

    /// Lets every format answer the sample greedily: one row a format, in their order.
    pub fn answers(&mut self, sample: &Sample) -> Result<Vec<Row>, EvalError> {
        let prompt = self.prompt(sample)?;
        let (exact, logits) = self.read(&prompt)?;
        let mut rows = Vec::with_capacity(self.formats.len());
        for &format in self.formats {
            let mut fork = self.fork(&exact, format, None)?;
            let mut cost = cost(&fork);
            let prediction = self.generate(&mut fork, &logits, sample, &mut cost)?;
            rows.push(Row::Answer(AnswerRow {
                task: sample.task.clone(),
                length: sample.length,
                sample: sample.index,
                kv: format.to_string(),
                cost,
                depth: sample.depth,
                score: sample.metric.score(&prediction, &sample.answers),
                prediction,
                answers: sample.answers.clone(),
            }));
        }
        Ok(rows)
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

    /// Goes on greedily after `logits` until the answer ends; adds the mean bytes read to `cost`.
    fn generate(
        &mut self,
        fork: &mut Sequence,
        logits: &[f32],
        sample: &Sample,
        cost: &mut Cost,
    ) -> Result<String, EvalError> {
        let start = Instant::now();
        let (read, held) = (fork.cache().bytes_read(), fork.cache().tokens());
        let (mut decoder, mut answer) = (Decoder::new(), String::new());
        let mut next = greedy(logits);
        for made in 1.. {
            if self.text.eos().contains(&next) {
                break;
            }
            answer += &decoder.push(self.text, next)?;
            let line_is_over = sample.one_line && answer.trim_start_matches('\n').contains('\n');
            let is_over = line_is_over || sample.metric.is_settled(&answer, &sample.answers);
            if made >= sample.max_new_tokens || is_over {
                break;
            }
            next = greedy(&fork.step(next)?);
        }
        answer += &decoder.finish(self.text)?;
        self.times.decode += start.elapsed();
        let steps = fork.cache().tokens() - held;
        let read = fork.cache().bytes_read() - read;
        cost.bytes_read_per_step = (steps > 0).then(|| read as f64 / steps as f64);
        Ok(answer)
    }
}

/// What the cache holds now; nothing read yet.
pub(crate) fn cost(sequence: &Sequence) -> Cost {
    let cache = sequence.cache();
    let (tokens, bytes) = (cache.tokens(), cache.bytes().total());
    Cost {
        prompt_tokens: tokens,
        kv_bytes: bytes,
        ratio: cache.shape().exact_bytes(tokens) as f64 / bytes as f64,
        bits_per_scalar: bytes as f64 * 8.0 / cache.shape().scalars(tokens) as f64,
        bytes_read_per_step: None,
    }
}
