//! Which token comes next? From logits to a token, the way that the request asked for.

use crate::Grammar;
use mosaickv_model::greedy;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::collections::HashMap;

/// How the next token is chosen. The default is the most probable one.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0: the most probable token.
    pub temperature: f32,
    /// Only so many of the most probable tokens; 0: all.
    pub top_k: usize,
    /// Only the most probable tokens that have this probability together, at least one; 1: all.
    pub top_p: f32,
    /// Only tokens at least this many times as probable as the most probable one; 0: all.
    pub min_p: f32,
    /// Positive logits of tokens that the prompt or the answer has are divided by it, negative ones multiplied (Keskar et al. 2019,
    /// arXiv 1909.05858, s. 4.1); 1: nothing.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens that the answer has.
    pub presence_penalty: f32,
    /// Subtracted from the logits of tokens for each time that the answer has them.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// What draws depend on.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// Chooses the tokens of one answer.
pub(crate) struct Sampler {
    sampling: Sampling,
    draws: ChaCha8Rng,
    grammar: Option<Box<dyn Grammar>>,
    /// How often the answer has a token, if choices look back; with a repetition penalty tokens of the prompt have an entry too.
    seen: HashMap<u32, usize>,
}

impl Sampler {
    /// After these tokens.
    pub(crate) fn new(sampling: Sampling, grammar: Option<Box<dyn Grammar>>, before: &[u32]) -> Sampler {
        let repeats = sampling.repetition_penalty != 1.0;
        let seen = if repeats { before.iter().map(|&id| (id, 0)).collect() } else { HashMap::new() };
        Sampler { draws: ChaCha8Rng::seed_from_u64(sampling.seed), sampling, grammar, seen }
    }

    /// The next token, never one of `banned`. An error is the grammar's.
    pub(crate) fn choose(&mut self, logits: &[f32], banned: &[u32]) -> Result<u32, String> {
        if self.takes_the_first() {
            let id = greedy(logits);
            if !banned.contains(&id) && logits[id as usize] > f32::NEG_INFINITY {
                return Ok(id);
            }
        }
        let mut logits = logits.to_vec();
        self.weigh(&mut logits);
        for &id in banned {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        if let Some(grammar) = &mut self.grammar {
            grammar.mask(&mut logits)?;
        }
        let id = if self.sampling.temperature > 0.0 { self.draw(&logits) } else { greedy(&logits) };
        if logits[id as usize] == f32::NEG_INFINITY {
            return Err("no token may come next: the grammar and the other limits leave none".into());
        }
        if let Some(grammar) = &mut self.grammar {
            grammar.accept(id)?;
        }
        if self.looks_back() {
            *self.seen.entry(id).or_default() += 1;
        }
        Ok(id)
    }

    /// Whether the most probable token is chosen, but for those that are banned.
    fn takes_the_first(&self) -> bool {
        let Sampling { temperature, logit_bias, .. } = &self.sampling;
        *temperature <= 0.0 && logit_bias.is_empty() && !self.looks_back() && self.grammar.is_none()
    }

    /// Whether a choice depends on the tokens before it.
    fn looks_back(&self) -> bool {
        let Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } = self.sampling;
        (repetition_penalty, presence_penalty, frequency_penalty) != (1.0, 0.0, 0.0)
    }

    /// Biases and penalties.
    fn weigh(&self, logits: &mut [f32]) {
        let Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } = self.sampling;
        for &(id, bias) in &self.sampling.logit_bias {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit += bias;
            }
        }
        for (&id, &times) in &self.seen {
            let Some(logit) = logits.get_mut(id as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / repetition_penalty } else { *logit * repetition_penalty };
            if times > 0 {
                *logit -= presence_penalty + frequency_penalty * times as f32;
            }
        }
    }

    /// A token drawn from what temperature and cuts leave.
    fn draw(&mut self, logits: &[f32]) -> u32 {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.sampling;
        let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |logit: f32| (f64::from(logit - top) / f64::from(temperature)).exp();
        let all = logits.iter().enumerate().filter(|(_, logit)| **logit > f32::NEG_INFINITY);
        let mut left: Vec<(u32, f64)> = all.map(|(id, logit)| (id as u32, weight(*logit))).collect();
        left.retain(|(_, weight)| *weight >= f64::from(min_p));
        let heavier = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if top_k > 0 && top_k < left.len() {
            left.select_nth_unstable_by(top_k - 1, heavier);
            left.truncate(top_k);
        }
        if top_p < 1.0 {
            left.sort_unstable_by(heavier);
            let mut rest = f64::from(top_p) * left.iter().map(|(_, weight)| weight).sum::<f64>();
            let needed = left.iter().position(|(_, weight)| {
                rest -= weight;
                rest <= 0.0
            });
            left.truncate(needed.map_or(left.len(), |i| i + 1));
        }
        // In one order, whatever the cuts left it in.
        left.sort_unstable_by_key(|(id, _)| *id);
        let sum: f64 = left.iter().map(|(_, weight)| weight).sum();
        let mut rest = (self.draws.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * sum;
        let drawn = left.iter().find(|(_, weight)| {
            rest -= weight;
            rest < 0.0
        });
        drawn.or(left.last()).map_or_else(|| greedy(logits), |(id, _)| *id)
    }
}

/// The natural logarithm of the probability of token `id` after these logits `[vocab]`, and the `count` most probable tokens with
/// theirs, most probable first.
pub fn log_probabilities(logits: &[f32], id: u32, count: usize) -> (f32, Vec<(u32, f32)>) {
    let top = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - top).exp()).sum();
    let all = top + sum.ln();
    let logprob = |id: u32| (f64::from(logits[id as usize]) - all) as f32;
    let count = count.min(logits.len());
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let better = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if count > 0 && count < ids.len() {
        ids.select_nth_unstable_by(count - 1, better);
    }
    ids.truncate(count);
    ids.sort_unstable_by(better);
    (logprob(id), ids.into_iter().map(|id| (id, logprob(id))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, -1.0, 2.5];

    fn shares(sampling: Sampling, logits: &[f32]) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for seed in 0..4000 {
            let mut sampler = Sampler::new(Sampling { seed, ..sampling.clone() }, None, &[]);
            counts[sampler.choose(logits, &[]).unwrap() as usize] += 1.0 / 4000.0;
        }
        counts
    }

    fn softmax(logits: &[f32], of: &[usize], temperature: f64) -> Vec<f64> {
        let weight = |i: usize| (f64::from(logits[i]) / temperature).exp();
        let sum: f64 = of.iter().map(|&i| weight(i)).sum();
        (0..logits.len()).map(|i| if of.contains(&i) { weight(i) / sum } else { 0.0 }).collect()
    }

    #[test]
    fn draws_follow_the_probabilities_that_the_cuts_leave() {
        let warm = Sampling { temperature: 0.8, ..Sampling::default() };
        let cases = [
            (warm.clone(), vec![0, 1, 2, 3, 4]),
            (Sampling { top_k: 2, ..warm.clone() }, vec![1, 4]),
            // Weights over the largest: .082, 1, .287, .0067, .535.
            (Sampling { min_p: 0.2, ..warm.clone() }, vec![1, 2, 4]),
            // Probabilities: .043, .523, .150, .004, .280.
            (Sampling { top_p: 0.6, ..warm.clone() }, vec![1, 4]),
            (Sampling { top_p: 0.5, ..warm }, vec![1]),
        ];
        for (sampling, left) in cases {
            let (got, wanted) = (shares(sampling.clone(), &LOGITS), softmax(&LOGITS, &left, 0.8));
            let off = got.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(off < 0.03, "{sampling:?}: {got:?}, wanted {wanted:?}");
        }
    }

    #[test]
    fn the_same_seed_draws_the_same_and_greedy_needs_none() {
        let warm = Sampling { temperature: 1.0, seed: 7, ..Sampling::default() };
        let draw = |sampling: &Sampling| {
            let mut sampler = Sampler::new(sampling.clone(), None, &[]);
            (0..50).map(|_| sampler.choose(&LOGITS, &[]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(&warm), draw(&warm));
        assert_ne!(draw(&warm), draw(&Sampling { seed: 8, ..warm }));
        assert_eq!(draw(&Sampling::default()), [1; 50]);
    }

    #[test]
    fn penalties_biases_and_bans_move_the_choice() {
        let choose = |sampling: Sampling, before: &[u32], banned: &[u32]| {
            let mut sampler = Sampler::new(sampling, None, before);
            (0..3).map(|_| sampler.choose(&LOGITS, banned).unwrap()).collect::<Vec<_>>()
        };
        let plain = Sampling::default();
        assert_eq!(choose(plain.clone(), &[], &[1]), [4, 4, 4]);
        assert!(Sampler::new(plain.clone(), None, &[]).choose(&LOGITS, &[0, 1, 2, 3, 4]).is_err());
        assert_eq!(choose(Sampling { presence_penalty: 1.5, ..plain.clone() }, &[1], &[]), [1, 4, 2]);
        assert_eq!(choose(Sampling { frequency_penalty: 0.3, ..plain.clone() }, &[], &[]), [1, 1, 4]);
        assert_eq!(choose(Sampling { repetition_penalty: 1.3, ..plain.clone() }, &[1], &[])[0], 4);
        assert_eq!(choose(Sampling { logit_bias: vec![(3, 9.0), (77, 1.0)], ..plain }, &[], &[])[0], 3);
    }

    #[test]
    fn a_grammar_restricts_and_hears_of_what_was_chosen() {
        struct Even(Vec<u32>);
        impl Grammar for Even {
            fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
                logits.iter_mut().skip(1).step_by(2).for_each(|x| *x = f32::NEG_INFINITY);
                if self.0.len() == 2 {
                    logits.fill(f32::NEG_INFINITY);
                }
                Ok(())
            }
            fn accept(&mut self, token: u32) -> Result<(), String> {
                self.0.push(token);
                Ok(())
            }
        }
        let mut sampler = Sampler::new(Sampling::default(), Some(Box::new(Even(vec![]))), &[]);
        assert_eq!(sampler.choose(&LOGITS, &[]), Ok(4));
        assert_eq!(sampler.choose(&LOGITS, &[4]), Ok(2));
        assert!(sampler.choose(&LOGITS, &[]).unwrap_err().contains("no token"));
    }

    #[test]
    fn log_probabilities_sum_to_one_and_come_in_order() {
        let (logprob, top) = log_probabilities(&LOGITS, 2, 5);
        let sum: f32 = top.iter().map(|(_, logprob)| logprob.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
        assert_eq!(top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 4, 2, 0, 3]);
        assert_eq!(top[2].1, logprob);
        assert_eq!(log_probabilities(&LOGITS, 2, 0).1, []);
        assert_eq!(log_probabilities(&LOGITS, 0, 1).1[0].0, 1);
    }
}
