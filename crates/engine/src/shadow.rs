//! What does compression cost the answers that are given now?
//!
//! Of some requests the exact cache stays beside the compressed one while their first tokens are sampled. Then it reads these
//! tokens too, and what it says follows is held against what the compressed cache said. Nobody's answer changes by that.

use crate::request::Active;
use crate::{Compute, Reading, Shadowed};
use mosaickv_kv::KvFormat;
use mosaickv_model::{Part, Wanted, greedy};

/// Sampled tokens that are held against the exact cache's distributions.
pub(crate) const STEPS: usize = 32;

/// Formats of which it is remembered: requests may ask for any number of them.
const FORMATS: usize = 16;

/// Prompts of fewer tokens are not watched: little of them is compressed.
const LEAST_TOKENS: usize = 256;

/// The exact cache beside a request's own.
#[derive(Default)]
pub(crate) enum Shadow<S> {
    /// There is none.
    #[default]
    Off,
    /// The request reads its prompt with an exact cache, of which a compressed copy will be made.
    Reading,
    /// The prompt is compressed.
    On {
        /// What has read it and nothing else.
        exact: S,
        /// What follows the prompt's next tokens one by one, `[vocab]` each.
        heard: Vec<Vec<f32>>,
    },
}

impl<S> Shadow<S> {
    /// Logits that followed the compressed cache and `after` tokens of the answer.
    pub(crate) fn hear(&mut self, after: usize, logits: &[f32]) {
        // The first token follows from the prompt itself, before compression.
        if let Shadow::On { heard, .. } = self
            && heard.len() < STEPS
            && after == heard.len() + 1
        {
            heard.push(logits.to_vec());
        }
    }

    /// Whether it has heard enough.
    pub(crate) fn is_done(&self) -> bool {
        matches!(self, Shadow::On { heard, .. } if heard.len() == STEPS)
    }

    /// The exact sequence, while it is there beside the compressed one.
    pub(crate) fn exact(&self) -> Option<&S> {
        match self {
            Shadow::On { exact, .. } => Some(exact),
            Shadow::Off | Shadow::Reading => None,
        }
    }

    /// Reads what was sampled: what comes of it.
    pub(crate) fn compare<C: Compute<Sequence = S>>(
        self,
        compute: &C,
        active: &Active,
    ) -> Result<Shadowed, String> {
        let mut all = Shadowed::default();
        let Shadow::On { mut exact, heard } = self else { return Ok(all) };
        if heard.is_empty() {
            return Ok(all);
        }
        let prompt = active.speech.prompt;
        let tokens = &active.tokens[prompt..prompt + heard.len()];
        let reading = Reading { sequence: &mut exact, tokens, part: Part::Prompt, wanted: Wanted::All };
        compute.read(vec![reading], &mut |_, t, logits| {
            all.steps += 1;
            all.kl += divergence(logits, &heard[t]);
            all.agreed += u64::from(greedy(logits) == greedy(&heard[t]));
        })?;
        Ok(all)
    }
}

/// Adds what came of an answer in this format.
pub(crate) fn add(all: &mut Vec<(KvFormat, Shadowed)>, kv: KvFormat, one: Shadowed) {
    let place = all.iter().position(|(format, _)| *format == kv).unwrap_or(all.len());
    if place == FORMATS {
        return;
    }
    if place == all.len() {
        all.push((kv, Shadowed::default()));
    }
    let of_kv = &mut all[place].1;
    of_kv.steps += one.steps;
    of_kv.kl += one.kl;
    of_kv.agreed += one.agreed;
}

/// Whether a request is one that can be watched.
pub(crate) fn is_for(active: &Active) -> bool {
    let prompt = active.speech.prompt;
    // Who goes on after losing its cache has more tokens; what is given is not sampled; and of one token nothing follows.
    active.speech.samples_more_than_one()
        && prompt >= LEAST_TOKENS
        && prompt == active.tokens.len()
        && active.kv.compresses_prompt_of(prompt)
}

/// KL divergence, in nats, of the distribution of the second logits `[vocab]` from that of the first.
fn divergence(logits: &[f32], others: &[f32]) -> f64 {
    let log_sum = |logits: &[f32]| {
        let top = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        top + logits.iter().map(|&x| (f64::from(x) - top).exp()).sum::<f64>().ln()
    };
    let (p, q) = (log_sum(logits), log_sum(others));
    let of_token = |(&x, &y): (&f32, &f32)| {
        let log_p = f64::from(x) - p;
        log_p.exp() * (log_p - (f64::from(y) - q))
    };
    logits.iter().zip(others).map(of_token).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_is_that_of_the_definition() {
        let (p, q) = ([0.5f32, 0.25, 0.25], [0.25f32, 0.25, 0.5]);
        let logits = |p: [f32; 3], shift: f32| p.map(|p| p.ln() + shift);
        let want = 0.5 * 2f64.ln() - 0.25 * 2f64.ln();
        assert!((divergence(&logits(p, 3.0), &logits(q, -200.0)) - want).abs() < 1e-5);
        assert!(divergence(&logits(p, 1.0), &logits(p, 2.0)).abs() < 1e-6);
    }
}
