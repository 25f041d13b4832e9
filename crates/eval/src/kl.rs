//! How far do next-token distributions move when the cache is compressed?
//!
//! All formats read the same tokens in lockstep with the exact cache, each from its own copy of one prompt, so no
//! distribution is ever stored. The text's own tokens are fed whatever a format would have said (teacher forcing).
//! Needles hidden in the text are asked for *after* compression: a format that threw them away cannot know.

use crate::results::{KlRow, Row};
use crate::run::{Meter, Run};
use crate::{EvalError, ruler};
use mosaickv_kv::KvFormat;
use mosaickv_model::{Sequence, Specials, feed_each, greedy, step_each};
use std::time::Instant;

/// A text to predict, and how much of it.
#[derive(Clone, Copy, Debug)]
pub struct Document<'a> {
    /// What rows call it.
    pub name: &'a str,
    /// Its text.
    pub content: &'a str,
    /// Tokens that are read exactly and then compressed.
    pub prefix: usize,
    /// Tokens that are predicted after them, each from the compressed cache.
    pub score: usize,
}

/// Which layers are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layers {
    /// All of them together.
    All,
    /// One at a time, the others staying exact: as many rows a format as the model has layers.
    Each,
}

impl<'a> Run<'a> {
    /// One row a format, or one a format and layer: the text's next tokens.
    pub fn kl(&mut self, document: Document, layers: Layers) -> Result<Vec<Row>, EvalError> {
        let Document { name, prefix, .. } = document;
        let tokens = self.tokens(document)?;
        let (mut exact, _) = self.read(&tokens[..prefix])?;
        let mut forks = self.forks(&exact, layers)?;
        self.compare(&mut exact, &mut forks, &tokens[prefix..], 0)?;
        Ok(forks.into_iter().map(|fork| fork.row(name.to_owned(), None)).collect())
    }

    /// `count` needles in one copy of the text's beginning, each asked for on forks of the same caches, compressed
    /// before any question is known: per needle one row a format, over the tokens of the right answer.
    pub fn ask(&mut self, document: Document, count: usize, seed: u64) -> Result<Vec<Row>, EvalError> {
        let tokens = self.text.encode_plain(document.content)?;
        let hidden = |tokens: &[u32]| -> Result<_, EvalError> {
            let hidden = ruler::hide(&self.text.decode(tokens)?, count, seed);
            let prompt = self.text.encode_plain(&hidden.prompt)?;
            Ok((hidden, prompt))
        };
        // As much text as leaves the needles their room.
        let whole = tokens.len().min(document.prefix);
        let (mut hidden_in, mut prompt) = hidden(&tokens[..whole])?;
        if let Some(excess) = prompt.len().checked_sub(document.prefix) {
            (hidden_in, prompt) = hidden(&tokens[..whole.saturating_sub(excess)])?;
        }
        let (exact, _) = self.read(&prompt)?;
        let forks = self.forks(&exact, Layers::All)?;
        let mut rows = Vec::new();
        for (i, needle) in hidden_in.needles.iter().enumerate() {
            let question = self.text.encode(&needle.question, Specials::Literal)?;
            let answer = self.text.encode(&needle.answer, Specials::Literal)?;
            let asked = [question.as_slice(), &answer].concat();
            self.fits(document.name, prompt.len() + asked.len())?;
            let (mut exact, mut forks) = (exact.clone(), forks.clone());
            self.compare(&mut exact, &mut forks, &asked, question.len() - 1)?;
            let name = format!("{} ask {}", document.name, i + 1);
            rows.extend(forks.into_iter().map(|fork| fork.row(name.clone(), Some(needle.depth))));
        }
        Ok(rows)
    }

    /// The tokens that [`kl`](Run::kl) reads of a text; an error if it has too few, or they do not fit the model.
    pub fn tokens(&self, document: Document) -> Result<Vec<u32>, EvalError> {
        let Document { name, content, prefix, score } = document;
        let mut tokens = self.text.encode_plain(content)?;
        // The token after the prefix is fed, not predicted: its prediction is the exact prompt's.
        let wanted = prefix + score + 1;
        self.fits(name, wanted)?;
        if tokens.len() < wanted {
            return Err(EvalError::TooShort { which: name.to_owned(), tokens: tokens.len(), wanted });
        }
        tokens.truncate(wanted);
        Ok(tokens)
    }

    fn fits(&self, which: &str, tokens: usize) -> Result<(), EvalError> {
        let context = self.model.context();
        if tokens > context {
            return Err(EvalError::TooLong { which: which.to_owned(), tokens, context });
        }
        Ok(())
    }

    /// Compressed copies of the exact sequence, one a row.
    fn forks(&mut self, exact: &Sequence<'a>, layers: Layers) -> Result<Vec<Fork<'a>>, EvalError> {
        let which: Vec<Option<usize>> = match layers {
            Layers::All => vec![None],
            Layers::Each => (0..self.model.config.layers).map(Some).collect(),
        };
        let formats = self.formats;
        let mut forks = Vec::with_capacity(formats.len() * which.len());
        for (&format, &layer) in formats.iter().flat_map(|f| which.iter().map(move |l| (f, l))) {
            forks.push(Fork::new(format, layer, self.fork(exact, format, layer)?));
        }
        Ok(forks)
    }

    /// Feeds `tokens`, each but the last, to the exact sequence and the forks. After the first `unscored` it adds up what
    /// they say of each next token.
    fn compare(
        &mut self,
        exact: &mut Sequence<'a>,
        forks: &mut [Fork<'a>],
        tokens: &[u32],
        unscored: usize,
    ) -> Result<(), EvalError> {
        let start = Instant::now();
        let vocab = self.model.config.vocab;
        for (i, next) in tokens.windows(2).enumerate() {
            let forked = forks.iter_mut().map(|fork| &mut fork.sequence);
            let mut all: Vec<&mut Sequence> = std::iter::once(&mut *exact).chain(forked).collect();
            let fed = vec![next[0]; all.len()];
            if i < unscored {
                feed_each(&mut all, &fed)?;
                continue;
            }
            let logits = step_each(&mut all, &fed)?;
            let (reference, others) = logits.split_at(vocab);
            let reference = Said::new(reference, next[1]);
            for (fork, logits) in forks.iter_mut().zip(others.chunks_exact(vocab)) {
                fork.add(&reference, &Said::new(logits, next[1]));
            }
        }
        self.times.decode += start.elapsed();
        Ok(())
    }
}

/// A next-token distribution, and what came.
struct Said {
    /// Log-probabilities `[vocab]`, nats.
    log_p: Vec<f64>,
    top: u32,
    /// Negative log-likelihood of the token that came, nats.
    nll: f64,
}

impl Said {
    fn new(logits: &[f32], came: u32) -> Said {
        let top = greedy(logits);
        let max = f64::from(logits[top as usize]);
        let sum: f64 = logits.iter().map(|&x| (f64::from(x) - max).exp()).sum();
        let log_sum = max + sum.ln();
        let log_p: Vec<f64> = logits.iter().map(|&x| f64::from(x) - log_sum).collect();
        Said { nll: -log_p[came as usize], log_p, top }
    }
}

/// A compressed copy and the sums over what it predicted.
#[derive(Clone)]
struct Fork<'a> {
    format: KvFormat,
    layer: Option<usize>,
    sequence: Sequence<'a>,
    meter: Meter,
    tokens: usize,
    kl: f64,
    agreed: usize,
    nll: f64,
    exact_nll: f64,
}

impl<'a> Fork<'a> {
    fn new(format: KvFormat, layer: Option<usize>, sequence: Sequence<'a>) -> Fork<'a> {
        let meter = Meter::new(&sequence);
        Fork { format, layer, sequence, meter, tokens: 0, kl: 0.0, agreed: 0, nll: 0.0, exact_nll: 0.0 }
    }

    fn add(&mut self, exact: &Said, here: &Said) {
        self.tokens += 1;
        self.kl += exact.log_p.iter().zip(&here.log_p).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        self.agreed += usize::from(exact.top == here.top);
        self.nll += here.nll;
        self.exact_nll += exact.nll;
    }

    fn row(self, text: String, depth: Option<f64>) -> Row {
        let mean = |sum: f64| sum / self.tokens as f64;
        Row::Kl(KlRow {
            text,
            kv: self.format.to_string(),
            layer: self.layer,
            cost: self.meter.cost(&self.sequence),
            tokens: self.tokens,
            kl: mean(self.kl),
            top1: mean(self.agreed as f64),
            nll: mean(self.nll),
            dnll: mean(self.nll - self.exact_nll),
            perplexity: mean(self.nll).exp(),
            depth,
        })
    }
}
